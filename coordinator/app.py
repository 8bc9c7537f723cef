"""Builds the coordinator from its configuration and runs it: the only module that knows all parts."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

import fedrt
from coordinator import intake
from coordinator.admin_service import AdminService
from coordinator.authorization import Authorization
from coordinator.config import CoordinatorConfig
from coordinator.orchestrator import Orchestrator
from coordinator.session_service import SessionLimits, SessionService
from coordinator.store import Store
from fedrt.certificates import Expectation
from fedrt.daemon import Lifecycle
from fedrt.errors import ConfigurationError
from fedrt.identity import Role
from fedrt.locking import DirectoryLock
from fedrt.log import configure_logging
from fedrt.metrics import CoordinatorMetrics, serve_metrics
from fedrt.session.liveness import Intervals
from fedrt.statefile import ensure_private_directory
from fedrt.tls import IdentityFiles, load_identity, server_credentials
from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import admin_service_pb2, admin_service_pb2_grpc, session_service_pb2_grpc

ADMIN_GRACE = 1.0  # seconds that operators' calls are given to end


async def serve(config: CoordinatorConfig, lifecycle: Lifecycle) -> None:
    """Run until `lifecycle.stopping`. Raises `FedrtError` for whatever an operator has to mend."""
    os.umask(0o077)  # sockets and files are ours alone
    configure_logging(config.log.level, config.log.format)
    log = structlog.get_logger("coordinator")
    files = IdentityFiles(config.identity.directory)
    identity = load_identity(files, datetime.now(UTC), Expectation(Role.COORDINATOR, config.federation))
    lock = DirectoryLock(config.state_directory)
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.certificate_expiry.set(identity.credential.not_after.timestamp())
    store = Store(config.state_directory)
    intake_directory = config.state_directory / "blobs" / "intake"
    ensure_private_directory(intake_directory)
    intake.clear(intake_directory)
    orchestrator = Orchestrator(store, metrics)
    sessions = SessionService(
        orchestrator,
        metrics,
        SessionLimits(
            Intervals(config.heartbeat_interval, config.silence_limit),
            config.limits.max_payload,
            config.limits.max_sessions,
            intake_directory,
        ),
    )
    try:
        await orchestrator.recover()
        async with contextlib.AsyncExitStack() as stack:
            if config.metrics is not None:
                stack.callback(serve_metrics(config.metrics.listen, registry).close)
            address = await stack.enter_async_context(_session_listener(config, files, sessions))
            await stack.enter_async_context(
                _admin_listeners(config, files, AdminService(orchestrator, store, config.limits.max_payload))
            )
            loop = asyncio.create_task(orchestrator.run())
            log.info("coordinator serves", version=fedrt.__version__, federation=config.federation, sessions=address)
            lifecycle.ready(f"serving federation {config.federation} on {address}")
            await _until_stopping(lifecycle, loop)
            log.info("coordinator drains")
            await sessions.drain(config.shutdown_grace)
            loop.cancel()
    finally:
        await orchestrator.close()
        store.close()
        lock.release()
    log.info("coordinator stopped")


async def _until_stopping(lifecycle: Lifecycle, loop: asyncio.Task[None]) -> None:
    stopping = asyncio.create_task(lifecycle.stopping.wait())
    await asyncio.wait({stopping, loop}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if loop.done():
        loop.result()  # the orchestrator ends by itself only with a bug: let it be seen


@contextlib.asynccontextmanager
async def _session_listener(
    config: CoordinatorConfig, files: IdentityFiles, sessions: SessionService
) -> AsyncIterator[str]:
    server = grpc.aio.server(options=GRPC_OPTIONS, interceptors=[Authorization(config.federation)])
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(sessions, server)
    _add_health(server)
    credentials = server_credentials(files, config.federation)
    port = _bind(
        lambda: server.add_secure_port(config.listen.session, credentials), "listen.session", config.listen.session
    )
    await server.start()
    try:
        yield f"{config.listen.session.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def _admin_listeners(
    config: CoordinatorConfig, files: IdentityFiles, service: AdminService
) -> AsyncIterator[None]:
    ensure_private_directory(config.admin_socket.parent)
    local = _admin_server(service, [])
    address = f"unix:{config.admin_socket}"
    _bind(lambda: local.add_insecure_port(address), "admin_socket", str(config.admin_socket))
    servers = [local]
    if config.listen.admin is not None:
        remote = _admin_server(service, [Authorization(config.federation)])
        credentials = server_credentials(files, config.federation)
        listen = config.listen.admin
        _bind(lambda: remote.add_secure_port(listen, credentials), "listen.admin", listen)
        servers.append(remote)
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        await asyncio.gather(*(server.stop(ADMIN_GRACE) for server in servers))
        config.admin_socket.unlink(missing_ok=True)


def _admin_server(service: AdminService, interceptors: Sequence[Any]) -> grpc.aio.Server:
    server = grpc.aio.server(options=GRPC_OPTIONS, interceptors=interceptors)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    names = [service.full_name for service in admin_service_pb2.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    _add_health(server)
    return server


def _add_health(server: grpc.aio.Server) -> None:
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def _bind(bind: Any, key: str, address: str) -> int:
    try:
        port: int = bind()
    except RuntimeError:
        raise ConfigurationError(
            f"{key}: cannot listen on '{address}'; another program may use it, or it is not an address of this "
            "machine: stop that program or change the key"
        ) from None
    return port
