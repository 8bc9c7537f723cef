"""What the demo found out, as values, and as the machine-readable summary.json."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fedrt
from fedrt.ctl_json import round_json
from fedrt.ctl_progress import WatchState
from fedrt.statefile import write_atomic
from fedrt.task import TaskKind
from silo.demo.departed import Departed
from silo.demo.hospitals import SILOS, SiloData
from silo.demo.recipes import Recipe

PACKAGES = ("torch", "open_clip_torch", "numpy", "grpcio", "safetensors", "matplotlib")


@dataclass(frozen=True)
class Outcome:
    """All that the demo found out. `seconds` are wall times by phase; `objections` by silo, empty if none."""

    recipe: Recipe
    data: Mapping[str, SiloData]
    zeroshot: WatchState
    promptfl: WatchState
    departed: Mapping[str, Departed]
    objections: Mapping[str, list[str]]
    prompt_path: Path
    seconds: Mapping[str, float]

    @property
    def nothing_private_left(self) -> bool:
        """Whether only what may leave has left, at every silo."""
        return not any(self.objections.values())

    def zero_shot(self, silo: str | None = None) -> float:
        """Accuracy of the handcrafted prompt: at a silo, or the mean over all test images."""
        return self.zeroshot.series(TaskKind.EVALUATE, "accuracy", silo)[-1][1]

    def federated(self, silo: str | None = None) -> float:
        """Accuracy of the federated prompt after the last round."""
        return self.promptfl.series(TaskKind.EVALUATE, "accuracy", silo)[-1][1]


def write_summary(path: Path, outcome: Outcome) -> None:
    """Write summary.json. Raises `StorageError`."""
    document = {
        "format": "fedrt-demo-1",
        "data": outcome.recipe.data,
        "seed": outcome.recipe.seed,
        "classes": outcome.recipe.classes,
        "settings": asdict(outcome.recipe.prompt),
        "silos": {silo: _silo(outcome, silo) for silo in SILOS},
        "mean": _accuracies(outcome, None),
        "nothing_private_left": outcome.nothing_private_left,
        "experiments": {state.plan.experiment_id: _experiment(state) for state in (outcome.zeroshot, outcome.promptfl)},
        "prompt": str(outcome.prompt_path),
        "wall_seconds": {phase: round(seconds, 2) for phase, seconds in outcome.seconds.items()},
        "versions": {"fedrt": fedrt.__version__, "python": platform.python_version()} | _versions(),
    }
    write_atomic(path, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n", 0o644)


def _silo(outcome: Outcome, silo: str) -> dict[str, Any]:
    data, departed = outcome.data[silo], outcome.departed[silo]
    return {
        **asdict(data),
        **_accuracies(outcome, silo),
        "left_the_building": {
            "messages": dict(departed.messages),
            "tensors": [asdict(tensor) for tensor in departed.tensors],
            "tensor_bytes": departed.byte_count,
            "objections": outcome.objections[silo],
        },
    }


def _accuracies(outcome: Outcome, silo: str | None) -> dict[str, float]:
    before, after = outcome.zero_shot(silo), outcome.federated(silo)
    return {"zero_shot_accuracy": before, "federated_accuracy": after, "gain": after - before}


def _experiment(state: WatchState) -> dict[str, Any]:
    return {
        "state": state.state,
        "method": state.plan.method,
        "wall_seconds": round(state.elapsed(state.end_time or 0.0), 2),
        "rounds": [round_json(closed) for closed in state.rounds],
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
