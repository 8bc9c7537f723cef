"""The agent with a fake worker and a fake session, on real files: what a silo does, and in which order."""

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from fedrt.errors import FailureReason, PayloadError, StorageError, WorkError
from fedrt.methods.promptfl import PromptFL
from fedrt.metrics import SiloMetrics
from fedrt.payload import describe
from fedrt.session.frames import HeldState
from fedrt.task import Failure, RefusalReason, Result, Success, Task, TaskKind, Verdict
from fedrt.tensors import Normal, Scope, Tensors, TensorSpec, schema_sha256
from silo.agent import Agent, OfferArrived, SessionDown, SessionUp, TensorsArrived
from silo.checkpoint_directory import CheckpointDirectory
from silo.ledger import CancelArrived, DrainOrdered, Reply, VerdictArrived
from silo.policy import Policy
from silo.spool import Spool
from silo.stores import Stores
from silo.vault import KEPT_ROUNDS, Vault
from silo.work import WorkOrder, WorkOutcome
from tests.fakes.workers import FakeWorker, failing, report
from tests.samples import DIGEST, task

LIMIT = 30.0
SHARED = {"context": np.zeros((2, 8), np.float32)}


@dataclass
class FakeSession:
    """Notes what the agent says; `next` waits for it."""

    said: asyncio.Queue[Reply | tuple[Result, bytes | None]] = field(default_factory=asyncio.Queue)

    def reply(self, reply: Reply) -> None:
        self.said.put_nowait(reply)

    def send(self, result: Result, data: memoryview | None) -> None:
        self.said.put_nowait((result, None if data is None else bytes(data)))

    def progress(self, task_id: str, done: int, planned: int) -> None:
        return None

    async def next(self) -> Reply | tuple[Result, bytes | None]:
        return await asyncio.wait_for(self.said.get(), LIMIT)


def counting(order: WorkOrder) -> WorkOutcome:
    """A delta of ones, and a private tensor that counts the rounds it has seen."""
    own = order.private.get("own", np.zeros(3, np.float32)) + 1
    shared = {"context": np.ones((2, 8), np.float32)} if order.kind is not TaskKind.EVALUATE else {}
    return WorkOutcome(shared, {"own": own}, 10, {"loss": 0.5}, 0.1)


@dataclass
class Site:
    """One silo on disk; `restart` makes the daemon anew."""

    directory: Path
    worker: FakeWorker = field(default_factory=lambda: FakeWorker(counting, report(8, 4, DIGEST)))
    session: FakeSession = field(default_factory=FakeSession)
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        self.spool, self.vault = Spool(self.directory / "spool"), Vault(self.directory / "vault")
        self.checkpoints = CheckpointDirectory(self.directory / "checkpoints")
        self.running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        metrics = SiloMetrics(CollectorRegistry())
        stores = Stores(self.spool, self.vault, self.checkpoints, metrics)
        self.agent = Agent(self.worker, self.worker.description, self.policy, stores, metrics)
        await self.agent.recover()
        self.running = asyncio.create_task(self.agent.run())

    async def stop(self) -> None:
        assert self.running is not None
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def connect(self, obsolete: tuple[str, ...] = ()) -> None:
        self.session = FakeSession()
        self.agent.submit(SessionUp(self.session, obsolete))

    async def settled(self) -> None:
        """Wait until everything submitted so far has been handled."""
        async with asyncio.timeout(LIMIT):
            while not self.agent._inbox.empty():  # noqa: ASYNC110
                await asyncio.sleep(0)
            await asyncio.sleep(0.02)

    def offer(self, offered: Task) -> None:
        manifest = None if offered.kind is TaskKind.INITIALIZE else describe(offered.task_id, SHARED)[0]
        self.agent.submit(OfferArrived(offered, manifest))

    def tensors(self, task_id: str) -> None:
        self.agent.submit(TensorsArrived(task_id, describe(task_id, SHARED)[1]))

    async def do(self, offered: Task) -> tuple[Result, bytes | None]:
        """Offer a task and return what the silo makes of it."""
        self.offer(offered)
        assert await self.session.next() == Reply(offered.task_id)
        if offered.kind is not TaskKind.INITIALIZE:
            self.tensors(offered.task_id)
        sent = await self.session.next()
        assert not isinstance(sent, Reply)
        return sent

    def own(self, experiment_id: str = "e1") -> float:
        found = self.vault.load(experiment_id, sys.maxsize)
        return float(found["own"][0]) if found else 0.0


def offered(task_id: str = "t1", kind: TaskKind = TaskKind.TRAIN, **changes: object) -> Task:
    sample = task(task_id, kind)
    right = dataclasses.replace(sample, schema_sha256=schema_sha256(sample.local.tensors()))
    return dataclasses.replace(right, **changes)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    await made.start()
    made.connect()
    yield made
    assert not made.running.done() or made.running.cancelled(), made.running.exception()
    await made.stop()


async def test_a_result_is_on_disk_before_it_is_sent_and_until_its_verdict(site: Site):
    result, data = await site.do(offered())
    assert result.outcome == Success(10, {"loss": 0.5}, 0.1, sha256(SHARED["context"].tobytes()).hexdigest())
    assert data == np.ones((2, 8), np.float32).tobytes()
    assert [spooled.task_id for spooled in site.spool.load()] == ["t1"]
    assert site.own() == 0
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.spool.load() == []
    assert site.own() == 1


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (Verdict.ACCEPTED, 1),
        (Verdict.DUPLICATE, 1),
        (Verdict.LATE, 0),
        (Verdict.INVALID, 0),
        (Verdict.UNKNOWN_TASK, 0),
    ],
)
async def test_private_tensors_advance_with_accepted_results_only(site: Site, verdict: Verdict, expected: int):
    await site.do(offered())
    site.agent.submit(VerdictArrived("t1", verdict))
    site.agent.submit(VerdictArrived("t1", verdict))
    await site.settled()
    assert site.own() == expected
    assert site.spool.load() == []
    await site.do(offered("t2", round_number=2))
    assert [float(order.private["own"][0]) if order.private else 0.0 for order in site.worker.orders] == [0, expected]


@pytest.mark.parametrize("kind", [TaskKind.EVALUATE, TaskKind.INITIALIZE])
async def test_only_training_advances_private_tensors(site: Site, kind: TaskKind):
    result, data = await site.do(offered(kind=kind))
    assert isinstance(result.outcome, Success)
    assert (data is None) == (kind is TaskKind.EVALUATE)
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 0


async def test_a_round_that_a_restored_coordinator_repeats_begins_from_what_it_began_from_then(site: Site):
    for round_number in (1, 2, 3):
        await site.do(offered(f"t{round_number}", round_number=round_number))
        site.agent.submit(VerdictArrived(f"t{round_number}", Verdict.ACCEPTED))
        await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 3
    await site.do(offered("evaluation", TaskKind.EVALUATE, round_number=2))  # the coordinator is at round 2 again
    site.agent.submit(VerdictArrived("evaluation", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 3
    await site.do(offered("again", round_number=2))
    site.agent.submit(VerdictArrived("again", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert [float(order.private["own"][0]) for order in site.worker.orders[1:]] == [1, 2, 2, 1]
    assert site.own() == 2


async def test_a_result_outlives_the_daemon_and_is_sent_in_the_next_session(site: Site):
    first, _ = await site.do(offered())
    site.agent.submit(SessionDown(site.session))
    await site.restart()
    assert [(held.task_id, held.state) for held in site.agent.held] == [("t1", HeldState.FINISHED)]
    site.connect()
    again, data = await site.session.next()
    assert again == first
    assert data == np.ones((2, 8), np.float32).tobytes()
    site.agent.submit(VerdictArrived("t1", Verdict.DUPLICATE))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 1


async def test_work_of_an_experiment_waits_for_the_verdict_of_its_result_before(site: Site):
    """Otherwise it would start from private tensors that an acceptance on its way is about to replace."""
    await site.do(offered("t1"))
    site.agent.submit(SessionDown(site.session))  # the session is lost before the verdict comes
    site.connect()
    await site.session.next()  # t1 is sent again; meanwhile the coordinator, which has stored it, offers the next round
    site.offer(offered("t2", round_number=2))
    assert await site.session.next() == Reply("t2")
    site.tensors("t2")
    await site.settled()
    site.agent.submit(VerdictArrived("t1", Verdict.DUPLICATE))
    result, _ = await site.session.next()
    assert result.task_id == "t2"
    assert [float(order.private["own"][0]) if order.private else 0.0 for order in site.worker.orders] == [0.0, 1.0]
    site.agent.submit(VerdictArrived("t2", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 2


async def test_another_experiments_work_does_not_wait_for_that_verdict(site: Site):
    await site.do(offered("t1"))
    result, _ = await site.do(offered("t2", experiment_id="e2"))
    assert result.task_id == "t2"


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ({"context": np.ones((2, 8), np.float32), "own": np.ones(3, np.float32)}, FailureReason.INTERNAL),
        ({"own": np.ones(3, np.float32)}, FailureReason.INTERNAL),
        ({}, FailureReason.INTERNAL),
        ({"context": np.ones((8, 2), np.float32)}, FailureReason.INTERNAL),
        ({"context": np.ones((2, 8), np.float64)}, FailureReason.INTERNAL),
        ({"context": np.full((2, 8), np.nan, np.float32)}, FailureReason.NOT_FINITE),
    ],
)
async def test_a_worker_that_returns_anything_but_the_shared_tensors_gets_none_of_them_out(
    site: Site, monkeypatch: pytest.MonkeyPatch, returned: dict, reason: FailureReason
):
    declared = PromptFL.tensors
    own = TensorSpec("own", (3,), Scope.PRIVATE, Normal())
    monkeypatch.setattr(PromptFL, "tensors", lambda method, dims: (*declared(method, dims), own))
    site.worker.behave = lambda order: WorkOutcome(returned, {"own": np.ones(3, np.float32)}, 10, {}, 0.1)
    result, data = await site.do(offered())
    assert isinstance(result.outcome, Failure)
    assert result.outcome.reason is reason
    assert (result.manifest, data) == (None, None)
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 0


async def test_private_tensors_never_reach_the_session(site: Site, monkeypatch: pytest.MonkeyPatch):
    secret = np.full(3, 7.25, np.float32)
    site.worker.behave = lambda order: dataclasses.replace(counting(order), private={"own": secret})
    for index, verdict in enumerate((Verdict.ACCEPTED, Verdict.LATE, Verdict.DUPLICATE)):
        result, data = await site.do(offered(f"t{index}"))
        assert {header.name for header in result.manifest.tensors} == {"context"}
        assert secret.tobytes() not in data
        site.agent.submit(VerdictArrived(f"t{index}", verdict))
        await asyncio.wait_for(site.agent.idle(), LIMIT)


async def test_tensors_that_arrive_spoilt_are_a_failed_task(site: Site):
    for task_id, data in (
        ("t1", PayloadError("the digest of a payload differs from its manifest")),
        ("t2", describe("t2", {"context": np.full((2, 8), np.inf, np.float32)})[1]),
    ):
        site.offer(offered(task_id))
        assert await site.session.next() == Reply(task_id)
        site.agent.submit(TensorsArrived(task_id, data))
        result, _ = await site.session.next()
        assert result.outcome.reason is FailureReason.PAYLOAD_CORRUPT
        site.agent.submit(VerdictArrived(task_id, Verdict.ACCEPTED))
    assert site.worker.orders == []


async def test_work_that_takes_too_long_is_stopped_and_reported(site: Site):
    site.worker.gate = asyncio.Event()
    result, _ = await site.do(offered(time_limit=0.05))
    assert result.outcome.reason is FailureReason.TIME_LIMIT
    assert site.worker.abandoned == ["t1"]


async def test_a_failure_of_the_worker_is_reported_with_its_reason(site: Site):
    def fail(order: WorkOrder) -> WorkOutcome:
        raise WorkError(FailureReason.OUT_OF_MEMORY, "no memory left")

    site.worker.behave = fail
    result, _ = await site.do(offered())
    assert result.outcome == Failure(FailureReason.OUT_OF_MEMORY, "no memory left")


async def test_a_bug_in_the_worker_is_a_failed_task_and_not_a_silo_that_hangs(site: Site):
    def fail(order: WorkOrder) -> WorkOutcome:
        raise KeyError("/data/patient-7.png")

    site.worker.behave = fail
    result, _ = await site.do(offered())
    assert result.outcome.reason is FailureReason.INTERNAL
    assert "patient" not in result.outcome.message
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    site.worker.behave = counting
    assert isinstance((await site.do(offered("t2")))[0].outcome, Success)


async def test_damaged_private_tensors_fail_the_task_without_telling_where_they_lie(site: Site):
    site.vault.promote("e1", 1, {"own": np.ones(3, np.float32)})
    (file,) = (site.directory / "vault").glob("*/*")
    file.write_bytes(b"rubbish")
    result, _ = await site.do(offered(round_number=2))
    assert result.outcome == Failure(
        FailureReason.INTERNAL, "private tensors at the silo are damaged or no longer kept; see its log"
    )
    assert site.worker.orders == []


async def test_private_tensors_that_cannot_be_read_now_are_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch):
    """A mount that is gone for a while, say: the round's attempts are not used up on it."""
    monkeypatch.setattr("silo.stores.DISK_RETRY_DELAY", 0.01)
    site.vault.promote("e1", 1, {"own": np.ones(3, np.float32)})
    attempts, load = 0, site.vault.load

    def gone_for_a_while(experiment_id: str, before_round: int) -> Tensors:
        nonlocal attempts
        attempts += 1
        if attempts <= 3:
            raise StorageError("the vault is gone; mount it again")
        return load(experiment_id, before_round)

    monkeypatch.setattr(site.vault, "load", gone_for_a_while)
    with capture_logs() as logs:
        result, _ = await site.do(offered(round_number=2))
    assert isinstance(result.outcome, Success)
    assert site.worker.orders[0].private["own"].tolist() == [1, 1, 1]
    told = [entry["event"] for entry in logs if "disk" in entry["event"]]
    assert told == ["work does not begin until the disk can be read", "the disk can be read again"]


async def test_private_tensors_are_not_waited_for_beyond_the_time_limit(site: Site, monkeypatch: pytest.MonkeyPatch):
    def gone(experiment_id: str, before_round: int) -> Tensors:
        raise StorageError("the vault is gone; mount it again")

    monkeypatch.setattr(site.vault, "load", gone)
    result, _ = await site.do(offered(time_limit=0.1))
    assert result.outcome.reason is FailureReason.TIME_LIMIT
    assert site.worker.orders == []


async def test_private_tensors_that_are_no_longer_kept_fail_the_task_at_once(site: Site):
    for round_number in range(1, KEPT_ROUNDS + 2):
        site.vault.promote("e1", round_number, {"own": np.ones(3, np.float32)})
    result, _ = await site.do(offered(round_number=1))
    assert result.outcome.reason is FailureReason.INTERNAL
    assert "no longer kept" in result.outcome.message


async def test_a_cancelled_task_stops_and_is_reported_as_cancelled(site: Site):
    site.worker.gate = asyncio.Event()
    site.offer(offered())
    await site.session.next()
    site.tensors("t1")
    await asyncio.wait_for(site.worker.began.wait(), LIMIT)
    site.agent.submit(CancelArrived("t1"))
    result, _ = await site.session.next()
    assert result.outcome.reason is FailureReason.CANCELLED
    assert site.worker.abandoned == ["t1"]
    site.agent.submit(VerdictArrived("t1", Verdict.LATE))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.spool.load() == []


async def test_a_running_task_that_has_become_obsolete_is_dropped_without_a_word(site: Site):
    site.worker.gate = asyncio.Event()
    site.offer(offered())
    await site.session.next()
    site.tensors("t1")
    await asyncio.wait_for(site.worker.began.wait(), LIMIT)
    site.agent.submit(SessionDown(site.session))
    site.connect(obsolete=("t1",))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.worker.abandoned == ["t1"]
    assert site.session.said.empty()
    assert site.spool.load() == []


async def test_a_silo_trains_on_while_offline(site: Site):
    site.worker.gate = asyncio.Event()
    site.offer(offered())
    await site.session.next()
    site.tensors("t1")
    await asyncio.wait_for(site.worker.began.wait(), LIMIT)
    site.agent.submit(SessionDown(site.session))
    await site.settled()
    assert [(held.task_id, held.state) for held in site.agent.held] == [("t1", HeldState.RUNNING)]
    site.worker.gate.set()
    await site.settled()
    site.connect()
    result, _ = await site.session.next()
    assert result.task_id == "t1"
    assert isinstance(result.outcome, Success)


async def test_an_offer_whose_tensors_were_lost_with_the_session_can_be_made_again(site: Site):
    site.offer(offered())
    assert await site.session.next() == Reply("t1")
    site.agent.submit(SessionDown(site.session))
    site.tensors("t1")  # too late: they belong to the lost session
    site.connect()
    await site.settled()
    assert site.worker.orders == []
    assert isinstance((await site.do(offered()))[0].outcome, Success)


async def test_a_draining_silo_finishes_delivers_and_refuses_what_is_new(site: Site):
    site.worker.gate = asyncio.Event()
    site.offer(offered())
    await site.session.next()
    site.tensors("t1")
    await asyncio.wait_for(site.worker.began.wait(), LIMIT)
    site.agent.submit(DrainOrdered())
    site.offer(offered("t2"))
    assert await site.session.next() == Reply("t2", RefusalReason.DRAINING, "this silo is stopping")
    site.worker.gate.set()
    result, _ = await site.session.next()
    assert result.task_id == "t1"
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 1


async def test_a_task_the_policy_forbids_is_refused_with_the_reason(tmp_path: Path):
    site = Site(tmp_path, policy=Policy(methods=("zeroshot",)))
    await site.start()
    site.connect()
    site.offer(offered())
    reply = await site.session.next()
    assert (reply.refusal, reply.message) == (
        RefusalReason.POLICY,
        "policy.methods of this silo does not allow 'promptfl'",
    )
    await site.stop()


async def test_an_offer_of_more_than_the_method_declares_is_refused_before_a_byte_arrives(site: Site):
    task_ = offered()
    site.agent.submit(OfferArrived(task_, describe("t1", {"context": np.zeros((4, 8), np.float32)})[0]))
    reply = await site.session.next()
    assert (reply.refusal, reply.message) == (
        RefusalReason.METHOD_MISMATCH,
        "the offer announces 128 bytes of tensors; the method declares 64",
    )


def checkpoint(site: Site) -> Path:
    """Of the work of round 1, in whichever attempt."""
    return site.checkpoints.path("e1/1/train")


async def begun(site: Site, task: Task) -> None:
    """The worker is at the task, and has written a checkpoint."""
    site.worker.gate = asyncio.Event()
    site.worker.began.clear()
    site.offer(task)
    await site.session.next()
    site.tensors(task.task_id)
    await asyncio.wait_for(site.worker.began.wait(), LIMIT)
    assert site.worker.orders[-1].checkpoint == str(checkpoint(site))
    checkpoint(site).write_bytes(b"a checkpoint")


@pytest.mark.parametrize("outcome", ["success", "failure", "cancelled", "obsolete"])
async def test_a_checkpoint_goes_when_its_task_has_ended_for_good(site: Site, outcome: str):
    await begun(site, offered())
    match outcome:
        case "cancelled":
            site.agent.submit(CancelArrived("t1"))
        case "obsolete":
            site.agent.submit(SessionDown(site.session))
            site.connect(obsolete=("t1",))
        case "failure":
            site.worker.behave = failing(WorkError(FailureReason.NOT_FINITE, "the loss is not finite"))
    site.worker.gate.set()
    if outcome == "obsolete":
        await asyncio.wait_for(site.agent.idle(), LIMIT)
    else:
        await site.session.next()
    assert not checkpoint(site).exists()  # before the result leaves


@pytest.mark.parametrize("reason", [FailureReason.TIME_LIMIT, FailureReason.OUT_OF_MEMORY])
async def test_work_that_ran_out_of_time_or_memory_goes_on_in_the_next_attempt(site: Site, reason: FailureReason):
    await begun(site, offered())
    site.worker.behave = failing(WorkError(reason, "too slow, or too large"))
    site.worker.gate.set()
    result, _ = await site.session.next()
    assert isinstance(result.outcome, Failure)
    await site.restart()
    assert checkpoint(site).exists()
    site.worker.behave, site.worker.gate = counting, None
    site.connect()
    await site.session.next()
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    await site.do(offered("t1-again"))
    assert site.worker.orders[-1].checkpoint == str(checkpoint(site))
    assert not checkpoint(site).exists()


async def test_a_checkpoint_outlives_the_daemon_and_the_task_goes_on_with_it(site: Site):
    await begun(site, offered())
    site.offer(offered("t2"))
    await site.session.next()
    await site.restart()
    site.worker.gate = None
    site.connect()
    site.offer(offered())
    await site.session.next()
    site.agent.submit(SessionDown(site.session))  # its tensors never came
    site.connect()
    await site.settled()
    assert checkpoint(site).exists()
    await site.do(offered())
    assert site.worker.orders[-1].checkpoint == str(checkpoint(site))
    assert not checkpoint(site).exists()


async def test_a_checkpoint_whose_result_is_in_the_spool_goes_at_the_next_start(site: Site):
    await site.do(offered())
    checkpoint(site).write_bytes(b"the daemon died in between")
    await site.restart()
    assert not checkpoint(site).exists()


async def test_a_checkpoint_that_cannot_be_removed_holds_nothing_up(site: Site):
    checkpoint(site).mkdir()
    assert isinstance((await site.do(offered()))[0].outcome, Success)


async def test_only_training_has_checkpoints(site: Site):
    await site.do(offered(kind=TaskKind.EVALUATE))
    assert site.worker.orders[-1].checkpoint == ""


async def test_a_full_disk_holds_the_result_back_until_there_is_space(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("silo.stores.DISK_RETRY_DELAY", 0.01)
    refusals: list[str] = []

    def full_for_a_while(write: Callable[..., None]) -> Callable[..., None]:
        def fragile(*arguments: object) -> None:
            refusals.append(write.__name__)
            if len([name for name in refusals if name == write.__name__]) <= 3:
                raise StorageError("the disk is full; free space and try again")
            write(*arguments)

        return fragile

    monkeypatch.setattr(site.spool, "put", full_for_a_while(site.spool.put))
    monkeypatch.setattr(site.vault, "promote", full_for_a_while(site.vault.promote))
    result, _ = await site.do(offered())
    assert isinstance(result.outcome, Success)
    assert refusals == ["put"] * 4
    site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert refusals == ["put"] * 4 + ["promote"] * 4
    assert site.own() == 1


async def test_a_kill_between_promotion_and_forgetting_promotes_once(site: Site, monkeypatch: pytest.MonkeyPatch):
    await site.do(offered())
    with monkeypatch.context() as dying:
        dying.setattr(site.spool, "remove", lambda task_id: None)  # the daemon dies before it gets there
        site.agent.submit(VerdictArrived("t1", Verdict.ACCEPTED))
        await site.settled()
    assert site.own() == 1
    await site.restart()
    site.connect()
    assert (await site.session.next())[0].task_id == "t1"
    site.agent.submit(VerdictArrived("t1", Verdict.DUPLICATE))
    await asyncio.wait_for(site.agent.idle(), LIMIT)
    assert site.own() == 1
    assert site.spool.load() == []


async def test_what_work_finds_unreadable_counts_for_the_next_offer(site: Site):
    """Damaged pixels show only when they are decoded; the policy then applies to what is left."""
    site.agent._policy = Policy(min_examples=50)
    fewer = dataclasses.replace(site.worker.description, class_counts={"train": {"cat": 49}}, unreadable_count=51)

    def decode(order: WorkOrder) -> WorkOutcome:
        site.worker.description = fewer
        return counting(order)

    site.worker.behave = decode
    assert isinstance((await site.do(offered()))[0].outcome, Success)
    site.offer(offered("t2"))
    reply = await site.session.next()
    assert reply.refusal is RefusalReason.POLICY
    assert "this silo has 49 training examples" in reply.message
