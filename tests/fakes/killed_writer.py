"""Spools, promotes and forgets results, and is killed at every call that touches the disk: python -m ... DIRECTORY.

One process for each call: number n is killed just before the n-th call, or half-way through it if that is a write. Each
works in a directory of its own; the last line of stdout is a JSON list of what each had been told is done.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedrt.task import Success, TaskKind
from silo.spool import Spool, Spooled
from silo.vault import Vault

CALLS = ("open", "write", "fsync", "close", "fchmod", "replace", "rename", "unlink", "remove", "mkdir", "rmdir")
# a round and the value of its tensors: the vault keeps two, so the third prunes; then the coordinator is set back
ROUNDS = ((1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0), (3, 31.0), (4, 41.0))


def spooled(index: int) -> Spooled:
    number, value = ROUNDS[index]
    shared, private = {"context": np.full(50, value, np.float32)}, {"own": np.full(50, -value, np.float32)}
    return Spooled(f"task-{index}", "e", number, TaskKind.TRAIN, Success(5, {}, 0.0), shared, private)


def open_stores(directory: Path) -> tuple[Spool, Vault]:
    return Spool(directory / "spool"), Vault(directory / "vault", kept_rounds=2)


def settle(spool: Spool, vault: Vault, result: Spooled) -> None:
    """What the daemon does with an accepted result."""
    vault.promote(result.experiment_id, result.round_number, result.private)
    spool.remove(result.task_id)


def live(directory: Path, tell: Callable[[str], None], until: int = len(ROUNDS)) -> None:
    """The life of a silo, round after round."""
    spool, vault = open_stores(directory)
    for index in range(until):
        result = spooled(index)
        spool.put(result)
        tell(f"put {index}")
        settle(spool, vault, result)
        tell(f"settled {index}")


def arm(number: int, torn: bool) -> Callable[[], int]:
    """Kill this process at its call number `number`; returns a count of the calls so far."""
    made = 0

    def wrap(name: str) -> None:
        call = getattr(os, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            if made == number:
                if torn and name == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        setattr(os, name, counted)

    for name in CALLS:
        wrap(name)
    return lambda: made


def run_until_killed(directory: Path, number: int, torn: bool) -> tuple[list[str], bool]:
    """What the process was told is done, and whether it was killed."""
    reader, writer = os.pipe()
    write = os.write
    child = os.fork()
    if child == 0:
        arm(number, torn)
        live(directory, lambda word: write(writer, f"{word}\n".encode()) and None)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        words = told.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return words, os.WIFSIGNALED(status)


def main() -> None:
    """Kill at every call, until a process lives to the end."""
    place, runs = Path(sys.argv[1]), []
    for torn in (False, True):
        number, killed = 1, True
        while killed:
            directory = place / f"{'torn' if torn else 'before'}-{number}"
            directory.mkdir(mode=0o700)
            words, killed = run_until_killed(directory, number, torn)
            runs.append({"directory": directory.name, "told": words, "killed": killed})
            number += 1
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
