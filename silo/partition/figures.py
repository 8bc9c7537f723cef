"""Draws who holds what: a heat map of training images by silo and class, beside the sizes of the silos, as PNG."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedrt.statefile import write_atomic_by
from silo.data.records import Split
from silo.partition.holdings import Partition
from silo.partition.rules import IntArray
from silo.partition.sections import Skewed
from silo.partition.tables import count

_TRAIN, _TEST = "#0072b2", "#e69f00"  # told apart by the colour-blind, too (Okabe and Ito)
_MAX_NUMBERS = 240  # cells up to which each shows its number
_FEW = 40  # names up to which there is room for each in full size
_MAX_LABELS = 240  # names up to which each is shown
_MAX_LABEL_CHARACTERS = 28


def plot(partition: Partition, path: Path) -> None:
    """Write the PNG file, readable with up to about a hundred silos and classes. Raises `StorageError`.

    Rows are silos and columns classes, both in the order of the partition; colour grows with the square root of the
    number of training images, so that small holdings are seen beside large ones, and white is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    counts = _train_counts(partition)
    silo_count, class_count = counts.shape
    size = _Size(_extent(class_count, 3.6), _extent(silo_count, 1.6))
    figure = Figure(figsize=(size.width + 4.2, size.height + 2.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(size.width, 2.4))
    _draw_heat(figure, heat, partition, counts, size)
    _draw_bars(bars, partition)
    figure.suptitle(_title(partition, counts), fontsize=11)
    write_atomic_by(path, lambda temporary: figure.savefig(temporary, format="png"), 0o644)


class _Size(NamedTuple):
    """Of the heat map alone, in inches."""

    width: float
    height: float


def _extent(names: int, least: float) -> float:
    """Inches that so many rows or columns need for their names to be read, up to the size of a poster."""
    return float(np.clip((0.24 if names <= _FEW else 0.125) * names, least, 30))


def _title(partition: Partition, counts: IntArray) -> str:
    section = partition.section
    kind = section.kind.replace("_", " ") + (f" (beta {section.beta:g})" if isinstance(section, Skewed) else "")
    silo_count, class_count = counts.shape
    return (
        f"{kind}: {int(counts.sum()):,} training images of {class_count} classes at {silo_count} silos "
        f"(seed {partition.seed})"
    )


def _train_counts(partition: Partition) -> IntArray:
    """Training images [K, C]."""
    rows = [
        [holding.class_counts[Split.TRAIN].get(label, 0) for label in partition.classes]
        for holding in partition.holdings
    ]
    return np.array(rows, np.int64)


def _draw_heat(figure: Any, axes: Any, partition: Partition, counts: IntArray, size: _Size) -> None:
    from matplotlib.colors import PowerNorm  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    norm = PowerNorm(0.5, vmin=0, vmax=max(int(counts.max()), 1))
    shown = axes.pcolormesh(np.ma.masked_equal(counts, 0), cmap="YlGnBu", norm=norm, edgecolors="none")
    silo_count, class_count = counts.shape
    axes.set_ylim(silo_count, 0)  # the first silo on top
    _name_ticks(axes.xaxis, [_short(label) for label in partition.classes])
    _name_ticks(axes.yaxis, [_short(silo) for silo in partition.silos])
    for line in axes.get_xticklabels():
        line.set_rotation(90 if class_count > 8 or max(map(len, partition.classes)) > 12 else 0)
    axes.set_xticks(np.arange(class_count + 1), minor=True)
    axes.set_yticks(np.arange(silo_count + 1), minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.3)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color("#bbbbbb")
    if counts.size <= _MAX_NUMBERS:
        for (silo, label), number in np.ndenumerate(counts):
            if number:
                ink = "white" if number > 0.36 * counts.max() else "black"
                axes.text(label + 0.5, silo + 0.5, str(number), ha="center", va="center", fontsize=7, color=ink)
    share = min(1.0, 3.0 / size.width)  # neither wider nor thicker where there are many classes
    place = {"location": "top", "shrink": share, "aspect": share * size.width / 0.12}
    bar = figure.colorbar(shown, ax=axes, fraction=0.12 / size.height, pad=0.08 / size.height, **place)
    bar.locator = MaxNLocator(nbins=4, integer=True)
    bar.update_ticks()
    bar.set_label("training images", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _draw_bars(axes: Any, partition: Partition) -> None:
    places = np.arange(len(partition.holdings)) + 0.5
    left = np.zeros(len(places))
    for split, colour, name in ((Split.TRAIN, _TRAIN, "train"), (Split.TEST, _TEST, "test")):
        sizes = np.array([count(holding, split) for holding in partition.holdings])
        axes.barh(places, sizes, left=left, height=0.75, color=colour, label=name)
        left = left + sizes
    axes.set_xlabel("images", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", which="both", length=0, labelleft=False)
    axes.xaxis.get_major_locator().set_params(nbins=4, integer=True)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.1)


def _name_ticks(axis: Any, names: list[str]) -> None:
    step = -(-len(names) // _MAX_LABELS)
    places = np.arange(0, len(names), step)
    size = 8 if len(names) <= _FEW else 6
    axis.set_ticks(places + 0.5, [names[place] for place in places], fontsize=size)


def _short(name: str) -> str:
    short = name if len(name) <= _MAX_LABEL_CHARACTERS else f"{name[: _MAX_LABEL_CHARACTERS - 1]}…"
    return short.replace("$", r"\$")  # matplotlib would set what stands between two as a formula
