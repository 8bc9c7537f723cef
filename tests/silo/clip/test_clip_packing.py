"""The layout of class tokens: every prompt can be read off it, nothing stands twice in a chunk, and little is empty."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silo.clip.packing import WIDEST, Packing, pack

END = 99
NAMES = st.lists(st.integers(0, 4), min_size=1, max_size=30)
CONTEXT = [~0, ~1, ~2]


def read(packing: Packing, number: int) -> tuple[list[int], list[int]]:
    """Tokens and places that the end token of a class sees, itself last."""
    chunk, slot = divmod(int(packing.order[number]), packing.ends.shape[1])
    end = packing.ends[chunk, slot]
    seen = np.flatnonzero(packing.visible[chunk, end])
    return packing.tokens[chunk, seen].tolist(), packing.places[chunk, seen].tolist()


@settings(deadline=None, max_examples=150)
@given(st.lists(NAMES, min_size=1, max_size=60), st.integers(1, 20), st.booleans())
def test_each_end_token_sees_exactly_its_own_prompt(names: list[list[int]], first: int, with_context: bool) -> None:
    paths = [[*(CONTEXT if with_context else []), *name, END] for name in names]
    packing = pack(paths, first)
    for number, path in enumerate(paths):
        tokens, places = read(packing, number)
        assert tokens == path
        assert places == list(range(first, first + len(path)))


@settings(deadline=None, max_examples=100)
@given(st.lists(NAMES, min_size=1, max_size=60))
def test_a_slot_sees_its_ancestors_and_they_see_no_more_than_it(names: list[list[int]]) -> None:
    packing = pack([[*name, END] for name in names], 1)
    assert packing.visible.diagonal(axis1=1, axis2=2).all()
    for chunk in packing.visible:
        for slot, seen in enumerate(chunk):
            for ancestor in np.flatnonzero(seen):
                assert ancestor <= slot
                assert not (chunk[ancestor] & ~seen).any()


@settings(deadline=None, max_examples=100)
@given(st.lists(NAMES, min_size=1, max_size=60))
def test_equal_beginnings_stand_once_in_a_chunk(names: list[list[int]]) -> None:
    packing = pack([[*name, END] for name in names], 1)
    for tokens, visible, ends in zip(packing.tokens, packing.visible, packing.ends, strict=True):
        used = 1 + ends.max()
        prefixes = [tuple(tokens[np.flatnonzero(row)]) for row in visible[:used]]
        assert len(prefixes) == len(set(prefixes))


def test_three_classes_by_hand() -> None:
    packing = pack([[7, 3, END], [5, END], [7, END]], first_place=4)
    # sorted: [5, END], [7, 3, END], [7, END]; the last shares its 7
    assert packing.tokens.tolist() == [[5, END, 7, 3, END, END]]
    assert packing.places.tolist() == [[4, 5, 4, 5, 6, 5]]
    assert packing.ends.tolist() == [[1, 4, 5]]
    assert packing.order.tolist() == [1, 0, 2]
    assert np.flatnonzero(packing.visible[0, 5]).tolist() == [2, 5]


def test_classes_of_one_prompt_share_all_of_it() -> None:
    packing = pack([[1, END], [1, END]], 1)
    assert packing.slot_count == 2
    assert packing.ends.tolist() == [[1]]
    assert packing.order.tolist() == [0, 0]


def test_a_chunk_has_no_more_ends_than_slots_however_many_classes_are_called_alike() -> None:
    """The last layer takes as many end tokens of every chunk as the fullest has."""
    paths = [[1, END]] * 500 + [[2, number, END] for number in range(500)]
    packing = pack(paths, 1)
    assert packing.ends.size <= packing.slot_count
    assert [read(packing, number)[0] for number in range(len(paths))] == paths


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_little_is_empty_and_chunks_stay_narrow(count: int) -> None:
    draw = np.random.default_rng(count)
    paths = [[*draw.integers(0, 49_000, size=draw.integers(1, 9)).tolist(), 269, END] for _ in range(count)]
    packing = pack(paths, 17)
    needed = sum(map(len, paths))
    assert packing.slot_count <= 1.1 * needed
    assert packing.tokens.shape[1] <= WIDEST


def test_a_name_longer_than_a_chunk_should_be_gets_a_chunk_wide_enough() -> None:
    packing = pack([list(range(200)), [1, END]], 1)
    assert packing.tokens.shape[1] >= 200
    assert read(packing, 0)[0] == list(range(200))
    assert read(packing, 1)[0] == [1, END]
