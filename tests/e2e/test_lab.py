"""fedrt-lab as one uses it: a grid run to its end, a failing cell, a run killed and resumed, a report without a run."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from fedrt.admin_client import LocalSocket, UnreachableError, connect
from fedrt.ctl_progress import closed_round
from fedrt.locking import DirectoryLock
from silo.lab.measurements import Measurement, read_csv

LAB_SCRIPT = Path(sys.executable).parent / "fedrt-lab"
LIMIT = 100.0
LAB = """\
lab: trial
directory: results
model: {architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}
data:
  world: {scanners: [coarse, interlaced], classes: 8, train_images: 4, test_images: 3}
training: {batch_size: 8, optimizer: {name: adamw, learning_rate: 0.01, weight_decay: 0.0}}
rounds: {count: 5, retries: 0}
evaluation: {every: 5}
settings:
  drawn:
    partition: {kind: dirichlet, silos: 3, beta: 1.0, min_images: 4}
methods:
  promptfl:
    method: {name: promptfl, context_length: 4}
  broken:
    method: {name: promptfl, context_length: 4}
    training: {optimizer: {learning_rate: 1.0e+30}}
  promptfolio:
    method: {name: promptfolio, context_length: 4}
    rounds: {count: 30}
seeds: [1, 2]
"""


class Lab:
    """A lab.yaml of its own, and the processes that commands on it start."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.file = directory / "lab.yaml"
        self.file.write_text(LAB)
        self.results = directory / "results"

    def command(self, name: str, *arguments: str) -> list[str]:
        return [str(LAB_SCRIPT), name, str(self.file), *arguments]

    def call(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(name, *arguments),
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
            env=environment(),
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    @contextlib.contextmanager
    def started(self, name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            self.command(name, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        try:
            yield process
        finally:
            process.terminate()  # in order, so that no sockets are left beside the test's directory
            process.communicate(timeout=LIMIT)

    def cells(self) -> dict[str, dict[str, object]]:
        return {
            path.stem.rpartition("-")[0]: json.loads(path.read_bytes()) for path in self.results.glob("cells/*.json")
        }

    def measurements(self, method: str) -> list[Measurement]:
        return [row for row in read_csv(self.results / "results.csv") if row.method == method]

    def processes(self) -> list[psutil.Process]:
        """All that were started for this lab: their command lines name its directory, or those of their parents do."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(str(self.results) in word for one in (process, *process.parents()) for word in one.cmdline()):
                    found.append(process)
        return found

    def assert_nothing_is_left(self) -> None:
        until(lambda: not self.processes(), 10.0)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def until(condition: Callable[[], object], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, subprocess.CompletedProcess[str]]:
    lab = Lab(tmp_path_factory.mktemp("lab") / "undisturbed")
    return lab, lab.call("run", "--jobs", "2")


def test_a_grid_is_run_to_its_end(undisturbed: tuple[Lab, subprocess.CompletedProcess[str]]) -> None:
    lab, done = undisturbed
    assert sorted(lab.cells()) == [
        "drawn-promptfl-s1",
        "drawn-promptfl-s2",
        "drawn-promptfolio-s1",
        "drawn-promptfolio-s2",
    ]
    for name in (
        "results.csv",
        "summary.md",
        *(f"figures/drawn-{each}.png" for each in ("curves", "last-round", "holdings")),
    ):
        assert (lab.results / name).stat().st_size > 500
    assert done.stdout.count(": accuracy ") == 4
    lab.assert_nothing_is_left()
    for log in lab.results.glob("work/*/logs/*.log"):
        assert "Traceback" not in log.read_text()


def test_every_silo_is_measured_on_its_own_images_after_the_last_round(
    undisturbed: tuple[Lab, subprocess.CompletedProcess[str]],
) -> None:
    lab, _ = undisturbed
    accuracies = {
        (row.seed, row.round, row.silo): row.examples
        for row in lab.measurements("promptfl")
        if (row.split, row.measure) == ("personal", "accuracy")
    }
    silos = ("silo-01", "silo-02", "silo-03")
    assert set(accuracies) == {(seed, number, silo) for seed in (1, 2) for number in (0, 5) for silo in silos}
    for seed in (1, 2):
        assert sum(accuracies[seed, 5, silo] for silo in silos) == 2 * 8 * 3  # scanners, classes, test images
    trained = {(row.round, row.silo) for row in lab.measurements("promptfl") if row.split == "train"}
    assert trained == {(number, silo) for number in range(1, 6) for silo in silos}


def test_a_cell_that_fails_is_told_with_its_reason_and_the_others_go_on(
    undisturbed: tuple[Lab, subprocess.CompletedProcess[str]],
) -> None:
    lab, done = undisturbed
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.partition(" failed: ")[0].rpartition("-")[0] for line in errors] == [
        "error: cell 'drawn-broken-s1",
        "error: cell 'drawn-broken-s2",
    ]
    assert all("round 1 (train)" in line and "finite" in line for line in errors)
    assert "Not finished: drawn/broken, seed 1; drawn/broken, seed 2." in (lab.results / "summary.md").read_text()


def test_a_report_is_written_again_from_what_is_finished(
    undisturbed: tuple[Lab, subprocess.CompletedProcess[str]],
) -> None:
    lab, _ = undisturbed
    written = {name: (lab.results / name).read_bytes() for name in ("results.csv", "summary.md")}
    before = {path: path.stat().st_mtime_ns for path in lab.results.glob("work/**/*.log")}
    for path in (*lab.results.glob("figures/*.png"), *map(lab.results.joinpath, written)):
        path.unlink()
    done = lab.call("report")
    assert (done.returncode, done.stderr) == (0, "")
    assert {name: (lab.results / name).read_bytes() for name in written} == written
    assert len(list(lab.results.glob("figures/*.png"))) == 3
    assert {path: path.stat().st_mtime_ns for path in lab.results.glob("work/**/*.log")} == before


def test_a_cell_is_run_anew_when_asked_for_and_only_fetched_where_its_file_is_gone(
    undisturbed: tuple[Lab, subprocess.CompletedProcess[str]],
) -> None:
    lab, _ = undisturbed
    before = lab.cells()["drawn-promptfl-s1"]
    (path,) = lab.results.glob("cells/drawn-promptfl-s1-*.json")

    def run(*arguments: str) -> dict[str, Any]:
        assert lab.call("run", "--only", "drawn/promptfl", *arguments).returncode == 0
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found

    path.unlink()
    assert run() == before
    path.write_text("damaged")
    anew = run("--again", "drawn/promptfl")
    assert anew["experiment"]["experiment"] == f"{path.stem}-2"
    path.write_text(json.dumps(anew | {"method_digest": "of other code"}))
    assert run() == anew, "the experiment was run with the code of now"
    (attempt,) = lab.results.glob(f"work/drawn-s1-*/attempts/{path.name}")
    attempt.write_text(json.dumps(json.loads(attempt.read_bytes()) | {"method_digest": "of other code"}))
    path.write_text(json.dumps(anew | {"method_digest": "of other code"}))
    assert run()["experiment"]["experiment"] == f"{path.stem}-3"


async def trained(socket: Path, name: str) -> list[float]:
    """How long each training round of an experiment that has closed took, as the coordinator tells it."""
    async with connect(LocalSocket(socket)) as client:
        for experiment in await client.list_all():
            if experiment.experiment_id.startswith(name):
                closed = [
                    closed_round(event.round_closed)
                    for event in await client.history(experiment)
                    if event.WhichOneof("kind") == "round_closed"
                ]
                return [one.duration for one in closed if one.kind.value == "train"]
    return []


def rounds_so_far(lab: Lab, seed: int, name: str) -> list[float]:
    """The training rounds of an experiment that have closed by now; none while its coordinator does not answer."""
    for path in lab.results.glob(f"work/drawn-s{seed}-*/coordinator.yaml"):
        with contextlib.suppress(UnreachableError):
            socket = Path(yaml.safe_load(path.read_text())["admin_socket"])
            return asyncio.run(trained(socket, f"drawn-{name}-s{seed}"))
    return []


def test_a_lab_that_was_killed_goes_on_in_the_same_experiment_and_so_does_one_whose_host_dies(
    tmp_path: Path, undisturbed: tuple[Lab, subprocess.CompletedProcess[str]]
) -> None:
    lab, only = Lab(tmp_path / "killed"), ("--only", "drawn/promptf*")
    seen: list[float] = []

    def is_in_the_middle_of(seed: int) -> bool:
        """The first cell is finished, and the second has closed two of its thirty rounds."""
        seen[:] = rounds_so_far(lab, seed, "promptfolio")
        return len(seen) >= 2

    with lab.started("run", *only) as process:
        until(lambda: is_in_the_middle_of(1))
        assert len(lab.processes()) >= 3  # coordinator, host and its worker
        process.send_signal(signal.SIGKILL)
        process.wait()
        lab.assert_nothing_is_left()
    assert sorted(lab.cells()) == ["drawn-promptfl-s1"]
    before_the_kill = list(seen)
    assert len(before_the_kill) < 30
    finished = {path: path.stat().st_mtime_ns for path in lab.results.glob("cells/*.json")}

    with lab.started("run", *only) as process:
        until(lambda: is_in_the_middle_of(2))
        (host,) = (one for one in lab.processes() if "host" in one.cmdline())
        host.kill()
        text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, text
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished cell is not run again"
    for seed, kept in ((1, before_the_kill), (2, seen)):
        rounds = lab.cells()[f"drawn-promptfolio-s{seed}"]["rounds"]
        assert isinstance(rounds, list)
        durations = [each["duration_seconds"] for each in rounds if each["task"] == "train"]
        assert len(durations) == 30
        assert durations[: len(kept)] == [round(seconds, 3) for seconds in kept], "these rounds were not run again"
    for method in ("promptfl", "promptfolio"):
        assert lab.measurements(method) == undisturbed[0].measurements(method)
    lab.assert_nothing_is_left()


def test_a_federation_that_cannot_start_fails_its_cells_with_the_end_of_the_log(
    undisturbed: tuple[Lab, subprocess.CompletedProcess[str]],
) -> None:
    lab, _ = undisturbed
    (cell,) = lab.results.glob("cells/drawn-promptfl-s1-*.json")
    kept = cell.read_bytes()
    cell.unlink()
    (state,) = lab.results.glob("work/drawn-s1-*/state/host")
    lock = DirectoryLock(state)
    done = lab.call("run", "--only", "drawn/promptfl")
    lock.release()
    cell.write_bytes(kept)
    assert done.returncode == 1
    assert f"error: cell {cell.stem!r} failed: host ended with exit code 78" in done.stderr
    assert "is in use by another running daemon" in done.stderr
    lab.assert_nothing_is_left()


def test_an_interrupted_lab_ends_in_order(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "interrupted")
    with lab.started("run", "--jobs", "2") as process:
        until(lambda: len(list(lab.results.glob("work/*/host.yaml"))) == 2)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGINT
    assert "ended by SIGINT; no process is left" in text
    assert "Traceback" not in text
    lab.assert_nothing_is_left()


def test_two_labs_do_not_share_a_directory(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "shared")
    with lab.started("run"):
        until((lab.results / "lock").exists)
        until(lambda: "another fedrt-lab runs in" in lab.call("run").stderr)
    lab.assert_nothing_is_left()
