"""Spool and vault are killed at every call that touches the disk, and then recovered as the daemon would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.killed_writer import ROUNDS, live, open_stores, settle, spooled


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """What lies in the directory after so many rounds that nothing disturbed."""
    ended = []
    for count in range(len(ROUNDS) + 1):
        directory = tmp_path_factory.mktemp(f"undisturbed-{count}")
        live(directory, lambda word: None, until=count)
        ended.append(content(directory))
    assert len({tuple(sorted(one.items())) for one in ended}) == len(ROUNDS) + 1
    return ended


def test_a_kill_at_any_call_loses_nothing_and_promotes_once(tmp_path: Path, undisturbed: list[dict[str, bytes]]):
    command = [sys.executable, "-m", "tests.fakes.killed_writer", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    runs = json.loads(done.stdout)
    killed = [run for run in runs if run["killed"]]
    assert len(killed) > 200
    settled_at_kill = set()
    for run in runs:
        directory, told = tmp_path / run["directory"], run["told"]
        put, settled = (sum(word.startswith(kind) for word in told) for kind in ("put", "settled"))
        spool, vault = open_stores(directory)  # as after a restart: leftovers go
        assert not list(directory.rglob("*.new"))
        found = spool.load()
        assert not list(directory.rglob("*.damaged"))
        assert len(found) <= 1
        if found:
            index = int(found[0].task_id.removeprefix("task-"))
            assert index in (settled, put), run  # the one whose put was under way, or not settled yet
            expected = spooled(index)
            assert found[0].shared["context"].tobytes() == expected.shared["context"].tobytes()
            assert found[0].private["own"].tobytes() == expected.private["own"].tobytes()
            settle(spool, vault, found[0])
            settled = index + 1
        elif put > settled:
            settled = put  # killed after the result was removed, before anybody was told
        assert content(directory) == undisturbed[settled], run
        settled_at_kill.add(settled)
    assert settled_at_kill == set(range(len(ROUNDS) + 1))
