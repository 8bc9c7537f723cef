"""Seconds per round, start-up and memory of a host of many virtual silos. Prints JSON.

The coordinator is a process of its own with its durable store; the host is another one, and each of its virtual silos
has its own certificate, TLS connection, spool and session. Three kinds of work: `instant` is answered in the host's
process and `child` by a child process that does nothing, which adds what goes between the two; `tiny` is training
fedrt-tiny for real, two steps of 8 images, in the real child.

    python -m tests.bench.hosted_rounds --silos 10 100
    python -m tests.bench.hosted_rounds --silos 10 --work instant --rounds 200
"""

import argparse
import asyncio
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from fedrt.architectures import clip_dims
from fedrt.log import configure_logging
from fedrt.spec import EvaluationSpec, ExperimentSpec, LocalSpec, ModelSpec, RoundsSpec, TrainingSpec
from silo.clip import weights_sha256
from silo.embedded.datasets import WORLD_PAIRS, Split, world_class_names, write_world_folder
from silo.sources import ModelSource
from tests.bench.round_overhead import closing_times, peak_mib, start_coordinator
from tests.fakes.federation import make_spec
from tests.silo.host.hosted import HostedFederation, command

IMAGES = 16  # training images of a silo, two batches
CLASSES = 8
SCRIPTS = Path(sys.executable).parent


def silo_names(count: int) -> tuple[str, ...]:
    width = max(2, len(str(count)))
    return tuple(f"silo-{number:0{width}d}" for number in range(1, count + 1))


def tiny_spec(rounds: int) -> ExperimentSpec:
    dims, digest = clip_dims("fedrt-tiny"), weights_sha256(ModelSource("fedrt-tiny", "embedded"))
    model = ModelSpec("fedrt-tiny", digest, dims.context_dim, dims.feature_dim)
    classes = world_class_names(WORLD_PAIRS[:CLASSES])
    local = LocalSpec("promptfl", '{"context_length":4}', model, classes, TrainingSpec(batch_size=8), rounds)
    return ExperimentSpec(local, RoundsSpec(rounds), EvaluationSpec(0))


def draw_images(root: Path, silo_count: int) -> None:
    pairs = WORLD_PAIRS[:CLASSES]
    for split, count in ((Split.TRAIN, IMAGES * silo_count), (Split.TEST, 2 * silo_count)):
        write_world_folder(root, "clean", dict.fromkeys(pairs, -(-count // CLASSES)), split, 1)


class Host:
    """The host's process and what it tells the service manager, with the time."""

    def __init__(self, federation: HostedFederation, work: str) -> None:
        if work == "tiny":
            draw_images(federation.directory / "images", len(federation.silos))
        model = "{architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}"
        config = federation.host_yaml(model=model)
        commands = {
            "instant": [*command(config), "--instant"],
            "child": command(config),
            "tiny": [SCRIPTS / "fedrt-silo", "host", "--config", config],
        }
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notices.bind(str(federation.directory / "notify"))
        self.notices.settimeout(120)
        self.began = time.perf_counter()
        environment = os.environ | {"NOTIFY_SOCKET": str(federation.directory / "notify"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(list(map(str, commands[work])), env=environment)

    def seconds_until(self, word: str) -> float:
        while word not in self.notices.recv(4096).decode():
            pass
        return time.perf_counter() - self.began

    def peaks(self) -> dict[str, float]:
        """Peak memory in MiB."""
        peaks = {"host_peak_mib": round(peak_mib(self.process.pid), 1)}
        if children := psutil.Process(self.process.pid).children():
            peaks["child_peak_mib"] = round(peak_mib(children[0].pid), 1)
        return peaks

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def end(self) -> None:
        self.notices.close()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.process.kill()
        self.process.wait()


async def measure(work: str, silo_count: int, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        federation = HostedFederation(Path(directory) / "f", silo_names(silo_count))
        coordinator = start_coordinator(federation)
        host = None
        try:
            async with federation.admin():
                pass
            host = Host(federation, work)
            loaded = await asyncio.to_thread(host.seconds_until, "STATUS=connecting")
            ready = await asyncio.to_thread(host.seconds_until, "READY=1")
            used = host.cpu_seconds()
            await federation.create("bench", tiny_spec(rounds) if work == "tiny" else make_spec(rounds))
            times = [event async for event in closing_times(federation)]
            used = host.cpu_seconds() - used
            gaps = [after - before for before, after in itertools.pairwise(times[1:])]
            peaks = {**host.peaks(), "coordinator_peak_mib": round(peak_mib(coordinator.pid), 1)}
        finally:
            if host is not None:
                host.end()
            coordinator.terminate()
            coordinator.wait(20)
    return {
        "work": work,
        "silos": silo_count,
        "rounds": len(gaps),
        "median_seconds": round(statistics.median(gaps), 4),
        "worst_seconds": round(max(gaps), 4),
        "host_cpu_ms_per_task": round(1000 * used / (silo_count * (rounds + 1)), 2),
        "seconds_to_open_all_sessions": round(ready - loaded, 2),
        "seconds_from_start_to_ready": round(ready, 2),
        **peaks,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--work", nargs="+", default=["instant", "child", "tiny"])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    configure_logging("error", "console")
    results = [await measure(work, count, options.rounds) for count in options.silos for work in options.work]
    print(json.dumps({"benchmark": "hosted_rounds", "results": results}, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
