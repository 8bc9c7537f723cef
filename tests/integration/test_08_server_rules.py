"""Server rules in a federation: they combine as one can compute alone, and remember over the coordinator's death."""

import numpy as np
import pytest

from fedrt.aggregation import Median, ServerAdam, ServerMomentum, ServerRule, ServerState, TrimmedMean, Update
from fedrt.method import hyperparameters_json
from fedrt.methods.promptfl import PromptFL
from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.tensors import initial_tensors, seeded_generator
from silo.work import WorkOrder, WorkOutcome
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker
from tests.integration.following import State, Watch, closed, contributors

ROUNDS = 6
COUNTS = {"north": 7, "south": 311, "west": 23}


def drift(name: str, number: int) -> dict[str, np.ndarray]:
    """The delta of a silo in a round; that of west is far from the others."""
    draw = seeded_generator(0, "drift", name, number).standard_normal((4, 512), np.float32)
    return {"context": draw * np.float32(1e22 if name == "west" else 0.01)}


def drifting(name: str) -> FakeWorker:
    def behave(order: WorkOrder) -> WorkOutcome:
        shared = drift(name, order.round_number) if order.kind is TaskKind.TRAIN else {}
        return WorkOutcome(shared, {}, COUNTS[name], {}, 0.0)

    return FakeWorker(behave)


def spec_of(rule: ServerRule, silos: tuple[str, ...]) -> ExperimentSpec:
    method = PromptFL(context_length=4, server=rule)
    return make_spec(ROUNDS, silos, hyperparameters=hyperparameters_json(method))


def alone(rule: ServerRule, silos: tuple[str, ...]) -> list[np.ndarray]:
    """The context after each round, the initial one first, without a federation."""
    spec = spec_of(rule, silos)
    states = [ServerState(initial_tensors(spec.local.tensors(), spec.seed))]
    for number in range(1, ROUNDS + 1):
        updates = [Update(name, drift(name, number), COUNTS[name]) for name in silos]
        states.append(rule.apply(states[-1], updates))
    return [state.shared["context"] for state in states]


@pytest.mark.parametrize(
    "rule", [ServerAdam(), ServerMomentum(momentum=0.5, learning_rate=0.25)], ids=lambda rule: rule.rule
)
async def test_01_what_a_rule_remembers_survives_a_coordinator_that_dies_again_and_again(
    federation: Federation, rule: ServerRule
) -> None:
    silos = ("north", "south")
    workers = {name: drifting(name) for name in silos}
    coordinator = federation.start_coordinator()
    for name, worker in workers.items():
        federation.start_silo(name, worker)
    await federation.create("remembered", spec_of(rule, silos))
    for number in (1, 2, 4):
        await Watch(federation).until(closed(number))
        await coordinator.kill()
        coordinator = federation.start_coordinator()
    experiment, rounds = await federation.finish("remembered")
    exported = await federation.export("remembered")
    assert experiment.state == State.STATE_SUCCEEDED
    assert [contributors(closing) for closing in rounds] == [list(silos)] * (ROUNDS + 1)
    expected = alone(rule, silos)
    assert list(exported) == ["context"]  # what is remembered is neither exported
    assert exported["context"].tobytes() == expected[-1].tobytes()
    for worker in workers.values():  # nor sent
        for order in worker.orders:
            assert list(order.shared) == ["context"]
            done = order.round_number - (order.kind is TaskKind.TRAIN)
            assert order.shared["context"].tobytes() == expected[done].tobytes()


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(share=0.34)], ids=lambda rule: rule.rule)
async def test_02_a_silo_gone_mad_does_not_carry_the_others_away(federation: Federation, rule: ServerRule) -> None:
    async with federation.started({name: drifting(name) for name in federation.silos}):
        await federation.create("robust", spec_of(rule, federation.silos))
        experiment, _ = await federation.finish("robust")
        exported = await federation.export("robust")
    assert experiment.state == State.STATE_SUCCEEDED
    assert exported["context"].tobytes() == alone(rule, federation.silos)[-1].tobytes()
    assert np.abs(exported["context"]).max() < 1


async def test_03_a_rule_whose_memory_overflows_fails_the_experiment_in_words(federation: Federation) -> None:
    async with federation.started({name: drifting(name) for name in federation.silos}):
        await federation.create("mad", spec_of(ServerAdam(), federation.silos))
        experiment, _ = await federation.finish("mad")
    assert experiment.state == State.STATE_FAILED
    assert "server_adam: the squared mean delta of tensor 'context' is beyond float32" in experiment.status_message
