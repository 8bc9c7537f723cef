"""What a running lab shows: a table in place on a terminal, else a line for whatever begins, ends or fails."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedrt.ctl_progress import WatchState
from fedrt.ctl_view import NOTHING, printable, span_text
from fedrt.task import TaskKind
from fedrt.v1 import admin_service_pb2 as pb
from silo.lab.grid import Cell, FederationPlan, cells_of
from silo.lab.pace import Pace, Taken, time_left
from silo.lab.records import CellRecord
from silo.lab.summary import Quantity, last_values

LINE_INTERVAL = 30.0  # seconds between lines about a cell that runs
ACCURACY = Quantity("personal", "accuracy")


@dataclass(frozen=True)
class AtWork:
    """A federation at work: what it does in words, the cells that it has not ended yet, and the one under way."""

    plan: FederationPlan
    words: str
    cells: tuple[Cell, ...]
    cell: Cell | None = None
    state: WatchState | None = None
    since: float = 0.0
    is_ready: bool = False


class Progress:
    """Told by federations how they fare; owns what is shown. `clock` gives Unix seconds."""

    def __init__(
        self,
        plans: Sequence[FederationPlan],
        finished: Mapping[str, CellRecord],
        jobs: int,
        console: Console,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._waiting = {plan.name: plan for plan in plans}
        self._total = len(finished) + sum(1 for _ in cells_of(plans))
        self._done = len(finished)
        self._jobs = jobs
        self._console = console
        self._clock = clock
        self._began = clock()
        self._pace = Pace(tuple(_taken(one) for one in finished.values()))
        self._at_work: dict[str, AtWork] = {}
        self._told: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._live = Live(get_renderable=self._view, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begins(self, plan: FederationPlan, cells: tuple[Cell, ...]) -> None:
        """A federation starts, or starts again, with these cells before it."""
        self._waiting.pop(plan.name, None)
        self._at_work[plan.name] = AtWork(plan, "starts", cells, since=self._clock())

    def says(self, plan: FederationPlan, words: str) -> None:
        """A federation that starts does this now."""
        self._at_work[plan.name] = replace(self._at_work[plan.name], words=words)

    def ready(self, plan: FederationPlan) -> None:
        """A federation is ready for its cells."""
        at_work = self._at_work[plan.name]
        self._at_work[plan.name] = replace(at_work, is_ready=True)
        self._pace = replace(self._pace, starts=(*self._pace.starts, self._clock() - at_work.since))

    def works(self, plan: FederationPlan, cell: Cell) -> None:
        """A federation begins or goes on with a cell."""
        now = self._clock()
        self._at_work[plan.name] = replace(self._at_work[plan.name], cell=cell, state=None, since=now)
        self._told[plan.name] = now

    def shows(self, plan: FederationPlan, state: WatchState) -> None:
        """How the cell under way stands."""
        now, at_work = self._clock(), self._at_work[plan.name]
        self._at_work[plan.name] = at_work = replace(at_work, state=state)
        if not self._console.is_terminal and now - self._told[plan.name] >= LINE_INTERVAL and at_work.cell:
            self._told[plan.name] = now
            self._tell(f"{at_work.cell.name}: {', '.join(_standing(state))}")

    def finishes(self, cell: Cell, record: CellRecord) -> None:
        """A cell is finished and on disk."""
        self._done += 1
        self._close(cell)
        self._pace = replace(self._pace, cells=(*self._pace.cells, _taken(record)))
        found = last_values(record).get(ACCURACY)
        words = f"accuracy {found.mean:.3f}" if found else "nothing measured"
        self._tell(f"[{self._done}/{self._total}] {cell.name}: {words}, {span_text(record.wall_seconds)}", left=True)

    def fails(self, cell: Cell, reason: str) -> None:
        """A cell has failed."""
        self.failed[cell.cell_id] = reason
        self._close(cell)
        self._tell(f"{cell.name} FAILED: {' '.join(reason.split())}")

    def _close(self, cell: Cell) -> None:
        for name, one in self._at_work.items():
            if cell in one.cells:
                rest = replace(one, cells=tuple(other for other in one.cells if other != cell))
                if one.cell == cell:
                    rest = replace(rest, words="goes on", cell=None, state=None, since=self._clock())
                self._at_work[name] = rest

    def ends(self, plan: FederationPlan) -> None:
        """A federation has ended."""
        self._at_work.pop(plan.name, None)

    def left(self) -> float | None:
        """Seconds until the end, as far as they can be known."""
        now = self._clock()
        # what the cells under way say of themselves counts for those that wait, too
        projected = tuple(taken for one in self._at_work.values() for taken in _projected(one, now))
        pace = replace(self._pace, cells=(*self._pace.cells, *projected))
        running = [_left_of(one, pace, now) for one in self._at_work.values()]
        return time_left(running, [pace.of_federation(plan) for plan in self._waiting.values()], self._jobs)

    def _tell(self, text: str, left: bool = False) -> None:
        if left:
            text += f"; {self._left_words()}"
        self._console.print(Text(printable(text)), soft_wrap=True)

    def _left_words(self) -> str:
        left = self.left()
        return "time left not known yet" if left is None else f"about {span_text(left)} left"

    def _view(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
        for column in ("setting", "seed", "method", "does now", "accuracy", "time"):
            table.add_column(column)
        for one in self._at_work.values():
            doing = one.words if one.state is None else _standing(one.state)[0]
            table.add_row(
                one.plan.setting,
                str(one.plan.seed),
                one.cell.label if one.cell else NOTHING,
                printable(doing),
                _accuracy(one.state) or NOTHING,
                span_text(self._clock() - one.since),
            )
        line = Table.grid(padding=(0, 1))
        elapsed = span_text(self._clock() - self._began)
        bar = ProgressBar(total=max(1, self._total), completed=self._done, width=36)
        words = f"{self._done}/{self._total} cells  {elapsed}  {self._left_words()}"
        line.add_row("", bar, words + (f"  {len(self.failed)} failed" if self.failed else ""))
        return Group(table, line)


def _left_of(one: AtWork, pace: Pace, now: float) -> float | None:
    """Of the cell under way by its own rounds once it has some, of those after it by the pace."""
    if one.cell is None:
        rest, start = pace.of_cells(one.cells), 0.0 if one.is_ready else pace.of_start() - (now - one.since)
        return None if rest is None else max(0.0, start) + rest
    own = one.state.time_left(now) if one.state else None
    if own is None and (usual := pace.of_cell(one.cell)) is not None:
        own = max(0.0, usual - (now - one.since))
    rest = pace.of_cells(cell for cell in one.cells if cell != one.cell)
    return None if own is None or rest is None else own + rest


def _projected(one: AtWork, now: float) -> Iterator[Taken]:
    """What the cell under way will have taken, once it has trained a round."""
    left = one.state.time_left(now) if one.state and one.cell and one.state.finished(TaskKind.TRAIN) else None
    if left is not None and one.state and one.cell:
        seconds = sum(closed.duration for closed in one.state.rounds) + left
        yield Taken(one.cell.setting, one.cell.label, one.state.plan.round_count, seconds)


def _taken(record: CellRecord) -> Taken:
    return Taken(record.setting, record.method, len(record.of_task(TaskKind.TRAIN.value)), record.wall_seconds)


class CellAudience:
    """Passes what is heard of one experiment on to the progress."""

    def __init__(self, progress: Progress, plan: FederationPlan) -> None:
        self._progress = progress
        self._plan = plan

    def heard(self, event: pb.Event) -> None:
        """Nothing: the state tells it."""

    def shown(self, state: WatchState) -> None:
        """How the experiment stands now."""
        self._progress.shows(self._plan, state)


def _standing(state: WatchState) -> list[str]:
    """What an experiment does, and its latest accuracy, in words."""
    done = len({closed.number for closed in state.finished(TaskKind.TRAIN)})
    rounds = state.plan.round_count
    words = f"round {done} of {rounds}" if rounds else "evaluates"
    if state.message:
        words = state.message
    accuracy = _accuracy(state)
    return [words, f"accuracy {accuracy}"] if accuracy else [words]


def _accuracy(state: WatchState | None) -> str | None:
    """The mean over images, as the coordinator has it; the tables take the mean over silos."""
    points = state.series(TaskKind.EVALUATE, "accuracy") if state else ()
    return f"{points[-1][1]:.3f}" if points else None
