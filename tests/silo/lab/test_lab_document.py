"""docs/lab.md agrees with the code: commands, keys, defaults, scanners, data sets and recipes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from pydantic import BaseModel

from fedrt.methods import BUILT_IN
from silo.lab.cli import app
from silo.lab.sections import LabData, LabFile, LabMethod, SettingSection, lab_schema
from silo.lab.shipped import recipe_titles
from silo.lab.world import ALL_SCANNERS, WorldSection
from silo.partition.torchvision_sets import SETS

TEXT = (Path(__file__).parents[3] / "docs" / "lab.md").read_text()


def chapter(heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def documented(text: str) -> dict[str, str]:
    """Key -> default, of a table's rows."""
    return dict(re.findall(r"^\| `([a-z_.*]+)` \|[^|]+\| ([^|]+?) \|$", text, re.MULTILINE))


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field


def test_every_command_is_documented_and_no_other() -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `fedrt-lab ([a-z]+)", chapter("Commands"), re.MULTILINE)) == known
    assert set(re.findall(r"fedrt-lab ([a-z]+)", TEXT)) <= known


def test_every_key_is_documented_and_no_other() -> None:
    first, _, second = chapter("lab.yaml").partition("Exactly one of")
    whole = {"data", "training", "rounds"}  # documented elsewhere, or in the second table
    expected = []
    for name, field in keys(LabFile):
        section = next((one for one in [field.annotation, *get_args(field.annotation)] if _is_model(one)), None)
        if name == "settings":
            expected += [f"settings.*.{key}" for key, _ in keys(SettingSection)]
        elif name == "methods":
            expected += [f"methods.*.{key}" for key, _ in keys(LabMethod)]
        elif section is None or name in whole:
            expected.append(name)
        else:
            expected += [key for key, _ in keys(section, f"{name}.")]
    assert list(documented(first)) == expected
    data = [key for key, _ in keys(LabData) if key != "world"]
    assert list(documented(second)) == [*data, *(key for key, _ in keys(WorldSection, "world."))]


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@pytest.mark.parametrize(("key", "model"), [("test_share", LabData), ("world.seed", WorldSection)])
def test_defaults_are_those_of_the_code(key: str, model: type[BaseModel]) -> None:
    written = documented(chapter("lab.yaml"))[key]
    assert yaml.safe_load(written.strip("`")) == model.model_fields[key.rpartition(".")[2]].default


def test_the_names_that_may_be_given_are_listed() -> None:
    scanners = TEXT.partition("The scanners are ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([^`]+)`", scanners)) == set(ALL_SCANNERS)
    (row,) = re.findall(r"^\| `torchvision` \|.*$", TEXT, re.MULTILINE)
    assert set(re.findall(r"`([A-Za-z0-9]+)`", row)) - {"torchvision"} == set(SETS)


def test_every_recipe_is_listed() -> None:
    assert re.findall(r"^\| `([a-z0-9-]+)` \| [^|`]+ \|$", TEXT, re.MULTILINE) == list(recipe_titles())


def test_the_schema_describes_every_key() -> None:
    schema = lab_schema()
    for section in (schema, *(schema["$defs"][name] for name in schema["$defs"] if name.startswith(("Lab", "World")))):
        for name, field in section["properties"].items():
            assert field.get("description"), name
    methods = {one["properties"]["name"].get("const") for one in schema["$defs"]["MethodSection"]["oneOf"]}
    assert methods >= set(BUILT_IN)
    assert schema["$defs"]["LabRounds"]["required"] == ["count"]
    assert "count" not in schema["$defs"]["RoundsChange"].get("required", [])
