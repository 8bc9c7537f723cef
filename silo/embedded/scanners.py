"""Scanners: what a hospital's imaging device makes of a scene (feature shift), as functions on batches of images.

`SCANNERS` are those of pre-training. `UNSEEN_SCANNERS` are the demo's hospitals: devices that pre-training never saw,
all with another stain, two with a fault of their own (few detector elements, dropped lines). There zero-shot
classification is weaker, and a prompt trained across the hospitals has something to gain.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Scanner = Callable[[FloatArray, np.random.Generator], FloatArray]


def scan(images: FloatArray, scanner: str, rng: np.random.Generator) -> FloatArray:
    """Return the images [B, R, R, 3] in [0, 1] as the named scanner delivers them, of the same shape and range.

    Raises:
        KeyError: `scanner` is neither one of `SCANNERS` nor one of `UNSEEN_SCANNERS`.
    """
    return np.clip(_SCANS[scanner](images, rng), 0.0, 1.0).astype(np.float32)


def _per_image(low: float, high: float, images: FloatArray, rng: np.random.Generator) -> FloatArray:
    """One uniform number per image, shaped [B, 1, 1, 1]."""
    return rng.uniform(low, high, (len(images), 1, 1, 1)).astype(np.float32)


def _clean(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    del rng
    return images


def _line_drawing(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Coloured edges on white paper: ink where a pixel's 3x3 neighbourhood has contrast."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = images.shape[1:3]
    views = [padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    spread: FloatArray = np.maximum.reduce(views) - np.minimum.reduce(views)
    contrast = spread.max(axis=-1, keepdims=True)
    strength = np.clip((contrast - 0.12) * _per_image(2.0, 4.0, images, rng), 0.0, 1.0)
    drawing: FloatArray = 1.0 - strength * (1.0 - images)
    return drawing


def _dark(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    return images * _per_image(0.12, 0.30, images, rng) + _noise(images, 0.012, rng)


def _washed_out(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    keep = _per_image(0.15, 0.32, images, rng)
    return images * keep + (1.0 - keep) * _per_image(0.88, 1.0, images, rng) + _noise(images, 0.012, rng)


def _noisy(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    strength = _per_image(0.14, 0.30, images, rng)
    return images + strength * rng.standard_normal(images.shape, dtype=np.float32)


def _blurred(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A Gaussian blur of square images whose width, 4% to 8% of the frame, varies from image to image."""
    count, rows, columns, channels = images.shape
    sigma = _per_image(0.04, 0.08, images, rng)[:, :, :, 0] * rows  # [B, 1, 1]
    axis = np.arange(rows, dtype=np.float32)
    kernel = np.exp(-0.5 * ((axis[:, None] - axis[None, :])[None] / sigma) ** 2)
    kernel = (kernel / kernel.sum(axis=2, keepdims=True)).astype(np.float32)  # [B, R, R]
    flat = kernel @ images.reshape(count, rows, columns * channels)
    turned = flat.reshape(images.shape).transpose(0, 2, 1, 3)
    again: FloatArray = kernel @ turned.reshape(count, columns, rows * channels)
    return again.reshape(turned.shape).transpose(0, 2, 1, 3)


def _tinted(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A blue-green cast, as of another stain."""
    return images * _STRONG_CAST * _per_image(0.92, 1.0, images, rng)


def _coarse(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A weaker cast, and a detector of 8 x 8 elements; rows and columns must be multiples of eight."""
    count, rows, columns, channels = images.shape
    blocks: FloatArray = images.reshape(count, 8, rows // 8, 8, columns // 8, channels).mean(axis=(2, 4))
    coarse = blocks.repeat(rows // 8, axis=1).repeat(columns // 8, axis=2)
    return coarse * _WEAK_CAST + _noise(images, 0.012, rng)


def _interlaced(images: FloatArray, rng: np.random.Generator) -> FloatArray:
    """A weaker cast, and every other line lost but for a rest of its light."""
    lines: FloatArray = images * _WEAK_CAST
    lines[:, 1::2] *= _per_image(0.0, 0.3, images, rng)
    return lines


def _noise(images: FloatArray, sigma: float, rng: np.random.Generator) -> FloatArray:
    return np.float32(sigma) * rng.standard_normal(images.shape, dtype=np.float32)


_STRONG_CAST: FloatArray = np.array([0.60, 0.85, 1.0], dtype=np.float32)
_WEAK_CAST: FloatArray = np.array([0.68, 0.88, 1.0], dtype=np.float32)
_SCANS: Mapping[str, Scanner] = {
    "clean": _clean,
    "line drawing": _line_drawing,
    "dark": _dark,
    "washed out": _washed_out,
    "noisy": _noisy,
    "blurred": _blurred,
    "tinted": _tinted,
    "coarse": _coarse,
    "interlaced": _interlaced,
}
UNSEEN_SCANNERS: tuple[str, ...] = ("tinted", "coarse", "interlaced")
SCANNERS: tuple[str, ...] = tuple(name for name in _SCANS if name not in UNSEEN_SCANNERS)
