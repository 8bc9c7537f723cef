"""The check at the start and the one by hand: what is damaged is named, and only what is needed keeps from starting."""

import asyncio
import json
import sqlite3
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from coordinator.backup_lock import removing_blobs
from coordinator.blobs import INLINE_BYTES
from coordinator.cli import app
from coordinator.experiments import create
from coordinator.integrity import MAX_LINES, check_at_start
from coordinator.records import Checkpoint
from coordinator.store import Store
from coordinator.verification import verify
from fedrt.errors import DamageError, StorageError
from fedrt.v1 import experiment_pb2
from tests.coordinator.old_stores import make_store, query
from tests.coordinator.test_store import NORTH, committed, tensors
from tests.coordinator.test_store_read_only import result
from tests.fakes.federation import Federation
from tests.fakes.workers import FakeWorker, giving, report
from tests.samples import FROM_WORDS, experiment_spec

LARGE = {"done": 3, "active": 5}  # what marks the large checkpoints that the fixture adds


@pytest.fixture
def directory(tmp_path):
    """A state directory with experiments under way and ended, small and large blobs, and what a crash left."""
    path = tmp_path / "state"
    make_store(path)
    store = Store(path)
    for name, fill in LARGE.items():
        ref, data = tensors(INLINE_BYTES, fill)
        last = store.checkpoint(name)
        committed(store, checkpoints=[Checkpoint(name, last.round_number, last.shared, ref)], blobs={ref.sha256: data})
    orphan, bytes_of_orphan = tensors(7)
    committed(store, blobs={orphan.sha256: bytes_of_orphan})
    store.close()
    (path / "blobs" / ("ab" * 32)).write_bytes(b"what a crash left")
    return path


@pytest.fixture
def store(directory):
    store = Store(directory)
    yield store
    store.close()


def blob_of(store, name, kind):
    """The digest of a blob that an experiment needs."""
    checkpoint = store.checkpoint(name)
    update = next(task.tensors for task in store.tasks(name) if task.tensors)
    return {"shared": checkpoint.shared, "memory": checkpoint.memory, "update": update}[kind].sha256


def spoil(directory, digest, how):
    """Damage a blob, wherever it lies."""
    path = directory / "blobs" / digest
    if how == "row":
        query(directory, "DELETE FROM blobs WHERE sha256 = ?", digest)
    elif path.exists():
        content = bytearray(path.read_bytes())
        content[1234] ^= 1
        path.unlink() if how == "gone" else path.write_bytes(content[:-1] if how == "cut" else content)
    elif how == "gone":
        query(directory, "UPDATE blobs SET data = NULL WHERE sha256 = ?", digest)
    else:
        byte_count = 63 if how == "cut" else 64
        query(directory, f"UPDATE blobs SET data = zeroblob({byte_count}) WHERE sha256 = ?", digest)


# ---- at the start


def test_a_whole_store_starts_without_a_word(store, capsys):
    capsys.readouterr()
    check_at_start(store)
    assert capsys.readouterr().out == ""


def test_an_empty_store_is_whole(tmp_path):
    store = Store(tmp_path / "state")
    check_at_start(store)
    store.close()
    assert verify(tmp_path / "state").whole


@pytest.mark.parametrize("how", ["row", "gone", "cut", "bit"])
@pytest.mark.parametrize("kind", ["shared", "memory", "update"])
def test_what_an_experiment_under_way_needs_keeps_from_starting(directory, store, kind, how):
    digest = blob_of(store, "active", kind)
    spoil(directory, digest, how)
    with pytest.raises(DamageError, match="experiments that have not ended cannot go on; restore the state") as error:
        check_at_start(store)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert digest in lines[1]
    assert lines[1].endswith("(experiment 'active')")


def test_what_a_retry_keeps_that_still_waits_is_needed(directory, store):
    running = store.experiment("active")
    waiting = replace(running, round=None, stage=replace(running.stage, kept=running.round.asks))
    committed(store, experiments={"active": waiting})
    check_at_start(store)
    spoil(directory, blob_of(store, "active", "update"), "bit")
    with pytest.raises(DamageError, match="experiments that have not ended cannot go on"):
        check_at_start(store)


@pytest.mark.parametrize("how", ["row", "gone", "cut"])
@pytest.mark.parametrize("kind", ["shared", "memory", "update"])
def test_what_only_an_ended_experiment_needs_is_one_warning(directory, store, capsys, kind, how):
    digest = blob_of(store, "done", kind)
    spoil(directory, digest, how)
    capsys.readouterr()
    check_at_start(store)
    said = capsys.readouterr().out
    assert said.count("the store is damaged, but not where an experiment that has not ended needs it") == 1
    assert digest in said
    assert "experiment 'done'" in said


def test_an_older_update_of_an_experiment_under_way_is_a_warning(store, capsys):
    committed(store, tasks={"active/0/train/north": result("active/0/train/north", tensors(9)[0], "active", 0)})
    capsys.readouterr()
    check_at_start(store)
    assert tensors(9)[0].sha256 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "UPDATE experiments SET document = '{' WHERE experiment_id = 'active'",
            "of an experiment cannot be",
        ),
        (
            "UPDATE checkpoints SET document = '{' WHERE experiment_id = 'active'",
            "latest checkpoint cannot be",
        ),
        ("DELETE FROM checkpoints WHERE experiment_id = 'active'", "there is no checkpoint"),
        (
            "UPDATE tasks SET document = '{' WHERE task_id = 'active/1/train/south'",
            "'active/1/train/south' is",
        ),
        ("DELETE FROM tasks WHERE task_id = 'active/1/train/north'", "'active/1/train/north' is missing"),
    ],
)
def test_a_record_that_an_experiment_under_way_needs_keeps_from_starting(directory, store, statement, words):
    query(directory, statement)
    with pytest.raises(DamageError, match=words):
        check_at_start(store)


def test_records_of_ended_experiments_are_not_read_at_the_start(directory, store):
    query(directory, "UPDATE experiments SET document = '{' WHERE experiment_id = 'done'")
    query(directory, "UPDATE tasks SET document = '{' WHERE experiment_id = 'done'")
    check_at_start(store)


def test_an_experiment_that_still_waits_for_its_initial_tensors_needs_none(tmp_path):
    store = Store(tmp_path / "state")
    spec = experiment_spec(hyperparameters=FROM_WORDS)
    committed(store, experiments={"words": create("words", spec, "ab" * 32, 1.0)})
    check_at_start(store)
    store.close()


def test_a_database_that_sqlite_finds_damaged_keeps_from_starting(directory):
    with sqlite3.connect(directory / "coordinator.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_events_experiment_id'"
        ).fetchone()
    connection.close()
    content = bytearray((directory / "coordinator.db").read_bytes())
    content[(root - 1) * page_size + 8 : root * page_size] = b"\xff" * (page_size - 8)
    (directory / "coordinator.db").write_bytes(content)
    store = Store(directory)
    with pytest.raises(DamageError, match=r"restore the state directory from a backup(.|\n)*the database: "):
        check_at_start(store)
    store.close()
    report = verify(directory)
    assert any("the database: " in str(damage) for damage in report.damage)


def test_a_long_list_is_cut_and_counted(directory, store, capsys):
    missing = [result(f"done/9/train/{n}", tensors(2, n)[0], "done", 9) for n in range(MAX_LINES + 7)]
    committed(store, tasks={task.task_id: task for task in missing})
    capsys.readouterr()
    check_at_start(store)
    said = capsys.readouterr().out
    assert said.count("is missing from the store") == MAX_LINES
    assert "... and 7 more" in said
    text = verify(directory).as_text().splitlines()
    assert text[-1] == "  ... and 7 more"
    assert len(text) < 30
    assert len(verify(directory).as_json()["damage"]) == MAX_LINES + 7


def test_a_blob_that_was_read_at_the_start_is_not_read_again(directory, store):
    """The check costs one look at each large blob that is needed, and recovery none."""
    check_at_start(store)
    ref = store.checkpoint("active").memory
    spoil(directory, ref.sha256, "bit")
    assert len(store.blob(ref)) == ref.byte_count


# ---- by hand


def test_verify_counts_what_is_there(directory, store):
    report = verify(directory)
    assert report.whole
    assert report.records == {"experiments": 4, "tasks": 10, "checkpoints": 6, "silos": 2, "events": 17}
    assert report.blob_count == 13 - 1 + 2  # the large one of "done" took the place of another
    assert report.blob_bytes == sum(store.referenced_blobs().values())
    assert (report.unneeded_blob_count, report.unneeded_file_count, report.forgotten_update_count) == (2, 1, 0)


@pytest.mark.parametrize("name", ["done", "active"])
@pytest.mark.parametrize("kind", ["shared", "memory", "update"])
@pytest.mark.parametrize("how", ["row", "gone", "cut", "bit"])
def test_verify_finds_every_damaged_blob_beside_a_running_coordinator(directory, store, name, kind, how):
    digest = blob_of(store, name, kind)
    spoil(directory, digest, how)
    (damage,) = verify(directory).damage
    assert digest in damage.what
    assert name in damage.experiment_ids


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ("experiments", "experiment_id = 'done'"),
        ("tasks", "task_id = 'done/1/train/north'"),
        ("checkpoints", "experiment_id = 'done' AND round_number = 1"),
        ("silos", "silo_id = 'north'"),
        ("events", "number = 4"),
    ],
)
@pytest.mark.parametrize("document", ["{", "[]", '{"kind": "Unheard"}'])
def test_verify_reads_every_record(directory, table, where, document):
    query(directory, f"UPDATE {table} SET document = ? WHERE {where}", document)
    (damage,) = verify(directory).damage
    assert "is damaged" in damage.what
    assert table in damage.what


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE experiments SET end_time = 5 WHERE experiment_id = 'done'",
        "UPDATE experiments SET state = 'failed' WHERE experiment_id = 'done'",
        "UPDATE tasks SET round_number = 7 WHERE task_id = 'done/1/train/north'",
        "UPDATE checkpoints SET memory_sha256 = NULL WHERE experiment_id = 'done' AND round_number = 1",
    ],
)
def test_verify_compares_the_columns_with_the_documents(directory, statement):
    query(directory, statement)
    (damage,) = verify(directory).damage
    assert damage.experiment_ids == ("done",)


def test_forgotten_updates_are_no_damage(directory):
    query(directory, "UPDATE tasks SET tensors_sha256 = NULL WHERE experiment_id = 'done'")
    report = verify(directory)
    assert report.whole
    assert report.forgotten_update_count == 4


def test_nothing_is_removed_while_it_looks(directory, store, monkeypatch):
    allowed = []

    def looking(self, digest):
        with removing_blobs(directory) as may:
            allowed.append(may)

    monkeypatch.setattr(Store, "blob_problem", looking)
    verify(directory)
    assert set(allowed) == {False}
    with removing_blobs(directory) as may:
        assert may


def test_verify_changes_nothing(directory):
    def everything():
        return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and "db-" not in path.name}

    with removing_blobs(directory):
        pass  # makes the lock file
    before = everything()
    verify(directory)
    assert everything() == before


# ---- the command


@pytest.fixture
def config(tmp_path, directory):
    path = tmp_path / "coordinator.yaml"
    path.write_text(
        "federation: demo\nlisten: {session: '127.0.0.1:0'}\nidentity: {directory: identity}\n"
        f"state_directory: {directory}\n"
    )
    return path


def run(config, *options):
    return CliRunner().invoke(app, ["verify", "--config", str(config), *options])


def test_the_command_says_that_a_store_is_whole(config):
    done = run(config)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "records: 4 experiments, 10 tasks, 6 checkpoints, 2 silos, 17 events"
    assert done.stdout.endswith("The store is whole.\n")


def test_the_command_ends_with_1_for_damage(config, directory):
    spoil(directory, tensors(INLINE_BYTES, LARGE["done"])[0].sha256, "bit")
    done = run(config)
    assert done.exit_code == 1
    assert "The store is damaged (1 problem). Restore the state directory from a backup." in done.stdout
    as_json = run(config, "--json")
    assert as_json.exit_code == 1
    report = json.loads(as_json.stdout)
    assert report["whole"] is False
    assert report["damage"][0]["experiment_ids"] == ["done"]


def test_the_command_without_a_store_says_so_and_makes_nothing(tmp_path, config, directory):
    config.write_text(config.read_text().replace(str(directory), str(tmp_path / "nowhere")))
    done = run(config)
    assert done.exit_code == StorageError.exit_code
    assert "there is no store at" in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_silo_that_is_known_is_a_record(store, directory):
    committed(store, silos={"north": NORTH})
    assert verify(directory).whole


# ---- the coordinator


FAR = 4e9  # seconds since 1970, some time after 2090


@pytest.fixture
def federation(tmp_path):
    """A federation whose coordinator has a store of the first release; the deadline of its open round is far."""
    found = Federation(tmp_path / "federation")
    place = found.directory / "coordinator"
    make_store(place)
    later = "UPDATE experiments SET document = json_set(document, '$.round.deadline', ?) WHERE experiment_id = 'active'"
    query(place, later, FAR)
    return found


async def test_a_coordinator_goes_on_with_what_the_first_release_had_under_way(federation):
    """Migrated, checked and cleaned at the start; the result that was there counts, and the other one is asked for."""
    place = federation.directory / "coordinator"
    orphan = place / "blobs" / ("ab" * 32)
    orphan.write_bytes(b"what a crash left")
    worker = FakeWorker(giving(50.5), description=replace(report(8, 4), architecture="fedrt-tiny"))
    async with federation.started({"south": worker}):
        async for event in federation.events("active", after=17):
            if event.HasField("round_closed"):
                break
        assert [c.silo_id for c in event.round_closed.contributions] == ["north", "south"]
        assert set(next(iter((await federation.export("active")).values())).ravel()) == {50 + (50.25 + 50.5) / 2}
        async with asyncio.timeout(60):
            while orphan.exists():  # noqa: ASYNC110  # a file rings no bell
                await asyncio.sleep(0.01)
        assert verify(place).whole  # beside it
    assert verify(place).whole


async def test_a_coordinator_does_not_start_without_what_it_needs(federation):
    place = federation.directory / "coordinator"
    Store(place).close()
    query(place, "UPDATE blobs SET data = zeroblob(64)")
    daemon = federation.start_coordinator()
    with pytest.raises(DamageError, match="experiments that have not ended cannot go on"):
        await daemon.task
    Store(place).close()  # nothing holds it


async def test_a_coordinator_starts_with_damage_that_nothing_waits_for(federation):
    place = federation.directory / "coordinator"
    for path in (place / "blobs").iterdir():
        path.unlink()  # the update of an experiment that was cancelled
    async with federation.started({}):
        assert (await federation.experiment("active")).state == experiment_pb2.Experiment.STATE_RUNNING
    assert not verify(place).whole
