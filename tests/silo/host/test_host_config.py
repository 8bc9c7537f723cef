"""host.yaml: its keys, its example, schema and documentation, and what it says of each virtual silo."""

import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from fedrt.config import effective_yaml
from fedrt.errors import ConfigurationError
from silo.config import data_source, load_silo_config
from silo.host.config import HostConfig, check_host_files, load_host_config, silo_config
from silo.partition.sections import DirichletPartition

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "deploy" / "examples" / "host.yaml"
MINIMAL = """
coordinator: {session_address: "localhost:7443"}
identities: certs/silos
state_directory: state
model: {architecture: fedrt-tiny, weights: embedded}
data: {root: images, layout: image_folder}
partition: {kind: iid, silos: 3}
"""


def load(directory: Path, text: str) -> HostConfig:
    (directory / "host.yaml").write_text(text)
    return load_host_config(directory / "host.yaml")


def test_defaults_are_those_of_a_silo(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert (config.federation, config.shutdown_grace, config.reconnect.max) == (None, 300.0, 10.0)
    assert config.policy.methods == ("*",)
    assert config.identities == tmp_path / "certs/silos"


def test_what_is_in_effect_reads_back_as_the_same(tmp_path: Path) -> None:
    config = load_host_config(EXAMPLE)
    assert load(tmp_path, effective_yaml(config)) == config


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("identitys: certs", "identitys is not a known key; did you mean 'identities'?"),
        ("partition: {kind: iid, silo: 3}", "did you mean 'silos'?"),
        ("partition: {kind: id, silos: 3}", "did you mean 'iid'?"),
        ("data: {root: images, layout: folder}", "data.layout"),
        ("data: {root: images, layout: domain_folder, manifest: a.csv}", "data"),
        ("shutdown_grace: 30", "shutdown_grace must be a duration with a unit"),
    ],
)
def test_a_mistake_is_named_with_its_key(tmp_path: Path, line: str, complaint: str) -> None:
    key = line.partition(":")[0]
    kept = [other for other in MINIMAL.splitlines() if not other.startswith(f"{key}:")]
    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        load(tmp_path, "\n".join([*kept, line]))


def test_files_that_are_missing_are_all_named(tmp_path: Path) -> None:
    text = MINIMAL.replace("weights: embedded", "weights: /nowhere/vit.pt")
    config = load(tmp_path, text.replace("layout: image_folder", "layout: manifest, manifest: all.csv"))
    with pytest.raises(ConfigurationError) as caught:
        check_host_files(config)
    for part in ("model.weights: file '/nowhere/vit.pt'", f"data.root: directory '{tmp_path}/images'", "all.csv"):
        assert part in str(caught.value)


def test_each_virtual_silo_has_the_configuration_of_a_daemon(tmp_path: Path) -> None:
    """What a host makes of it is what silo.yaml would say, key by key."""
    config = load(tmp_path, MINIMAL)
    (tmp_path / "silo.yaml").write_text(
        f"""
coordinator: {{session_address: "localhost:7443"}}
identity: {{directory: certs/silos/silo-02}}
state_directory: state/silos/silo-02
model: {{architecture: fedrt-tiny, weights: embedded}}
data: {{root: images, layout: manifest, manifest: {tmp_path}/state/partition/silo-02.csv}}
"""
    )
    own = silo_config(config, "silo-02")
    assert own == load_silo_config(tmp_path / "silo.yaml")
    assert data_source(own).manifest == tmp_path / "state/partition/silo-02.csv"


# ---- example, schema, documentation


def test_the_example_is_valid_and_names_its_schema() -> None:
    config = load_host_config(EXAMPLE)
    assert isinstance(config.partition, DirichletPartition)
    first = EXAMPLE.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=../../docs/schemas/host.schema.json"


def test_the_schema_is_current() -> None:
    script = ROOT / "scripts" / "export_schemas.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert "docs/schemas/host.schema.json" not in done.stderr
    assert (ROOT / "docs" / "schemas" / "host.schema.json").is_file()


def defaults(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their defaults as the operator would write them; a key may come several times, for each kind."""
    for name, field in model.model_fields.items():
        sections = list(sections_of(field.annotation))
        for section in sections:
            yield from defaults(section, f"{prefix}{name}.")
        if not sections:
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            value = "required" if field.is_required() else field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", extra.get("default", list(value) if isinstance(value, tuple) else value)


def sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_of(argument)


def documented() -> list[tuple[str, str]]:
    """The keys of the table, and what it says of their defaults."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    chapter = re.search(r"^## host\.yaml$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert chapter is not None
    return re.findall(r"^\| `([a-z0-9_.]+)` \|[^|]+\| ([^|]+?) \|", chapter[1], re.MULTILINE)


def test_every_key_is_documented_and_no_other() -> None:
    assert sorted(key for key, _ in documented()) == sorted({key for key, _ in defaults(HostConfig)})


def test_every_documented_default_is_that_of_the_model() -> None:
    possible: dict[str, list[Any]] = defaultdict(list)
    for key, default in defaults(HostConfig):
        possible[key].append(default)
    for key, written in documented():
        literal = re.fullmatch(r"`([^`]+)`", written)
        meant = yaml.safe_load(literal[1]) if literal else "required" if written == "required" else None
        allowed = [None, {}] if meant is None else [meant]
        assert any(one in possible[key] for one in allowed), (key, written, possible[key])
