"""Printed digits in varied glyphs: stroke skeletons, bent and slanted at random, drawn with a pen of varied width."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from silo.embedded.world import ABSENT, BACKGROUNDS, DIGITS, RESOLUTION, Attribute, coverage, frame_grid

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Point = tuple[float, float]
Stroke = list[Point]

_SEGMENTS = 36


@dataclass(frozen=True)
class Glyphs:
    """A batch of B digits as pen strokes; lengths are in half frames, y points down."""

    digit: IntArray  # [B]
    segments: FloatArray  # [B, 36, 2, 2] both ends of every straight piece
    pen: FloatArray  # [B] half width of the pen
    ink: FloatArray  # [B, 3] RGB in [0, 1]
    paper: FloatArray  # [B, 3] RGB in [0, 1]
    light_on_dark: NDArray[np.bool_]  # [B]

    def __len__(self) -> int:
        return len(self.digit)

    def attributes(self) -> IntArray:
        """What is true of every digit, as a table [B, 8] with `ABSENT` for what digits do not have."""
        table = np.full((len(self), len(Attribute)), ABSENT, dtype=np.int64)
        table[:, Attribute.DIGIT] = self.digit
        dark, light = BACKGROUNDS.index("dark"), BACKGROUNDS.index("light")
        table[:, Attribute.BACKGROUND] = np.where(self.light_on_dark, dark, light)
        return table


def digit_class_name(digit: int) -> str:
    """The class name of a digit, for example "digit seven"."""
    return f"digit {DIGITS[digit]}"


def sample_glyphs(count: int, rng: np.random.Generator) -> Glyphs:
    """Draw `count` digits, uniform over 0-9 and over the skeletons of a digit, half of them light on dark."""
    digit = rng.integers(len(DIGITS), size=count)
    skeleton = np.stack([_SKELETONS[d][rng.integers(len(_SKELETONS[d]))] for d in digit.tolist()])
    light_on_dark = rng.random(count) < 0.5
    bright = rng.uniform(0.7, 1.0, count)
    dim = rng.uniform(0.0, 0.25, count)
    tint = rng.uniform(-0.1, 0.1, (2, count, 3))
    ink = np.where(light_on_dark, bright, dim)[:, None] + tint[0]
    paper = np.where(light_on_dark, dim, bright)[:, None] + tint[1]
    return Glyphs(
        digit=digit,
        segments=_placed(_bent(skeleton, rng), rng),
        pen=rng.uniform(0.06, 0.20, count).astype(np.float32),
        ink=np.clip(ink, 0.0, 1.0).astype(np.float32),
        paper=np.clip(paper, 0.0, 1.0).astype(np.float32),
        light_on_dark=light_on_dark,
    )


def draw_glyphs(glyphs: Glyphs, resolution: int = RESOLUTION) -> FloatArray:
    """Draw the digits as RGB images [B, R, R, 3] in [0, 1], antialiased over about one pixel."""
    grid = frame_grid(resolution).reshape(-1, 2)
    nearest = np.full((len(glyphs), len(grid)), np.inf, dtype=np.float32)  # squared distance to the skeleton
    for piece in range(_SEGMENTS):
        start = glyphs.segments[:, piece, 0]
        along = glyphs.segments[:, piece, 1] - start
        length = np.maximum((along**2).sum(axis=1), 1e-8)[:, None]
        dx = grid[None, :, 0] - start[:, None, 0]
        dy = grid[None, :, 1] - start[:, None, 1]
        share = np.clip((dx * along[:, None, 0] + dy * along[:, None, 1]) / length, 0.0, 1.0)
        gap = (dx - share * along[:, None, 0]) ** 2 + (dy - share * along[:, None, 1]) ** 2
        np.minimum(nearest, gap, out=nearest)
    distance = np.sqrt(nearest).reshape(len(glyphs), resolution, resolution) - glyphs.pen[:, None, None]
    cover = coverage(distance, resolution)[..., None]
    image: FloatArray = glyphs.paper[:, None, None] * (1.0 - cover) + glyphs.ink[:, None, None] * cover
    return image.astype(np.float32)


def _bent(skeleton: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Bend the strokes [B, 36, 2, 2] along a smooth random wave, so that no two glyphs of a digit are equal."""
    count = len(skeleton)
    frequency = rng.uniform(0.8, 2.2, (count, 1, 1, 2)).astype(np.float32)
    phase = rng.uniform(0.0, 2.0 * np.pi, (count, 1, 1, 2)).astype(np.float32)
    depth = rng.uniform(0.0, 0.14, (count, 1, 1, 2)).astype(np.float32)
    wave: FloatArray = skeleton + depth * np.sin(frequency * skeleton[..., ::-1] + phase)
    return wave


def _placed(skeleton: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Scale, slant, turn and shift the strokes [B, 36, 2, 2] so that the digit stays inside the frame."""
    count = len(skeleton)
    height = rng.uniform(0.55, 0.88, count)
    width = height * rng.uniform(0.7, 1.25, count)
    slant = rng.uniform(-0.35, 0.25, count)
    angle = rng.uniform(-0.18, 0.18, count)
    cos, sin = np.cos(angle), np.sin(angle)
    # rotation @ [[width, slant * height], [0, height]]
    matrix = np.empty((count, 2, 2), dtype=np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * width, cos * slant * height - sin * height
    matrix[:, 1, 0], matrix[:, 1, 1] = sin * width, sin * slant * height + cos * height
    shift = rng.uniform(-1.0, 1.0, (count, 2)) * np.maximum(0.04, 0.92 - height)[:, None]
    placed: FloatArray = np.einsum("bij,bsej->bsei", matrix, skeleton) + shift[:, None, None]
    return placed.astype(np.float32)


def _arc(centre: Point, radii: Point, first: float, last: float, pieces: int = 10) -> Stroke:
    """Points of an elliptic arc between two angles in degrees (0 is right, 90 is down)."""
    angles = np.deg2rad(np.linspace(first, last, pieces + 1))
    return [(centre[0] + radii[0] * float(np.cos(a)), centre[1] + radii[1] * float(np.sin(a))) for a in angles]


def _segments_of(strokes: list[Stroke]) -> FloatArray:
    """Straight pieces [36, 2, 2] of the strokes; the last piece is repeated to fill the array."""
    pieces = [(a, b) for stroke in strokes for a, b in pairwise(stroke)]
    pieces += [pieces[-1]] * (_SEGMENTS - len(pieces))
    return np.array(pieces, dtype=np.float32)


_STROKES: Mapping[int, list[list[Stroke]]] = {
    0: [[_arc((0, 0), (0.6, 1), 0, 360, 16)], [_arc((0, 0), (0.45, 0.95), -60, 300, 16)]],
    1: [
        [[(0, -1), (0, 1)]],
        [[(-0.35, -0.6), (0.05, -1), (0.05, 1)]],
        [[(-0.35, -0.65), (0, -1), (0, 1)], [(-0.4, 1), (0.4, 1)]],
    ],
    2: [
        [[*_arc((0, -0.5), (0.55, 0.5), 190, 390), (-0.6, 1), (0.65, 1)]],
        [[*_arc((0, -0.45), (0.5, 0.55), 200, 410), (-0.5, 0.8), (-0.2, 0.75), (0.6, 1)]],
    ],
    3: [
        [_arc((-0.05, -0.5), (0.5, 0.5), -160, 90), _arc((-0.05, 0.48), (0.6, 0.52), -90, 150)],
        [[(-0.5, -1), (0.5, -1), (-0.05, -0.15), *_arc((-0.1, 0.42), (0.6, 0.57), -75, 150)]],
    ],
    4: [
        [[(0.3, -1), (-0.6, 0.35), (0.65, 0.35)], [(0.3, -1), (0.3, 1)]],
        [[(-0.45, -1), (-0.55, 0.1), (0.6, 0.1)], [(0.45, -0.9), (0.35, 1)]],
        [[(0.0, -1), (-0.6, 0.3), (0.6, 0.25)], [(0.3, -0.2), (0.25, 1)]],
    ],
    5: [
        [[(0.55, -1), (-0.45, -1), (-0.5, -0.1), *_arc((-0.02, 0.4), (0.6, 0.6), -130, 145)]],
        [[(-0.35, -0.95), (-0.4, -0.2), *_arc((-0.05, 0.4), (0.5, 0.58), -120, 130)], [(-0.35, -0.95), (0.6, -1)]],
    ],
    6: [
        [[(0.4, -1), (-0.1, -0.7), (-0.45, -0.1), (-0.55, 0.45)], _arc((0, 0.45), (0.55, 0.55), 180, 540, 14)],
        [[(0.1, -1), (-0.3, -0.4), (-0.5, 0.4)], _arc((-0.02, 0.5), (0.48, 0.48), 180, 540, 14)],
    ],
    7: [
        [[(-0.6, -1), (0.6, -1), (-0.15, 1)]],
        [[(-0.55, -0.9), (0.55, -1), (0.1, 0.0), (-0.2, 1)], [(-0.3, 0.05), (0.5, 0.0)]],
        [[(-0.5, -0.65), (-0.5, -0.95), (0.55, -0.95), (0.05, 1)]],
    ],
    8: [
        [_arc((0, -0.5), (0.45, 0.48), 0, 360, 14), _arc((0, 0.5), (0.58, 0.5), 0, 360, 14)],
        [_arc((0.05, -0.55), (0.38, 0.42), 90, 450, 14), _arc((-0.05, 0.43), (0.45, 0.55), -90, 270, 14)],
    ],
    9: [
        [_arc((0, -0.45), (0.52, 0.53), 0, 360, 14), [(0.52, -0.45), (0.42, 0.3), (0.1, 0.8), (-0.35, 1)]],
        [_arc((0, -0.5), (0.45, 0.48), 0, 360, 14), [(0.45, -0.5), (0.35, 1)]],
    ],
}
_SKELETONS: Mapping[int, list[FloatArray]] = {d: [_segments_of(s) for s in styles] for d, styles in _STROKES.items()}
