import socket
import urllib.request
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from fedrt.errors import ConfigurationError
from fedrt.metrics import CoordinatorMetrics, SiloMetrics, serve_metrics
from fedrt.task import Verdict


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_coordinator_metrics(registry: CollectorRegistry) -> None:
    metrics = CoordinatorMetrics(registry)
    metrics.results.labels(verdict=Verdict.LATE.value).inc()
    metrics.round_duration.observe(0.02)
    metrics.frames_received.labels(kind="heartbeat").inc()
    metrics.experiments.labels(state="running").set(2)
    text = generate_latest(registry).decode()
    assert 'fedrt_coordinator_results_total{verdict="late"} 1.0' in text
    assert 'fedrt_coordinator_results_total{verdict="accepted"} 0.0' in text
    assert 'fedrt_coordinator_rounds_total{outcome="failed"} 0.0' in text
    assert {line.split()[0] for line in text.splitlines() if line.startswith("fedrt_coordinator_rounds_total")} == {
        'fedrt_coordinator_rounds_total{outcome="completed"}',
        'fedrt_coordinator_rounds_total{outcome="failed"}',
    }  # those that the orchestrator writes
    assert 'fedrt_coordinator_round_duration_seconds_bucket{le="0.03"} 1.0' in text
    assert 'fedrt_coordinator_experiments{state="running"} 2.0' in text


def test_silo_metrics(registry: CollectorRegistry) -> None:
    metrics = SiloMetrics(registry)
    metrics.connected.set(1)
    metrics.payload_bytes.labels(direction="out").inc(32768)
    text = generate_latest(registry).decode()
    assert "fedrt_silo_connected 1.0" in text
    assert 'fedrt_silo_payload_bytes_total{direction="out"} 32768.0' in text
    assert 'fedrt_silo_tasks_total{kind="train",outcome="failed"} 0.0' in text


@pytest.mark.parametrize(("kind", "prefix"), [(CoordinatorMetrics, "fedrt_coordinator_"), (SiloMetrics, "fedrt_silo_")])
def test_names_are_prefixed_and_every_metric_has_help(kind: Any, prefix: str, registry: CollectorRegistry) -> None:
    kind(registry)
    families = list(registry.collect())
    assert len(families) >= 9
    assert all(family.name.startswith(prefix) and family.documentation for family in families)


def test_two_daemons_of_one_process_do_not_share_metrics() -> None:
    first, second = SiloMetrics(CollectorRegistry()), SiloMetrics(CollectorRegistry())
    first.reconnects.inc()
    assert next(iter(second.reconnects.collect())).samples[0].value == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_metrics_are_served_until_closed(host: str, registry: CollectorRegistry) -> None:
    SiloMetrics(registry).connected.set(1)
    try:
        server = serve_metrics(f"{host}:0", registry)
    except ConfigurationError:
        if host == "[::1]":
            pytest.skip("this machine has no IPv6")
        raise
    url = f"http://{host}:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert b"fedrt_silo_connected 1.0" in answer.read()
    server.close()
    server.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(url, timeout=10)


def test_port_in_use(registry: CollectorRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as caught:
            serve_metrics(f"127.0.0.1:{port}", registry)
    assert str(caught.value) == (
        f"metrics.listen: port {port} on '127.0.0.1' is in use; stop the program that listens there or set another port"
    )


def test_address_of_another_machine(registry: CollectorRegistry) -> None:
    with pytest.raises(ConfigurationError) as caught:
        serve_metrics("192.0.2.1:9464", registry)
    assert str(caught.value).startswith("metrics.listen: cannot listen on '192.0.2.1' (")
    assert str(caught.value).endswith("); set an address of this machine, such as 127.0.0.1:9464")


def test_privileged_port(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fedrt.metrics.start_http_server", refuse)
    with pytest.raises(ConfigurationError, match=r"port 80 on '127.0.0.1' needs privileges; set one above 1023$"):
        serve_metrics("127.0.0.1:80", registry)
