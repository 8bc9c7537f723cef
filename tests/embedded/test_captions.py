"""Captions are true, cover every text position that prompts use, and stay inside the compact vocabulary."""

import json

import numpy as np
import pytest
from open_clip import SimpleTokenizer

from silo.embedded import embedded_paths
from silo.embedded.batches import sample_batch
from silo.embedded.captions import HANDCRAFTED_PROMPT, class_name_of, sample_caption, words_of
from silo.embedded.tokens import CONTEXT_LENGTH, compact_vocabulary
from silo.embedded.world import ALL_PAIRS, HELD_OUT_PAIRS, SHAPES, Attribute, Pair


@pytest.fixture(scope="module")
def batches() -> list:
    return [sample_batch(np.random.default_rng([0, step])) for step in range(8)]


def test_class_words_stand_at_every_position_that_a_prompt_of_16_needs(batches: list) -> None:
    shapes = set(SHAPES)
    positions = [
        1 + index  # the start token is position 0
        for batch in batches
        for caption in batch.captions
        for index, word in enumerate(words_of(caption))
        if word in shapes
    ]
    counts = np.bincount(positions, minlength=23)
    assert (counts[2:21] >= 10).all()  # a colour stands before the shape


def test_ends_cover_short_and_long_prompts(batches: list) -> None:
    vocabulary = compact_vocabulary()
    ends = [end for batch in batches for end in vocabulary.encode(batch.captions).argmax(axis=1)]
    counts = np.bincount(ends, minlength=CONTEXT_LENGTH)
    assert (counts[3:29] >= 10).all()
    assert max(ends) < CONTEXT_LENGTH


def test_held_out_pairs_are_never_drawn_for_training(batches: list) -> None:
    drawn = {Pair(int(row[Attribute.COLOUR]), int(row[Attribute.SHAPE])) for b in batches for row in b.attributes}
    assert drawn.isdisjoint(HELD_OUT_PAIRS)
    held_out_names = [pair.class_name for pair in HELD_OUT_PAIRS]
    assert not any(name in caption for b in batches for caption in b.captions for name in held_out_names)


def test_batches_follow_from_the_seed(batches: list) -> None:
    again = sample_batch(np.random.default_rng([0, 0]))
    assert again.images.tobytes() == batches[0].images.tobytes()
    assert again.captions == batches[0].captions


def test_every_caption_is_true_of_its_own_image_and_few_are_true_of_others(batches: list) -> None:
    for batch in batches:
        assert batch.truth.diagonal().all()
        assert 0.002 < batch.truth.mean() < 0.05


def test_truth_compares_only_what_the_caption_mentions(batches: list) -> None:
    batch = batches[0]
    for column, caption in enumerate(batch.captions[:40]):
        if caption.rstrip(".").endswith(class_name_of(batch.attributes[column])):
            same = (batch.attributes[:, :2] == batch.attributes[column, :2]).all(axis=1)
            assert (batch.truth[:, column] <= same).all()


def test_a_caption_names_the_class_or_a_part_of_it() -> None:
    rng = np.random.default_rng(0)
    batch = sample_batch(rng)
    for row in batch.attributes:
        caption = sample_caption(row, rng)
        assert any(word in words_of(caption.text) for word in class_name_of(row).split())


def test_compact_ids_are_open_clips_ids_in_order() -> None:
    vocabulary = compact_vocabulary()
    tokenizer = SimpleTokenizer()
    captions = sample_batch(np.random.default_rng(5)).captions
    captions += tuple(HANDCRAFTED_PROMPT.replace("{class}", pair.class_name) for pair in ALL_PAIRS)
    compact = vocabulary.encode(captions)
    assert (
        np.array(vocabulary.kept)[compact] == tokenizer(list(captions), context_length=CONTEXT_LENGTH).numpy()
    ).all()
    assert vocabulary.kept[0] == 0
    assert vocabulary.kept[-2:] == (tokenizer.sot_token_id, tokenizer.eot_token_id)


def test_the_shipped_vocabulary_is_the_one_of_the_captions() -> None:
    kept = json.loads(embedded_paths().vocabulary_path.read_text())
    assert kept == list(compact_vocabulary().kept)
    assert kept == sorted(set(kept))


def test_words_outside_the_vocabulary_and_texts_too_long_are_errors() -> None:
    vocabulary = compact_vocabulary()
    with pytest.raises(KeyError, match="tumour"):
        vocabulary.encode(["a photo of a tumour"])
    with pytest.raises(ValueError, match="42 tokens"):
        vocabulary.encode(["a " * 40])
