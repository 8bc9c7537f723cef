"""Asks a coordinator on behalf of an operator: over its Unix socket, or over mutual TLS with an operator's certificate.

Whatever goes wrong becomes a `FedrtError` whose message names the thing and the next step. Experiments, silos and
events are the messages of `admin_service.proto`, whose comments explain their fields.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fedrt.certificates import Expectation
from fedrt.errors import ExitCode, FedrtError, IdentityError, PayloadError, RemoteProtocolError, SpecError
from fedrt.identity import Role
from fedrt.payload import Assembler
from fedrt.spec import ExperimentSpec
from fedrt.tensors import Array
from fedrt.tls import IdentityFiles, channel_credentials, explain_handshake_failure, utc_now
from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import admin_service_pb2_grpc
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import chunk_from_pb, experiment_spec_to_pb, manifest_from_pb

ANSWER_LIMIT = 30.0  # seconds a coordinator may take for an answer, or for the next piece of one
PAGE_SIZE = 500
_T = TypeVar("_T")


class UnreachableError(FedrtError):
    """No coordinator answers; later it may."""

    exit_code = ExitCode.TEMPORARY


class RequestError(FedrtError):
    """The coordinator answered that it cannot do what was asked."""


@dataclass(frozen=True)
class LocalSocket:
    """The coordinator's Unix socket on this machine."""

    path: Path

    def __str__(self) -> str:
        return f"socket '{self.path}'"


@dataclass(frozen=True)
class RemoteListener:
    """The coordinator's admin address, and where the operator's key and certificate lie."""

    address: str
    identity_directory: Path

    def __str__(self) -> str:
        return f"address '{self.address}'"


Target = LocalSocket | RemoteListener


@dataclass(frozen=True)
class Export:
    """What an experiment had learned after a round."""

    experiment: experiment_pb.Experiment
    round_number: int
    tensors: Mapping[str, Array]


class AdminClient:
    """Calls of `AdminService`. Made by `connect`; each method raises `FedrtError`."""

    def __init__(self, channel: grpc.aio.Channel, target: Target) -> None:
        self._stub: Any = admin_service_pb2_grpc.AdminServiceStub(channel)
        self._target = target

    async def create(self, experiment_id: str, spec: ExperimentSpec) -> experiment_pb.Experiment:
        """Create an experiment; one that exists with the same specification is returned as it is."""
        request = pb.CreateExperimentRequest(experiment_id=experiment_id, spec=experiment_spec_to_pb(spec))
        response: pb.CreateExperimentResponse = await self._call(self._stub.CreateExperiment, request)
        return response.experiment

    async def get(self, experiment_id: str) -> experiment_pb.Experiment:
        """One experiment."""
        request = pb.GetExperimentRequest(experiment_id=experiment_id)
        response: pb.GetExperimentResponse = await self._call(self._stub.GetExperiment, request)
        return response.experiment

    async def list_all(self) -> list[experiment_pb.Experiment]:
        """All experiments, newest first."""
        pages = self._pages(self._stub.ListExperiments, pb.ListExperimentsRequest)
        return [experiment async for page in pages for experiment in page.experiments]

    async def cancel(self, experiment_id: str) -> experiment_pb.Experiment:
        """End an experiment; one that has ended stays as it is."""
        request = pb.CancelExperimentRequest(experiment_id=experiment_id)
        response: pb.CancelExperimentResponse = await self._call(self._stub.CancelExperiment, request)
        return response.experiment

    async def silos(self) -> list[experiment_pb.Silo]:
        """All silos that the coordinator has met, by name."""
        return [silo async for page in self._pages(self._stub.ListSilos, pb.ListSilosRequest) for silo in page.silos]

    async def watch(self, experiment_id: str = "", after: int = 0) -> AsyncIterator[pb.Event]:
        """Events after a number, oldest first, then live ones; of one experiment unless the id is empty. Never ends."""
        call = self._stub.WatchEvents(pb.WatchEventsRequest(experiment_id=experiment_id, after_event_number=after))
        try:
            while (response := await self._read(call)) is not grpc.aio.EOF:
                yield response.event
        finally:
            call.cancel()
        raise UnreachableError(f"the coordinator at {self._target} ended the stream of events; it may be stopping")

    async def history(self, experiment: experiment_pb.Experiment) -> list[pb.Event]:
        """The events that led an experiment to where it stands in the given answer; later ones are left out.

        The stream has no mark where the past ends. It has ended with an event that lies beyond the answer. While none
        comes, a small request is sent after the last event: the coordinator serves it from its store in turn, behind
        the stream's own reading, so its answer means that nothing more was stored.
        """
        past = _Past(experiment)
        call = self._stub.WatchEvents(pb.WatchEventsRequest(experiment_id=experiment.experiment_id))
        reading = asyncio.ensure_future(self._read(call))
        asking: asyncio.Future[Any] | None = None
        try:
            while not past.is_complete:
                if past.has_arrived and asking is None:
                    request = pb.ListExperimentsRequest(page_size=1)
                    asking = asyncio.ensure_future(self._call(self._stub.ListExperiments, request))
                awaited = {reading} if asking is None else {reading, asking}
                await asyncio.wait(awaited, timeout=ANSWER_LIMIT, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    if asking is not None and asking.done():
                        asking.result()
                    break
                response = reading.result()
                if response is grpc.aio.EOF:
                    break
                past.add(response.event)
                reading = asyncio.ensure_future(self._read(call))
                if asking is not None and not past.has_arrived:
                    await _cancelled(asking)
                    asking = None
            return past.events
        finally:
            for future in (reading, asking):
                if future is not None:
                    await _cancelled(future)
            call.cancel()

    async def export(self, experiment_id: str) -> Export:
        """The shared tensors of the last finished round, checked against their digest."""
        call = self._stub.ExportExperiment(pb.ExportExperimentRequest(experiment_id=experiment_id))
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                first = await self._read(call)
            if first is grpc.aio.EOF or first.WhichOneof("part") != "header":
                raise RemoteProtocolError(
                    "an export does not begin with its header; update fedrtctl or the coordinator"
                )
            header = first.header
            assembler = Assembler(manifest_from_pb(header.shared_tensors))
            complete = False
            while not complete:
                async with asyncio.timeout(ANSWER_LIMIT):
                    part = await self._read(call)
                if part is grpc.aio.EOF:
                    raise PayloadError("the export ended before all of its bytes arrived; run the command again")
                complete = assembler.add(chunk_from_pb(part.chunk))
            return Export(header.experiment, header.round_number, assembler.tensors())
        except TimeoutError:
            raise _silent(self._target) from None
        finally:
            call.cancel()

    async def _pages(self, method: Callable[..., Any], request: Callable[..., Any]) -> AsyncIterator[Any]:
        """The answers to a request that asks for pages, one after the other."""
        token = ""
        while True:
            page = await self._call(method, request(page_size=PAGE_SIZE, page_token=token))
            yield page
            token = page.next_page_token
            if not token:
                return

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, timeout=ANSWER_LIMIT)
        except grpc.aio.AioRpcError as error:
            raise await asyncio.to_thread(_explained, error, self._target) from None

    async def _read(self, call: Any) -> Any:
        try:
            return await call.read()
        except grpc.aio.AioRpcError as error:
            raise await asyncio.to_thread(_explained, error, self._target) from None


@contextlib.asynccontextmanager
async def connect(target: Target) -> AsyncIterator[AdminClient]:
    """Give a client; nothing is dialled before its first call. Raises `IdentityError` for unfit files."""
    options = [*GRPC_OPTIONS, ("grpc.enable_retries", 0)]
    match target:
        case LocalSocket(path):
            channel = grpc.aio.insecure_channel(f"unix:{path.absolute()}", options)
        case RemoteListener(address, directory):
            credentials = channel_credentials(IdentityFiles(directory), Expectation(Role.OPERATOR))
            channel = grpc.aio.secure_channel(address, credentials, options)
    async with channel:
        yield AdminClient(channel, target)


def explain_socket(path: Path, error: OSError | None) -> str:
    """What to do about a Unix socket that cannot be connected to; `error` is what connecting raised."""
    match error:
        case FileNotFoundError():
            return (
                f"socket '{path}' does not exist; is the coordinator running? If so, give the admin_socket of its "
                "coordinator.yaml with --socket"
            )
        case PermissionError():
            return f"socket '{path}' is not open to this user; run the command as the user of the coordinator"
        case ConnectionRefusedError():
            return f"nobody listens at socket '{path}'; the coordinator has stopped: start it, or see why in its log"
        case None:
            return f"the coordinator at socket '{path}' broke off; it may be stopping: try again, or see its log"
        case _:
            return f"socket '{path}' cannot be used ({error.strerror or error}); check the path"


def _explained(error: grpc.aio.AioRpcError, target: Target) -> FedrtError:
    code, details = error.code(), error.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # the latter of a coordinator that just stops
            return _unreachable(details, target)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return _silent(target)
        case grpc.StatusCode.PERMISSION_DENIED | grpc.StatusCode.UNAUTHENTICATED:
            return IdentityError(f"the coordinator at {target} refused us: {details}")
        case grpc.StatusCode.INVALID_ARGUMENT:
            return SpecError(details)
        case grpc.StatusCode.NOT_FOUND | grpc.StatusCode.ALREADY_EXISTS | grpc.StatusCode.FAILED_PRECONDITION:
            return RequestError(details)
        case grpc.StatusCode.UNIMPLEMENTED:
            return RequestError(f"the coordinator at {target} does not know this request; update it, or fedrtctl")
        case _:
            return RequestError(f"the coordinator at {target} answered {code.name}: {details}; its log may say why")


def _unreachable(details: str, target: Target) -> FedrtError:
    match target:
        case LocalSocket(path):
            return UnreachableError(explain_socket(path, _socket_error(path)))
        case RemoteListener(address, directory):
            why = explain_handshake_failure(IdentityFiles(directory), details, utc_now())
            return UnreachableError(f"cannot reach the coordinator at '{address}': {why}")


def _silent(target: Target) -> UnreachableError:
    return UnreachableError(f"the coordinator at {target} has not answered for {ANSWER_LIMIT:.0f} seconds; see its log")


def _socket_error(path: Path) -> OSError | None:
    """What the system says about connecting; grpc's details leave it out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path.absolute()))
        except OSError as error:
            return error
    return None


class _Past:
    """Collects events up to where an experiment stands: state, round and kind of work, which never go back.

    The attempts of a round that is tried again share that place, so more may follow the event that arrives there.
    """

    def __init__(self, experiment: experiment_pb.Experiment) -> None:
        self._end = _place(experiment)
        self._has_ended = experiment.state >= experiment_pb.Experiment.STATE_SUCCEEDED
        self._closed: list[pb.Event] = []  # counts once it is known where the experiment went from there
        self.events: list[pb.Event] = []
        self.has_arrived = False
        self.is_complete = False

    def add(self, event: pb.Event) -> None:
        """Take the next event."""
        if event.WhichOneof("kind") != "experiment_changed":
            self._closed.append(event)
            self.has_arrived = False
            return
        place = _place(event.experiment_changed.experiment)
        if place > self._end:
            self.is_complete = True
            return
        self.events += [*self._closed, event]
        self._closed = []
        self.has_arrived = place == self._end
        self.is_complete = self.has_arrived and self._has_ended


def _place(experiment: experiment_pb.Experiment) -> tuple[int, int, int]:
    state = min(experiment.state, experiment_pb.Experiment.STATE_SUCCEEDED)  # all ends are one place
    return state, experiment.round_number, experiment.current_task_kind


async def _cancelled(future: "asyncio.Future[Any]") -> None:
    future.cancel()
    await asyncio.gather(future, return_exceptions=True)
