"""Hyper-parameters are parsed strictly; what is wrong is named together with what was meant."""

import json
import math

import pytest

from fedrt.aggregation import ServerMomentum, ServerState, TrimmedMean, Update, WeightedMean
from fedrt.context import ClassPosition
from fedrt.errors import SpecError
from fedrt.method import ModelDims, hyperparameters_json, parse_hyperparameters
from fedrt.methods import BUILT_IN, find_method, make_method, method_names
from fedrt.methods.coop import CoOp
from fedrt.methods.fedpgp import FedPGP
from fedrt.methods.fedprox import FedProx
from fedrt.methods.promptfl import PromptFL
from fedrt.methods.promptfolio import PromptFolio
from fedrt.methods.zeroshot import ZeroShot
from fedrt.tensors import Constant, Normal, Phrase, Scope, TensorSpec

DIMS = ModelDims(context_dim=8, feature_dim=4, class_count=3)
CONTEXTUAL = sorted(set(BUILT_IN) - {"zeroshot"})


def made(name, **values):
    return make_method(name, json.dumps(values))


def test_hyperparameters_have_the_defaults_of_the_papers():
    assert made("promptfl") == PromptFL(16, None, 1, ClassPosition.END, False, WeightedMean())
    assert made("coop") == CoOp(context_length=16)
    assert made("fedprox") == FedProx(context_length=16, proximal_weight=0.5)
    assert made("fedpgp") == FedPGP(16, rank=8, contrast_weight=0.5, temperature=0.5, positive="handcrafted")
    assert made("promptfolio") == PromptFolio(context_length=8, share=0.4)
    assert made("promptfl", context_length=4) == PromptFL(4)


def test_whole_numbers_are_numbers():
    assert (made("promptfolio", share=1).share, made("promptfolio", share="auto").share) == (1.0, "auto")
    assert made("fedprox", proximal_weight=0) == FedProx(proximal_weight=0.0)


@pytest.mark.parametrize("name", CONTEXTUAL)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context_lenght": 4}, "has no hyper-parameter 'context_lenght'; did you mean 'context_length'?"),
        ({"zzz": 4}, r"has no hyper-parameter 'zzz'; known are \['context_length', 'context_init', "),
        ({"context_length": "four"}, "context_length: Input should be a valid integer.*; got 'four'"),
        ({"context_length": 2.5}, "context_length: .*; got 2.5"),
        ({"context_length": None}, "context_length: .*; got None"),
        ({"context_init": 3}, "context_init: Input should be a valid string; got 3"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"context_count": 0}, "context_count must be at least 1"),
        ({"context_init": " "}, "context_init must hold at least one word, or be left out"),
        ({"class_position": "left"}, "class_position: Input should be 'end', 'middle' or 'front'; got 'left'"),
        ({"class_specific": "perhaps"}, "class_specific: Input should be a valid boolean.*; got 'perhaps'"),
        ({"server": {"rule": "mean"}}, "server.rule is 'mean'; did you mean 'median'"),
        ({"server": {"rule": "server_momentum", "momentum": 1}}, r"server.*momentum is 1.0; it must be in \[0, 1\)"),
        ({"server": {"rule": "trimmed_mean", "shares": 0.1}}, "server has no key 'shares'; did you mean 'share'"),
    ],
    ids=str,
)
def test_a_wrong_hyperparameter_of_the_context_is_named(name, values, message):
    with pytest.raises(SpecError, match=f"method '{name}'.*{message}"):
        made(name, **values)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("fedprox", {"proximal_weight": -0.1}, "proximal_weight is -0.1; it must be a number that is not negative"),
        ("fedprox", {"proximal_weight": math.nan}, "proximal_weight is nan; it must be a number that is not negative"),
        ("fedprox", {"proximal_weight": math.inf}, "proximal_weight is inf; it must be a number that is not negative"),
        ("fedprox", {"proximal_weight": "big"}, "proximal_weight: Input should be a valid number.*; got 'big'"),
        ("fedprox", {"proximal": 1}, "no hyper-parameter 'proximal'; did you mean 'proximal_weight'"),
        ("fedpgp", {"rank": 17}, "rank is 17; it must be at least 1 and at most context_length, which is 16"),
        ("fedpgp", {"context_length": 4}, "rank is 8; it must be at least 1 and at most context_length, which is 4"),
        ("fedpgp", {"rank": 0}, "rank is 0; it must be at least 1"),
        ("fedpgp", {"rank": -1}, "rank is -1; it must be at least 1"),
        ("fedpgp", {"rank": 1.5}, "rank: Input should be a valid integer.*; got 1.5"),
        ("fedpgp", {"contrast_weight": -1}, "contrast_weight is -1.0; it must be a number that is not negative"),
        ("fedpgp", {"contrast_weight": math.nan}, "contrast_weight is nan; it must be a number that is not negative"),
        ("fedpgp", {"temperature": 0}, "temperature is 0.0; it must be positive"),
        ("fedpgp", {"temperature": -0.5}, "temperature is -0.5; it must be positive"),
        ("fedpgp", {"temperature": math.nan}, "temperature is nan; it must be positive"),
        ("fedpgp", {"temperature": math.inf}, "temperature is inf; it must be positive"),
        ("fedpgp", {"positive": "frozen"}, "positive: Input should be 'handcrafted' or 'placeholder'; got 'frozen'"),
        ("fedpgp", {"temprature": 1}, "no hyper-parameter 'temprature'; did you mean 'temperature'"),
        ("promptfolio", {"share": 1.1}, "share is 1.1; it must be a number from 0 to 1, or the word 'auto'"),
        ("promptfolio", {"share": -0.1}, "share is -0.1; it must be a number from 0 to 1, or the word 'auto'"),
        ("promptfolio", {"share": math.nan}, "share is nan; it must be a number from 0 to 1, or the word 'auto'"),
        ("promptfolio", {"share": "otto"}, "share: .*it must be a number from 0 to 1, or the word 'auto'; got 'otto'"),
        ("promptfolio", {"share": "0.4"}, "share: .*it must be a number from 0 to 1, or the word 'auto'; got '0.4'"),
        ("promptfolio", {"share": True}, "share: .*it must be a number from 0 to 1, or the word 'auto'; got True"),
        ("promptfolio", {"share": None}, "share: .*it must be a number from 0 to 1, or the word 'auto'; got None"),
        ("promptfolio", {"shares": 0.4}, "no hyper-parameter 'shares'; did you mean 'share'"),
        ("coop", {"share": 0.4}, "has no hyper-parameter 'share'; known are"),
    ],
    ids=str,
)
def test_a_wrong_hyperparameter_of_one_method_is_named(name, values, message):
    with pytest.raises(SpecError, match=f"method '{name}'.*{message}"):
        made(name, **values)


def test_a_method_without_hyperparameters_takes_none():
    with pytest.raises(SpecError, match=r"'zeroshot' has no hyper-parameter 'rank'; known are \[\]"):
        parse_hyperparameters(ZeroShot, {"rank": 1})


def test_hyperparameters_are_written_canonically():
    assert hyperparameters_json(PromptFL()) == (
        '{"class_position":"end","class_specific":false,"context_count":1,"context_init":null,"context_length":16,'
        '"server":{"rule":"weighted_mean"}}'
    )
    assert hyperparameters_json(ZeroShot()) == "{}"


def test_only_dataclasses_have_hyperparameters():
    class Loose:
        name = "loose"

    with pytest.raises(TypeError, match="'loose' is not a dataclass"):
        hyperparameters_json(Loose())


@pytest.mark.parametrize(
    "method",
    [
        PromptFL(),
        PromptFL(3, "a photo of a", server=ServerMomentum(momentum=0.5)),
        CoOp(class_specific=True, class_position=ClassPosition.MIDDLE),
        FedProx(context_count=2, proximal_weight=1.5, server=TrimmedMean(share=0.2)),
        FedPGP(rank=1, positive="placeholder"),
        PromptFolio(share=0.0),
        PromptFolio(share="auto"),
        *(declared() for declared in BUILT_IN.values()),
    ],
    ids=str,
)
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


@pytest.mark.parametrize(
    ("options", "leading"),
    [
        ({}, ()),
        ({"context_count": 2}, (2,)),
        ({"class_specific": True}, (3,)),
        ({"context_count": 2, "class_specific": True}, (2, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("words", [None, "a photo of a"])
def test_what_each_method_declares(options, leading, words):
    init = Normal(0.02) if words is None else Phrase(words, 0.02 if "context_count" in options else 0.0)

    def context(name, scope):
        return TensorSpec(name, (*leading, 5, 8), scope, init)

    given = {"context_length": 5, "context_init": words, **options}
    assert made("promptfl", **given).tensors(DIMS) == (context("context", Scope.SHARED),)
    assert made("fedprox", **given).tensors(DIMS) == (context("context", Scope.SHARED),)
    assert made("coop", **given).tensors(DIMS) == (context("context", Scope.PRIVATE),)
    assert made("fedpgp", **given, rank=2).tensors(DIMS) == (
        context("shared_context", Scope.SHARED),
        TensorSpec("left", (*leading, 5, 2), Scope.PRIVATE, Normal(0.02)),
        TensorSpec("right", (*leading, 2, 8), Scope.PRIVATE, Normal(0.02)),
    )
    contexts = (context("shared_context", Scope.SHARED), context("private_context", Scope.PRIVATE))
    assert made("promptfolio", **given).tensors(DIMS) == contexts
    share = TensorSpec("share", (1,), Scope.PRIVATE, Constant(0.4), trained=False)
    assert made("promptfolio", **given, share="auto").tensors(DIMS) == (*contexts, share)


def test_zero_shot_trains_nothing_and_changes_nothing():
    state = ServerState({})
    assert ZeroShot().tensors(ModelDims(8, 4, 3)) == ()
    assert ZeroShot().aggregate(state, [Update("a", {}, 3)]) is state
