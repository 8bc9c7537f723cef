"""Plays one side of recorded sessions to the living other side, and compares what that says with what was recorded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import experiment_pb2
from fedrt.v1 import session_service_pb2 as session_pb
from tests.fakes.federation import Federation
from tests.fakes.raw_silo import RawSilo
from tests.fakes.recording import LIMIT, HeldWorker, Step, comparable, digest, is_advisory


@dataclass
class RecordedSilo:
    """Says to a living coordinator what the silo said, byte for byte."""

    federation: Federation
    name: str = "north"
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)  # experiment -> state, digest
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)
    welcomes: list[session_pb.Welcome] = field(default_factory=list)

    async def play(self, steps: list[Step]) -> None:
        async with contextlib.AsyncExitStack() as sessions:
            for step in steps:
                match step.what:
                    case "open":
                        identity = self.federation.directory / "certs/silos" / self.name
                        raw = await sessions.enter_async_context(RawSilo(self.federation.port, identity))
                    case "cut":
                        await sessions.aclose()
                    case "silo":
                        await raw.write(step.data)
                    case "coordinator":
                        await self._hear(raw, step)
                    case "create" | "cancel" | "outcome":
                        await self._operate(step)

    async def _hear(self, raw: RawSilo, step: Step) -> None:
        if is_advisory(step.message):
            return
        async with asyncio.timeout(LIMIT):
            heard = await raw.frames.get()
        assert heard is not None, f"the session ended ({await raw.status()}) instead of {step.kind}"
        assert comparable(heard) == comparable(step.message)
        if heard.HasField("welcome"):
            self.welcomes.append(heard.welcome)

    async def _operate(self, step: Step) -> None:
        name = step.words[0]
        if step.what == "outcome":
            experiment, _ = await self.federation.finish(name, LIMIT)
            tensors = {} if step.words[2] == "-" else await self.federation.export(name)
            self.outcomes[name] = (experiment_pb2.Experiment.State.Name(experiment.state), digest(tensors))
            self.expected[name] = (step.words[1], step.words[2])
            return
        async with self.federation.admin() as stub:
            if step.what == "cancel":
                await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id=name))
            else:
                spec = experiment_pb2.ExperimentSpec.FromString(step.data)
                await stub.CreateExperiment(pb.CreateExperimentRequest(experiment_id=name, spec=spec))


@dataclass
class Dialled:
    """A session that a silo has opened; the player reads and writes, the handler only keeps it alive."""

    context: Any
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> Any:
        """The next frame that is not advisory; None if the silo has ended the session."""
        async with asyncio.timeout(LIMIT):
            while (data := await self.context.read()) is not grpc.aio.EOF:
                message = session_pb.OpenSessionRequest.FromString(data)
                if not is_advisory(message):
                    return message
        return None

    async def say(self, **frame: Any) -> None:
        await self.context.write(session_pb.OpenSessionResponse(**frame).SerializeToString())


@dataclass
class RecordedCoordinator:
    """Says to a living silo what the coordinator said, byte for byte. `started`, then `play`."""

    federation: Federation
    worker: HeldWorker
    hellos: list[session_pb.Hello] = field(default_factory=list)
    _dialled: asyncio.Queue[Dialled] = field(default_factory=asyncio.Queue)

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator["RecordedCoordinator"]:
        server = grpc.aio.server(options=GRPC_OPTIONS)
        handlers = {"OpenSession": grpc.stream_stream_rpc_method_handler(self._session)}  # bytes stay bytes
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedrt.v1.SessionService", handlers),))
        directory = self.federation.directory / "certs/coordinator"
        key, certificate, trust = [
            (directory / name).read_bytes() for name in ("key.pem", "certificate.pem", "trust.pem")
        ]
        served = grpc.ssl_server_credentials([(key, certificate)], trust, require_client_auth=True)
        server.add_secure_port(f"127.0.0.1:{self.federation.port}", served)
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)

    async def _session(self, requests: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        dialled = Dialled(context)
        self._dialled.put_nowait(dialled)
        await dialled.ended.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is cut")

    async def dialled(self) -> Dialled:
        """The next session of the silo, from Hello on."""
        async with asyncio.timeout(LIMIT):
            return await self._dialled.get()

    async def play(self, steps: list[Step]) -> None:
        """`stop` has no effect here: the caller stops the daemon when `play` has come to it."""
        session: Dialled | None = None
        is_introduced = False
        for step in steps:
            match step.what:
                case "open":
                    is_introduced = False
                case "silo" if not is_introduced:
                    session, is_introduced = await self._introduced(step), True
                case "silo" if not is_advisory(step.message):
                    heard = await session.read()
                    assert heard is not None, f"the silo ended the session instead of {step.kind}"
                    assert comparable(heard) == comparable(step.message)
                case "coordinator":
                    await session.context.write(step.data)
                case "cut":
                    session.ended.set()
                case "release":
                    self.worker.release(step.words[0])
                case "stop":
                    self.federation.running[next(iter(self.federation.running))].lifecycle.stopping.set()

    async def _introduced(self, step: Step) -> Dialled:
        """The session that begins as recorded; a silo that is not so far yet has to dial again."""
        async with asyncio.timeout(LIMIT):
            while True:
                session = await self.dialled()
                heard = await session.read()
                if comparable(heard) == comparable(step.message):
                    self.hellos.append(heard.hello)
                    return session
                session.ended.set()
