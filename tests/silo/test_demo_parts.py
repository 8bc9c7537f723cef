"""The parts of the demo that can be tried without running it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from coordinator.config import load_coordinator_config
from fedrt.errors import ConfigurationError
from fedrt.experiment_file import load_experiment
from fedrt.tensors import Scope, TensorSpec
from silo.config import load_silo_config
from silo.demo import launch, processes
from silo.demo.departed import add_up, objections
from silo.demo.directory import open_directory, write_daemon_files, write_experiment_files
from silo.demo.hospitals import SILOS
from silo.demo.processes import DemoError, Processes, script
from silo.demo.recipes import make_recipe

NOTIFY = """
import os, socket, sys, time
channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
channel.sendto(sys.argv[1].encode(), os.environ["NOTIFY_SOCKET"])
time.sleep(60)
"""
SPECS = (TensorSpec("context", (2, 3), Scope.SHARED), TensorSpec("own", (2, 3), Scope.PRIVATE))


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def running(path: Path) -> Processes:
    return Processes(path / "logs", path / "sockets")


# ---- processes


async def test_a_daemon_says_that_it_is_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as group:
        number = await group.start("a", *python(NOTIFY, "READY=1\nSTATUS=at your service"))
        assert await group.ready("a") == "at your service"
        assert os.getsid(number) == number != os.getsid(0)
    assert not psutil.pid_exists(number)
    assert not (tmp_path / "sockets").exists()


async def test_a_daemon_that_is_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "READY_LIMIT", 1.0)
    async with running(tmp_path) as group:
        await group.start("a", *python(NOTIFY, "STATUS=loading the model"))
        with pytest.raises(DemoError, match=r"a was not ready after 1 seconds \(it last said: loading the model\)"):
            await group.ready("a")


async def test_the_death_of_a_daemon_ends_the_work_with_its_last_words(tmp_path: Path) -> None:
    async with running(tmp_path) as group:
        await group.start("a", *python("import sys; sys.exit('port in use')"))
        with pytest.raises(DemoError, match=r"a ended with exit code 1; the end of '.*a.log':\n  \| port in use"):
            await group.guarding(asyncio.sleep(60))


async def test_a_death_explains_why_the_work_failed(tmp_path: Path) -> None:
    async def work() -> None:
        await asyncio.sleep(0.1)
        raise DemoError("the coordinator does not answer")

    async with running(tmp_path) as group:
        await group.start("a", *python("import time; time.sleep(0.3)"))
        with pytest.raises(DemoError, match="a ended with exit code 0"):
            await group.guarding(work())


async def test_work_that_fails_by_itself(tmp_path: Path) -> None:
    async def work() -> None:
        raise DemoError("no")

    async with running(tmp_path) as group:
        await group.start("a", *python("import time; time.sleep(60)"))
        with pytest.raises(DemoError, match=r"^no$"):
            await group.guarding(work())


async def test_calls(tmp_path: Path) -> None:
    async with running(tmp_path) as group:
        assert await group.call(*python("print('hello')")) == "hello\n"
        with pytest.raises(DemoError, match="failed with exit code 3: too bad"):
            await group.call(*python("import sys; print('too bad', file=sys.stderr); sys.exit(3)"))


async def test_a_cancelled_call_leaves_no_process(tmp_path: Path) -> None:
    async with running(tmp_path) as group:
        call = asyncio.create_task(group.call(*python("import time; time.sleep(60)")))
        await asyncio.sleep(0.5)
        children = psutil.Process().children()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


async def test_whoever_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_LIMIT", 0.3)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + NOTIFY
    async with running(tmp_path) as group:
        number = await group.start("a", *python(stubborn, "READY=1"))
        await group.ready("a")
    assert not psutil.pid_exists(number)


def test_a_script_that_is_not_installed() -> None:
    with pytest.raises(DemoError, match=r"pip install 'fedrt\[demo\]'"):
        script("fedrt-nothing")


def test_a_launched_program_dies_with_its_parent() -> None:
    code = (
        "import os, subprocess, sys, time\n"
        f"child = [sys.executable, {launch.__file__!r}, str(os.getpid()), sys.executable, '-c', "
        "'import time; time.sleep(60)']\n"
        "print(subprocess.Popen(child, start_new_session=True).pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        number = int(parent.stdout.readline())
        _until(lambda: psutil.Process(number).cmdline()[-1:] == ["import time; time.sleep(60)"])
        os.kill(parent.pid, signal.SIGKILL)
    _until(lambda: not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE)


def test_a_launched_program_whose_parent_is_gone_already_does_not_start() -> None:
    done = subprocess.run(
        [sys.executable, launch.__file__, "1", "/bin/echo", "alive"], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


def _until(reached: object) -> None:
    assert callable(reached)
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- the directory


def test_a_directory_is_emptied_but_for_its_certificates(tmp_path: Path) -> None:
    layout, lock = open_directory(tmp_path / "demo")
    for path in ("certs/key.pem", "images/north/1.png", "summary.json"):
        (layout.root / path).parent.mkdir(parents=True, exist_ok=True)
        (layout.root / path).touch()
    (layout.root / "link").symlink_to(tmp_path)
    lock.release()
    open_directory(layout.root)[1].release()
    assert sorted(os.listdir(layout.root)) == [".fedrt-demo", "certs", "lock"]
    assert (layout.root / "certs" / "key.pem").exists()


def test_two_demos_in_one_directory(tmp_path: Path) -> None:
    _, lock = open_directory(tmp_path / "demo")
    with pytest.raises(ConfigurationError, match="another demo runs in"):
        open_directory(tmp_path / "demo")
    lock.release()


def test_sockets_of_a_long_path_lie_elsewhere(tmp_path: Path) -> None:
    layout, lock = open_directory(tmp_path / ("d" * 100))
    sockets = layout.sockets()
    assert not sockets.is_relative_to(layout.root)
    assert layout.admin_socket(sockets).parent == sockets
    sockets.rmdir()
    lock.release()


@pytest.mark.parametrize("data", ["world", "digits"])
def test_the_files_are_what_daemons_and_fedrtctl_read(tmp_path: Path, data: str) -> None:
    layout, lock = open_directory(tmp_path / "demo")
    weights = tmp_path / "weights"
    weights.write_bytes(b"w")
    recipe = make_recipe(data, seed=3, rounds=7)
    write_daemon_files(layout, 7443, layout.root / "admin.sock")
    write_experiment_files(layout, recipe, weights)
    assert load_coordinator_config(layout.yaml("coordinator")).admin_socket == layout.root / "admin.sock"
    for silo in SILOS:
        config = load_silo_config(layout.yaml(silo))
        assert config.data.root == layout.images / silo
        assert config.state_directory == layout.departures(silo).parent
    name, spec = load_experiment(layout.yaml("promptfl"))
    assert (name, spec.rounds.count, spec.seed, spec.local.classes) == ("promptfl", 7, 3, recipe.classes)
    assert (spec.local.training.local_epochs, spec.rounds.silos) == (recipe.prompt.local_epochs, SILOS)
    assert load_experiment(layout.yaml("zeroshot"))[1].rounds.count == 0
    lock.release()


# ---- what left the building


def entry(name: str = "context", shape: tuple[int, ...] = (2, 3), kind: str = "FLOAT32", size: int = 24) -> str:
    tensor = {"name": name, "shape": shape, "type": kind, "bytes": size}
    return json.dumps({"message": "PayloadChunk", "count": 1, "tensors": [tensor]})


def found(*lines: str, received: int = 24) -> list[str]:
    return objections(add_up(map(json.loads, lines)), SPECS, received)


def test_what_may_leave() -> None:
    hello = json.dumps({"message": "Hello", "count": 1})
    result = json.dumps({"message": "TaskResult", "count": 1, "metrics": {"loss": 1.0}})
    assert found(hello, result, entry()) == []
    departed = add_up(map(json.loads, (hello, result, entry(), entry())))
    assert departed.messages == {"Hello": 1, "PayloadChunk": 2, "TaskResult": 1}
    assert (departed.tensors[0].times, departed.byte_count) == (2, 48)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (entry("own"), "tensor 'own', which is not shared"),
        (entry("image"), "tensor 'image', which is not shared"),
        (entry(shape=(3, 2)), "not as declared"),
        (entry(kind="INT64"), "not as declared"),
        (entry(size=25), "more or less than it holds"),
        (json.dumps({"message": "Image", "count": 1}), "messages of the unknown kind 'Image'"),
        (json.dumps({"message": "TaskResult", "count": 1, "metrics": {"labels": 1}}), "the unknown metric 'labels'"),
    ],
)
def test_what_must_not_leave(line: str, words: str) -> None:
    assert any(words in objection for objection in found(line))


def test_bytes_that_went_elsewhere() -> None:
    assert found(entry(), received=0) == ["24 bytes of tensors, of which the coordinator received 0"]
