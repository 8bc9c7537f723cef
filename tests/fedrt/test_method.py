"""Hyper-parameters are parsed strictly; what is wrong is named together with what was meant."""

import pytest

from fedrt.aggregation import ServerState, Update
from fedrt.errors import SpecError
from fedrt.method import ModelDims, hyperparameters_json, parse_hyperparameters
from fedrt.methods import BUILT_IN, find_method, make_method, method_names
from fedrt.methods.promptfl import PromptFL
from fedrt.methods.zeroshot import ZeroShot
from fedrt.tensors import Normal, Phrase, Scope, TensorSpec


def test_hyperparameters_have_the_defaults_of_the_paper():
    assert parse_hyperparameters(PromptFL, {}) == PromptFL(context_length=16, context_init=None)
    assert parse_hyperparameters(PromptFL, {"context_length": 4}) == PromptFL(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_lenght": 4}, "'promptfl' has no hyper-parameter 'context_lenght'; did you mean 'context_length'?"),
        ({"zzz": 4}, r"has no hyper-parameter 'zzz'; known are \['context_length', 'context_init'\]"),
        ({"context_length": "four"}, "'promptfl': context_length: Input should be a valid integer.*; got 'four'"),
        ({"context_length": 2.5}, "context_length: .*; got 2.5"),
        ({"context_length": None}, "context_length: .*; got None"),
        ({"context_init": 3}, "context_init: Input should be a valid string; got 3"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"context_init": " "}, "context_init must hold at least one word, or be left out"),
    ],
)
def test_a_wrong_hyperparameter_is_named(values, message):
    with pytest.raises(SpecError, match=message):
        parse_hyperparameters(PromptFL, values)


def test_a_method_without_hyperparameters_takes_none():
    with pytest.raises(SpecError, match=r"'zeroshot' has no hyper-parameter 'rank'; known are \[\]"):
        parse_hyperparameters(ZeroShot, {"rank": 1})


def test_hyperparameters_are_written_canonically():
    assert hyperparameters_json(PromptFL()) == '{"context_init":null,"context_length":16}'
    assert hyperparameters_json(ZeroShot()) == "{}"


def test_only_dataclasses_have_hyperparameters():
    class Loose:
        name = "loose"

    with pytest.raises(TypeError, match="'loose' is not a dataclass"):
        hyperparameters_json(Loose())


@pytest.mark.parametrize("method", [PromptFL(), PromptFL(3, "a photo of a"), ZeroShot()])
def test_written_hyperparameters_make_the_same_method(method):
    assert make_method(method.name, hyperparameters_json(method)) == method


def test_an_unknown_method_is_named_with_the_closest_installed_one():
    with pytest.raises(SpecError, match=r"'promtfl' is not installed; did you mean 'promptfl'\?"):
        find_method("promtfl")
    with pytest.raises(SpecError, match=r"'xyz' is not installed; installed are .*'promptfl'.*'zeroshot'"):
        find_method("xyz")


def test_built_in_methods_are_listed_by_their_own_name():
    assert all(find_method(name).name == name for name in BUILT_IN)
    assert set(BUILT_IN) <= set(method_names())


def test_promptfl_shares_one_context():
    dims = ModelDims(context_dim=8, feature_dim=4, class_count=3)
    assert PromptFL(5).tensors(dims) == (TensorSpec("context", (5, 8), Scope.SHARED, Normal(0.02)),)
    (spec,) = PromptFL(5, "a photo").tensors(dims)
    assert spec.init == Phrase("a photo")


def test_zero_shot_trains_nothing_and_changes_nothing():
    state = ServerState({})
    assert ZeroShot().tensors(ModelDims(8, 4, 3)) == ()
    assert ZeroShot().aggregate(state, [Update("a", {}, 3)]) is state
