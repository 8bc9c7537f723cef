"""Backups are whole, checked and cheap, and what is restored is what was backed up, or nothing."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import coordinator.backup
import coordinator.restore
import fedrt
from coordinator.backup import back_up, load_manifest
from coordinator.blobs import INLINE_BYTES
from coordinator.cli import app
from coordinator.experiments import create
from coordinator.migrations import HEAD, REVISIONS
from coordinator.records import Changes, Checkpoint, ExperimentChanged, TaskRecord, TensorsRef
from coordinator.restore import restore
from coordinator.store import Store
from coordinator.unfinished import unfinished_directory
from fedrt.errors import ConfigurationError, DamageError, ExitCode, StorageError
from fedrt.locking import DirectoryLock
from fedrt.payload import headers_of, pack
from fedrt.task import TaskKind, Verdict
from tests.coordinator.old_stores import make_store
from tests.samples import experiment_spec, sha256_hex

ROOT = Path(__file__).parent.parent.parent
NOW = datetime(2026, 11, 20, 12, 30, tzinfo=UTC)
LARGE = INLINE_BYTES // 4 + 1  # floats: a file


def tensors(elements, fill):
    values = {"context": np.full(elements, fill, np.float32)}
    data = pack(values)
    return TensorsRef(headers_of(values), sha256_hex(data)), data


def commit_round(store, number, elements=LARGE):
    """A checkpoint, a small and a large result, and an event, in one transaction."""
    parts = [tensors(elements, number), tensors(4, number), tensors(elements, -number)]
    shared, small, large = (ref for ref, _ in parts)
    tasks = [
        TaskRecord(f"e1/{number}/train/{silo}", "e1", silo, number, TaskKind.TRAIN, 0, Verdict.ACCEPTED, tensors=ref)
        for silo, ref in (("north", small), ("south", large))
    ]
    store.commit(
        Changes(
            tasks={task.task_id: task for task in tasks},
            checkpoints=[Checkpoint("e1", number, shared)],
            blobs={ref.sha256: memoryview(data) for ref, data in parts},
            events=[ExperimentChanged("e1", "running", number, TaskKind.TRAIN, "", None)],
        )
    )


def knows(directory):
    """Everything a store knows, with the bytes of its tensors."""
    store = Store(directory, read_only=True)
    try:
        refs = [task.tensors for task in store.tasks("e1")] + [point.shared for point in store.checkpoints("e1")]
        return (
            store.experiments(100, 0),
            store.tasks("e1"),
            store.checkpoints("e1"),
            store.events(0, "", 1000),
            [bytes(store.blob(ref)) for ref in refs],
        )
    finally:
        store.close()


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def flip(path, at=-1):
    """Change one bit of a file, which may be a hard link: the others keep what they were."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


def refuse(*_):
    raise OSError(errno.ENOSPC, "no space")


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def store(state):
    """Open, as that of a running coordinator is; its last commits are in the write-ahead log only."""
    store = Store(state)
    store.commit(Changes(experiments={"e1": create("e1", experiment_spec(count=9), "ab" * 32, 1.0)}))
    commit_round(store, 1)
    yield store
    store.close()


@pytest.fixture
def parent(tmp_path):
    (tmp_path / "backups").mkdir()
    return tmp_path / "backups"


@pytest.fixture
def made(store, state, parent):
    """A backup of it."""
    back_up(state, parent / "one", NOW)
    return parent / "one"


class TestBackup:
    def test_it_holds_what_the_store_knows_and_the_store_goes_on(self, store, state, parent):
        (state / "identity").mkdir()
        (state / "identity" / "key.pem").write_text("secret")
        before = knows(state)
        made = back_up(state, parent / "one", NOW)
        commit_round(store, 2)
        assert knows(parent / "one") == before != knows(state)
        digests = sorted(sha256_hex(tensors(LARGE, fill)[1]) for fill in (1, -1))
        assert files(parent / "one") == [*(f"blobs/{digest}" for digest in digests), "coordinator.db", "manifest.json"]
        assert load_manifest(parent / "one") == made.manifest
        written = (made.manifest.fedrt_version, made.manifest.schema_revision, made.manifest.create_time)
        assert written == (fedrt.__version__, HEAD, NOW)
        assert [blob.sha256 for blob in made.manifest.blobs] == digests
        assert made.manifest.database.sha256 == sha256_hex((parent / "one" / "coordinator.db").read_bytes())
        assert made.linked_bytes == sum(blob.byte_count for blob in made.manifest.blobs) == 8 * LARGE

    def test_a_stopped_coordinator_is_backed_up_too(self, store, state, parent):
        before = knows(state)
        store.close()
        back_up(state, parent / "one", NOW)
        assert knows(parent / "one") == before

    def test_only_we_can_read_it(self, made):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*") if path.is_file()}
        assert modes == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (made, made / "blobs")} == {0o700}

    def test_every_backup_of_a_store_that_is_written_to_is_whole(self, store, state, parent):
        begun, done = threading.Event(), threading.Event()

        def write():
            try:
                for number in range(2, 40):
                    commit_round(store, number)
                    begun.set()
            finally:
                begun.set()
                done.set()

        writer = threading.Thread(target=write)
        writer.start()
        begun.wait()
        count = 0
        while count < 3 or not done.is_set():
            count += 1
            back_up(state, parent / str(count), NOW)
            _, tasks, checkpoints, events, _ = knows(parent / str(count))
            numbers = [point.round_number for point in checkpoints]
            assert numbers == list(range(1, len(numbers) + 1))
            assert (len(tasks), len(events)) == (2 * len(numbers), len(numbers))
        writer.join()

    def test_what_cannot_be_linked_is_copied_and_then_linked_to_the_backup_before(
        self, store, state, parent, monkeypatch
    ):
        link = os.link

        def within(source, target):
            if Path(source).is_relative_to(state):
                raise OSError(errno.EXDEV, "another file system")
            link(source, target)

        monkeypatch.setattr(os, "link", within)
        assert back_up(state, parent / "one", NOW).linked_bytes == 0
        commit_round(store, 2)
        assert back_up(state, parent / "two", NOW).linked_bytes == 8 * LARGE
        assert knows(parent / "two") == knows(state)
        for name in files(parent / "one"):
            assert (parent / "one" / name).samefile(parent / "two" / name) == name.startswith("blobs/")

    def test_a_second_backup_reads_no_large_tensor_again(self, made, store, state, parent, monkeypatch):
        read, chunks = [], coordinator.backup._chunks
        monkeypatch.setattr(coordinator.backup, "_chunks", lambda path: read.append(path.name) or chunks(path))
        commit_round(store, 2)
        made = back_up(state, parent / "two", NOW)
        assert made.linked_bytes == 16 * LARGE
        assert sorted(read) == sorted(["coordinator.db", *(sha256_hex(tensors(LARGE, fill)[1]) for fill in (2, -2))])

    @pytest.mark.parametrize("linking", [True, False])
    @pytest.mark.parametrize(("spoil", "said"), [(flip, "is damaged"), (Path.unlink, "is missing")])
    def test_a_spoilt_tensor_is_named_and_nothing_is_left(
        self, store, state, parent, monkeypatch, linking, spoil, said
    ):
        blob = state / "blobs" / tensors(LARGE, -1)[0].sha256
        spoil(blob)
        if not linking:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))
        with pytest.raises(DamageError, match=f"{blob.name}' {said}; restore|{blob.name}' {said}: .*restore"):
            back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []

    def test_a_spoilt_small_tensor_is_named_too_and_nothing_is_left(self, store, state, parent):
        commit_round(store, 5)
        digest = tensors(4, 5)[0].sha256
        with contextlib.closing(sqlite3.connect(state / "coordinator.db")) as database:
            changed = "UPDATE blobs SET data = zeroblob(length(data)) WHERE sha256 = ?"
            assert database.execute(changed, (digest,)).rowcount == 1
            database.commit()
        with pytest.raises(DamageError, match=f"blob {digest} in '.*coordinator.db' is damaged; .*verify"):
            back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []

    def test_a_damaged_database_gives_no_backup(self, store, state, parent):
        store.close()
        with contextlib.closing(sqlite3.connect(state / "coordinator.db")) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            page = database.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'tasks_by_round'").fetchone()[0]
            size = database.execute("PRAGMA page_size").fetchone()[0]
        with (state / "coordinator.db").open("r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xff" * 64)
        with pytest.raises(DamageError, match="damaged"):
            back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []

    @pytest.mark.parametrize("step", ["write_atomic_by", "sync_directory", "write_atomic"])
    def test_a_failure_at_any_step_leaves_nothing(self, store, state, parent, monkeypatch, step):
        with monkeypatch.context() as patched:
            patched.setattr(coordinator.backup, step, refuse)
            with pytest.raises(StorageError, match="the disk is full; free space"):
                back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []
        back_up(state, parent / "one", NOW)

    def test_a_disk_without_space_for_the_database_is_named(self, store, state, parent, monkeypatch):
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StorageError, match=r"coordinator.db': the disk is full"):
            back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []

    def test_what_a_kill_left_is_removed_by_the_next_one_but_not_what_another_one_writes(self, store, state, parent):
        kill = "import os, signal, coordinator.backup as b; b.write_atomic = lambda *_: os.kill(os.getpid(), 9)"
        run = f"from pathlib import Path; from datetime import datetime; b.back_up(Path({str(state)!r}), "
        run += f"Path({str(parent / 'one')!r}), datetime.now())"
        killed = subprocess.run([sys.executable, "-c", f"{kill}; {run}"], check=False, cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL
        (left,) = parent.iterdir()
        assert files(left)
        (parent / ".empty.fedrt-backup").mkdir()  # killed right after it had begun
        with unfinished_directory(parent / "other") as other:
            (other / "something").write_text("")
            back_up(state, parent / "one", NOW)
            assert sorted(parent.iterdir()) == sorted([other, parent / "one"])
        assert files(parent / "other") == ["something"]
        assert knows(parent / "one") == knows(state)

    def test_nothing_is_collected_meanwhile(self, store, state, parent, monkeypatch):
        write, tried = coordinator.backup.write_atomic, []

        def collect():
            with (state / "backup.lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

        def while_writing(*arguments):
            with pytest.raises(BlockingIOError):
                collect()
            tried.append(True)
            write(*arguments)

        monkeypatch.setattr(coordinator.backup, "write_atomic", while_writing)
        back_up(state, parent / "one", NOW)
        assert tried
        collect()

    @pytest.mark.parametrize(
        ("where", "said"),
        [
            ("backups", "'.*backups' exists already; name a directory that does not"),
            ("absent/one", "'.*absent' is no directory; create it first"),
            ("state/blobs/one", "is inside state_directory '.*state' and would be lost with it"),
        ],
    )
    def test_a_destination_that_cannot_be_one_is_refused(self, store, state, parent, tmp_path, where, said):
        before = files(tmp_path)
        with pytest.raises(ConfigurationError, match=said):
            back_up(state, tmp_path / where, NOW)
        assert files(tmp_path) == before

    def test_a_directory_without_a_store_is_refused(self, tmp_path, parent):
        with pytest.raises(ConfigurationError, match=r"state_directory '.*nothing' holds no store"):
            back_up(tmp_path / "nothing", parent / "one", NOW)
        assert not (tmp_path / "nothing").exists()

    def test_a_file_that_is_no_store_is_refused(self, tmp_path, parent):
        state = tmp_path / "other"
        state.mkdir(mode=0o700)
        (state / "coordinator.db").write_bytes(b"something else" * 100)
        with pytest.raises(DamageError, match=r"other/coordinator.db': file is not a database; it is damaged: restore"):
            back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []

    def test_a_store_with_nothing_in_it_is_named_and_not_its_copy(self, tmp_path, parent):
        state = tmp_path / "other"
        state.mkdir(mode=0o700)
        (state / "coordinator.db").touch()
        with pytest.raises(DamageError, match=r"other/coordinator.db' is empty; restore the state directory"):
            back_up(state, parent / "one", NOW)
        assert os.listdir(parent) == []


class TestRestore:
    @pytest.mark.parametrize("prepared", [False, True])
    def test_a_coordinator_begins_where_the_backup_was_made(self, made, store, state, tmp_path, prepared):
        before, target = knows(state), tmp_path / "new" / "state"
        if prepared:  # an empty store was never there, but a lock and an interrupted restore were
            (target / "blobs").mkdir(mode=0o700, parents=True)
            (target / "lock").touch()
            (target / "blobs" / tensors(LARGE, 1)[0].sha256).write_bytes(b"half")
            (target / ".coordinator.db.01234567.new").touch()
        commit_round(store, 2)
        manifest = restore(made, target)
        assert manifest == load_manifest(made)
        assert knows(target) == before
        assert sorted(set(files(target)) - {"coordinator.db-wal", "coordinator.db-shm"}) == sorted(
            set(files(made)) - {"manifest.json"} | {"lock"}
        )
        for path in target.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.name == "lock"
        again = Store(target)
        commit_round(again, 3)  # and it can be written to
        again.close()
        assert knows(made) == before

    @pytest.mark.parametrize("name", ["coordinator.db", "coordinator.db-wal", "coordinator.db-shm"])
    def test_a_store_is_not_touched(self, made, tmp_path, name):
        target = tmp_path / "target"
        target.mkdir(mode=0o700)
        (target / name).write_text("precious")
        with pytest.raises(ConfigurationError, match=f"target' holds a store \\('{name}'\\).*move it away first"):
            restore(made, target)
        assert files(target) == sorted([name, "lock"])
        assert (target / name).read_text() == "precious"

    def test_while_a_coordinator_runs_it_is_refused(self, made, tmp_path):
        lock = DirectoryLock(tmp_path / "target")
        with pytest.raises(ConfigurationError, match="is in use by another running daemon; stop that one"):
            restore(made, tmp_path / "target")
        lock.release()

    @pytest.mark.parametrize("name", ["coordinator.db", "blobs", "manifest.json"])
    @pytest.mark.parametrize("spoil", [flip, Path.unlink])
    def test_a_spoilt_backup_is_refused_before_anything_is_written(self, made, tmp_path, name, spoil):
        path = next((made / "blobs").iterdir()) if name == "blobs" else made / name
        spoil(path)
        words = "is no backup" if path.name == "manifest.json" and spoil is Path.unlink else f"'{path}' is "
        with pytest.raises(ConfigurationError if words == "is no backup" else DamageError, match=words):
            restore(made, tmp_path / "target")
        assert files(tmp_path / "target") in ([], ["lock"])

    @pytest.mark.parametrize("change", ["fewer", "version"])
    def test_a_manifest_that_does_not_fit_the_database_is_refused(self, made, tmp_path, change):
        document = json.loads((made / "manifest.json").read_text())
        if change == "fewer":
            document["blobs"].pop()
        else:
            document["schema_revision"] = REVISIONS[0]
        (made / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(DamageError, match=r"manifest.json' is damaged: it does not fit the database"):
            restore(made, tmp_path / "target")

    @pytest.mark.parametrize("digest", ["../../etc/passwd", "AB" * 32, ""])
    def test_a_manifest_cannot_name_other_files(self, made, tmp_path, digest):
        document = json.loads((made / "manifest.json").read_text())
        document["blobs"][0]["sha256"] = digest
        (made / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(DamageError, match=r"manifest.json' is damaged"):
            restore(made, tmp_path / "target")

    @pytest.mark.parametrize("newer", [{"schema_revision": "9999"}, {"format": 2}])
    def test_a_backup_of_a_newer_version_is_refused(self, made, tmp_path, newer):
        document = json.loads((made / "manifest.json").read_text()) | newer | {"fedrt_version": "99.0"}
        (made / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(ConfigurationError, match=r"was written by a newer fedrt \(99.0.*install that version"):
            restore(made, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    @pytest.mark.parametrize("revision", REVISIONS[:-1])
    def test_a_backup_of_an_older_schema_is_migrated_at_the_first_start(self, parent, tmp_path, revision):
        blob = make_store(tmp_path / "old", revision)
        made = back_up(tmp_path / "old", parent / "one", NOW)
        assert made.manifest.schema_revision == revision
        assert [piece.sha256 for piece in made.manifest.blobs] == [blob.name]
        restore(parent / "one", tmp_path / "target")
        for directory in (tmp_path / "old", tmp_path / "target"):
            Store(directory).close()
        assert knows(tmp_path / "target") == knows(tmp_path / "old")
        assert knows(tmp_path / "target")[0]

    def test_something_else_is_no_backup(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"is no backup: it has no manifest.json; name a directory that"):
            restore(tmp_path, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_a_failure_half_way_leaves_no_store_and_the_next_one_succeeds(self, made, tmp_path, monkeypatch, after):
        target, copied, copy = tmp_path / "target", [], coordinator.restore.copy_piece

        def until_full(*arguments):
            if len(copied) == after:
                raise StorageError("the disk is full")
            copied.append(arguments)
            copy(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(coordinator.restore, "copy_piece", until_full)
            with pytest.raises(StorageError, match="the disk is full"):
                restore(made, target)
        assert files(target) == ["lock"]
        restore(made, target)
        assert knows(target) == knows(made)

    def test_a_kill_half_way_leaves_no_store_and_the_next_one_succeeds(self, made, tmp_path):
        target = tmp_path / "target"
        kill = "import os, coordinator.restore as r; copy = r.copy_piece; r.copy_piece = lambda *a: "
        kill += "os.kill(os.getpid(), 9) if a[1].name == 'coordinator.db' else copy(*a)"
        run = f"from pathlib import Path; r.restore(Path({str(made)!r}), Path({str(target)!r}))"
        killed = subprocess.run([sys.executable, "-c", f"{kill}\n{run}"], check=False, cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL
        assert len(files(target / "blobs")) == 2
        assert not (target / "coordinator.db").exists()
        restore(made, target)
        assert knows(target) == knows(made)


class TestCommands:
    @pytest.fixture
    def config(self, tmp_path):
        path = tmp_path / "coordinator.yaml"
        path.write_text(
            f"federation: test\nlisten: {{session: '127.0.0.1:0'}}\nidentity: {{directory: {tmp_path}/identity}}\n"
            f"state_directory: {tmp_path}/state\nadmin_socket: {tmp_path}/admin.sock\n"
        )
        return path

    def test_they_say_what_they_did(self, store, state, parent, tmp_path, config):
        before = knows(state)
        done = CliRunner().invoke(app, ["backup", "-c", str(config), str(parent / "one")])
        assert done.exit_code == 0, done.output
        assert f"'{parent / 'one'}': the database and 2 large tensors" in done.stdout
        assert "no keys and no certificates" in done.stdout
        store.close()
        state.rename(tmp_path / "lost")
        done = CliRunner().invoke(app, ["restore", "-c", str(config), str(parent / "one")])
        assert done.exit_code == 0, done.output
        assert "silos send again or compute again" in done.stdout
        assert f"restored '{parent / 'one'}'" in done.stdout
        assert knows(state) == before

    @pytest.mark.parametrize("command", ["backup", "restore"])
    def test_a_refusal_is_one_message(self, store, state, parent, config, command):
        done = CliRunner().invoke(app, [command, "-c", str(config), str(parent)])
        assert done.exit_code == ExitCode.CONFIGURATION
        assert done.stderr.startswith(f"error: '{parent}' ")
        assert done.stderr.count("\n") == 1


def test_the_write_ahead_log_is_not_needed_to_read_a_backup(made):
    with sqlite3.connect(f"file:{made / 'coordinator.db'}?mode=ro", uri=True) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert not list(made.glob("coordinator.db-*"))
