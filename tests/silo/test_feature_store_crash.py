"""Real processes that share a store of features and are killed, disturbed by each other, or refused by the disk."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from silo.feature_store import FeatureKind, FeatureStore, row_key
from silo.feature_store.segments import WORDS

BOUND = 1 << 26
KIND = FeatureKind("ViT-B-16", False, "ab" * 32, "cd" * 32, "cpu", patches=False, element_type="float32")
WRITER = """
import hashlib, itertools, resource, sys
from pathlib import Path
import numpy as np
from silo.feature_store import FeatureKind, FeatureStore, KeptRows, row_key

directory, first, last, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
kind = FeatureKind("ViT-B-16", False, "ab" * 32, "cd" * 32, "cpu", patches=False, element_type="float32")
store = FeatureStore(directory, 1 << 26)
wanted = {row_key(hashlib.sha256(str(n).encode()).digest(), 0): n for n in range(first, last)}
kept = KeptRows(lambda: store.shelf(kind), itertools.count(0, 1).__next__)  # rows go in twos
found = kept.find(wanted, lambda: None)
print(len(found), flush=True)
for key, number in wanted.items():
    if key not in found:
        kept.add(key, np.full((1, 4096), number, np.float32))
kept.settle()
print(kept.in_memory_count, kept.problem, flush=True)
"""


def write(place: Path, first: int, last: int, limit: int = 0) -> "subprocess.Popen[str]":
    """A process that saves rows first to last - 1, some at a time, but for those that are there."""
    arguments = [str(place), str(first), str(last), str(limit)]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def found_rows(place: Path, count: int) -> set[int]:
    """Which rows there are; each is what was written."""
    store = FeatureStore(place, BOUND)
    keys = {row_key(hashlib.sha256(str(number).encode()).digest(), 0): number for number in range(count)}
    found = store.shelf(KIND).find(keys)
    for key, row in found.items():
        assert np.array_equal(row, np.full((1, 4096), keys[key], np.float32))
    store.close()
    return {keys[key] for key in found}


def record_count(place: Path) -> int:
    return sum(path.stat().st_size // (4 * WORDS) - 1 for path in place.glob("*/*.keys"))


def test_a_writer_killed_at_any_moment_loses_only_what_it_was_writing(tmp_path: Path) -> None:
    place, count, chance = tmp_path / "features", 600, random.Random(4)
    before: set[int] = set()
    for _ in range(8):
        child = write(place, 0, count)
        assert child.stdout is not None
        assert int(child.stdout.readline()) == len(before)  # what was there is not written again
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.communicate()
        after = found_rows(place, count)
        assert before <= after
        before = after
    assert 0 < len(before) < count
    assert write(place, 0, count).communicate(timeout=60)[0].splitlines() == [str(len(before)), "0 None"]
    before = found_rows(place, count)
    assert before == set(range(count))
    assert record_count(place) == count
    assert len(list(place.glob("*/*.keys"))) == -(-count // 64)  # each went on in the segment of the one before


def test_processes_that_build_at_once_find_each_others_rows(tmp_path: Path) -> None:
    place = tmp_path / "features"
    children = [write(place, 0, 150), write(place, 100, 250), write(place, 0, 150)]
    for child in children:
        out, err = child.communicate(timeout=60)
        assert out.splitlines()[-1] == "0 None", err
    assert found_rows(place, 300) == set(range(250))
    assert 250 <= record_count(place) <= 450


def test_a_full_disk_leaves_what_was_saved_and_recovers(tmp_path: Path) -> None:
    place = tmp_path / "features"
    child = write(place, 0, 20, limit=10 * 4 * 4096 + 100)  # ten rows and no eleventh
    out, err = child.communicate(timeout=60)
    kept_in_memory, problem = out.splitlines()[-1].split(" ", 1)
    assert int(kept_in_memory) == 10, err
    assert "cannot write" in problem
    assert "features stay in memory" in err
    assert found_rows(place, 20) == set(range(10))
    child = write(place, 0, 20)
    assert child.communicate(timeout=60)[0].splitlines() == ["10", "0 None"]
    assert found_rows(place, 20) == set(range(20))
