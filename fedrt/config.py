"""Loads the YAML files of operators into checked pydantic models, and says plainly what is wrong with them.

YAML is read by the rules of version 1.2, because those of 1.1 surprise: there `no` is false, `1e-3` is text, `1:30` is
90 and `2026-11-20` a date. Keys are always text, and a key given twice is an error. Nothing is converted silently: text
is not a number, a number is not text. All problems of a file are reported together.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from fedrt.config_problems import list_problems
from fedrt.errors import ConfigurationError, IdentityError
from fedrt.identity import check_federation, check_name
from fedrt.notation import Address, parse_duration, parse_size
from fedrt.yaml_text import dump_mapping, parse_mapping

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

ModelT = TypeVar("ModelT", bound=BaseModel)


class Section(BaseModel):
    """A group of keys in an operator's file: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load_yaml(path: Path, model: type[ModelT]) -> ModelT:
    """Read the file at `path` as a `model`; relative paths in it start at the file's own directory.

    Raises `ConfigurationError`, listing every problem with its dotted key, what is expected and the closest known key.
    """
    values = parse_mapping(_read(path), str(path))
    context = {"directory": path.absolute().parent}
    try:
        # JSON mode is the strict mode that still takes a list for a tuple and text for a path or an enum.
        return model.model_validate_json(json.dumps(values), strict=True, context=context)
    except ValidationError as error:
        problems = list_problems(error, model)
    if len(problems) == 1:
        raise ConfigurationError(f"{path}: {problems[0]}")
    listed = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigurationError(f"{path}: {len(problems)} problems{listed}")


def effective_yaml(model: BaseModel) -> str:
    """The configuration as YAML with every default filled in; `load_yaml` reads it back as the same values."""
    return dump_mapping(model.model_dump(mode="json"))


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema with which an editor checks and completes the file."""
    return {"$schema": SCHEMA_DIALECT, **model.model_json_schema()}


def duration(default: str, description: str) -> Any:
    """The field of a `Duration` with a default, both in the operator's notation also in the JSON Schema."""
    extra: dict[str, Any] = {"default": default}
    return Field(default=parse_duration(default), description=description, json_schema_extra=extra)


def size(default: str, description: str) -> Any:
    """The field of a `Size` with a default, both in the operator's notation also in the JSON Schema."""
    extra: dict[str, Any] = {"default": default}
    return Field(default=parse_size(default), description=description, json_schema_extra=extra)


def anchored(path: Path, found: ValidationInfo) -> Path:
    """A path as a file means it: a relative one starts at the directory of the file, and `~` is the home directory."""
    if path.parts[:1] == ("~",):
        path = Path.home().joinpath(*path.parts[1:])
    directory: Path | None = (found.context or {}).get("directory")
    return path if directory is None else directory / path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"file '{path}' does not exist; check the path") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"file '{path}' cannot be read ({reason}); check its path and mode") from None


def _federation(name: str) -> str:
    try:
        return check_federation(name)
    except IdentityError as error:
        raise ValueError(str(error)) from None


def _party_name(name: str) -> str:
    try:
        return check_name(name)
    except IdentityError as error:
        raise ValueError(str(error)) from None


LocalPath = Annotated[Path, AfterValidator(anchored)]
"""A path on this machine; a relative one starts at the directory of the YAML file, and `~` is the home directory."""

FederationName = Annotated[str, AfterValidator(_federation)]
"""The name of a federation, such as "skin.example.org"."""

PartyName = Annotated[str, AfterValidator(_party_name)]
"""The name of a silo, coordinator or experiment: 1 to 63 of a-z, 0-9 and "-"."""

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]


class IdentitySection(Section):
    """Where a daemon's key and certificates lie."""

    directory: LocalPath = Field(description="Directory of the private key, certificate and trust bundle; mode 0700")


class MetricsSection(Section):
    """Where Prometheus may ask."""

    listen: Address = Field(
        description="Address of the Prometheus metrics; they are not encrypted, so keep it on 127.0.0.1"
    )


class LogSection(Section):
    """What is logged to stderr, and how."""

    level: LogLevel = Field(default="info", description="Least severe level that is logged")
    format: LogFormat = Field(default="console", description="For people (console) or for machines (json)")
