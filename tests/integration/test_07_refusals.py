"""Experiments that nobody can run, and orders that make no sense: each gets the reason, and nothing is half-created."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from coordinator.selection import Occasion, Population, Selection, select
from fedrt.aggregation import ServerState, Update
from fedrt.errors import FailureReason, WorkError
from fedrt.methods.promptfl import PromptFL
from fedrt.spec import ExperimentSpec, OnTooFew
from fedrt.task import TaskKind
from fedrt.tensors import schema_sha256
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2
from fedrt.v1 import task_pb2 as task_pb
from fedrt.wire_values import experiment_spec_to_pb
from tests.fakes.federation import Federation, make_spec
from tests.fakes.raw_silo import RawSilo, manifest, success
from tests.fakes.workers import FakeWorker, failing, giving, report
from tests.integration.following import State, Watch, connected


async def end_of_the_impossible(federation: Federation, spec: ExperimentSpec) -> str:
    await federation.create("impossible", spec)
    experiment, rounds = await federation.finish("impossible")
    assert experiment.state == State.STATE_FAILED
    assert experiment.HasField("end_time")
    assert not any(r.succeeded or r.contributions for r in rounds)
    return experiment.status_message


async def test_01_every_silo_whose_policy_forbids_the_method_is_named_with_its_reason(federation: Federation) -> None:
    federation.start_coordinator()
    workers = {name: FakeWorker() for name in federation.silos}
    for name, worker in workers.items():
        federation.start_silo(name, worker, "policy: {methods: [zeroshot]}\n")
    message = await end_of_the_impossible(federation, make_spec(1, federation.silos, min_results=1))
    for name in federation.silos:
        assert f"{name}: refused (policy): policy.methods of this silo does not allow 'promptfl'" in message
    assert message.startswith("round 1 (train) got 0 of the 1 results it needs: ")
    assert all(worker.orders == [] for worker in workers.values())


@pytest.mark.parametrize("min_results", [1, None])
async def test_02_each_silo_gives_its_own_reason(federation: Federation, min_results: int | None) -> None:
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(description=report(weights="cd" * 32)))
    federation.start_silo("south", FakeWorker(description=report(examples=49)), "policy: {min_examples: 50}\n")
    federation.start_silo("west", FakeWorker(), "policy: {experiments: ['skin-*']}\n")
    spec = make_spec(1, federation.silos, min_results=min_results, on_too_few=OnTooFew.FAIL)
    message = await end_of_the_impossible(federation, spec)
    assert "north: refused (method_mismatch): the experiment names ViT-B-16 weights abababababababab" in message
    assert "this silo holds ViT-B-16 weights cdcdcdcdcdcdcdcd" in message
    assert "install the named weights file" in message
    assert "south: refused (policy): this silo has 49 training examples; its policy.min_examples asks for 50" in message
    assert "west: refused (policy): policy.experiments of this silo does not allow 'impossible'" in message


async def test_03_other_dimensions_and_another_schema_are_refused(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(description=report(context_dim=768)))
    message = await end_of_the_impossible(federation, make_spec(1, ("north",), on_too_few=OnTooFew.FAIL))
    assert "the experiment says context_dim 512 and feature_dim 512; this silo's model has 768 and 512" in message
    monkeypatch.setattr("silo.policy.schema_sha256", lambda specs: schema_sha256(list(specs)[1:]))
    federation.start_silo("south", FakeWorker())
    await federation.create("other-schema", make_spec(1, ("south",), on_too_few=OnTooFew.FAIL))
    experiment, _ = await federation.finish("other-schema")
    assert "this silo's 'promptfl' declares other tensors than the coordinator's" in experiment.status_message
    assert "install equal versions" in experiment.status_message


async def test_04_too_few_results_are_tried_again_and_then_fail_with_the_reasons(federation: Federation) -> None:
    federation.start_coordinator()
    broken = FakeWorker(failing(WorkError(FailureReason.OUT_OF_MEMORY, "the GPU has no memory left")))
    federation.start_silo("north", FakeWorker())
    federation.start_silo("south", broken)
    await federation.create("unlucky", make_spec(2, ("north", "south"), retries=2))
    experiment, rounds = await federation.finish("unlucky")
    assert experiment.state == State.STATE_FAILED
    assert "of the 2 results it needs: " in experiment.status_message
    assert "south: failed (out_of_memory): the GPU has no memory left" in experiment.status_message
    assert [order.task_id for order in broken.orders] == [
        "unlucky/1/train/south",
        "unlucky/1/train-1/south",
        "unlucky/1/train-2/south",
    ]
    assert [(r.round_number, r.succeeded) for r in rounds] == [(1, False)] * 3


async def test_05_a_silo_that_fails_once_is_asked_again_and_the_experiment_succeeds(federation: Federation) -> None:
    flaky = FakeWorker()
    honest = flaky.behave

    def behave(order):
        if len(flaky.orders) == 1:
            raise WorkError(FailureReason.INTERNAL, "a cosmic ray")
        return honest(order)

    flaky.behave = behave
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker())
    federation.start_silo("south", flaky)
    await federation.create("flaky", make_spec(2, ("north", "south")))
    experiment, rounds = await federation.finish("flaky")
    assert experiment.state == State.STATE_SUCCEEDED
    assert [(r.round_number, r.succeeded) for r in rounds][:3] == [(1, False), (1, True), (2, True)]


async def test_06_with_min_results_one_failing_silo_does_not_stop_the_others(federation: Federation) -> None:
    federation.start_coordinator()
    for name in ("north", "south"):
        federation.start_silo(name, FakeWorker())
    federation.start_silo("west", FakeWorker(), "policy: {methods: [zeroshot]}\n")
    await federation.create("without-west", make_spec(3, federation.silos, min_results=2))
    experiment, rounds = await federation.finish("without-west")
    assert experiment.state == State.STATE_SUCCEEDED
    assert all(len(r.contributions) == 2 for r in rounds)


SENSELESS: list[tuple[Callable[[experiment_pb2.ExperimentSpec], object], str]] = [
    (
        lambda s: setattr(s.local.method, "name", "prompfl"),
        "method 'prompfl' is not installed; did you mean 'promptfl'?",
    ),
    (lambda s: setattr(s.local.method, "hyperparameters_json", '{"contxt_length": 4}'), "contxt_length"),
    (lambda s: setattr(s.local.method, "hyperparameters_json", '{"context_length": 0}'), "context_length"),
    (lambda s: setattr(s.local.method, "hyperparameters_json", "{"), "not JSON"),
    (lambda s: setattr(s.local.method, "hyperparameters_json", "[4]"), "hyper"),
    (lambda s: setattr(s.local.model, "weights_sha256", b"short"), "weights_sha256"),
    (lambda s: s.local.class_names.append("cat"), "classes names 'cat' twice"),
    (lambda s: s.local.class_names.__delitem__(slice(None)), "classes holds 0 names"),
    (lambda s: setattr(s.rounds, "min_result_count", 4), "rounds.min_results is 4, but rounds.silos names only 3"),
    (lambda s: s.rounds.ClearField("time_limit"), "rounds.time_limit"),
    (lambda s: setattr(s.rounds, "on_too_few", 0), "OnTooFew number 0 is not known"),
    (lambda s: s.rounds.silo_ids.append("North Pole"), "'North Pole' is not a silo name"),
    (lambda s: setattr(s.local.method, "name", "zeroshot"), "method 'zeroshot' has nothing to train"),
    (lambda s: setattr(s.local.training.optimizer, "learning_rate", -1), "learning_rate"),
    (lambda s: setattr(s, "seed", 2**63), "seed"),
]


async def test_07_a_senseless_specification_is_refused_at_creation(federation: Federation) -> None:
    federation.start_coordinator()
    answers = []
    async with federation.admin() as stub:
        for spoil, complaint in SENSELESS:
            message = experiment_spec_to_pb(make_spec(1, federation.silos))
            spoil(message)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.CreateExperiment(pb.CreateExperimentRequest(experiment_id="senseless", spec=message))
            code, details = refused.value.code(), refused.value.details()
            if code is not grpc.StatusCode.INVALID_ARGUMENT or complaint not in details:
                answers.append((complaint, code, details))
        assert answers == []
        assert len((await stub.ListExperiments(pb.ListExperimentsRequest())).experiments) == 0


async def test_08_an_experiment_name_that_cannot_be_used_is_refused(federation: Federation) -> None:
    federation.start_coordinator()
    for name in ("", "Upper", "-dash", "dash-", "a" * 64, "a/b", "a b", "ünï", "new\nline"):
        with pytest.raises(grpc.aio.AioRpcError, match="experiment name") as refused:
            await federation.create(name, make_spec(1))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_09_the_same_again_succeeds_and_another_specification_under_the_name_does_not(
    federation: Federation,
) -> None:
    coordinator = federation.start_coordinator()
    federation.start_silo("north", FakeWorker())
    await federation.create("once", make_spec(1, ("north",)))
    await federation.create("once", make_spec(1, ("north",)))
    with pytest.raises(grpc.aio.AioRpcError, match="exists with another specification; choose a new name") as refused:
        await federation.create("once", make_spec(2, ("north",)))
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    await federation.finish("once")
    await coordinator.stop()
    federation.start_coordinator()  # the name stays taken, also after the end and a restart
    await federation.create("once", make_spec(1, ("north",)))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await federation.create("once", make_spec(2, ("north",)))
    assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert (await federation.experiment("once")).state == State.STATE_SUCCEEDED


async def test_10_of_two_operators_who_take_one_name_at_once_one_gets_it(federation: Federation) -> None:
    federation.start_coordinator()
    async with federation.admin():
        pass
    orders = [federation.create("contested", make_spec(count, ("north",))) for count in (1, 2, 3, 4)]
    answers = await asyncio.gather(*orders, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(refused) == 3
    assert all(error.code() is grpc.StatusCode.ALREADY_EXISTS for error in refused)


async def test_11_cancelling_stops_the_work_ends_the_experiment_and_late_results_are_late(
    federation: Federation,
) -> None:
    working = FakeWorker(gate=asyncio.Event())
    federation.start_coordinator()
    federation.start_silo("north", working)
    async with federation.admin() as stub, RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await Watch(federation).until(connected("north"))
        await federation.create("regretted", make_spec(3, ("north", "south")))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        await working.began.wait()
        answer = await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id="regretted"))
        assert answer.experiment.state == State.STATE_CANCELLED
        assert answer.experiment.status_message == "cancelled by an operator"
        assert (await raw.next("task_cancel")).task_id == offer.task_id
        described, data = manifest(offer.task_id, {"context": np.zeros((16, 512), np.float32)})
        await raw.result(success(offer.task_id, described), data)
        ack = await raw.next("result_ack")
        assert (ack.verdict, ack.message) == (task_pb.RESULT_VERDICT_LATE, "cancelled by an operator")
        again = await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id="regretted"))
        assert again.experiment == answer.experiment
        with pytest.raises(grpc.aio.AioRpcError, match="experiment 'unheard-of' does not exist") as unknown:
            await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id="unheard-of"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        working.gate.set()
        await federation.create("next", make_spec(1, ("north",)))
        experiment, _ = await federation.finish("next")
    assert experiment.state == State.STATE_SUCCEEDED
    assert working.abandoned == ["regretted/1/train/north"]
    assert [order.experiment_id for order in working.orders] == ["regretted", "next", "next"]
    assert not list((federation.directory / "silo-north" / "spool").iterdir())
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await federation.experiment("unheard-of")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_12_a_waiting_experiment_can_be_cancelled(federation: Federation) -> None:
    federation.start_coordinator()
    await federation.create("pending", make_spec(1, federation.silos))
    async with federation.admin() as stub:
        answer = await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id="pending"))
    assert answer.experiment.state == State.STATE_CANCELLED
    worker = FakeWorker()
    for name in federation.silos:
        federation.start_silo(name, worker)
        await Watch(federation).until(connected(name))
    await federation.create("another", make_spec(1, ("north",)))
    await federation.finish("another")
    assert {order.experiment_id for order in worker.orders} == {"another"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
async def test_13_the_message_of_a_failed_aggregation_reaches_the_operator(federation: Federation) -> None:
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(giving(3e38)))
    await federation.create("overflow", make_spec(3, ("north",)))
    experiment, rounds = await federation.finish("overflow")
    assert [(r.round_number, r.succeeded) for r in rounds][:2] == [(1, True), (2, False)]
    assert experiment.state == State.STATE_FAILED
    assert "tensor 'context' has values that are not finite" in experiment.status_message


async def test_14_a_bug_in_a_methods_aggregation_fails_the_experiment_instead_of_hanging_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(method: PromptFL, state: ServerState, updates: Sequence[Update]) -> ServerState:
        raise KeyError("momentum")

    monkeypatch.setattr(PromptFL, "aggregate", broken)
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker())
    await federation.create("buggy", make_spec(1, ("north",), on_too_few=OnTooFew.FAIL))
    experiment, _ = await federation.finish("buggy", limit=40)
    assert experiment.state == State.STATE_FAILED
    assert "KeyError" in experiment.status_message


async def test_15_an_initial_task_that_one_silo_refuses_goes_to_another_at_the_next_attempt(
    federation: Federation,
) -> None:
    worded = '{"context_length": 2, "context_init": "a photo"}'
    spec = make_spec(1, federation.silos, hyperparameters=worded, min_results=2, retries=5)
    everyone = Population(frozenset(federation.silos), frozenset(federation.silos))
    drawn = select(spec.rounds, everyone, Occasion(TaskKind.INITIALIZE, (spec.seed, 0, 0)))
    assert isinstance(drawn, Selection)
    federation.start_coordinator()
    for name in federation.silos:
        unwilling = "policy: {experiments: ['skin-*']}\n" if name in drawn.asked else ""
        federation.start_silo(name, FakeWorker(giving(1)), unwilling)
        await Watch(federation).until(connected(name))
    await federation.create("willing-others", spec)
    experiment, _ = await federation.finish("willing-others")
    assert experiment.status_message.startswith(
        f"missing in training rounds: {drawn.asked[0]} in 1 of 1 (last: refused"
    )
    assert experiment.state == State.STATE_SUCCEEDED


async def test_16_the_longest_names_that_are_allowed_work(tmp_path: Path) -> None:
    long = "n" * 63
    federation = Federation(tmp_path / "f", (long,))
    coordinator = federation.start_coordinator()
    federation.start_silo(long, FakeWorker())
    try:
        await federation.create("e" * 63, make_spec(2, (long,)))
        finished = asyncio.create_task(federation.finish("e" * 63, limit=40))
        await asyncio.wait({finished, coordinator.task}, return_when=asyncio.FIRST_COMPLETED)
        if coordinator.task.done():
            finished.cancel()
            coordinator.task.result()
        experiment, _ = await finished
    finally:
        await federation.stop()
    assert experiment.state == State.STATE_SUCCEEDED
