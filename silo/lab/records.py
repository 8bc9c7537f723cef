"""Finished cells on disk: one JSON file each, written whole or not at all, from which tables and figures are made."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError

from fedrt.config import Section
from fedrt.ctl_json import round_json
from fedrt.ctl_progress import WatchState
from fedrt.errors import DamageError
from fedrt.statefile import storage_error, write_atomic
from fedrt.task import TaskKind
from silo.data.records import Split
from silo.lab.grid import Cell

FORMAT = "fedrt-lab-cell-1"
_TEST = Split.TEST.value


class _Part(Section):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SiloPart(_Part):
    """What one silo contributed to one round."""

    examples: int
    metrics: Mapping[str, float]
    work_seconds: float
    payload_bytes: int


class RoundPart(_Part):
    """One round that has closed, as `fedrtctl show --json` prints it."""

    round: int
    task: str
    succeeded: bool
    duration_seconds: float
    silos: Mapping[str, SiloPart]
    absent: Mapping[str, str]


class CellRecord(_Part):
    """A finished cell: what it was, on what, and every round's metrics of every silo.

    `experiment` is the experiment.yaml in full. `holdings` says how many images of each split each silo holds.
    """

    format: str = Field(pattern=f"^{FORMAT}$")
    setting: str
    method: str
    seed: int
    digest: str
    weights_sha256: str
    partition_digest: str
    holdings: Mapping[str, Mapping[str, int]]
    experiment: Mapping[str, object]
    method_digest: str = ""  # of the method's code; records of fedrt-lab's first version do not tell
    wall_seconds: float
    software: str
    rounds: tuple[RoundPart, ...]

    def of_task(self, task: str) -> tuple[RoundPart, ...]:
        """The rounds of this task that succeeded, oldest first."""
        return tuple(part for part in self.rounds if part.task == task and part.succeeded)

    def unmeasured(self) -> dict[str, str]:
        """The silos without a result in the last evaluation, and why; one that holds no test images has none to give.

        All of them if nothing was evaluated, or not after the last round of training.
        """
        measured = [part for part in self.rounds if part.task == TaskKind.EVALUATE.value]
        last = measured[-1] if measured else None
        wanted = [silo for silo, held in self.holdings.items() if held.get(_TEST) != 0]
        if last is None or not last.succeeded or last.round < max(part.round for part in self.rounds):
            return dict.fromkeys(wanted, "it was not evaluated after the last round")
        return {silo: last.absent.get(silo, "it was not asked") for silo in wanted if silo not in last.silos}


def rounds_of(state: WatchState) -> tuple[RoundPart, ...]:
    """The rounds of an experiment that was followed to its end."""
    return tuple(RoundPart.model_validate(round_json(closed)) for closed in state.rounds)


def cell_path(directory: Path, cell: Cell) -> Path:
    """Where the cell's file lies below the lab's directory."""
    return directory / "cells" / f"{cell.cell_id}.json"


def _paths(directory: Path, cell: Cell) -> tuple[Path, Path]:
    return cell_path(directory, cell), directory / "cells" / f"{cell.former_id}.json"


def write_cell(directory: Path, cell: Cell, record: CellRecord) -> None:
    """Write the file, durably. Raises `StorageError`."""
    path = cell_path(directory, cell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create directory", path.parent, error) from error
    text = json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False)
    write_atomic(path, text.encode() + b"\n", 0o644)


def read_cell(directory: Path, cell: Cell) -> CellRecord | None:
    """The finished cell, or None. Raises `DamageError` for a file that is not such a record."""
    found = [path for path in _paths(directory, cell) if path.exists()]
    if not found:
        return None
    path = found[0]
    try:
        record = CellRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise storage_error("read", path, error) from error
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamageError(
            f"'{path}' is damaged at {place!r}; run the cell anew with --again {cell.setting}/{cell.label}, or remove "
            "the file, and the next run writes it again"
        ) from None
    return record if record.digest in (cell.digest, cell.former_digest) else None


def remove_cell(directory: Path, cell: Cell) -> None:
    """Remove the cell's file, if there is one. Raises `StorageError`."""
    for path in _paths(directory, cell):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", path, error) from error


def read_cells(directory: Path, cells: Iterable[Cell]) -> dict[str, CellRecord]:
    """The finished ones of these cells, by cell id."""
    found = {cell.cell_id: read_cell(directory, cell) for cell in cells}
    return {cell_id: record for cell_id, record in found.items() if record is not None}


def disagreements(records: Sequence[CellRecord]) -> list[str]:
    """What makes finished cells hard to compare: different weights, images or versions of fedrt, in sentences."""
    found = []
    if len({record.weights_sha256 for record in records}) > 1:
        found.append("The cells were run with different weights; `fedrt-lab run` runs again what is not current.")
    versions = sorted({record.software for record in records})
    if len(versions) > 1:
        found.append(f"The cells were run by different versions of fedrt: {', '.join(versions)}.")
    parts: dict[tuple[str, int], set[str]] = {}
    for record in records:
        parts.setdefault((record.setting, record.seed), set()).add(record.partition_digest)
    mixed = sorted(f"{setting} (seed {seed})" for (setting, seed), digests in parts.items() if len(digests) > 1)
    if mixed:
        found.append(f"The methods of {', '.join(mixed)} were run on different images; `fedrt-lab run` mends it.")
    return found
