"""The example files, JSON Schemas and the documentation agree with the models."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from coordinator.config import CoordinatorConfig, load_coordinator_config
from fedrt.config import effective_yaml
from fedrt.experiment_file import ExperimentFile, load_experiment
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
