"""The batches of a local epoch: shuffled by a seed, in one view of the images, fetched ahead where that takes time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from silo.examples import Examples
from silo.method import Batch


def shuffled(examples: Examples, view: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """All examples once, in one of their views; the last batch may be smaller.

    The order is drawn on the CPU, so it is the same whichever device trains.
    """
    epoch = _reordered(examples, view, torch.randperm(len(examples), generator=generator))
    batches = (epoch.batch(slice(at, at + batch_size)) for at in range(0, len(epoch), batch_size))
    is_gathered_by_host = epoch.rows.device != epoch.labels.device
    return ahead(batches) if is_gathered_by_host else batches


def _reordered(examples: Examples, view: int, order: torch.Tensor) -> Examples:
    """One view of the examples in this order: indices reach the device once in an epoch, so that no batch waits."""
    rows = examples.rows if examples.rows.ndim == 1 else examples.rows[view]
    labels = examples.labels
    return Examples(examples.table, rows[order.to(rows.device)], labels[order.to(labels.device)])


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; a thread fetches the next one, and no more, while the caller has one.

    It uses the stream of the caller: gathering rows on the host takes far longer than their copy to a GPU.
    """
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(next, batches, None)
        while (batch := fetched.result()) is not None:
            fetched = pool.submit(next, batches, None)
            yield batch
