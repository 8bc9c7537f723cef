"""Results of a silo that means harm: each gets the right verdict and a reason, nothing is stored, the round goes on."""

import hashlib
import sqlite3
from collections.abc import Callable

import grpc
import numpy as np
import pytest

from fedrt.methods.promptfl import PromptFL
from fedrt.tensors import Normal, Scope, TensorSpec
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.v1 import tensor_pb2 as tensor_pb
from tests.fakes.federation import Federation, make_spec
from tests.fakes.raw_silo import FINISHED, RawSilo, manifest, success
from tests.fakes.workers import FakeWorker
from tests.integration.following import State, Watch, absences, closed, connected, contributors

INVALID, UNKNOWN = task_pb.RESULT_VERDICT_INVALID, task_pb.RESULT_VERDICT_UNKNOWN_TASK
Bad = tuple[task_pb.TaskResult, bytes]
ONES = np.ones((16, 512), np.float32)


def stored_digests(federation: Federation) -> set[str]:
    with sqlite3.connect(f"file:{federation.directory}/coordinator/coordinator.db?mode=ro", uri=True) as store:
        rows = store.execute("SELECT sha256 FROM blobs").fetchall()
    files = (federation.directory / "coordinator" / "blobs").rglob("*")
    return {row[0] for row in rows} | {path.name for path in files if path.is_file()}


def spoilt(spoil: Callable[[tensor_pb.PayloadManifest], object], tensors: dict[str, np.ndarray] | None = None) -> Bad:
    described, data = manifest("evil", tensors or {"context": ONES * 666})
    spoil(described)
    return success("", described), data


def wrong_digest() -> Bad:
    return spoilt(lambda m: setattr(m, "sha256", hashlib.sha256(b"something else").digest()))


def not_finite(value: float) -> Bad:
    array = ONES.copy()
    array[7, 99] = value
    return spoilt(lambda m: None, {"context": array})


def with_metrics(metrics: dict[str, float]) -> Bad:
    described, data = manifest("evil", {"context": ONES * 666})
    return success("", described, metrics=metrics), data


def without_examples() -> Bad:
    described, data = manifest("evil", {"context": ONES * 666})
    return success("", described, examples=0), data


def with_base(digest: bytes) -> Bad:
    result, data = spoilt(lambda m: None)
    result.success.received_sha256 = digest
    return result, data


EVIL: dict[str, tuple[Callable[[], Bad], str]] = {
    "another name": (
        lambda: spoilt(lambda m: None, {"contexts": ONES * 666}),
        "tensor 'contexts' is not a shared tensor of this task; expected are ['context']",
    ),
    "a private name": (
        lambda: spoilt(lambda m: None, {"context": ONES * 666, "own": ONES[0]}),
        "tensor 'own' is not a shared tensor of this task; expected are ['context']",
    ),
    "a name missing": (lambda: (success("", None), b""), "tensor 'context' is missing"),
    "another shape of equal size": (
        lambda: spoilt(lambda m: None, {"context": 666 * ONES.reshape(512, 16)}),
        "tensor 'context' has shape (512, 16); declared is (16, 512)",
    ),
    "a shape of many exabytes": (
        lambda: (
            success(
                "",
                tensor_pb.PayloadManifest(
                    payload_id="evil",
                    tensors=[tensor_pb.TensorHeader(name="context", element_type=1, shape=[2**31, 2**26])],
                    byte_count=2**59,
                    sha256=bytes(32),
                ),
            ),
            b"",
        ),
        "tensor 'context' has shape (2147483648, 67108864); declared is (16, 512)",
    ),
    "another type": (
        lambda: spoilt(
            lambda m: setattr(m.tensors[0], "element_type", tensor_pb.ELEMENT_TYPE_INT64),
            {"context": np.ones((16, 512), np.int64)},
        ),
        "tensor 'context' has type INT64; declared is FLOAT32",
    ),
    "an unknown type": (
        lambda: spoilt(lambda m: setattr(m.tensors[0], "element_type", 77)),
        "ElementType number 77 is not known to this version",
    ),
    "another digest": (wrong_digest, "the digest of a payload differs from its manifest"),
    "a NaN": (lambda: not_finite(np.nan), "tensor 'context' has values that are not finite"),
    "an infinity": (lambda: not_finite(-np.inf), "tensor 'context' has values that are not finite"),
    "one byte too many announced": (
        lambda: spoilt(lambda m: setattr(m, "byte_count", m.byte_count + 1)),
        "a manifest announces 32769 bytes, but its tensors take 32768",
    ),
    "a tensor named twice": (
        lambda: spoilt(lambda m: m.tensors.append(m.tensors[0])),
        "a manifest names a tensor twice",
    ),
    "a digest of 31 bytes": (lambda: spoilt(lambda m: setattr(m, "sha256", bytes(31))), "expected are 32"),
    "no examples": (without_examples, "the result counts no examples"),
    "a metric that is not finite": (lambda: with_metrics({"loss": float("nan")}), "metric 'loss' is not finite"),
    "a metric without a name": (lambda: with_metrics({"": 1.0}), "a metric name has 0 characters"),
    "300 metrics": (
        lambda: with_metrics({f"metric-{index}": 1.0 for index in range(300)}),
        "a result has 300 metrics; allowed are 256",
    ),
    "work from other tensors": (
        lambda: with_base(bytes(32)),
        "the result was computed from other shared tensors than those of this round",
    ),
    "a base digest of 31 bytes": (lambda: with_base(bytes(31)), "a digest has 31 bytes; a SHA-256 digest has 32"),
    "no outcome": (lambda: (task_pb.TaskResult(), b""), "a task result holds no outcome"),
}


@pytest.mark.parametrize("kind", EVIL)
async def test_01_a_bad_result_is_invalid_and_the_session_lives_on(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "a private name":
        declared = PromptFL.tensors
        own = TensorSpec("own", (512,), Scope.PRIVATE, Normal())
        monkeypatch.setattr(PromptFL, "tensors", lambda method, dims: (*declared(method, dims), own))
    make, complaint = EVIL[kind]
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker())
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await Watch(federation).until(connected("north"))
        await federation.create("attacked", make_spec(2, ("north", "south"), min_results=1))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        result, data = make()
        result.task_id = offer.task_id
        await raw.result(result, data)
        ack = await raw.next("result_ack")
        assert (ack.task_id, ack.verdict) == (offer.task_id, INVALID)
        assert complaint in ack.message
        assert await raw.work_honestly() == "attacked/2/train/south"  # the same session goes on
        await raw.work_honestly()
        experiment, rounds = await federation.finish("attacked")
        shared = (await federation.export("attacked"))["context"]
    assert experiment.state == State.STATE_SUCCEEDED
    assert [contributors(r) for r in rounds[:2]] == [["north"], ["north", "south"]]
    assert complaint in absences(rounds[0])["south"]
    assert hashlib.sha256(data).hexdigest() not in stored_digests(federation)
    assert np.abs(shared).max() < 4  # the initial context and two ones


async def attack_session(federation: Federation, raw: RawSilo) -> task_pb.TaskOffer:
    federation.start_coordinator()
    federation.start_silo("north", FakeWorker())
    await raw.__aenter__()
    await raw.hello()
    await Watch(federation).until(connected("north"))
    await federation.create("attacked", make_spec(1, ("north", "south"), min_results=1, time_limit=1.0))
    offer = await raw.next("task_offer")
    await raw.accept(offer)
    return offer


async def test_02_one_byte_more_than_announced_ends_the_session_and_nothing_else(federation: Federation) -> None:
    raw = RawSilo(federation.port, federation.directory / "certs/silos/south")
    offer = await attack_session(federation, raw)
    described, data = manifest("evil", {"context": ONES * 666})
    await raw.result(success(offer.task_id, described), data + b"!")
    code, details = await raw.status()
    await raw.__aexit__()
    assert code.name == "INVALID_ARGUMENT"
    assert "payload 'evil'" in details
    assert "at most 32768" in details
    first = (await Watch(federation).until(closed(1))).round_closed
    assert contributors(first) == ["north"]
    assert absences(first) == {"south": "no result within the time limit; not connected"}
    assert hashlib.sha256(data).hexdigest() not in stored_digests(federation)
    assert (await federation.finish("attacked"))[0].state == State.STATE_SUCCEEDED


@pytest.mark.parametrize("sent", [0, 1, 32767])
async def test_03_a_payload_that_never_completes_ends_with_the_round(federation: Federation, sent: int) -> None:
    raw = RawSilo(federation.port, federation.directory / "certs/silos/south")
    offer = await attack_session(federation, raw)
    described, data = manifest("evil", {"context": ONES * 666})
    await raw.result(success(offer.task_id, described), data[:sent])
    first = (await Watch(federation).until(closed(1))).round_closed
    assert contributors(first) == ["north"]
    assert absences(first) == {"south": "no result within the time limit"}
    await raw.chunk("evil", sent, data[sent:])  # too late
    ack = await raw.next("result_ack")
    assert (ack.verdict, ack.message) == (task_pb.RESULT_VERDICT_LATE, "no result within the time limit")
    await raw.__aexit__()
    assert hashlib.sha256(data).hexdigest() not in stored_digests(federation)
    assert (await federation.finish("attacked"))[0].state == State.STATE_SUCCEEDED


async def test_04_chunks_in_the_wrong_order_end_the_session(federation: Federation) -> None:
    raw = RawSilo(federation.port, federation.directory / "certs/silos/south")
    offer = await attack_session(federation, raw)
    described, data = manifest("evil", {"context": ONES * 666})
    await raw.result(success(offer.task_id, described))
    await raw.chunk("evil", 16384, data[16384:])
    code, details = await raw.status()
    await raw.__aexit__()
    assert code.name == "INVALID_ARGUMENT"
    assert "expected is byte 0" in details
    assert (await federation.finish("attacked"))[0].state == State.STATE_SUCCEEDED


async def test_05_more_than_the_coordinator_allows_is_refused_before_a_byte_has_come(federation: Federation) -> None:
    large = make_spec(1, ("south",), hyperparameters='{"context_length": 64}', retries=0)
    coordinator = federation.start_coordinator()
    await federation.create("large", large)
    await coordinator.stop()
    federation.start_coordinator("limits: {max_payload: 64KiB}\n")  # its operator has become mean
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        described, _ = manifest(offer.task_id, {"context": np.ones((64, 512), np.float32)})
        await raw.result(success(offer.task_id, described))
        ack = await raw.next("result_ack")
    assert ack.verdict == INVALID
    assert ack.message == "the payload has 131072 bytes; limits.max_payload of the coordinator allows 65536"
    experiment, _ = await federation.finish("large")
    assert experiment.state == State.STATE_FAILED
    assert ack.message in experiment.status_message
    with pytest.raises(grpc.aio.AioRpcError, match=r"take 131072 bytes; limits\.max_payload") as refused:
        await federation.create("large-too", large)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_06_another_silos_task_and_a_task_of_nobody_are_unknown(federation: Federation) -> None:
    worker = FakeWorker()
    federation.start_coordinator()
    federation.start_silo("north", worker)
    await Watch(federation).until(connected("north"))
    await federation.create("private", make_spec(1, ("north",)))
    await federation.finish("private")
    stolen = [worker.orders[0].task_id, "nobody/1/train/south", "private/1/train/south"]
    described, data = manifest("evil", {"context": ONES * 666})
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        welcome = await raw.hello(dict.fromkeys(stolen, FINISHED))
        assert list(welcome.obsolete_task_ids) == []
        for task_id in stolen:
            await raw.result(success(task_id, described), data)
            ack = await raw.next("result_ack")
            assert (ack.task_id, ack.verdict) == (task_id, UNKNOWN)
            assert ack.message == "no such task was offered to this silo"
    assert hashlib.sha256(data).hexdigest() not in stored_digests(federation)


async def test_07_another_silos_open_task_cannot_be_answered_refused_or_reported(federation: Federation) -> None:
    raw_north = RawSilo(federation.port, federation.directory / "certs/silos/north")
    federation.start_coordinator()
    async with raw_north as north, RawSilo(federation.port, federation.directory / "certs/silos/south") as south:
        await north.hello()
        await federation.create("coveted", make_spec(1, ("north",)))
        offer = await north.next("task_offer")
        welcome = await south.hello({offer.task_id: FINISHED})
        assert list(welcome.obsolete_task_ids) == []
        described, data = manifest("evil", {"context": ONES * 666})
        await south.result(success(offer.task_id, described), data)
        assert (await south.next("result_ack")).verdict == UNKNOWN
        north.kept.append(session_pb.OpenSessionResponse(task_offer=offer))
        await north.work_honestly()
        await north.work_honestly()
        experiment, rounds = await federation.finish("coveted")
    assert experiment.state == State.STATE_SUCCEEDED
    assert contributors(rounds[0]) == ["north"]


async def test_08_a_metric_too_large_to_average_does_not_poison_the_event_stream(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await federation.create("poisoned", make_spec(1, ("south",)))
        offer = await raw.next("task_offer")
        await raw.accept(offer)
        described, data = manifest(offer.task_id, {"context": ONES})
        await raw.result(success(offer.task_id, described, metrics={"loss": 1.7e308}), data)
        assert (await raw.next("result_ack")).verdict == task_pb.RESULT_VERDICT_ACCEPTED
        await raw.work_honestly()
        experiment, rounds = await federation.finish("poisoned")
    assert experiment.state == State.STATE_SUCCEEDED
    assert contributors(rounds[0]) == ["south"]
    assert np.isfinite(list(rounds[0].metrics.values())).all()


async def test_09_an_example_count_that_no_database_holds_is_handled(federation: Federation) -> None:
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello()
        await federation.create("countless", make_spec(1, ("south",)))
        await raw.work_honestly(examples=2**64 - 1)
        await raw.work_honestly(examples=2**64 - 1)
        experiment, rounds = await federation.finish("countless")
    assert experiment.state == State.STATE_SUCCEEDED
    assert rounds[0].contributions[0].example_count == 2**64 - 1


async def test_10_many_payloads_announced_and_never_sent_are_bounded(federation: Federation) -> None:
    held = {f"ghost-{index}": FINISHED for index in range(65)}
    federation.start_coordinator()
    async with RawSilo(federation.port, federation.directory / "certs/silos/south") as raw:
        await raw.hello(held)
        for task_id in held:
            described, _ = manifest(task_id, {"context": ONES})
            await raw.result(success(task_id, described))
        code, details = await raw.status()
    assert code.name == "INVALID_ARGUMENT"
    assert "more than 64 payloads are open" in details
