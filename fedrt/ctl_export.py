"""Writes what an experiment has learned: `prompt.safetensors` for programs, `experiment.json` for whoever asks how."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

import fedrt
from fedrt.admin_client import Export
from fedrt.ctl_json import experiment_json, round_json
from fedrt.ctl_progress import ClosedRound
from fedrt.errors import ConfigurationError
from fedrt.statefile import storage_error, write_atomic
from fedrt.wire_values import experiment_spec_from_pb

PROMPT_NAME, EXPERIMENT_NAME = "prompt.safetensors", "experiment.json"


def check_destination(directory: Path, overwrite: bool) -> None:
    """Raise `ConfigurationError` if an earlier export lies there and may not be overwritten."""
    present = [name for name in (PROMPT_NAME, EXPERIMENT_NAME) if (directory / name).exists()]
    if present and not overwrite:
        raise ConfigurationError(
            f"'{directory / present[0]}' exists already; choose another directory, or overwrite it with --force"
        )


def write_export(directory: Path, export: Export, rounds: Sequence[ClosedRound]) -> tuple[Path, Path]:
    """Write both files and return their paths; each is whole or absent. Raises `StorageError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create directory", directory, error) from error
    prompt_path, experiment_path = directory / PROMPT_NAME, directory / EXPERIMENT_NAME
    tensors = {name: np.ascontiguousarray(array) for name, array in export.tensors.items()}
    write_atomic(prompt_path, save(tensors, prompt_metadata(export)))
    document = {
        "format": "fedrt-export-1",
        "exported_after_round": export.round_number,
        **experiment_json(export.experiment),
        "rounds": [round_json(closed) for closed in rounds],
    }
    write_atomic(experiment_path, json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n")
    return prompt_path, experiment_path


def prompt_metadata(export: Export) -> dict[str, str]:
    """What the header of the safetensors file says: all that is needed to use the tensors. Lists are JSON."""
    spec = experiment_spec_from_pb(export.experiment.spec)
    return {
        "format": "fedrt-prompt-1",
        "experiment": export.experiment.experiment_id,
        "round": str(export.round_number),
        "method": spec.local.method_name,
        "hyperparameters": spec.local.hyperparameters_json,
        "classes": json.dumps(spec.local.classes, ensure_ascii=False),
        "architecture": spec.local.model.architecture,
        "weights_sha256": spec.local.model.weights_sha256,
        "fedrt_version": fedrt.__version__,
    }
