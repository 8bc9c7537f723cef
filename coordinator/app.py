"""Builds the coordinator from its configuration and runs it: the only module that knows all parts."""

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime

import structlog
from prometheus_client import CollectorRegistry

import fedrt
from coordinator import intake
from coordinator.admin_service import AdminService
from coordinator.config import CoordinatorConfig
from coordinator.integrity import check_at_start
from coordinator.listeners import admin_listeners, make_health, session_listener
from coordinator.orchestrator import Orchestrator
from coordinator.retention import collect_daily
from coordinator.session_service import SessionLimits, SessionService
from coordinator.store import Store
from fedrt.certificates import Expectation
from fedrt.daemon import Lifecycle
from fedrt.identity import Role
from fedrt.locking import DirectoryLock
from fedrt.log import configure_logging
from fedrt.metrics import CoordinatorMetrics, serve_metrics
from fedrt.session.liveness import Intervals
from fedrt.statefile import ensure_private_directory
from fedrt.tls import IdentityFiles, load_identity


async def serve(config: CoordinatorConfig, lifecycle: Lifecycle) -> None:
    """Run until `lifecycle.stopping`. Raises `FedrtError` for whatever an operator has to mend."""
    os.umask(0o077)  # sockets and files are ours alone
    configure_logging(config.log.level, config.log.format)
    files = IdentityFiles(config.identity.directory)
    identity = load_identity(files, datetime.now(UTC), Expectation(Role.COORDINATOR, config.federation))
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.certificate_expiry.set(identity.credential.not_after.timestamp())
    async with contextlib.AsyncExitStack() as stack:
        lock = DirectoryLock(config.state_directory)
        stack.callback(lock.release)
        store = Store(config.state_directory)
        stack.callback(store.close)
        await asyncio.to_thread(check_at_start, store)
        orchestrator = Orchestrator(store, metrics)
        stack.push_async_callback(orchestrator.close)
        sessions = SessionService(orchestrator, metrics, _limits(config))
        if config.metrics is not None:
            stack.callback(serve_metrics(config.metrics.listen, registry).close)
        await orchestrator.recover()
        admin = AdminService(orchestrator, store, config.limits.max_payload)
        place, updates = config.state_directory, config.retention.updates
        collect = functools.partial(collect_daily, orchestrator.in_store, store, place, updates)
        await _run(config, lifecycle, orchestrator, (sessions, admin), collect)
    structlog.get_logger("coordinator").info("coordinator stopped")


async def _run(
    config: CoordinatorConfig,
    lifecycle: Lifecycle,
    orchestrator: Orchestrator,
    services: tuple[SessionService, AdminService],
    collect: Callable[[], Coroutine[None, None, None]],
) -> None:
    log = structlog.get_logger("coordinator")
    sessions, admin = services
    health = await make_health()
    stopping = asyncio.create_task(lifecycle.stopping.wait())
    working = [asyncio.create_task(orchestrator.run()), asyncio.create_task(collect())]
    try:
        async with session_listener(config, sessions, health) as address, admin_listeners(config, admin, health):
            log.info("coordinator serves", version=fedrt.__version__, federation=config.federation, sessions=address)
            lifecycle.ready(f"serving federation {config.federation} on {address}")
            await asyncio.wait({stopping, *working}, return_when=asyncio.FIRST_COMPLETED)
            for task in working:
                if task.done():
                    task.result()  # neither ends by itself without a reason: let it be seen
            log.info("coordinator drains")
            await health.enter_graceful_shutdown()
            await sessions.drain(config.shutdown_grace)
    finally:
        stopping.cancel()
        for task in working:
            task.cancel()
        await asyncio.gather(stopping, *working, return_exceptions=True)


def _limits(config: CoordinatorConfig) -> SessionLimits:
    intake_directory = config.state_directory / "blobs" / "intake"
    ensure_private_directory(intake_directory)
    intake.clear(intake_directory)
    return SessionLimits(
        Intervals(config.heartbeat_interval, config.silence_limit),
        config.limits.max_payload,
        config.limits.max_sessions,
        intake_directory,
    )
