"""Results that await their verdict, one file each, durable before they are sent."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.numpy
from pydantic import TypeAdapter

from fedrt.errors import StorageError
from fedrt.payload import describe
from fedrt.statefile import ensure_private_directory, remove_durably, remove_unfinished, storage_error, write_atomic_by
from fedrt.task import Failure, Outcome, Result, Success, TaskKind
from fedrt.tensors import Tensors

_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_SHARED, _PRIVATE = "shared/", "private/"


@dataclass(frozen=True)
class Spooled:
    """A finished task: its outcome, the shared tensors to send, and the private ones that acceptance will promote."""

    task_id: str
    experiment_id: str
    round_number: int
    kind: TaskKind
    outcome: Outcome
    shared: Tensors
    private: Tensors

    @cached_property
    def to_send(self) -> tuple[Result, memoryview | None]:
        """The result as it goes on the wire, and the bytes that follow it. Private tensors are not part of it."""
        if not self.shared:
            return Result(self.task_id, self.outcome, None), None
        manifest, data = describe(self.task_id, self.shared)
        return Result(self.task_id, self.outcome, manifest), data


class Spool:
    """A private directory of result files. All methods block; large tensors make them slow."""

    def __init__(self, directory: Path) -> None:
        ensure_private_directory(directory)
        remove_unfinished(directory)
        self._directory = directory

    def put(self, result: Spooled) -> None:
        """Store a result durably, replacing an earlier one of the task. Raises `StorageError`."""
        kind = type(result.outcome).__name__
        about = {
            "task_id": result.task_id,
            "experiment_id": result.experiment_id,
            "round_number": result.round_number,
            "kind": result.kind.value,
            "outcome_kind": kind,
            "outcome": _OUTCOME.dump_python(result.outcome, mode="json"),
        }
        tensors = {
            **{_SHARED + name: array for name, array in result.shared.items()},
            **{_PRIVATE + name: array for name, array in result.private.items()},
        }
        metadata = {"result": json.dumps(about)}
        path = self._path(result.task_id)
        try:
            write_atomic_by(path, lambda empty: safetensors.numpy.save_file(tensors, empty, metadata))
        except safetensors.SafetensorError as error:
            raise StorageError(f"cannot write '{path}' ({error}); check free space and the disk") from error
        _ = result.to_send  # digested here, where it may take its time

    def load(self) -> list[Spooled]:
        """Every stored result, oldest first. Raises `StorageError` naming a damaged file."""
        paths = sorted(self._directory.glob("*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [_read(path) for path in paths]

    def remove(self, task_id: str) -> None:
        """Forget a result durably; nothing happens if there is none. Raises `StorageError`."""
        remove_durably(self._path(task_id))

    def size(self) -> tuple[int, int]:
        """How many results lie here, and their bytes."""
        with os.scandir(self._directory) as entries:
            sizes = [entry.stat().st_size for entry in entries if entry.name.endswith(".safetensors")]
        return len(sizes), sum(sizes)

    def _path(self, task_id: str) -> Path:
        return self._directory / f"{sha256(task_id.encode()).hexdigest()[:40]}.safetensors"


def _read(path: Path) -> Spooled:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["result"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        return _parse(about, tensors)
    except OSError as error:
        raise storage_error("read", path, error) from error
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"spool file '{path}' is damaged; remove it, and its task is computed again") from error


def _parse(about: dict[str, Any], tensors: Tensors) -> Spooled:
    kinds: dict[str, type[Success] | type[Failure]] = {"Success": Success, "Failure": Failure}
    return Spooled(
        task_id=about["task_id"],
        experiment_id=about["experiment_id"],
        round_number=about["round_number"],
        kind=TaskKind(about["kind"]),
        outcome=TypeAdapter(kinds[about["outcome_kind"]]).validate_python(about["outcome"]),
        shared={name.removeprefix(_SHARED): a for name, a in tensors.items() if name.startswith(_SHARED)},
        private={name.removeprefix(_PRIVATE): a for name, a in tensors.items() if name.startswith(_PRIVATE)},
    )
