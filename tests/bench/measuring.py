"""What the benchmarks measure with: seconds, peaks of products and of memory, and differences of tensors."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]


def synchronise(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Work, device: torch.device) -> float:
    """Of one run, waited for."""
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def interleaved(
    work: Mapping[str, Work], device: torch.device, rounds: int, repeats: Mapping[str, int]
) -> dict[str, list[float]]:
    """Seconds of each work, in turns; within a turn it may repeat. Each must have been run before."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    gc.collect()
    for _ in range(rounds):
        for name, run in work.items():
            taken[name] += [seconds(run, device) for _ in range(repeats.get(name, 1))]
    return taken


def timing(taken: Sequence[float]) -> dict[str, Any]:
    """Median and best."""
    return {"median": significant(statistics.median(taken)), "best": significant(min(taken)), "count": len(taken)}


@dataclass(frozen=True)
class Product:
    """A big product of square matrices, whose GFLOP/s stand for the peak of the device. Run once when made."""

    run: Work
    gflop: float

    def gflops(self, taken: Sequence[float]) -> float:
        """The best of several."""
        return self.gflop / min(taken)


def big_product(device: torch.device, dtype: torch.dtype) -> Product:
    """Of a size that a CPU does in a fraction of a second, and larger on a GPU."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(left)

    def product() -> None:
        torch.mm(left, right, out=out)

    seconds(product, device)
    return Product(product, 2e-9 * size**3)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process held: of the GPU's memory, or resident (VmHWM)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def difference(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """The largest difference, and that over 1 + the largest expected value, which 5e-5 bounds, and over the latter."""
    actual, expected = actual.detach().float(), expected.detach()
    worst, size = float((actual - expected).abs().max()), float(expected.abs().max())
    return {
        "absolute": significant(worst),
        "relative": significant(worst / size if size else worst),
        "of_one_plus_max": significant(worst / (1 + size)),
    }


def worst_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest of the differences of several tensors, each kind for itself."""
    each = [difference(actual[name], expected[name]) for name in expected]
    return {kind: max(one[kind] for one in each) for kind in each[0]}


def significant(value: float) -> float:
    """Four digits, for people."""
    return float(f"{value:.4g}")
