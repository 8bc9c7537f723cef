"""Golden transcripts of whole sessions. Single rules are in `test_connection`."""

from pathlib import Path

import pytest

from tests.fedrt.session.transcript import replay

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "session").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_transcript(path, rewrite_golden):
    now = replay(path)
    if rewrite_golden:
        path.write_text(now)
    assert now == path.read_text()


def test_there_are_golden_transcripts():
    assert len(GOLDEN) >= 6
