"""What a federation is for: experiments that end with the tensors one can compute by hand, and a record of how."""

import asyncio
import contextlib
import itertools

import grpc
import numpy as np
import pytest

from fedrt.spec import ExperimentSpec
from fedrt.tensors import initial_tensors, seeded_generator
from fedrt.v1 import admin_service_pb2 as pb
from silo.work import OnProgress, WorkOrder, WorkOutcome
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker, add_one, giving
from tests.integration.following import EVALUATE, INITIALIZE, TRAIN, State, Watch, closed, contributors


def after_rounds(spec: ExperimentSpec, rounds: int, step: float = 1.0) -> np.ndarray:
    """The initial context plus `step`, added once per round in float32."""
    value = initial_tensors(spec.local.tensors(), spec.seed)["context"]
    for _ in range(rounds):
        value = (value + np.float32(step)).astype(np.float32)
    return value


class PacedWorker(FakeWorker):
    """Waits `delay` seconds before each answer."""

    delay = 0.0

    async def run(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        await asyncio.sleep(self.delay)
        return await super().run(order, on_progress)


async def test_01_three_silos_train_five_rounds_and_the_export_is_the_initial_context_plus_five(
    federation: Federation,
) -> None:
    spec = make_spec(5, federation.silos)
    workers = {name: FakeWorker() for name in federation.silos}
    async with federation.started(workers):
        await federation.create("five", spec)
        experiment, rounds = await federation.finish("five")
        exported = await federation.export("five")
    assert experiment.state == State.STATE_SUCCEEDED
    assert experiment.status_message == ""
    assert experiment.HasField("end_time")
    assert list(exported) == ["context"]
    assert exported["context"].tobytes() == after_rounds(spec, 5).tobytes()
    assert [(r.round_number, r.task_kind) for r in rounds] == [(n, TRAIN) for n in range(1, 6)] + [(5, EVALUATE)]
    assert all(r.succeeded and contributors(r) == ["north", "south", "west"] and not r.absences for r in rounds)
    for worker in workers.values():  # every silo got, in every round, what the round before it had made
        for done, order in enumerate(worker.orders[:5]):
            assert order.shared["context"].tobytes() == after_rounds(spec, done).tobytes()


async def test_02_the_order_in_which_results_arrive_changes_no_bit(federation: Federation) -> None:
    def drifting(name: str, examples: int):
        def behave(order: WorkOrder) -> WorkOutcome:
            draw = seeded_generator(0, "drift", name, order.round_number).standard_normal((16, 512))
            shared = {"context": draw.astype(np.float32)} if order.kind.value == "train" else {}
            return WorkOutcome(shared, {}, examples, {}, 0.0)

        return behave

    counts = zip(federation.silos, (7, 311, 23), strict=True)
    workers = {name: PacedWorker(drifting(name, examples)) for name, examples in counts}
    exports = []
    async with federation.started(workers):
        for index, order in enumerate(itertools.permutations(federation.silos)):
            for place, name in enumerate(order):
                workers[name].delay = 0.01 * place
            await federation.create(f"permuted-{index}", make_spec(3, federation.silos))
            experiment, _ = await federation.finish(f"permuted-{index}")
            assert experiment.state == State.STATE_SUCCEEDED
            exports.append((await federation.export(f"permuted-{index}"))["context"].tobytes())
    assert len(exports) == 6
    assert len(set(exports)) == 1
    assert exports[0] != after_rounds(make_spec(3), 3).tobytes()


async def test_03_the_mean_is_weighted_by_examples(federation: Federation) -> None:
    # (1*8 + 3*16 + 4*2) / 8 = 8 and (1*0.5 + 3*0.25 + 4*1.0) / 8 = 0.65625, both exact in binary
    workers = {
        "north": FakeWorker(giving(8, 1, {"accuracy": 0.5})),
        "south": FakeWorker(giving(16, 3, {"accuracy": 0.25})),
        "west": FakeWorker(giving(2, 4, {"accuracy": 1.0})),
    }
    spec = make_spec(1, federation.silos)
    async with federation.started(workers):
        await federation.create("weighted", spec)
        _, rounds = await federation.finish("weighted")
        exported = await federation.export("weighted")
    assert exported["context"].tobytes() == after_rounds(spec, 1, 8.0).tobytes()
    train = rounds[0]
    assert dict(train.metrics) == {"accuracy": 0.65625}
    parts = [
        (p.silo_id, p.example_count, p.payload_byte_count, p.work_duration.ToMilliseconds())
        for p in train.contributions
    ]
    assert parts == [("north", 1, 32768, 1500), ("south", 3, 32768, 1500), ("west", 4, 32768, 1500)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (0, [(1, TRAIN), (2, TRAIN), (3, TRAIN), (4, TRAIN), (5, TRAIN), (5, EVALUATE)]),
        (
            2,
            [
                *[(0, EVALUATE), (1, TRAIN), (2, TRAIN), (2, EVALUATE), (3, TRAIN), (4, TRAIN), (4, EVALUATE)],
                *[(5, TRAIN), (5, EVALUATE)],
            ],
        ),
        (5, [(0, EVALUATE), *[(n, TRAIN) for n in range(1, 6)], (5, EVALUATE)]),
    ],
)
async def test_04_evaluation_comes_before_the_first_round_after_every_kth_and_after_the_last(
    federation: Federation, every: int, expected: list[tuple[int, int]]
) -> None:
    async with federation.started({name: FakeWorker() for name in federation.silos}):
        await federation.create("evaluated", make_spec(5, federation.silos, every))
        _, rounds = await federation.finish("evaluated")
    assert [(r.round_number, r.task_kind) for r in rounds] == expected


async def test_05_zeroshot_evaluates_once_and_has_nothing_to_export(federation: Federation) -> None:
    workers = {name: FakeWorker() for name in federation.silos}
    async with federation.started(workers):
        await federation.create("zeroshot", make_spec(0, federation.silos, method="zeroshot"))
        experiment, rounds = await federation.finish("zeroshot")
        with pytest.raises(grpc.aio.AioRpcError, match="has no shared tensors yet, or its method has none") as refused:
            await federation.export("zeroshot")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert experiment.state == State.STATE_SUCCEEDED
    assert [(r.round_number, r.task_kind) for r in rounds] == [(0, EVALUATE)]
    assert all(dict(worker.orders[0].shared) == {} for worker in workers.values())


async def test_06_one_silo_computes_the_initial_tensors_that_need_clip(federation: Federation) -> None:
    def behave(order: WorkOrder) -> WorkOutcome:
        return giving(3, examples=0)(order) if order.kind.value == "initialize" else add_one(order)

    workers = {name: FakeWorker(behave) for name in federation.silos}
    worded = '{"context_length": 2, "context_init": "a photo"}'
    async with federation.started(workers):
        await federation.create("worded", make_spec(2, federation.silos, hyperparameters=worded))
        experiment, rounds = await federation.finish("worded")
        exported = await federation.export("worded")
    assert experiment.state == State.STATE_SUCCEEDED
    assert [(r.round_number, r.task_kind) for r in rounds] == [(0, INITIALIZE), (1, TRAIN), (2, TRAIN), (2, EVALUATE)]
    assert len(contributors(rounds[0])) == 1
    assert (exported["context"] == np.float32(5)).all()


async def test_07_events_have_no_gap_and_can_be_resumed_from_any_number(federation: Federation) -> None:
    async with federation.started({name: FakeWorker() for name in federation.silos}):
        await federation.create("first", make_spec(2, federation.silos))
        await federation.finish("first")
        await federation.create("second", make_spec(2, federation.silos))
        await federation.finish("second")
        whole: list[pb.Event] = []
        async with contextlib.aclosing(federation.events()) as events:
            async for event in events:
                whole.append(event)
                changed = event.experiment_changed.experiment
                if changed.experiment_id == "second" and changed.HasField("end_time"):
                    break
        for after in range(len(whole)):
            async with asyncio.timeout(30), contextlib.aclosing(federation.events(after=after)) as events:
                assert await anext(events) == whole[after]
        async with contextlib.aclosing(federation.events("first")) as events:
            first = [await anext(events) for _ in range(sum("first" in str(event) for event in whole))]
    assert [event.event_number for event in whole] == list(range(1, len(whole) + 1))
    assert first == [event for event in whole if "first" in str(event)]
    times = [event.event_time.ToNanoseconds() for event in whole]
    assert times == sorted(times)


async def test_08_an_event_stream_goes_on_after_a_restart_without_gap_or_repetition(federation: Federation) -> None:
    workers = {name: FakeWorker() for name in federation.silos}
    coordinator = federation.start_coordinator()
    for name, worker in workers.items():
        federation.start_silo(name, worker)
    await federation.create("before", make_spec(1, federation.silos))
    watch = Watch(federation)
    await watch.until(closed(1, EVALUATE))
    await coordinator.stop()
    federation.start_coordinator()
    await federation.create("after", make_spec(1, federation.silos))
    await federation.finish("after")
    async with contextlib.aclosing(federation.events(after=watch.number)) as events:
        later = [(await anext(events)).event_number for _ in range(6)]
    assert later == list(range(watch.number + 1, watch.number + 7))


async def test_09_watchers_that_never_read_do_not_hold_up_the_rounds(federation: Federation) -> None:
    rounds_count = 40
    verbose = {f"metric-{index:03d}": 0.5 for index in range(60)}

    def behave(order: WorkOrder) -> WorkOutcome:
        done = add_one(order)
        return WorkOutcome(done.shared, {}, done.example_count, verbose, 0.0)

    workers = {name: FakeWorker(behave) for name in federation.silos}
    async with federation.started(workers), contextlib.AsyncExitStack() as stack:
        calls = []
        for _ in range(5):
            stub = await stack.enter_async_context(federation.admin())
            calls.append(stub.WatchEvents(pb.WatchEventsRequest()))
            await calls[-1].read()  # it has begun; and now it falls asleep
        await federation.create("watched", make_spec(rounds_count, federation.silos))
        experiment, rounds = await federation.finish("watched")
        assert experiment.state == State.STATE_SUCCEEDED
        assert len(rounds) == rounds_count + 1
        numbers = [(await calls[0].read()).event.event_number for _ in range(rounds_count)]
        assert numbers == list(range(2, rounds_count + 2))  # the sleeper wakes up and has missed nothing


async def test_10_two_experiments_at_once_do_not_disturb_each_other(federation: Federation) -> None:
    specs = {
        "one": make_spec(4, federation.silos),
        "other": make_spec(6, federation.silos, hyperparameters='{"context_length": 3}'),
    }
    async with federation.started({name: FakeWorker() for name in federation.silos}):
        for name, spec in specs.items():
            await federation.create(name, spec)
        ended = dict(zip(specs, await asyncio.gather(*(federation.finish(name) for name in specs)), strict=True))
        exports = {name: (await federation.export(name))["context"] for name in specs}
    assert all(experiment.state == State.STATE_SUCCEEDED for experiment, _ in ended.values())
    assert exports["one"].tobytes() == after_rounds(specs["one"], 4).tobytes()
    assert exports["other"].tobytes() == after_rounds(specs["other"], 6).tobytes()


async def test_11_private_tensors_advance_once_per_round_and_never_travel(federation: Federation) -> None:
    def behave(order: WorkOrder) -> WorkOutcome:
        done = add_one(order)
        own = order.private.get("own", np.zeros(2, np.float32)) + 1
        return WorkOutcome(done.shared, {"own": own}, 10, {}, 0.0)

    workers = {name: FakeWorker(behave) for name in federation.silos}
    async with federation.started(workers):
        await federation.create("personal", make_spec(4, federation.silos))
        experiment, _ = await federation.finish("personal")
    assert experiment.state == State.STATE_SUCCEEDED
    for name, worker in workers.items():
        begun = [float(order.private["own"][0]) if order.private else 0.0 for order in worker.orders]
        assert begun == [0.0, 1.0, 2.0, 3.0, 4.0]  # four rounds, then the evaluation: evaluating advances nothing
        sent = (federation.directory / f"silo-{name}" / "departures.jsonl").read_text()
        assert '"context"' in sent
        assert '"own"' not in sent
