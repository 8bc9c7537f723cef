"""Pixels for the image tower: an image as evaluation sees it, and in augmented views that follow from its content.

A view is the papers' augmentation, a random resized crop and a horizontal flip. Its numbers come from the digest of the
image file and the number of the view, not by chance: the same file gives the same pixels on every machine, in every
thread and whatever was drawn before, so that its features can be kept.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import PIL
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

# To be raised with every change of the pixels, here or in `silo.data.images`: features kept on disk go by it.
VERSION = 1
AREA = (0.08, 1.0)  # of a crop, as a share of the image's
RATIO = (3 / 4, 4 / 3)  # of a crop's width to its height
TRIES = 10


@dataclass(frozen=True)
class Crop:
    """A part of an image in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


class Draws:
    """Numbers that depend on the file's digest and the view only, the same with every version of NumPy."""

    def __init__(self, content_digest: str, view: int) -> None:
        seed = hashlib.sha256(f"fedrt view {view} of {content_digest}".encode()).digest()
        self._bits = np.random.Philox(key=int.from_bytes(seed[:16], "big"))

    def uniform(self, least: float, most: float) -> float:
        """Uniform in [least, most)."""
        # NumPy promises the bits of a generator to stay, but not what its distributions make of them
        return least + (most - least) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def below(self, count: int) -> int:
        """One of 0 … count − 1."""
        return int(self.uniform(0, count))


def draw_crop(width: int, height: int, draws: Draws) -> Crop:
    """A crop as torchvision's `RandomResizedCrop` draws it, and a flip with probability one half.

    Its area is uniform in `AREA`, the logarithm of its ratio in `RATIO`. If none of `TRIES` lies within the image, as
    in a narrow one, it is the largest crop in the middle with an allowed ratio.
    """
    for _ in range(TRIES):
        area = width * height * draws.uniform(*AREA)
        ratio = math.exp(draws.uniform(*map(math.log, RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            top, left = draws.below(height - down + 1), draws.below(width - across + 1)
            return Crop(top, left, down, across, draws.below(2) == 1)
    across, down = width, height
    if width < RATIO[0] * height:
        down = round(width / RATIO[0])
    elif width > RATIO[1] * height:
        across = round(height * RATIO[1])
    return Crop((height - down) // 2, (width - across) // 2, down, across, draws.below(2) == 1)


@dataclass(frozen=True)
class Preprocessing:
    """Turns RGB images into pixels [3, H, W] as one model wants them; thread-safe."""

    config: PreprocessCfg

    def __call__(self, image: Image.Image) -> Tensor:
        """The image as evaluation sees it: resized (bicubic, short side), cropped in the middle, normalised."""
        return self._plain(image)

    def augment(self, image: Image.Image, content_digest: str, view: int) -> Tensor:
        """The view of that number, counted from 1, of the image whose file has this digest (SHA-256, lower case).

        The crop is resized (bicubic, antialiased) to the model's size, perhaps mirrored, and normalised.
        """
        if view < 1:
            raise ValueError(f"there is no view {view}; augmented views are counted from 1")
        crop = draw_crop(image.width, image.height, Draws(content_digest, view))
        height, width = self._size
        # apart from the resizing: with `box`, Pillow's filter would reach beyond the crop, and torchvision's does not
        part = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
        seen = part.resize((width, height), Image.Resampling.BICUBIC)
        # of an image of the model's size, the plain way changes no pixel but converts and normalises
        return self(seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flipped else seen)

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of all that the pixels of an image file depend on beside the file."""
        # Pillow decodes and resizes; its releases may differ in the last bit of a pixel
        fields = {
            "version": VERSION,
            "pillow": PIL.__version__.partition(".")[0],
            "config": dataclasses.asdict(self.config) | {"size": self._size},
            "area": AREA,
            "ratio": RATIO,
            "tries": TRIES,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def _size(self) -> tuple[int, int]:
        """Height and width of what the image tower sees."""
        size = self.config.size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @cached_property
    def _plain(self) -> Callable[[Image.Image], Tensor]:
        transform: Callable[[Image.Image], Tensor] = image_transform_v2(self.config, is_train=False)
        return transform
