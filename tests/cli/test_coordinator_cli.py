"""`fedrt-coordinator` as its operator meets it."""

import asyncio
import json
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import fedrt
from certs.throwaway import Plan, prepare
from fedrt.tensors import initial_tensors
from tests.cli.processes import Manager, assert_one_message, coordinator, run
from tests.fakes.federation import Federation, free_port, make_spec
from tests.fakes.raw_silo import RawSilo, credentials
from tests.fakes.workers import FakeWorker
from tests.integration.following import State, Watch, closed, connected


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


# ---- commands that end by themselves


def test_version_and_schema():
    assert run("fedrt-coordinator", "version").stdout == f"{fedrt.__version__}\n"
    schema = json.loads(run("fedrt-coordinator", "schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"federation", "listen", "identity", "state_directory"} <= set(schema["properties"])


def test_check_config_prints_what_is_in_effect_and_reads_it_back(federation: Federation, tmp_path: Path):
    done = run("fedrt-coordinator", "check-config", "-c", federation.coordinator_yaml())
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    effective = yaml.safe_load(done.stdout)
    assert effective["federation"] == "test"
    assert effective["limits"]["max_payload"] == "256MiB"
    assert re.search(r"# coordinator 'main' of federation 'test', certificate valid until \d{4}-\d\d-\d\d", done.stdout)
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = run("fedrt-coordinator", "check-config", "-c", tmp_path / "again.yaml")
    assert again.stdout == done.stdout
    assert not (tmp_path / "coordinator").exists()  # checking makes nothing


@pytest.mark.parametrize("command", ["check-config", "run"])
def test_an_unknown_key_is_named_with_the_closest_known_one(federation: Federation, command: str):
    config = federation.coordinator_yaml("shutdown_grase: 5s\n")
    done = run("fedrt-coordinator", command, "-c", config)
    assert_one_message(done, 78, str(config), "shutdown_grase is not a known key", "did you mean 'shutdown_grace'?")


def test_several_problems_are_listed_together(federation: Federation):
    done = run(
        "fedrt-coordinator", "run", "-c", federation.coordinator_yaml("limitz: {}\nheartbeat_interval: 1 fortnight\n")
    )
    assert done.returncode == 78
    assert "2 problems" in done.stderr
    assert "limitz" in done.stderr
    assert "heartbeat_interval" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_file_is_named(tmp_path: Path):
    assert_one_message(run("fedrt-coordinator", "run", "-c", tmp_path / "none.yaml"), 78, f"{tmp_path}/none.yaml")


def test_without_a_configuration_the_usage_is_shown():
    done = run("fedrt-coordinator", "run")
    assert done.returncode == 2
    assert "--config" in done.stderr


@pytest.mark.parametrize("command", ["check-config", "run"])
def test_an_expired_certificate_ends_with_77(tmp_path: Path, command: str):
    federation = Federation(tmp_path)
    shutil.rmtree(tmp_path / "certs")
    prepare(tmp_path / "certs", Plan("test", life=timedelta(hours=1)), datetime.now(UTC) - timedelta(days=2))
    done = run("fedrt-coordinator", command, "-c", federation.coordinator_yaml())
    assert_one_message(done, 77, "certificate of coordinator 'main' expired", "ask the federation operator")


def test_a_silos_certificate_ends_with_77(federation: Federation, tmp_path: Path):
    shutil.rmtree(tmp_path / "certs/coordinator")
    shutil.copytree(tmp_path / "certs/silos/north", tmp_path / "certs/coordinator")
    done = run("fedrt-coordinator", "run", "-c", federation.coordinator_yaml())
    assert_one_message(done, 77, "silo 'north'", "the role 'coordinator' is needed")


def test_another_federations_certificate_ends_with_77(federation: Federation):
    config = federation.coordinator_yaml()
    config.write_text(config.read_text().replace("federation: test", "federation: elsewhere"))
    assert_one_message(run("fedrt-coordinator", "run", "-c", config), 77, "the configured federation is 'elsewhere'")


def test_a_key_that_others_can_read_ends_with_77(federation: Federation, tmp_path: Path):
    (tmp_path / "certs/coordinator/key.pem").chmod(0o644)
    done = run("fedrt-coordinator", "run", "-c", federation.coordinator_yaml())
    assert_one_message(done, 77, "key.pem' can be read by others (mode 0644); run: chmod 600")


def test_a_damaged_store_ends_with_75_and_is_left_as_it_is(federation: Federation, tmp_path: Path):
    config = federation.coordinator_yaml()
    (tmp_path / "coordinator").mkdir(mode=0o700)
    (tmp_path / "coordinator" / "coordinator.db").write_bytes(b"this is no database" * 100)
    done = run("fedrt-coordinator", "run", "-c", config)
    assert_one_message(done, 75, "coordinator.db")
    assert (tmp_path / "coordinator" / "coordinator.db").read_bytes() == b"this is no database" * 100


# ---- two at once


@pytest.fixture
def serving(federation: Federation, tmp_path: Path) -> Iterator[Manager]:
    with coordinator(tmp_path, federation.coordinator_yaml()) as manager:
        manager.hear("READY=1")
        yield manager


def second(federation: Federation, tmp_path: Path, **changes: str) -> Path:
    """The configuration of another coordinator on the same host, with its own places but for `changes`."""
    own = {
        f"127.0.0.1:{federation.port}": f"127.0.0.1:{free_port()}",
        f"state_directory: {tmp_path}/coordinator": f"state_directory: {tmp_path}/second",
        f"admin_socket: {tmp_path}/admin.sock": f"admin_socket: {tmp_path}/second.sock",
    }
    text = federation.coordinator_yaml().read_text()
    for key, (old, new) in zip(("port", "state", "socket"), own.items(), strict=True):
        text = text.replace(old, changes.get(key, new))
    path = tmp_path / "second.yaml"
    path.write_text(text + changes.get("extra", ""))
    return path


@pytest.mark.usefixtures("serving")
def test_a_port_in_use_ends_with_78_and_names_the_key(federation: Federation, tmp_path: Path):
    address = f"127.0.0.1:{federation.port}"
    done = run("fedrt-coordinator", "run", "-c", second(federation, tmp_path, port=address))
    assert_one_message(done, 78, f"listen.session: cannot listen on '{address}'", "stop that program or change the key")
    metrics = f"metrics: {{listen: '{address}'}}\n"
    done = run("fedrt-coordinator", "run", "-c", second(federation, tmp_path, extra=metrics))
    assert_one_message(done, 78, f"metrics.listen: port {federation.port} on '127.0.0.1' is in use")


@pytest.mark.usefixtures("serving")
def test_a_state_directory_in_use_ends_with_78_and_harms_nobody(federation: Federation, tmp_path: Path):
    state = f"state_directory: {tmp_path}/coordinator"
    done = run("fedrt-coordinator", "run", "-c", second(federation, tmp_path, state=state))
    assert_one_message(done, 78, f"state_directory '{tmp_path}/coordinator' is in use by another running daemon")
    asyncio.run(still_answers(federation))


@pytest.mark.usefixtures("serving")
def test_an_admin_socket_in_use_ends_with_78_and_is_not_taken_away(federation: Federation, tmp_path: Path):
    config = second(federation, tmp_path, socket=f"admin_socket: {tmp_path}/admin.sock")
    with coordinator(tmp_path, config) as other:
        assert other.ends_or_says("READY=1") == 78
        assert f"admin_socket: another coordinator serves '{tmp_path}/admin.sock'" in other.stderr
    asyncio.run(still_answers(federation))


async def still_answers(federation: Federation) -> None:
    await federation.create("answered", make_spec(1))
    assert (await federation.experiment("answered")).state == State.STATE_PENDING


# ---- its life


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_when_it_stops_and_ends_cleanly(
    federation: Federation, tmp_path: Path, number: signal.Signals
):
    with coordinator(tmp_path, federation.coordinator_yaml()) as manager:
        ready = manager.hear("READY=1")
        assert f"STATUS=serving federation test on 127.0.0.1:{federation.port}" in ready
        assert (tmp_path / "admin.sock").stat().st_mode & 0o077 == 0
        manager.signal(number)
        manager.hear("STOPPING=1")
        assert manager.end() == 0
        assert manager.stderr == ""
    assert not (tmp_path / "admin.sock").exists()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "coordinator").iterdir()}
    assert all(mode & 0o077 == 0 for mode in modes.values()), modes


def test_sighup_does_not_end_it(federation: Federation, serving: Manager):
    serving.signal(signal.SIGHUP)
    asyncio.run(still_answers(federation))
    serving.signal(signal.SIGTERM)
    assert serving.end() == 0


async def test_a_second_signal_ends_it_at_once(federation: Federation, tmp_path: Path):
    config = federation.coordinator_yaml("silence_limit: 1h\n")
    config.write_text(config.read_text().replace("shutdown_grace: 5s", "shutdown_grace: 5m"))
    with coordinator(tmp_path, config) as manager:
        await asyncio.to_thread(manager.hear, "READY=1")
        async with RawSilo(federation.port, tmp_path / "certs/silos/south") as raw:
            await raw.hello()
            await federation.create("large", make_spec(1, ("south",), hyperparameters='{"context_length": 16384}'))
            offer = await raw.next("task_offer")
            raw.listens.clear()  # it never reads the 32 MiB, so that the drain does not end
            await raw.send(task_reply={"task_id": offer.task_id, "acceptance": {}})
            await Watch(federation).until(connected("south"))
            manager.signal(signal.SIGINT)
            await asyncio.to_thread(manager.hear, "STOPPING=1")
            assert manager.process.poll() is None
            began = time.monotonic()
            manager.signal(signal.SIGINT)
            code = await asyncio.to_thread(manager.end)
            assert time.monotonic() - began < 3
        assert code == 1
        assert "Traceback" not in manager.stderr
        assert "never retrieved" not in manager.stderr


async def test_a_killed_coordinator_resumes_and_ends_with_the_same_bits(federation: Federation, tmp_path: Path):
    rounds, spec = 20, make_spec(20, federation.silos)
    config = federation.coordinator_yaml()
    kills = (2, 11)
    for name in federation.silos:
        federation.start_silo(name, FakeWorker())
    watch = Watch(federation)
    try:
        for number in (*kills, rounds):
            with coordinator(tmp_path, config) as manager:
                await asyncio.to_thread(manager.hear, "READY=1")
                await federation.create("killed", spec)
                if number in kills:
                    await watch.until(closed(number))
                    manager.signal(signal.SIGKILL)
                    assert await asyncio.to_thread(manager.end) == -signal.SIGKILL
                else:
                    experiment, history = await federation.finish("killed")
                    exported = (await federation.export("killed"))["context"]
                assert manager.stderr == ""
    finally:
        await federation.stop()
    assert experiment.state == State.STATE_SUCCEEDED
    assert [r.round_number for r in history] == [*range(1, rounds + 1), rounds]
    value = initial_tensors(spec.local.tensors(), spec.seed)["context"]
    for _ in range(rounds):
        value = (value + np.float32(1)).astype(np.float32)
    assert exported.tobytes() == value.tobytes()


async def test_a_silo_that_vanishes_leaves_no_traceback_behind(federation: Federation, tmp_path: Path):
    with coordinator(tmp_path, federation.coordinator_yaml()) as manager:
        await asyncio.to_thread(manager.hear, "READY=1")
        await federation.create("deserted", make_spec(1, ("north",)))
        for _ in range(5):
            async with RawSilo(federation.port, tmp_path / "certs/silos/north") as raw:
                await raw.hello()
                offer = await raw.next("task_offer")
                await raw.send(task_reply={"task_id": offer.task_id, "acceptance": {}})  # and away, in mid-payload
        manager.signal(signal.SIGTERM)
        assert await asyncio.to_thread(manager.end) == 0
        assert manager.stderr == ""


# ---- what it shows


async def test_health_reflection_and_metrics_answer_and_the_metrics_move(federation: Federation, tmp_path: Path):
    port, admin_port = free_port(), free_port()
    config = federation.coordinator_yaml(f"metrics: {{listen: '127.0.0.1:{port}'}}\n")
    config.write_text(
        config.read_text().replace("listen: {session", f"listen: {{admin: '127.0.0.1:{admin_port}', session")
    )

    def metrics() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    async def health(channel: grpc.aio.Channel) -> int:
        request = health_pb2.HealthCheckRequest()
        return (await health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=10)).status

    with coordinator(tmp_path, config) as manager:
        await asyncio.to_thread(manager.hear, "READY=1")
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/admin.sock") as channel:
            assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
            services = {service.name for service in (await call.read()).list_services_response.service}
        assert services == {
            "fedrt.v1.AdminService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        for where, who in (
            (federation.port, "silos/north"),
            (admin_port, "operators/alice"),
            (admin_port, "silos/north"),
        ):
            shown = credentials(tmp_path / "certs" / who)
            async with grpc.aio.secure_channel(f"localhost:{where}", shown) as channel:
                assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
        before = await asyncio.to_thread(metrics)
        for name in federation.silos:
            federation.start_silo(name, FakeWorker())
        await federation.create("measured", make_spec(2, federation.silos))
        await federation.finish("measured")
        after = await asyncio.to_thread(metrics)
        await federation.stop()
        manager.signal(signal.SIGTERM)
        assert await asyncio.to_thread(manager.end) == 0
    prefix = "fedrt_coordinator_"
    moved = {key.removeprefix(prefix): after[key] - before.get(key, 0.0) for key in after if key.startswith(prefix)}
    assert moved["sessions_open"] == 3
    assert moved['rounds_total{outcome="completed"}'] == 3
    assert moved['results_total{verdict="accepted"}'] == 9
    assert moved['tasks_offered_total{kind="train"}'] == 6
    assert moved['payload_bytes_total{direction="in"}'] == 6 * 32768
    assert moved['payload_bytes_total{direction="out"}'] == 9 * 32768
    assert moved["round_duration_seconds_count"] == 3
    assert moved["store_commit_seconds_count"] > 0
    assert after[f"{prefix}certificate_expiry_timestamp_seconds"] > time.time()


async def test_the_metrics_count_experiments_by_state(federation: Federation, tmp_path: Path):
    port = free_port()
    with coordinator(tmp_path, federation.coordinator_yaml(f"metrics: {{listen: '127.0.0.1:{port}'}}\n")) as manager:
        await asyncio.to_thread(manager.hear, "READY=1")
        await federation.create("counted", make_spec(1, ("north",)))

        def text() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                return answer.read().decode()

        assert 'fedrt_coordinator_experiments{state="pending"} 1.0' in await asyncio.to_thread(text)
