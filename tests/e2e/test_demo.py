"""The demo as a user runs it: a short one to its end, and others that are interrupted at several moments."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

DEMO = Path(sys.executable).parent / "fedrt-demo"
SILOS = ("north", "south", "west")
LIMIT = 120.0  # seconds for whatever is awaited; these processes share few cores with others
MARK = "FEDRT_TEST_DEMO"


@dataclass
class Demo:
    """A running demo. All processes that descend from it are known by a mark in their environment."""

    directory: Path
    options: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.output = self.directory.parent / "output.txt"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [DEMO, "--directory", self.directory, "--images", "128", *self.options],
                env=os.environ | {MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def until(self, reached: Callable[[str], bool]) -> None:
        """Wait for a moment that can be told from the output."""
        deadline = time.monotonic() + LIMIT
        while not reached(self.text):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def daemon(self, name: str) -> psutil.Process:
        return next(
            process for process in self.processes() if str(self.directory / f"{name}.yaml") in process.cmdline()
        )

    def end(self) -> int:
        """Wait for its end; returns the exit code."""
        return self.process.wait(LIMIT)

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, [process.cmdline() for process in left]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    demos: list[Demo] = []

    def begin(*options: str) -> Demo:
        demos.append(Demo(tmp_path / "demo", options))
        return demos[-1]

    yield begin
    for demo in demos:
        for process in demo.processes():
            process.kill()
        demo.process.wait()


def test_a_short_demo(start: Callable[..., Demo]) -> None:
    demo = start("--rounds", "3", "--seed", "5")
    assert demo.end() == 0, demo.text
    demo.assert_nothing_is_left()
    summary = json.loads((demo.directory / "summary.json").read_text())
    assert summary["nothing_private_left"] is True
    assert (summary["seed"], summary["settings"]["rounds"], len(summary["classes"])) == (5, 3, 32)
    for silo in SILOS:
        _check_silo(demo.directory, silo, summary["silos"][silo])
    rounds = summary["experiments"]["promptfl"]["rounds"]
    assert [closed["round"] for closed in rounds if closed["task"] == "train"] == [1, 2, 3]
    assert all(set(closed["silos"]) == set(SILOS) and not closed["absent"] for closed in rounds)
    assert [closed["task"] for closed in summary["experiments"]["zeroshot"]["rounds"]] == ["evaluate"]
    assert summary["mean"]["federated_accuracy"] > summary["mean"]["zero_shot_accuracy"] > 0.2
    with safe_open(summary["prompt"], "np") as file:
        assert file.get_tensor("context").shape == (16, 96)
        assert (file.metadata()["experiment"], file.metadata()["round"]) == ("promptfl", "3")
    assert (demo.directory / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    for words in ("No image, no label, no private tensor.", "federated", "16 x 96 float32", "curves.png"):
        assert words in demo.text
    assert "Traceback" not in demo.text


def _check_silo(directory: Path, silo: str, found: dict[str, object]) -> None:
    images = directory / "images" / silo
    assert found["train_count"] == len(list((images / "train").glob("*/*.png"))) == 128
    assert found["test_count"] == len(list((images / "test").glob("*/*.png"))) == 128
    left = found["left_the_building"]
    assert isinstance(left, dict)
    assert left["objections"] == []
    (tensor,) = left["tensors"]
    assert tensor == {
        "name": "context",
        "shape": [16, 96],
        "element_type": "FLOAT32",
        "times": 3,
        "byte_count": 3 * 16 * 96 * 4,
    }
    assert left["messages"]["TaskResult"] == 1 + 4 + 3  # zero-shot, evaluations, training
    for log in (directory / "logs").glob("*.log"):
        assert "Traceback" not in log.read_text()


def _drawing_images(text: str) -> bool:
    return "coordinator" in text


def _loading_silos(text: str) -> bool:
    return "images" in text


def _in_a_round(text: str) -> bool:
    return "round 1 training" in text


@pytest.mark.parametrize(
    ("moment", "number"),
    [(_drawing_images, signal.SIGINT), (_loading_silos, signal.SIGTERM), (_in_a_round, signal.SIGINT)],
)
def test_interrupted(start: Callable[..., Demo], moment: Callable[[str], bool], number: signal.Signals) -> None:
    demo = start("--rounds", "500")
    demo.until(moment)
    assert len(demo.processes()) > 1
    os.killpg(demo.process.pid, number)  # as a terminal does: the whole foreground process group
    assert demo.end() == 128 + number, demo.text
    demo.assert_nothing_is_left()
    assert f"ended by {number.name}; no process is left" in demo.text
    assert "Traceback" not in demo.text


@pytest.mark.parametrize("moment", [_loading_silos, _in_a_round])
def test_killed(start: Callable[..., Demo], moment: Callable[[str], bool]) -> None:
    demo = start("--rounds", "500")
    demo.until(moment)
    demo.process.kill()
    demo.process.wait()
    demo.assert_nothing_is_left()


def test_a_daemon_that_dies_ends_the_demo_with_its_log(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.until(_loading_silos)
    demo.until(lambda text: any("west.yaml" in word for process in demo.processes() for word in process.cmdline()))
    demo.daemon("west").kill()
    assert demo.end() == 1
    demo.assert_nothing_is_left()
    assert f"error: west ended with exit code -9; the end of '{demo.directory}/logs/west.log'" in demo.text
    assert "Traceback" not in demo.text


def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    done = subprocess.run([DEMO, "--directory", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert done.stderr == (
        f"error: directory '{tmp_path}' holds files that are not the demo's; choose another one with --directory\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
