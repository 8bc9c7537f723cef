"""Old stores: what an earlier version wrote is there after the migration, and after a kill in the midst of it."""

import json
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import fedrt.statefile
from coordinator.blobs import metadata
from coordinator.experiments import ExperimentState
from coordinator.migrations import FIRST, HEAD, REVISIONS
from coordinator.migrations.upgrading import script_directory, upgrade
from coordinator.records import Changes
from coordinator.store import Store
from fedrt.errors import DamageError, StorageError
from fedrt.task import Verdict
from tests.coordinator.old_stores import make_store, query, schema
from tests.coordinator.test_store import NORTH

ROOT = Path(__file__).parent.parent.parent
COPY = f"coordinator.db.before-{HEAD}"


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state ?#%"


@pytest.fixture
def old(directory):
    """A state directory as the first release left it."""
    make_store(directory)
    return directory


def contents(directory):
    """All documents and blobs of a database."""
    found = {}
    for table in ("experiments", "tasks", "checkpoints", "silos", "events"):
        found[table] = query(directory, f"SELECT document FROM {table} ORDER BY document")
    found["blobs"] = query(directory, "SELECT sha256, byte_count, data FROM blobs ORDER BY sha256")
    return found


def revision(directory):
    """The revision that a database says it has."""
    return query(directory, "SELECT version_num FROM alembic_version")


# ---- the revisions


def test_the_revisions_are_those_that_alembic_finds_in_one_line():
    found = [script.revision for script in script_directory().walk_revisions()]
    assert tuple(reversed(found)) == REVISIONS
    assert (REVISIONS[0], REVISIONS[-1]) == (FIRST, HEAD)


def test_the_newest_schema_is_what_the_code_works_with(directory):
    Store(directory).close()
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(directory / "coordinator.db")))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        changed = sa.MetaData()
        for table in metadata.tables.values():
            table.to_metadata(changed)
        changed.tables["tasks"].append_column(sa.Column("new", sa.Integer))
        assert compare_metadata(MigrationContext.configure(connection), changed) != []
    engine.dispose()


def test_a_store_that_was_migrated_has_the_schema_of_one_that_was_created(old, tmp_path):
    Store(old).close()
    Store(tmp_path / "new").close()
    assert schema(old) == schema(tmp_path / "new")
    versions = [query(place, "PRAGMA user_version") for place in (old, tmp_path / "new")]
    assert versions == [[(3,)], [(3,)]]  # the first release refuses all above 2


def test_the_first_revision_makes_what_the_first_release_made(old, tmp_path, monkeypatch):
    new = tmp_path / "new"
    new.mkdir()
    monkeypatch.setattr("coordinator.migrations.upgrading.HEAD", FIRST)
    upgrade(new / "coordinator.db", None)
    assert [row for row in schema(new) if "alembic_version" not in row[2]] == schema(old)
    assert query(new, "PRAGMA user_version") == query(old, "PRAGMA user_version") == [(2,)]


# ---- migrating


def test_everything_is_there_after_the_migration(old):
    before = contents(old)
    store = Store(old)
    assert contents(old) == before
    assert revision(old) == [(HEAD,)]
    done, active = store.experiment("done"), store.experiment("active")
    assert (done.state, done.end_time) == (ExperimentState.SUCCEEDED, 1122.0)
    assert active.round is not None
    assert [e.experiment_id for e in store.active_experiments()] == ["active", "pending"]
    assert [task.verdict for task in store.round_tasks("active", 1)] == [Verdict.ACCEPTED, None]
    for task in store.tasks("done"):
        assert task.tensors is None or store.blob(task.tensors)
    assert [checkpoint.round_number for checkpoint in store.checkpoints("done")] == [0, 1, 2]
    assert store.blob(store.checkpoint("done").memory)
    assert len(store.events(0, "", 100)) == 17
    store.commit(Changes(silos={"north": NORTH}))
    assert NORTH in store.silos()
    store.close()


def test_the_new_columns_are_filled_from_the_documents(old):
    store = Store(old)
    for name in ("done", "cancelled", "active", "pending"):
        found = query(old, "SELECT end_time FROM experiments WHERE experiment_id = ?", name)
        assert found == [(store.experiment(name).end_time,)]
        for task in store.tasks(name):
            found = query(old, "SELECT tensors_sha256 FROM tasks WHERE task_id = ?", task.task_id)
            assert found == [(task.tensors.sha256 if task.tensors else None,)]
        rows = query(
            old,
            "SELECT shared_sha256, memory_sha256 FROM checkpoints WHERE experiment_id = ? ORDER BY round_number",
            name,
        )
        expected = [(c.shared.sha256, c.memory.sha256 if c.memory else None) for c in store.checkpoints(name)]
        assert rows == expected
    assert len(store.referenced_blobs()) == 13
    assert store.forgotten_tasks("done") == frozenset()
    store.close()


def test_the_new_columns_are_written_as_they_are_filled(old, tmp_path):
    """What is committed today gives the rows that the migration makes of the same records."""
    migrated, fresh = Store(old), Store(tmp_path / "new")
    for name in ("done", "cancelled", "active", "pending"):
        tasks, checkpoints = migrated.tasks(name), migrated.checkpoints(name)
        changes = Changes(
            experiments={name: migrated.experiment(name)},
            tasks={task.task_id: task for task in tasks},
            checkpoints=checkpoints,
        )
        fresh.commit(changes)
    columns = {
        "experiments": "experiment_id, state, create_time, end_time",
        "tasks": "task_id, experiment_id, round_number, tensors_sha256",
        "checkpoints": "experiment_id, round_number, shared_sha256, memory_sha256",
    }  # the documents have got new fields since
    for table, names in columns.items():
        rows = [sorted(query(place, f"SELECT {names} FROM {table}")) for place in (old, tmp_path / "new")]
        assert rows[0] == rows[1]
    migrated.close()
    fresh.close()


def test_the_database_is_copied_before_it_is_migrated(old):
    before, declared = contents(old), schema(old)
    connection = sqlite3.connect(old / "coordinator.db")  # holds it open, so that the last row stays in the -wal file
    connection.execute("INSERT INTO silos VALUES ('west', '{}')")
    connection.commit()
    Store(old).close()
    connection.close()
    assert stat.S_IMODE((old / COPY).stat().st_mode) == 0o600
    again = old.parent / "again"
    again.mkdir()
    (old / COPY).rename(again / "coordinator.db")
    assert schema(again) == declared
    assert contents(again) == {**before, "silos": sorted([*before["silos"], ("{}",)])}
    assert [path.name for path in old.iterdir() if "before" in path.name] == []


def test_a_store_that_is_current_or_new_is_not_copied(directory):
    for _ in range(2):
        Store(directory).close()
    assert sorted(path.name for path in directory.iterdir()) == ["blobs", "coordinator.db"]


LOGGING = """
import sys
from pathlib import Path
from coordinator.store import Store
from fedrt.log import configure_logging
configure_logging("info", "json")
for _ in range(2):
    Store(Path(sys.argv[1])).close()
"""


@pytest.mark.parametrize("kind", ["old", "new"])
def test_the_log_says_once_that_a_store_was_migrated_and_nothing_else(old, tmp_path, kind):
    """In a process of its own: Alembic has its say when it is imported."""
    place = old if kind == "old" else tmp_path / "new"
    command = [sys.executable, "-c", LOGGING, str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in said] == (["store migrated"] if kind == "old" else [])
    assert all(line["copy_of_the_database"].endswith(COPY) for line in said)


def test_a_copy_that_the_disk_refuses_leaves_the_old_store(old, monkeypatch):
    def full(path, flags):
        raise OSError(28, "No space left on device")

    declared = schema(old)
    monkeypatch.setattr(fedrt.statefile, "_sync", full)
    with pytest.raises(StorageError, match=rf"cannot write .*{COPY}': the disk is full"):
        Store(old)
    assert schema(old) == declared
    assert not [path for path in old.iterdir() if "before" in path.name]


def test_a_damaged_record_is_not_migrated_away(old):
    query(old, "UPDATE tasks SET document = 'not json' WHERE task_id = 'done/1/train/north'")
    declared = schema(old)
    with pytest.raises(DamageError, match="has a damaged record and cannot be migrated; it is as it was: restore"):
        Store(old)
    assert schema(old) == declared


@pytest.mark.parametrize("made", [1, 5])
def test_a_first_start_of_the_first_release_that_was_killed_is_completed(old, tmp_path, made):
    """It made table by table, and wrote its version last."""
    new = tmp_path / "new"
    new.mkdir(mode=0o700)
    statements = query(old, "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'sqlite_sequence'")
    for (statement,) in statements[:made]:
        query(new, statement)
    Store(new).close()
    Store(old).close()
    assert schema(new) == schema(old)


# ---- what is refused


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("PRAGMA user_version = 4", None),
        (
            "UPDATE alembic_version SET version_num = '0999'",
            r"by a newer fedrt \(schema 0999, this one knows 0002\)",
        ),
        ("PRAGMA user_version = 1", r"by a development version of fedrt \(schema 1, this one .* empty state directory"),
        ("DROP TABLE alembic_version", r"by a newer fedrt \(schema 3, this one knows 0002\); install the newer"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_another_schema_is_refused_and_left_alone(directory, statement, words, read_only):
    Store(directory).close()
    query(directory, statement)
    before = (schema(directory), query(directory, "PRAGMA user_version"))
    if words is None:  # the revision counts
        Store(directory, read_only=read_only).close()
    else:
        with pytest.raises(StorageError, match=words):
            Store(directory, read_only=read_only)
    assert (schema(directory), query(directory, "PRAGMA user_version")) == before
    assert not (directory / COPY).exists()


def test_an_old_store_is_not_migrated_to_be_read(old):
    declared = schema(old)
    with pytest.raises(StorageError, match="has schema 0001, and this fedrt reads 0002; start the coordinator once"):
        Store(old, read_only=True)
    assert schema(old) == declared
    assert not (old / COPY).exists()


# ---- crashes


KILLED_AT_EVERY_STATEMENT = """
# Opens stores in children that kill themselves before their first, second, third ... statement, one store for each.
import os, signal, sys
from pathlib import Path
import sqlalchemy as sa
from coordinator.migrations import upgrading
from coordinator.store import Store
from tests.coordinator.old_stores import make_store

def opened(place, fatal):
    count = 0

    def count_statement(*_):
        nonlocal count
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    sa.event.listen(sa.Engine, "before_cursor_execute", count_statement)
    sa.event.listen(sa.Engine, "commit", count_statement)
    Store(place).close()

root, kind = Path(sys.argv[1]), sys.argv[2]
for fatal in range(1000):
    place = root / f"killed-{fatal}"
    if kind == "old":
        make_store(place)
    child = os.fork()
    if not child:
        opened(place, fatal)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(fatal)
"""


@pytest.mark.parametrize("kind", ["old", "new"])
def test_a_kill_at_any_statement_leaves_the_schema_as_it_was(old, tmp_path, kind):
    before, declared = contents(old), schema(old)
    Store(old).close()
    current = schema(old)
    command = [sys.executable, "-c", KILLED_AT_EVERY_STATEMENT, str(tmp_path), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kills = int(done.stdout.split()[-1])
    assert kills > 15
    for fatal in range(kills):
        place = tmp_path / f"killed-{fatal}"
        assert schema(place) == (declared if kind == "old" else [])  # the last kill came just before the commit
        Store(place).close()
        assert schema(place) == current
        if kind == "old":
            assert contents(place) == before


KILLED_WHILE_COPYING = """
import os, signal, sys
from pathlib import Path
from coordinator.store import Store
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Store(Path(sys.argv[1]))
"""


def test_a_kill_while_the_copy_is_made_leaves_nothing_behind(old):
    command = [sys.executable, "-c", KILLED_WHILE_COPYING, str(old)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert [path.suffix for path in old.iterdir() if "before" in path.name] == [".new"]
    Store(old).close()
    assert [path.name for path in old.iterdir() if "before" in path.name] == [COPY]


# ---- start-up time


LOADED = """
import sys
from pathlib import Path
from coordinator.store import Store
Store(Path(sys.argv[1])).close()
Store(Path(sys.argv[1]), read_only=True).close()
print([name for name in sys.modules if name.split(".")[0] in ("alembic", "mako")])
"""


def test_alembic_is_not_imported_while_the_schema_is_current(directory):
    Store(directory).close()
    command = [sys.executable, "-c", LOADED, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
