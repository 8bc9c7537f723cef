"""Lays out the tokens of all class prompts so that each is computed once: shared ones first, the others in chunks.

Attention is causal, so what a token becomes depends on the tokens before it only. Tokens that all prompts begin with
stand once, in front. What follows is a tree: classes whose prompts go on alike share those tokens too. The tree is cut
into chunks of equal width, whole classes each; a token of a chunk sees the shared tokens and its ancestors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WIDEST = 128  # tokens of a chunk: beyond this, products of mostly masked scores cost more than they save in padding
_CANDIDATES = range(24, WIDEST + 1, 8)

# What stands in a place: a row of the vocabulary, or ~l for row l of the context
Token = int
_Path = tuple[Token, ...]  # of one class
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Where the tokens of one context's prompts stand: J chunks of Q slots each; the shared ones are not among them.

    `tokens` and `places` [J, Q] say what stands in a slot and which position of the prompt it has; unused slots hold
    token 0. `visible` [J, Q, Q]: whether the first slot sees the second. `ends` [J, n]: the slots of the end tokens
    of a chunk's classes, filled up with slot 0. `order` [C]: where among all J · n each class is.
    """

    tokens: Integers
    places: Integers
    visible: npt.NDArray[np.bool_]
    ends: Integers
    order: Integers

    @property
    def slot_count(self) -> int:
        """J · Q."""
        return self.tokens.size


def pack(paths: Sequence[Sequence[Token]], first_place: int) -> Packing:
    """The layout of least cost for classes whose own tokens, from place `first_place` of a prompt on, are `paths`.

    The cost of a slot grows with the number of tokens it is compared with, seen or not.
    """
    prompts = [tuple(path) for path in paths]
    distinct = sorted(set(prompts))  # classes of one prompt are one: else one chunk could have more ends than slots
    longest = max(map(len, distinct))
    widths = sorted({max(longest, width) for width in _CANDIDATES})
    best = min((_cut(distinct, width) for width in widths), key=_cost)
    return _lay_out(prompts, distinct, best, first_place)


@dataclass(frozen=True)
class _Cut:
    """Sizes of chunks: how many paths each takes, and how many slots the largest needs."""

    path_counts: tuple[int, ...]
    width: int


def _cost(cut: _Cut) -> float:
    """In slots: comparing a slot with as many others as a chunk has costs little, but more than arithmetic says."""
    return len(cut.path_counts) * cut.width * (1 + cut.width / 1000)


def _cut(paths: Sequence[_Path], limit: int) -> _Cut:
    """Fill chunks of at most `limit` slots with sorted paths, one after the other. None may be longer."""
    counts, used, widest = [0], 0, 0
    previous: _Path = ()
    for path in paths:
        new = len(path) - _common(previous, path)
        if used + new > limit:
            counts.append(0)
            used, new = 0, len(path)
        counts[-1] += 1
        used += new
        widest = max(widest, used)
        previous = path
    return _Cut(tuple(counts), widest)


def _lay_out(prompts: Sequence[_Path], distinct: Sequence[_Path], cut: _Cut, first_place: int) -> Packing:
    chunk_count, width = len(cut.path_counts), cut.width
    tokens = np.zeros((chunk_count, width), np.int64)
    places = np.full((chunk_count, width), first_place, np.int64)
    visible = np.zeros((chunk_count, width, width), np.bool_)
    visible[:, range(width), range(width)] = True
    ends = np.zeros((chunk_count, max(cut.path_counts)), np.int64)
    where: dict[_Path, int] = {}
    rest = iter(distinct)
    for chunk, count in enumerate(cut.path_counts):
        used = 0
        previous: _Path = ()
        slots: list[int] = []  # of the previous path
        for number, path in zip(range(count), rest, strict=False):
            slots = slots[: _common(previous, path)]
            for depth in range(len(slots), len(path)):
                tokens[chunk, used], places[chunk, used] = path[depth], first_place + depth
                visible[chunk, used, slots] = True
                slots.append(used)
                used += 1
            ends[chunk, number] = slots[-1]
            where[path] = chunk * ends.shape[1] + number
            previous = path
    order = np.array([where[path] for path in prompts], np.int64)
    return Packing(tokens, places, visible, ends, order)


def _common(left: _Path, right: _Path) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
