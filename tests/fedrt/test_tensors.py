"""Declared tensors: names, digests, initial values and the check that stands before aggregation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrt.errors import TensorError
from fedrt.method import ModelDims
from fedrt.methods.promptfl import PromptFL
from fedrt.tensors import (
    Constant,
    Normal,
    Phrase,
    Scope,
    TensorSpec,
    Zeros,
    all_finite,
    check_tensors,
    initial_tensors,
    needs_clip,
    of_scope,
    schema_sha256,
    seeded_generator,
)

SHARED = TensorSpec("context", (2, 3), Scope.SHARED)
PRIVATE = TensorSpec("adapter_0", (4,), Scope.PRIVATE, Zeros())
SPECS = (SHARED, PRIVATE)


def values(**changes):
    tensors = {"context": np.ones((2, 3), np.float32), "adapter_0": np.zeros(4, np.float32), **changes}
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize("name", ["", "_", "a.b", "a b", "../x", "a-b", "a\n", "größe"])
def test_a_tensor_name_is_letters_digits_and_underscores(name):
    with pytest.raises(ValueError, match="is not made of letters, digits and underscores"):
        TensorSpec(name, (1,), Scope.SHARED)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (-1,)])
def test_a_tensor_without_elements_cannot_be_declared(shape):
    with pytest.raises(ValueError, match="'context' has an empty shape"):
        TensorSpec("context", shape, Scope.SHARED)


def test_only_a_private_tensor_can_be_set_by_the_method_itself():
    assert not TensorSpec("share", (1,), Scope.PRIVATE, trained=False).trained
    with pytest.raises(ValueError, match="'share' is shared but not trained; only a private tensor can be set locally"):
        TensorSpec("share", (1,), Scope.SHARED, trained=False)


def test_scopes_are_told_apart_in_the_declared_order():
    later = TensorSpec("a", (1,), Scope.SHARED)
    assert of_scope((SHARED, PRIVATE, later), Scope.SHARED) == (SHARED, later)
    assert of_scope((SHARED, PRIVATE, later), Scope.PRIVATE) == (PRIVATE,)


def test_the_schema_digest_of_promptfl_never_changes():
    schema = schema_sha256(PromptFL(context_length=16).tensors(ModelDims(512, 512, 3)))
    assert schema.hex() == "6d13db661e51e6c7d21410e133217f99dbd50afc0f6ee2592be0ca5c010f56d7"


def test_the_schema_digest_ignores_order_and_initial_values():
    other_init = TensorSpec("context", (2, 3), Scope.SHARED, Phrase("a photo"))
    untrained = TensorSpec("adapter_0", (4,), Scope.PRIVATE, Constant(0.4), trained=False)
    assert schema_sha256((untrained, other_init)) == schema_sha256(SPECS)


@pytest.mark.parametrize(
    "other",
    [
        TensorSpec("contexts", (2, 3), Scope.SHARED),
        TensorSpec("context", (3, 2), Scope.SHARED),
        TensorSpec("context", (6,), Scope.SHARED),
        TensorSpec("context", (2, 3), Scope.PRIVATE),
    ],
)
def test_the_schema_digest_tells_names_shapes_and_scopes_apart(other):
    assert schema_sha256((other, PRIVATE)) != schema_sha256(SPECS)


def test_initial_values_depend_on_seed_and_name_but_not_on_the_order_of_declaration():
    first, second = TensorSpec("a", (5, 2), Scope.SHARED), TensorSpec("b", (5, 2), Scope.SHARED)
    drawn = initial_tensors((first, second), 3)
    again = initial_tensors((second, first), 3)
    assert drawn["a"].tobytes() == again["a"].tobytes()
    assert drawn["a"].tobytes() != drawn["b"].tobytes()
    assert drawn["a"].tobytes() != initial_tensors((first,), 4)["a"].tobytes()


def test_initial_values_are_the_same_on_every_machine():
    drawn = initial_tensors((TensorSpec("context", (3,), Scope.SHARED, Normal(1.0)),), 1)["context"]
    assert drawn.tolist() == [0.879670262336731, 0.851165771484375, -0.6159434914588928]


def test_initial_values_have_the_declared_spread_shape_and_type():
    drawn = initial_tensors((TensorSpec("context", (100, 100), Scope.SHARED, Normal(0.02)), PRIVATE), 1)
    assert drawn["context"].std() == pytest.approx(0.02, rel=0.03)
    assert abs(drawn["context"].mean()) < 0.001
    check_tensors((TensorSpec("context", (100, 100), Scope.SHARED), PRIVATE), drawn)
    assert not drawn["adapter_0"].any()


def test_a_constant_is_the_same_everywhere():
    (drawn,) = initial_tensors((TensorSpec("share", (2, 3), Scope.PRIVATE, Constant(0.4), trained=False),), 1).values()
    assert (drawn.shape, drawn.dtype) == ((2, 3), np.float32)
    assert set(drawn.ravel().tolist()) == {float(np.float32(0.4))}


@pytest.mark.parametrize("init", [Normal(), Zeros(), Constant(2.0)])
def test_a_scalar_starts_as_an_array_too(init):
    scale = initial_tensors((TensorSpec("scale", (), Scope.SHARED, init),), 1)["scale"]
    assert isinstance(scale, np.ndarray)
    assert (scale.shape, scale.dtype) == ((), np.float32)


def test_a_phrase_can_only_be_computed_where_clip_is():
    phrase = TensorSpec("context", (2, 3), Scope.SHARED, Phrase("a photo"))
    assert needs_clip((PRIVATE, phrase))
    assert not needs_clip(SPECS)
    with pytest.raises(ValueError, match="'a photo': only a silo"):
        initial_tensors((phrase,), 1)


def test_generators_for_different_purposes_differ():
    draws = {seeded_generator(*key).random() for key in [(1,), (2,), (1, "a"), (1, "a", 1), (1, "a", "1"), (1, "b")]}
    assert len(draws) == 6
    assert seeded_generator(1, "a").random() == seeded_generator(1, "a").random()


def test_tensors_as_declared_pass():
    check_tensors(SPECS, values())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (values(extra=np.zeros(1, np.float32)), "'extra' is not declared; declared are .'adapter_0', 'context'."),
        (values(context=None), "'context' is missing"),
        (values(context=np.ones((3, 2), np.float32)), r"'context' has shape \(3, 2\); declared is \(2, 3\)"),
        (values(context=np.ones((2, 3))), "'context' has type float64; declared is float32"),
        (values(adapter_0=np.array([0, np.nan, 0, 0], np.float32)), "'adapter_0' has values that are not finite"),
        (values(adapter_0=np.array([0, 0, 0, -np.inf], np.float32)), "'adapter_0' has values that are not finite"),
    ],
)
def test_tensors_that_differ_from_their_declaration_are_named(tensors, message):
    with pytest.raises(TensorError, match=message):
        check_tensors(SPECS, tensors)


@given(st.integers(0, (1 << 21) + 4), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_bad_value_is_found_wherever_it_is(place, bad):
    array = np.zeros((1 << 21) + 5, np.float32)
    assert all_finite(array)
    array[place] = bad
    assert not all_finite(array)
