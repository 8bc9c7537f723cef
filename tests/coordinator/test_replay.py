"""Computing rounds again finds every bit that was changed in a store, and says where."""

import json
import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from coordinator import replay_view
from coordinator.backup_lock import removing_blobs
from coordinator.blobs import INLINE_BYTES
from coordinator.cli import app
from coordinator.combining import combine, gather, initial_shared, packed
from coordinator.experiments import ExperimentState, Stage, create
from coordinator.records import Changes, Checkpoint, Contribution, RoundClosed, TaskRecord
from coordinator.replay import Finding, find_experiment, replay
from coordinator.retention import collect
from coordinator.store import Store
from fedrt.aggregation import Median, ServerAdam, ServerMomentum, TrimmedMean, UniformMean, WeightedMean
from fedrt.errors import ExitCode
from fedrt.method import hyperparameters_json
from fedrt.methods.promptfl import PromptFL
from fedrt.task import TaskKind, Verdict
from fedrt.tensors import schema_sha256, seeded_generator
from tests.samples import FROM_WORDS, experiment_spec

ROUNDS, SILOS = 4, ("north", "south", "west")
COUNTS = {"north": 5, "south": 311, "west": 23}
SMALL, LARGE = 2, INLINE_BYTES // 32 + 1  # context vectors of 8 floats: in the database, and as files
RULES = [WeightedMean(), UniformMean(), ServerMomentum(), ServerAdam(), Median(), TrimmedMean(share=0.34)]


def spec_of(rule, length=SMALL):
    return experiment_spec(ROUNDS, 0, hyperparameters_json(PromptFL(context_length=length, server=rule)))


def delta(silo, number, length):
    return {"context": seeded_generator(1, silo, number).standard_normal((length, 8), np.float32)}


class Federation:
    """Writes a store as the orchestrator does; round 2 took two attempts, and kept a result of the first."""

    def __init__(self, directory, spec, rounds=ROUNDS):
        self.directory, self.spec = directory, spec
        self.store = Store(directory)
        specs = spec.local.tensors()
        self.length = specs[0].shape[0]
        self.experiment = create("e1", spec, schema_sha256(specs).hex(), 1.0)
        if self.experiment.stage.kind is TaskKind.INITIALIZE:
            self.round(0, TaskKind.INITIALIZE, {"north": 0})
        else:
            self.keep(0, initial_shared(spec), None)
        for number in range(1, rounds + 1):
            self.round(number, TaskKind.TRAIN, {"north": number == 2, "south": 0, "west": number == 2})
        over = rounds == ROUNDS
        state = ExperimentState.SUCCEEDED if over else ExperimentState.RUNNING
        stage = Stage(TaskKind.EVALUATE, rounds) if over else Stage(TaskKind.TRAIN, rounds + 1)
        experiment = replace(self.experiment, state=state, stage=stage, end_time=9.0 if over else None)
        others = [  # what did not count
            TaskRecord("e1/2/train/east", "e1", "east", 2, TaskKind.TRAIN, 0, Verdict.LATE, "late", tensors=self.ref),
            TaskRecord("e1/3/train/east", "e1", "east", 3, TaskKind.TRAIN, 0, Verdict.ACCEPTED, "failed (internal): x"),
            TaskRecord("e1/4/evaluate/north", "e1", "north", 4, TaskKind.EVALUATE, 0, Verdict.ACCEPTED),
        ]
        self.store.commit(Changes(experiments={"e1": experiment}, tasks={task.task_id: task for task in others}))
        self.store.close()

    def keep(self, number, shared, memory):
        parts = [part for part in (shared, memory) if part is not None]
        checkpoint = Checkpoint("e1", number, shared.ref, memory.ref if memory else None)
        self.store.commit(Changes(checkpoints=[checkpoint], blobs={part.ref.sha256: part.data for part in parts}))

    def round(self, number, kind, attempts):
        updates = {silo: packed(delta(silo, number, self.length)) for silo in attempts}
        self.ref = updates["north"].ref
        tasks = {
            silo: TaskRecord(
                f"e1/{number}/{kind.value}-{int(attempt)}/{silo}",
                "e1",
                silo,
                number,
                kind,
                int(attempt),
                Verdict.ACCEPTED,
                example_count=COUNTS[silo],
                tensors=updates[silo].ref,
            )
            for silo, attempt in attempts.items()
        }
        parts = tuple(
            Contribution(silo, task.example_count, {}, 0.0, task.tensors.byte_count) for silo, task in tasks.items()
        )
        failed = RoundClosed("e1", number, kind, 0, parts[1:2], (), {}, False, 1.0)
        ended = RoundClosed("e1", number, kind, max(map(int, attempts.values())), parts, (), {}, True, 1.0)
        evaluated = RoundClosed("e1", number, TaskKind.EVALUATE, 0, (), (), {}, True, 1.0)
        before = self.store.checkpoint("e1")
        self.store.commit(
            Changes(
                tasks={task.task_id: task for task in tasks.values()},
                blobs={part.ref.sha256: part.data for part in updates.values()},
                events=[failed, ended, evaluated],
            )
        )
        self.keep(number, *combine(self.spec, kind, gather(self.store.blob, list(tasks.values()), before)))

    # ---- what somebody might change afterwards

    def sql(self, statement, *values):
        with sqlite3.connect(self.directory / "coordinator.db") as connection:
            assert connection.execute(statement, values).rowcount == 1

    def edit(self, table, where, change):
        """Change a record as JSON."""
        with sqlite3.connect(self.directory / "coordinator.db") as connection:
            ((row, text),) = connection.execute(f"SELECT rowid, document FROM {table} WHERE {where}").fetchall()
            document = json.loads(text)
            change(document)
            connection.execute(f"UPDATE {table} SET document = ? WHERE rowid = ?", (json.dumps(document), row))

    def task(self, silo, number, change):
        self.edit("tasks", f"task_id LIKE 'e1/{number}/train%/{silo}'", change)

    def record(self, number, change):
        """Change what the record of a round's end says of its contributors."""
        self.edit(
            "events",
            f'document LIKE \'%"round_number": {number},%train%"succeeded": true%\'',
            lambda document: change(document["event"]["contributions"]),
        )

    def forget(self, silo, number):
        """As garbage collection does."""
        self.sql("UPDATE tasks SET tensors_sha256 = NULL WHERE task_id LIKE ?", f"e1/{number}/%-_/{silo}")

    def flip(self, ref):
        """Change one bit of a blob."""
        path = self.directory / "blobs" / ref.sha256
        with sqlite3.connect(self.directory / "coordinator.db") as connection:
            ((data,),) = connection.execute("SELECT data FROM blobs WHERE sha256 = ?", (ref.sha256,)).fetchall()
        changed = bytearray(data or path.read_bytes())
        changed[3] ^= 1
        if data:
            self.sql("UPDATE blobs SET data = ? WHERE sha256 = ?", bytes(changed), ref.sha256)
        else:
            path.write_bytes(changed)

    def ref_of(self, silo, number):
        return packed(delta(silo, number, self.length)).ref

    def checkpoint(self, number):
        store = Store(self.directory, read_only=True)
        (found,) = (point for point in store.checkpoints("e1") if point.round_number == number)
        store.close()
        return found

    def findings(self):
        """By round: the finding, and all problems as one text."""
        store = Store(self.directory, read_only=True)
        try:
            rounds = list(replay(store, find_experiment(store, "e1")))
        finally:
            store.close()
        return {found.number: (found.finding, "; ".join(found.problems)) for found in rounds}

    def differing(self):
        return {number: said for number, (finding, said) in self.findings().items() if finding is Finding.DIFFERS}


@pytest.fixture
def federation(tmp_path):
    return Federation(tmp_path / "state", spec_of(ServerAdam()))


AGREEING = dict.fromkeys(range(ROUNDS + 1), (Finding.AGREES, ""))


@pytest.mark.parametrize("length", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_what_nobody_changed_agrees(tmp_path, rule, length):
    assert Federation(tmp_path / "state", spec_of(rule, length)).findings() == AGREEING


def test_initial_tensors_of_a_silo_agree(tmp_path):
    federation = Federation(tmp_path / "state", experiment_spec(ROUNDS, 0, FROM_WORDS))
    assert federation.findings() == AGREEING
    federation.forget("north", 0)
    assert federation.findings() == {**AGREEING, 0: (Finding.NOT_KEPT, "")}


class TestChanged:
    @pytest.mark.parametrize("length", [SMALL, LARGE], ids=["small", "large"])
    def test_a_bit_of_an_update_is_named(self, tmp_path, length):
        federation = Federation(tmp_path / "state", spec_of(WeightedMean(), length))
        federation.flip(federation.ref_of("south", 2))
        assert federation.differing() == {2: "the update of silo 'south' is damaged or missing"}

    @pytest.mark.parametrize("length", [SMALL, LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("part", ["shared", "memory"])
    def test_a_bit_of_a_checkpoint_is_named(self, tmp_path, length, part):
        federation = Federation(tmp_path / "state", spec_of(ServerAdam(), length))
        federation.flip(getattr(federation.checkpoint(2), part))
        assert federation.differing() == {2: "the stored tensors are damaged"}

    @pytest.mark.parametrize("hidden", [False, True])
    def test_an_example_count_is_named(self, federation, hidden):
        federation.task("west", 3, lambda task: task.update(example_count=24))
        if hidden:
            federation.record(3, lambda parts: parts[2].update(example_count=24))
        said = federation.differing()
        assert list(said) == [3]
        assert ("silo 'west' has 24 examples in its result and 23 in the round's record" in said[3]) is not hidden
        assert "the shared tensors are not those of the updates" in said[3]
        assert "the server rule's memory is not that of the updates" in said[3]

    def test_an_example_count_of_the_record_is_named(self, federation):
        federation.record(3, lambda parts: parts[0].update(example_count=6))
        assert federation.differing() == {
            3: "silo 'north' has 5 examples in its result and 6 in the round's record",
        }

    @pytest.mark.parametrize("hidden", [False, True])
    @pytest.mark.parametrize("how", ["removed", "late"])
    def test_a_contributor_that_is_gone_is_named(self, federation, hidden, how):
        if how == "removed":
            federation.sql("DELETE FROM tasks WHERE task_id = 'e1/2/train-0/south'")
        else:
            federation.task("south", 2, lambda task: task.update(verdict="late"))
        if hidden:
            federation.record(2, lambda parts: parts.pop(1))
        said = federation.differing()
        assert list(said) == [2]
        assert ("the round's record counts silo 'south', of which no accepted result" in said[2]) is not hidden
        assert "the shared tensors are not those of the updates" in said[2]

    def test_a_contributor_that_was_added_is_named(self, federation):
        federation.task("east", 2, lambda task: task.update(verdict="accepted", message=""))
        said = federation.differing()
        assert list(said) == [2]
        assert "silo 'east' has an accepted result, which the round's record does not count" in said[2]

    def test_a_result_counted_twice_is_named(self, federation):
        federation.task("west", 2, lambda task: task.update(silo_id="south"))
        assert "a silo has two accepted results" in federation.differing()[2]

    def test_an_update_of_another_round_is_named(self, federation):
        other = federation.ref_of("north", 3)
        federation.task("north", 2, lambda task: task["tensors"].update(sha256=other.sha256))
        said = federation.differing()
        assert list(said) == [2]
        assert "the shared tensors are not those of the updates" in said[2]

    def test_a_checkpoint_of_another_round_is_named(self, federation):
        other = federation.checkpoint(1).shared.sha256
        federation.edit("checkpoints", "round_number = 2", lambda document: document["shared"].update(sha256=other))
        said = federation.differing()
        assert said[2] == "the shared tensors are not those of the updates"
        assert set(said) == {2, 3}  # round 3 did not begin from these

    def test_another_update_size_is_named(self, federation):
        federation.record(1, lambda parts: parts[0].update(byte_count=8))
        assert federation.differing() == {1: "the update of silo 'north' has another size than in the round's record"}

    def test_an_update_that_does_not_fit_the_method_is_named(self, federation):
        federation.task("south", 2, lambda task: task["tensors"]["headers"][0].update(shape=[SMALL * 8]))
        assert federation.differing() == {
            2: "aggregation fails: tensor 'context' has shape (16,); declared is (2, 8)",
        }

    def test_a_server_rule_that_fails_is_named(self, federation):
        for at, silo in enumerate(SILOS):
            federation.task(silo, 2, lambda task: task.update(example_count=0))
            federation.record(2, lambda parts, at=at: parts[at].update(example_count=0))
        assert federation.differing() == {
            2: "aggregation fails: ValueError: a weighted mean needs at least one example",
        }

    def test_what_was_removed_is_named(self, federation):
        federation.sql("DELETE FROM checkpoints WHERE round_number = 1")
        federation.sql('DELETE FROM events WHERE document LIKE \'%"round_number": 3,%train%"succeeded": true%\'')
        assert federation.differing() == {1: "no tensors are stored", 3: "there is no record of the round's end"}

    def test_a_round_without_any_result_is_named(self, federation):
        for silo in SILOS:
            federation.sql("DELETE FROM tasks WHERE task_id LIKE ?", f"e1/2/train%/{silo}")
        federation.record(2, lambda parts: parts.clear())
        assert federation.differing() == {2: "no result is recorded"}

    def test_a_round_after_one_that_is_lost_is_named(self, federation):
        federation.sql("DELETE FROM checkpoints WHERE round_number = 2")
        federation.forget("north", 2)
        said = federation.differing()
        assert said == {
            2: "no tensors are stored",
            3: "the tensors that the round began with are damaged or missing",
        }

    def test_a_result_without_tensors_is_named(self, federation):
        federation.task("south", 2, lambda task: task.update(tensors=None))
        assert federation.differing() == {2: "the update of silo 'south' is damaged or missing"}

    def test_a_record_that_cannot_be_read_is_named(self, federation):
        federation.task("north", 2, lambda task: task.update(verdict="perhaps"))
        assert federation.differing() == {2: "the record of a task is damaged"}

    def test_another_seed_is_named(self, federation):
        federation.edit("experiments", "TRUE", lambda document: document["spec"]["local"].update(seed=2))
        assert federation.differing() == {0: "the shared tensors are not those of the updates"}


def test_updates_that_are_no_longer_kept_are_said_and_the_rounds_after_them_computed(federation):
    for silo in SILOS:
        federation.forget(silo, 2)
    assert federation.findings() == {**AGREEING, 2: (Finding.NOT_KEPT, "")}
    federation.record(2, lambda parts: parts.pop())  # the records are compared all the same
    assert federation.findings()[2][0] is Finding.DIFFERS


def test_what_garbage_collection_has_forgotten_is_said(federation):
    store = Store(federation.directory)
    assert sum(freed.update_count for freed in collect(store, federation.directory, 5.0, now=20.0)) == 13
    store.close()
    forgotten = dict.fromkeys(range(1, ROUNDS + 1), (Finding.NOT_KEPT, ""))
    assert federation.findings() == {**AGREEING, **forgotten}


def test_of_an_experiment_that_runs_the_rounds_so_far_are_computed(tmp_path):
    federation = Federation(tmp_path / "state", spec_of(ServerMomentum()), rounds=2)
    assert federation.findings() == {number: AGREEING[number] for number in range(3)}


@pytest.mark.parametrize(
    "stage", [Stage(TaskKind.INITIALIZE, 0), Stage(TaskKind.TRAIN, 1), Stage(TaskKind.EVALUATE, 0)]
)
def test_an_experiment_that_has_just_begun(tmp_path, stage):
    text = FROM_WORDS if stage.kind is TaskKind.INITIALIZE else '{"context_length":2}'
    spec = experiment_spec(ROUNDS, 0, text)
    store = Store(tmp_path / "state")
    experiment = replace(create("e1", spec, schema_sha256(spec.local.tensors()).hex(), 1.0), stage=stage)
    initial = None if stage.kind is TaskKind.INITIALIZE else initial_shared(spec)
    checkpoints = [Checkpoint("e1", 0, initial.ref)] if initial else []
    blobs = {initial.ref.sha256: initial.data} if initial else {}
    store.commit(Changes(experiments={"e1": experiment}, checkpoints=checkpoints, blobs=blobs))
    rounds = list(replay(store, find_experiment(store, "e1")))
    store.close()
    assert [(found.number, found.finding) for found in rounds] == ([(0, Finding.AGREES)] if initial else [])


class TestCommand:
    def run(self, federation, *arguments, name="e1"):
        return CliRunner().invoke(app, ["replay", "--backup", str(federation.directory), name, *arguments])

    def test_a_line_for_each_round_and_the_sum(self, federation):
        done = self.run(federation)
        assert done.exit_code == ExitCode.DONE, done.output
        lines = done.stdout.splitlines()
        digests = [federation.checkpoint(number).shared.sha256[:16] for number in range(ROUNDS + 1)]
        assert lines[0] == f"round 0: initial tensors of the coordinator; {digests[0]} agrees"
        assert lines[1:-1] == [
            f"round {number}: north, south, west; 339 examples; {digests[number]} agrees" for number in (1, 2, 3, 4)
        ]
        assert lines[-1] == "experiment 'e1' (succeeded): 5 of 5 agree, the initial tensors counted"

    @pytest.mark.parametrize(("change", "word"), [("flip", "DIFFERS: the update of"), ("forget", "updates no longer")])
    def test_it_ends_with_1_unless_all_agree(self, federation, change, word):
        if change == "flip":
            federation.flip(federation.ref_of("south", 2))
        else:
            federation.forget("south", 2)
        done = self.run(federation)
        assert done.exit_code == 1
        assert word in done.stdout.splitlines()[2]
        assert "4 of 5 agree" in done.stdout.splitlines()[-1]

    def test_json_has_everything(self, federation):
        federation.flip(federation.ref_of("south", 2))
        done = self.run(federation, "--json")
        document = json.loads(done.stdout)
        assert done.exit_code == 1
        assert (document["experiment"], document["state"], document["agrees"]) == ("e1", "succeeded", False)
        assert [found["finding"] for found in document["rounds"]] == ["agrees", "agrees", "differs", "agrees", "agrees"]
        assert document["rounds"][2]["problems"] == ["the update of silo 'south' is damaged or missing"]
        first = document["rounds"][1]
        assert first["sha256"] == first["computed_sha256"] == federation.checkpoint(1).shared.sha256
        assert first["contributors"][1] == {
            "silo": "south",
            "examples": 311,
            "sha256": federation.ref_of("south", 1).sha256,
        }

    def test_an_experiment_that_runs_says_so(self, tmp_path):
        done = self.run(Federation(tmp_path / "state", spec_of(WeightedMean()), rounds=2))
        assert done.exit_code == ExitCode.DONE
        assert "(running): 3 of 3 agree, the initial tensors counted; it goes on" in done.stdout

    def test_an_unknown_experiment_is_named_with_those_there_are(self, federation):
        done = self.run(federation, name="e2")
        assert done.exit_code == ExitCode.CONFIGURATION
        assert done.stderr == "error: there is no experiment 'e2' in this store; the newest are ['e1']\n"

    def test_a_method_that_is_not_installed_is_named(self, federation):
        federation.edit(
            "experiments", "TRUE", lambda document: document["spec"]["local"].update(method_name="promptxl")
        )
        done = self.run(federation)
        assert done.exit_code == ExitCode.CONFIGURATION
        assert "experiment 'e1' cannot be computed again here: method 'promptxl' is not installed" in done.stderr
        assert "install its method as the coordinator has it" in done.stderr

    def test_a_method_of_another_version_is_named(self, federation):
        federation.edit("experiments", "TRUE", lambda document: document.update(schema_sha256="cd" * 32))
        done = self.run(federation)
        assert done.exit_code == ExitCode.CONFIGURATION
        assert "the installed method 'promptfl' declares other tensors; install the version" in done.stderr

    def test_a_method_that_shares_nothing(self, tmp_path):
        spec = experiment_spec(ROUNDS, 0, "{}")
        spec = replace(spec, local=replace(spec.local, method_name="coop"))
        store = Store(tmp_path / "state")
        experiment = create("e1", spec, schema_sha256(spec.local.tensors()).hex(), 1.0)
        store.commit(Changes(experiments={"e1": experiment}))
        store.close()
        done = CliRunner().invoke(app, ["replay", "--backup", str(tmp_path / "state"), "e1"])
        assert done.exit_code == ExitCode.DONE
        assert "its method 'coop' shares nothing, so nothing was aggregated" in done.stdout

    def test_beside_a_coordinator_nothing_is_collected_meanwhile(self, federation, tmp_path, monkeypatch):
        config, tried, line = tmp_path / "coordinator.yaml", [], replay_view.line
        config.write_text(
            f"federation: test\nlisten: {{session: '127.0.0.1:0'}}\nidentity: {{directory: {tmp_path}/identity}}\n"
            f"state_directory: {federation.directory}\n"
        )

        def line_while_reading(replayed):
            with removing_blobs(federation.directory) as allowed:
                tried.append(allowed)
            return line(replayed)

        monkeypatch.setattr(replay_view, "line", line_while_reading)
        done = CliRunner().invoke(app, ["replay", "--config", str(config), "e1"])
        assert done.exit_code == ExitCode.DONE, done.output
        assert tried == [False] * (ROUNDS + 1)
        with removing_blobs(federation.directory) as allowed:
            assert allowed

    def test_a_backup_is_only_read(self, federation):
        before = sorted(federation.directory.rglob("*"))
        assert self.run(federation).exit_code == ExitCode.DONE
        assert {path.name for path in set(federation.directory.rglob("*")) - set(before)} <= {
            "coordinator.db-wal",
            "coordinator.db-shm",
        }

    def test_it_has_to_be_told_which_store(self):
        done = CliRunner().invoke(app, ["replay", "e1"])
        assert done.exit_code == ExitCode.CONFIGURATION
        assert "give --config or --backup" in done.stderr

    def test_a_directory_without_a_store_is_refused(self, tmp_path):
        done = CliRunner().invoke(app, ["replay", "--backup", str(tmp_path), "e1"])
        assert done.exit_code == ExitCode.CONFIGURATION
        assert f"'{tmp_path}' is no backup: it has no coordinator.db" in done.stderr
