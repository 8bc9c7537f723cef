"""Puts what pydantic found wrong with a file into words: the key, what it must be, and what to do next."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list such as [one, two]",
    "tuple_type": "a list such as [one, two]",
    "dict_type": "a mapping such as {key: value}",
    "path_type": "a path",
}
_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def list_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence per problem, in the order of the file's keys."""
    found = error.errors(include_url=False)
    return [_problem(detail, model) for detail in found if detail["type"] != "default_factory_not_called"]


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location, kind = _without_tags(model, detail["loc"]), detail["type"]
    key = _dotted(location)
    if kind == "extra_forbidden":
        return f"{key} is not a known key; {_hint(str(location[-1]), _section(model, detail['loc'][:-1]), model)}"
    if kind == "missing":
        field = _section(model, detail["loc"][:-1]).model_fields.get(str(location[-1]))
        meaning = f" ({field.description})" if field and field.description else ""
        return f"{key} is missing; add it{meaning}"
    if kind == "json_invalid":
        return "holds text that is not valid Unicode; remove escapes such as \\ud800"
    if kind == "value_error":
        return _own_words(key, str(detail["ctx"]["error"]), detail["input"])
    return f"{key} must be {_expected(detail, model)}; got {_shown(detail['input'])}{_advice(detail)}"


def _own_words(key: str, message: str, value: Any) -> str:
    """The message of one of our validators. One that begins with "must" lacks its subject and what was given."""
    if not message.startswith("must "):
        return f"{key}: {message}" if key else message
    return f"{key} {message}" if message.endswith("?") else f"{key} {message}; got {_shown(value)}"


def _expected(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        number = context[limit]
        return f"{words} {int(number) if number == int(number) else number}"
    if kind in ("literal_error", "enum"):
        return str(context["expected"])
    if kind in ("model_type", "model_attributes_type"):
        return f"a section with the keys {', '.join(_section(model, detail['loc']).model_fields)}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "string_too_short":
        return "text that is not empty"
    return f"different: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _advice(detail: ErrorDetails) -> str:
    value = detail["input"]
    if detail["type"] == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if detail["type"] in ("list_type", "tuple_type") and isinstance(value, str):
        return f"; write [{value}]"
    if value is None:
        return "; give it a value or remove the key"
    if detail["type"] in ("literal_error", "enum"):
        choices = [choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ",").split(",")]
        close = difflib.get_close_matches(str(value), choices, 1)
        return f"; did you mean {close[0]!r}?" if close else ""
    return ""


def _hint(key: str, section: type[BaseModel], model: type[BaseModel]) -> str:
    """The closest known key beside `key`, else the same key in another section, else all known ones."""
    known = list(section.model_fields)
    if close := difflib.get_close_matches(key, known, 1):
        return f"did you mean {close[0]!r}?"
    elsewhere = [path for path in _paths(model) if path.split(".")[-1] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    return f"known are {', '.join(known)}"


def _section(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model of the section that a location lies in."""
    return _walk(model, location)[0]


def _without_tags(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A location as the file has it: pydantic puts in the value of a key such as `kind` that chooses a section."""
    return _walk(model, location)[1]


def _walk(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel], tuple[int | str, ...]]:
    parts: list[int | str] = []
    choices: Mapping[str, type[BaseModel]] = {}
    for part in location:
        if part in choices:
            model, choices = choices[str(part)], {}
            continue
        parts.append(part)
        if field := model.model_fields.get(str(part)):
            sections = list(_models(field.annotation))
            model = sections[0] if sections else model
            choices = {tag: section for section in sections for tag in _tags(section)} if len(sections) > 1 else {}
    return model, tuple(parts)


def _tags(section: type[BaseModel]) -> Iterator[str]:
    """The values of keys that can have one value only."""
    for field in section.model_fields.values():
        if get_origin(field.annotation) is Literal:
            yield from map(str, get_args(field.annotation))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in _models(field.annotation):
            yield from _paths(section, f"{prefix}{name}.")


def _dotted(location: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"
