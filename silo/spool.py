"""Results that await their verdict, one file each, durable before they are sent."""

import os
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter

from fedrt.errors import DamageError, StorageError
from fedrt.payload import describe
from fedrt.statefile import (
    ensure_private_directory,
    move_durably,
    remove_durably,
    remove_unfinished,
    storage_error,
)
from fedrt.task import Failure, Outcome, Result, Success, TaskKind
from fedrt.tensors import Tensors
from silo.tensor_files import read_tensors, write_tensors

_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Outcome)
_SHARED, _PRIVATE = "shared/", "private/"
DAMAGED = ".damaged"  # what the name of a file that was set aside ends with


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
        self._log = structlog.get_logger("silo.spool")

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
        write_tensors(self._path(result.task_id), tensors, about)
        _ = result.to_send  # digested here, where it may take its time

    def load(self) -> list[Spooled]:
        """Every stored result, oldest first. Raises `StorageError` if the directory or a file may not be read.

        A damaged file is set aside under another name and left out: its task is offered and computed again.
        """
        results = []
        for path, _ in sorted(self._files(), key=lambda file: (file[1].st_mtime_ns, file[0].name)):
            try:
                results.append(_read(path))
            except DamageError as error:
                self._set_aside(path, error)
        return results

    def remove(self, task_id: str) -> None:
        """Forget a result durably; nothing happens if there is none. Raises `StorageError`."""
        remove_durably(self._path(task_id))

    def size(self) -> tuple[int, int]:
        """How many results lie here, and their bytes. Raises `StorageError`."""
        sizes = [status.st_size for _, status in self._files()]
        return len(sizes), sum(sizes)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """Not by `glob`, which takes a directory that may not be read for an empty one."""
        try:
            return [(path, path.stat()) for path in self._directory.iterdir() if path.suffix == ".safetensors"]
        except OSError as error:
            raise storage_error("read", self._directory, error) from error

    def _set_aside(self, path: Path, error: DamageError) -> None:
        aside = path.with_name(path.name + DAMAGED)
        meaning = "its task is computed again, unless the coordinator had the result; then private tensors lack a round"
        try:
            move_durably(path, aside)
        except StorageError as refusal:
            self._log.error("damaged result left where it is", reason=str(error), meaning=meaning, refusal=str(refusal))
        else:
            self._log.error("damaged result set aside", reason=str(error), meaning=meaning, kept_as=str(aside))

    def _path(self, task_id: str) -> Path:
        return self._directory / f"{sha256(task_id.encode()).hexdigest()[:40]}.safetensors"


def _read(path: Path) -> Spooled:
    tensors, about = read_tensors(path)
    try:
        return _parse(about, tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise DamageError(f"'{path}' is damaged ({type(error).__name__})") from error


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
