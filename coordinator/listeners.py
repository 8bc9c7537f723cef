"""Where the coordinator listens: sessions over mutual TLS, administration on a Unix socket and, if wanted, TLS."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.admin_service import AdminService
from coordinator.authorization import Authorization
from coordinator.config import CoordinatorConfig
from coordinator.session_service import SessionService
from fedrt.errors import ConfigurationError
from fedrt.statefile import ensure_private_directory
from fedrt.tls import IdentityFiles, server_credentials
from fedrt.transport import GRPC_OPTIONS, SESSION_SERVER_OPTIONS
from fedrt.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)

ADMIN_GRACE = 1.0  # seconds that operators' calls are given to end
SESSION_SERVICE = session_service_pb2.DESCRIPTOR.services_by_name["SessionService"].full_name
ADMIN_SERVICE = admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


async def make_health() -> health.aio.HealthServicer:
    """Health (grpc.health.v1) of both services, the same on every listener; it says NOT_SERVING once drained."""
    servicer = health.aio.HealthServicer()
    for name in ("", SESSION_SERVICE, ADMIN_SERVICE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return servicer


@contextlib.asynccontextmanager
async def session_listener(
    config: CoordinatorConfig, sessions: SessionService, servicer: health.aio.HealthServicer
) -> AsyncIterator[str]:
    """Serve silos; gives the address, with the port that was taken if 0 was asked for. Raises `ConfigurationError`."""
    server = grpc.aio.server(options=SESSION_SERVER_OPTIONS, interceptors=[Authorization(config.federation)])
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(sessions, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    credentials = server_credentials(IdentityFiles(config.identity.directory), config.federation)
    listen = config.listen.session
    port = _bind(lambda: server.add_secure_port(listen, credentials), "listen.session", listen)
    await server.start()
    try:
        yield f"{listen.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def admin_listeners(
    config: CoordinatorConfig, service: AdminService, servicer: health.aio.HealthServicer
) -> AsyncIterator[None]:
    """Serve operators. Raises `ConfigurationError`."""
    ensure_private_directory(config.admin_socket.parent)
    _check_unused(config.admin_socket)
    local = _admin_server(service, servicer, [])
    _bind(lambda: local.add_insecure_port(f"unix:{config.admin_socket}"), "admin_socket", str(config.admin_socket))
    servers = [local]
    listen = config.listen.admin
    if listen is not None:
        remote = _admin_server(service, servicer, [Authorization(config.federation)])
        credentials = server_credentials(IdentityFiles(config.identity.directory), config.federation)
        _bind(lambda: remote.add_secure_port(listen, credentials), "listen.admin", listen)
        servers.append(remote)
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        await asyncio.gather(*(server.stop(ADMIN_GRACE) for server in servers))
        config.admin_socket.unlink(missing_ok=True)


def _admin_server(
    service: AdminService, servicer: health.aio.HealthServicer, interceptors: Sequence[Any]
) -> grpc.aio.Server:
    server = grpc.aio.server(options=GRPC_OPTIONS, interceptors=interceptors)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection([ADMIN_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return server


def _check_unused(path: Path) -> None:
    """Refuse a socket that somebody serves: gRPC would take it away. One that nobody serves is replaced."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise ConfigurationError(f"admin_socket: another coordinator serves '{path}'; stop it or set another path")


def _bind(bind: Callable[[], int], key: str, address: str) -> int:
    try:
        return bind()
    except RuntimeError:
        raise ConfigurationError(
            f"{key}: cannot listen on '{address}'; another program may use it, or it is not an address of this "
            "machine: stop that program or change the key"
        ) from None
