"""Training batches: images of the drawn world and printed digits, each with a caption, drawn on the fly."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silo.embedded.captions import sample_caption
from silo.embedded.glyphs import draw_glyphs, sample_glyphs
from silo.embedded.scanners import SCANNERS, scan
from silo.embedded.world import SEEN_PAIRS, Attribute, draw_scenes, sample_scenes

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

BATCH_SIZE = 256
DIGIT_COUNT = 40
SCANNER_SHARES = (0.26, 0.13, 0.16, 0.15, 0.15, 0.15)


@dataclass(frozen=True)
class Batch:
    """A training batch: caption i was written for image i, and `truth[i, j]` says if caption j is true of image i."""

    images: FloatArray  # [B, 32, 32, 3] in [0, 1]
    attributes: IntArray  # [B, 8]
    captions: tuple[str, ...]
    truth: NDArray[np.bool_]  # [B, B]


def sample_batch(rng: np.random.Generator, size: int = BATCH_SIZE, digit_count: int = DIGIT_COUNT) -> Batch:
    """Draw `size` images with captions, `digit_count` of them digits; held-out pairs never occur."""
    scenes = sample_scenes(SEEN_PAIRS, size - digit_count, rng)
    glyphs = sample_glyphs(digit_count, rng)
    images = np.concatenate([draw_scenes(scenes), draw_glyphs(glyphs)])
    attributes = np.concatenate([scenes.attributes(), glyphs.attributes()])
    scanner = rng.choice(len(SCANNERS), size=size, p=SCANNER_SHARES)
    attributes[:, Attribute.SCANNER] = scanner
    for index, name in enumerate(SCANNERS):
        rows = scanner == index
        images[rows] = scan(images[rows], name, rng)
    captions = [sample_caption(row, rng) for row in attributes]
    mentions = np.array([[attribute in caption.mentions for attribute in Attribute] for caption in captions])
    agrees = attributes[:, None, :] == attributes[None, :, :]
    truth = (agrees | ~mentions[None]).all(axis=2)
    return Batch(images, attributes, tuple(caption.text for caption in captions), truth)
