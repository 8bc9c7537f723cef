"""How a cell is run on a coordinator, here a made-up one: which experiments it makes and cancels, and what fails."""

import asyncio
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab_samples
import pytest
from rich.console import Console

from fedrt.ctl_progress import ClosedRound, Measured, Plan, WatchState
from fedrt.spec import ExperimentSpec
from fedrt.task import TaskKind
from fedrt.v1 import experiment_pb2 as experiment_pb
from fedrt.wire_values import experiment_spec_to_pb
from silo.demo.processes import DaemonEnded
from silo.lab import federation
from silo.lab.federation import CellFailed, Federation, Given
from silo.lab.grid import Cell, Dealt, FederationPlan
from silo.lab.progress import Progress
from silo.lab.records import CellRecord, read_cell
from silo.lab.sections import LabFile
from silo.lab.workplace import Workplace
from silo.partition.collection import CollectionSection

HELD = {"train": 3, "test": 2}
DEALT = Dealt(("red circle", "blue star"), (), {"silo-01": HELD, "silo-02": HELD}, "f" * 64)
METHODS = {"promptfl": "ab" * 32, "zeroshot": "cd" * 32}
State = experiment_pb.Experiment.State


class FakeCoordinator:
    """Its experiments, and how the next one to be followed ends: with these silos in the last evaluation."""

    def __init__(self, **standing: int) -> None:
        self.states = {name.replace("_", "-"): state for name, state in standing.items()}
        self.specs: dict[str, ExperimentSpec] = {}
        self.measured = {"silo-01": 0.5, "silo-02": 0.7}

    async def list_all(self) -> list[experiment_pb.Experiment]:
        return [
            experiment_pb.Experiment(
                experiment_id=name,
                state=state,  # type: ignore[arg-type]
                spec=experiment_spec_to_pb(self.specs[name]) if name in self.specs else None,
            )
            for name, state in self.states.items()
        ]

    async def create(self, experiment_id: str, spec: ExperimentSpec) -> None:
        assert self.specs.setdefault(experiment_id, spec) == spec, "the coordinator refuses another specification"
        self.states.setdefault(experiment_id, State.STATE_RUNNING)

    async def cancel(self, experiment_id: str) -> None:
        self.states[experiment_id] = State.STATE_CANCELLED

    async def follow(self, _: object, experiment_id: str, __: object) -> WatchState:
        self.states[experiment_id] = State.STATE_SUCCEEDED
        silos = {silo: Measured(2, {"accuracy": value}, 0.1, 0) for silo, value in self.measured.items()}
        absent = {silo: "not connected" for silo in DEALT.holdings if silo not in silos}
        last = ClosedRound(4, TaskKind.EVALUATE, True, 1.0, {}, silos, absent)
        return WatchState(Plan(experiment_id, "promptfl", 2, 4, 1), state="succeeded", rounds=(last,))


class Trial:
    """One setting with one seed, on a made-up coordinator."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, text: str = lab_samples.LAB) -> None:
        lab, plans = lab_samples.read(directory, text)
        self.lab: LabFile = lab
        self.plan: FederationPlan = plans[0]
        self.coordinator = FakeCoordinator()
        self.place = Workplace(directory / "place", directory / "place" / "sockets")
        self.progress = Progress([self.plan], {}, 1, Console(file=io.StringIO()))
        monkeypatch.setattr(federation, "follow", self.coordinator.follow)

    def given(self, **changed: Any) -> Given:
        images = CollectionSection(root=self.place.root, layout="image_folder")
        cell_ids = frozenset(cell.cell_id for cell in self.plan.cells)
        return replace(Given(images, DEALT, "0" * 64, METHODS, cell_ids), **changed)

    def run(self, cell: Cell, given: Given | None = None) -> CellRecord | None:
        one = Federation(self.lab, self.plan, given or self.given())
        self.progress.begins(self.plan, (cell,))
        self.progress.works(self.plan, cell)
        client: Any = self.coordinator
        asyncio.run(one._cell(client, self.place, cell, self.progress))
        return read_cell(self.lab.directory, cell)


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(tmp_path, monkeypatch)


def names(experiments: Mapping[str, object], cell: Cell) -> list[str]:
    return [name.removeprefix(cell.cell_id) for name in experiments if name.startswith(cell.cell_id)]


def test_a_cell_that_is_done_is_fetched_and_with_other_code_it_is_run_anew(trial: Trial) -> None:
    cell = trial.plan.cells[1]
    first = trial.run(cell)
    assert first is not None
    assert trial.run(cell) == first
    assert names(trial.coordinator.states, cell) == [""]
    second = trial.run(cell, trial.given(method_digests=METHODS | {"promptfl": "ef" * 32}))
    assert second is not None
    assert (first.method_digest, second.method_digest) == ("ab" * 32, "ef" * 32)
    assert names(trial.coordinator.states, cell) == ["", "-2"]


def test_a_cell_that_lacks_a_silo_has_failed_and_the_next_run_tries_it_again(trial: Trial) -> None:
    cell = trial.plan.cells[1]
    trial.coordinator.measured = {"silo-01": 0.5}
    with pytest.raises(CellFailed, match=r"lacks 1 of 2 silos in its last evaluation \(silo-02: not connected\); the"):
        trial.run(cell)
    assert read_cell(trial.lab.directory, cell) is None
    trial.coordinator.measured = {"silo-01": 0.5, "silo-02": 0.7}
    assert trial.run(cell) is not None
    assert names(trial.coordinator.states, cell) == ["", "-2"]


def test_only_experiments_that_the_lab_does_not_have_are_cancelled(trial: Trial) -> None:
    zeroshot, promptfl = (cell.cell_id for cell in trial.plan.cells)
    running = State.STATE_RUNNING
    trial.coordinator.states = dict.fromkeys([promptfl, f"{zeroshot}-2", "iid-former-s1-12345678"], running)
    trial.run(trial.plan.cells[0])
    assert trial.coordinator.states == {
        promptfl: running,  # of a cell that was interrupted, and is not asked for now
        f"{zeroshot}-2": State.STATE_CANCELLED,
        "iid-former-s1-12345678": State.STATE_CANCELLED,
        f"{zeroshot}-3": State.STATE_SUCCEEDED,
    }


def test_an_experiment_that_is_under_way_keeps_the_time_limit_that_it_began_with(
    tmp_path: Path, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trial.run(trial.plan.cells[1])
    longer = Trial(tmp_path, monkeypatch, lab_samples.LAB.replace("count: 4", "count: 4, time_limit: 2h"))
    longer.coordinator.states, longer.coordinator.specs = trial.coordinator.states, trial.coordinator.specs
    assert longer.plan.cells[1].rounds.time_limit == 7200
    assert longer.run(longer.plan.cells[1]) == first
    assert list(longer.coordinator.states) == [trial.plan.cells[1].cell_id]


@pytest.mark.parametrize(("status", "starts"), [(78, 1), (77, 1), (1, 2), (-9, 2)])
@pytest.mark.parametrize("is_ready", [False, True])
def test_daemons_that_complain_of_their_configuration_are_not_started_again(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, status: int, starts: int, is_ready: bool
) -> None:
    one = Federation(trial.lab, trial.plan, trial.given())
    begun = []

    async def dies(waiting: list[Cell], _: Progress) -> None:
        begun.append(waiting[0].label)
        one._was_ready = is_ready
        raise DaemonEnded(f"host ended with exit code {status}", status)

    monkeypatch.setattr(one, "_serve", dies)
    asyncio.run(one.run(trial.progress))
    reasons = {cell.cell_id: f"host ended with exit code {status}" for cell in trial.plan.cells}
    assert trial.progress.failed == reasons
    again = ["promptfl"] * starts if is_ready and starts > 1 else []  # one cell after the other
    assert begun == ["zeroshot"] * starts + again
