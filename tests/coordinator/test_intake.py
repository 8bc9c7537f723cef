"""Results are judged while they arrive: bounded memory, private files, nothing left of what is given up."""

import os
import stat

import numpy as np
import pytest

from coordinator.blobs import INLINE_BYTES, Landed
from coordinator.inbox import ArrivedTensors, ResultArrived
from coordinator.intake import Intake, IntakeMemory, clear
from coordinator.records import TensorsRef
from fedrt.errors import FailureReason, PayloadError
from fedrt.payload import describe
from fedrt.task import Failure, Result

SMALL, LARGE = 10, INLINE_BYTES // 4 + 10


def announced(elements, bad=None):
    values = np.arange(elements, dtype=np.float32)
    if bad is not None:
        values[elements // 2] = bad
    return describe("p", {"context": values})


def taken(directory, elements, piece_bytes, bad=None):
    """An intake that has been given the whole payload in pieces."""
    manifest, data = announced(elements, bad)
    intake = Intake(manifest, directory, IntakeMemory(1 << 22))
    for start in range(0, len(data), piece_bytes):
        intake.write(data[start : start + piece_bytes])
    return intake, data


@pytest.mark.parametrize("piece_bytes", [1, 3, 4, 7, 40])
def test_a_small_result_stays_in_memory(tmp_path, piece_bytes):
    intake, data = taken(tmp_path, SMALL, piece_bytes)
    assert intake.finish() == data
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("piece_bytes", [100_001, 1 << 18])
def test_a_large_result_lands_in_one_file(tmp_path, piece_bytes):
    intake, data = taken(tmp_path, LARGE, piece_bytes)
    blob = intake.finish()
    assert isinstance(blob, Landed)
    assert blob.byte_count == len(data)
    assert blob.path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [blob.path]


def test_a_file_of_a_result_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0o000)
    try:
        blob = taken(tmp_path, LARGE, 1 << 18)[0].finish()
    finally:
        os.umask(before)
    assert stat.S_IMODE(blob.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("elements", "piece_bytes"), [(SMALL, 3), (SMALL, 40), (LARGE, 99_999), (LARGE, 1 << 18)])
def test_a_value_that_is_not_finite_is_found_however_the_bytes_are_cut(tmp_path, bad, elements, piece_bytes):
    with pytest.raises(PayloadError, match="values that are not finite"):
        taken(tmp_path, elements, piece_bytes, bad)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_nothing_is_left_of_a_result_that_is_given_up(tmp_path, elements):
    manifest, data = announced(elements)
    intake = Intake(manifest, tmp_path, IntakeMemory(1 << 22))
    intake.write(data[:1000])
    intake.discard()
    intake.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_to_remove_a_file_ends_nothing(tmp_path):
    """Or a session would end without the coordinator having noticed, or the coordinator with it."""
    intake = taken(tmp_path, LARGE, 1 << 18)[0]
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()  # which cannot be removed as a file is
    intake.discard()
    arrival = ArrivedTensors(TensorsRef((), "ab" * 32), Landed(path, 4))
    ResultArrived("north", Result("e1/1/train/north", Failure(FailureReason.INTERNAL, ""), None), arrival).discard()
    assert path.exists()


def test_what_an_earlier_run_left_is_cleared(tmp_path):
    taken(tmp_path, LARGE, 1 << 18)
    assert list(tmp_path.iterdir())
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_small_results_share_a_bounded_memory_and_go_to_files_beyond_it(tmp_path):
    memory = IntakeMemory(2 * 4 * SMALL)
    manifest, data = announced(SMALL)
    blobs = []
    for _ in range(3):
        intake = Intake(manifest, tmp_path, memory)
        intake.write(data)
        blobs.append(intake.finish())
    assert blobs[:2] == [data, data]
    assert isinstance(blobs[2], Landed)
    assert blobs[2].path.read_bytes() == data
    assert memory.taken == 2 * 4 * SMALL


def test_memory_is_given_back_with_the_last_reference_to_the_bytes(tmp_path):
    memory = IntakeMemory(100)
    manifest, data = announced(SMALL)
    intake = Intake(manifest, tmp_path, memory)
    intake.write(data)
    blob = intake.finish()
    del intake
    assert memory.taken == 4 * SMALL
    del blob
    assert memory.taken == 0


def test_what_is_given_up_gives_its_memory_back(tmp_path):
    memory = IntakeMemory(100)
    manifest, data = announced(SMALL)
    intake = Intake(manifest, tmp_path, memory)
    intake.write(data[:1])
    assert memory.taken == 4 * SMALL
    intake.discard()
    assert memory.taken == 0


def test_an_announcement_alone_takes_no_memory(tmp_path):
    memory = IntakeMemory(100)
    Intake(announced(SMALL)[0], tmp_path, memory).discard()
    assert memory.taken == 0
