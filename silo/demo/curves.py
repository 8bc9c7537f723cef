"""Draws the curves of the demo: loss and accuracy on each hospital's test images over the rounds, as a PNG file."""

import math
from pathlib import Path
from typing import Any

from fedrt.task import TaskKind
from silo.demo.hospitals import SILOS
from silo.demo.outcome import Outcome

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart by the colour-blind, too (Okabe and Ito)
_TITLES = {"accuracy": "Accuracy on each hospital's own test images", "loss": "Loss on the same images"}


def draw_curves(path: Path, outcome: Outcome) -> None:
    """Write the PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, 2), _TITLES, strict=True):
        _panel(axes, outcome, metric)
    recipe = outcome.recipe
    figure.suptitle(
        f"PromptFL on three hospitals ({recipe.data}, {len(recipe.classes)} classes): "
        f"mean accuracy {outcome.zero_shot():.3f} zero-shot, {outcome.federated():.3f} federated",
        fontsize=12,
    )
    unfinished = path.with_name(f".{path.name}.new")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)


def _panel(axes: Any, outcome: Outcome, metric: str) -> None:
    for silo, colour in zip(SILOS, COLOURS, strict=True):
        points = outcome.promptfl.series(TaskKind.EVALUATE, metric, silo)
        rounds, values = [number for number, _ in points], [value for _, value in points]
        label = f"{silo} ({outcome.data[silo].scanner})"
        axes.plot(rounds, values, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=label)
        level = outcome.zeroshot.series(TaskKind.EVALUATE, metric, silo)[-1][1]
        axes.axhline(level, color=colour, linestyle="--", linewidth=1.0, alpha=0.8)
    axes.plot([], [], color="#555555", linestyle="--", linewidth=1.0, label="zero-shot")
    axes.set_title(_TITLES[metric], fontsize=10.5)
    axes.set_xlabel("round")
    axes.set_ylabel(metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if metric == "accuracy":
        axes.set_ylim(math.floor(10 * axes.get_ylim()[0]) / 10, 1)
        axes.legend(frameon=False, fontsize=9, loc="lower right")
