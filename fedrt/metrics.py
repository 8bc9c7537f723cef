"""Every Prometheus metric of both daemons, declared once, and the small server that shows them.

Names begin with `fedrt_coordinator_` and `fedrt_silo_`; durations are seconds, sizes bytes. Labels are enumerations,
never names of silos or experiments, so that the number of series does not grow. Series whose labels are known appear
from the start with the value 0, so that an alert can tell "none yet" from "no such metric".
"""

import errno
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from fedrt.errors import ConfigurationError
from fedrt.notation import split_address
from fedrt.task import RefusalReason, TaskKind, Verdict

ROUND_OUTCOMES = ("completed", "failed")
TASK_OUTCOMES = ("succeeded", "failed", "cancelled", "refused")
DIRECTIONS = ("in", "out")
_LONG_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)
_SHORT_SECONDS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class CoordinatorMetrics:
    """The metrics of a coordinator, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "fedrt_coordinator_"
        self.sessions_open = Gauge(f"{prefix}sessions_open", "Silos connected now", registry=registry)
        self.frames_received = Counter(f"{prefix}frames_received", "Frames from silos", ["kind"], registry=registry)
        self.frames_sent = Counter(f"{prefix}frames_sent", "Frames to silos", ["kind"], registry=registry)
        self.payload_bytes = Counter(
            f"{prefix}payload_bytes", "Tensor bytes, in from and out to silos", ["direction"], registry=registry
        )
        self.rounds = Counter(
            f"{prefix}rounds", "Rounds that ended, each attempt counted", ["outcome"], registry=registry
        )
        self.round_duration = Histogram(
            f"{prefix}round_duration_seconds", "Time of a round", registry=registry, buckets=_LONG_SECONDS
        )
        self.results = Counter(f"{prefix}results", "Results of tasks by verdict", ["verdict"], registry=registry)
        self.tasks_offered = Counter(f"{prefix}tasks_offered", "Tasks offered to silos", ["kind"], registry=registry)
        self.tasks_refused = Counter(f"{prefix}tasks_refused", "Tasks silos refused", ["reason"], registry=registry)
        self.store_commit_duration = Histogram(
            f"{prefix}store_commit_seconds", "Time of a commit to the store", registry=registry, buckets=_SHORT_SECONDS
        )
        self.set_aside = Counter(f"{prefix}silos_set_aside", "Times that a silo was set aside", registry=registry)
        self.experiments = Gauge(f"{prefix}experiments", "Experiments by state", ["state"], registry=registry)
        self.certificate_expiry = Gauge(
            f"{prefix}certificate_expiry_timestamp_seconds", "When its certificate expires (Unix)", registry=registry
        )
        _start(self.payload_bytes, "direction", DIRECTIONS)
        _start(self.rounds, "outcome", ROUND_OUTCOMES)
        _start(self.results, "verdict", _values(Verdict))
        _start(self.tasks_offered, "kind", _values(TaskKind))
        _start(self.tasks_refused, "reason", _values(RefusalReason))


class SiloMetrics:
    """The metrics of a silo, in a registry of its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "fedrt_silo_"
        self.connected = Gauge(f"{prefix}connected", "1 while the session is up, else 0", registry=registry)
        self.reconnects = Counter(f"{prefix}reconnects", "Sessions begun after the first", registry=registry)
        self.tasks = Counter(f"{prefix}tasks", "Tasks by kind and outcome", ["kind", "outcome"], registry=registry)
        self.work_duration = Histogram(
            f"{prefix}work_duration_seconds", "Time of local work", ["kind"], registry=registry, buckets=_LONG_SECONDS
        )
        self.payload_bytes = Counter(
            f"{prefix}payload_bytes",
            "Tensor bytes, in from and out to the coordinator",
            ["direction"],
            registry=registry,
        )
        self.spool_results = Gauge(f"{prefix}spool_results", "Results that await a verdict", registry=registry)
        self.spool_bytes = Gauge(f"{prefix}spool_bytes", "Size of the spool on disk", registry=registry)
        self.certificate_expiry = Gauge(
            f"{prefix}certificate_expiry_timestamp_seconds", "When its certificate expires (Unix)", registry=registry
        )
        self.unreadable_files = Gauge(f"{prefix}unreadable_files", "Image files that cannot be read", registry=registry)
        _start(self.payload_bytes, "direction", DIRECTIONS)
        for kind in TaskKind:
            self.work_duration.labels(kind=kind.value)
            for outcome in TASK_OUTCOMES:
                self.tasks.labels(kind=kind.value, outcome=outcome)


@dataclass(frozen=True)
class MetricsServer:
    """A running server of metrics; `port` is the one that was taken if 0 was asked for."""

    port: int
    _server: WSGIServer
    _thread: threading.Thread

    def close(self) -> None:
        """Stop answering and free the port. Closing twice is harmless."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(address: str, registry: CollectorRegistry) -> MetricsServer:
    """Show `registry` over HTTP at "host:port", in a thread of its own.

    Raises `ConfigurationError` naming the address and the key to change if it cannot listen there.
    """
    host, port = split_address(address)
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise ConfigurationError(f"metrics.listen: {_reason(host, port, error)}") from None
    return MetricsServer(server.server_port, server, thread)


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on '{host}' is in use; stop the program that listens there or set another port"
    if error.errno == errno.EACCES:
        return f"port {port} on '{host}' needs privileges; set one above 1023"
    return f"cannot listen on '{host}' ({error.strerror}); set an address of this machine, such as 127.0.0.1:{port}"


def _start(metric: Counter, label: str, values: Iterable[str]) -> None:
    for value in values:
        metric.labels(**{label: value})


def _values(kinds: type[Enum]) -> list[str]:
    return [str(kind.value) for kind in kinds]
