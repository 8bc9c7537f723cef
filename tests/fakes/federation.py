"""A whole federation on loopback, in one event loop: real certificates, coordinator and silos, with fake workers."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np

from certs.throwaway import Plan, prepare
from coordinator import app as coordinator_app
from coordinator.config import CoordinatorConfig, load_coordinator_config
from fedrt.daemon import Lifecycle
from fedrt.payload import unpack
from fedrt.spec import EvaluationSpec, ExperimentSpec, LocalSpec, ModelSpec, RoundsSpec, TrainingSpec
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.v1 import admin_service_pb2_grpc, experiment_pb2
from fedrt.wire_values import experiment_spec_to_pb, manifest_from_pb
from silo import app as silo_app
from silo.config import SiloConfig, load_silo_config
from silo.work import Worker
from tests.fakes.workers import WEIGHTS

ENDED = {
    experiment_pb2.Experiment.STATE_SUCCEEDED,
    experiment_pb2.Experiment.STATE_FAILED,
    experiment_pb2.Experiment.STATE_CANCELLED,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_spec(
    rounds: int = 3,
    silos: tuple[str, ...] = (),
    every: int = 0,
    method: str = "promptfl",
    hyperparameters: str = "{}",
    context_dim: int = 512,
    **rules: object,
) -> ExperimentSpec:
    local = LocalSpec(
        method,
        hyperparameters,
        ModelSpec("ViT-B-16", WEIGHTS, context_dim, 512),
        ("cat", "dog"),
        TrainingSpec(),
        rounds,
        seed=7,
    )
    return ExperimentSpec(local, RoundsSpec(rounds, silos=silos, **rules), EvaluationSpec(every))  # type: ignore[arg-type]


@dataclass
class Daemon:
    """A daemon running in this event loop."""

    lifecycle: Lifecycle
    task: asyncio.Task[None]

    async def stop(self) -> None:
        self.lifecycle.stopping.set()
        await asyncio.wait_for(self.task, 20)

    async def kill(self) -> None:
        """End it without any farewell; what it had not written is lost."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class Federation:
    """Where everything lies, and what runs. Silo names are given at construction."""

    directory: Path
    silos: tuple[str, ...] = ("north", "south", "west")
    port: int = field(default_factory=free_port)
    dial_port: int | None = None  # where silos dial, if that is not the coordinator itself
    running: dict[str, Daemon] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        prepare(self.directory / "certs", Plan("test", self.silos, ("alice",)), datetime.now(UTC))

    def coordinator_yaml(self, extra: str = "") -> Path:
        path = self.directory / "coordinator.yaml"
        path.write_text(
            f"federation: test\nlisten: {{session: '127.0.0.1:{self.port}'}}\n"
            f"identity: {{directory: {self.directory}/certs/coordinator}}\n"
            f"state_directory: {self.directory}/coordinator\nadmin_socket: {self.directory}/admin.sock\n"
            f"shutdown_grace: 5s\nlog: {{level: error}}\n{extra}"
        )
        return path

    def silo_yaml(self, name: str, extra: str = "", identity: Path | None = None) -> Path:
        path = self.directory / f"{name}.yaml"
        root = self.directory / "data"
        root.mkdir(exist_ok=True)
        path.write_text(
            f"coordinator: {{session_address: 'localhost:{self.dial_port or self.port}'}}\n"
            f"identity: {{directory: {identity or self.directory / 'certs/silos' / name}}}\n"
            f"state_directory: {self.directory}/silo-{name}\n"
            f"model: {{architecture: fedrt-tiny, weights: embedded}}\ndata: {{root: {root}, layout: image_folder}}\n"
            f"shutdown_grace: 5s\nreconnect: {{initial: 50ms, max: 200ms}}\nlog: {{level: error}}\n{extra}"
        )
        return path

    def coordinator_config(self, extra: str = "") -> CoordinatorConfig:
        return load_coordinator_config(self.coordinator_yaml(extra))

    def silo_config(self, name: str, extra: str = "", identity: Path | None = None) -> SiloConfig:
        return load_silo_config(self.silo_yaml(name, extra, identity))

    def start_coordinator(self, extra: str = "") -> Daemon:
        lifecycle = Lifecycle()
        daemon = Daemon(
            lifecycle, asyncio.create_task(coordinator_app.serve(self.coordinator_config(extra), lifecycle))
        )
        self.running["coordinator"] = daemon
        return daemon

    def start_silo(self, name: str, worker: Worker, extra: str = "", identity: Path | None = None) -> Daemon:
        lifecycle = Lifecycle()
        config = self.silo_config(name, extra, identity)
        daemon = Daemon(lifecycle, asyncio.create_task(silo_app.serve_with(config, lifecycle, worker)))
        self.running[name] = daemon
        return daemon

    @contextlib.asynccontextmanager
    async def started(self, workers: Mapping[str, Worker], extra: str = "") -> AsyncIterator["Federation"]:
        """The coordinator and these silos, stopped at the end."""
        self.start_coordinator(extra)
        for name, worker in workers.items():
            self.start_silo(name, worker)
        try:
            yield self
        finally:
            await self.stop()

    async def stop(self) -> None:
        for name in [*(name for name in self.running if name != "coordinator"), "coordinator"]:
            daemon = self.running.pop(name, None)
            if daemon is not None:
                daemon.lifecycle.stopping.set()
                await asyncio.wait({daemon.task}, timeout=20)
                if not daemon.task.done():
                    await daemon.kill()
                    raise TimeoutError(f"{name} did not stop")

    @contextlib.asynccontextmanager
    async def admin(self) -> AsyncIterator["admin_service_pb2_grpc.AdminServiceAsyncStub"]:
        soon = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)]  # it may yet start
        async with grpc.aio.insecure_channel(f"unix:{self.directory}/admin.sock", soon) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            yield admin_service_pb2_grpc.AdminServiceStub(channel)  # type: ignore[misc]

    async def create(self, name: str, spec: ExperimentSpec) -> None:
        async with self.admin() as stub:
            await stub.CreateExperiment(
                pb.CreateExperimentRequest(experiment_id=name, spec=experiment_spec_to_pb(spec))
            )

    async def events(self, name: str = "", after: int = 0) -> AsyncIterator[pb.Event]:
        async with self.admin() as stub:
            request = pb.WatchEventsRequest(experiment_id=name, after_event_number=after)
            async for response in stub.WatchEvents(request):
                yield response.event

    async def export(self, name: str) -> dict[str, np.ndarray]:
        """The shared tensors of the last committed round."""
        data, headers = b"", ()
        async with self.admin() as stub:
            async for part in stub.ExportExperiment(pb.ExportExperimentRequest(experiment_id=name)):
                if part.HasField("header"):
                    headers = manifest_from_pb(part.header.shared_tensors).tensors
                data += part.chunk.data
        return unpack(headers, data)

    async def experiment(self, name: str) -> experiment_pb2.Experiment:
        async with self.admin() as stub:
            return (await stub.GetExperiment(pb.GetExperimentRequest(experiment_id=name))).experiment

    async def finish(self, name: str, limit: float = 90) -> tuple[experiment_pb2.Experiment, list[pb.RoundClosed]]:
        """Wait until an experiment has ended; returns it and its rounds."""
        rounds: list[pb.RoundClosed] = []
        async with asyncio.timeout(limit):
            async for event in self.events(name):
                match event.WhichOneof("kind"):
                    case "round_closed":
                        rounds.append(event.round_closed)
                    case "experiment_changed" if event.experiment_changed.experiment.state in ENDED:
                        break
        async with self.admin() as stub:
            response = await stub.GetExperiment(pb.GetExperimentRequest(experiment_id=name))
        return response.experiment, rounds
