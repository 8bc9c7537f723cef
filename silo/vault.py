"""Private tensors by round, so that they are a function of accepted rounds, also for a coordinator that was set back.

Nothing here can reach the wire: no module that sends imports this one.

    <directory>/<experiment>/round-0000000012.safetensors      what the acceptance of round 12 made current

A promotion first makes the new file durable and then removes what it puts out of date. Whoever is killed in between
promotes again, because the result stays in the spool until the promotion returns; doing it again ends the same way.
"""

import re
from hashlib import sha256
from pathlib import Path

from fedrt.errors import DamageError, StorageError
from fedrt.statefile import ensure_private_directory, remove_durably, remove_unfinished, storage_error
from fedrt.tensors import Tensors
from silo.tensor_files import read_tensors, write_tensors

KEPT_ROUNDS = 16  # how far a coordinator can be set back by a backup: nightly ones of rounds that take hours
_FILE = re.compile(r"round-([0-9]+)\.safetensors")


class Vault:
    """A private directory with one for each experiment in it, which holds a file for each of its latest rounds."""

    def __init__(self, directory: Path) -> None:
        ensure_private_directory(directory)
        self._directory = directory
        for name in _names(directory):
            remove_unfinished(directory / name)

    def load(self, experiment_id: str, before_round: int) -> Tensors:
        """The private tensors of the latest accepted round before this one, empty if there is none.

        Raises `DamageError` if the file is damaged or no longer kept, and `StorageError` if the disk refuses to read.
        """
        self._check_place()
        directory = self._directory_of(experiment_id)
        rounds = _rounds(directory)
        earlier = [number for number in rounds if number < before_round]
        if earlier:
            return _read(directory, max(earlier))[0]
        if rounds and not _read(directory, min(rounds))[1]:
            raise DamageError(
                f"private tensors of '{experiment_id}' before round {before_round} are no longer kept in '{directory}'"
                f" (the oldest are of round {min(rounds)}); restore the directory from a backup, or create the"
                " experiment anew"
            )
        return {}

    def promote(self, experiment_id: str, round_number: int, tensors: Tensors) -> None:
        """Make these the private tensors of an accepted round, durably. Doing it again changes nothing.

        Later rounds are removed, even if the tensors are the same: a coordinator that was set back decides them anew,
        and what it does not accept again must not count. Raises `StorageError`.
        """
        if not tensors:
            return
        self._check_place()
        directory = self._directory_of(experiment_id)
        ensure_private_directory(directory)
        rounds = _rounds(directory)
        about = {"round_number": round_number, "is_first": _is_first(directory, rounds, round_number)}
        write_tensors(directory / _name(round_number), tensors, about)
        for later in [number for number in rounds if number > round_number]:
            remove_durably(directory / _name(later))
        kept = sorted({round_number, *(number for number in rounds if number < round_number)})
        for old in kept[:-KEPT_ROUNDS]:
            remove_durably(directory / _name(old))

    def _check_place(self) -> None:
        """A mount that is gone must not be taken for a vault without private tensors, nor be written over."""
        if not self._directory.is_dir():
            raise StorageError(f"the vault '{self._directory}' is gone; mount it again or restore it from a backup")

    def _directory_of(self, experiment_id: str) -> Path:
        return self._directory / f"{experiment_id[:63]}-{sha256(experiment_id.encode()).hexdigest()[:16]}"


def _is_first(directory: Path, rounds: list[int], round_number: int) -> bool:
    """Whether no round was accepted before this one. False when in doubt: an error is better than a fresh start."""
    if not rounds:
        return True
    if min(rounds) < round_number:
        return False
    try:
        return _read(directory, min(rounds))[1]
    except DamageError:
        return False


def _read(directory: Path, round_number: int) -> tuple[Tensors, bool]:
    """The tensors, and whether there was no accepted round before."""
    path = directory / _name(round_number)
    try:
        tensors, about = read_tensors(path)
        if about["round_number"] != round_number:
            raise DamageError(f"'{path}' is of round {about['round_number']}")
        return tensors, bool(about["is_first"])
    except (DamageError, KeyError) as error:
        raise DamageError(f"private tensors: {error}; restore the file from a backup") from error


def _name(round_number: int) -> str:
    return f"round-{round_number:010d}.safetensors"


def _rounds(directory: Path) -> list[int]:
    return [int(found[1]) for found in map(_FILE.fullmatch, _names(directory)) if found is not None]


def _names(directory: Path) -> list[str]:
    """What lies there. Not by `glob`, which takes a directory that may not be read for an empty one."""
    try:
        return [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error("read", directory, error) from error
