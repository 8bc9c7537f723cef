"""Server rules with numbers that can be computed by hand, and without any trace of the order of arrival."""

import dataclasses
import itertools
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from fedrt import aggregation
from fedrt.aggregation import (
    Median,
    ServerAdam,
    ServerMomentum,
    ServerRule,
    ServerState,
    TrimmedMean,
    UniformMean,
    Update,
    WeightedMean,
    trimmed_mean,
    uniform_mean,
    weighted_mean,
)
from fedrt.errors import SpecError, TensorError
from fedrt.method import hyperparameters_json, parse_hyperparameters
from fedrt.methods.promptfl import PromptFL
from fedrt.payload import headers_of, pack, unpack
from fedrt.tensors import seeded_generator

DOCS = Path(__file__).parents[2] / "docs"
SLICE = 1 << 18  # the elements that are combined at a time
RULES = [WeightedMean(), UniformMean(), ServerMomentum(), ServerAdam(), Median(), TrimmedMean(share=0.25)]
NAMES = "['weighted_mean', 'uniform_mean', 'server_momentum', 'server_adam', 'median', 'trimmed_mean']"
MEANS = [WeightedMean(), UniformMean(), Median(), TrimmedMean(share=0.25)]  # what one update alone passes unchanged
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)


def update(silo, count, *values):
    return Update(silo, {"context": np.array(values, np.float32)}, count)


def state(*values, **memory):
    arrays = {name: np.array(kept, np.float32) for name, kept in memory.items()}
    return ServerState({"context": np.array(values, np.float32)}, arrays)


def shared(after):
    return after.shared["context"].tolist()


def silos(*deltas):
    """One update of one example for each delta."""
    return [update(f"silo-{number}", 1, delta) for number, delta in enumerate(deltas)]


def whole(delta):
    """One update alone, of which the mean is exactly its delta."""
    return Update("a", {"context": delta}, 3)


def stored(after):
    """The state as the coordinator finds it in its store after a restart."""
    return ServerState(*(unpack(headers_of(part), bytes(pack(part))) if part else {} for part in vars(after).values()))


def bits(after):
    return [{name: array.tobytes() for name, array in part.items()} for part in vars(after).values()]


# Means


def test_the_mean_is_weighted_by_examples():
    mean = weighted_mean([update("a", 1, 1.0, 0.0), update("b", 3, 5.0, -4.0)])
    assert mean["context"].tolist() == [4.0, -3.0]
    assert mean["context"].dtype == np.float32


def test_silos_without_examples_do_not_count():
    assert weighted_mean([update("a", 2, 1.0), update("b", 0, 100.0)])["context"].tolist() == [1.0]


def test_in_the_uniform_mean_every_silo_counts_the_same():
    mean = uniform_mean([update("a", 1, 1.0, 0.0), update("b", 300, 5.0, -4.0), update("c", 0, 0.0, 1.0)])
    assert mean["context"].tolist() == [2.0, -1.0]
    assert mean["context"].dtype == np.float32


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 40.0 / 5), (1, (1.0 + 2.0 + 3.0) / 3), (2, 2.0)],
)
def test_the_trimmed_mean_leaves_out_the_ends(count, expected):
    assert trimmed_mean(silos(3.0, -1.0, 35.0, 1.0, 2.0), count)["context"].tolist() == [expected]


def test_each_coordinate_is_trimmed_by_itself():
    updates = [update("a", 9, 1.0, 70.0), update("b", 9, 2.0, 80.0), update("c", 9, 90.0, 4.0)]
    assert trimmed_mean(updates, 1)["context"].tolist() == [2.0, 70.0]


@pytest.mark.parametrize("mean", [weighted_mean, uniform_mean, lambda updates: trimmed_mean(updates, 0)])
def test_every_tensor_is_averaged(mean):
    deltas = [{"a": np.full((2, 2), value, np.float32), "b": np.float32(-value).reshape(())} for value in (1, 3)]
    found = mean([Update("x", deltas[0], 5), Update("y", deltas[1], 5)])
    assert found["a"].tolist() == [[2, 2], [2, 2]]
    assert (found["b"].shape, float(found["b"])) == ((), -2.0)


@pytest.mark.parametrize("updates", [[update("a", 0, 1.0)], [update("a", 0, 1.0), update("b", 0, 1.0)]])
def test_no_examples_have_no_weighted_mean(updates):
    with pytest.raises(ValueError, match="at least one example"):
        weighted_mean(updates)


@pytest.mark.parametrize(("silo_count", "count"), [(1, 1), (2, 1), (4, 2), (5, 3), (3, -1)])
def test_something_must_be_left_of_a_trimmed_mean(silo_count, count):
    with pytest.raises(ValueError, match=f"{count} cannot be trimmed at each end of {silo_count} updates"):
        trimmed_mean(silos(*range(silo_count)), count)


def test_small_updates_are_not_lost_beside_large_ones():
    """In float32 the sum 1e8 + 1 - 1e8 is 0."""
    updates = silos(1e8, 1.0, -1e8)
    for mean in (weighted_mean(updates), uniform_mean(updates)):
        assert mean["context"][0] == pytest.approx(1 / 3, rel=1e-6)


# Rules by hand


def test_the_mean_is_added_to_the_shared_tensors_and_the_memory_stays():
    before = state(10, 20, kept=[1.0])
    after = WeightedMean().apply(before, [update("a", 1, 1.0, 2.0), update("b", 3, 3.0, 4.0)])
    assert shared(after) == [12.5, 23.5]
    assert after.memory is before.memory
    after = UniformMean().apply(before, [update("a", 1, 1.0, 2.0), update("b", 3, 3.0, 4.0)])
    assert shared(after) == [12.0, 23.0]
    assert after.memory is before.memory


def test_momentum_by_hand():
    """v is 4, then 4/2 + 2, then 4/2 - 4; w moves by v/4."""
    rule, after = ServerMomentum(momentum=0.5, learning_rate=0.25), state(10)
    seen = []
    for delta in (4.0, 2.0, -4.0):
        after = rule.apply(after, [update("a", 1, delta - 3), update("b", 3, delta + 1)])  # of which the mean is delta
        seen.append((shared(after)[0], after.memory["velocity_context"].tolist()))
    assert seen == [(11.0, [4.0]), (12.0, [4.0]), (11.5, [-2.0])]


def test_adam_by_hand():
    """β1 1/2, β2 3/4, τ 1/2: v starts from 1/4, and moves to 3/16 + 13/16 = 1 by a delta of √(13/4)."""
    rule, delta = ServerAdam(learning_rate=0.5, beta1=0.5, beta2=0.75, tau=0.5), np.sqrt(3.25)
    after = rule.apply(state(1), silos(delta))
    assert after.memory["second_context"] == pytest.approx([1.0])
    assert after.memory["first_context"] == pytest.approx([delta / 2])
    assert shared(after) == pytest.approx([1 + 0.5 * (delta / 2) / (1 + 0.5)])
    again = rule.apply(after, silos(-1.0, 1.0, 6.0))  # of which the mean is 2
    first, second = delta / 4 + 1, 0.75 + 0.25 * 4
    assert again.memory["first_context"] == pytest.approx([first])
    assert again.memory["second_context"] == pytest.approx([second])
    assert shared(again)[0] - shared(after)[0] == pytest.approx(0.5 * first / (np.sqrt(second) + 0.5))


def test_adam_by_its_defaults_walks_at_the_pace_of_the_learning_rate():
    """A lasting delta, far larger than τ, ends in steps of the learning rate, whatever its size."""
    rule, after = ServerAdam(), state(0, 0)
    for _ in range(2000):
        before, after = after, rule.apply(after, [update("a", 5, 0.5, -200.0)])
    assert after.shared["context"] - before.shared["context"] == pytest.approx([0.01, -0.01], rel=0.01)


def test_momentum_and_adam_round_only_what_they_keep():
    """Every formula in float64 from what was stored, and its result once to float32."""
    old, mean = (seeded_generator(7, name).standard_normal(1000, np.float32) for name in ("old", "mean"))
    v, delta = old.astype(np.float64), mean.astype(np.float64)
    after = ServerMomentum(momentum=0.7, learning_rate=0.3).apply(state(*mean, velocity_context=old), [whole(mean)])
    velocity = (0.7 * v + delta).astype(np.float32)
    assert after.memory["velocity_context"].tobytes() == velocity.tobytes()
    step = (0.3 * velocity.astype(np.float64)).astype(np.float32)
    assert after.shared["context"].tobytes() == (mean + step).tobytes()

    rule = ServerAdam(learning_rate=0.3, beta1=0.7, beta2=0.6, tau=0.1)
    after = rule.apply(state(*mean, first_context=old, second_context=old**2), [whole(mean)])
    first = (0.7 * v + (1 - 0.7) * delta).astype(np.float32)
    second = (0.6 * (old**2).astype(np.float64) + (1 - 0.6) * delta**2).astype(np.float32)
    assert after.memory["first_context"].tobytes() == first.tobytes()
    assert after.memory["second_context"].tobytes() == second.tobytes()
    step = (0.3 * first.astype(np.float64) / (np.sqrt(second.astype(np.float64)) + 0.1)).astype(np.float32)
    assert after.shared["context"].tobytes() == (mean + step).tobytes()


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [((7,), 7.0), ((1, 4), 2.5), ((5, -1, 2), 2.0), ((9, 1, 2, 4), 3.0), ((3, 1, 1e30, 2, -1e30), 2.0)],
)
def test_the_median_by_hand(deltas, expected):
    after = Median().apply(state(100), silos(*deltas))
    assert shared(after) == [100 + expected]
    assert after.memory == {}


@pytest.mark.parametrize(
    ("share", "silo_count", "trimmed"),
    [
        *[(0.0, 5, 0), (0.1, 9, 0), (0.1, 10, 1), (0.2, 5, 1), (0.34, 3, 1), (0.29, 100, 29), (0.3, 10, 3)],
        *[(0.49, 2, 0), (0.4999999999, 2, 0), (0.4999999999, 4, 1), (0.4999999999, 7, 3), (0.45, 1, 0)],
    ],
)
def test_the_share_is_trimmed_rounded_down_and_never_everything(share, silo_count, trimmed):
    deltas = [float(number) ** 2 for number in range(silo_count)]
    kept = deltas[trimmed : silo_count - trimmed]
    after = TrimmedMean(share=share).apply(state(0), silos(*reversed(deltas)))
    assert shared(after) == [np.float32(sum(kept) / len(kept))]


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=12), st.floats(0, 0.5, exclude_max=True))
def test_robust_rules_agree_with_numpy_and_stay_between_the_extremes(deltas, share):
    updates = silos(*deltas)
    assert shared(Median().apply(state(0), updates)) == [np.median(deltas)]
    (trimmed,) = shared(TrimmedMean(share=share).apply(state(0), updates))
    assert min(deltas) <= trimmed <= max(deltas)


@pytest.mark.parametrize("wrong", [1e30, -1e30])
def test_one_silo_gone_mad_moves_the_mean_but_not_the_median(wrong):
    updates = silos(1.0, 2.0, wrong, 3.0)
    assert 1 <= shared(Median().apply(state(0), updates))[0] <= 3
    assert 1 <= shared(TrimmedMean(share=0.25).apply(state(0), updates))[0] <= 3
    assert abs(shared(UniformMean().apply(state(0), updates))[0]) > 1e29


# Limiting cases

float32s = st.floats(-(2.0**60), 2.0**60, width=32)
vectors = hnp.arrays(np.float32, (2, 3), elements=float32s)
counts = st.integers(1, 10**6)
rounds_of_updates = st.lists(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(vectors, vectors, counts), min_size=1),
    min_size=1,
    max_size=3,
)


def updates_of(silos):
    return [Update(silo, {"context": one, "other": two}, count) for silo, (one, two, count) in silos]


def start():
    return ServerState({"context": np.full((2, 3), 0.25, np.float32), "other": np.ones((2, 3), np.float32)})


def run(rule, rounds, between=lambda after: after):
    """The states after each round; `between` stands for what happens to a state in between."""
    states = [start()]
    for silos in rounds:
        states.append(between(rule.apply(states[-1], updates_of(silos))))
    return states[1:]


@given(vectors, vectors, counts)
def test_one_update_alone_adds_exactly_its_delta(before, delta, count):
    for rule in MEANS:
        after = rule.apply(ServerState({"context": before}), [Update("a", {"context": delta}, count)])
        assert np.array_equal(after.shared["context"], before + delta)


@pytest.mark.parametrize(
    ("rule", "plain"),
    [
        (ServerMomentum(momentum=0, learning_rate=1), WeightedMean()),
        (TrimmedMean(share=0), UniformMean()),
        (TrimmedMean(share=0.49), Median()),  # of at most eight silos
    ],
)
@settings(max_examples=30)
@given(rounds_of_updates)
def test_limiting_cases_are_the_plain_rule_bit_for_bit(rule, plain, rounds):
    rounds = [silos.items() for silos in rounds]
    found, expected = run(rule, rounds), run(plain, rounds)
    assert [bits(after)[0] for after in found] == [bits(after)[0] for after in expected]


def test_silos_of_one_size_have_the_same_weighted_and_uniform_mean():
    updates = [update("a", 4, 1.0), update("b", 4, 2.0), update("c", 4, 6.0), update("d", 4, -1.0)]
    assert shared(WeightedMean().apply(state(5), updates)) == shared(UniformMean().apply(state(5), updates)) == [7.0]


# What holds of every rule


@every_rule
@settings(max_examples=30)
@given(st.data())
def test_the_order_of_arrival_changes_no_bit(rule, data):
    rounds = [sorted(silos.items()) for silos in data.draw(rounds_of_updates)]
    permuted = [data.draw(st.permutations(silos)) for silos in rounds]
    assert list(map(bits, run(rule, permuted))) == list(map(bits, run(rule, rounds)))


@pytest.mark.parametrize("rule", [WeightedMean(), UniformMean()])
def test_sums_that_depend_on_the_order_are_taken_by_silo(rule):
    """Even in float64, (2**100 + 1) - 2**100 is 0 and (2**100 - 2**100) + 1 is 1."""
    updates = [update("a", 1, 2.0**100), update("b", 1, 1.0), update("c", 1, -(2.0**100))]
    sums = {rule.apply(state(0), order).shared["context"].tobytes() for order in itertools.permutations(updates)}
    assert sums == {b"\0\0\0\0"}


@every_rule
@settings(max_examples=30)
@given(rounds_of_updates)
def test_a_restart_between_two_rounds_changes_no_bit(rule, rounds):
    rounds = [silos.items() for silos in rounds]
    assert list(map(bits, run(rule, rounds, between=stored))) == list(map(bits, run(rule, rounds)))


@every_rule
@settings(max_examples=30)
@given(rounds_of_updates)
def test_results_are_float32_finite_and_of_the_declared_shapes(rule, rounds):
    for after in run(rule, [silos.items() for silos in rounds]):
        assert {name: array.shape for name, array in after.shared.items()} == {"context": (2, 3), "other": (2, 3)}
        for array in (*after.shared.values(), *after.memory.values()):
            assert array.dtype == np.float32
            assert np.isfinite(array).all()


@every_rule
def test_what_goes_in_is_neither_changed_nor_handed_out(rule):
    before = rule.apply(start(), updates_of([("a", (np.ones((2, 3), np.float32), np.ones((2, 3), np.float32), 3))]))
    updates = updates_of(
        (name, (np.full((2, 3), value, np.float32), np.eye(2, 3, dtype=np.float32), 2))
        for name, value in (("a", 2), ("b", 5), ("c", 7), ("d", 1))
    )
    given_arrays = [*before.shared.values(), *before.memory.values()]
    given_arrays += [array for update in updates for array in update.delta.values()]
    for array in given_arrays:
        array.flags.writeable = False  # as those are that come from the store
    copies = [array.copy() for array in given_arrays]
    after = rule.apply(before, updates)
    assert all(np.array_equal(array, copy) for array, copy in zip(given_arrays, copies, strict=True))
    made = [*after.shared.values(), *(after.memory.values() if after.memory is not before.memory else ())]
    for one, other in itertools.combinations(made, 2):
        assert not np.shares_memory(one, other)
    assert not any(np.shares_memory(one, other) for one in made for other in given_arrays)


@every_rule
def test_no_updates_are_an_error(rule):
    with pytest.raises(ValueError, match="a server rule needs at least one update"):
        rule.apply(state(1), [])


@every_rule
def test_a_scalar_tensor_is_combined_too(rule):
    updates = [Update(name, {"scale": np.array(value, np.float32)}, 1) for name, value in (("a", 1), ("b", 1))]
    after = rule.apply(ServerState({"scale": np.array(2, np.float32)}), updates)
    assert after.shared["scale"].shape == ()
    assert float(after.shared["scale"]) > 2


def test_what_overflows_is_infinite_without_a_warning_for_the_caller_to_refuse():
    """`coordinator.combining` checks that shared tensors are finite."""
    for rule in (*MEANS, ServerMomentum(), ServerAdam(learning_rate=3e38, tau=1e-9)):
        largest = np.finfo(np.float32).max if not isinstance(rule, ServerAdam) else 1e-9
        after = rule.apply(state(np.finfo(np.float32).max), silos(largest))
        assert np.isposinf(after.shared["context"]).all(), rule


def test_a_memory_that_overflows_is_an_error_because_nothing_else_would_tell():
    with pytest.raises(TensorError, match="server_adam: the squared mean delta of tensor 'context' is beyond float32"):
        ServerAdam().apply(state(0), silos(1e25))


# Large tensors


@every_rule
@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 7])
def test_slices_change_no_bit(rule, size, monkeypatch):
    random = np.random.default_rng(size)

    def draw():
        return random.standard_normal(size).astype(np.float32)

    rounds = [
        [Update(name, {"context": draw()}, count) for name, count in zip("abcd", (3, 5, 11, 2), strict=True)]
        for _ in "12"
    ]

    def run_both():
        first = rule.apply(ServerState({"context": np.zeros(size, np.float32)}), rounds[0])
        return bits(rule.apply(first, rounds[1]))

    sliced = run_both()
    monkeypatch.setattr(aggregation, "_SLICE", 1 << 30)
    assert run_both() == sliced


@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 2 * SLICE + 7])
def test_large_tensors_equal_a_plain_float64_sum_across_the_slices(size):
    random = np.random.default_rng(size)
    sizes = (3, 5, 11)
    updates = [
        Update(name, {"context": random.standard_normal(size).astype(np.float32)}, count)
        for name, count in zip("abc", sizes, strict=True)
    ]
    deltas = [update.delta["context"].astype(np.float64) for update in updates]
    naive = sum((count / 19) * delta for count, delta in zip(sizes, deltas, strict=True))
    assert weighted_mean(updates)["context"].tobytes() == naive.astype(np.float32).tobytes()
    assert uniform_mean(updates)["context"].tobytes() == (sum(deltas) / 3).astype(np.float32).tobytes()
    assert trimmed_mean(updates, 1)["context"].tobytes() == np.median(deltas, axis=0).astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("rule", "arrays"),
    [
        *[(WeightedMean(), 1), (UniformMean(), 1), (Median(), 1), (TrimmedMean(share=0.25), 1)],
        (ServerMomentum(), 4),  # the mean, what was remembered (nothing yet), what is remembered now, the step
        (ServerAdam(), 6),  # the mean, two that were remembered, two that are now, the step
    ],
)
def test_a_rule_holds_few_arrays_of_the_size_of_the_payload_and_none_in_float64(rule, arrays):
    size = 20 * SLICE
    before = ServerState({"context": np.zeros(size, np.float32)})
    updates = [Update(name, {"context": np.ones(size, np.float32)}, 1) for name in "abcd"]
    tracemalloc.start()
    rule.apply(before, updates)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (arrays + 0.9) * 4 * size


# Rules as hyper-parameters of a method


@pytest.mark.parametrize(
    "rule", [*RULES, ServerMomentum(momentum=0.5), ServerAdam(tau=0.5, beta1=0), TrimmedMean(share=0.4)]
)
def test_a_rule_survives_the_way_through_json(rule):
    method = PromptFL(server=rule)
    assert TypeAdapter(PromptFL).validate_json(hyperparameters_json(method)) == method


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_named_by_itself_with_its_defaults(rule):
    found = parse_hyperparameters(PromptFL, {"server": {"rule": rule.rule}})
    assert found == PromptFL(server=type(rule)())


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_refuses_keys_that_it_does_not_have(rule):
    with pytest.raises(ValidationError, match="Unexpected keyword argument"):
        TypeAdapter(ServerRule).validate_python({"rule": rule.rule, "unknown": 1})


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"rule": "trimed_mean"}, f"server.rule is 'trimed_mean'; did you mean 'trimmed_mean'? known are {NAMES}"),
        ({"rule": "krum"}, f"server.rule is 'krum'; known are {NAMES}"),
        ({"rule": 3}, f"server.rule is '3'; known are {NAMES}"),
        ({"rule": "median", "x": 2}, "server has no key 'x'; known are ['rule']"),
        ({"rule": "trimmed_mean", "shar": 0.2}, "server has no key 'shar'; did you mean 'share'?"),
        ("median", "server must be a mapping such as {rule: median}; got 'median'"),
        ("krum", "server must be a mapping such as {rule: weighted_mean}; got 'krum'"),
        (None, "server must be a mapping such as {rule: weighted_mean}; got None"),
        ({"share": 0.2}, f"server.rule is missing; known are {NAMES}"),
        ({"rule": "trimmed_mean", "share": 0.5}, "server: share is 0.5; it must be in [0, 0.5)"),
        ({"rule": "trimmed_mean", "share": -0.1}, "server: share is -0.1; it must be in [0, 0.5)"),
        (
            {"rule": "trimmed_mean", "share": "half"},
            "server.share: Input should be a valid number, unable to parse string as a number; got 'half'",
        ),
        ({"rule": "server_momentum", "momentum": 1}, "server: momentum is 1.0; it must be in [0, 1)"),
        ({"rule": "server_momentum", "momentum": float("nan")}, "server: momentum is nan; it must be in [0, 1)"),
        (
            {"rule": "server_momentum", "learning_rate": 0},
            "server: learning_rate is 0.0; it must be positive and finite",
        ),
        (
            {"rule": "server_adam", "learning_rate": float("inf")},
            "server: learning_rate is inf; it must be positive and finite",
        ),
        ({"rule": "server_adam", "beta1": -0.1}, "server: beta1 is -0.1; it must be in [0, 1)"),
        ({"rule": "server_adam", "beta2": 1}, "server: beta2 is 1.0; it must be in [0, 1)"),
        ({"rule": "server_adam", "tau": 0}, "server: tau is 0.0; it must be in (0, 1]"),
    ],
)
def test_a_wrong_rule_is_named_in_words(server, message):
    with pytest.raises(SpecError) as caught:
        parse_hyperparameters(PromptFL, {"server": server})
    assert str(caught.value) == f"method 'promptfl': {message}"


def test_the_documented_rules_have_the_options_and_defaults_of_the_code():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8").partition("\n### Server rules\n")[2]
    documented = {
        rule: {key: float(default) for key, default in re.findall(r"`(\w+): ([\d.]+)`", options)}
        for rule, options in re.findall(r"^\| `(\w+)` \|[^|]+\|([^|]*)\|$", text, re.MULTILINE)
    }
    assert documented == {
        kind().rule: {field.name: field.default for field in dataclasses.fields(kind) if field.name != "rule"}
        for kind in map(type, RULES)
    }
