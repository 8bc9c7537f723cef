"""The vocabulary spells as open_clip's tokeniser does, and a compact one says what it lacks."""

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrt.errors import FailureReason, WorkError
from silo.clip.tokens import Vocabulary

FULL = Vocabulary()
KEPT = sorted({0, 49406, 49407, *FULL.encode("a photo of a red circle.")})
COMPACT = Vocabulary(KEPT)


def test_whole_vocabulary_has_clips_ids() -> None:
    assert (FULL.size, FULL.start, FULL.end) == (49408, 49406, 49407)
    assert FULL.encode("a photo of a dog.") == [320, 1125, 539, 320, 1929, 269]


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20))
def test_encode_agrees_with_open_clip(text: str) -> None:
    ids = open_clip.tokenize(text, 200)[0].tolist()
    assert [49406, *FULL.encode(text), 49407] == ids[: ids.index(49407) + 1]


def test_compact_ids_are_positions_and_keep_the_order() -> None:
    ids = FULL.encode("a red photo.")
    assert COMPACT.encode("a red photo.") == [KEPT.index(i) for i in ids]
    assert COMPACT.end == COMPACT.size - 1


def test_unknown_words_are_listed() -> None:
    assert COMPACT.unknown_words("a purple circle of velvet") == ["purple", "velvet"]
    with pytest.raises(WorkError, match=r"'purple', 'velvet'.*use other words.*ViT-B-16") as caught:
        COMPACT.encode("a purple circle of velvet")
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE


def test_control_tokens_in_text_are_refused() -> None:
    with pytest.raises(WorkError, match="control tokens"):
        FULL.encode("dog <end_of_text> cat")


@pytest.mark.parametrize("kept", [[1, 0, 49406, 49407], [0, 1], [0, 49406, 49407, 49408]])
def test_impossible_compact_vocabularies(kept: list[int]) -> None:
    with pytest.raises(ValueError, match="kept_ids"):
        Vocabulary(kept)
