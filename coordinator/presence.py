"""Who is connected: the open session of each silo, as the orchestrator sees it."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.records import SiloRecord
from coordinator.selection import Population
from fedrt.payload import Manifest
from fedrt.session.frames import Hello
from fedrt.task import Task, Verdict


class Session(Protocol):
    """What the orchestrator may do with a silo's open session. None of these waits; all are lost with the session."""

    silo_id: str

    def offer(self, task: Task, manifest: Manifest | None, data: memoryview | None) -> None:
        """Offer a task; the tensors follow once it is accepted."""

    def settle(self, task_id: str, verdict: Verdict, message: str) -> None:
        """Answer a result, if this session awaits that."""

    def cancel(self, task_id: str, message: str) -> None:
        """Tell the silo to abandon a task."""

    def replace(self) -> None:
        """End the session because a newer one of the same silo has come."""


@dataclass
class _Connected:
    session: Session
    draining: bool = False


@dataclass
class Presence:
    """Belongs to the orchestrator."""

    silos: dict[str, SiloRecord] = field(default_factory=dict)  # every silo ever met
    _connected: dict[str, _Connected] = field(default_factory=dict)

    def connect(self, session: Session, hello: Hello, now: float) -> tuple[SiloRecord, Session | None]:
        """Note a new session; returns the silo's record and the session it replaces."""
        older = self._connected.get(session.silo_id)
        self._connected[session.silo_id] = _Connected(session)
        record = SiloRecord(session.silo_id, hello.software_version, hello.device, hello.methods, now, connected=True)
        self.silos[session.silo_id] = record
        return record, older.session if older and older.session is not session else None

    def disconnect(self, session: Session, now: float) -> SiloRecord | None:
        """Note the end of a session; None if a newer one has taken its place."""
        current = self._connected.get(session.silo_id)
        if current is None or current.session is not session:
            return None
        del self._connected[session.silo_id]
        return self._update(session.silo_id, now, connected=False, draining=False)

    def drain(self, session: Session, now: float) -> SiloRecord | None:
        """Note that a silo is stopping: it gets no new rounds; None if the session is not its current one."""
        current = self._connected.get(session.silo_id)
        if current is None or current.session is not session:
            return None
        current.draining = True
        return self._update(session.silo_id, now, connected=True, draining=True)

    def session(self, silo_id: str) -> Session | None:
        """The open session of a silo."""
        connected = self._connected.get(silo_id)
        return connected.session if connected else None

    def is_draining(self, silo_id: str) -> bool:
        """Whether the silo said that it is stopping."""
        connected = self._connected.get(silo_id)
        return connected is not None and connected.draining

    @property
    def population(self) -> Population:
        """Who is known and who may be asked."""
        available: Set[str] = {name for name, connected in self._connected.items() if not connected.draining}
        return Population(frozenset(self.silos), frozenset(available))

    def copy(self) -> "Presence":
        """An independent copy, to return to if a batch cannot be made durable."""
        connected = {name: _Connected(entry.session, entry.draining) for name, entry in self._connected.items()}
        return Presence(dict(self.silos), connected)

    def _update(self, silo_id: str, now: float, connected: bool, draining: bool) -> SiloRecord:
        old = self.silos[silo_id]
        record = SiloRecord(silo_id, old.software_version, old.device, old.methods, now, connected, draining)
        self.silos[silo_id] = record
        return record
