"""The experiments of a chaos run, what each must end with, and the same computed alone, without any process."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.numpy

from coordinator import experiments
from coordinator.rounds import Round
from fedrt.aggregation import Median, ServerAdam, ServerMomentum, ServerState, Update
from fedrt.method import Method, hyperparameters_json
from fedrt.methods.fedotp import FedOTP
from fedrt.methods.fedpgp import FedPGP
from fedrt.methods.promptfolio import PromptFolio
from fedrt.payload import pack
from fedrt.spec import (
    EvaluationSpec,
    ExperimentSpec,
    LocalSpec,
    ModelSpec,
    OptimizerSpec,
    RoundsSpec,
    TrainingSpec,
)
from fedrt.task import TaskKind
from fedrt.tensors import Tensors, initial_tensors, needs_clip
from silo.work import WorkOrder
from tests.chaos import worker_process

TIME_LIMIT = 6 * 3600.0  # seconds; deadlines are not what is tried here
RETRIES = 100_000  # the death of a worker uses one up
Measured = tuple[int, tuple[tuple[str, float], ...]]  # examples and metrics of one contributor
Rounds = Mapping[tuple[int, int], Mapping[str, Measured]]  # by kind and number of the round, then by silo


@dataclass(frozen=True)
class Expected:
    """What an experiment must end with."""

    digest: str
    vaults: Mapping[str, str]  # by silo
    rounds: Rounds = field(default_factory=dict)


def numpy_specs(silos: tuple[str, ...]) -> dict[str, ExperimentSpec]:
    """Experiments for silos whose worker computes with numpy; all of them needed, but for `pair`."""
    momentum, adam = ServerMomentum(momentum=0.8, learning_rate=0.9), ServerAdam()
    return {
        "transport": _spec(FedOTP(context_length=8), silos, 6, every=2, seed=11),
        "momentum": _spec(FedPGP(context_length=4, rank=2, server=momentum), silos, 6, every=3, seed=12),
        "large": _spec(PromptFolio(context_length=4200), silos[:2], 2, every=0, seed=13),
        "pair": _spec(FedOTP(context_length=8, server=adam), silos[1:], 8, every=0, seed=14),
        "median": _spec(PromptFolio(context_length=8, server=Median()), silos, 4, every=1, seed=15),
    }


def clip_spec(silos: tuple[str, ...], classes: tuple[str, ...], weights_sha256: str) -> ExperimentSpec:
    """An experiment for silos with the real worker: its initial tensors come from a phrase, so from a silo."""
    method = FedPGP(context_length=4, rank=2, context_init="a photo of a")
    model = ModelSpec("fedrt-tiny", weights_sha256, 96, 96)
    training = TrainingSpec(8, 16, OptimizerSpec(learning_rate=0.05))
    return _spec(method, silos, 8, every=2, seed=16, model=model, classes=classes, training=training)


TRAINING = TrainingSpec()
NUMPY_MODEL = ModelSpec("numpy", worker_process.WEIGHTS, worker_process.CONTEXT_DIM, worker_process.CONTEXT_DIM)


def _spec(
    method: Method,
    silos: tuple[str, ...],
    rounds: int,
    every: int,
    seed: int,
    model: ModelSpec = NUMPY_MODEL,
    classes: tuple[str, ...] = ("cat", "dog"),
    training: TrainingSpec = TRAINING,
) -> ExperimentSpec:
    local = LocalSpec(method.name, hyperparameters_json(method), model, classes, training, rounds, seed=seed)
    asked = RoundsSpec(rounds, time_limit=TIME_LIMIT, silos=silos, retries=RETRIES)
    return ExperimentSpec(local, asked, EvaluationSpec(every))


def digest_of(tensors: Tensors) -> str:
    """SHA-256 of names, shapes and bytes."""
    digest = hashlib.sha256(bytes(pack(dict(sorted(tensors.items())))))
    digest.update(json.dumps(sorted((name, array.shape) for name, array in tensors.items())).encode())
    return digest.hexdigest()


def vault_digest(vault: Path, experiment_id: str) -> str:
    """SHA-256 of what a silo's vault holds of an experiment, byte by byte; of nothing if it holds nothing."""
    digest = hashlib.sha256()
    for path in vault_files(vault, experiment_id):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def vault_files(vault: Path, experiment_id: str) -> list[Path]:
    """The files of an experiment in a silo's vault, the current one last."""
    places = sorted(vault.glob(f"{experiment_id}-*"))
    return [path for place in places for path in (sorted(place.iterdir()) if place.is_dir() else [place])]


def latest_private(vault: Path, experiment_id: str) -> Tensors:
    """The private tensors that a vault holds now."""
    return safetensors.numpy.load_file(vault_files(vault, experiment_id)[-1])


def alone(spec: ExperimentSpec) -> tuple[str, dict[str, str]]:
    """The digests of shared and of each silo's private tensors, computed in one process, one step after the other."""
    if needs_clip(spec.local.tensors()):
        raise ValueError("an experiment that starts from a phrase needs a silo with CLIP")
    names = {tensor.name for tensor in spec.local.tensors() if tensor.scope.value == "shared"}
    initial = initial_tensors([tensor for tensor in spec.local.tensors() if tensor.name in names], spec.seed)
    state = ServerState(initial)
    private: dict[str, Tensors] = {silo: {} for silo in spec.rounds.silos}
    experiment = experiments.create("alone", spec, "", 0.0)
    for number in range(1, spec.rounds.count + 1):
        updates = []
        for silo in sorted(spec.rounds.silos):
            round_ = Round(number, TaskKind.TRAIN, 0, (), 0, 0.0, 0.0)
            seed = experiments.task_seed(experiment, round_, silo)
            order = WorkOrder("alone", "alone", TaskKind.TRAIN, spec.local, number, seed, state.shared, private[silo])
            done = worker_process.perform(order, silo, lambda step, planned: None)
            private[silo] = done.private
            updates.append(Update(silo, done.shared, done.example_count))
        state = spec.local.method().aggregate(state, tuple(updates))
    return digest_of(state.shared), {silo: digest_of(tensors) for silo, tensors in private.items()}
