"""FedAvg with numbers that can be computed by hand, and without any trace of the order of arrival."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedrt.aggregation import ServerState, Update, federated_average, weighted_mean

SLICE = 1 << 18  # the elements that are summed at a time


def update(silo, count, *values):
    return Update(silo, {"context": np.array(values, np.float32)}, count)


def test_the_mean_is_weighted_by_examples():
    mean = weighted_mean([update("a", 1, 1.0, 0.0), update("b", 3, 5.0, -4.0)])
    assert mean["context"].tolist() == [4.0, -3.0]
    assert mean["context"].dtype == np.float32


def test_silos_without_examples_do_not_count():
    assert weighted_mean([update("a", 2, 1.0), update("b", 0, 100.0)])["context"].tolist() == [1.0]


def test_every_tensor_is_averaged():
    deltas = [{"a": np.full((2, 2), value, np.float32), "b": np.float32(-value).reshape(())} for value in (1, 3)]
    mean = weighted_mean([Update("x", deltas[0], 5), Update("y", deltas[1], 5)])
    assert mean["a"].tolist() == [[2, 2], [2, 2]]
    assert (mean["b"].shape, float(mean["b"])) == ((), -2.0)


def test_the_mean_is_added_to_the_shared_tensors_and_the_memory_stays():
    state = ServerState({"context": np.array([10, 20], np.float32)}, {"m": np.ones(1)})
    after = federated_average(state, [update("a", 1, 1.0, 2.0), update("b", 1, 3.0, 4.0)])
    assert after.shared["context"].tolist() == [12.0, 23.0]
    assert after.memory is state.memory
    assert state.shared["context"].tolist() == [10.0, 20.0]


@pytest.mark.parametrize("updates", [[], [update("a", 0, 1.0)], [update("a", 0, 1.0), update("b", 0, 1.0)]])
def test_no_examples_have_no_mean(updates):
    with pytest.raises(ValueError, match="at least one example"):
        weighted_mean(updates)


float32s = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    hnp.arrays(np.float32, 5, elements=float32s), hnp.arrays(np.float32, 5, elements=float32s), st.integers(1, 10**9)
)
def test_one_update_alone_adds_exactly_its_delta(shared, delta, count):
    after = federated_average(ServerState({"context": shared}), [Update("a", {"context": delta}, count)])
    assert np.array_equal(after.shared["context"], shared + delta)


@given(
    st.dictionaries(
        st.sampled_from("abcdefgh"),
        st.tuples(hnp.arrays(np.float32, (2, 3), elements=float32s), st.integers(1, 10**6)),
        min_size=1,
    ).flatmap(lambda silos: st.tuples(st.just(sorted(silos.items())), st.permutations(sorted(silos.items()))))
)
def test_the_order_of_arrival_changes_no_bit(orders):
    means = [
        weighted_mean([Update(silo, {"context": delta}, count) for silo, (delta, count) in order]) for order in orders
    ]
    assert means[0]["context"].tobytes() == means[1]["context"].tobytes()


def test_sums_that_depend_on_the_order_are_taken_by_silo():
    """Even in float64, (2**100 + 1) - 2**100 is 0 and (2**100 - 2**100) + 1 is 1."""
    updates = [update("a", 1, 2.0**100), update("b", 1, 1.0), update("c", 1, -(2.0**100))]
    assert {weighted_mean(order)["context"].tobytes() for order in itertools.permutations(updates)} == {b"\0\0\0\0"}


@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 7])
def test_large_tensors_equal_a_plain_float64_sum_across_the_slices(size):
    random = np.random.default_rng(size)
    counts = (3, 5, 11)
    updates = [
        Update(name, {"context": random.standard_normal(size).astype(np.float32)}, count)
        for name, count in zip("abc", counts, strict=True)
    ]
    naive = sum((update.example_count / 19) * update.delta["context"].astype(np.float64) for update in updates)
    assert weighted_mean(updates)["context"].tobytes() == naive.astype(np.float32).tobytes()


def test_small_updates_are_not_lost_beside_large_ones():
    """In float32 the sum 1e8 + 1 - 1e8 is 0."""
    mean = weighted_mean([update("a", 1, 1e8), update("b", 1, 1.0), update("c", 1, -1e8)])
    assert mean["context"][0] == pytest.approx(1 / 3, rel=1e-6)


def test_what_goes_in_is_not_changed():
    shared, delta = np.ones(3, np.float32), np.full(3, 2, np.float32)
    after = federated_average(ServerState({"context": shared}), [Update("a", {"context": delta}, 1)])
    assert after.shared["context"].dtype == np.float32
    assert (shared.tolist(), delta.tolist()) == ([1, 1, 1], [2, 2, 2])
