"""What a method declares to both daemons: its tensors and its server rule. Its local half lives in `silo`."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import TypeAdapter, ValidationError

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
    known: list[str] = [f.name for f in dataclasses.fields(method)] if dataclasses.is_dataclass(method) else []
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {known}"
            raise SpecError(f"method {method.name!r} has no hyper-parameter {key!r}; {hint}")
    try:
        return TypeAdapter(method).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "hyper-parameters"
        raise SpecError(f"method {method.name!r}: {place}: {first['msg']}; got {first['input']!r}") from None


def hyperparameters_json(method: Method) -> str:
    """Every hyper-parameter, defaults included, as canonical JSON: sorted keys, no white space."""
    if not dataclasses.is_dataclass(method):
        raise TypeError(f"method {method.name!r} is not a dataclass")
    return json.dumps(dataclasses.asdict(method), sort_keys=True, separators=(",", ":"))
