"""Real image files for the demo: three hospitals with different scanners and different mixes of classes.

A hospital's folder is `train/<class name>/*.png` and `test/<class name>/*.png`. There are two worlds: drawn scenes, and
real handwritten digits (scikit-learn's `load_digits`). Everything follows from the seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from silo.embedded.glyphs import digit_class_name
from silo.embedded.scanners import UNSEEN_SCANNERS, scan
from silo.embedded.world import DIGITS, HELD_OUT_PAIRS, RESOLUTION, SEEN_PAIRS, Pair, draw_scenes, scenes_of

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

WORLD_PAIRS: tuple[Pair, ...] = (*HELD_OUT_PAIRS, *SEEN_PAIRS[::4])
WORLD_SCANNERS: tuple[str, ...] = UNSEEN_SCANNERS
DIGIT_SCANNERS: tuple[str, ...] = ("clean", "inverted", "blurred")
CONCENTRATION = 1.0
DIGIT_TEST_SHARE = 0.4


class Split(StrEnum):
    """The two disjoint parts of a hospital's images."""

    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True)
class Hospital:
    """One hospital's folder and what lies in it: images per class name, for training and for testing."""

    name: str
    root: Path
    scanner: str
    train_counts: Mapping[str, int]
    test_counts: Mapping[str, int]


def world_class_names(pairs: Sequence[Pair] = WORLD_PAIRS) -> tuple[str, ...]:
    """The class names of the drawn hospitals, in the order of `pairs`."""
    return tuple(pair.class_name for pair in pairs)


def digit_class_names() -> tuple[str, ...]:
    """The ten class names of the digit hospitals, "digit zero" to "digit nine"."""
    return tuple(digit_class_name(digit) for digit in range(len(DIGITS)))


def write_world_hospitals(
    root: Path,
    seed: int,
    pairs: Sequence[Pair] = WORLD_PAIRS,
    train_count: int = 384,
    test_count: int = 480,
) -> tuple[Hospital, ...]:
    """Draw three hospitals, one per entry of `WORLD_SCANNERS`, into `root/hospital-1` to `root/hospital-3`.

    Every hospital has at least four training and two test images of every class; the rest follows its own class mix,
    which is Dirichlet-distributed and the same in training and test.
    """
    mixes = class_mixes(len(WORLD_SCANNERS), len(pairs), np.random.default_rng([seed, 0]))
    hospitals = []
    for index, scanner in enumerate(WORLD_SCANNERS):
        name = f"hospital-{index + 1}"
        train = counts_of(mixes[index], train_count, minimum=4)
        test = counts_of(mixes[index], test_count, minimum=2)
        write_world_folder(root / name, scanner, dict(zip(pairs, train, strict=True)), Split.TRAIN, seed)
        write_world_folder(root / name, scanner, dict(zip(pairs, test, strict=True)), Split.TEST, seed)
        names = world_class_names(pairs)
        hospitals.append(
            Hospital(
                name, root / name, scanner, dict(zip(names, train, strict=True)), dict(zip(names, test, strict=True))
            )
        )
    return tuple(hospitals)


def write_digit_hospitals(root: Path, seed: int) -> tuple[Hospital, ...]:
    """Share the 1,797 handwritten digits among three hospitals, one per entry of `DIGIT_SCANNERS`, each digit once."""
    _, labels = handwritten_digits()
    shares = digit_shares(labels, len(DIGIT_SCANNERS), np.random.default_rng([seed, 1]))
    hospitals = []
    for index, (scanner, indices) in enumerate(zip(DIGIT_SCANNERS, shares, strict=True)):
        name = f"hospital-{index + 1}"
        counts = []
        for split, chosen in split_by_class(labels, indices).items():
            write_digits_folder(root / name, scanner, chosen, split, seed)
            counts.append({digit_class_name(d): int((labels[chosen] == d).sum()) for d in range(len(DIGITS))})
        hospitals.append(Hospital(name, root / name, scanner, counts[0], counts[1]))
    return tuple(hospitals)


def write_world_folder(root: Path, scanner: str, counts: Mapping[Pair, int], split: Split, seed: int) -> None:
    """Draw `counts[pair]` images of every class through the scanner into `root/<split>/<class name>/`."""
    chosen = np.array([pair for pair, count in counts.items() for _ in range(count)], dtype=np.int64).reshape(-1, 2)
    # the scanner's name keeps hospitals of one seed from drawing the same scenes
    rng = np.random.default_rng([seed, list(Split).index(split), *scanner.encode()])
    images = scan(draw_scenes(scenes_of(chosen, rng)), scanner, rng)
    names = [Pair(int(colour), int(shape)).class_name for colour, shape in chosen]
    _write_images(root / split, images, names)


def write_digits_folder(root: Path, scanner: str, indices: Sequence[int] | IntArray, split: Split, seed: int) -> None:
    """Write the handwritten digits at `indices` through the scanner, below `root/<split>/<class name>/`.

    `scanner` is "inverted" or one of the scanners of `silo.embedded.scanners`.
    """
    images, labels = handwritten_digits()
    rng = np.random.default_rng([seed, list(Split).index(split), *scanner.encode()])
    chosen = np.asarray(indices, dtype=np.int64)
    _write_images(
        root / split, scan_digits(images[chosen], scanner, rng), [digit_class_name(int(d)) for d in labels[chosen]]
    )


def scan_digits(images: FloatArray, scanner: str, rng: np.random.Generator) -> FloatArray:
    """Handwritten digits [B, R, R, 3] in [0, 1] as a hospital's scanner delivers them."""
    return 1.0 - images if scanner == "inverted" else scan(images, scanner, rng)


def handwritten_digits(resolution: int = RESOLUTION) -> tuple[FloatArray, IntArray]:
    """scikit-learn's handwritten digits: images [1797, R, R, 3] in [0, 1], light on dark, and labels [1797]."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - only the digits need scikit-learn

    bunch = load_digits()
    grey = np.rint(np.asarray(bunch.images) * (255.0 / 16.0)).astype(np.uint8)
    size = (resolution, resolution)
    enlarged = np.stack([np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grey])
    images = np.repeat(enlarged[..., None], 3, axis=-1).astype(np.float32) / np.float32(255.0)
    return images, np.asarray(bunch.target, dtype=np.int64)


def class_mixes(hospital_count: int, class_count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A class mix for every hospital [H, C], rows summing to 1: Dirichlet with concentration `CONCENTRATION`."""
    return rng.dirichlet(np.full(class_count, CONCENTRATION), size=hospital_count)


def counts_of(mix: NDArray[np.float64], total: int, minimum: int) -> list[int]:
    """Images per class: `minimum` each, the rest in proportion to the mix by largest remainders, `total` in sum.

    Raises:
        ValueError: `total` is less than the minimum for all classes.
    """
    rest = total - minimum * len(mix)
    if rest < 0:
        raise ValueError(f"{total} images cannot give {len(mix)} classes {minimum} each; ask for {minimum * len(mix)}")
    wanted = mix * rest
    counts = np.floor(wanted).astype(np.int64)
    largest = np.argsort(counts - wanted, kind="stable")[: rest - int(counts.sum())]
    counts[largest] += 1
    return [int(count) + minimum for count in counts]


def digit_shares(labels: IntArray, hospital_count: int, rng: np.random.Generator) -> list[IntArray]:
    """Disjoint indices per hospital: a Dirichlet draw shares out every digit, at least ten to each hospital."""
    parts: list[list[IntArray]] = [[] for _ in range(hospital_count)]
    for digit in range(len(DIGITS)):
        of_digit = rng.permutation(np.flatnonzero(labels == digit))
        mix = rng.dirichlet(np.full(hospital_count, CONCENTRATION))
        bounds = np.cumsum(counts_of(mix, len(of_digit), minimum=10))[:-1]
        for part, indices in zip(parts, np.split(of_digit, bounds), strict=True):
            part.append(indices)
    return [np.concatenate(part) for part in parts]


def split_by_class(labels: IntArray, indices: IntArray) -> dict[Split, IntArray]:
    """Split indices into training and test, the same share of every class; the order of `indices` decides."""
    train: list[IntArray] = []
    test: list[IntArray] = []
    for digit in range(len(DIGITS)):
        of_digit = indices[labels[indices] == digit]
        border = round(len(of_digit) * DIGIT_TEST_SHARE)
        test.append(of_digit[:border])
        train.append(of_digit[border:])
    return {Split.TRAIN: np.concatenate(train), Split.TEST: np.concatenate(test)}


def _write_images(folder: Path, images: FloatArray, class_names: Sequence[str]) -> None:
    """Write images [B, R, R, 3] in [0, 1] as 8-bit RGB PNG files `folder/<class name>/<number>.png`."""
    for class_name in set(class_names):
        (folder / class_name).mkdir(parents=True, exist_ok=True)
    pixels = np.rint(images * 255.0).astype(np.uint8)
    for number, (image, class_name) in enumerate(zip(pixels, class_names, strict=True)):
        Image.fromarray(image).save(folder / class_name / f"{number:05d}.png")
