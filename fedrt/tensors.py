"""Named tensors that a method declares: shape, scope, initial value, and a digest of the declaration."""

import enum
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrt.errors import TensorError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]


class Scope(enum.Enum):
    """Who may see a tensor."""

    SHARED = "shared"  # exchanged every round
    PRIVATE = "private"  # never leaves the silo


@dataclass(frozen=True)
class Normal:
    """Independent draws from Normal(0, std²); 0.02 is CoOp's choice."""

    std: float = 0.02


@dataclass(frozen=True)
class Zeros:
    """All zero."""


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float


@dataclass(frozen=True)
class Phrase:
    """The token embeddings of a phrase, plus draws from Normal(0, noise²): known only where CLIP is, so at a silo."""

    text: str
    noise: float = 0.0


Init = Normal | Zeros | Constant | Phrase


@dataclass(frozen=True)
class TensorSpec:
    """Declares one float32 tensor of a method.

    The optimiser moves what is `trained`; a private tensor that is not is set by the method itself, before training.
    """

    name: str
    shape: tuple[int, ...]
    scope: Scope
    init: Init = field(default_factory=Normal)
    trained: bool = True

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").isalnum() or not self.name.isascii():
            raise ValueError(f"tensor name {self.name!r} is not made of letters, digits and underscores")
        if any(extent < 1 for extent in self.shape):
            raise ValueError(f"tensor {self.name!r} has an empty shape {self.shape}")
        if self.scope is Scope.SHARED and not self.trained:
            raise ValueError(
                f"tensor {self.name!r} is shared but not trained; only a private tensor can be set locally"
            )


def of_scope(specs: Iterable[TensorSpec], scope: Scope) -> tuple[TensorSpec, ...]:
    """The declarations of one scope, in the declared order."""
    return tuple(spec for spec in specs if spec.scope is scope)


def schema_sha256(specs: Iterable[TensorSpec]) -> bytes:
    """32 bytes that agree exactly when names, shapes and scopes agree, in any order."""
    rows = sorted([spec.name, list(spec.shape), spec.scope.value] for spec in specs)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).digest()


def needs_clip(specs: Iterable[TensorSpec]) -> bool:
    """Whether an initial value can only be computed where CLIP is."""
    return any(isinstance(spec.init, Phrase) for spec in specs)


def seeded_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A generator that depends on the seed and the purpose only; its draws are the same wherever numpy is."""
    text = json.dumps([seed, *purpose], separators=(",", ":"))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")))


def initial_tensors(specs: Iterable[TensorSpec], seed: int) -> dict[str, Array]:
    """Initial float32 values. Each tensor has its own stream, so the order of declaration does not matter.

    Raises `ValueError` for a `Phrase`, whose value needs CLIP.
    """
    values: dict[str, Array] = {}
    for spec in specs:
        match spec.init:
            case Normal(std):
                draw = seeded_generator(seed, "initial", spec.name).standard_normal(spec.shape, np.float32)
                values[spec.name] = np.multiply(draw, np.float32(std), out=draw)
            case Zeros():
                values[spec.name] = np.zeros(spec.shape, np.float32)
            case Constant(value):
                values[spec.name] = np.full(spec.shape, value, np.float32)
            case Phrase(text):
                raise ValueError(f"tensor {spec.name!r} starts from the phrase {text!r}: only a silo can compute that")
    return values


def check_tensors(specs: Iterable[TensorSpec], tensors: Tensors) -> None:
    """Raise `TensorError` unless names, shapes and types are the declared ones and every value is finite."""
    declared = {spec.name: spec for spec in specs}
    if unknown := sorted(set(tensors) - set(declared)):
        raise TensorError(f"tensor {unknown[0]!r} is not declared; declared are {sorted(declared)}")
    if missing := sorted(set(declared) - set(tensors)):
        raise TensorError(f"tensor {missing[0]!r} is missing")
    for name, array in tensors.items():
        if array.shape != declared[name].shape:
            raise TensorError(f"tensor {name!r} has shape {array.shape}; declared is {declared[name].shape}")
        if array.dtype != np.float32:
            raise TensorError(f"tensor {name!r} has type {array.dtype}; declared is float32")
        if not all_finite(array):
            raise TensorError(f"tensor {name!r} has values that are not finite")


def all_finite(array: Array) -> bool:
    """Whether no value is NaN or infinite, without a temporary as large as the array."""
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[at : at + (1 << 20)]).all()) for at in range(0, flat.size, 1 << 20))
