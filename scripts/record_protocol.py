"""Records whole sessions of this version, as bytes, for the tests of later ones: tests/golden/protocol/VERSION.txt.

Run it at a release, with the code that is released: `.venv/bin/python scripts/record_protocol.py --label NAME`. A
federation on loopback runs a fixed story: an experiment with evaluations, a connection that is cut while a task runs
and again until it is finished, an offer that is refused, a task that is cancelled, a silo that drains. A relay between
silo and coordinator, which understands nothing, writes down what passes. Tests play either: tests/fakes/recorded.py.
"""

import argparse
import asyncio
import base64
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fedrt  # noqa: E402
from fedrt.spec import ExperimentSpec  # noqa: E402
from fedrt.transport import GRPC_OPTIONS  # noqa: E402
from fedrt.v1 import admin_service_pb2 as pb  # noqa: E402
from fedrt.v1 import experiment_pb2, session_service_pb2  # noqa: E402
from fedrt.wire_values import experiment_spec_to_pb  # noqa: E402
from tests.fakes import recording  # noqa: E402
from tests.fakes.federation import Federation, free_port  # noqa: E402
from tests.fakes.raw_silo import METHOD, credentials  # noqa: E402
from tests.fakes.recording import HeldWorker, Step  # noqa: E402
from tests.fakes.stores import small_spec  # noqa: E402

FINISHED = session_service_pb2.HeldTask.STATE_FINISHED
TRAINED, CANCELLED = "full/2/train/north", "unwanted/1/train/north"
IDLE = 2.5  # seconds in which both sides have nothing to say, so that heartbeats are recorded too


async def until(holds: Callable[[], bool]) -> None:
    """Wait until this holds; nobody tells us."""
    async with asyncio.timeout(recording.LIMIT):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@dataclass
class Relay:
    """A coordinator to the silo and the silo to the coordinator; holds both identities and copies bytes."""

    federation: Federation
    port: int = field(default_factory=free_port)
    steps: list[Step] = field(default_factory=list)
    is_open: bool = True
    wants_finished: bool = False  # a silo that does not hold a finished task has to dial again
    passes: asyncio.Event = field(default_factory=asyncio.Event)
    _cut: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Listen."""
        server = grpc.aio.server(options=GRPC_OPTIONS)
        handlers: dict[str, Any] = {"OpenSession": grpc.stream_stream_rpc_method_handler(self._session)}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("fedrt.v1.SessionService", handlers),)  # bytes stay bytes
        )
        directory = self.federation.directory / "certs" / "coordinator"
        parts = [(directory / name).read_bytes() for name in ("key.pem", "certificate.pem", "trust.pem")]
        served = grpc.ssl_server_credentials([(parts[0], parts[1])], parts[2], require_client_auth=True)
        server.add_secure_port(f"127.0.0.1:{self.port}", served)
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)

    def note(self, what: str, *words: str) -> None:
        """Write down something that is not a frame."""
        self.steps.append(Step(what, words))

    def cut(self) -> None:
        """Break the session and let none through."""
        self.is_open = False
        self.note("cut")
        self._cut.set()

    def mend(self, wants_finished: bool = False) -> None:
        """Let sessions through again."""
        self.is_open, self.wants_finished = True, wants_finished
        self._cut = asyncio.Event()
        self.passes.clear()

    async def _session(self, requests: Any, context: Any) -> None:
        await context.send_initial_metadata(())
        hello = await context.read()
        held = session_service_pb2.OpenSessionRequest.FromString(hello).hello.held_tasks
        if not self.is_open or (self.wants_finished and not any(task.state == FINISHED for task in held)):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is cut")
        identity = self.federation.directory / "certs" / "silos" / "north"
        address = f"localhost:{self.federation.port}"
        async with grpc.aio.secure_channel(address, credentials(identity), GRPC_OPTIONS) as channel:
            call: Any = channel.stream_stream(METHOD)()
            self.note("open")
            await self._copy("silo", hello, call)
            pumps = [
                asyncio.create_task(self._pump("silo", context, call)),
                asyncio.create_task(self._pump("coordinator", call, context)),
                asyncio.create_task(self._cut.wait()),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                call.cancel()
        if not self.is_open:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is cut")

    async def _pump(self, speaker: str, source: Any, target: Any) -> None:
        while (data := await source.read()) is not grpc.aio.EOF:
            await self._copy(speaker, data, target)
        if speaker == "silo":
            await target.done_writing()
            await asyncio.Event().wait()  # the coordinator has the last word

    async def _copy(self, speaker: str, data: bytes, target: Any) -> None:
        step = recording.frame_step(speaker, data)
        self.steps.append(step)
        await target.write(data)
        if step.kind == "welcome":
            self.passes.set()


@dataclass
class Story:
    """What the operators, the network and the worker do."""

    federation: Federation
    relay: Relay
    worker: HeldWorker
    recorded: list[Step] = field(default_factory=list)

    async def create(self, name: str, spec: ExperimentSpec) -> None:
        """As an operator does."""
        encoded = experiment_spec_to_pb(spec).SerializeToString(deterministic=True)
        self.relay.note("create", name, base64.b64encode(encoded).decode())
        await self.federation.create(name, spec)

    async def outcome(self, name: str) -> None:
        """Wait for the end and write down what became of it."""
        experiment, _ = await self.federation.finish(name)
        exported = await self.federation.export(name) if name == "full" else {}
        state = experiment_pb2.Experiment.State.Name(experiment.state)
        self.relay.note("outcome", name, state, recording.digest(exported))

    async def run(self) -> None:
        """The story. Silos dial as soon as they are started."""
        silo = self.federation.start_silo("north", self.worker)
        await self.relay.passes.wait()
        await self.create("full", small_spec(2, ("north",), every=1))
        await self.worker.working_on(TRAINED)
        self.relay.cut()
        self.relay.mend()
        await self.relay.passes.wait()  # the silo is back with a running task
        await asyncio.sleep(IDLE)
        self.relay.cut()
        self.relay.note("release", TRAINED)
        self.worker.release(TRAINED)
        self.relay.mend(wants_finished=True)
        await self.outcome("full")
        refused = small_spec(1, ("north",), every=0, retries=0)
        other = replace(refused.local.model, weights_sha256="cd" * 32)
        await self.create("refused", replace(refused, local=replace(refused.local, model=other)))
        await self.outcome("refused")
        await self.create("unwanted", small_spec(1, ("north",), every=0))
        await self.worker.working_on(CANCELLED)
        cancelled = len(self.relay.steps)
        self.relay.note("cancel", "unwanted")
        async with self.federation.admin() as stub:
            await stub.CancelExperiment(pb.CancelExperimentRequest(experiment_id="unwanted"))
        await self.outcome("unwanted")
        await until(lambda: any(step.kind == "result_ack" for step in self.relay.steps[cancelled:]))
        self.relay.note("stop")
        silo.lifecycle.stopping.set()
        await until(lambda: self.relay.steps[-1].kind == "drain")
        self.recorded = list(self.relay.steps)  # what follows are the ends of the daemons, in no particular order


async def record(directory: Path) -> list[Step]:
    """The steps of the story."""
    federation = Federation(directory, ("north",))
    relay = Relay(federation)
    federation.dial_port = relay.port
    federation.start_coordinator("heartbeat_interval: 1s\nsilence_limit: 1h\n")  # whoever plays it may be slow
    async with federation.admin(), relay.started():
        story = Story(federation, relay, HeldWorker(held=(TRAINED, CANCELLED)))
        try:
            await story.run()
        finally:
            await federation.stop()
    return story.recorded


def main() -> None:
    """Record and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--label", default=fedrt.__version__, help="name of the file")
    parser.add_argument("--into", type=Path, default=ROOT / "tests" / "golden" / "protocol")
    settings = parser.parse_args()
    last = ["git", "log", "-1", "--format=%h", "--", "fedrt", "silo", "coordinator", "proto"]
    commit = subprocess.run(last, cwd=ROOT, capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as directory:
        steps = asyncio.run(record(Path(directory) / "federation"))
    header = (
        f"Sessions of silo 'north' with its coordinator, protocol fedrt.v1, fedrt {fedrt.__version__}, recorded with\n"
        f"the code of {commit.stdout.strip()} by scripts/record_protocol.py; tests/fakes/recording.py says how to read."
    )
    target = settings.into / f"{settings.label}.txt"
    recording.write(target, header, steps)
    print(f"{target}: {len(steps)} steps")


if __name__ == "__main__":
    main()
