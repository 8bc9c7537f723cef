"""Builds the silo from its configuration and runs it: the only module that knows all parts."""

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

import structlog
from prometheus_client import CollectorRegistry

import fedrt
from fedrt.certificates import Expectation
from fedrt.daemon import Lifecycle
from fedrt.identity import Role
from fedrt.locking import DirectoryLock
from fedrt.log import configure_logging
from fedrt.metrics import SiloMetrics, serve_metrics
from fedrt.tls import IdentityFiles, load_identity
from silo import ledger
from silo.agent import Agent
from silo.config import SiloConfig, check_files, data_source, model_source
from silo.departures import Departures
from silo.link import Dialling, Link
from silo.policy import Policy
from silo.spool import Spool
from silo.vault import Vault
from silo.work import Worker, WorkerReport
from silo.worker import ProcessWorker

FLUSH_LIMIT = 5.0  # seconds the last frames are given to leave
DRAIN_CHECK_INTERVAL = 1.0  # seconds


async def serve(config: SiloConfig, lifecycle: Lifecycle) -> None:
    """Run until `lifecycle.stopping`. Raises `FedrtError` for whatever the site has to mend."""
    os.umask(0o077)
    configure_logging(config.log.level, config.log.format)
    check_files(config)
    log = structlog.get_logger("silo")
    worker = ProcessWorker(model_source(config), data_source(config), config.model.threads, log)
    await serve_with(config, lifecycle, worker)


async def serve_with(config: SiloConfig, lifecycle: Lifecycle, worker: Worker) -> None:
    """Run with this worker."""
    log = structlog.get_logger("silo")
    files = IdentityFiles(config.identity.directory)
    identity = load_identity(files, datetime.now(UTC), Expectation(Role.SILO, config.federation))
    registry = CollectorRegistry()
    metrics = SiloMetrics(registry)
    metrics.certificate_expiry.set(identity.credential.not_after.timestamp())
    async with contextlib.AsyncExitStack() as stack:
        lock = DirectoryLock(config.state_directory)
        stack.callback(lock.release)
        if config.metrics is not None:
            stack.callback(serve_metrics(config.metrics.listen, registry).close)
        departures = Departures(config.state_directory / "departures.jsonl")
        stack.callback(departures.close)
        stack.push_async_callback(worker.stop)
        lifecycle.status("loading the model")
        report = await _until(lifecycle.stopping, worker.describe())
        if report is None:
            return
        metrics.unreadable_files.set(report.unreadable_count)
        stores = Spool(config.state_directory / "spool"), Vault(config.state_directory / "vault")
        policy = Policy(config.policy.methods, config.policy.experiments, config.policy.min_examples)
        agent = Agent(worker, report, policy, stores, metrics)
        await agent.recover()
        dialling = Dialling(
            address=config.coordinator.session_address,
            server_name=config.coordinator.server_name,
            files=files,
            federation=config.federation,
            initial_delay=config.reconnect.initial,
            max_delay=config.reconnect.max,
        )
        link = Link(dialling, agent, report, departures, metrics)
        link.on_connected = lambda: lifecycle.ready(f"connected to {dialling.address}")
        log.info(
            "silo serves",
            version=fedrt.__version__,
            silo=identity.identity.name,
            device=report.device,
            examples=report.example_count,
            unreadable=report.unreadable_count,
        )
        await _run(config, lifecycle, agent, link)
    log.info("silo stopped")


async def _run(config: SiloConfig, lifecycle: Lifecycle, agent: Agent, link: Link) -> None:
    agent_task, link_task = asyncio.create_task(agent.run()), asyncio.create_task(link.run())
    stopping = asyncio.create_task(lifecycle.stopping.wait())
    try:
        await asyncio.wait({agent_task, link_task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (agent_task, link_task):
            if task.done():
                task.result()  # it ended by itself: with the reason why this daemon must end
        await _drain(config.shutdown_grace, agent, link)
        link.finish()
        await asyncio.wait({link_task}, timeout=FLUSH_LIMIT)
    finally:
        stopping.cancel()
        agent_task.cancel()
        link_task.cancel()
        await asyncio.gather(agent_task, link_task, stopping, return_exceptions=True)


async def _drain(grace: float, agent: Agent, link: Link) -> None:
    log = structlog.get_logger("silo")
    log.info("silo drains", grace_seconds=grace)
    agent.submit(ledger.DrainOrdered())
    link.drain(grace)
    await asyncio.sleep(0)
    deadline = asyncio.get_running_loop().time() + grace
    while not await _idle_within(agent, DRAIN_CHECK_INTERVAL):
        if asyncio.get_running_loop().time() >= deadline:
            log.warning("work is cut off; what was computed is delivered at the next start", held=len(agent.held))
            return
        if not agent.is_working and not link.is_open:
            log.warning("the coordinator is away; results are delivered at the next start", held=len(agent.held))
            return


async def _idle_within(agent: Agent, limit: float) -> bool:
    try:
        async with asyncio.timeout(limit):
            await agent.idle()
    except TimeoutError:
        return False
    return True


async def _until(stopping: asyncio.Event, work: Coroutine[Any, Any, WorkerReport]) -> WorkerReport | None:
    """The report, or None if the daemon is asked to stop before it is there."""
    task, stop = asyncio.create_task(work), asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stop.cancel()
        await asyncio.gather(task, stop, return_exceptions=True)
