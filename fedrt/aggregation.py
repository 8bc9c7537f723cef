"""Server rules: how the updates of a round change the shared tensors.

Every rule sorts by silo id and sums in float64, so the order of arrival changes no bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedrt.tensors import Array, Tensors

_SLICE = 1 << 18  # elements summed at a time: bounds the float64 temporaries for payloads of any size


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


def weighted_mean(updates: Sequence[Update]) -> dict[str, Array]:
    """Mean delta weighted by examples (FedAvg, McMahan et al., AISTATS 2017, arXiv:1602.05629), in float32.

    Raises `ValueError` without updates or without examples.
    """
    ordered = sorted(updates, key=lambda update: update.silo_id)
    total = sum(update.example_count for update in ordered)
    if total <= 0:
        raise ValueError("a weighted mean needs at least one example")
    weights = [update.example_count / total for update in ordered]
    return {name: _weighted_sum([update.delta[name] for update in ordered], weights) for name in ordered[0].delta}


def _weighted_sum(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    out = np.empty(arrays[0].shape, np.float32)
    flat_out = out.reshape(-1)
    flats = [array.reshape(-1) for array in arrays]
    for at in range(0, flat_out.size, _SLICE):
        part = slice(at, at + _SLICE)
        acc = np.zeros(flat_out[part].shape, np.float64)
        for flat, weight in zip(flats, weights, strict=True):
            acc += weight * flat[part].astype(np.float64)
        flat_out[part] = acc
    return out


def federated_average(state: ServerState, updates: Sequence[Update]) -> ServerState:
    """The server rule of FedAvg: add the weighted mean delta. One update alone adds exactly its delta."""
    shared = weighted_mean(updates)
    for name, mean in shared.items():
        np.add(state.shared[name], mean, out=mean)  # in place: a payload may be large
    return ServerState(shared, state.memory)
