"""Builds a silo from its configuration and runs it, in a daemon of its own or as one of many in a host.

Only this module and `silo.host.app`, which builds on it, know all parts.
"""

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog
from prometheus_client import CollectorRegistry

import fedrt
from fedrt.certificates import Expectation
from fedrt.daemon import Lifecycle
from fedrt.identity import Role
from fedrt.locking import DirectoryLock
from fedrt.log import configure_logging
from fedrt.metrics import SiloMetrics, serve_metrics
from fedrt.tls import IdentityFiles, LoadedIdentity, load_identity
from silo import ledger
from silo.agent import Agent
from silo.checkpoint_directory import CheckpointDirectory
from silo.config import SiloConfig, check_files, data_source, feature_source, model_source
from silo.departures import Departures
from silo.dialling import Dialling
from silo.link import Link
from silo.policy import Policy
from silo.presence import Presence
from silo.spool import Spool
from silo.stores import Stores
from silo.vault import Vault
from silo.work import OWN, Worker, WorkerReport
from silo.worker import ProcessWorker, WorkerLog

FLUSH_LIMIT = 5.0  # seconds the last frames are given to leave
DRAIN_CHECK_INTERVAL = 1.0  # seconds
_T = TypeVar("_T")


async def serve(config: SiloConfig, lifecycle: Lifecycle) -> None:
    """Run until `lifecycle.stopping`. Raises `FedrtError` for whatever the site has to mend."""
    os.umask(0o077)
    configure_logging(config.log.level, config.log.format)
    check_files(config)
    log = structlog.get_logger("silo")
    worker = own_worker(config, log)
    await serve_with(config, lifecycle, worker)


def own_worker(config: SiloConfig, log: WorkerLog) -> ProcessWorker:
    """The worker that the configuration asks for; its process starts when it is needed."""
    features = feature_source(config.features, config.state_directory)
    data = {OWN: data_source(config)}
    return ProcessWorker(model_source(config), data, config.model.threads, log, features=features)


async def serve_with(config: SiloConfig, lifecycle: Lifecycle, worker: Worker) -> None:
    """Run with this worker."""
    log = structlog.get_logger("silo")
    identity = own_identity(config)
    registry = CollectorRegistry()
    metrics = SiloMetrics(registry)
    metrics.certificate_expiry.set(identity.credential.not_after.timestamp())
    with contextlib.ExitStack() as held:
        departures = take_state(config, held)
        if config.metrics is not None:
            held.callback(serve_metrics(config.metrics.listen, registry).close)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(worker.stop)
            lifecycle.status("loading the model")
            report = await until_stopped(lifecycle.stopping, worker.describe())
            if report is None:
                return
            metrics.unreadable_files.set(report.unreadable_count)
            silo = await build_silo(config, worker, report, Records(departures, metrics))
            presence = Presence(lifecycle, config.coordinator.session_address)
            silo.link.on_connected, silo.link.on_disconnected = presence.connected, presence.disconnected
            log.info(
                "silo serves",
                version=fedrt.__version__,
                silo=identity.identity.name,
                device=report.device,
                examples=report.example_count,
                unreadable=report.unreadable_count,
            )
            await silo.run(lifecycle.stopping)
    log.info("silo stopped")


def own_identity(config: SiloConfig) -> LoadedIdentity:
    """The identity that the configuration names. Raises `IdentityError` unless it is fit for a silo."""
    expected = Expectation(Role.SILO, config.federation)
    return load_identity(IdentityFiles(config.identity.directory), datetime.now(UTC), expected)


def take_state(config: SiloConfig, held: contextlib.ExitStack) -> Departures:
    """Lock the state directory, making it if need be, and open its record of departures, until `held` is closed.

    Raises `ConfigurationError` if another daemon has it, and `StorageError`.
    """
    held.callback(DirectoryLock(config.state_directory).release)
    departures = Departures(config.state_directory / "departures.jsonl")
    held.callback(departures.close)
    return departures


@dataclass(frozen=True)
class Records:
    """Where a silo notes what it does."""

    departures: Departures
    metrics: SiloMetrics


async def build_silo(config: SiloConfig, worker: Worker, report: WorkerReport, records: Records) -> "Silo":
    """A silo that has taken up what an earlier run left; its state directory is taken. Raises `StorageError`."""
    directory = config.state_directory
    checkpoints = CheckpointDirectory(directory / "checkpoints")
    stores = Stores(Spool(directory / "spool"), Vault(directory / "vault"), checkpoints, records.metrics)
    policy = Policy(config.policy.methods, config.policy.experiments, config.policy.min_examples)
    agent = Agent(worker, report, policy, stores, records.metrics)
    await agent.recover()
    dialling = Dialling(
        address=config.coordinator.session_address,
        server_name=config.coordinator.server_name,
        files=IdentityFiles(config.identity.directory),
        federation=config.federation,
        initial_delay=config.reconnect.initial,
        max_delay=config.reconnect.max,
    )
    link = Link(dialling, agent, report, records.departures, records.metrics)
    return Silo(agent, link, config.shutdown_grace)


@dataclass(frozen=True)
class Silo:
    """One silo, ready to run: what it holds, its way to the coordinator, and its time to finish work in seconds."""

    agent: Agent
    link: Link
    shutdown_grace: float

    async def run(self, stopping: asyncio.Event) -> None:
        """Serve until `stopping`, then drain. Raises `IdentityError` when dialling again cannot help."""
        agent, link = asyncio.create_task(self.agent.run()), asyncio.create_task(self.link.run())
        stop = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait({agent, link, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in (agent, link):
                if task.done():
                    task.result()  # it ended by itself: with the reason why this silo must end
            await self._drain()
            self.link.finish()
            await asyncio.wait({link}, timeout=FLUSH_LIMIT)
        finally:
            stop.cancel()
            agent.cancel()
            link.cancel()
            await asyncio.gather(agent, link, stop, return_exceptions=True)

    async def _drain(self) -> None:
        log = structlog.get_logger("silo")
        log.info("silo drains", grace_seconds=self.shutdown_grace)
        self.agent.submit(ledger.DrainOrdered())
        self.link.drain(self.shutdown_grace)
        await asyncio.sleep(0)
        deadline = asyncio.get_running_loop().time() + self.shutdown_grace
        while not await self._idle_within(DRAIN_CHECK_INTERVAL):
            held = len(self.agent.held)
            if asyncio.get_running_loop().time() >= deadline:
                log.warning("work is cut off; what was computed is delivered at the next start", held=held)
                return
            if not self.agent.is_working and not self.link.is_open:
                log.warning("the coordinator is away; results are delivered at the next start", held=held)
                return

    async def _idle_within(self, limit: float) -> bool:
        try:
            async with asyncio.timeout(limit):
                await self.agent.idle()
        except TimeoutError:
            return False
        return True


async def until_stopped(stopping: asyncio.Event, work: Coroutine[Any, Any, _T]) -> _T | None:
    """The outcome of the work, or None if the daemon is asked to stop before it is there."""
    task, stop = asyncio.create_task(work), asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
