"""Garbage collection: what nothing needs goes, what anything needs stays, whatever happens meanwhile."""

import asyncio
import math
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator import retention
from coordinator.actions import StoreThread
from coordinator.backup_lock import FILE_NAME, keeping_blobs, removing_blobs
from coordinator.blobs import INLINE_BYTES
from coordinator.cli import app
from coordinator.experiments import ExperimentState
from coordinator.records import Changes, Checkpoint, SiloRecord
from coordinator.retention import BlobsKeptError, Freed, collect, collect_daily
from coordinator.store import Store
from coordinator.verification import verify
from fedrt.errors import DamageError, StorageError
from fedrt.locking import DirectoryLock
from tests.coordinator.old_stores import make_store, query
from tests.coordinator.test_store import NORTH, committed, experiment, landed, tensors
from tests.coordinator.test_store_read_only import result

ROOT = Path(__file__).parent.parent.parent
NOW, DAY = 1_000_000.0, 86_400.0
SMALL, LARGE = 3, INLINE_BYTES  # float32 numbers: in the database, in a file


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def store(directory):
    store = Store(directory)
    yield store
    store.close()


def collected(store, directory, updates=math.inf, now=NOW):
    """What a collection freed in all."""
    return sum(collect(store, directory, updates, now), Freed())


def put(store, *refs_and_data):
    """Commit blobs that nothing needs."""
    committed(store, blobs={ref.sha256: data for ref, data in refs_and_data})


def files(directory):
    """The names of the files of blobs."""
    return {path.name for path in (directory / "blobs").iterdir() if path.is_file()}


def rows(directory):
    """The digests of the blobs in the database."""
    return {digest for (digest,) in query(directory, "SELECT sha256 FROM blobs")}


# ---- blobs


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_a_blob_that_nothing_needs_goes(store, directory, elements):
    ref, data = tensors(elements)
    put(store, (ref, data))
    assert collected(store, directory) == Freed(blob_count=1, byte_count=len(data))
    assert (rows(directory), files(directory)) == (set(), set())
    with pytest.raises(DamageError, match="missing"):
        store.blob(ref)
    assert collected(store, directory) == Freed()


@pytest.mark.parametrize("elements", [SMALL, LARGE])
@pytest.mark.parametrize("kind", ["update", "shared", "memory"])
def test_a_blob_that_anything_needs_stays(store, directory, elements, kind):
    ref, data = tensors(elements)
    other, other_data = tensors(elements, 9)
    if kind == "update":
        committed(store, tasks={"t1": result("t1", ref)})
    else:
        shared, memory = (ref, None) if kind == "shared" else (other, ref)
        committed(store, checkpoints=[Checkpoint("e1", 0, shared, memory)])
    put(store, (ref, data), (other, other_data))
    collected(store, directory)
    assert store.blob(ref) == data


def test_a_file_without_a_row_goes_and_everything_else_in_the_directory_stays(store, directory):
    put(store, tensors(LARGE))
    store.commit(Changes(tasks={"t1": result("t1", tensors(LARGE)[0])}))
    (directory / "blobs" / "intake").mkdir()
    (directory / "blobs" / "intake" / ("cd" * 32)).write_bytes(b"arriving")
    (directory / "blobs" / ".half.1234.new").write_bytes(b"a write under way")
    (directory / "blobs" / "notes").write_bytes(b"of the operator")
    (directory / "blobs" / ("ab" * 32)).write_bytes(b"what a crash left")
    assert collected(store, directory) == Freed(file_count=1, byte_count=17)
    assert files(directory) == {tensors(LARGE)[0].sha256, ".half.1234.new", "notes"}
    assert (directory / "blobs" / "intake" / ("cd" * 32)).exists()


def test_more_than_a_slice_holds_goes_in_slices(store, directory, monkeypatch):
    kept = tensors(LARGE, 500)
    committed(store, tasks={"t1": result("t1", kept[0])})
    put(store, kept, *(tensors(SMALL, number) for number in range(30)), *(tensors(LARGE, 100 + n) for n in range(5)))
    for number in range(7):
        (directory / "blobs" / f"{number:064x}").write_bytes(bytes(10))
    monkeypatch.setattr(retention, "SLICE_ROWS", 10)
    monkeypatch.setattr(retention, "SLICE_BYTES", 8 * LARGE)  # two of the large ones
    monkeypatch.setattr(retention, "_PAGE", retention._PAGE.limit(10))
    freed = list(collect(store, directory, math.inf, NOW))
    assert sum(freed, Freed()).blob_count == 35
    assert sum(freed, Freed()).file_count == 7
    assert max(one.byte_count for one in freed) <= 8 * LARGE + 10 * 4 * SMALL
    assert len(freed) > 5
    assert files(directory) == rows(directory) == {kept[0].sha256}


def test_the_same_bytes_may_come_again(store, directory):
    """Neither the row nor what this process remembers of the file may outlive the blob."""
    for elements in (SMALL, LARGE):
        ref, data = tensors(elements)
        put(store, (ref, data))
        assert store.blob(ref) == data
        collected(store, directory)
        again = landed(directory, data) if elements == LARGE else data
        committed(store, tasks={"t1": result("t1", ref)}, blobs={ref.sha256: again})
        assert store.blob(ref) == data
        collected(store, directory)
        assert store.blob(ref) == data
        committed(store, tasks={"t1": result("t1", None)})
        collected(store, directory)


def test_a_blob_that_was_collected_and_damaged_since_is_not_taken_for_intact(store, directory):
    ref, data = tensors(LARGE)
    put(store, (ref, data))
    collected(store, directory)
    (directory / "blobs" / ref.sha256).write_bytes(bytes(len(data)))
    committed(store, tasks={"t1": result("t1", ref)}, blobs={ref.sha256: data})
    assert store.blob(ref) == data


def test_files_that_a_crash_left_all_go_however_many_slices_that_takes(store, directory, monkeypatch):
    monkeypatch.setattr(retention, "SLICE_BYTES", 1)
    for number in range(5):
        (directory / "blobs" / f"{number:064x}").write_bytes(b"left")
    assert collected(store, directory).file_count == 5
    assert store.blobs.files() == []


def test_a_blob_on_loan_survives_its_collection(store, directory):
    ref, data = tensors(LARGE)
    put(store, (ref, data))
    loan = store.blob(ref)
    collected(store, directory)
    assert loan == data


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("kind", ["landed", "bytes"])
def test_what_a_commit_put_that_the_disk_refused_is_there_when_it_is_tried_again(store, directory, kind, there):
    ref, data = tensors(LARGE)
    if there:
        put(store, (ref, data))  # a row, too, that nothing needs
    broken = SiloRecord("south", "1.0", "cpu", (object(),), 0.0, connected=True)
    blob = landed(directory, data) if kind == "landed" else data
    changes = Changes(tasks={"t1": result("t1", ref)}, silos={"south": broken}, blobs={ref.sha256: blob})
    with pytest.raises(Exception, match="serialize"):
        store.commit(changes)
    collected(store, directory)
    changes.silos = {"north": NORTH}
    store.commit(changes)
    assert store.blob(ref) == data
    assert verify(directory).whole
    committed(store, tasks={"t1": result("t1", None)})
    assert collected(store, directory).blob_count == 1


def test_a_disk_that_refuses_is_a_storage_error_and_the_rest_stays(store, directory):
    put(store, tensors(LARGE))
    path = directory / "blobs" / tensors(LARGE)[0].sha256
    path.unlink()
    path.mkdir()  # cannot be unlinked
    with pytest.raises(StorageError, match="cannot remove"):
        collected(store, directory)
    assert rows(directory) == set()  # the row goes first


# ---- updates of experiments that have ended


def ended(name, end_time, state=ExperimentState.SUCCEEDED):
    return type(experiment())(**{**vars(experiment(name)), "state": state, "end_time": end_time})


@pytest.fixture
def experiments(store):
    """Two that ended, one that has not; each with an update of its own, a shared one, and a checkpoint."""
    values = [ended("old", NOW - 10 * DAY), ended("young", NOW - DAY), experiment("active")]
    for number, value in enumerate(values):
        name = value.experiment_id
        own, common, checkpoint = tensors(SMALL, number), tensors(SMALL, 77), tensors(SMALL, 100 + number)
        found = [result(f"{name}/1/train/a", own[0], name), result(f"{name}/2/train/a", common[0], name, 2)]
        committed(
            store,
            experiments={name: value},
            tasks={task.task_id: task for task in found},
            checkpoints=[Checkpoint(name, 0, checkpoint[0])],
            blobs={ref.sha256: data for ref, data in (own, common, checkpoint)},
        )


@pytest.mark.usefixtures("experiments")
class TestUpdates:
    def test_by_default_all_stay(self, store, directory):
        assert collected(store, directory) == Freed()

    def test_those_of_experiments_that_ended_long_ago_are_forgotten(self, store, directory):
        before = store.tasks("old")
        freed = collected(store, directory, updates=5 * DAY)
        assert freed == Freed(update_count=2, blob_count=1, byte_count=4 * SMALL)  # others still need the shared one
        assert store.tasks("old") == before  # the records stay, with their digests
        assert store.forgotten_tasks("old") == {"old/1/train/a", "old/2/train/a"}
        assert store.forgotten_tasks("young") == store.forgotten_tasks("active") == frozenset()
        assert store.blob(store.checkpoint("old").shared) == tensors(SMALL, 100)[1]
        with pytest.raises(DamageError):
            store.blob(before[0].tensors)
        for name in ("young", "active"):
            for task in store.tasks(name):
                assert len(store.blob(task.tensors)) == 4 * SMALL
        assert verify(directory).whole
        assert verify(directory).forgotten_update_count == 2
        assert collected(store, directory, updates=5 * DAY) == Freed()

    def test_those_of_an_experiment_under_way_stay_however_old(self, store, directory):
        freed = collected(store, directory, updates=3600.0, now=NOW + 10_000 * DAY)
        assert freed.update_count == 4
        assert store.forgotten_tasks("active") == frozenset()
        assert all(store.blob(task.tensors) for task in store.tasks("active"))

    @pytest.mark.parametrize("state", [state for state in ExperimentState if state.has_ended])
    def test_however_it_ended(self, store, directory, state):
        committed(store, experiments={"young": ended("young", NOW - 10 * DAY, state)})
        assert collected(store, directory, updates=5 * DAY).update_count == 4

    def test_an_update_that_is_a_checkpoint_too_stays(self, store, directory):
        ref, data = tensors(SMALL, 0)
        committed(store, checkpoints=[Checkpoint("old", 1, ref)])
        collected(store, directory, updates=5 * DAY)
        assert store.blob(ref) == data


# ---- backups


def test_nothing_goes_while_a_backup_holds_the_lock(store, directory):
    put(store, tensors(SMALL), tensors(LARGE))
    with keeping_blobs(directory), keeping_blobs(directory):  # two at the same time
        with pytest.raises(BlobsKeptError, match="a backup or a check reads the store; collect when it is through"):
            collected(store, directory)
        assert len(rows(directory)) == 2
    assert collected(store, directory).blob_count == 2


def test_a_backup_that_comes_between_two_slices_ends_the_collection(store, directory, monkeypatch):
    monkeypatch.setattr(retention, "_PAGE", retention._PAGE.limit(1))
    put(store, *(tensors(SMALL, number) for number in range(5)))
    slices = collect(store, directory, math.inf, NOW)
    assert next(slices).blob_count == 1
    with keeping_blobs(directory), pytest.raises(BlobsKeptError):
        next(slices)
    assert len(rows(directory)) == 4


HOLDING = """
import sys
from pathlib import Path
from coordinator.backup_lock import keeping_blobs
with keeping_blobs(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_backup_is_another_process_and_may_die(store, directory):
    command = [sys.executable, "-c", HOLDING, str(directory)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with removing_blobs(directory) as allowed:
            assert not allowed
    finally:
        child.kill()
        child.communicate()
    with removing_blobs(directory) as allowed:
        assert allowed
    assert stat.S_IMODE((directory / FILE_NAME).stat().st_mode) == 0o600


def test_a_lock_that_cannot_be_made_is_a_storage_error(tmp_path):
    for hold in (keeping_blobs, removing_blobs):
        with pytest.raises(StorageError, match=r"cannot open .*backup\.lock"), hold(tmp_path / "nowhere"):
            pass


# ---- the running coordinator


class Slices:
    """The store's thread; `done` is set after the last slice of a collection."""

    def __init__(self):
        self.thread, self.done = StoreThread(), asyncio.Event()

    async def __call__(self, function, *arguments):
        found = await self.thread.call(function, *arguments)
        if found is None:
            self.done.set()
        return found


@pytest.fixture
async def slices():
    found = Slices()
    yield found
    found.thread.close()


async def until_done(slices, collecting):
    """Wait for the end of a collection, and stop before the next."""
    done = asyncio.create_task(slices.done.wait())
    await asyncio.wait({done, collecting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (done, collecting):
        task.cancel()
    results = await asyncio.gather(done, collecting, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)


async def test_the_coordinator_collects_and_commits_meanwhile(store, directory, slices, monkeypatch, capsys):
    monkeypatch.setattr(retention, "_PAGE", retention._PAGE.limit(1))
    put(store, *(tensors(SMALL, number) for number in range(20)))
    collecting = asyncio.create_task(collect_daily(slices, store, directory, math.inf))
    ref, data = tensors(SMALL, 3)
    await slices.thread.call(store.commit, Changes(tasks={"t1": result("t1", ref)}, blobs={ref.sha256: data}))
    assert not slices.done.is_set()  # it got its turn between two slices
    await until_done(slices, collecting)
    assert store.blob(ref) == data
    assert rows(directory) == {ref.sha256}
    assert "garbage collected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "level"), [(StorageError("the disk is tired"), "warning"), (BlobsKeptError("a backup"), "info")]
)
async def test_what_could_not_be_finished_is_tried_again_soon(
    store, directory, slices, monkeypatch, capsys, error, level
):
    monkeypatch.setattr(retention, "RETRY_INTERVAL", 0.0)
    real, calls = retention.collect, []

    def failing_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        yield from real(*arguments)

    monkeypatch.setattr(retention, "collect", failing_once)
    put(store, tensors(SMALL))
    await until_done(slices, asyncio.create_task(collect_daily(slices, store, directory, 5.0, clock=lambda: NOW)))
    assert rows(directory) == set()
    assert calls == [(store, directory, 5.0, NOW)] * 2  # and the next one only after a day
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "waits for an hour" in line]
    assert level in said
    assert str(error) in said


# ---- by hand


@pytest.fixture
def config(tmp_path, directory):
    path = tmp_path / "coordinator.yaml"
    path.write_text(
        "federation: demo\nlisten: {session: '127.0.0.1:0'}\nidentity: {directory: identity}\n"
        f"state_directory: {directory}\nretention: {{updates: 30d}}\n"
    )
    return path


def run(config):
    return CliRunner().invoke(app, ["collect", "--config", str(config)])


def test_by_hand_everything_is_freed_at_once(config, directory):
    make_store(directory)
    Store(directory).close()
    (directory / "blobs" / ("ab" * 32)).write_bytes(bytes(2**19))
    done = run(config)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        "freed 1.5 MiB: removed 5 blobs and 1 files that no row named; forgot the updates of 5 tasks\n"
    )
    assert files(directory) == set()
    assert verify(directory).whole
    assert verify(directory).forgotten_update_count == 5


def test_by_hand_not_while_the_coordinator_runs(config, directory):
    make_store(directory)
    lock = DirectoryLock(directory)
    done = run(config)
    lock.release()
    assert done.exit_code == 78
    assert "is in use by another running daemon" in done.stderr
    assert "a coordinator that runs collects by itself once a day" in done.stderr


def test_by_hand_not_while_a_backup_reads(config, directory):
    make_store(directory)
    with keeping_blobs(directory):
        done = run(config)
    assert done.exit_code == StorageError.exit_code
    assert "a backup or a check reads the store" in done.stderr


def test_by_hand_not_without_a_store(config, directory):
    done = run(config)
    assert done.exit_code == StorageError.exit_code
    assert "there is no store in" in done.stderr
    assert not directory.exists()


def test_by_hand_not_in_a_damaged_store(config, directory):
    make_store(directory)
    Store(directory).close()
    query(directory, "DELETE FROM checkpoints WHERE experiment_id = 'active'")
    before = rows(directory)
    done = run(config)
    assert done.exit_code == DamageError.exit_code
    assert "there is no checkpoint (experiment 'active')" in done.stderr
    assert rows(directory) == before
