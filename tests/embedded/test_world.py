"""The drawn world: same seed, same bytes; every shape, colour, texture and scanner makes a difference."""

import numpy as np
import pytest

from silo.embedded.glyphs import digit_class_name, draw_glyphs, sample_glyphs
from silo.embedded.scanners import SCANNERS, UNSEEN_SCANNERS, scan
from silo.embedded.world import (
    ABSENT,
    ALL_PAIRS,
    COLOURS,
    DIGITS,
    HELD_OUT_PAIRS,
    SEEN_PAIRS,
    SHAPES,
    TEXTURES,
    Attribute,
    Pair,
    draw_scenes,
    sample_scenes,
    scenes_of,
)


def scenes_and_glyphs(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([draw_scenes(sample_scenes(ALL_PAIRS, 40, rng)), draw_glyphs(sample_glyphs(20, rng))])


def test_same_seed_draws_same_bytes() -> None:
    first, second = scenes_and_glyphs(3), scenes_and_glyphs(3)
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != scenes_and_glyphs(4).tobytes()


def test_images_are_unit_range_rgb() -> None:
    images = scenes_and_glyphs(0)
    assert images.shape == (60, 32, 32, 3)
    assert images.dtype == np.float32
    assert images.min() >= 0.0
    assert images.max() <= 1.0


def test_a_fifth_of_the_pairs_is_held_out_and_every_shape_and_colour_is_seen() -> None:
    assert len(HELD_OUT_PAIRS) * 5 == len(ALL_PAIRS) == 80
    assert set(HELD_OUT_PAIRS).isdisjoint(SEEN_PAIRS)
    assert {pair.shape for pair in SEEN_PAIRS} == set(range(len(SHAPES)))
    assert {pair.colour for pair in SEEN_PAIRS} == set(range(len(COLOURS)))


def test_class_names() -> None:
    assert Pair(COLOURS.index("red"), SHAPES.index("triangle")).class_name == "red triangle"
    assert digit_class_name(7) == "digit seven"


def test_attributes_say_what_was_drawn() -> None:
    rng = np.random.default_rng(0)
    scenes = scenes_of(np.array(ALL_PAIRS), rng)
    table = scenes.attributes()
    assert table[:, Attribute.COLOUR].tolist() == [pair.colour for pair in ALL_PAIRS]
    assert table[:, Attribute.SHAPE].tolist() == [pair.shape for pair in ALL_PAIRS]
    assert set(table[:, Attribute.TEXTURE].tolist()) == set(range(len(TEXTURES)))
    assert (table[:, Attribute.DIGIT] == ABSENT).all()
    digits = sample_glyphs(200, rng).attributes()
    assert set(digits[:, Attribute.DIGIT].tolist()) == set(range(len(DIGITS)))
    assert (digits[:, Attribute.SHAPE] == ABSENT).all()


def test_the_ink_is_the_colour_that_the_class_names() -> None:
    pairs = np.array([[COLOURS.index("red"), SHAPES.index("square")], [COLOURS.index("blue"), SHAPES.index("square")]])
    images = draw_scenes(scenes_of(np.repeat(pairs, 50, axis=0), np.random.default_rng(0)))
    redness = images[..., 0].mean(axis=(1, 2)) - images[..., 2].mean(axis=(1, 2))
    assert redness[:50].mean() > 0.1
    assert redness[50:].mean() < -0.1


def test_a_circle_covers_the_area_of_a_circle() -> None:
    pairs = np.array([[COLOURS.index("red"), SHAPES.index("circle")]] * 50)
    scenes = scenes_of(pairs, np.random.default_rng(0))
    inked = np.abs(draw_scenes(scenes, resolution=128) - scenes.paper[:, None, None]).max(axis=-1) > 0.1
    flat = (scenes.slope == 0).all(axis=1) & (scenes.texture == TEXTURES.index("plain"))
    area = inked[flat].mean(axis=(1, 2)) * 4.0
    assert area == pytest.approx(np.pi * (0.9 * scenes.size[flat]) ** 2, rel=0.1)


@pytest.mark.parametrize("scanner", [*SCANNERS, *UNSEEN_SCANNERS])
def test_scanners_change_images_but_neither_shape_nor_range(scanner: str) -> None:
    images = scenes_and_glyphs(0)
    first = scan(images, scanner, np.random.default_rng(1))
    assert first.shape == images.shape
    assert first.dtype == np.float32
    assert first.min() >= 0.0
    assert first.max() <= 1.0
    assert first.tobytes() == scan(images, scanner, np.random.default_rng(1)).tobytes()
    changed = np.abs(first - images).mean(axis=(1, 2, 3))
    assert (changed == 0).all() if scanner == "clean" else (changed > 0.004).all()


@pytest.mark.parametrize("scanner", [*SCANNERS, *UNSEEN_SCANNERS])
def test_scanners_accept_an_empty_batch(scanner: str) -> None:
    assert scan(np.zeros((0, 32, 32, 3), dtype=np.float32), scanner, np.random.default_rng(0)).shape == (0, 32, 32, 3)


def test_an_unknown_scanner_is_an_error() -> None:
    with pytest.raises(KeyError, match="sepia"):
        scan(scenes_and_glyphs(0), "sepia", np.random.default_rng(0))
