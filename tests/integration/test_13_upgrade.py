"""Versions work together: recorded sessions of older ones, what a newer one may say, and a state directory of old."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedrt.session.capabilities import OURS
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from tests.fakes.federation import Federation, free_port, make_spec
from tests.fakes.raw_silo import RawSilo, manifest, success
from tests.fakes.recorded import Dialled, RecordedCoordinator, RecordedSilo
from tests.fakes.recording import HeldWorker, Step, digest, later, read
from tests.fakes.stores import HELD, ROUNDS, SILOS, restore, small_spec
from tests.fakes.workers import FakeWorker
from tests.integration.following import State, Watch, absences, connected, contributors

GOLDEN = Path(__file__).parent.parent / "golden"
RECORDINGS = sorted((GOLDEN / "protocol").glob("*.txt"))
STORES = sorted((GOLDEN / "stores").glob("under-way-*.sql"))
PATIENT = "heartbeat_interval: 20s\nsilence_limit: 1h\n"  # a recording says its heartbeats when it comes to them


def test_00_there_are_recordings() -> None:
    assert RECORDINGS
    assert STORES


def told_by(speaker: str, version: str, path: Path) -> list[Step]:
    """What was recorded; of a later version, with frames and fields that nobody has invented yet."""
    return later(read(path), speaker) if version == "later" else read(path)


@pytest.mark.parametrize("version", ["as recorded", "later"])
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
async def test_01_a_recorded_silo_and_this_coordinator_come_to_the_same_end(
    federation: Federation, path: Path, version: str
) -> None:
    federation.start_coordinator(PATIENT)
    silo = RecordedSilo(federation)
    await silo.play(told_by("silo", version, path))
    assert silo.outcomes == silo.expected
    assert {state for state, _ in silo.outcomes.values()} == {"STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"}


@pytest.mark.parametrize("version", ["as recorded", "later"])
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
async def test_02_this_silo_answers_a_recorded_coordinator_as_recorded(
    federation: Federation, path: Path, version: str
) -> None:
    steps = told_by("coordinator", version, path)
    held = {step.words[0] for step in steps if step.what == "release"} | {"unwanted/1/train/north"}
    worker = HeldWorker(held=tuple(held))
    silo = federation.start_silo("north", worker)
    async with RecordedCoordinator(federation, worker).started() as coordinator:
        await coordinator.play(steps)
        await silo.task
    assert [len(hello.held_tasks) for hello in coordinator.hellos] == [0, 1, 1]
    assert not spooled(federation)  # every result has its verdict


def spooled(federation: Federation) -> list[Path]:
    return list((federation.directory / "silo-north/spool").glob("*.safetensors"))


@pytest.mark.parametrize("path", STORES, ids=lambda path: path.stem)
async def test_03_an_experiment_under_way_goes_on_with_this_coordinator(federation: Federation, path: Path) -> None:
    restore(path, federation.directory / "coordinator", time.time())
    workers = {name: HeldWorker() for name in SILOS}
    async with federation.started(workers):
        experiment, rounds = await federation.finish("upgraded")
        upgraded = digest(await federation.export("upgraded"))
        await federation.create("undisturbed", small_spec(ROUNDS, SILOS, every=2))
        await federation.finish("undisturbed")
        assert upgraded == digest(await federation.export("undisturbed"))
    assert experiment.state == State.STATE_SUCCEEDED
    assert [contributors(closed) for closed in rounds] == [list(SILOS)] * 7  # evaluations: before, after 2 and 4
    done = {name: [order.task_id for order in worker.orders] for name, worker in workers.items()}
    assert HELD in done["south"]
    assert "upgraded/2/train/north" not in done["north"]  # its result was in the store
    assert not [task for tasks in done.values() for task in tasks if task.startswith("upgraded/1/")]


# ---- capabilities


async def welcomed(raw: RawSilo, *capabilities: str) -> session_pb.Welcome:
    await raw.send(hello=session_pb.Hello(software_version="0.0.9", capabilities=capabilities))
    return await raw.next("welcome")


async def test_04_silo_and_coordinator_name_what_both_understand(federation: Federation) -> None:
    worker = HeldWorker()
    federation.start_silo("north", worker)
    async with RecordedCoordinator(federation, worker).started() as coordinator:
        hello = (await (await coordinator.dialled()).read()).hello
    assert tuple(hello.capabilities) == OURS
    federation.port = free_port()
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        assert tuple((await welcomed(raw, *OURS, "of-a-later-version")).capabilities) == OURS
    async with RawSilo(federation.port, federation.directory / "certs/silos/west") as raw:
        assert not (await welcomed(raw)).capabilities


def trained_on_views(*silos: str, **rules: object):
    spec = make_spec(1, silos, **rules)
    return replace(spec, local=replace(spec.local, training=replace(spec.local.training, views=2)))


async def test_05_a_silo_that_lacks_a_capability_is_not_offered_what_needs_it(federation: Federation) -> None:
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker())
    await Watch(federation).until(connected("north"))
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await welcomed(raw, "of-another-branch")
        await federation.create("views", trained_on_views("north", "south", min_results=1))
        offer = await raw.next("task_offer")  # the first that it gets: the evaluation after the round
        assert offer.kind == task_pb.TASK_KIND_EVALUATE
        await raw.send(task_reply=task_pb.TaskReply(task_id=offer.task_id, refusal=task_pb.TaskRefusal()))
        experiment, rounds = await federation.finish("views")
    assert experiment.state == State.STATE_SUCCEEDED
    assert contributors(rounds[0]) == ["north"]
    missing = "refused (method_mismatch): this silo (fedrt 0.0.9) does not understand 'views'; upgrade it"
    assert absences(rounds[0]) == {"south": missing}


async def test_06_the_operator_is_told_when_nobody_has_the_capability(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await welcomed(raw, "of-another-branch")
        await federation.create("views", trained_on_views("south", retries=0))
        experiment, _ = await federation.finish("views")
        assert experiment.state == State.STATE_FAILED
        assert "this silo (fedrt 0.0.9) does not understand 'views'; upgrade it" in experiment.status_message
        await federation.create("plain", make_spec(1, ("south",)))
        await raw.work_honestly()
        await raw.work_honestly()
        assert (await federation.finish("plain"))[0].state == State.STATE_SUCCEEDED


async def test_07_a_silo_of_protocol_1_0_names_nothing_and_trains_on_views(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await welcomed(raw)
        await federation.create("views", trained_on_views("south"))
        await raw.work_honestly()
        await raw.work_honestly()
        assert (await federation.finish("views"))[0].state == State.STATE_SUCCEEDED


# ---- values of a later version

LATER = 99


async def test_08_a_silo_survives_a_kind_of_task_of_a_later_version(federation: Federation) -> None:
    offers = [step.message.task_offer for step in read(RECORDINGS[0]) if step.what == "coordinator"]
    offer = next(offer for offer in offers if offer.task_id)
    worker = HeldWorker()
    federation.start_silo("north", worker)
    async with RecordedCoordinator(federation, worker).started() as coordinator:
        session = await greeted(coordinator)
        await session.say(task_offer=replaced(offer, kind=LATER))
        reply = (await session.read()).task_reply
        assert reply.refusal.reason == task_pb.REFUSAL_REASON_METHOD_MISMATCH
        assert "TaskKind number 99 is not known to this version" in reply.refusal.message
        await session.say(task_offer=offer)
        assert (await session.read()).task_reply.HasField("acceptance")


async def test_09_a_silo_survives_a_verdict_of_a_later_version_and_asks_again(federation: Federation) -> None:
    steps = [step for step in read(RECORDINGS[0]) if step.what == "coordinator"]
    offer = next(step.message.task_offer for step in steps if "/1/train/" in step.message.task_offer.task_id)
    chunk = next(step.message.payload_chunk for step in steps if "/1/train/" in step.message.payload_chunk.payload_id)
    worker = HeldWorker()
    federation.start_silo("north", worker)
    async with RecordedCoordinator(federation, worker).started() as coordinator:
        session = await greeted(coordinator)
        await session.say(task_offer=offer)
        assert (await session.read()).task_reply.HasField("acceptance")
        await session.say(payload_chunk=chunk)
        assert (await session.read()).task_result.HasField("success")
        assert (await session.read()).payload_chunk.data
        await session.say(result_ack=task_pb.ResultAck(task_id=offer.task_id, verdict=LATER))
        await session.say(task_offer=replaced(offer, task_id="other/1/train/north", kind=LATER))
        assert (await session.read()).task_reply.task_id == "other/1/train/north"  # the session goes on
        assert len(spooled(federation)) == 1
        session.ended.set()
        session = await greeted(coordinator, held=[offer.task_id])
        assert (await session.read()).task_result.task_id == offer.task_id
        assert (await session.read()).payload_chunk.data
        verdict = task_pb.ResultAck(task_id=offer.task_id, verdict=task_pb.RESULT_VERDICT_DUPLICATE)
        await session.say(result_ack=verdict)
        await federation.running.pop("north").stop()  # it has nothing left to deliver
    assert not spooled(federation)


def replaced(offer: task_pb.TaskOffer, **fields: object) -> task_pb.TaskOffer:
    copy = task_pb.TaskOffer.FromString(offer.SerializeToString())
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


async def greeted(coordinator: RecordedCoordinator, held: list[str] | None = None) -> Dialled:
    """A session that the silo has opened with these tasks, welcomed."""
    session = await coordinator.dialled()
    hello = (await session.read()).hello
    assert [task.task_id for task in hello.held_tasks] == (held or [])
    welcome = next(step for step in read(RECORDINGS[0]) if step.what == "coordinator")
    await session.context.write(welcome.data)
    return session


async def test_10_a_coordinator_survives_a_failure_reason_of_a_later_version(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await federation.create("failed", make_spec(1, ("south",), retries=0))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        failure = task_pb.TaskFailure(reason=LATER, message="the moon is full")
        await raw.result(task_pb.TaskResult(task_id=offer.task_id, failure=failure))
        assert (await raw.next("result_ack")).verdict == task_pb.RESULT_VERDICT_ACCEPTED
        experiment, _ = await federation.finish("failed")
        assert "failed (internal): the moon is full" in experiment.status_message


async def test_11_a_coordinator_takes_a_held_task_of_an_unknown_state_for_a_running_one(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await federation.create("held", make_spec(1, ("south",)))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        welcome = await raw.hello({offer.task_id: LATER, "forgotten": LATER})
        assert list(welcome.obsolete_task_ids) == ["forgotten"]
        tensors = {t.name: np.zeros(t.shape, np.float32) for t in offer.shared_tensors.tensors}
        described, data = manifest(offer.task_id, tensors)
        await raw.result(success(offer.task_id, described), data)
        assert (await raw.next("result_ack")).verdict == task_pb.RESULT_VERDICT_ACCEPTED
        await raw.work_honestly()
        assert (await federation.finish("held"))[0].state == State.STATE_SUCCEEDED
