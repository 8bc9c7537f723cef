"""The store: what `commit` returned for is there after anything; what is damaged is said."""

import errno
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedrt.statefile
from coordinator.blobs import INLINE_BYTES, Landed
from coordinator.experiments import SilosChanged, create, step
from coordinator.records import (
    Changes,
    Checkpoint,
    Contribution,
    ExperimentChanged,
    NumberedEvent,
    RoundClosed,
    SiloChanged,
    SiloRecord,
    TaskRecord,
    TensorsRef,
)
from coordinator.selection import Population
from coordinator.store import Store
from fedrt.errors import DamageError, ExitCode, StorageError
from fedrt.payload import headers_of, pack
from fedrt.task import TaskKind, Verdict
from tests.samples import experiment_spec, sha256_hex

ROOT = Path(__file__).parent.parent.parent
EVERYBODY = Population(frozenset({"north", "south"}), frozenset({"north", "south"}))
NORTH = SiloRecord("north", "1.0", "cpu", ("promptfl", "zeroshot"), 12.5, connected=True, draining=True)
SOUTH = SiloRecord("south", "1.1", "", (), 0.1, connected=False)
TASK = TaskRecord("e1/1/train/north", "e1", "north", 1, TaskKind.TRAIN, 0)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def store(directory):
    store = Store(directory, clock=lambda: 77.5)
    yield store
    store.close()


@pytest.fixture
def reopened(store, directory):
    """A function that closes the store and opens it again."""
    stores = [store]

    def reopen():
        stores[-1].close()
        stores.append(Store(directory))
        return stores[-1]

    yield reopen
    stores[-1].close()


def experiment(name="e1", now=1.0, running=False):
    fresh = create(name, experiment_spec(count=2, silos=("north", "south")), "ab" * 32, now)
    return step(fresh, SilosChanged(), EVERYBODY, now)[0] if running else fresh


def tensors(elements, fill=0.5):
    """A reference to tensors and their bytes."""
    values = {"context": np.full(elements, fill, np.float32)}
    data = pack(values)
    return TensorsRef(headers_of(values), sha256_hex(data)), data


def landed(directory, data):
    """The bytes in a file beside the store, as if they had just arrived."""
    (directory / "landing").mkdir(mode=0o700, exist_ok=True)
    path = directory / "landing" / "arrival"
    path.write_bytes(data)
    return Landed(path, len(data))


def committed(store, **changes):
    store.commit(Changes(**changes))


def event(name="e1", message=""):
    return ExperimentChanged(name, "running", 1, TaskKind.TRAIN, message, None)


class TestRecords:
    @pytest.mark.parametrize("running", [False, True])
    def test_experiments_come_back_as_they_were(self, store, reopened, running):
        value = experiment(running=running)
        committed(store, experiments={"e1": value})
        assert store.experiment("e1") == value
        assert reopened().experiment("e1") == value

    def test_tasks_come_back_as_they_were(self, store, reopened):
        ref, data = tensors(6)
        settled = TaskRecord(
            **{**vars(TASK), "task_id": "e1/1/train/south", "silo_id": "south", "verdict": Verdict.ACCEPTED},
        )
        full = TaskRecord(
            "e1/1/train-1/x",
            "e1",
            "x",
            1,
            TaskKind.TRAIN,
            1,
            Verdict.INVALID,
            "wrong shape: größer",
            2**40,
            {"loss": 0.1, "accuracy": 1 / 3},
            1e-9,
            ref,
        )
        committed(store, tasks={task.task_id: task for task in (TASK, settled, full)}, blobs={ref.sha256: data})
        again = reopened()
        assert [again.task(task.task_id) for task in (TASK, settled, full)] == [TASK, settled, full]
        assert again.task("never-offered") is None

    def test_tasks_are_found_by_round(self, store):
        others = [
            TaskRecord("e1/1/evaluate/north", "e1", "north", 1, TaskKind.EVALUATE, 0),
            TaskRecord("e1/2/train/north", "e1", "north", 2, TaskKind.TRAIN, 0),
            TaskRecord("e2/1/train/north", "e2", "north", 1, TaskKind.TRAIN, 0),
        ]
        committed(store, tasks={task.task_id: task for task in (TASK, *others)})
        assert {task.task_id for task in store.round_tasks("e1", 1)} == {TASK.task_id, "e1/1/evaluate/north"}
        assert store.round_tasks("e1", 3) == []

    def test_silos_come_back_as_they_were_by_name(self, store, reopened):
        committed(store, silos={"south": SOUTH, "north": NORTH})
        assert reopened().silos() == [NORTH, SOUTH]

    def test_the_latest_checkpoint_is_the_one_of_the_highest_round(self, store, reopened):
        assert store.checkpoint("e1") is None
        first, second = (Checkpoint("e1", number, tensors(3, number)[0], None) for number in (9, 10))
        other = Checkpoint("e2", 11, tensors(3)[0], tensors(4)[0])
        committed(store, checkpoints=[second, first, other])
        again = reopened()
        assert again.checkpoint("e1") == second
        assert again.checkpoint("e2") == other

    def test_what_is_committed_again_is_replaced(self, store):
        committed(store, experiments={"e1": experiment()}, tasks={TASK.task_id: TASK}, silos={"north": NORTH})
        running = experiment(running=True)
        late = TaskRecord(**{**vars(TASK), "verdict": Verdict.LATE})
        moved = SiloRecord(**{**vars(NORTH), "connected": False})
        checkpoints = [Checkpoint("e1", 0, tensors(3, fill)[0]) for fill in (1, 2)]
        committed(store, checkpoints=checkpoints[:1])
        committed(
            store,
            experiments={"e1": running},
            tasks={TASK.task_id: late},
            silos={"north": moved},
            checkpoints=checkpoints[1:],
        )
        assert store.experiment("e1") == running
        assert store.task(TASK.task_id) == late
        assert store.silos() == [moved]
        assert store.checkpoint("e1") == checkpoints[1]
        assert len(store.experiments(10, 0)) == 1


class TestExperimentPages:
    @pytest.fixture(autouse=True)
    def six(self, store):
        ended = {"e2": "succeeded", "e3": "failed", "e4": "cancelled"}
        for number in range(6):
            value = experiment(f"e{number}", now=float(number), running=number == 1)
            if value.experiment_id in ended:
                value = type(value)(**{**vars(value), "state": type(value.state)(ended[value.experiment_id])})
            committed(store, experiments={value.experiment_id: value})

    def test_the_newest_come_first_in_pages(self, store):
        pages = [[value.experiment_id for value in store.experiments(4, offset)] for offset in (0, 4, 8)]
        assert pages == [["e5", "e4", "e3", "e2"], ["e1", "e0"], []]

    def test_those_that_have_not_ended_are_active_oldest_first(self, store, reopened):
        assert [value.experiment_id for value in reopened().active_experiments()] == ["e0", "e1", "e5"]

    def test_an_experiment_that_was_never_created_is_none(self, store):
        assert store.experiment("e9") is None


class TestEvents:
    def test_every_kind_of_event_comes_back_in_order_with_number_and_time(self, store, reopened):
        closed = RoundClosed(
            "e1",
            1,
            TaskKind.TRAIN,
            0,
            (Contribution("north", 3, {"loss": 0.25}, 1.5, 64),),
            (("south", "no result"),),
            {"loss": 0.25},
            succeeded=True,
            duration=2.5,
        )
        ended = ExperimentChanged("e1", "succeeded", 1, TaskKind.EVALUATE, "", 9.0)
        events = [event(), closed, SiloChanged(NORTH), ended]
        committed(store, events=events)
        expected = [NumberedEvent(number, 77.5, value) for number, value in enumerate(events, 1)]
        assert reopened().events(0, "", 100) == expected

    def test_events_are_read_in_pages_after_a_number(self, store):
        for number in range(7):
            committed(store, events=[event(message=str(number))])
        first = store.events(0, "", 3)
        second = store.events(first[-1].number, "", 3)
        third = store.events(second[-1].number, "", 3)
        assert [e.event.message for e in (*first, *second, *third)] == list("0123456")
        assert store.events(third[-1].number, "", 3) == []

    def test_events_of_one_experiment_leave_out_those_of_others_and_of_silos(self, store):
        committed(store, events=[event("e1", "a"), event("e2", "b"), SiloChanged(NORTH), event("e1", "c")])
        assert [e.event.message for e in store.events(0, "e1", 10)] == ["a", "c"]

    def test_numbers_are_never_used_twice(self, store, reopened, directory):
        committed(store, events=[event(), event()])
        store.close()
        with sqlite3.connect(directory / "coordinator.db") as connection:
            connection.execute("DELETE FROM events")
        connection.close()
        again = reopened()
        committed(again, events=[event()])
        assert [e.number for e in again.events(0, "", 10)] == [3]


class TestBlobs:
    @pytest.mark.parametrize("elements", [1, INLINE_BYTES // 4, INLINE_BYTES // 4 + 1, INLINE_BYTES])
    def test_blobs_come_back_as_they_were_whatever_their_size(self, store, reopened, elements):
        ref, data = tensors(elements)
        committed(store, blobs={ref.sha256: data})
        assert store.blob(ref) == data
        assert reopened().blob(ref) == data

    def test_only_large_blobs_are_files(self, store, directory):
        small, large = tensors(INLINE_BYTES // 4), tensors(INLINE_BYTES // 4 + 1)
        committed(store, blobs={ref.sha256: data for ref, data in (small, large)})
        files = [path for path in (directory / "blobs").rglob("*") if path.is_file()]
        assert files == [directory / "blobs" / large[0].sha256]

    def test_a_blob_that_is_known_is_not_written_again(self, store, directory):
        ref, data = tensors(INLINE_BYTES)
        committed(store, blobs={ref.sha256: data})
        before = (directory / "blobs" / ref.sha256).stat().st_mtime_ns
        committed(store, blobs={ref.sha256: data})
        assert (directory / "blobs" / ref.sha256).stat().st_mtime_ns == before
        assert store.blob(ref) == data

    def test_a_blob_that_landed_in_a_file_is_moved_into_the_store(self, store, reopened, directory):
        ref, data = tensors(INLINE_BYTES)
        committed(store, blobs={ref.sha256: landed(directory, data)})
        assert store.blob(ref) == data
        assert reopened().blob(ref) == data
        assert list((directory / "landing").iterdir()) == []

    def test_a_blob_that_lands_twice_leaves_no_file_behind(self, store, directory):
        ref, data = tensors(INLINE_BYTES)
        for _ in range(2):
            committed(store, blobs={ref.sha256: landed(directory, data)})
        assert store.blob(ref) == data
        assert list((directory / "landing").iterdir()) == []

    def test_a_commit_that_is_tried_again_finds_the_blob_that_was_moved_already(self, store, directory):
        ref, data = tensors(INLINE_BYTES)
        broken = SiloRecord("south", "1.0", "cpu", (object(),), 0.0, connected=True)
        changes = Changes(silos={"south": broken}, blobs={ref.sha256: landed(directory, data)})
        with pytest.raises(Exception, match="serialize"):
            store.commit(changes)
        changes.silos = {"south": SOUTH}
        store.commit(changes)
        assert store.blob(ref) == data

    def test_a_blob_is_found_that_an_attempt_has_moved_before_it_failed(self, store, directory, monkeypatch):
        ref, data = tensors(INLINE_BYTES)
        changes = Changes(blobs={ref.sha256: landed(directory, data)})
        sync, refused = fedrt.statefile._sync, []

        def refusing_directories_once(path, flags):
            if path.is_dir() and not refused:
                refused.append(path)
                raise OSError(5, "Input/output error")
            sync(path, flags)

        monkeypatch.setattr(fedrt.statefile, "_sync", refusing_directories_once)
        with pytest.raises(StorageError):
            store.commit(changes)
        store.commit(changes)
        assert store.blob(ref) == data

    @pytest.mark.parametrize("kind", ["landed", "bytes"])
    def test_a_file_that_a_crash_left_is_not_trusted(self, store, directory, kind):
        """It has no row, so it may have been damaged since without anybody having noticed."""
        ref, data = tensors(INLINE_BYTES)
        (directory / "blobs" / ref.sha256).write_bytes(bytes(len(data)))
        committed(store, blobs={ref.sha256: landed(directory, data) if kind == "landed" else data})
        assert store.blob(ref) == data

    def test_a_blob_that_was_never_committed_is_missing(self, store):
        with pytest.raises(StorageError, match=r"blob .* is missing from the store; restore the state directory"):
            store.blob(tensors(3)[0])

    @pytest.mark.parametrize("spoil", ["bit", "cut", "longer", "empty", "gone"])
    def test_a_damaged_large_blob_is_said_after_a_restart(self, store, reopened, directory, spoil):
        ref, data = tensors(INLINE_BYTES)
        committed(store, blobs={ref.sha256: data})
        path = directory / "blobs" / ref.sha256
        content = bytearray(path.read_bytes())
        content[1234] ^= 1
        kinds = {"bit": content, "cut": content[:-1], "longer": bytes(data) + b"x", "empty": b""}
        if spoil == "gone":
            path.unlink()
        else:
            path.write_bytes(kinds[spoil])
        with pytest.raises(StorageError, match="restore the state directory from a backup"):
            reopened().blob(ref)

    @pytest.mark.parametrize("known", [False, True])
    @pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
    def test_a_large_blob_that_cannot_be_read_now_is_no_damage(self, store, reopened, monkeypatch, number, known):
        """Or an experiment would fail for good because of a file mode, or of too many open files."""
        ref, data = tensors(INLINE_BYTES)
        committed(store, blobs={ref.sha256: data})
        store = store if known else reopened()

        def refuse(*arguments, **options):
            raise OSError(number, "no")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            with pytest.raises(StorageError, match="cannot read") as error:
                store.blob(ref)
            assert not isinstance(error.value, DamageError)
            assert "cannot read" in store.blob_problem(ref.sha256)
        assert store.blob(ref) == data

    def test_a_damaged_small_blob_is_said(self, store, reopened, directory):
        ref, data = tensors(3)
        committed(store, blobs={ref.sha256: data})
        store.close()
        with sqlite3.connect(directory / "coordinator.db") as connection:
            connection.execute("UPDATE blobs SET data = x'00'")
        connection.close()
        with pytest.raises(StorageError, match="is damaged; restore the state directory"):
            reopened().blob(ref)

    def test_a_blob_on_loan_survives_the_next_commit(self, store):
        ref, data = tensors(INLINE_BYTES)
        committed(store, blobs={ref.sha256: data})
        loan = store.blob(ref)
        committed(store, silos={"north": NORTH})
        assert loan == data

    @pytest.mark.parametrize("known", [False, True])
    def test_a_small_blob_that_arrived_in_a_file_is_as_good_as_one_from_memory(self, store, reopened, directory, known):
        ref, data = tensors(6)
        if known:
            committed(store, blobs={ref.sha256: data})
        committed(store, blobs={ref.sha256: landed(directory, data)})
        assert store.blob(ref) == data
        assert reopened().blob(ref) == data
        assert not (directory / "landing" / "arrival").exists()

    def test_a_commit_that_is_through_has_not_failed_because_an_arrival_cannot_be_removed(self, store, directory):
        """Or it would be tried again for ever: the bytes of another arrival of it are gone by then."""
        ref, data = tensors(6)
        stuck = landed(directory, data)
        changes = Changes(blobs={ref.sha256: stuck}, events=[event()])
        taken, store.blobs._bytes_of = store.blobs._bytes_of, lambda blob: (taken(blob), swap(stuck.path))[0]
        store.commit(changes)
        assert stuck.path.is_dir()
        assert store.blob(ref) == data
        assert len(store.events(0, "", 10)) == 1


def swap(path):
    """A directory in place of a file: it cannot be removed as a file is."""
    path.unlink()
    path.mkdir()


class TestAtomicity:
    def spoilt(self):
        """Changes whose last part cannot be written."""
        ref, data = tensors(3)
        broken = SiloRecord("south", "1.0", "cpu", (object(),), 0.0, connected=True)
        return Changes(
            experiments={"e2": experiment("e2")},
            tasks={TASK.task_id: TASK},
            checkpoints=[Checkpoint("e2", 0, ref)],
            silos={"north": NORTH, "south": broken},
            blobs={ref.sha256: data},
            events=[event()],
        )

    def test_a_commit_that_fails_midway_leaves_nothing(self, store, reopened):
        committed(store, experiments={"e1": experiment()})
        with pytest.raises(Exception, match="serialize"):
            store.commit(self.spoilt())
        for now in (store, reopened()):
            assert [value.experiment_id for value in now.experiments(10, 0)] == ["e1"]
            assert now.task(TASK.task_id) is None
            assert now.checkpoint("e2") is None
            assert now.silos() == []
            assert now.events(0, "", 10) == []
            with pytest.raises(StorageError, match="missing"):
                now.blob(tensors(3)[0])

    def test_after_a_commit_that_failed_the_next_one_succeeds(self, store, reopened):
        with pytest.raises(Exception, match="serialize"):
            store.commit(self.spoilt())
        committed(store, silos={"north": NORTH})
        assert reopened().silos() == [NORTH]

    def test_a_store_that_refuses_is_a_storage_error_and_nothing_is_written(self, store, directory):
        with sqlite3.connect(directory / "coordinator.db") as other:
            other.execute("DROP TABLE events")
        other.close()
        with pytest.raises(StorageError, match=r"cannot write the coordinator's store: .*; check free space"):
            committed(store, silos={"north": NORTH}, events=[event()])
        assert store.silos() == []


class TestOpening:
    def test_files_and_directories_are_private_whatever_the_umask(self, tmp_path):
        before = os.umask(0o000)
        try:
            store = Store(tmp_path / "deep" / "state")
            ref, data = tensors(INLINE_BYTES)
            committed(store, silos={"north": NORTH}, blobs={ref.sha256: data})
            modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "state").rglob("*")}
            files = {path for path in modes if path.is_file()}
            store.close()
        finally:
            os.umask(before)
        assert any(path.name == "coordinator.db-wal" for path in modes)
        for path, mode in modes.items():
            assert mode == (0o600 if path in files else 0o700), path
        assert stat.S_IMODE((tmp_path / "deep" / "state").stat().st_mode) == 0o700

    def test_a_commit_is_forced_to_the_disk(self, store):
        """Killing a process cannot show this; only a power cut could."""
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"

    def test_a_file_that_is_no_database_is_a_storage_error(self, directory):
        directory.mkdir(mode=0o700)
        (directory / "coordinator.db").write_bytes(b"these are holiday pictures" * 1000)
        with pytest.raises(StorageError, match=r"cannot open .*coordinator\.db"):
            Store(directory)

    def test_a_directory_in_the_place_of_the_file_is_a_storage_error(self, directory):
        (directory / "coordinator.db").mkdir(parents=True, mode=0o700)
        with pytest.raises(StorageError, match=r"cannot open .*coordinator\.db"):
            Store(directory)

    def test_a_file_that_cannot_be_created_is_a_storage_error(self, directory):
        directory.mkdir(mode=0o700)
        (directory / "coordinator.db").symlink_to(directory / "nowhere" / "coordinator.db")
        with pytest.raises(StorageError, match=r"cannot open .*coordinator\.db"):
            Store(directory)

    @pytest.mark.parametrize(
        ("table", "read"),
        [
            ("experiments", lambda store: store.active_experiments()),
            ("experiments", lambda store: store.experiment("e1")),
            ("tasks", lambda store: store.task(TASK.task_id)),
            ("checkpoints", lambda store: store.checkpoint("e1")),
            ("silos", lambda store: store.silos()),
            ("events", lambda store: store.events(0, "", 10)),
        ],
    )
    @pytest.mark.parametrize("document", ["not json", '{"kind": "Unheard"}'])
    def test_a_damaged_document_is_a_storage_error(self, store, reopened, directory, table, read, document):
        committed(
            store,
            experiments={"e1": experiment()},
            tasks={TASK.task_id: TASK},
            checkpoints=[Checkpoint("e1", 0, tensors(3)[0])],
            silos={"north": NORTH},
            events=[event()],
        )
        store.close()
        with sqlite3.connect(directory / "coordinator.db") as connection:
            connection.execute(f"UPDATE {table} SET document = ?", (document,))
        connection.close()
        with pytest.raises(StorageError):
            read(reopened())

    def test_a_storage_error_ends_a_daemon_as_a_temporary_failure(self):
        assert StorageError.exit_code is ExitCode.TEMPORARY


COMMITTING = """
import sys
from pathlib import Path
from coordinator.records import Changes, SiloRecord
from coordinator.store import Store
from tests.coordinator.test_store import event, tensors
store = Store(Path(sys.argv[1]))
for number in range(100_000):
    ref, data = tensors(300_000 if number % 7 == 0 else 5, fill=number)
    silo = SiloRecord(f"s{number:06}", "1", "cpu", (), float(number), connected=True)
    store.commit(Changes(silos={silo.silo_id: silo}, events=[event(message=str(number))], blobs={ref.sha256: data}))
    print(number, flush=True)
"""


def test_every_acknowledged_commit_survives_kill_9(directory):
    command = [sys.executable, "-c", COMMITTING, str(directory)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    acknowledged = -1
    try:
        while acknowledged < 40:
            acknowledged = int(child.stdout.readline())
    finally:
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        child.wait()
        child.stdout.close()
    acknowledged = int((rest.split() or [acknowledged])[-1])
    store = Store(directory)
    silos = [silo.silo_id for silo in store.silos()]
    events = [int(e.event.message) for e in store.events(0, "", 1_000_000)]
    assert events == list(range(len(events)))
    assert silos == [f"s{number:06}" for number in events]
    assert len(events) in (acknowledged + 1, acknowledged + 2)  # one commit may have been under way
    for number in events:
        ref, data = tensors(300_000 if number % 7 == 0 else 5, fill=number)
        assert store.blob(ref) == data
    store.close()
