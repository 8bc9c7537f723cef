"""Captions of very different length for the drawn world, so that class words are trained at every text position.

A caption is `[filler] [opener] [size] [texture] CLASS [suffixes]`. Every part but the class is optional, each mention
of an attribute is recorded, and the filler in front is drawn with a length of its own: prompts put up to 16 learned
vectors before the class name, and the text tower must have seen class words that late.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silo.embedded.glyphs import digit_class_name
from silo.embedded.scanners import SCANNERS
from silo.embedded.world import (
    ABSENT,
    ALL_PAIRS,
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    Attribute,
    Pair,
)

IntArray = NDArray[np.int64]

HANDCRAFTED_PROMPT = "a photo of a {class}."
FILLER_LIMIT = 20

_OPENERS = (
    "a photo of a",
    "a photo of a",
    "a",
    "the",
    "an image of a",
    "a picture of the",
    "this is a",
    "here we see a",
    "a scan that shows a",
    "the picture contains one",
    "there is a",
    "a bad photo of a",
    "a good photo of the",
)
_SCANNER_OPENERS = (
    ("a clean photo of a", "a clear picture of a"),
    ("a line drawing of a", "a sketch of a"),
    ("a dark photo of a", "a dark picture of a"),
    ("a washed out photo of a", "a pale picture of a"),
    ("a noisy photo of a", "a noisy picture of a"),
    ("a blurred photo of a", "a blurred picture of a"),
)
_SCANNER_SUFFIXES = (
    ("from a clean scanner", "seen clearly"),
    ("drawn with lines", "as a line drawing"),
    ("from a dark scanner", "taken in the dark"),
    ("from a washed out scanner", "in pale tones"),
    ("from a noisy scanner", "with noise"),
    ("from a blurred scanner", "out of focus"),
)
_PLACE_SUFFIXES = ("in the centre", "on the left", "on the right", "at the top", "at the bottom")
_BACKGROUND_SUFFIXES = (
    "on a dark background",
    "on a light background",
    "on a grey background",
    "on a shaded background",
)
_TEXTURE_SUFFIXES = ("in one tone", "with stripes", "with dots", "with checks")
_FILLERS = (
    "this is the image that the hospital took today",
    "we looked at the scan and found",
    "in this picture from our archive one can see",
    "please note that",
    "the team in the clinic wrote that it shows",
    "as seen by the doctor",
    "patient study number one of many",
    "here is another photo from the same set of images",
    "it was made with the old device",
    "look at this",
)
_WORD = re.compile(r"[a-z]+|[.,]")
_FILLER_WORDS = tuple(sorted({word for phrase in _FILLERS for word in _WORD.findall(phrase)}))


@dataclass(frozen=True)
class Caption:
    """A caption and the attributes that it mentions; it is true of an image that agrees in all of them."""

    text: str
    mentions: frozenset[Attribute]


def class_name_of(attributes: IntArray) -> str:
    """The class name of one row [8] of an attribute table: "red triangle", or "digit seven"."""
    if attributes[Attribute.DIGIT] != ABSENT:
        return digit_class_name(int(attributes[Attribute.DIGIT]))
    return Pair(int(attributes[Attribute.COLOUR]), int(attributes[Attribute.SHAPE])).class_name


def sample_caption(attributes: IntArray, rng: np.random.Generator) -> Caption:
    """Write a random caption that is true of an image with these attributes, one row [8] of an attribute table."""
    values = [int(value) for value in attributes]
    chance = rng.random(8)
    noun, mentions = _noun_phrase(values, chance[0], rng)
    opener, opener_mentions = _opener(values, chance[1], rng)
    suffixes, suffix_mentions = _suffixes(values, chance[2], rng)
    body = " ".join(part for part in (opener, noun, *suffixes) if part)
    if chance[3] < 0.6:
        room = max(0, FILLER_LIMIT - len(_WORD.findall(opener)))
        body = f"{_filler(int(rng.integers(0, room + 1)), chance[4] < 0.5, rng)} {body}".strip()
    end = "." if chance[5] < 0.6 else ""
    return Caption(body + end, frozenset(mentions | opener_mentions | suffix_mentions))


def words_of(text: str) -> list[str]:
    """The words and punctuation marks of a caption, in order."""
    return _WORD.findall(text)


def caption_words() -> tuple[str, ...]:
    """Every word and punctuation mark that a caption or class name can contain, sorted."""
    return tuple(sorted({word for phrase in _phrases() for word in words_of(phrase)}))


def _phrases() -> Iterator[str]:
    yield from (pair.class_name for pair in ALL_PAIRS)
    yield from (digit_class_name(digit) for digit in range(len(DIGITS)))
    yield from (*_OPENERS, *_PLACE_SUFFIXES, *_BACKGROUND_SUFFIXES, *_TEXTURE_SUFFIXES, *_FILLERS)
    for choices in (*_SCANNER_OPENERS, *_SCANNER_SUFFIXES):
        yield from choices
    yield from (*SIZES, *TEXTURES, *COLOURS, *SHAPES, *PLACES, *BACKGROUNDS, *SCANNERS)
    yield "shape . ,"


def _noun_phrase(values: list[int], chance: float, rng: np.random.Generator) -> tuple[str, set[Attribute]]:
    """The class name, now and then only its colour or its shape, with size and texture in front of it."""
    if values[Attribute.DIGIT] != ABSENT:
        return digit_class_name(values[Attribute.DIGIT]), {Attribute.DIGIT}
    colour, shape = COLOURS[values[Attribute.COLOUR]], SHAPES[values[Attribute.SHAPE]]
    if chance < 0.05:
        return f"{colour} shape", {Attribute.COLOUR}
    if chance < 0.10:
        return shape, {Attribute.SHAPE}
    words, mentions = [colour, shape], {Attribute.COLOUR, Attribute.SHAPE}
    if rng.random() < 0.25:
        words.insert(0, TEXTURES[values[Attribute.TEXTURE]])
        mentions.add(Attribute.TEXTURE)
    if rng.random() < 0.2:
        words.insert(0, SIZES[values[Attribute.SIZE]])
        mentions.add(Attribute.SIZE)
    return " ".join(words), mentions


def _opener(values: list[int], chance: float, rng: np.random.Generator) -> tuple[str, set[Attribute]]:
    if chance < 0.2:
        return "", set()
    if chance < 0.4:
        choices = _SCANNER_OPENERS[values[Attribute.SCANNER]]
        return choices[rng.integers(len(choices))], {Attribute.SCANNER}
    return _OPENERS[rng.integers(len(_OPENERS))], set()


def _suffixes(values: list[int], chance: float, rng: np.random.Generator) -> tuple[list[str], set[Attribute]]:
    """None for six captions out of ten, else one or two of texture, place, background and scanner."""
    if chance < 0.6:
        return [], set()
    possible = [a for a in _SUFFIX_ATTRIBUTES if values[a] != ABSENT]
    count = 1 if chance < 0.85 else 2
    chosen = [possible[i] for i in rng.permutation(len(possible))[:count]]
    return [_suffix(a, values[a], rng) for a in chosen], set(chosen)


def _suffix(attribute: Attribute, value: int, rng: np.random.Generator) -> str:
    match attribute:
        case Attribute.TEXTURE:
            return _TEXTURE_SUFFIXES[value]
        case Attribute.PLACE:
            return _PLACE_SUFFIXES[value]
        case Attribute.BACKGROUND:
            return _BACKGROUND_SUFFIXES[value]
        case _:
            choices = _SCANNER_SUFFIXES[value]
            return choices[rng.integers(len(choices))]


def _filler(count: int, shuffled: bool, rng: np.random.Generator) -> str:
    """`count` words that say nothing: the end of a run of phrases, or words in random order."""
    if shuffled:
        return " ".join(_FILLER_WORDS[i] for i in rng.integers(len(_FILLER_WORDS), size=count))
    words: list[str] = []
    while len(words) < count:
        words = words_of(_FILLERS[rng.integers(len(_FILLERS))]) + words
    return " ".join(words[len(words) - count :])


_SUFFIX_ATTRIBUTES = (Attribute.TEXTURE, Attribute.PLACE, Attribute.BACKGROUND, Attribute.SCANNER)
