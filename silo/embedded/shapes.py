"""Signed-distance functions of the world's shapes: negative inside, in half extents of the shape, y pointing down."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
DistanceFunction = Callable[[FloatArray, FloatArray], FloatArray]


def _circle(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.hypot(x, y) - np.float32(0.9)


def _ring(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.abs(np.hypot(x, y) - np.float32(0.7)) - np.float32(0.22)


def _box(x: FloatArray, y: FloatArray, half_width: float, half_height: float) -> FloatArray:
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _square(x: FloatArray, y: FloatArray) -> FloatArray:
    return _box(x, y, 0.75, 0.75)


def _cross(x: FloatArray, y: FloatArray) -> FloatArray:
    return np.minimum(_box(x, y, 0.95, 0.27), _box(x, y, 0.27, 0.95))


def _diamond(x: FloatArray, y: FloatArray) -> FloatArray:
    """A rhombus twice as tall as wide, so that a turned square is not one."""
    return (np.abs(x) * np.float32(1.0 / 0.55) + np.abs(y) - np.float32(1.0)) * np.float32(0.48)


def _half_plane(x: FloatArray, y: FloatArray, degrees: float, distance: float) -> FloatArray:
    """Distance beyond the line whose outward normal points to `degrees` and that lies `distance` from the origin."""
    angle = np.deg2rad(degrees)
    return x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) - np.float32(distance)


def _triangle(x: FloatArray, y: FloatArray) -> FloatArray:
    low = y - np.float32(0.15)
    sides = [_half_plane(x, low, degrees, 0.52) for degrees in (90.0, -30.0, -150.0)]
    return np.asarray(np.maximum.reduce(sides), dtype=np.float32)


def _star(x: FloatArray, y: FloatArray) -> FloatArray:
    """Five points: in polar coordinates folded to a tenth of a turn, the edge is one line from tip to notch."""
    tip, notch = 1.0, 0.42
    fifth = 2.0 * np.pi / 5.0
    angle = np.abs(np.mod(np.arctan2(x, -y) + fifth / 2.0, fifth) - fifth / 2.0)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    nx, ny = notch * np.cos(fifth / 2.0), notch * np.sin(fifth / 2.0)
    length = np.hypot(tip - nx, ny)
    return np.asarray(((px - tip) * ny + py * (tip - nx)) / length, dtype=np.float32)


def _heart(x: FloatArray, y: FloatArray) -> FloatArray:
    """Two lobes joined to a point; the lower part is the wedge tangent to both lobes."""
    side = np.abs(x)
    lobe = np.hypot(side - np.float32(0.42), y + np.float32(0.35)) - np.float32(0.48)
    wedge = np.maximum(_half_plane(side, y, 43.0, 0.42), -y - np.float32(0.30))
    distance: FloatArray = np.minimum(lobe, wedge)
    return distance


def _crescent(x: FloatArray, y: FloatArray) -> FloatArray:
    bite = np.hypot(x - np.float32(0.42), y) - np.float32(0.72)
    distance: FloatArray = np.maximum(np.hypot(x, y) - np.float32(0.92), -bite)
    return distance


def _arrow(x: FloatArray, y: FloatArray) -> FloatArray:
    shaft = _box(x + np.float32(0.4), y, 0.55, 0.2)
    head = np.maximum(_half_plane(x, np.abs(y), 38.0, 0.72), -x + np.float32(0.05))
    distance: FloatArray = np.minimum(shaft, head)
    return distance


SHAPE_DISTANCES: Mapping[str, DistanceFunction] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": _arrow,
    "diamond": _diamond,
}
