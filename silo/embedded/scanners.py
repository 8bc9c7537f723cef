"""Scanners: what a hospital's imaging device makes of a scene (feature shift), as functions on batches of images."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Scanner = Callable[[FloatArray, np.random.Generator], FloatArray]


def scan(images: FloatArray, scanner: str, rng: np.random.Generator) -> FloatArray:
    """Return the images [B, R, R, 3] in [0, 1] as the named scanner delivers them, of the same shape and range.

    Raises:
        KeyError: `scanner` is not one of `SCANNERS`.
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
    """A Gaussian blur whose width, 4% to 8% of the frame, varies from image to image."""
    rows = images.shape[1]
    sigma = _per_image(0.04, 0.08, images, rng)[:, :, :, 0] * rows  # [B, 1, 1]
    axis = np.arange(rows, dtype=np.float32)
    kernel = np.exp(-0.5 * ((axis[:, None] - axis[None, :])[None] / sigma) ** 2)
    kernel = (kernel / kernel.sum(axis=2, keepdims=True)).astype(np.float32)  # [B, R, R]
    flat = kernel @ images.reshape(len(images), rows, -1)
    turned = flat.reshape(images.shape).transpose(0, 2, 1, 3)
    again: FloatArray = kernel @ turned.reshape(len(images), rows, -1)
    return again.reshape(turned.shape).transpose(0, 2, 1, 3)


def _noise(images: FloatArray, sigma: float, rng: np.random.Generator) -> FloatArray:
    return np.float32(sigma) * rng.standard_normal(images.shape, dtype=np.float32)


_SCANS: Mapping[str, Scanner] = {
    "clean": _clean,
    "line drawing": _line_drawing,
    "dark": _dark,
    "washed out": _washed_out,
    "noisy": _noisy,
    "blurred": _blurred,
}
SCANNERS: tuple[str, ...] = tuple(_SCANS)
