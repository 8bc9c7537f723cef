"""The rules by which images are dealt: how many of each class each silo gets; pure numpy.

C classes, K silos; counts are int64. Which images these are is decided elsewhere (`silo.partition.dealing`), by
cutting the shuffled images of a class.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedrt.errors import ConfigurationError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MAX_DRAWS = 1000


class Counts(NamedTuple):
    """Training and test images: available [C], or of each silo [C, K]."""

    train: IntArray
    test: IntArray


class Skew(NamedTuple):
    """A Dirichlet rule: see `silo.partition.sections.Skewed`."""

    beta: float
    min_images: int
    balanced: bool


def equal(available: Counts, silo_count: int, generator: np.random.Generator) -> Counts:
    """IID: each hand of K images goes to the silos in a new order, so that sizes differ by one image at most.

    Images lie class by class, so of each class a silo gets its equal share, to within two images.
    """
    return Counts(*(_hands(side, silo_count, generator) for side in available))


def _hands(available: IntArray, silo_count: int, generator: np.random.Generator) -> IntArray:
    total = int(available.sum())
    hands = np.tile(np.arange(silo_count), (-(-total // silo_count), 1))
    owners = generator.permuted(hands, axis=1).ravel()[:total]
    counts = np.zeros((len(available), silo_count), np.int64)
    np.add.at(counts, (np.repeat(np.arange(len(available)), available), owners), 1)
    return counts


def disjoint(available: Counts, silo_count: int, generator: np.random.Generator) -> Counts:
    """Pathological: shuffled classes, cut into K slices whose sizes differ by one class at most.

    The papers' code leaves the last silo with whatever remains (one of 37 classes among ten silos). Raises
    `ConfigurationError` for fewer classes than silos.
    """
    class_count = len(available.train)
    if class_count < silo_count:
        raise ConfigurationError(
            f"partition.silos is {silo_count}, but there are only {class_count} classes to give to them, "
            "each to one silo; lower partition.silos or choose another partition.kind"
        )
    owned = np.zeros((class_count, silo_count), np.int64)
    for silo, classes in enumerate(np.array_split(generator.permutation(class_count), silo_count)):
        owned[classes, silo] = 1
    return Counts(*(owned * side[:, None] for side in available))


def skewed(available: Counts, silo_count: int, skew: Skew, generators: Callable[[int], np.random.Generator]) -> Counts:
    """Of each class a share drawn from Dirichlet(beta, ..., beta), rounded by largest remainders, the same for both.

    A silo left without test images gets one, of the class it trains on most, from the silo that holds most of it: with
    few images rounding alone could leave it nothing to be measured on. Drawn again, from `generators(1)` and so on,
    while a silo has fewer than `min_images` training images, or no test image at all. Raises `ConfigurationError`
    after `MAX_DRAWS`.
    """
    for draw in range(MAX_DRAWS):
        counts = _draw(available, silo_count, skew, generators(draw))
        if counts.train.sum(axis=0).min() >= skew.min_images and _test_everyone(counts):
            return counts
    raise ConfigurationError(
        f"{MAX_DRAWS} draws with partition.beta {skew.beta:g} have not given each of {silo_count} silos "
        f"{skew.min_images} training images and a test image; raise partition.beta, lower partition.min_images or "
        "the number of silos, or set partition.balanced"
    )


def _draw(available: Counts, silo_count: int, skew: Skew, generator: np.random.Generator) -> Counts:
    shares = generator.dirichlet(np.full(silo_count, skew.beta), size=len(available.train))
    counts = Counts(np.zeros(shares.shape, np.int64), np.zeros(shares.shape, np.int64))
    full = available.train.sum() / silo_count
    held = np.zeros(silo_count, np.int64)
    for label, drawn in enumerate(shares):
        share = drawn
        room = held < full
        if skew.balanced and room.any():  # nobody has room for a class that comes last with test images only
            share = np.where(room, drawn, 0.0)
            # where rounding leaves nothing of a tiny beta's shares, those with room share alike
            share = share / share.sum() if share.sum() > 0 else room / room.sum()
        counts.train[label] = apportion(int(available.train[label]), share)
        counts.test[label] = apportion(int(available.test[label]), share)
        held += counts.train[label]
    return counts


def apportion(count: int, shares: FloatArray) -> IntArray:
    """`count` in whole numbers in proportion to shares [K] that sum to 1, by largest remainders."""
    wanted = count * shares
    given = np.floor(wanted).astype(np.int64)
    rest = count - int(given.sum())
    given[np.argsort(given - wanted, kind="stable")[:rest]] += 1
    return given


def _test_everyone(counts: Counts) -> bool:
    """Give each silo without test images one; whether each has one now."""
    train, test = counts
    for silo in np.flatnonzero(test.sum(axis=0) == 0):
        to_spare = np.where(test.sum(axis=0) > 1, test, 0)
        trained = np.where(to_spare.any(axis=1), train[:, silo], 0)
        if not trained.any():
            return False
        label = trained.argmax()
        test[label, to_spare[label].argmax()] -= 1
        test[label, silo] += 1
    return True
