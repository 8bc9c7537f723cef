"""Golden transcripts of the ledger. Single rules and random histories are in `test_ledger`."""

from pathlib import Path

import pytest

from tests.silo.transcript import replay

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "ledger").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_transcript(path, rewrite_golden):
    now = replay(path)
    if rewrite_golden:
        path.write_text(now)
    assert now == path.read_text()


def test_there_are_golden_transcripts():
    assert len(GOLDEN) >= 6
