"""What a silo of another version may lack: the names that Hello and Welcome carry, and the tasks that need them.

A capability is for what an older silo would do wrongly without a word; what it refuses or passes over needs none. A
silo that names none at all speaks protocol 1.0, which sent no names, and has those of `PROTOCOL_1_0`.
"""

import enum
from collections.abc import Collection

from fedrt.task import Task, TaskKind


class Capability(enum.Enum):
    """What this version names; the values travel. Names that are not here belong to later versions."""

    VIEWS = "views"  # trains on as many views as TrainingSpec.view_count says; without it, on the images alone


OURS = tuple(capability.value for capability in Capability)
PROTOCOL_1_0 = frozenset({Capability.VIEWS})


def named_by_both(theirs: Collection[str]) -> tuple[str, ...]:
    """What Welcome answers to the names in Hello."""
    return tuple(name for name in OURS if name in theirs)


def understood(theirs: Collection[str]) -> frozenset[Capability]:
    """The capabilities of a silo whose Hello holds these names."""
    return frozenset(map(Capability, named_by_both(theirs))) if theirs else PROTOCOL_1_0


def needed(task: Task) -> frozenset[Capability]:
    """What a silo must understand to do this task as it is meant."""
    has_views = task.kind is TaskKind.TRAIN and task.local.training.views > 0
    return frozenset({Capability.VIEWS}) if has_views else frozenset()
