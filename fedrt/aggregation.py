"""Server rules: how the updates of a round change the shared tensors.

Every rule sorts by silo id and sums in float64, so the order of arrival changes no bit. What a rule remembers between
rounds is float32, as it is stored, so a restart changes no bit either. Whether the results are finite is for the caller
to check.

A delta may be read from a store each time it is looked at, so a rule looks at one silo's tensor at a time and keeps at
most a bounded part of each: memory does not grow with the number of silos.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from fedrt.errors import TensorError
from fedrt.tensors import Array, Tensors, all_finite

_SLICE = 1 << 18  # elements combined at a time: bounds the float64 temporaries for payloads of any size
_GATHERED = 1 << 20  # elements summed of one silo, or sorted of all, between two looks at a delta


@dataclass(frozen=True)
class Update:
    """What one silo contributed: trained minus received, and the examples behind it."""

    silo_id: str
    delta: Tensors
    example_count: int


@dataclass(frozen=True)
class ServerState:
    """The shared tensors, and what the server rule remembers between rounds (never sent)."""

    shared: Tensors
    memory: Tensors = field(default_factory=dict)


class _Closed:
    """Refuses keys that the rule does not have, which pydantic would otherwise pass over."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True)
class WeightedMean(_Closed):
    """Mean weighted by examples (FedAvg)."""

    rule: Literal["weighted_mean"] = "weighted_mean"

    def apply(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Add the mean delta. One update alone adds exactly its delta."""
        return ServerState(_added(state.shared, weighted_mean(updates)), state.memory)


@dataclass(frozen=True, kw_only=True)
class UniformMean(_Closed):
    """Mean in which every silo counts the same, whatever its size."""

    rule: Literal["uniform_mean"] = "uniform_mean"

    def apply(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Add the mean delta."""
        return ServerState(_added(state.shared, uniform_mean(updates)), state.memory)


@dataclass(frozen=True, kw_only=True)
class ServerMomentum(_Closed):
    """Momentum at the server (FedAvgM, Hsu, Qi, Brown, 2019, arXiv:1909.06335): v ← m·v + mean delta; w ← w + lr·v.

    With `momentum` 0 and `learning_rate` 1 it is `WeightedMean`.
    """

    rule: Literal["server_momentum"] = "server_momentum"
    momentum: float = 0.9
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < float("inf"), "positive and finite")

    def apply(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Remembers v as `velocity_<tensor>`, from 0."""
        steps, memory = {}, {}
        for name, mean in weighted_mean(updates).items():
            before = state.memory.get(f"velocity_{name}", np.zeros_like(mean))
            velocity = _elementwise(lambda v, delta: self.momentum * v + delta, before, mean)
            steps[name] = _elementwise(lambda v: self.learning_rate * v, velocity)
            memory[f"velocity_{name}"] = velocity
        return ServerState(_added(state.shared, steps), memory)


@dataclass(frozen=True, kw_only=True)
class ServerAdam(_Closed):
    """Adam at the server without bias correction (FedAdam, Reddi et al., ICLR 2021, arXiv:2003.00295, algorithm 2).

    m ← β1·m + (1 − β1)·Δ; v ← β2·v + (1 − β2)·Δ², from m = 0 and v = τ²; w ← w + lr·m / (√v + τ), Δ the mean delta.
    """

    rule: Literal["server_adam"] = "server_adam"
    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < float("inf"), "positive and finite")
        _check("beta1", self.beta1, 0 <= self.beta1 < 1, "in [0, 1)")
        _check("beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1)")
        _check("tau", self.tau, 0 < self.tau <= 1, "in (0, 1]")

    def apply(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Remembers m and v as `first_<tensor>` and `second_<tensor>`.

        Raises `TensorError` if a v overflows: it would hold its coordinate still for ever, without a trace.
        """
        steps: dict[str, Array] = {}
        memory: dict[str, Array] = {}
        for name, mean in weighted_mean(updates).items():
            first = state.memory.get(f"first_{name}", np.zeros_like(mean))
            second = state.memory.get(f"second_{name}", np.full_like(mean, self.tau**2))
            first = _elementwise(lambda m, delta: self.beta1 * m + (1 - self.beta1) * delta, first, mean)
            second = _elementwise(lambda v, delta: self.beta2 * v + (1 - self.beta2) * delta**2, second, mean)
            if not all_finite(second):
                raise TensorError(
                    f"server_adam: the squared mean delta of tensor {name!r} is beyond float32; look for a silo whose "
                    "training diverges, or lower training.optimizer.learning_rate"
                )
            steps[name] = _elementwise(lambda m, v: self.learning_rate * m / (np.sqrt(v) + self.tau), first, second)
            memory |= {f"first_{name}": first, f"second_{name}": second}
        return ServerState(_added(state.shared, steps), memory)


@dataclass(frozen=True, kw_only=True)
class Median(_Closed):
    """Median of every coordinate, each silo counting the same (Yin et al., ICML 2018, arXiv:1803.01498)."""

    rule: Literal["median"] = "median"

    def apply(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Add the median delta; of an even number of silos, the mean of the middle two."""
        return ServerState(_added(state.shared, trimmed_mean(updates, _most(updates))), state.memory)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(_Closed):
    """Mean of every coordinate without the `share` largest and the `share` smallest (Yin et al., as `Median`).

    Of n silos, floor(share·n) are left out at each end: of 5 silos and 0.1 none, so choose the share with n in mind.
    With `share` 0 it is `UniformMean`.
    """

    rule: Literal["trimmed_mean"] = "trimmed_mean"
    share: float = 0.1

    def __post_init__(self) -> None:
        _check("share", self.share, 0 <= self.share < 0.5, "in [0, 0.5)")

    def apply(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """Add the trimmed mean of the deltas."""
        # The small addition keeps 0.29 · 100 at 29, which floating point puts just below; it must not trim everything.
        count = min(int(self.share * len(updates) + 1e-9), _most(updates))
        return ServerState(_added(state.shared, trimmed_mean(updates, count)), state.memory)


ServerRule = Annotated[
    WeightedMean | UniformMean | ServerMomentum | ServerAdam | Median | TrimmedMean, Field(discriminator="rule")
]


def weighted_mean(updates: Sequence[Update]) -> dict[str, Array]:
    """Mean delta weighted by examples (FedAvg, McMahan et al., AISTATS 2017, arXiv:1602.05629), in float32.

    Raises `ValueError` without updates or without examples.
    """
    ordered = _ordered(updates)
    total = sum(update.example_count for update in ordered)
    if total <= 0:
        raise ValueError("a weighted mean needs at least one example")
    weights = [update.example_count / total for update in ordered]
    return {name: _weighted_sum(ordered, name, weights) for name in ordered[0].delta}


def uniform_mean(updates: Sequence[Update]) -> dict[str, Array]:
    """Mean delta in which every silo counts the same, in float32. Raises `ValueError` without updates."""
    return trimmed_mean(updates, 0)


def trimmed_mean(updates: Sequence[Update], count: int) -> dict[str, Array]:
    """Mean of every coordinate without its `count` smallest and `count` largest values, in float32.

    Raises `ValueError` without updates, or if nothing would be left.
    """
    ordered = _ordered(updates)
    if not 0 <= count <= _most(ordered):
        raise ValueError(f"{count} cannot be trimmed at each end of {len(ordered)} updates")
    return {name: _trimmed(ordered, name, count) for name in ordered[0].delta}


def _weighted_sum(updates: Sequence[Update], name: str, weights: Sequence[float]) -> Array:
    out = np.empty(updates[0].delta[name].shape, np.float32)
    flat_out = out.reshape(-1)
    for gathered in _slices(out.size, _GATHERED):
        total = np.zeros(flat_out[gathered].size, np.float64)
        for update, weight in zip(updates, weights, strict=True):
            flat = update.delta[name].reshape(-1)[gathered]
            for part in _slices(total.size, _SLICE):
                total[part] += weight * flat[part].astype(np.float64)
        flat_out[gathered] = total
    return out


def _trimmed(updates: Sequence[Update], name: str, count: int) -> Array:
    out = np.empty(updates[0].delta[name].shape, np.float32)
    flat_out, silos = out.reshape(-1), len(updates)
    for gathered in _slices(out.size, max(1024, _GATHERED // silos)):
        rows = np.empty((silos, flat_out[gathered].size), np.float32)  # [silos, elements]
        for row, update in zip(rows, updates, strict=True):
            row[:] = update.delta[name].reshape(-1)[gathered]
        for part in _slices(rows.shape[1], max(1024, _SLICE // silos)):
            flat_out[gathered][part] = _mean_without(rows[:, part], count)
    return out


def _mean_without(rows: Array, count: int) -> Array:
    """The mean of each column without its `count` smallest and largest values, in float64; sorts the rows."""
    if count:
        rows.sort(axis=0)
    kept = rows[count : len(rows) - count]
    total = np.zeros(rows.shape[1], np.float64)
    for row in kept:
        total += row
    return total / len(kept)


def _elementwise(formula: Callable[..., Array], *arrays: Array) -> Array:
    """A formula of arrays of one shape, computed in float64, in float32. What overflows becomes infinite."""
    out = np.empty(arrays[0].shape, np.float32)
    flat_out, flats = out.reshape(-1), [array.reshape(-1) for array in arrays]
    with np.errstate(over="ignore"):
        for part in _slices(out.size, _SLICE):
            flat_out[part] = formula(*(flat[part].astype(np.float64) for flat in flats))
    return out


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(at, at + step) for at in range(0, size, step))


def _added(shared: Tensors, steps: dict[str, Array]) -> dict[str, Array]:
    """The sums, in place of the steps: a payload may be large. What overflows becomes infinite."""
    with np.errstate(over="ignore"):
        for name, step in steps.items():
            np.add(shared[name], step, out=step)
    return steps


def _ordered(updates: Sequence[Update]) -> list[Update]:
    if not updates:
        raise ValueError("a server rule needs at least one update")
    return sorted(updates, key=lambda update: update.silo_id)


def _most(updates: Sequence[Update]) -> int:
    """How many can be trimmed at each end so that one or two are left."""
    return max(0, (len(updates) - 1) // 2)


def _check(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {rule}")
