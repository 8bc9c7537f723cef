"""State directories of coordinators of older versions, kept as SQL text: written by `dump`, brought back by `restore`.

The times in it move along, so that the deadline of a round under way is as far ahead as it was when it was recorded.
"""

import re
import sqlite3
from dataclasses import replace
from pathlib import Path

from fedrt.spec import ExperimentSpec
from tests.fakes import recording
from tests.fakes.federation import make_spec

SILOS = ("north", "south")
ROUNDS = 4
HELD = "upgraded/2/train/south"  # the task that was under way
_TIME = re.compile(r"\b1[789]\d{8}\.\d+")  # Unix seconds of this and the next decades


def small_spec(rounds: int, silos: tuple[str, ...], every: int, **rules: object) -> ExperimentSpec:
    """An experiment with tensors of 512 bytes."""
    spec = make_spec(rounds, silos, every, "promptfl", recording.HYPERPARAMETERS, recording.CONTEXT_DIM, **rules)
    model = replace(spec.local.model, feature_dim=recording.FEATURE_DIM)
    return replace(spec, local=replace(spec.local, model=model))


def dump(database: Path, header: str, now: float) -> str:
    """What the database holds at this moment, also while a coordinator has it open."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        lines = [*(f"-- {line}" for line in header.splitlines()), f"-- recorded at {now}", *connection.iterdump()]
    connection.close()
    return "\n".join([*lines, f"PRAGMA user_version = {version};", ""])


def restore(path: Path, directory: Path, now: float) -> None:
    """A state directory with the database of the dump."""
    text = path.read_text()
    recorded = re.search(r"^-- recorded at (\S+)$", text, re.MULTILINE)
    assert recorded is not None
    shift = now - float(recorded[1])
    directory.mkdir(mode=0o700, parents=True)
    database = directory / "coordinator.db"
    database.touch(mode=0o600)
    connection = sqlite3.connect(database)
    connection.executescript(_TIME.sub(lambda found: repr(float(found[0]) + shift), text))
    connection.close()
