"""The client of AdminService against a real coordinator, and against one that answers wrongly."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from certs.throwaway import Plan, prepare
from fedrt import admin_client
from fedrt.admin_client import (
    AdminClient,
    LocalSocket,
    RemoteListener,
    RequestError,
    UnreachableError,
    connect,
    explain_socket,
)
from fedrt.errors import FedrtError, IdentityError, PayloadError, RemoteProtocolError, SpecError
from fedrt.payload import chunks, describe
from fedrt.tls import IdentityFiles, channel_credentials
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import admin_service_pb2_grpc
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.v1 import task_pb2 as task_pb
from fedrt.wire_values import chunk_to_pb, manifest_to_pb
from tests.fakes.federation import Federation, free_port, make_spec
from tests.fakes.workers import FakeWorker

SUCCEEDED = experiment_pb.Experiment.STATE_SUCCEEDED


@pytest.fixture
async def federation(tmp_path: Path) -> AsyncIterator[Federation]:
    async with Federation(tmp_path / "f").started({"north": FakeWorker()}) as running:
        yield running


def local(federation: Federation) -> LocalSocket:
    return LocalSocket(federation.directory / "admin.sock")


async def ready(target: LocalSocket) -> None:
    async with asyncio.timeout(10):
        while not target.path.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def client_of(federation: Federation) -> AsyncIterator[AdminClient]:
    await ready(local(federation))
    async with connect(local(federation)) as client:
        yield client


async def ended(client: AdminClient, name: str) -> experiment_pb.Experiment:
    async with asyncio.timeout(20), contextlib.aclosing(client.watch(name)) as events:
        async for event in events:
            if event.HasField("experiment_changed") and event.experiment_changed.experiment.state >= SUCCEEDED:
                return await client.get(name)
    raise AssertionError


async def test_an_experiment_from_creation_to_export(federation: Federation) -> None:
    async with client_of(federation) as client:
        created = await client.create("e1", make_spec(rounds=2, silos=("north",)))
        assert created.experiment_id == "e1"
        assert (await client.create("e1", make_spec(rounds=2, silos=("north",)))).create_time == created.create_time
        assert (await ended(client, "e1")).state == SUCCEEDED
        events = await client.history(await client.get("e1"))
        rounds = [event.round_closed for event in events if event.HasField("round_closed")]
        assert [closed.round_number for closed in rounds] == [1, 2, 2]
        export = await client.export("e1")
        assert (export.experiment.experiment_id, export.round_number) == ("e1", 2)
        (context,) = export.tensors.values()
        assert context.shape == (16, 512)
        assert abs(float(np.mean(context)) - 2.0) < 0.01  # two rounds of plus one on small noise


async def test_events_are_taken_up_after_a_number(federation: Federation) -> None:
    async with client_of(federation) as client:
        await client.create("e1", make_spec(rounds=1, silos=("north",)))
        events = await client.history(await ended(client, "e1"))
        async with contextlib.aclosing(client.watch("e1", after=events[1].event_number)) as rest:
            assert (await anext(rest)).event_number == events[2].event_number


State = experiment_pb.Experiment


def changed(state: int, round_number: int, message: str = "") -> pb.Event:
    experiment = experiment_pb.Experiment(
        experiment_id="e1",
        state=state,  # type: ignore[arg-type]
        round_number=round_number,
        current_task_kind=task_pb.TASK_KIND_TRAIN,
        status_message=message,
    )
    return pb.Event(experiment_changed=pb.ExperimentChanged(experiment=experiment))


def closed(round_number: int, succeeded: bool = True) -> pb.Event:
    return pb.Event(round_closed=pb.RoundClosed(round_number=round_number, succeeded=succeeded))


class TellingCoordinator(admin_service_pb2_grpc.AdminServiceServicer):
    """Has stored these events, and then tells the same ones again and again, at once or 20 ms apart, or nothing."""

    def __init__(self, stored: list[pb.Event], then: list[pb.Event], pause: float = 0.02) -> None:
        self.stored, self.then, self.pause = stored, then, pause

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[pb.WatchEventsResponse]:
        for event in self.stored:
            yield pb.WatchEventsResponse(event=event)
        while self.then:
            for event in self.then:
                await asyncio.sleep(self.pause)
                yield pb.WatchEventsResponse(event=event)
        await asyncio.sleep(60)

    async def ListExperiments(self, request: Any, context: Any) -> pb.ListExperimentsResponse:
        return pb.ListExperimentsResponse()


BEGUN = [changed(State.STATE_PENDING, 1), changed(State.STATE_RUNNING, 1)]
IN_ROUND_2 = [*BEGUN, closed(1), changed(State.STATE_RUNNING, 2)]
RETRIED = [closed(2, False), changed(State.STATE_RUNNING, 2), closed(2, False), changed(State.STATE_RUNNING, 2)]
NEXT_ROUND = [closed(2), changed(State.STATE_RUNNING, 3)]
LATER = [closed(9), changed(State.STATE_RUNNING, 10)]
WAITING = [changed(State.STATE_RUNNING, 2, "waiting for north"), changed(State.STATE_RUNNING, 2, "waiting for south")]
ENDED = [closed(2), changed(State.STATE_SUCCEEDED, 2)]


@pytest.mark.parametrize("pause", [0.02, 0.0])
@pytest.mark.parametrize(
    ("stored", "then", "expected"),
    [
        (IN_ROUND_2, [], IN_ROUND_2),
        ([*IN_ROUND_2, *RETRIED], [], [*IN_ROUND_2, *RETRIED]),
        ([*IN_ROUND_2, *NEXT_ROUND], [], IN_ROUND_2),  # what came after the answer is left out
        (IN_ROUND_2, LATER, IN_ROUND_2),
        ([*IN_ROUND_2, *RETRIED], LATER, [*IN_ROUND_2, *RETRIED]),
        (IN_ROUND_2, WAITING, IN_ROUND_2),
        ([*IN_ROUND_2, *ENDED], [], IN_ROUND_2),
    ],
    ids=["quiet", "retried", "next round", "rounds rush by", "retried and rush by", "silos come and go", "ended"],
)
async def test_the_past_ends_where_the_experiment_stands(
    tmp_path: Path, stored: list[pb.Event], then: list[pb.Event], expected: list[pb.Event], pause: float
) -> None:
    experiment = IN_ROUND_2[-1].experiment_changed.experiment
    async with serving(tmp_path / "s", TellingCoordinator(stored, then, pause)) as client:
        await client.list_all()  # connect
        began = time.monotonic()
        async with asyncio.timeout(5):
            events = await client.history(experiment)
        took = time.monotonic() - began
    assert events[: len(expected)] == expected
    assert all(event in WAITING for event in events[len(expected) :])  # it stood there meanwhile as well
    assert took < 0.25  # no pause; on a busy machine the round trips take a while


async def test_the_past_of_an_experiment_that_has_ended_needs_no_second_request(tmp_path: Path) -> None:
    stored = [*IN_ROUND_2, *ENDED]
    coordinator = TellingCoordinator(stored, [])
    async with serving(tmp_path / "s", coordinator) as client:
        async with asyncio.timeout(5):
            assert await client.history(stored[-1].experiment_changed.experiment) == stored


async def test_the_past_of_an_experiment_while_its_rounds_rush_by(federation: Federation) -> None:
    async with client_of(federation) as client:
        await client.create("e1", make_spec(rounds=300, silos=("north",)))
        async with asyncio.timeout(20):
            while (experiment := await client.get("e1")).round_number < 20:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            events = await client.history(experiment)
        trained = [event.round_closed.round_number for event in events if event.HasField("round_closed")]
        assert max(trained) <= experiment.round_number
        assert set(range(1, experiment.round_number)) <= set(trained)
        await client.cancel("e1")


async def test_all_pages(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "PAGE_SIZE", 2)
    names = [f"e{number}" for number in range(5)]
    async with client_of(federation) as client:
        for name in names:
            await client.create(name, make_spec(silos=("absent",)))
        assert sorted(one.experiment_id for one in await client.list_all()) == names
        async with asyncio.timeout(10):
            while not [silo for silo in await client.silos() if silo.connected]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert [silo.silo_id for silo in await client.silos()] == ["north"]


async def test_what_the_coordinator_refuses(federation: Federation) -> None:
    async with client_of(federation) as client:
        for act in (client.get, client.cancel, client.export):
            with pytest.raises(RequestError, match=r"'nobody' does not exist; `fedrtctl list` shows"):
                await act("nobody")
        with pytest.raises(SpecError, match="'No Name' is not made of"):
            await client.create("No Name", make_spec())
        await client.create("e1", make_spec(silos=("absent",), method="zeroshot", rounds=0))
        with pytest.raises(RequestError, match="exists with another specification"):
            await client.create("e1", make_spec())
        with pytest.raises(RequestError, match="has no shared tensors yet"):
            await client.export("e1")
        assert (await client.cancel("e1")).state == experiment_pb.Experiment.STATE_CANCELLED


async def test_no_coordinator(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with connect(LocalSocket(path)) as client:
        with pytest.raises(UnreachableError, match=r"does not exist; is the coordinator running\?") as caught:
            await client.list_all()
        assert str(path) in str(caught.value)
        with pytest.raises(UnreachableError, match="does not exist"):
            await anext(client.watch())
        with pytest.raises(UnreachableError, match="does not exist"):
            await client.export("e1")


async def test_a_coordinator_that_has_stopped(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "f")
    async with federation.started({}), client_of(federation) as client:
        assert await client.list_all() == []
        await federation.stop()
        with pytest.raises(UnreachableError):
            await client.list_all()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(), "does not exist"),
        (PermissionError(), "as the user of the coordinator"),
        (ConnectionRefusedError(), "nobody listens"),
        (None, "broke off"),
        (OSError(36, "File name too long"), "File name too long"),
    ],
)
def test_socket_failures_name_the_socket_and_the_next_step(error: OSError | None, words: str) -> None:
    message = explain_socket(Path("/run/x.sock"), error)
    assert words in message
    assert "'/run/x.sock'" in message


async def test_over_tls_with_an_operators_certificate_only(tmp_path: Path) -> None:
    port = free_port()
    federation = Federation(tmp_path / "f")
    certs = federation.directory / "certs"
    listen = f"listen: {{session: '127.0.0.1:{federation.port}', admin: '127.0.0.1:{port}'}}"
    path = federation.coordinator_yaml()
    path.write_text("\n".join(listen if line.startswith("listen:") else line for line in path.read_text().splitlines()))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(federation, "coordinator_yaml", lambda extra="": path)
    async with federation.started({}):
        await ready(local(federation))
        address = f"localhost:{port}"
        async with connect(RemoteListener(address, certs / "operators" / "alice")) as client:
            assert await client.list_all() == []
        with pytest.raises(IdentityError, match="silo"):
            async with connect(RemoteListener(address, certs / "silos" / "north")):
                pass
        await _silo_certificate_is_refused(address, certs / "silos" / "north")
        await _foreign_operator_is_refused(address, tmp_path)


async def _silo_certificate_is_refused(address: str, directory: Path) -> None:
    """Also by the coordinator, should a client not look at its own certificate."""
    async with grpc.aio.secure_channel(address, channel_credentials(IdentityFiles(directory))) as channel:
        client = AdminClient(channel, RemoteListener(address, directory))
        for act in (client.list_all, client.silos, lambda: anext(client.watch()), lambda: client.export("e1")):
            with pytest.raises(IdentityError, match="refused us: silo 'north'"):
                await act()


async def _foreign_operator_is_refused(address: str, tmp_path: Path) -> None:
    prepare(tmp_path / "other", Plan("test", (), ("mallory",)), datetime.now(UTC))
    async with connect(RemoteListener(address, tmp_path / "other" / "operators" / "mallory")) as client:
        with pytest.raises(UnreachableError, match="is not from federation 'test', whose root is in"):
            await client.list_all()


async def test_nothing_listens_at_the_address(tmp_path: Path) -> None:
    prepare(tmp_path, Plan("test", (), ("alice",)), datetime.now(UTC))
    async with connect(RemoteListener(f"localhost:{free_port()}", tmp_path / "operators" / "alice")) as client:
        with pytest.raises(UnreachableError, match="connection refused"):
            await client.list_all()


class FalseCoordinator(admin_service_pb2_grpc.AdminServiceServicer):
    """Sends these parts as an export, never answers `ListSilos`, and stops while it cancels an experiment."""

    def __init__(self, parts: list[pb.ExportExperimentResponse]) -> None:
        self.parts = parts

    async def ExportExperiment(self, request: Any, context: Any) -> AsyncIterator[pb.ExportExperimentResponse]:
        for part in self.parts:
            yield part

    async def ListSilos(self, request: Any, context: Any) -> pb.ListSilosResponse:
        await asyncio.sleep(60)
        return pb.ListSilosResponse()

    async def GetExperiment(self, request: Any, context: Any) -> pb.GetExperimentResponse:
        raise ValueError("a bug")

    async def CancelExperiment(self, request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED)  # as a server does with what it is at when it stops


def false_coordinator(
    path: Path, parts: list[pb.ExportExperimentResponse]
) -> contextlib.AbstractAsyncContextManager[AdminClient]:
    return serving(path, FalseCoordinator(parts))


@contextlib.asynccontextmanager
async def serving(path: Path, service: admin_service_pb2_grpc.AdminServiceServicer) -> AsyncIterator[AdminClient]:
    server = grpc.aio.server()
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        async with connect(LocalSocket(path)) as client:
            yield client
    finally:
        await server.stop(0)


def export_parts(spoil: str) -> list[pb.ExportExperimentResponse]:
    manifest, data = describe("export", {"context": np.arange(4, dtype=np.float32)})
    header = pb.ExportHeader(shared_tensors=manifest_to_pb(manifest))
    spoilt = bytearray(data)
    if spoil == "digest":
        spoilt[3] ^= 1
    if spoil == "too long":
        spoilt += b"\0"
    parts = [pb.ExportExperimentResponse(chunk=chunk_to_pb(chunk)) for chunk in chunks("export", bytes(spoilt))]
    first = pb.ExportExperimentResponse(header=header)
    return {"no header": parts, "cut off": [first]}.get(spoil, [first, *parts])


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        ("digest", PayloadError, "digest"),
        ("too long", PayloadError, "more than the announced 16 bytes"),
        ("cut off", PayloadError, "before all of its bytes"),
        ("no header", RemoteProtocolError, "does not begin with its header"),
    ],
)
async def test_a_spoilt_export(tmp_path: Path, spoil: str, error: type[FedrtError], words: str) -> None:
    async with false_coordinator(tmp_path / "s", export_parts(spoil)) as client:
        with pytest.raises(error, match=words):
            await client.export("e1")


async def test_an_older_coordinator_and_one_with_a_bug(tmp_path: Path) -> None:
    async with false_coordinator(tmp_path / "s", []) as client:
        with pytest.raises(RequestError, match="does not know this request"):
            await client.list_all()
        with pytest.raises(RequestError, match="UNKNOWN"):
            await client.get("e1")


async def test_a_coordinator_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "ANSWER_LIMIT", 0.2)
    async with false_coordinator(tmp_path / "s", []) as client:
        with pytest.raises(UnreachableError, match="has not answered"):
            await client.silos()


async def test_a_coordinator_that_is_stopping(tmp_path: Path) -> None:
    async with false_coordinator(tmp_path / "s", []) as client:
        with pytest.raises(UnreachableError, match="broke off; it may be stopping"):
            await client.cancel("e1")
