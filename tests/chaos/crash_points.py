"""The named points at which a daemon can be killed, and how they get into the product: its functions are wrapped.

The product knows nothing of this. A function that is gone or renamed ends the launcher with an error, and a test looks
at every entry of the table. Each name has a point before and one after the call; where `kinds` are listed, one pair for
each kind of argument.
"""

import enum
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from coordinator.records import Changes
from silo.spool import Spooled
from tests.chaos.hooks import Hooks


class Role(enum.Enum):
    """Whose process it is."""

    COORDINATOR = "coordinator"
    SILO = "silo"


class Occasion(enum.Enum):
    """What the runner has to see to so that a point is passed."""

    WORK = "work"  # experiments run
    LARGE = "large"  # one of them has tensors that are kept in files
    START = "start"  # the daemon starts
    DRAIN = "drain"  # the daemon is asked to stop
    PEER_DRAIN = "peer drain"  # the other side is asked to stop
    CUT = "cut"  # a connection breaks
    CREATE = "create"  # an experiment is created
    CANCEL = "cancel"  # an experiment is cancelled


@dataclass(frozen=True)
class Wrapped:
    """One function of the product with points around its calls. `place` is `module:attribute`."""

    name: str
    place: str
    occasion: Occasion = Occasion.WORK
    kinds: tuple[tuple[str, Occasion], ...] = ()  # of the first argument after self
    only: Callable[..., bool] = lambda *arguments: True  # the calls that count


@dataclass(frozen=True)
class CrashPoint:
    """One instant at which a process can be killed."""

    role: Role
    name: str
    occasion: Occasion


def _with_results(store: object, changes: Changes) -> bool:
    return any(task.verdict is not None for task in changes.tasks.values())


def _with_private(spool: object, result: Spooled) -> bool:
    return bool(result.private)  # of others it does not matter whether they are computed twice


_STATEFILE = (
    ("create", "fedrt.statefile:_create"),
    ("write", "fedrt.statefile:_fill"),
    ("fsync", "fedrt.statefile:_sync"),
    ("rename", "pathlib:Path.replace"),
)
COORDINATOR = (
    Wrapped("commit of results", "coordinator.store:Store.commit", only=_with_results),
    Wrapped("put large", "coordinator.blobs:Blobs.put_large"),
    Wrapped("rows", "coordinator.blobs:Blobs.put"),
    Wrapped("blob move", "coordinator.blobs:move_durably", Occasion.LARGE),
    Wrapped("blob write", "coordinator.blobs:write_atomic", Occasion.LARGE),
    Wrapped("intake", "coordinator.intake:Intake.finish"),
    Wrapped("gather", "coordinator.actions:gather"),
    Wrapped("aggregation", "coordinator.actions:combine"),
    Wrapped("effects", "coordinator.orchestrator:Orchestrator._perform"),
    Wrapped("recovery", "coordinator.orchestrator:Orchestrator.recover", Occasion.START),
    Wrapped("drain", "coordinator.session_service:SessionService.drain", Occasion.DRAIN),
    Wrapped(
        "message",
        "coordinator.orchestrator:Orchestrator._apply",
        kinds=(
            ("SessionOpened", Occasion.CUT),
            ("SessionClosed", Occasion.CUT),
            ("SiloDrained", Occasion.PEER_DRAIN),
            ("ResultArrived", Occasion.WORK),
            ("RoundAggregated", Occasion.WORK),
            ("CreateOrdered", Occasion.CREATE),
            ("CancelOrdered", Occasion.CANCEL),
        ),
    ),
    *(Wrapped(f"statefile {step}", place, Occasion.LARGE) for step, place in _STATEFILE),
)
SILO = (
    Wrapped("spool put", "silo.spool:Spool.put", only=_with_private),
    Wrapped("spool remove", "silo.spool:Spool.remove"),
    Wrapped("spool load", "silo.spool:Spool.load", Occasion.START),
    Wrapped("vault load", "silo.vault:Vault.load"),
    Wrapped("promote", "silo.vault:Vault.promote"),
    Wrapped("work", "silo.worker:ProcessWorker.run"),
    Wrapped("recovery", "silo.agent:Agent.recover", Occasion.START),
    Wrapped("drain", "silo.app:Silo._drain", Occasion.DRAIN),
    Wrapped(
        "message",
        "silo.agent:Agent._apply",
        kinds=(
            ("OfferArrived", Occasion.WORK),
            ("TensorsArrived", Occasion.WORK),
            ("SessionUp", Occasion.CUT),
            ("SessionDown", Occasion.CUT),
            ("WorkEnded", Occasion.WORK),
            ("CancelArrived", Occasion.CANCEL),
            ("VerdictArrived", Occasion.WORK),
            ("DrainOrdered", Occasion.DRAIN),
        ),
    ),
    *(Wrapped(f"statefile {step}", place) for step, place in _STATEFILE),
)
TABLE = {Role.COORDINATOR: COORDINATOR, Role.SILO: SILO}

FROM_SILO = {
    "Hello": Occasion.CUT,
    "Heartbeat": Occasion.WORK,
    "TaskReply": Occasion.WORK,
    "TaskProgress": Occasion.WORK,
    "TaskResult": Occasion.WORK,
    "PayloadChunk": Occasion.WORK,
    "Drain": Occasion.DRAIN,
}
FROM_COORDINATOR = {
    "Welcome": Occasion.CUT,
    "Heartbeat": Occasion.WORK,
    "TaskOffer": Occasion.WORK,
    "TaskCancel": Occasion.CANCEL,
    "PayloadChunk": Occasion.WORK,
    "ResultAck": Occasion.WORK,
    "Drain": Occasion.DRAIN,
}
WRITE_MIDDLE = "statefile write middle"
COMMIT = "commit"


def points(role: Role) -> tuple[CrashPoint, ...]:
    """Every point of a role's process."""
    return tuple(CrashPoint(role, name, occasion) for name, occasion in _named(role))


def _named(role: Role) -> Iterator[tuple[str, Occasion]]:
    for wrapped in TABLE[role]:
        for kind, occasion in wrapped.kinds or (("", wrapped.occasion),):
            for side in ("before", "after"):
                yield _joined(wrapped.name, kind, side), occasion
        if wrapped.name == "statefile fsync":
            yield "statefile fsync directory before", wrapped.occasion
            yield "statefile fsync directory after", wrapped.occasion
    yield WRITE_MIDDLE, Occasion.LARGE if role is Role.COORDINATOR else Occasion.WORK
    if role is Role.COORDINATOR:
        yield f"{COMMIT} before", Occasion.WORK
        yield f"{COMMIT} after", Occasion.WORK
    spoken, heard = (FROM_SILO, FROM_COORDINATOR) if role is Role.SILO else (FROM_COORDINATOR, FROM_SILO)
    for kind, occasion in spoken.items():
        yield f"send {kind} before", occasion
        yield f"send {kind} after", occasion
    for kind, occasion in heard.items():
        heard_occasion = Occasion.PEER_DRAIN if occasion is Occasion.DRAIN else occasion
        yield f"receive {kind} before", heard_occasion
        yield f"receive {kind} after", heard_occasion


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def find(place: str) -> tuple[Any, str, Callable[..., Any]]:
    """Where a function of the product hangs, its name there, and itself. Raises `LookupError` if it is gone."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    try:
        for step in owners:
            owner = getattr(owner, step)
        return owner, name, getattr(owner, name)
    except AttributeError as error:
        raise LookupError(f"the product has no '{place}' any more; correct the table of crash points") from error


def install(role: Role, hooks: Hooks) -> None:
    """Put every point of the role into this process. Raises `LookupError` if the product has changed."""
    for wrapped in TABLE[role]:
        owner, name, function = find(wrapped.place)
        setattr(owner, name, _around(function, wrapped, hooks))
    _wrap_transport(hooks)


def _around(function: Callable[..., Any], wrapped: Wrapped, hooks: Hooks) -> Callable[..., Any]:
    def label(arguments: tuple[Any, ...]) -> str:
        if not wrapped.only(*arguments):
            return "nothing"
        if wrapped.kinds:
            return f"{wrapped.name} {type(arguments[1]).__name__}"
        if wrapped.name == "statefile fsync" and arguments[0].is_dir():
            return f"{wrapped.name} directory"
        return wrapped.name

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        name = label(arguments)
        hooks.passage(f"{name} before")
        if wrapped.name == "statefile write" and hooks.is_armed(WRITE_MIDDLE):
            path, content = arguments
            function(path, memoryview(content)[: len(content) // 2])
            hooks.passage(WRITE_MIDDLE)
        done = function(*arguments, **named)
        hooks.passage(f"{name} after")
        return done

    @functools.wraps(function)
    async def call_async(*arguments: Any, **named: Any) -> Any:
        name = label(arguments)
        hooks.passage(f"{name} before")
        done = await function(*arguments, **named)
        hooks.passage(f"{name} after")
        return done

    return call_async if inspect.iscoroutinefunction(function) else call


TRANSPORT = (
    "fedrt.transport:Transport.__init__",
    "fedrt.transport:Transport.run",
    "fedrt.transport:Transport._add_chunk",
)


def _wrap_transport(hooks: Hooks) -> None:
    """Points around each frame: before it is written and after, when it was decoded and once it has been seen to."""
    transport, _, start = find(TRANSPORT[0])
    run, add_chunk = find(TRANSPORT[1])[2], find(TRANSPORT[2])[2]

    @functools.wraps(start)
    def start_with_points(self: Any, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        encode, decode, on_sent = self._encode, self._decode, self._on_sent

        def encode_at_point(frame: Any) -> Any:
            hooks.passage(f"send {type(frame).__name__} before")
            return encode(frame)

        def decode_at_point(message: Any) -> Any:
            frame = decode(message)
            hooks.passage(f"receive {type(frame).__name__} before")
            return frame

        def sent_at_point(frame: Any) -> None:
            hooks.passage(f"send {type(frame).__name__} after")
            on_sent(frame)

        self._encode, self._decode, self._on_sent = encode_at_point, decode_at_point, sent_at_point

    @functools.wraps(run)
    async def run_with_points(self: Any, on_frame: Callable[[Any], None]) -> None:
        def heard(frame: Any) -> None:
            on_frame(frame)
            hooks.passage(f"receive {type(frame).__name__} after")

        await run(self, heard)

    @functools.wraps(add_chunk)
    def chunk_with_point(self: Any, *arguments: Any) -> None:
        add_chunk(self, *arguments)
        hooks.passage("receive PayloadChunk after")

    transport.__init__, transport.run, transport._add_chunk = start_with_points, run_with_points, chunk_with_point
