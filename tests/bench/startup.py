"""Seconds from `fedrt-coordinator run` to the first accepted result, with three enrolled silos that train for real.

Cold: coordinator and silos start at the same moment; the silos import torch and load the embedded CLIP. Warm: the silos
have been running and dialling for a while, as after a restart of the coordinator. All are processes of their own,
started through their console scripts. Prints JSON.

    python -m tests.bench.startup
"""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import grpc

from fedrt.architectures import clip_dims
from fedrt.log import configure_logging
from fedrt.spec import EvaluationSpec, ExperimentSpec, LocalSpec, ModelSpec, RoundsSpec, TrainingSpec
from fedrt.statefile import write_atomic
from silo.clip import weights_sha256
from silo.embedded.datasets import world_class_names, write_world_hospitals
from silo.sources import ModelSource
from tests.fakes.federation import Federation, free_port

SILOS = ("north", "south", "west")
SCRIPTS = Path(sys.executable).parent
ACCEPTED = re.compile(r'results_total\{verdict="accepted"\} ([0-9.]+)')


def spec() -> ExperimentSpec:
    dims = clip_dims("fedrt-tiny")
    digest = weights_sha256(ModelSource("fedrt-tiny", "embedded"))
    model = ModelSpec("fedrt-tiny", digest, dims.context_dim, dims.feature_dim)
    local = LocalSpec("promptfl", '{"context_length":4}', model, world_class_names(), TrainingSpec(), 1)
    return ExperimentSpec(local, RoundsSpec(1, silos=SILOS), EvaluationSpec(0))


def silo_yaml(federation: Federation, name: str, root: Path) -> Path:
    path = federation.silo_yaml(name)
    text = path.read_text().replace("weights: embedded", "weights: embedded, threads: 1")
    write_atomic(path, re.sub(r"root: [^,]+,", f"root: {root},", text).encode())
    return path


def accepted(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as response:
            found = ACCEPTED.search(response.read().decode())
            return found is not None and float(found.group(1)) > 0
    except OSError:
        return False


async def first_result(directory: Path, warm: bool) -> float:
    federation = Federation(directory / "f", SILOS)
    hospitals = write_world_hospitals(directory / "data", seed=1, train_count=160, test_count=160)
    metrics = free_port()
    config = federation.coordinator_yaml(f"metrics: {{listen: '127.0.0.1:{metrics}'}}\n")
    yamls = [silo_yaml(federation, name, hospital.root) for name, hospital in zip(SILOS, hospitals, strict=True)]
    silos = [[SCRIPTS / "fedrt-silo", "run", "-c", path] for path in yamls]
    processes = [subprocess.Popen(command) for command in silos] if warm else []  # noqa: ASYNC220
    await asyncio.sleep(30 if warm else 0)
    start = time.perf_counter()
    processes.append(subprocess.Popen([SCRIPTS / "fedrt-coordinator", "run", "-c", config]))  # noqa: ASYNC220
    processes += [] if warm else [subprocess.Popen(command) for command in silos]  # noqa: ASYNC220
    try:
        while True:
            try:
                await federation.create("first", spec())
                break
            except (grpc.aio.AioRpcError, TimeoutError):
                await asyncio.sleep(0.05)
        async with asyncio.timeout(120):
            while not await asyncio.to_thread(accepted, metrics):  # noqa: ASYNC110  # another process tells
                await asyncio.sleep(0.02)
        return time.perf_counter() - start
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)


async def main() -> None:
    configure_logging("error", "console")
    seconds = {}
    for name, warm in (("cold", False), ("warm", True)):
        with tempfile.TemporaryDirectory() as directory:
            seconds[name] = round(await first_result(Path(directory), warm), 2)
    print(json.dumps({"benchmark": "startup", "silos": len(SILOS), "seconds_to_first_accepted_result": seconds}))


if __name__ == "__main__":
    asyncio.run(main())
