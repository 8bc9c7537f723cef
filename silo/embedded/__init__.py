"""The embedded CLIP: a small CLIP shipped as package data, the drawn world it was pre-trained on, and its data sets."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class EmbeddedPaths:
    """Where the three files of the embedded CLIP lie."""

    config_path: Path
    vocabulary_path: Path
    weights_path: Path


def embedded_paths() -> EmbeddedPaths:
    """The paths of `config.json`, `vocabulary.json` and `weights.safetensors`, installed with the package."""
    folder = Path(str(files("silo.embedded")))
    return EmbeddedPaths(
        config_path=folder / "config.json",
        vocabulary_path=folder / "vocabulary.json",
        weights_path=folder / "weights.safetensors",
    )
