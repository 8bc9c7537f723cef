"""A procedurally drawn, compositional world: shapes x colours x textures on varied backgrounds, drawn in batches.

A scene is a handful of numbers; `draw_scenes` turns a batch of them into images with signed-distance functions, so that
a training batch costs milliseconds. `HELD_OUT_PAIRS` are colour-shape pairs that pre-training never draws: the truly
novel classes of the embedded CLIP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from silo.embedded.shapes import SHAPE_DISTANCES

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

RESOLUTION = 32
SHAPES: tuple[str, ...] = tuple(SHAPE_DISTANCES)
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
SIZES: tuple[str, ...] = ("small", "medium", "large")
PLACES: tuple[str, ...] = ("centre", "left", "right", "top", "bottom")
BACKGROUNDS: tuple[str, ...] = ("dark", "light", "grey", "shaded")
DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

ABSENT = -1

_PALETTE: FloatArray = np.array(
    [
        (0.90, 0.12, 0.12),
        (1.00, 0.52, 0.05),
        (0.98, 0.90, 0.15),
        (0.15, 0.70, 0.20),
        (0.10, 0.85, 0.90),
        (0.12, 0.25, 0.92),
        (0.52, 0.12, 0.70),
        (1.00, 0.50, 0.75),
    ],
    dtype=np.float32,
)
_BACKGROUND_GREY: FloatArray = np.array([0.10, 0.90, 0.50, 0.50], dtype=np.float32)
_SIZE_LIMITS = (0.58, 0.72)
_SMALLEST, _LARGEST = 0.44, 0.86
_CENTRE_LIMIT = 0.14


class Pair(NamedTuple):
    """A class of the world: a colour and a shape, as indices into `COLOURS` and `SHAPES`."""

    colour: int
    shape: int

    @property
    def class_name(self) -> str:
        """The class name, for example "red triangle"."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"


ALL_PAIRS: tuple[Pair, ...] = tuple(Pair(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)))
HELD_OUT_PAIRS: tuple[Pair, ...] = tuple(
    pair for pair in ALL_PAIRS if (pair.shape - pair.colour) % len(SHAPES) in (0, len(SHAPES) // 2)
)
SEEN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


class Attribute(IntEnum):
    """Columns of an attribute table [B, 8]: what is true of an image, as indices into the vocabularies above."""

    SHAPE = 0
    COLOUR = 1
    TEXTURE = 2
    SIZE = 3
    PLACE = 4
    BACKGROUND = 5
    SCANNER = 6
    DIGIT = 7


@dataclass(frozen=True)
class Scenes:
    """A batch of B scenes; lengths are in half frames, so that the frame spans [-1, 1] in x and y (y points down)."""

    pair: IntArray  # [B, 2] colour and shape
    texture: IntArray  # [B]
    background: IntArray  # [B]
    size: FloatArray  # [B] half extent
    centre: FloatArray  # [B, 2]
    rotation: FloatArray  # [B] radians
    ink: FloatArray  # [B, 3] RGB of the shape in [0, 1]
    second_ink: FloatArray  # [B, 3] RGB of the texture's other tone
    paper: FloatArray  # [B, 3] RGB of the background
    slope: FloatArray  # [B, 2] change of the background's brightness per half frame
    texture_period: FloatArray  # [B] in half extents of the shape

    def __len__(self) -> int:
        return len(self.texture)

    def attributes(self) -> IntArray:
        """What is true of every scene, as a table [B, 8] with `ABSENT` for scanner and digit."""
        table = np.full((len(self), len(Attribute)), ABSENT, dtype=np.int64)
        table[:, Attribute.COLOUR] = self.pair[:, 0]
        table[:, Attribute.SHAPE] = self.pair[:, 1]
        table[:, Attribute.TEXTURE] = self.texture
        table[:, Attribute.SIZE] = np.searchsorted(_SIZE_LIMITS, self.size)
        table[:, Attribute.PLACE] = _place_of(self.centre)
        table[:, Attribute.BACKGROUND] = self.background
        return table


def sample_scenes(pairs: Sequence[Pair], count: int, rng: np.random.Generator) -> Scenes:
    """Draw `count` scenes whose classes are uniform over `pairs` and whose other attributes are all varied."""
    chosen = np.array(pairs, dtype=np.int64)[rng.integers(len(pairs), size=count)]
    return scenes_of(chosen, rng)


def scenes_of(chosen: IntArray, rng: np.random.Generator) -> Scenes:
    """Draw one scene for every row of `chosen`, an array [B, 2] of colour and shape."""
    count = len(chosen)
    size = rng.uniform(_SMALLEST, _LARGEST, count).astype(np.float32)
    room = np.maximum(0.05, 0.98 - size)[:, None]
    background = rng.integers(len(BACKGROUNDS), size=count)
    grey = _BACKGROUND_GREY[background] + rng.uniform(-0.10, 0.10, count)
    slope = np.where((background == BACKGROUNDS.index("shaded"))[:, None], 1.0, 0.0) * _slopes(count, rng)
    ink = _inks(chosen[:, 0], rng)
    lighter = rng.random(count) < 0.5
    second = np.where(lighter[:, None], 0.5 * ink + 0.5, 0.5 * ink)
    return Scenes(
        pair=chosen,
        texture=rng.integers(len(TEXTURES), size=count),
        background=background,
        size=size,
        centre=(room * rng.uniform(-1.0, 1.0, (count, 2))).astype(np.float32),
        rotation=rng.uniform(-0.6, 0.6, count).astype(np.float32),
        ink=ink,
        second_ink=second.astype(np.float32),
        paper=np.clip(grey[:, None] + rng.uniform(-0.05, 0.05, (count, 3)), 0.0, 1.0).astype(np.float32),
        slope=slope.astype(np.float32),
        texture_period=rng.uniform(0.45, 0.75, count).astype(np.float32),
    )


def draw_scenes(scenes: Scenes, resolution: int = RESOLUTION) -> FloatArray:
    """Draw the scenes as RGB images [B, R, R, 3] in [0, 1], antialiased over about one pixel."""
    grid = frame_grid(resolution)  # [R, R, 2]
    offset = grid[None] - scenes.centre[:, None, None, :]
    cos = np.cos(scenes.rotation)[:, None, None]
    sin = np.sin(scenes.rotation)[:, None, None]
    scale = scenes.size[:, None, None]
    x = (cos * offset[..., 0] + sin * offset[..., 1]) / scale
    y = (cos * offset[..., 1] - sin * offset[..., 0]) / scale
    distance = np.empty_like(x)
    for index, function in enumerate(SHAPE_DISTANCES.values()):
        rows = scenes.pair[:, 1] == index
        distance[rows] = function(x[rows], y[rows])
    cover = coverage(distance * scale, resolution)[..., None]
    tone = _second_tone(scenes, x, y)[..., None]
    ink = scenes.ink[:, None, None] * (1.0 - tone) + scenes.second_ink[:, None, None] * tone
    shade = np.einsum("bk,hwk->bhw", scenes.slope, grid)[..., None]
    paper = np.clip(scenes.paper[:, None, None] + shade, 0.0, 1.0)
    image: FloatArray = (paper * (1.0 - cover) + ink * cover).astype(np.float32)
    return image


def frame_grid(resolution: int) -> FloatArray:
    """Pixel centres [R, R, 2] as (x, y) in half frames."""
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) * (2.0 / resolution) - 1.0
    return np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1).astype(np.float32)


def coverage(distance: FloatArray, resolution: int) -> FloatArray:
    """The share of a pixel that lies inside, from its signed distance (negative inside) in half frames."""
    share: FloatArray = np.clip(0.5 - distance * (resolution / 2.0), 0.0, 1.0).astype(np.float32)
    return share


def _place_of(centre: FloatArray) -> IntArray:
    """The index into `PLACES` of every centre [B, 2]: the side of the larger offset, or the centre."""
    x, y = centre[:, 0], centre[:, 1]
    sideways = np.where(x < 0, PLACES.index("left"), PLACES.index("right"))
    upright = np.where(y < 0, PLACES.index("top"), PLACES.index("bottom"))
    place = np.where(np.abs(x) >= np.abs(y), sideways, upright)
    central = np.abs(centre).max(axis=1) < _CENTRE_LIMIT
    return np.where(central, PLACES.index("centre"), place).astype(np.int64)


def _slopes(count: int, rng: np.random.Generator) -> FloatArray:
    angle = rng.uniform(0.0, 2.0 * np.pi, count)
    steepness = rng.uniform(0.2, 0.4, count)
    slopes: FloatArray = steepness[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return slopes.astype(np.float32)


def _inks(colour: IntArray, rng: np.random.Generator) -> FloatArray:
    brightness = rng.uniform(0.8, 1.0, (len(colour), 1))
    ink = _PALETTE[colour] * brightness + rng.normal(0.0, 0.035, (len(colour), 3))
    return np.clip(ink, 0.0, 1.0).astype(np.float32)


def _second_tone(scenes: Scenes, x: FloatArray, y: FloatArray) -> FloatArray:
    """Where the texture shows its second tone, [B, R, R] in {0, 1}; never for plain shapes."""
    period = scenes.texture_period[:, None, None]
    u, v = x / period, y / period
    stripes = np.mod(u, 1.0) < 0.5
    dots = np.hypot(np.mod(u, 1.0) - 0.5, np.mod(v, 1.0) - 0.5) < 0.3
    checks = (np.mod(u, 1.0) < 0.5) ^ (np.mod(v, 1.0) < 0.5)
    texture = scenes.texture[:, None, None]
    tone = np.select([texture == 1, texture == 2, texture == 3], [stripes, dots, checks], default=False)
    return np.asarray(tone, dtype=np.float32)
