"""How much longer a lab takes, and what it shows meanwhile, with a clock that the test moves."""

import io
from dataclasses import replace
from pathlib import Path

import lab_samples
import pytest
from lab_samples import LAB, closed, evaluation, record
from rich.console import Console

from fedrt.ctl_progress import ClosedRound, Plan, WatchState
from fedrt.task import TaskKind
from silo.lab.grid import Cell, FederationPlan
from silo.lab.pace import Pace, Taken, time_left
from silo.lab.progress import Progress
from silo.lab.records import CellRecord


@pytest.mark.parametrize(
    ("running", "waiting", "jobs", "expected"),
    [
        ([], [], 1, 0.0),
        ([10.0], [], 1, 10.0),
        ([10.0], [5.0, 5.0], 1, 20.0),
        ([10.0, 2.0], [5.0, 5.0], 2, 12.0),  # the second worker: 2, 7, 12
        ([10.0], [5.0], 2, 10.0),  # a worker is free
        ([None], [5.0], 1, None),
        ([10.0], [None], 1, None),
    ],
)
def test_time_left(running: list[float | None], waiting: list[float | None], jobs: int, expected: float | None) -> None:
    assert time_left(running, waiting, jobs) == expected


def test_a_cell_takes_as_long_as_those_that_are_most_like_it(tmp_path: Path) -> None:
    zeroshot, promptfl = lab_samples.cells(tmp_path)[:2]  # 0 and 4 rounds
    assert Pace().of_cell(promptfl) is None
    pace = Pace((Taken("iid", "zeroshot", 0, 2.0),))
    assert pace.of_cell(zeroshot) == 2.0
    assert pace.of_cell(promptfl) is None, "an evaluation says nothing about training"
    pace = Pace((*pace.cells, Taken("elsewhere", "promptfolio", 10, 100.0)))
    assert pace.of_cell(promptfl) == 40.0, "another method, per round"
    pace = Pace((*pace.cells, Taken("elsewhere", "promptfl", 2, 4.0)))
    assert pace.of_cell(promptfl) == 8.0, "the method elsewhere, per round"
    pace = Pace((*pace.cells, Taken("iid", "promptfl", 4, 5.0), Taken("iid", "promptfl", 4, 7.0)))
    assert pace.of_cell(promptfl) == 6.0, "the method here"
    assert pace.of_cells([zeroshot, promptfl]) == 8.0


def test_a_federation_takes_its_start_and_its_cells(tmp_path: Path) -> None:
    _, plans = lab_samples.read(tmp_path)
    pace = Pace((Taken("iid", "zeroshot", 0, 2.0),), starts=(10.0, 20.0))
    assert pace.of_federation(plans[0]) is None
    pace = replace(pace, cells=(*pace.cells, Taken("iid", "promptfl", 4, 6.0)))
    assert pace.of_federation(plans[0]) == 15.0 + 8.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A progress on a console that is no terminal."""

    def __init__(self, directory: Path, terminal: bool = False) -> None:
        self.lab, self.plans = lab_samples.read(directory, LAB)
        self.clock, self.output = Clock(), io.StringIO()
        console = Console(file=self.output, force_terminal=terminal, width=160, color_system=None, highlight=False)
        self.progress = Progress(self.plans, {}, 1, console, self.clock)

    @property
    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()


def trained(cell: Cell, rounds: int, stage_time: float) -> WatchState:
    """An experiment of four rounds, each taking 2 seconds to train and 1 to evaluate, after some of them."""
    parts = [ClosedRound(0, TaskKind.EVALUATE, True, 1.0, {"accuracy": 0.25}, {}, {})]
    for number in range(1, rounds + 1):
        parts.append(ClosedRound(number, TaskKind.TRAIN, True, 2.0, {"loss": 1.0}, {}, {}))
        parts.append(ClosedRound(number, TaskKind.EVALUATE, True, 1.0, {"accuracy": 0.5}, {}, {}))
    plan = Plan(cell.cell_id, "promptfl", 4, 4, 1)
    return WatchState(plan, "running", kind=TaskKind.TRAIN, rounds=tuple(parts), stage_time=stage_time)


def finished(cell: Cell, seconds: float) -> CellRecord:
    rounds = [closed(number, "train", {"silo-01": {"loss": 1.0}}) for number in range(1, cell.rounds.count + 1)]
    last = evaluation(cell.rounds.count, {"silo-01": {"accuracy": 0.75}})
    return record(cell, *rounds, last, wall_seconds=seconds)


def begin(stage: Stage, plan: FederationPlan, at: float, ready: float) -> None:
    stage.clock.now = at
    stage.progress.begins(plan, plan.cells)
    stage.clock.now = ready
    stage.progress.ready(plan)


def test_time_left_is_honest(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    progress, (first, second) = stage.progress, stage.plans
    begin(stage, first, 0.0, 10.0)
    assert progress.left() is None, "nothing has been measured yet"
    progress.works(first, first.cells[0])
    stage.clock.now = 12.0
    progress.finishes(first.cells[0], finished(first.cells[0], 2.0))
    assert progress.left() is None, "how long training takes is not known yet"
    progress.works(first, first.cells[1])
    stage.clock.now = 19.0
    progress.shows(first, trained(first.cells[1], 2, 19.0))
    # two rounds are left here, 3 seconds each; there a start (10), an evaluation (2) and four rounds with all (13)
    assert progress.left() == pytest.approx(6.0 + 10.0 + 2.0 + 13.0)
    stage.clock.now = 20.0
    assert progress.left() == pytest.approx(6.0 + 10.0 + 2.0 + 13.0 - 2.0), "both by the second that went by"
    progress.finishes(first.cells[1], finished(first.cells[1], 14.0))
    progress.ends(first)
    assert progress.left() == pytest.approx(10.0 + 2.0 + 14.0)
    begin(stage, second, 30.0, 30.0)
    for cell in second.cells:
        progress.works(second, cell)
        progress.finishes(cell, finished(cell, 1.0))
    progress.ends(second)
    assert progress.left() == 0.0


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    progress, (first, _) = stage.progress, stage.plans
    with progress:
        begin(stage, first, 0.0, 1.0)
        progress.works(first, first.cells[1])
        for now in (10.0, 30.9, 31.0, 40.0):
            stage.clock.now = now
            progress.shows(first, trained(first.cells[1], 2, now))
        progress.finishes(first.cells[1], finished(first.cells[1], 13.0))
        progress.fails(first.cells[0], "round 1 got\x1b[2J\n  nothing")
    assert stage.lines == [
        "iid/promptfl, seed 1: round 2 of 4, accuracy 0.500",
        "[1/4] iid/promptfl, seed 1: accuracy 0.750, 13 s; about 20 s left",
        "iid/zeroshot, seed 1 FAILED: round 1 got?[2J nothing",
    ]
    assert progress.failed == {first.cells[0].cell_id: "round 1 got\x1b[2J\n  nothing"}


def test_a_table_on_a_terminal(tmp_path: Path) -> None:
    stage = Stage(tmp_path, terminal=True)
    progress, (first, _) = stage.progress, stage.plans
    with progress:
        begin(stage, first, 0.0, 1.0)
        progress.says(first, "starts its daemons")
        progress.works(first, first.cells[1])
        progress.shows(first, trained(first.cells[1], 3, 1.0))
        progress.fails(first.cells[0], "no reason")
    text = stage.output.getvalue()
    for words in ("round 3 of 4", "0.500", "0/4 cells", "1 failed"):
        assert words in text
