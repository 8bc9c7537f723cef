"""What a method declares to both daemons: its tensors and its server rule. Its local half lives in `silo`."""

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedrt.aggregation import ServerState, Update
from fedrt.errors import SpecError
from fedrt.tensors import TensorSpec


@dataclass(frozen=True)
class ModelDims:
    """What a method may know of CLIP and the task: E of the text tower, D of the joint space, C classes."""

    context_dim: int
    feature_dim: int
    class_count: int


class Method(Protocol):
    """A federated prompt-learning algorithm: a frozen dataclass whose fields are its hyper-parameters."""

    name: ClassVar[str]
    needs_patches: ClassVar[bool]

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        """The tensors this method trains; none for a method that only evaluates."""

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """The next state; must not depend on the order of `updates`."""


def parse_hyperparameters(method: type[Method], values: Mapping[str, Any]) -> Method:
    """Build a method from hyper-parameters. Raises `SpecError` naming the key, and the closest known one."""
    known = _keys([method])
    for key in values:
        if key not in known:
            raise SpecError(f"method {method.name!r} has no hyper-parameter {key!r}; {_hint(key, known)}")
    try:
        return TypeAdapter(method).validate_python(dict(values))
    except ValidationError as error:
        problem = _problem(error.errors()[0], method, values)
        raise SpecError(f"method {method.name!r}: {problem}") from None


def hyperparameters_json(method: Method) -> str:
    """Every hyper-parameter, defaults included, as canonical JSON: sorted keys, no white space."""
    if not dataclasses.is_dataclass(method):
        raise TypeError(f"method {method.name!r} is not a dataclass")
    return json.dumps(dataclasses.asdict(method), sort_keys=True, separators=(",", ":"))


def _problem(detail: ErrorDetails, method: type[Method], values: Mapping[str, Any]) -> str:
    """What pydantic found wrong, in words."""
    location, context, given = detail["loc"], detail.get("ctx", {}), detail["input"]
    place, sections = _place(location, values), _sections(method, location)
    key = context.get("discriminator", "").strip("'")
    match detail["type"]:
        case "value_error" if isinstance(given, Mapping):  # what a whole section says names its own key and value
            return f"{place}: {context['error']}".removeprefix(": ")
        case "value_error":
            return f"{place}: {context['error']}; got {given!r}"
        case "missing":
            return f"{place}.{location[-1]}".removeprefix(".") + " is missing; add it"
        case "unexpected_keyword_argument":
            section, _, unknown = place.rpartition(".")
            return f"{section} has no key {unknown!r}; {_hint(unknown, _keys(_sections(method, location[:-1])))}"
        case "union_tag_invalid":
            known = _tags(sections, key)
            close = difflib.get_close_matches(context["tag"], known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            return f"{place}.{key} is {context['tag']!r}; {hint}known are {known}"
        case "union_tag_not_found":
            return f"{place}.{key} is missing; known are {_tags(sections, key)}"
        case "model_attributes_type" | "dataclass_type" if keys := _keys(sections):
            tags = _tags(sections, keys[0]) or ["..."]
            close = difflib.get_close_matches(str(given), tags, 1) or tags
            return f"{place} must be a mapping such as {{{keys[0]}: {close[0]}}}; got {given!r}"
    return f"{place or 'hyper-parameters'}: {detail['msg']}; got {given!r}"


def _hint(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {known}"


def _place(location: Iterable[int | str], values: Any) -> str:
    """The dotted key. What pydantic puts into a location to say which of several types it tried is left out."""
    parts = []
    for part in location:
        is_item = isinstance(values, list | tuple) and isinstance(part, int)
        if is_item or (isinstance(values, Mapping) and part in values):
            values = values[part]
            parts.append(str(part))
    return ".".join(parts)


def _sections(method: Any, location: Iterable[int | str]) -> list[Any]:
    """The dataclasses that a location may lie in. A part of it is a field, or else the tag of one of several."""
    found = [method]
    for part in location:
        annotations = [hints[part] for hints in map(_annotations, found) if part in hints]
        tagged = [kind for kind in found if part in (field.default for field in dataclasses.fields(kind))]
        found = [kind for annotation in annotations for kind in _dataclasses(annotation)] or tagged
    return found


def _annotations(kind: Any) -> dict[Any, Any]:
    try:
        return typing.get_type_hints(kind)
    except NameError:  # pydantic looks for names in more places
        return {}


def _dataclasses(annotation: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _dataclasses(argument)


def _keys(sections: Iterable[Any]) -> list[str]:
    """Their fields, each once."""
    kinds = (kind for kind in sections if dataclasses.is_dataclass(kind))
    return list(dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind)))


def _tags(sections: Iterable[Any], key: str) -> list[str]:
    """The values of `key` that tell them apart: each has its own as the default."""
    fields = (field for kind in sections for field in dataclasses.fields(kind) if field.name == key)
    return [field.default for field in fields if isinstance(field.default, str)]
