"""Batches of an epoch: which images, in what order, and at most one of them fetched before it is wanted."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from silo.batches import ahead, shuffled
from silo.examples import Examples
from silo.method import Batch, ImageFeatures

WAIT = 60.0  # seconds; a thread that is not asked for anything has this long to do it all the same


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, views: int | None = None) -> Examples:
    """Image i has the label i and, in view v, the features (10·v + i)."""
    table = (10.0 * torch.arange(views or 1)[:, None] + torch.arange(count)).reshape(-1, 1)
    rows = torch.arange(len(table)).view(-1, count)
    return Examples(ImageFeatures(table, None), rows if views else rows[0], torch.arange(count))


def batch(number: int) -> Batch:
    return Batch(ImageFeatures(torch.tensor([[float(number)]]), None), torch.tensor([number]))


def test_the_order_is_that_of_the_generator() -> None:
    found = [one.labels.tolist() for one in shuffled(numbered(7), 0, 3, seeded(5))]
    order = torch.randperm(7, generator=seeded(5)).tolist()
    assert found == [order[:3], order[3:6], order[6:]]


def test_each_epoch_draws_on() -> None:
    generator = seeded()
    first, second = ([one.labels.tolist() for one in shuffled(numbered(9), 0, 9, generator)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("view", [0, 1, 2])
def test_one_view_with_the_labels_of_its_images(view: int) -> None:
    for one in shuffled(numbered(5, views=3), view, 2, seeded()):
        assert one.images.pooled[:, 0].tolist() == [10.0 * view + label for label in one.labels.tolist()]


def test_rows_on_the_host_are_gathered_ahead_of_a_device() -> None:
    """Without a GPU: labels of the device `meta` have no values, but a place."""
    fetched = threading.Semaphore(0)

    class Table:
        has_patches = False

        def take(self, rows: Tensor) -> ImageFeatures:
            fetched.release()
            return ImageFeatures(rows[:, None].float(), None)

    labels = torch.zeros(6, dtype=torch.long, device="meta")
    batches = shuffled(Examples(Table(), torch.arange(6), labels), 0, 2, seeded())
    first = next(batches)
    assert first.labels.device.type == "meta"
    assert fetched.acquire(timeout=WAIT)
    assert fetched.acquire(timeout=WAIT), "the second batch is fetched while we have the first"
    rest = [one.images.pooled[:, 0].tolist() for one in batches]
    assert [first.images.pooled[:, 0].tolist(), *rest] == torch.randperm(6, generator=seeded()).view(3, 2).tolist()


def test_the_same_batches_in_the_same_order() -> None:
    assert [one.labels.item() for one in ahead(map(batch, range(5)))] == [0, 1, 2, 3, 4]
    assert list(ahead(iter(()))) == []


def test_never_more_than_one_is_fetched_ahead() -> None:
    begun: list[int] = []

    def slowly() -> Iterator[Batch]:
        for number in range(5):
            begun.append(number)
            yield batch(number)

    for at, one in enumerate(ahead(slowly())):
        assert one.labels.item() == at
        assert len(begun) <= at + 2


def test_another_thread_fetches_while_the_caller_has_a_batch() -> None:
    has_first, fetches_second = threading.Event(), threading.Event()
    threads: set[int] = set()

    def both() -> Iterator[Batch]:
        threads.add(threading.get_ident())
        yield batch(0)
        assert has_first.wait(WAIT)
        fetches_second.set()
        yield batch(1)

    batches = ahead(both())
    assert next(batches).labels.item() == 0
    has_first.set()
    assert fetches_second.wait(WAIT)
    assert [one.labels.item() for one in batches] == [1]
    assert threading.get_ident() not in threads


def test_what_fails_while_fetching_fails_where_the_batch_is_asked_for() -> None:
    def broken() -> Iterator[Batch]:
        yield batch(0)
        raise OSError("the disk is gone")

    batches = ahead(broken())
    assert next(batches).labels.item() == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_caller_that_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    batches = ahead(map(batch, range(5)))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
