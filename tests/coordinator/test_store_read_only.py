"""A store that is opened to be read, beside a coordinator that writes: all is there, and nothing is touched."""

import pytest

from coordinator.blobs import INLINE_BYTES, lies_in_file
from coordinator.records import Changes, Checkpoint, TaskRecord
from coordinator.store import Store
from fedrt.errors import DamageError, StorageError
from fedrt.task import TaskKind, Verdict
from tests.coordinator.test_store import NORTH, TASK, committed, event, experiment, tensors


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "a directory? #1"


@pytest.fixture
def writer(directory):
    store = Store(directory)
    yield store
    store.close()


@pytest.fixture
def reader(writer, directory):
    store = Store(directory, read_only=True)
    yield store
    store.close()


def result(task_id, ref, experiment_id="e1", round_number=1):
    return TaskRecord(
        task_id, experiment_id, "north", round_number, TaskKind.TRAIN, 0, verdict=Verdict.ACCEPTED, tensors=ref
    )


def test_everything_is_read_that_has_been_committed_beside(writer, reader):
    ref, data = tensors(3)
    large, much = tensors(INLINE_BYTES)
    for number in range(2):
        task = result(f"e1/{number}/train/north", ref, round_number=number)
        checkpoint = Checkpoint("e1", number, ref, large)
        committed(
            writer,
            experiments={"e1": experiment()},
            tasks={task.task_id: task},
            checkpoints=[checkpoint],
            silos={"north": NORTH},
            blobs={ref.sha256: data, large.sha256: much},
            events=[event(message=str(number))],
        )
        assert reader.task(task.task_id) == task
        assert reader.round_tasks("e1", number) == [task]
        assert reader.checkpoint("e1") == checkpoint
        assert [entry.event.message for entry in reader.events(number, "e1", 10)] == [str(number)]
    assert reader.experiment("e1") == experiment()
    assert reader.experiments(10, 0) == reader.active_experiments() == [experiment()]
    assert reader.silos() == [NORTH]
    assert (reader.blob(ref), reader.blob(large)) == (data, much)


def test_the_tasks_of_an_experiment_come_by_round_and_name(writer, reader):
    wanted = [result("e1/2/train/a", None, round_number=2), result("e1/10/train/a", None, round_number=10), TASK]
    others = [result("e2/1/train/a", None, "e2")]
    committed(writer, tasks={task.task_id: task for task in (*wanted, *others)})
    assert reader.tasks("e1") == [TASK, wanted[0], wanted[1]]
    assert reader.tasks("e3") == []


def test_the_checkpoints_of_an_experiment_come_by_round(writer, reader):
    found = [Checkpoint("e1", number, tensors(3, number)[0]) for number in (10, 0, 9)]
    committed(writer, checkpoints=[*found, Checkpoint("e2", 1, tensors(3)[0])])
    assert reader.checkpoints("e1") == [found[1], found[2], found[0]]
    assert reader.checkpoints("e3") == []


def test_the_blobs_that_are_needed_are_listed_once_with_their_sizes(writer, reader):
    update, shared, memory, orphan = (tensors(size) for size in (2, 3, INLINE_BYTES, 5))
    committed(
        writer,
        tasks={name: result(name, update[0]) for name in ("t1", "t2")} | {TASK.task_id: TASK},
        checkpoints=[Checkpoint("e1", 0, shared[0], memory[0]), Checkpoint("e1", 1, update[0])],
        blobs={ref.sha256: data for ref, data in (update, shared, memory, orphan)},
    )
    found = reader.referenced_blobs()
    assert found == {ref.sha256: len(data) for ref, data in (update, shared, memory)}
    assert [size for size in found.values() if lies_in_file(size)] == [len(memory[1])]


def test_a_blob_that_is_needed_and_not_there_is_said(writer, reader):
    committed(writer, tasks={"t1": result("t1", tensors(2)[0])})
    with pytest.raises(DamageError, match=f"blob {tensors(2)[0].sha256} is missing from the store; restore"):
        reader.referenced_blobs()


def test_reading_creates_and_removes_nothing(writer, directory):
    committed(writer, silos={"north": NORTH})
    (directory / "blobs" / ".half.1234.new").write_bytes(b"a write that the coordinator has not finished")
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.suffix != ".db-shm"}
    with_reader = Store(directory, read_only=True)
    assert with_reader.silos() == [NORTH]
    with_reader.close()
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.suffix != ".db-shm"} == before


def test_it_cannot_be_written(reader, directory):
    ref, data = tensors(INLINE_BYTES)
    with pytest.raises(ValueError, match="opened to be read"):
        reader.commit(Changes(blobs={ref.sha256: data}))
    assert list((directory / "blobs").iterdir()) == []


def test_a_coordinator_that_was_stopped_is_read_too(writer, directory):
    committed(writer, silos={"north": NORTH})
    writer.close()
    reader = Store(directory, read_only=True)
    assert reader.silos() == [NORTH]
    reader.close()
    again = Store(directory)
    committed(again, silos={"north": NORTH})
    again.close()


@pytest.mark.parametrize("there", [False, True])
def test_without_a_store_it_is_an_error_and_nothing_is_made(tmp_path, there):
    directory = tmp_path / "state"
    if there:
        directory.mkdir()
    with pytest.raises(StorageError, match=r"there is no store at '.*coordinator\.db'; check state_directory"):
        Store(directory, read_only=True)
    assert list(tmp_path.rglob("*")) == ([directory] if there else [])


def test_a_file_that_is_no_database_is_a_storage_error(tmp_path):
    (tmp_path / "coordinator.db").write_bytes(b"these are holiday pictures" * 1000)
    with pytest.raises(StorageError, match=r"cannot open .*coordinator\.db"):
        Store(tmp_path, read_only=True)


def test_a_database_that_is_damaged_is_told_from_a_disk_that_refuses(writer, directory):
    for number in range(200):
        committed(writer, events=[event(message=f"{number} " * 100)])
    writer.close()  # the file beside it is written back
    path = directory / "coordinator.db"
    damaged = bytearray(path.read_bytes())
    for place in range(len(damaged) // 2, len(damaged)):
        damaged[place] ^= 0x5A
    path.write_bytes(damaged)
    again = Store(directory, read_only=True)
    try:
        with pytest.raises(DamageError, match="malformed; it is damaged: restore the state directory from a backup"):
            again.events(0, "", 1000)
    finally:
        again.close()
