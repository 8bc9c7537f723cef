"""Which experiment of its coordinator is a cell's: the attempts at it, and the code that each was begun with.

A file per cell beside the coordinator's state names the experiment. Without it, or with other code of the method, a new
attempt is begun under a new name: an experiment never changes, and no name is used twice.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pydantic import ConfigDict, ValidationError

from fedrt.config import Section
from fedrt.statefile import ensure_private_directory, storage_error, write_atomic
from silo.lab.grid import Cell

OF_NO_USE = frozenset({"failed", "cancelled"})


class Attempt(Section):
    """The experiment that is a cell's now, and the digest of its method's code when it was begun."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    experiment: str
    method_digest: str


def attempt_at(cell: Cell, standing: Mapping[str, str], last: Attempt | None, method_digest: str) -> Attempt:
    """The experiment to follow, by the coordinator's experiments and their states: the last one, or else a new one.

    One that has failed or was cancelled is not taken up again, nor is one that other code of the method ran in.
    """
    if last is not None and last.method_digest == method_digest:
        state = standing.get(last.experiment)
        if state is not None and state not in OF_NO_USE:
            return last
    numbers = [number for number in (_number(name, cell.cell_id) for name in standing) if number]
    number = max(numbers, default=0) + 1
    return Attempt(experiment=cell.cell_id if number == 1 else f"{cell.cell_id}-{number}", method_digest=method_digest)


def is_of(experiment_id: str, cell_ids: Iterable[str]) -> bool:
    """Whether an experiment is an attempt at one of these cells."""
    return any(_number(experiment_id, cell_id) for cell_id in cell_ids)


def read_attempt(root: Path, cell_id: str) -> Attempt | None:
    """What `root`, the directory of a federation, says of the cell; None also for a file that cannot be understood."""
    path = _path(root, cell_id)
    try:
        return Attempt.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    except OSError as error:
        raise storage_error("read", path, error) from error


def write_attempt(root: Path, cell_id: str, attempt: Attempt) -> None:
    """Write it, durably, before the experiment is created. Raises `StorageError`."""
    path = _path(root, cell_id)
    ensure_private_directory(path.parent)
    write_atomic(path, attempt.model_dump_json().encode() + b"\n", 0o644)


def forget_attempts(roots: Collection[Path], cell_id: str) -> None:
    """Have a new attempt begun at the cell the next time. Raises `StorageError`."""
    for root in roots:
        path = _path(root, cell_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", path, error) from error


def _path(root: Path, cell_id: str) -> Path:
    return root / "attempts" / f"{cell_id}.json"


def _number(experiment_id: str, cell_id: str) -> int:
    """Which attempt at the cell an experiment is, from 1; 0 for an experiment of another cell."""
    if experiment_id == cell_id:
        return 1
    start, _, number = experiment_id.rpartition("-")
    return int(number) if start == cell_id and number.isdecimal() else 0
