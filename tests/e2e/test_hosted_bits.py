"""The deployment is the simulator: virtual silos of one host end with the bits of daemons that hold the same images."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedrt.architectures import clip_dims
from fedrt.spec import (
    EvaluationSpec,
    EvaluationSplit,
    ExperimentSpec,
    LocalEvaluationSpec,
    LocalSpec,
    ModelSpec,
    OptimizerName,
    OptimizerSpec,
    RoundsSpec,
    TrainingSpec,
)
from fedrt.v1 import admin_service_pb2 as pb
from silo.clip import weights_sha256
from silo.embedded.datasets import WORLD_PAIRS, Split, write_world_folder
from silo.sources import ModelSource
from silo.vault import Vault
from tests.cli.processes import SCRIPTS, managed, run
from tests.integration.following import State
from tests.silo.host.hosted import HostedFederation, names

ROUNDS = 3
CLASSES = 8
MODEL = "{architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}"
DEAL = "{kind: dirichlet, silos: 3, beta: 0.5, min_images: 8, novel: half, seed: 5}"
LIMIT = 120.0  # seconds until a daemon has loaded CLIP; these processes share few cores with others


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("coordinator.app.configure_logging", lambda *settings: None)
    with capture_logs():
        yield


def spec_of(partition: Path) -> ExperimentSpec:
    """An experiment with shared and private tensors, for the classes that a partition has."""
    dealt = json.loads((partition / "partition.json").read_text())
    dims, digest = clip_dims("fedrt-tiny"), weights_sha256(ModelSource("fedrt-tiny", "embedded"))
    local = LocalSpec(
        "fedpgp",
        '{"context_length": 4, "rank": 2}',
        ModelSpec("fedrt-tiny", digest, dims.context_dim, dims.feature_dim),
        tuple(dealt["classes"]),
        TrainingSpec(2, 8, OptimizerSpec(OptimizerName.ADAMW, 0.01)),
        ROUNDS,
        LocalEvaluationSpec(
            (EvaluationSplit.PERSONAL, EvaluationSplit.BASE, EvaluationSplit.NOVEL), tuple(dealt["novel_classes"])
        ),
        seed=11,
    )
    return ExperimentSpec(local, RoundsSpec(ROUNDS, silos=names(3)), EvaluationSpec(1))


def silo_yaml(federation: HostedFederation, name: str, parts: Path) -> Path:
    path = federation.silo_yaml(name)
    data = f"{{root: {federation.directory}/images, layout: manifest, manifest: {parts}/{name}.csv}}"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("model:", "data:"))]
    path.write_text("\n".join([*lines, f"model: {MODEL}", f"data: {data}", ""]))
    return path


async def perform(federation: HostedFederation, name: str, spec: ExperimentSpec) -> tuple[object, list[object]]:
    """The shared tensors at the end, and all that each silo measured in each round."""
    await federation.create(name, spec)
    experiment, rounds = await federation.finish(name, LIMIT)
    assert (experiment.state, experiment.status_message) == (State.STATE_SUCCEEDED, "")
    shared = {key: array.tobytes() for key, array in (await federation.export(name)).items()}
    return shared, [measured(closed) for closed in rounds]


def measured(closed: pb.RoundClosed) -> object:
    parts = {part.silo_id: (part.example_count, dict(part.metrics)) for part in closed.contributions}
    return closed.round_number, closed.task_kind, dict(closed.metrics), parts


def private(state: Path, experiment: str) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in Vault(state / "vault").load(experiment, sys.maxsize).items()}


@contextlib.asynccontextmanager
async def daemons(directory: Path, *commands: list[object]) -> AsyncIterator[None]:
    """All ready, and ended in order."""
    with contextlib.ExitStack() as stack:
        managers = [stack.enter_context(managed(directory, *command)) for command in commands]
        for manager in managers:
            manager.socket.settimeout(LIMIT)
            await asyncio.to_thread(manager.hear, "READY=1")
        yield
        for manager in managers:
            manager.signal(signal.SIGTERM)
        for manager in managers:
            assert await asyncio.to_thread(manager.end) == 0
            assert manager.stderr == ""


async def test_a_host_and_separate_daemons_end_with_the_same_bits(tmp_path: Path) -> None:
    federation = HostedFederation(tmp_path)
    for split, count in ((Split.TRAIN, 9), (Split.TEST, 4)):
        write_world_folder(tmp_path / "images", "tinted", dict.fromkeys(WORLD_PAIRS[:CLASSES], count), split, seed=3)
    config, parts = federation.host_yaml(model=MODEL, partition=DEAL), tmp_path / "parts"
    done = run("fedrt-silo", "partition", "--config", config, "--to", parts)
    assert done.returncode == 0, done.stderr
    spec = spec_of(parts)
    federation.start_coordinator()
    try:
        async with daemons(tmp_path, [SCRIPTS / "fedrt-silo", "host", "--config", config]):
            hosted = await perform(federation, "hosted", spec)
        apart = [[SCRIPTS / "fedrt-silo", "run", "-c", silo_yaml(federation, name, parts)] for name in names(3)]
        async with daemons(tmp_path, *apart):
            separate = await perform(federation, "separate", spec)
    finally:
        await federation.stop()
    assert hosted == separate
    for manifest in parts.iterdir():
        assert manifest.read_bytes() == (federation.state / "partition" / manifest.name).read_bytes()
    shared, rounds = hosted
    assert set(shared) == {"shared_context"}
    assert len(rounds) == 1 + 2 * ROUNDS
    *_, metrics, by_silo = rounds[-1]
    assert {"accuracy", "base_accuracy", "novel_accuracy"} <= set(metrics)
    assert len({counts for counts, _ in by_silo.values()}) > 1  # an uneven deal, so that a mix-up would show
    for name in names(3):
        own = private(federation.silo_directory(name), "hosted")
        assert set(own) == {"left", "right"}
        assert own == private(tmp_path / f"silo-{name}", "separate")
    assert len({private(federation.silo_directory(name), "hosted")["left"] for name in names(3)}) == 3
