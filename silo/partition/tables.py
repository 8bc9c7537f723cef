"""Shows who holds what, as a table for the terminal (rich)."""

from collections.abc import Mapping
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from silo.data.records import Split
from silo.partition.holdings import Holding, Partition

MAX_ROWS = 40
_SHOWN_CLASSES = 3


def table(partition: Partition, max_rows: int = MAX_ROWS) -> Table:
    """A row for each silo: its domain, training and test images, classes, and those it trains on most.

    Of more than `max_rows` silos the first and the last are shown. The last row is about all of them. Below it stands
    how many training images nobody got, if any.
    """
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    has_domains = any(holding.domain is not None for holding in partition.holdings)
    shown.add_column("silo", no_wrap=True)
    if has_domains:
        shown.add_column("domain", no_wrap=True)
    for column in ("train", "test", "classes"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("most training images", ratio=1)  # the one that gives way where the terminal is narrow
    holdings = partition.holdings
    hidden = 0 if len(holdings) <= max_rows else len(holdings) - max_rows
    head = (max_rows + 1) // 2
    for position, holding in enumerate(holdings):
        if not hidden or not head <= position < head + hidden:
            shown.add_row(*_row(holding, has_domains))
        elif position == head:
            shown.add_row(Text(f"... {hidden} more", "dim"))
    shown.add_section()
    shown.add_row(*_summary(partition, has_domains), style="bold")
    if partition.copy_count:
        shown.caption = f"nobody trains on {partition.copy_count:,} copies of images that must stay unseen"
        shown.caption_justify = "left"
    return shown


def _row(holding: Holding, has_domains: bool) -> list[str | Text]:
    trained = holding.class_counts[Split.TRAIN]
    return [
        Text(holding.silo),
        *([Text(holding.domain or "")] if has_domains else []),
        f"{count(holding, Split.TRAIN):,}",
        f"{count(holding, Split.TEST):,}",
        f"{len(trained):,}",
        Text(_largest(trained), no_wrap=True, overflow="ellipsis"),
    ]


def _largest(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    words = [f"{label} {number:,}" for label, number in ordered[:_SHOWN_CLASSES]]
    return ", ".join([*words, *([f"+{len(ordered) - _SHOWN_CLASSES}"] if len(ordered) > _SHOWN_CLASSES else [])])


def _summary(partition: Partition, has_domains: bool) -> list[str | Text]:
    trained = [count(holding, Split.TRAIN) for holding in partition.holdings]
    tested = [count(holding, Split.TEST) for holding in partition.holdings]
    first = partition.holdings[0]
    beside = [
        f"{split.value} {count(first, split):,}"
        for split in (Split.BASE, Split.NOVEL, Split.DOMAIN)
        if split in first.indices
    ]
    sizes = f"train {min(trained):,} to {max(trained):,}, median {median(trained):,.0f}"
    return [
        f"{len(partition.holdings)} silos",
        *([""] if has_domains else []),
        f"{sum(trained):,}",
        f"{sum(tested):,}",
        f"{len(partition.classes):,}",
        Text("; ".join([sizes, *([f"each also {', '.join(beside)}"] if beside else [])]), overflow="ellipsis"),
    ]


def count(holding: Holding, split: Split) -> int:
    """The number of images of one split; 0 where the silo has none."""
    return len(holding.indices.get(split, ()))
