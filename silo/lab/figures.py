"""Draws a lab's figures as PNG: accuracy over the rounds, the last round as bars, and who holds which images."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrt.errors import ConfigurationError
from fedrt.statefile import storage_error, write_atomic_by
from silo.lab.grid import FederationPlan, cells_of, splits_of
from silo.lab.measurements import PERSONAL
from silo.lab.records import CellRecord
from silo.lab.summary import Quantity, Spread, curve, last_values, over_seeds
from silo.lab.tables import SPLIT_NAMES

# Okabe and Ito's colours, told apart by the colour-blind, too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_ACCURACY = Quantity(PERSONAL, "accuracy")
_Records = Mapping[str, Sequence[CellRecord]]  # label -> one for each finished seed


def draw_figures(
    directory: Path, plans: Sequence[FederationPlan], records: Mapping[str, CellRecord], labels: Sequence[str]
) -> list[Path]:
    """Write `<setting>-curves.png` and `<setting>-last-round.png` for each setting with finished cells.

    A method keeps its colour from figure to figure; `labels` are all of the lab. Raises `StorageError`.
    """
    written = []
    for setting in dict.fromkeys(plan.setting for plan in plans):
        of_setting = [plan for plan in plans if plan.setting == setting]
        found: dict[str, list[CellRecord]] = {}
        for cell in cells_of(of_setting):
            if cell.cell_id in records:
                found.setdefault(cell.label, []).append(records[cell.cell_id])
        if not found:
            continue
        ordered = {label: found[label] for label in labels if label in found}
        splits = [split.value for split in splits_of(of_setting[0].partition)]
        for name, figure in (
            ("curves", accuracy_curves(setting, ordered, labels)),
            ("last-round", _bars(setting, ordered, splits)),
        ):
            written.append(figures_directory(directory) / f"{setting}-{name}.png")
            _save(figure, written[-1])
    return written


def check_drawing() -> None:
    """Raise `ConfigurationError` unless figures can be drawn here; looked at before a run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("figures need matplotlib, which is not installed; run: pip install 'fedrt[lab]'")


def figures_directory(directory: Path) -> Path:
    """Where figures go below the lab's directory; made if it is not there. Raises `StorageError`."""
    place = directory / "figures"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create directory", place, error) from error
    return place


def accuracy_curves(setting: str, records: _Records, labels: Sequence[str]) -> Any:
    """Mean over seeds with a band of one standard deviation.

    What was measured before the first round only trains nothing: a broken line. What was measured once, but later, is a
    mark at its round.
    """
    figure, axes = _figure((8.5, 5.0))
    last = max((point[0] for found in records.values() for point in curve(found, _ACCURACY)), default=0)
    for label, found in records.items():
        points, index = curve(found, _ACCURACY), list(labels).index(label)
        style = {"color": COLOURS[index % len(COLOURS)], "label": label, "linewidth": 1.8}
        if [number for number, _ in points] == [0]:
            points = [(0, points[0][1]), (max(last, 1), points[0][1])]
            style |= {"linestyle": "--"}
        elif len(points) <= 30:
            style |= {"marker": MARKS[index % len(MARKS)], "markersize": 4}
        numbers = [number for number, _ in points]
        means = [100 * value.mean for _, value in points]
        band = [100 * (value.deviation or 0.0) for _, value in points]
        if len(points) == 1:
            axes.errorbar(numbers, means, band if any(band) else None, capsize=3, **style | {"linestyle": "none"})
            continue
        axes.plot(numbers, means, **style)
        low, high = ([mean + sign * width for mean, width in zip(means, band, strict=True)] for sign in (-1, 1))
        axes.fill_between(numbers, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_title(f"{setting}: accuracy on the silos' own test images", fontsize=11)
    axes.set_xlabel("round")
    axes.set_ylabel("mean over silos (%); band: deviation over seeds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _bars(setting: str, records: _Records, splits: Sequence[str]) -> Any:
    """Accuracy after the last round: a group of bars for each method, a bar for each split."""
    figure, axes = _figure((1.6 + 1.0 * max(4, len(records)) * max(1.0, 0.55 * len(splits)), 4.6))
    width = 0.8 / len(splits)
    values = {label: [last_values(record) for record in found] for label, found in records.items()}
    for index, split in enumerate(splits):
        spreads = [over_seeds(found, Quantity(split, "accuracy")) or Spread(0.0, None, 0) for found in values.values()]
        places = [place - 0.4 + width * (index + 0.5) for place in range(len(records))]
        heights = [100 * value.mean for value in spreads]
        errors = [100 * (value.deviation or 0.0) for value in spreads]
        axes.bar(places, heights, width * 0.92, color=COLOURS[index], label=SPLIT_NAMES[split])
        if any(errors):
            axes.errorbar(places, heights, errors, fmt="none", ecolor="#444444", capsize=3)
        for place, height, error in zip(places, heights, errors, strict=True):
            axes.text(place, height + error + 0.6, f"{height:.1f}", ha="center", va="bottom", fontsize=7.5)
    axes.set_xticks(range(len(records)), list(records), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_ylabel("accuracy (%), mean over silos")
    axes.set_ylim(0, 108)
    axes.set_title(f"{setting}: after the last round", fontsize=11)
    if len(splits) > 1:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    write_atomic_by(path, lambda temporary: figure.savefig(temporary, format="png"), 0o644)
