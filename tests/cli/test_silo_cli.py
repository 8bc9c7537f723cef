"""`fedrt-silo` as its operator meets it."""

import asyncio
import json
import signal
import socket
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

import fedrt
from certs.throwaway import Plan, prepare
from fedrt.locking import DirectoryLock
from tests.cli.processes import SCRIPTS, assert_one_message, instant_silo, managed, run
from tests.fakes.federation import Federation, free_port, make_spec
from tests.fakes.workers import FakeWorker
from tests.integration.following import State, Watch, connected, gone


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    return Federation(tmp_path)


def test_version_and_schema():
    assert run("fedrt-silo", "version").stdout == f"{fedrt.__version__}\n"
    schema = json.loads(run("fedrt-silo", "schema").stdout)
    assert {"coordinator", "identity", "model", "data", "policy"} <= set(schema["properties"])


def write_images(root: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (32, 32), (40 * index, 90, 10)).save(root / name / f"{index}.png")


def test_check_config_prints_what_is_in_effect(federation: Federation, tmp_path: Path):
    write_images(tmp_path / "data", {"train/cat": 3, "train/dog": 4, "test/cat": 1})
    done = run("fedrt-silo", "check-config", "-c", federation.silo_yaml("north"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    effective = yaml.safe_load(done.stdout)
    assert effective["policy"] == {"methods": ["*"], "experiments": ["*"], "min_examples": 1}
    assert "# silo 'north' of federation 'test', certificate valid until " in done.stdout
    assert done.stdout.splitlines()[-2:] == ["# train: 7 images of 2 classes", "# test: 1 image of 1 class"]
    assert not (tmp_path / "silo-north").exists()  # checking makes nothing


def test_check_config_finds_a_folder_without_images(federation: Federation, tmp_path: Path):
    done = run("fedrt-silo", "check-config", "-c", federation.silo_yaml("north"))
    assert_one_message(done, 78, f"data.root '{tmp_path}/data' holds no images", "<class>/<image>")
    assert done.stdout == ""


def test_check_config_finds_a_broken_manifest(federation: Federation, tmp_path: Path):
    config, manifest = federation.silo_yaml("north"), tmp_path / "images.csv"
    manifest.write_text("path,labl\na.png,cat\n")
    layout = f"layout: manifest, manifest: {manifest}"
    config.write_text(config.read_text().replace("layout: image_folder", layout))
    done = run("fedrt-silo", "check-config", "-c", config)
    assert_one_message(done, 78, f"data.manifest '{manifest}' has no column 'label'")


@pytest.mark.parametrize("command", ["check-config", "run"])
def test_an_unknown_key_is_named_with_the_closest_known_one(federation: Federation, command: str):
    config = federation.silo_yaml("north", "policy: {methodes: ['*']}\n")
    done = run("fedrt-silo", command, "-c", config)
    assert_one_message(done, 78, str(config), "policy.methodes is not a known key", "did you mean 'methods'?")


def test_a_missing_file_is_named(tmp_path: Path):
    assert_one_message(run("fedrt-silo", "run", "-c", tmp_path / "none.yaml"), 78, f"{tmp_path}/none.yaml")


def test_missing_weights_end_with_78(federation: Federation):
    config = federation.silo_yaml("north")
    config.write_text(config.read_text().replace("weights: embedded", "weights: /nowhere/vit.safetensors"))
    assert_one_message(
        run("fedrt-silo", "run", "-c", config),
        78,
        "model.weights: file '/nowhere/vit.safetensors' does not exist; copy the weights there or correct the path",
    )


def test_everything_that_is_missing_is_listed(federation: Federation, tmp_path: Path):
    config = federation.silo_yaml("north")
    text = config.read_text().replace("weights: embedded", "weights: /nowhere/vit.safetensors")
    config.write_text(text.replace(f"root: {tmp_path}/data", "root: /nowhere/data"))
    done = run("fedrt-silo", "run", "-c", config)
    assert done.returncode == 78
    assert "model.weights: file '/nowhere/vit.safetensors' does not exist" in done.stderr
    assert "data.root: directory '/nowhere/data' does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["check-config", "run"])
def test_an_expired_certificate_ends_with_77(federation: Federation, tmp_path: Path, command: str):
    then = datetime.now(UTC) - timedelta(days=2)
    prepare(tmp_path / "old", Plan("test", ("north",), life=timedelta(hours=1)), then)
    config = federation.silo_yaml("north", identity=tmp_path / "old/silos/north")
    done = run("fedrt-silo", command, "-c", config)
    assert_one_message(done, 77, "certificate of silo 'north' expired", "ask the federation operator")


def test_a_certificate_of_another_role_ends_with_77(federation: Federation, tmp_path: Path):
    config = federation.silo_yaml("north", identity=tmp_path / "certs/operators/alice")
    assert_one_message(run("fedrt-silo", "run", "-c", config), 77, "the role 'silo' is needed")


def test_a_state_directory_in_use_ends_with_78(federation: Federation, tmp_path: Path):
    lock = DirectoryLock(tmp_path / "silo-north")
    done = run("fedrt-silo", "run", "-c", federation.silo_yaml("north"))
    lock.release()
    assert_one_message(done, 78, f"state_directory '{tmp_path}/silo-north' is in use by another running daemon")


def test_a_metrics_port_in_use_ends_with_78(federation: Federation):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = federation.silo_yaml("north", f"metrics: {{listen: '127.0.0.1:{port}'}}\n")
        done = run("fedrt-silo", "run", "-c", config)
    assert_one_message(done, 78, f"metrics.listen: port {port} on '127.0.0.1' is in use")


async def test_a_damaged_result_in_the_spool_does_not_keep_the_daemon_from_starting(
    federation: Federation, tmp_path: Path
):
    spool = tmp_path / "silo-north" / "spool"
    spool.mkdir(mode=0o700, parents=True)
    (tmp_path / "silo-north").chmod(0o700)
    (spool / "x.safetensors").write_bytes(b"not one")
    async with federation.started({}):
        with instant_silo(tmp_path, federation.silo_yaml("north")) as manager:
            await asyncio.to_thread(manager.hear, "READY=1")
            manager.signal(signal.SIGTERM)
            assert await asyncio.to_thread(manager.end) == 0
        assert "damaged result set aside" in manager.stderr
    assert [path.name for path in spool.iterdir()] == ["x.safetensors.damaged"]


async def test_departures_show_what_left_the_building(federation: Federation, tmp_path: Path):
    async with federation.started({"north": FakeWorker()}):
        await federation.create("shown", make_spec(2, ("north",)))
        await federation.finish("shown")
    config = tmp_path / "north.yaml"
    shown = run("fedrt-silo", "departures", "-c", config).stdout.splitlines()
    assert "message Hello: 1" in shown
    assert "message TaskReply: 3" in shown
    assert "message TaskResult: 3" in shown
    assert "message PayloadChunk: 2" in shown
    assert "tensor context FLOAT32 [16, 512]: 2 times, 65536 bytes" in shown
    assert len([line for line in shown if line.startswith("tensor ")]) == 1
    lines = [json.loads(line) for line in run("fedrt-silo", "departures", "--json", "-c", config).stdout.splitlines()]
    assert [line["message"] for line in lines if line["message"] == "PayloadChunk"] == ["PayloadChunk"] * 2


def test_departures_of_a_silo_that_never_ran_are_empty(federation: Federation):
    done = run("fedrt-silo", "departures", "-c", federation.silo_yaml("north"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- its life


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_is_ready_once_connected_and_ends_cleanly(
    federation: Federation, tmp_path: Path, number: signal.Signals
):
    federation.start_coordinator()
    with instant_silo(tmp_path, federation.silo_yaml("north")) as manager:
        ready = await asyncio.to_thread(manager.hear, "READY=1")
        assert f"STATUS=connected to localhost:{federation.port}" in ready
        watch = Watch(federation)
        await watch.until(connected("north"))
        manager.signal(number)
        await asyncio.to_thread(manager.hear, "STOPPING=1")
        assert await asyncio.to_thread(manager.end) == 0
        assert manager.stderr == ""
        await watch.until(gone("north"))
    await federation.stop()


def test_it_can_be_stopped_while_the_coordinator_is_away(federation: Federation, tmp_path: Path):
    with instant_silo(tmp_path, federation.silo_yaml("north")) as manager:
        manager.hear("STATUS=loading the model")
        manager.signal(signal.SIGTERM)
        manager.hear("STOPPING=1")
        assert manager.end() == 0
        assert "Traceback" not in manager.stderr


async def test_the_older_of_two_daemons_with_one_identity_ends_with_77(federation: Federation, tmp_path: Path):
    federation.start_coordinator()
    with instant_silo(tmp_path, federation.silo_yaml("north")) as manager:
        await asyncio.to_thread(manager.hear, "READY=1")
        federation.start_silo("double", FakeWorker(), identity=tmp_path / "certs/silos/north")
        assert await asyncio.to_thread(manager.end) == 77
        assert manager.stderr == (
            "error: a newer session of this silo has replaced this one: another daemon runs with this silo's identity; "
            "stop one of the two\n"
        )
    await federation.stop()


async def test_a_silo_that_is_killed_again_and_again_loses_nothing(federation: Federation, tmp_path: Path):
    federation.start_coordinator()
    federation.start_silo("south", FakeWorker())
    config = federation.silo_yaml("north")
    rounds = 40
    await federation.create("killed", make_spec(rounds, ("north", "south")))
    watch = Watch(federation)
    for number in (3, 11, None):
        with instant_silo(tmp_path, config) as manager:
            if number is None:
                experiment, _ = await federation.finish("killed")
            else:
                await watch.until(
                    lambda event: event.HasField("round_closed") and event.round_closed.round_number >= number  # noqa: B023
                )
                manager.signal(signal.SIGKILL)
                await asyncio.to_thread(manager.end)
            assert manager.stderr == ""
    exported = (await federation.export("killed"))["context"]
    await federation.stop()
    assert experiment.state == State.STATE_SUCCEEDED
    assert np.abs(exported - rounds).max() < 0.2  # the initial draw has a standard deviation of 0.02


async def test_its_metrics_answer_and_move(federation: Federation, tmp_path: Path):
    port = free_port()

    def metrics() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    federation.start_coordinator()
    federation.start_silo("north", FakeWorker(), f"metrics: {{listen: '127.0.0.1:{port}'}}\n")
    await Watch(federation).until(connected("north"))
    before = await asyncio.to_thread(metrics)
    await federation.create("measured", make_spec(2, ("north",)))
    await federation.finish("measured")
    after = await asyncio.to_thread(metrics)
    await federation.stop()
    assert before["fedrt_silo_connected"] == 1
    assert after['fedrt_silo_tasks_total{kind="train",outcome="succeeded"}'] == 2
    assert after['fedrt_silo_tasks_total{kind="evaluate",outcome="succeeded"}'] == 1
    assert after['fedrt_silo_payload_bytes_total{direction="out"}'] == 2 * 32768
    assert after['fedrt_silo_payload_bytes_total{direction="in"}'] == 3 * 32768
    assert after['fedrt_silo_work_duration_seconds_count{kind="train"}'] == 2
    assert before['fedrt_silo_tasks_total{kind="train",outcome="succeeded"}'] == 0


async def test_the_real_daemon_with_its_worker_serves_and_leaves_no_process_behind(
    federation: Federation, tmp_path: Path
):
    write_images(tmp_path / "data", {"cat": 3, "dog": 3})
    federation.start_coordinator()
    with managed(tmp_path, SCRIPTS / "fedrt-silo", "run", "-c", federation.silo_yaml("north")) as manager:
        await asyncio.to_thread(manager.hear, "READY=1")
        children = psutil.Process(manager.process.pid).children(recursive=True)
        assert len(children) == 1
        manager.signal(signal.SIGTERM)
        await asyncio.to_thread(manager.hear, "STOPPING=1")
        assert await asyncio.to_thread(manager.end) == 0
        assert manager.stderr == ""
        assert not any(child.is_running() for child in children)
    await federation.stop()
