"""Builds many virtual silos around one worker and runs them: each has its own session, spool, vault and record."""

import asyncio
import contextlib
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import structlog
from prometheus_client import CollectorRegistry

import fedrt
from fedrt.daemon import Lifecycle
from fedrt.errors import ConfigurationError
from fedrt.locking import DirectoryLock
from fedrt.log import configure_logging
from fedrt.metrics import SiloMetrics
from silo.app import Records, Silo, build_silo, take_state, until_stopped
from silo.config import SiloConfig, data_source, feature_source, model_source
from silo.host.config import HostConfig, check_host_files, silo_config
from silo.host.crew import Crew
from silo.host.dealing import prepare_parts, show
from silo.host.identities import check_identities
from silo.host.worker import VirtualWorker
from silo.sources import DataSource
from silo.work import Worker, WorkerReport
from silo.worker import PROGRAM, ProcessWorker

FILES_PER_SILO = 4  # the lock, the record of departures, the session, and one while a result is written
FILES_OF_HOST = 200  # the worker, gRPC, libraries

MakeWorker = Callable[[Mapping[str, DataSource]], Worker]


async def serve(config: HostConfig, lifecycle: Lifecycle, program: Sequence[str] = PROGRAM) -> None:
    """Run until `lifecycle.stopping`, with one child process of this program.

    Raises `FedrtError` for whatever has to be mended; `IdentityError` if the coordinator refuses every virtual silo.
    """
    os.umask(0o077)
    configure_logging(config.log.level, config.log.format)
    check_host_files(config)
    model, log = model_source(silo_config(config, "any")), structlog.get_logger("silo")
    features = feature_source(config.features, config.state_directory)

    def make_worker(data: Mapping[str, DataSource]) -> ProcessWorker:
        return ProcessWorker(model, data, config.model.threads, log, program, features)

    await serve_with(config, lifecycle, make_worker)


async def serve_with(config: HostConfig, lifecycle: Lifecycle, make_worker: MakeWorker) -> None:
    """Run with the worker that `make_worker` makes of each virtual silo's images."""
    log = structlog.get_logger("silo.host")
    async with contextlib.AsyncExitStack() as stack:
        held = stack.enter_context(contextlib.ExitStack())
        held.callback(DirectoryLock(config.state_directory).release)
        lifecycle.status("dealing the data out")
        configs = await until_stopped(lifecycle.stopping, asyncio.to_thread(_prepare, config))
        if configs is None:
            return
        records = {name: _records(one, held) for name, one in configs.items()}
        worker = make_worker({name: data_source(one) for name, one in configs.items()})
        stack.push_async_callback(worker.stop)
        lifecycle.status("loading the model")
        report = await until_stopped(lifecycle.stopping, worker.describe())
        if report is None:
            return
        lifecycle.status(f"connecting {len(configs)} virtual silos")
        silos = {name: await _build(one, worker, report, records[name]) for name, one in configs.items()}
        log.info("host serves", version=fedrt.__version__, silo_count=len(silos), device=report.device)
        await Crew(silos, lifecycle, config.coordinator.session_address).run()
    log.info("host stopped")


def _prepare(config: HostConfig) -> dict[str, SiloConfig]:
    """Deal the data out, and see that every virtual silo can exist: what each one's own file would say."""
    partition = prepare_parts(config)
    show(partition)
    configs = {name: silo_config(config, name) for name in partition.silos}
    places = {name: one.identity.directory for name, one in configs.items()}
    check_identities(places, config.federation, datetime.now(UTC))
    _allow_files(FILES_OF_HOST + FILES_PER_SILO * len(configs))
    return configs


def _allow_files(needed: int) -> None:
    """Raise the soft limit of open files if need be. Raises `ConfigurationError` if the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigurationError(
            f"this many virtual silos need up to {needed} open files, but this process may have {hard}; "
            "raise the limit (ulimit -n, or LimitNOFILE of the service), or deal to fewer silos"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _records(config: SiloConfig, held: contextlib.ExitStack) -> Records:
    return Records(take_state(config, held), SiloMetrics(CollectorRegistry()))


async def _build(config: SiloConfig, worker: Worker, report: WorkerReport, records: Records) -> Silo:
    name = config.state_directory.name
    with structlog.contextvars.bound_contextvars(silo=name):
        return await build_silo(config, VirtualWorker(worker, name), report.of(name), records)
