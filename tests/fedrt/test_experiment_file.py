import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrt import spec
from fedrt.aggregation import ServerAdam, ServerMomentum, TrimmedMean, WeightedMean
from fedrt.architectures import ARCHITECTURES, ClipDims, clip_dims
from fedrt.config import effective_yaml
from fedrt.context import ClassPosition
from fedrt.errors import ConfigurationError, SpecError
from fedrt.experiment_file import (
    EvaluationSection,
    ExperimentFile,
    ExperimentModelSection,
    OptimizerSection,
    RoundsSection,
    TrainingSection,
    experiment_file,
    experiment_schema,
    experiment_spec,
    load_experiment,
)
from fedrt.method import ModelDims, hyperparameters_json
from fedrt.methods.promptfl import PromptFL

DIGEST = "0123456789abcdef" * 4
TEXT = f"""
experiment: skin-1
method: {{name: promptfl, context_length: 4}}
model: {{architecture: ViT-B-16, weights_sha256: "{DIGEST}"}}
classes: [melanoma, nevus, no]
rounds: {{count: 25}}
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def write_and_load(text: str) -> tuple[str, spec.ExperimentSpec]:
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return load_experiment(path)

    return write_and_load


@pytest.fixture
def problem(load: Any, tmp_path: Path) -> Any:
    def message(text: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load(text)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return message


def test_defaults_are_those_of_the_specification(load: Any) -> None:
    experiment_id, found = load(TEXT)
    assert experiment_id == "skin-1"
    assert found == spec.ExperimentSpec(
        local=spec.LocalSpec(
            method_name="promptfl",
            hyperparameters_json=hyperparameters_json(PromptFL(context_length=4)),
            model=spec.ModelSpec("ViT-B-16", DIGEST, 512, 512),
            classes=("melanoma", "nevus", "no"),
            training=spec.TrainingSpec(),
            round_count=25,
        ),
        rounds=spec.RoundsSpec(count=25),
    )
    assert found.local.evaluation.splits == (spec.EvaluationSplit.PERSONAL,)
    assert found.seed == found.local.seed == 1


def test_every_key(load: Any) -> None:
    _, found = load(
        TEXT.replace("rounds: {count: 25}", "")
        + """
training:
  local_epochs: 2
  batch_size: 8
  optimizer: {name: adamw, learning_rate: 1e-3, momentum: 0, weight_decay: 0.1}
  schedule: cosine
  precision: bf16
  views: 6
rounds:
  {count: 3, time_limit: 1h30m, min_results: 1, max_silos: 2, silos: [north, south], on_too_few: retry, retries: 5}
evaluation: {every: 0, splits: [base, novel, personal], novel_classes: [keratosis, lentigo]}
seed: 7
"""
    )
    optimizer = spec.OptimizerSpec(spec.OptimizerName.ADAMW, 0.001, 0.0, 0.1)
    assert found.local.training == spec.TrainingSpec(2, 8, optimizer, spec.Schedule.COSINE, spec.Precision.BF16, 6)
    assert found.rounds == spec.RoundsSpec(3, 5400.0, 1, 2, ("north", "south"), spec.OnTooFew.RETRY, 5)
    assert (found.evaluation.every, found.seed, found.local.seed) == (0, 7, 7)
    splits = (spec.EvaluationSplit.BASE, spec.EvaluationSplit.NOVEL, spec.EvaluationSplit.PERSONAL)
    assert found.local.evaluation == spec.LocalEvaluationSpec(splits, ("keratosis", "lentigo"))


def test_a_server_rule_beside_the_other_hyperparameters(load: Any) -> None:
    text = TEXT.replace("context_length: 4", "context_length: 4, server: {rule: server_momentum, momentum: 0.5}")
    method = load(text)[1].local.method()
    assert method == PromptFL(context_length=4, server=ServerMomentum(momentum=0.5))


@pytest.mark.parametrize(
    ("section", "specified"),
    [
        (OptimizerSection, [spec.OptimizerSpec]),
        (TrainingSection, [spec.TrainingSpec]),
        (RoundsSection, [spec.RoundsSpec]),
        (EvaluationSection, [spec.EvaluationSpec, spec.LocalEvaluationSpec]),
        (ExperimentModelSection, [spec.ModelSpec]),
    ],
)
def test_sections_have_the_fields_and_defaults_of_the_specification(section: Any, specified: list[Any]) -> None:
    fields = [field for dataclass in specified for field in dataclasses.fields(dataclass)]
    assert sorted(section.model_fields) == sorted(field.name for field in fields)
    for field in fields:
        if field.default is not dataclasses.MISSING:
            assert section.model_fields[field.name].default == field.default


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds:", "round:", "experiment.yaml: 2 problems\n  rounds is missing; add it (How many rounds, with whom"),
        ("rounds:", "round:", "\n  round is not a known key; did you mean 'rounds'?"),
        ("skin-1", "Skin", "experiment.yaml: experiment: name 'Skin' is not usable; use 1 to 63 of a-z, 0-9 and '-'"),
        ("promptfl", "promptlf", "experiment.yaml: method 'promptlf' is not installed; did you mean 'promptfl'?"),
        ("context_length", "context_lenght", "method 'promptfl' has no hyper-parameter 'context_lenght'; did you mean"),
        (
            "context_length: 4",
            "context_length: many",
            "experiment.yaml: method 'promptfl': context_length: Input should",
        ),
        ("context_length: 4", "context_length: 0", "context_length must be at least 1"),
        (
            "context_length: 4",
            "server: {rule: trimed_mean}",
            "experiment.yaml: method 'promptfl': server.rule is 'trimed_mean'; did you mean 'trimmed_mean'? known are",
        ),
        ("context_length: 4", "server: {rule: median, x: 2}", "'promptfl': server has no key 'x'; known are ['rule']"),
        (
            "context_length: 4",
            "server: median",
            "'promptfl': server must be a mapping such as {rule: median}; got 'median'",
        ),
        (
            "context_length: 4",
            "server: {rule: trimmed_mean, share: 0.5}",
            "'promptfl': server: share is 0.5; it must be in [0, 0.5)",
        ),
        ("name: promptfl, ", "", "experiment.yaml: method.name is missing; add it (Name of an installed method"),
        (
            "ViT-B-16",
            "ViT-B/16",
            "model.architecture 'ViT-B/16' is not one whose dimensions fedrt knows; did you mean 'Vi",
        ),
        (
            "ViT-B-16",
            "x",
            "fedrt knows; add model.context_dim (width of its text tower) and model.feature_dim (embed_dim)",
        ),
        (
            "ViT-B-16",
            "x, context_dim: 9",
            "knows; add model.context_dim (width of its text tower) and model.feature_dim",
        ),
        (
            "ViT-B-16",
            "RN50, feature_dim: 512",
            "model.feature_dim is 512, but 'RN50' has 1024; remove model.feature_dim",
        ),
        (DIGEST, "abc", "experiment.yaml: model.weights_sha256 'abc' is not 64 hexadecimal digits; `fedrt-silo model"),
        (f'"{DIGEST}"', "1", "experiment.yaml: model.weights_sha256 must be text; got 1; put it in quotes"),
        ("nevus", "melanoma", "experiment.yaml: classes names 'melanoma' twice"),
        ("nevus", "1", "experiment.yaml: classes[1] must be text; got 1; put it in quotes"),
        (
            "classes: [melanoma, nevus, no]",
            "",
            "neither of classes and classes_file is given; give exactly one of them",
        ),
        (
            "rounds",
            "classes_file: c.txt\nrounds",
            "both of classes and classes_file is given; give exactly one of them",
        ),
        ("classes: [melanoma, nevus, no]", "classes: []", "experiment.yaml: classes holds 0 names; allowed are 1 to"),
        (
            "classes: [melanoma, nevus, no]",
            "classes_file: no.txt",
            "no.txt' cannot be read (No such file or directory)",
        ),
        ("count: 25", "count: -1", "experiment.yaml: rounds.count is -1; it must be between 0 and 1000000"),
        (
            "count: 25",
            "count: 1, silos: north",
            "rounds.silos must be all or a list of silo names such as [north, south]",
        ),
        ("count: 25", "count: 1, silos: []", "rounds.silos must be all or a list of silo names such as [north, south]"),
        ("count: 25", "count: 1, silos: [A]", "experiment.yaml: rounds.silos: 'A' is not a silo name"),
        ("count: 25", "count: 1, time_limit: 60", "rounds.time_limit must be a duration with a unit, such as 30s"),
        ("count: 25", "count: 1, on_too_few: abort", "rounds.on_too_few must be 'fail' or 'retry'; got 'abort'"),
        (
            "rounds",
            "evaluation: {splits: [personal, novel]}\nrounds",
            "experiment.yaml: evaluation.splits names novel, but evaluation.novel_classes is empty; add the names of",
        ),
        (
            "rounds",
            "evaluation: {novel_classes: [lentigo]}\nrounds",
            "experiment.yaml: evaluation.novel_classes is set, but evaluation.splits does not name novel; add it",
        ),
        (
            "rounds",
            "evaluation: {splits: [novel], novel_classes: [lentigo, nevus]}\nrounds",
            "experiment.yaml: 'nevus' is in classes and in evaluation.novel_classes; keep it in one of the two",
        ),
        (
            "rounds",
            "evaluation: {splits: [novel], novel_classes: [lentigo, lentigo]}\nrounds",
            "experiment.yaml: evaluation.novel_classes names 'lentigo' twice",
        ),
        ("rounds", "evaluation: {splits: [base, base]}\nrounds", "evaluation.splits names a split twice"),
        ("rounds", "evaluation: {splits: []}\nrounds", "evaluation.splits is empty; name at least one of personal"),
        (
            "rounds",
            "evaluation: {splits: [test]}\nrounds",
            "evaluation.splits[0] must be 'personal', 'base', 'novel' or 'domain'; got 'test'",
        ),
        (
            "rounds",
            "evaluation: {splits: novel}\nrounds",
            "evaluation.splits must be a list such as [one, two]; got 'novel'; write [novel]",
        ),
        (
            "context_length: 4",
            "class_specific: true}\nevaluation: {splits: [novel], novel_classes: [lentigo]",
            "method 'promptfl' with these hyper-parameters learns something for each class, which novel classes lack",
        ),
        ("rounds", f"seed: {2**63}\nrounds", "experiment.yaml: seed must be between 0 and 2**63 - 1"),
        ("rounds", "seed: -1\nrounds", "experiment.yaml: seed must be between 0 and 2**63 - 1"),
        (
            "promptfl, context_length: 4",
            "zeroshot",
            "experiment.yaml: method 'zeroshot' trains nothing, but rounds.count is 25; "
            "set rounds.count to 0 to evaluate only, or choose a method that trains, such as 'promptfl'",
        ),
    ],
)
def test_messages(problem: Any, old: str, new: str, message: str) -> None:
    assert old in TEXT
    assert message in problem(TEXT.replace(old, new))


def test_messages_of_the_specification_are_specification_errors(load: Any) -> None:
    with pytest.raises(SpecError):
        load(TEXT.replace("nevus", "melanoma"))


def test_without_rounds_any_method_only_evaluates(load: Any) -> None:
    for method in ("zeroshot", "promptfl"):
        text = TEXT.replace("promptfl, context_length: 4", method).replace("count: 25", "count: 0")
        assert load(text)[1].rounds.count == 0


def test_unknown_architecture_with_both_dimensions(load: Any) -> None:
    model = load(TEXT.replace("ViT-B-16", "mine, context_dim: 7, feature_dim: 9"))[1].local.model
    assert (model.architecture, model.context_dim, model.feature_dim) == ("mine", 7, 9)


def test_classes_from_a_file_beside_the_experiment(load: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("\ufeffmelanoma\r\n\r\n basal cell carcinoma \r\nno\n".encode())
    _, found = load(TEXT.replace("classes: [melanoma, nevus, no]", "classes_file: names.txt"))
    assert found.local.classes == ("melanoma", "basal cell carcinoma", "no")


def test_classes_file_of_another_encoding(problem: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes("Läsion".encode("latin-1"))
    text = TEXT.replace("classes: [melanoma, nevus, no]", "classes_file: names.txt")
    assert problem(text) == "experiment.yaml: classes_file 'names.txt' is not UTF-8 text; save it as UTF-8"


NAMES = st.from_regex(spec.NAME, fullmatch=True)
OPTIMIZERS = st.builds(
    spec.OptimizerSpec,
    st.sampled_from(spec.OptimizerName),
    st.floats(1e-9, 1e3),
    st.floats(0, 0.99),
    st.floats(0, 10),
)
TRAININGS = st.builds(
    spec.TrainingSpec,
    st.integers(1, 9),
    st.integers(1, 999),
    OPTIMIZERS,
    st.sampled_from(spec.Schedule),
    st.sampled_from(spec.Precision),
    st.integers(0, 99),
)
METHODS = st.builds(
    PromptFL,
    context_length=st.integers(1, 9),
    context_init=st.none() | st.just("no"),  # which YAML would read as false
    class_position=st.sampled_from(ClassPosition),
    server=st.sampled_from(
        [WeightedMean(), ServerMomentum(momentum=0.25), ServerAdam(tau=1e-7), TrimmedMean(share=0.3)]
    ),
)
CLASSES = st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=6, unique=True)
SPLITS = st.lists(st.sampled_from(spec.EvaluationSplit), min_size=1, unique=True)


@st.composite
def specifications(draw: st.DrawFn) -> spec.ExperimentSpec:
    classes, splits, count = draw(CLASSES), draw(SPLITS), draw(st.integers(0, 1_000_000))
    novel = draw(st.integers(1, len(classes) - 1)) if spec.EvaluationSplit.NOVEL in splits else 0
    local = spec.LocalSpec(
        "promptfl",
        hyperparameters_json(draw(METHODS)),
        spec.ModelSpec("RN50", DIGEST, 512, 1024),
        tuple(classes[novel:]),
        draw(TRAININGS),
        count,
        spec.LocalEvaluationSpec(tuple(splits), tuple(classes[:novel])),
        draw(st.integers(0, 2**63 - 1)),
    )
    limit, silos = draw(st.integers(1, 30 * 86_400_000)), draw(st.lists(NAMES, max_size=3, unique=True))
    rounds = spec.RoundsSpec(count, limit / 1000, None, None, tuple(silos), draw(st.sampled_from(spec.OnTooFew)), 1)
    return spec.ExperimentSpec(local, rounds, spec.EvaluationSpec(draw(st.integers(0, 9))))


@given(specifications())
def test_a_specification_survives_the_way_through_its_file(tmp_path_factory: Any, found: spec.ExperimentSpec) -> None:
    path = tmp_path_factory.mktemp("experiment") / "experiment.yaml"
    path.write_text(effective_yaml(experiment_file("skin-1", found)), encoding="utf-8")
    assert load_experiment(path) == ("skin-1", found)


def test_a_seed_of_63_bits_is_read(load: Any) -> None:
    assert load(f"{TEXT}seed: {2**63 - 1}")[1].seed == 2**63 - 1


def test_a_file_is_validated_also_without_yaml() -> None:
    file = ExperimentFile.model_validate_json(
        json.dumps(
            {
                "experiment": "a",
                "method": {"name": "zeroshot"},
                "model": {"architecture": "fedrt-tiny", "weights_sha256": DIGEST},
                "classes": ["x"],
                "rounds": {"count": 0},
            }
        )
    )
    assert experiment_spec(file).local.dims == ModelDims(96, 96, 1)


def test_schema_knows_the_hyperparameters_of_the_methods() -> None:
    variants = experiment_schema()["$defs"]["MethodSection"]["oneOf"]
    promptfl = next(v for v in variants if v["properties"]["name"].get("const") == "promptfl")
    assert set(promptfl["properties"]) == {"name", *(field.name for field in dataclasses.fields(PromptFL))}
    assert promptfl["additionalProperties"] is False
    assert promptfl["required"] == ["name"]


def test_schema_knows_the_server_rules_and_their_keys() -> None:
    definitions = experiment_schema()["$defs"]
    promptfl = next(
        v for v in definitions["MethodSection"]["oneOf"] if v["properties"]["name"].get("const") == "promptfl"
    )
    server = promptfl["properties"]["server"]
    assert server["default"] == {"rule": "weighted_mean"}
    rules = {rule: definitions[place.rpartition("/")[2]] for rule, place in server["discriminator"]["mapping"].items()}
    assert {rule: sorted(found["properties"]) for rule, found in rules.items()} == {
        "weighted_mean": ["rule"],
        "uniform_mean": ["rule"],
        "server_momentum": ["learning_rate", "momentum", "rule"],
        "server_adam": ["beta1", "beta2", "learning_rate", "rule", "tau"],
        "median": ["rule"],
        "trimmed_mean": ["rule", "share"],
    }
    assert all(found["additionalProperties"] is False for found in rules.values())


def test_dimensions_are_those_of_open_clip() -> None:
    open_clip = importlib.util.find_spec("open_clip")
    if open_clip is None or open_clip.origin is None:
        pytest.skip("open_clip is not installed")
    configs = Path(open_clip.origin).parent / "model_configs"
    for architecture, dims in ARCHITECTURES.items():
        if architecture == "fedrt-tiny":
            continue
        config = json.loads((configs / f"{architecture}.json").read_text())
        assert dims == ClipDims(config["text_cfg"]["width"], config["embed_dim"]), architecture


def test_dimensions_may_be_stated_if_they_are_right() -> None:
    assert clip_dims("RN50", 512, 1024) == ClipDims(512, 1024)
    assert clip_dims("fedrt-tiny") == ClipDims(96, 96)
