"""Records as JSON documents: how the database keeps them, and how they are read back."""

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter

from coordinator.experiments import Experiment
from coordinator.records import Checkpoint, Event, SiloRecord, TaskRecord
from fedrt.errors import DamageError, PayloadError, SpecError

_DAMAGED = "a record in the store is damaged; restore the state directory from a backup"

_T = TypeVar("_T")

EXPERIMENT: TypeAdapter[Experiment] = TypeAdapter(Experiment)
TASK: TypeAdapter[TaskRecord] = TypeAdapter(TaskRecord)
CHECKPOINT: TypeAdapter[Checkpoint] = TypeAdapter(Checkpoint)
SILO: TypeAdapter[SiloRecord] = TypeAdapter(SiloRecord)
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)
_EVENT_KINDS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in Event.__args__}


def dump(adapter: TypeAdapter[Any], value: object) -> str:
    """The document of a record."""
    return adapter.dump_json(value).decode()


def load(adapter: TypeAdapter[_T], document: str) -> _T:
    """The record of a document. Raises `DamageError`."""
    try:
        return adapter.validate_json(document)
    except (ValueError, SpecError, PayloadError) as error:
        raise DamageError(_DAMAGED) from error


def dump_event(event: Event) -> str:
    """The document of an event, with its kind."""
    return json.dumps({"kind": type(event).__name__, "event": _EVENT.dump_python(event, mode="json")})


def load_event(document: str) -> Event:
    """The event of a document. Raises `DamageError`."""
    try:
        parsed = json.loads(document)
        adapter: TypeAdapter[Event] = _EVENT_KINDS[parsed["kind"]]
        return adapter.validate_python(parsed["event"])
    except (ValueError, KeyError, TypeError, PayloadError) as error:
        raise DamageError(_DAMAGED) from error
