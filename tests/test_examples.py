"""The example files, JSON Schemas and the documentation agree with the models."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from coordinator.config import CoordinatorConfig, load_coordinator_config
from fedrt.config import effective_yaml, json_schema
from fedrt.experiment_file import ExperimentFile, load_experiment
from fedrt.methods import BUILT_IN
from silo.config import SiloConfig, data_source, load_silo_config, model_source

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "deploy" / "examples"
MODELS: dict[str, type[BaseModel]] = {
    "silo": SiloConfig,
    "coordinator": CoordinatorConfig,
    "experiment": ExperimentFile,
}


def test_silo_example() -> None:
    config = load_silo_config(EXAMPLES / "silo.yaml")
    assert config.policy.min_examples == 50
    assert model_source(config).weights == "/opt/models/ViT-B-16.pt"
    assert dict(data_source(config).class_names) == {"NV": "nevus", "MEL": "melanoma"}
    assert config.shutdown_grace == 300.0


def test_coordinator_example() -> None:
    config = load_coordinator_config(EXAMPLES / "coordinator.yaml")
    assert config.listen.session == "0.0.0.0:7443"
    assert config.limits.max_payload == 256 * 1024**2


def test_experiment_example() -> None:
    experiment_id, spec = load_experiment(EXAMPLES / "experiment.yaml")
    assert experiment_id == "skin-lesions-2026-11"
    assert (spec.rounds.count, spec.rounds.time_limit, spec.evaluation.every) == (25, 1800.0, 5)
    assert len(spec.local.tensors()) == 1


def test_the_silo_of_the_example_takes_part_in_the_experiment_of_the_example() -> None:
    silo = load_silo_config(EXAMPLES / "silo.yaml")
    _, spec = load_experiment(EXAMPLES / "experiment.yaml")
    assert silo.federation == load_coordinator_config(EXAMPLES / "coordinator.yaml").federation
    assert silo.model.architecture == spec.local.model.architecture
    assert spec.local.method_name in silo.policy.methods
    assert set(silo.data.class_names.values()) <= set(spec.local.classes)


def test_the_weights_of_the_examples_are_one_file() -> None:
    """A path of which no tag can take the place: the tag `openai` downloads a file with another digest."""
    _, spec = load_experiment(EXAMPLES / "experiment.yaml")
    published = {PurePosixPath(url).name: url.split("/")[-2] for url in openai_archives()}
    assert (
        published[Path(load_silo_config(EXAMPLES / "silo.yaml").model.weights).name] == spec.local.model.weights_sha256
    )
    assert spec.local.model.weights_sha256[:8] in (EXAMPLES / "silo.yaml").read_text()


def openai_archives() -> Iterator[str]:
    pretrained = pytest.importorskip("open_clip.pretrained")
    for model in pretrained.list_pretrained_models_by_tag("openai"):
        yield pretrained.get_pretrained_url(model, "openai")


@pytest.mark.parametrize("name", MODELS)
def test_examples_name_their_schema(name: str) -> None:
    first = (EXAMPLES / f"{name}.yaml").read_text().splitlines()[0]
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert match is not None
    assert (EXAMPLES / match[1]).resolve() == ROOT / "docs" / "schemas" / f"{name}.schema.json"


def test_schemas_are_current() -> None:
    script = ROOT / "scripts" / "export_schemas.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys that hold values rather than sections."""
    for name, field in model.model_fields.items():
        sections = list(models(field.annotation))
        if not sections:
            yield f"{prefix}{name}"
        for section in sections:
            yield from keys(section, f"{prefix}{name}.")


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models(argument)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_is_documented_and_no_other(name: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    chapter = re.search(rf"^## {name}\.yaml$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert chapter is not None
    documented = re.findall(r"^\| `([a-z0-9_.]+)` \|", chapter[1], re.MULTILINE)
    assert documented == list(keys(MODELS[name]))


def default_of(model: type[BaseModel], key: str) -> Any:
    """Of a dotted key: "required", "none", or the value in the JSON Schema. An optional section's keys have "none"."""
    schema = json_schema(model)
    section, *path = schema, *key.split(".")
    for name in path[:-1]:
        found = section["properties"][name]
        if found.get("default", "") is None:
            return "none"
        reference = found.get("$ref") or next(part["$ref"] for part in found["anyOf"] if "$ref" in part)
        section = schema["$defs"][reference.rpartition("/")[2]]
    default = section["properties"][path[-1]].get("default")
    required = path[-1] in section.get("required", [])
    return "required" if required else "none" if default is None else default


def check_default(written: str, default: Any) -> None:
    literal = re.fullmatch(r"`([^`]+)`", written)
    if literal is not None:
        assert yaml.safe_load(literal[1]) == default
    else:  # words, for a default that the schema cannot hold
        assert default == ("required" if written == "required" else "none")


@pytest.mark.parametrize("name", MODELS)
def test_every_default_in_the_documentation_is_that_of_the_model(name: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text().partition(f"\n## {name}.yaml\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([a-z0-9_.]+)` \|[^|]+\| ([^|]+?) \|", text, re.MULTILINE)
    assert len(found) == len(list(keys(MODELS[name])))
    for key, written in found:
        check_default(written, default_of(MODELS[name], key))


def test_every_default_of_a_method_in_the_documentation_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text().partition("\n## Methods\n")[2]
    found = re.findall(r"^\| `(\w+)` \| `(\w+)` \|[^|]+\| ([^|]+?) \|", text, re.MULTILINE)
    properties = {name: TypeAdapter(method).json_schema().get("properties", {}) for name, method in BUILT_IN.items()}
    documented = {(method, key) for method, key, _ in found}
    assert documented == {(method, key) for method, fields in properties.items() for key in fields}
    for method, key, written in found:
        default = properties[method][key].get("default", "required")
        check_default(written, "none" if default is None else default)


@pytest.mark.parametrize(("written", "default"), [("`fail`", "retry"), ("none", 5), ("`0.9`", "required")])
def test_a_wrong_default_in_the_documentation_is_found(written: str, default: Any) -> None:
    with pytest.raises(AssertionError):
        check_default(written, default)


@pytest.mark.parametrize("name", MODELS)
def test_every_key_has_a_description(name: str) -> None:
    def undescribed(model: type[BaseModel]) -> Iterator[str]:
        for key, field in model.model_fields.items():
            if not field.description:
                yield key
            for section in models(field.annotation):
                yield from undescribed(section)

    assert list(undescribed(MODELS[name])) == []


def test_effective_examples_are_yaml_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "silo.yaml"
    config = load_silo_config(EXAMPLES / "silo.yaml")
    path.write_text(effective_yaml(config))
    assert load_silo_config(path) == config
