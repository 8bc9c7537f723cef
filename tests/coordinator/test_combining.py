"""From stored results to the next shared tensors: what a server rule remembers survives the store bit for bit."""

import tracemalloc

import numpy as np
import pytest

from coordinator.blobs import INLINE_BYTES
from coordinator.combining import Inputs, combine, gather, initial_shared, packed
from coordinator.records import Changes, Checkpoint, TaskRecord
from coordinator.store import Store
from fedrt.aggregation import ServerAdam, ServerMomentum, ServerState, TrimmedMean, Update, WeightedMean
from fedrt.errors import DamageError, TensorError
from fedrt.method import hyperparameters_json
from fedrt.methods.promptfl import PromptFL
from fedrt.payload import unpack
from fedrt.task import TaskKind
from fedrt.tensors import initial_tensors, seeded_generator
from tests.samples import experiment_spec

ROUNDS, SILOS = 4, ("north", "south", "west")
RULES = [WeightedMean(), ServerMomentum(momentum=0.7, learning_rate=0.3), ServerAdam()]
SMALL, LARGE = 2, INLINE_BYTES // 32 + 1  # context vectors of 8 floats: in the database, and beyond as a file


def spec_of(rule, length=SMALL):
    return experiment_spec(ROUNDS, hyperparameters=hyperparameters_json(PromptFL(context_length=length, server=rule)))


def delta(silo, number, length):
    return {"context": seeded_generator(1, silo, number).standard_normal((length, 8), np.float32)}


class Rounds:
    """Commits a checkpoint after each round, as the orchestrator does, and reads everything from the store."""

    def __init__(self, spec, directory):
        self.spec, self.directory = spec, directory
        self.length = spec.local.tensors()[0].shape[0]
        self.store = Store(directory)
        self.keep(0, initial_shared(spec), None)

    def keep(self, number, shared, memory):
        parts = [part for part in (shared, memory) if part is not None]
        checkpoint = Checkpoint("e1", number, shared.ref, memory.ref if memory else None)
        self.store.commit(Changes(checkpoints=[checkpoint], blobs={part.ref.sha256: part.data for part in parts}))

    def run(self, number):
        tasks = {silo: packed(delta(silo, number, self.length)) for silo in SILOS}
        self.store.commit(Changes(blobs={part.ref.sha256: part.data for part in tasks.values()}))
        records = [
            TaskRecord(
                f"{number}/{silo}", "e1", silo, number, TaskKind.TRAIN, 0, example_count=5 + at, tensors=part.ref
            )
            for at, (silo, part) in enumerate(tasks.items())
        ]
        checkpoint = self.store.checkpoint("e1")
        inputs = gather(self.store.blob, list(reversed(records)), checkpoint)
        self.keep(number, *combine(self.spec, TaskKind.TRAIN, inputs))

    def restart(self):
        self.store.close()
        self.store = Store(self.directory)

    def checkpoint(self):
        return self.store.checkpoint("e1")

    def shared(self):
        ref = self.checkpoint().shared
        return unpack(ref.headers, self.store.blob(ref))["context"]


def in_memory(rule, length):
    """The same rounds without any store."""
    spec = spec_of(rule, length)
    after = ServerState(initial_tensors(spec.local.tensors(), spec.seed))
    for number in range(1, ROUNDS + 1):
        updates = [Update(silo, delta(silo, number, length), 5 + at) for at, silo in enumerate(SILOS)]
        after = rule.apply(after, updates)
    return after


@pytest.mark.parametrize("length", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
@pytest.mark.parametrize("restarts", [(), (1,), (1, 2, 3)], ids=str)
def test_restarts_between_rounds_change_no_bit(rule, length, restarts, tmp_path):
    rounds = Rounds(spec_of(rule, length), tmp_path / "state")
    for number in range(1, ROUNDS + 1):
        rounds.run(number)
        if number in restarts:
            rounds.restart()
    expected = in_memory(rule, length)
    assert rounds.shared().tobytes() == expected.shared["context"].tobytes()
    memory = rounds.checkpoint().memory
    kept = {header.name for header in memory.headers} if memory else set()
    assert kept == set(expected.memory)
    rounds.store.close()


def test_the_memory_is_a_part_of_the_checkpoint_only_if_the_rule_has_one(tmp_path):
    names = {}
    for rule in RULES:
        rounds = Rounds(spec_of(rule), tmp_path / rule.rule)
        assert rounds.checkpoint().memory is None
        rounds.run(1)
        memory = rounds.checkpoint().memory
        names[rule.rule] = [header.name for header in memory.headers] if memory else None
        assert [header.name for header in rounds.checkpoint().shared.headers] == ["context"]
        rounds.store.close()
    assert names == {
        "weighted_mean": None,
        "server_momentum": ["velocity_context"],
        "server_adam": ["first_context", "second_context"],
    }


def inputs(value, count=1):
    shared = {"context": np.zeros((SMALL, 8), np.float32)}
    return Inputs(ServerState(shared), (Update("north", {"context": np.full((SMALL, 8), value, np.float32)}, count),))


def test_initial_tensors_are_taken_as_they_come():
    shared, memory = combine(spec_of(ServerAdam()), TaskKind.INITIALIZE, inputs(3.0, count=0))
    assert (unpack(shared.ref.headers, shared.data)["context"] == 3).all()
    assert memory is None


@pytest.mark.parametrize("rule", [ServerMomentum(learning_rate=1e38), ServerAdam()])
def test_a_rule_that_overflows_is_an_error(rule):
    with pytest.raises(TensorError, match=r"'context' (has values that are not finite|is beyond float32)"):
        combine(spec_of(rule), TaskKind.TRAIN, inputs(1e25))


def test_a_result_without_tensors_is_damage(tmp_path):
    store = Store(tmp_path / "state")
    task = TaskRecord("e1/1/train/north", "e1", "north", 1, TaskKind.TRAIN, 0)
    with pytest.raises(DamageError, match="'e1/1/train/north' has no tensors; restore"):
        gather(store.blob, [task], None)
    store.close()


@pytest.mark.parametrize("rule", [WeightedMean(), TrimmedMean(share=0.1), ServerAdam()], ids=lambda rule: rule.rule)
def test_memory_does_not_grow_with_the_silos(tmp_path, rule):
    """Of 60 updates of half a MiB, a rule looks at one at a time."""
    spec = spec_of(rule, length=16_384)
    store, tasks = Store(tmp_path / "state"), []
    shared = initial_shared(spec)
    size = shared.ref.byte_count
    for number in range(60):
        part = packed({"context": np.full((16_384, 8), number, np.float32)})
        store.commit(Changes(blobs={part.ref.sha256: part.data}))
        tasks.append(
            TaskRecord(f"{number}", "e1", f"{number}", 1, TaskKind.TRAIN, 0, example_count=1, tensors=part.ref)
        )
    checkpoint = Checkpoint("e1", 0, shared.ref)
    store.commit(Changes(checkpoints=[checkpoint], blobs={shared.ref.sha256: shared.data}))
    del part
    tracemalloc.start()
    combine(spec, TaskKind.TRAIN, gather(store.blob, tasks, checkpoint))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    store.close()
    assert size == 512 * 1024
    assert peak < 20 * size


def test_a_rule_gets_the_updates_by_silo_whatever_the_order_of_the_tasks():
    """A rule of a third party may not sort them itself."""
    ref = packed({"context": np.ones((1, 8), np.float32)}).ref
    tasks = [TaskRecord(silo, "e1", silo, 1, TaskKind.TRAIN, 0, tensors=ref) for silo in ("west", "north", "south")]
    found = gather(lambda ref: memoryview(b""), tasks, None).updates
    assert [update.silo_id for update in found] == ["north", "south", "west"]
