"""Whoever holds a spec holds a valid one: each thing that can be wrong is an error that names it."""

import pytest

from fedrt.errors import ExitCode, SpecError
from fedrt.spec import (
    MAX_CLASSES,
    EvaluationSpec,
    EvaluationSplit,
    ExperimentSpec,
    LocalEvaluationSpec,
    LocalSpec,
    ModelSpec,
    OptimizerSpec,
    RoundsSpec,
    TrainingSpec,
)
from fedrt.tensors import Scope
from tests.samples import DIGEST, MODEL, local_spec

NAN, INFINITE = float("nan"), float("inf")


def refused(message):
    return pytest.raises(SpecError, match=message)


def test_a_spec_error_ends_a_command_as_wrong_configuration():
    assert SpecError.exit_code is ExitCode.CONFIGURATION


@pytest.mark.parametrize("digest", ["", "ab", DIGEST + "0", DIGEST.upper(), "g" * 64, DIGEST[:-1] + "\n"])
def test_a_weights_digest_is_64_hexadecimal_digits(digest):
    with refused("is not 64 hexadecimal digits; `fedrt-silo model --config silo.yaml` prints"):
        ModelSpec("ViT-B-16", digest, 512, 512)


@pytest.mark.parametrize("dims", [(0, 4), (8, 0), (-1, 4)])
def test_model_dimensions_are_positive(dims):
    with refused("model.context_dim and model.feature_dim must be between 1 and 1000000"):
        ModelSpec("ViT-B-16", DIGEST, *dims)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0}, "learning_rate is 0; it must be positive"),
        ({"learning_rate": -0.1}, "learning_rate is -0.1; it must be positive"),
        ({"learning_rate": NAN}, "learning_rate is nan"),
        ({"learning_rate": INFINITE}, "learning_rate is inf"),
        ({"momentum": 1}, r"momentum is 1; it must be in \[0, 1\)"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": NAN}, "momentum is nan"),
        ({"weight_decay": -1e-9}, "weight_decay is -1e-09; it must not be negative"),
        ({"weight_decay": INFINITE}, "weight_decay is inf"),
        ({"weight_decay": NAN}, "weight_decay is nan"),
    ],
)
def test_a_wrong_optimizer_value_is_named(values, message):
    with refused(f"training.optimizer.{message}"):
        OptimizerSpec(**values)


@pytest.mark.parametrize("values", [{"local_epochs": 0}, {"batch_size": 0}, {"local_epochs": -1}])
def test_epochs_and_batches_are_positive(values):
    with refused("training.local_epochs and training.batch_size must be between 1 and 1000000"):
        TrainingSpec(**values)


@pytest.mark.parametrize("values", [{"local_epochs": 2**32}, {"batch_size": 2**32}])
def test_epochs_and_batches_fit_the_wire(values):
    with refused("training"):
        TrainingSpec(**values)


@pytest.mark.parametrize("views", [-1, 10_001, 2**32])
def test_views_are_few_and_none_negative(views):
    with refused(f"training.views is {views}; it must be between 0 and 10000"):
        TrainingSpec(views=views)


def test_views_are_none_unless_asked_for():
    assert TrainingSpec().views == 0
    assert TrainingSpec(views=10_000).views == 10_000


def test_model_dimensions_fit_the_wire():
    with refused("model"):
        ModelSpec("ViT-B-16", DIGEST, 2**32, 512)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": -1}, "rounds.count is -1; it must be between 0 and 1000000"),
        ({"count": 1_000_001}, "rounds.count is 1000001"),
        ({"time_limit": 0}, "rounds.time_limit is 0 seconds; allowed are up to 30 days"),
        ({"time_limit": -1.0}, "rounds.time_limit is -1.0"),
        ({"time_limit": 30 * 86400 + 1}, "rounds.time_limit is 2592001"),
        ({"time_limit": NAN}, "rounds.time_limit is nan"),
        ({"min_results": 0}, "rounds.min_results must be at least 1"),
        ({"max_silos": 0}, "rounds.max_silos must not be below rounds.min_results"),
        ({"max_silos": 1, "min_results": 2}, "rounds.max_silos must not be below rounds.min_results"),
        ({"min_results": 3, "silos": ("a", "b")}, "rounds.min_results is 3, but rounds.silos names only 2"),
        ({"silos": ("North",)}, "rounds.silos: 'North' is not a silo name"),
        ({"silos": ("a\n",)}, r"rounds.silos: 'a\\n' is not a silo name"),
        ({"silos": ("-a",)}, "rounds.silos: '-a' is not a silo name"),
        ({"silos": ("a" * 64,)}, "is not a silo name"),
        ({"silos": ("a", "b", "a")}, "rounds.silos names a silo twice"),
        ({"retries": -1}, "rounds.retries must not be negative"),
    ],
)
def test_a_wrong_rounds_value_is_named(values, message):
    with refused(message):
        RoundsSpec(**{"count": 1, **values})


def test_rounds_at_the_edges_are_accepted():
    assert RoundsSpec(0, time_limit=30 * 86400, min_results=2, max_silos=2, silos=("a", "b2-c"), retries=0)
    assert RoundsSpec(1_000_000, silos=("a" * 63,), min_results=1)


def test_evaluation_every_must_not_be_negative():
    assert EvaluationSpec(0).every == 0
    with refused("evaluation.every must not be negative"):
        EvaluationSpec(-1)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((), "classes holds 0 names; allowed are 1 to 100000"),
        (("cat", "dog", "cat"), "classes names 'cat' twice"),
        (("cat", ""), "classes: '' is empty or longer"),
        (("cat", " \t"), "is empty or longer"),
        (("c" * 201,), "is empty or longer than 200 characters"),
        (tuple(str(number) for number in range(MAX_CLASSES + 1)), "classes holds 100001 names"),
    ],
)
def test_wrong_class_names_are_named(classes, message):
    with refused(message):
        local_spec(classes=classes)


class CountingName(str):
    """A text that counts how often it is compared."""

    __slots__ = ()
    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountingName.comparisons += 1
        return str.__eq__(self, other)


def test_a_class_named_twice_is_found_without_comparing_all_with_all():
    names = tuple(CountingName(number) for number in range(2000))
    with refused("classes names '1999' twice"):
        local_spec(classes=(*names, CountingName(1999)))
    assert CountingName.comparisons < 20 * len(names)


@pytest.mark.parametrize("hyperparameters", ["", "{", "context_length: 3", '{"a":}'])
def test_hyperparameters_must_be_json(hyperparameters):
    with refused("hyper-parameters are not JSON"):
        local_spec(hyperparameters=hyperparameters)


@pytest.mark.parametrize("hyperparameters", ["[]", "null", "3", '"a"'])
def test_hyperparameters_must_be_a_json_object(hyperparameters):
    with refused("hyper-parameters"):
        local_spec(hyperparameters=hyperparameters)


def test_deeply_nested_hyperparameters_are_a_spec_error():
    with refused("hyper-parameters"):
        local_spec(hyperparameters="[" * 100_000)


def test_the_silo_must_be_told_the_number_of_rounds():
    with refused("the round count a silo is told differs from rounds.count"):
        ExperimentSpec(local_spec(count=2), RoundsSpec(3))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_has_63_bits(seed):
    assert ExperimentSpec(local_spec(seed=2**63 - 1), RoundsSpec(1)).seed == 2**63 - 1
    with refused(r"seed must be between 0 and 2\*\*63 - 1"):
        local_spec(seed=seed)


# What is measured


def evaluation(*splits, novel=()):
    return LocalEvaluationSpec(tuple(map(EvaluationSplit, splits)), novel)


def test_a_silo_measures_its_own_images_unless_told_otherwise():
    assert local_spec().evaluation == LocalEvaluationSpec((EvaluationSplit.PERSONAL,), ())


@pytest.mark.parametrize(
    ("splits", "novel", "message"),
    [
        ((), (), "evaluation.splits is empty; name at least one of personal, base, novel and domain"),
        (("base", "personal", "base"), (), "evaluation.splits names a split twice"),
        (("personal", "novel"), (), "names novel, but evaluation.novel_classes is empty; add the names of the new"),
        (("personal", "base"), ("fox",), "evaluation.novel_classes is set, but evaluation.splits does not name novel"),
        (("novel",), ("fox", "fox"), "evaluation.novel_classes names 'fox' twice"),
        (("novel",), ("fox", " "), "evaluation.novel_classes: ' ' is empty or longer than 200 characters"),
        (("novel",), ("f" * 201,), "evaluation.novel_classes: .* longer than 200 characters"),
        (("novel",), tuple(map(str, range(MAX_CLASSES + 1))), "evaluation.novel_classes holds 100001 names"),
    ],
)
def test_wrong_splits_are_named(splits, novel, message):
    with refused(message):
        evaluation(*splits, novel=novel)


def test_a_novel_class_is_none_that_is_trained():
    novel = evaluation("novel", novel=("fox", "dog", "cat"))
    assert local_spec(classes=("cow",), evaluation=novel).evaluation is novel
    with refused("'cat' is in classes and in evaluation.novel_classes; keep it in one of the two"):
        local_spec(classes=("cow", "cat", "dog"), evaluation=novel)


def test_what_is_learned_for_each_class_is_not_there_for_a_novel_one():
    specific = '{"class_specific":true,"context_length":2}'
    measured = evaluation("personal", "novel", novel=("fox",))
    (tensor,) = local_spec(hyperparameters=specific, classes=("cat", "dog")).tensors()
    assert tensor.shape == (2, 2, 8)
    assert local_spec(classes=("cat", "dog"), evaluation=measured).tensors() == local_spec(classes=("cat",)).tensors()
    spec = local_spec(hyperparameters=specific, classes=("cat", "dog"), evaluation=measured)
    with refused(
        "'promptfl' .* learns something for each class, which novel classes lack; remove novel from evaluation"
    ):
        spec.tensors()


def test_one_class_more_is_no_accident_of_the_number_of_classes():
    """Of one class and a context of one vector, too, the axis of the classes is seen."""
    measured = evaluation("novel", novel=("fox",))
    with refused("learns something for each class"):
        local_spec(hyperparameters='{"class_specific":true,"context_length":1}', evaluation=measured).tensors()


def test_a_local_spec_knows_its_method_and_tensors():
    spec = local_spec(classes=("cat", "dog"))
    assert (spec.dims.context_dim, spec.dims.feature_dim, spec.dims.class_count) == (8, 4, 2)
    (tensor,) = spec.tensors()
    assert (tensor.name, tensor.shape, tensor.scope) == ("context", (2, 8), Scope.SHARED)


def test_a_method_that_is_not_installed_is_a_spec_error_only_when_it_is_needed():
    """A silo must be able to read, and refuse, an offer of a method it does not have."""
    spec = LocalSpec("fedxyz", "{}", MODEL, ("cat",), TrainingSpec(), 1)
    with refused("method 'fedxyz' is not installed"):
        spec.method()
