"""Images for silos with the real worker: a few drawn squares per class, different at each silo."""

import hashlib
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import silo.embedded
from silo.embedded.datasets import world_class_names

CLASSES = tuple(world_class_names()[:3])
IMAGES = 8  # per class and split
SIZE = 32  # pixels


def write(root: Path, name: str) -> None:
    """Fill a silo's folder: `<split>/<class>/<number>.png`."""
    chance = np.random.default_rng(zlib.crc32(name.encode()))
    for split in ("train", "test"):
        for index, label in enumerate(CLASSES):
            directory = root / split / label
            directory.mkdir(parents=True)
            for number in range(IMAGES):
                pixels = chance.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
                pixels[..., index % 3] //= 2
                Image.fromarray(pixels).save(directory / f"{number}.png")


def weights_sha256() -> str:
    """The digest of the embedded weights that experiments name."""
    (weights,) = Path(silo.embedded.__file__).parent.glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()
