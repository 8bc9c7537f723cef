"""What a silo survives: black holes, a second daemon with its identity, kills in the middle of an epoch, lost disks."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from fedrt.architectures import clip_dims
from fedrt.spec import (
    EvaluationSpec,
    ExperimentSpec,
    LocalSpec,
    ModelSpec,
    OptimizerName,
    OptimizerSpec,
    RoundsSpec,
    TrainingSpec,
)
from silo.clip import weights_sha256
from silo.sources import ModelSource
from tests.cli.processes import Manager, instant_silo, managed
from tests.fakes.black_hole import BlackHole
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker
from tests.integration.conftest import Logs
from tests.integration.following import State, Watch, connected

LIMIT = 120.0  # seconds that anything may take


async def until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    """For what announces itself nowhere."""
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# ---- black holes


@pytest.mark.parametrize("kind", ["no answer", "silence", "half a handshake"])
async def test_a_dial_into_a_black_hole_is_given_up_and_made_again(
    federation: Federation, logs: Logs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("silo.link.ANSWER_LIMIT", 1.0)
    federation.start_coordinator()
    async with federation.admin():
        pass  # it listens
    async with BlackHole(kind, federation.port).started() as hole:
        federation.dial_port = hole.port
        watch = Watch(federation)
        federation.start_silo("north", FakeWorker())

        def unanswered() -> int:
            return len([e for e in logs if e["event"] == "session lost" and "does not answer" in e["reason"]])

        await until(lambda: unanswered() >= 2)
        if kind != "no answer":
            assert hole.dialled >= 2
        await hole.mend()
        await watch.until(connected("north"), LIMIT)
        await federation.stop()


# ---- two daemons


async def test_of_two_daemons_with_one_identity_the_newer_serves_and_the_older_says_why_it_ends(
    federation: Federation,
) -> None:
    federation.start_coordinator()
    first = federation.silo_yaml("north")
    second = federation.directory / "north-copy.yaml"
    second.write_text(first.read_text().replace("/silo-north", "/silo-north-copy"))
    with instant_silo(federation.directory, first) as older:
        await asyncio.to_thread(older.hear, "READY=1")
        with instant_silo(federation.directory, second) as newer:
            await asyncio.to_thread(newer.hear, "READY=1")
            assert await asyncio.to_thread(older.end) == 77
            assert "another daemon runs with this silo's identity; stop one of the two" in older.stderr
            await federation.create("served", make_spec(2, ("north",)))
            assert (await federation.finish("served", LIMIT))[0].state == State.STATE_SUCCEEDED
            newer.signal(signal.SIGTERM)
            assert await asyncio.to_thread(newer.end) == 0
    await federation.stop()


# ---- what the service manager is told


async def test_the_status_of_the_service_says_since_when_there_is_no_session_and_why(federation: Federation) -> None:
    coordinator = federation.start_coordinator()
    with instant_silo(federation.directory, federation.silo_yaml("north")) as silo:

        async def next_status(beginning: str) -> str:
            while True:
                message = (await asyncio.to_thread(silo.socket.recv, 4096)).decode()
                silo.heard.append(message)
                if any(line.startswith(f"STATUS={beginning}") for line in message.split("\n")):
                    return message

        ready = await next_status("connected to localhost:")
        assert ready.startswith("READY=1\n")
        await coordinator.stop()
        assert " UTC: " in await next_status("not connected since ")
        federation.start_coordinator()
        assert "READY=1" not in await next_status("connected to localhost:")
        silo.signal(signal.SIGTERM)
        assert await asyncio.to_thread(silo.end) == 0
    await federation.stop()


# ---- a kill in the middle of an epoch


def spec() -> ExperimentSpec:
    digest = weights_sha256(ModelSource("fedrt-tiny", "embedded", "cpu"))
    dims = clip_dims("fedrt-tiny")
    model = ModelSpec("fedrt-tiny", digest, dims.context_dim, dims.feature_dim)
    training = TrainingSpec(3, 4, OptimizerSpec(OptimizerName.ADAMW, 0.01, 0.9, 0.01))
    local = LocalSpec("fedotp", '{"context_length":2}', model, ("blue square", "red triangle"), training, 2, seed=7)
    return ExperimentSpec(local, RoundsSpec(2, silos=("north",)), EvaluationSpec(0))


def draw(root: Path) -> None:
    noise = np.random.default_rng(3)
    for number in range(12):
        place = root / ("blue_square", "red_triangle")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), np.uint8)).save(place / f"{number}.png")


async def test_a_silo_killed_in_the_middle_of_a_task_goes_on_from_its_checkpoint_with_the_same_bits(
    federation: Federation,
) -> None:
    draw(federation.directory / "data")
    marker = federation.directory / "after-the-first-epoch"
    federation.start_coordinator()
    command = (sys.executable, "-m", "tests.fakes.held_silo", federation.silo_yaml("north"), marker)
    kept = federation.directory / "silo-north" / "checkpoints"
    with managed(federation.directory, *command) as silo:
        await asyncio.to_thread(silo.hear, "READY=1")
        await federation.create("disturbed", spec())
        await until(marker.exists)
        workers = psutil.Process(silo.process.pid).children()
        silo.signal(signal.SIGKILL)
        await asyncio.to_thread(silo.end)
        await until(lambda: not any(worker.is_running() for worker in workers))
        assert len(list(kept.iterdir())) == 1
    with managed(federation.directory, *command) as silo:
        assert (await federation.finish("disturbed", LIMIT))[0].state == State.STATE_SUCCEEDED
        assert "goes on from its checkpoint after 1 local epochs" in silo.stderr
        await federation.create("undisturbed", spec())
        assert (await federation.finish("undisturbed", LIMIT))[0].state == State.STATE_SUCCEEDED
        silo.signal(signal.SIGTERM)
        assert await asyncio.to_thread(silo.end) == 0
        assert silo.stderr.count("goes on from its checkpoint") == 1
    assert list(kept.iterdir()) == []
    found, expected = await federation.export("disturbed"), await federation.export("undisturbed")
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}
    vault = {p.parent.name.split("-")[0]: p for p in (kept.parent / "vault").glob("*/round-*2.safetensors")}
    assert vault["disturbed"].read_bytes() == vault["undisturbed"].read_bytes()
    await federation.stop()


# ---- a disk that is full, read-only or gone, for real


def mounts_work() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Disk:
    """A file system of one MiB that only a daemon sees, under its state directory."""

    def __init__(self, place: Path, manager: Manager) -> None:
        self.place = place
        self.seen = Path(f"/proc/{manager.process.pid}/root{place}")
        self.process_id = manager.process.pid

    def within(self, *command: object) -> None:
        """Run a command where the daemon's mounts are."""
        enter = ["nsenter", "--target", str(self.process_id), "--mount"]
        subprocess.run([*enter, *map(str, command)], check=True, capture_output=True)

    def spoil(self, how: str) -> None:
        match how:
            case "full":
                with contextlib.suppress(OSError), (self.seen / "filler").open("wb", buffering=0) as filler:
                    while filler.write(bytes(4096)):
                        pass
            case "read-only":
                for name in ("spool", "vault"):
                    self.within("mount", "--bind", self.place / name, self.place / name)
                    self.within("mount", "-o", "remount,bind,ro", self.place / name)
            case "gone":
                self.within("mount", "--move", self.place, f"{self.place}-elsewhere")

    def mend(self, how: str) -> None:
        match how:
            case "full":
                (self.seen / "filler").unlink()
            case "read-only":
                for name in ("spool", "vault"):
                    self.within("umount", self.place / name)
            case "gone":
                self.within("mount", "--move", f"{self.place}-elsewhere", self.place)


@pytest.mark.skipif(not mounts_work(), reason="needs root and mount namespaces")
@pytest.mark.parametrize(
    ("how", "reason", "complaint"),
    [
        ("full", "the disk is full", "nothing is sent until the disk accepts writes"),
        ("read-only", "is read-only", "nothing is sent until the disk accepts writes"),
        ("gone", "silo-north/vault' is gone", "work waits until private tensors can be read"),
    ],
)
async def test_a_lost_disk_holds_work_or_results_back_and_its_return_needs_no_restart(
    federation: Federation, how: str, reason: str, complaint: str
) -> None:
    federation.start_coordinator()
    config = federation.silo_yaml("north")
    place = federation.directory / "silo-north"
    for directory in (place, Path(f"{place}-elsewhere")):
        directory.mkdir(mode=0o700)
    script = 'mount -t tmpfs -o size=1m,mode=700 none "$1" && shift && exec "$@"'
    daemon = (sys.executable, "-m", "tests.fakes.instant_silo", config)
    # a private tree: a mount below a shared one cannot be moved
    command = ("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", place, *daemon)
    with managed(federation.directory, *command) as silo:
        await asyncio.to_thread(silo.hear, "READY=1")
        disk = Disk(place, silo)
        disk.spoil(how)
        await federation.create("cramped", make_spec(3, ("north",)))
        await until(lambda: complaint in silo.stderr)
        assert reason in silo.stderr
        assert (await federation.experiment("cramped")).state == State.STATE_RUNNING
        disk.mend(how)
        assert (await federation.finish("cramped", LIMIT))[0].state == State.STATE_SUCCEEDED
        silo.signal(signal.SIGTERM)
        assert await asyncio.to_thread(silo.end) == 0
    assert silo.stderr.count(complaint) == 1
    await federation.stop()
