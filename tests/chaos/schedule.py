"""Which faults strike whom, when and for how long: drawn from a seed, so that a run can be repeated in the main."""

import enum
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.chaos.crash_points import WRITE_MIDDLE, CrashPoint, Occasion, Role, points
from tests.chaos.layout import COORDINATOR, SILENCE_LIMIT, Layout

REFUSING = (
    "spool put before",
    "commit of results before",
)  # where a disk that refuses does most harm: silo, coordinator
LATE_DURATION = 8.0  # seconds: several attempts
LINGER = 0.3  # seconds: as long as a commit to a slow disk
MEAN_GAP = 0.5  # seconds between the beginnings of two faults


class Kind(enum.Enum):
    """What can happen."""

    KILL = "kill"
    KILL_AGAIN = "kill during recovery"
    KILL_ALL = "kill everything"
    KILL_WORKER = "kill worker"
    CRASH_WORKER = "crash worker"
    CRASH_POINT = "crash point"
    STOP = "stop and continue"
    STOP_WORKER = "stop and continue worker"
    DRAIN = "drain"
    CUT = "cut"
    REFUSE = "refuse"
    DELAY = "delay"
    THROTTLE = "throttle"
    BLACK_HOLE = "black hole"
    BLACK_HOLE_UP = "black hole towards the coordinator"
    BLACK_HOLE_DOWN = "black hole towards the silo"
    FORGOTTEN = "black hole that forgets"
    RESET = "reset in the middle of a message"
    PARTITION = "partition of all silos"
    LATE = "lost round with a result under way"
    DISK_NO_SPACE = "disk refuses (ENOSPC)"
    DISK_READ_ONLY = "disk refuses (EROFS)"
    DISK_FULL = "disk full"


ANY_DAEMON = {
    Kind.KILL, Kind.KILL_AGAIN, Kind.STOP, Kind.DRAIN, Kind.DISK_NO_SPACE, Kind.DISK_READ_ONLY, Kind.DISK_FULL
}  # fmt: skip
EVERYBODY = {Kind.KILL_ALL, Kind.PARTITION}
TELLING = (
    (Role.COORDINATOR, "commit of results before"),
    (Role.SILO, "message VerdictArrived before"),
    (Role.SILO, "spool put before"),
    (Role.COORDINATOR, "commit of results after"),
    (Role.SILO, "promote before"),
    (Role.SILO, "promote after"),
    (Role.COORDINATOR, "aggregation after"),
    (Role.SILO, WRITE_MIDDLE),
    (Role.COORDINATOR, "effects before"),
    (Role.SILO, "receive ResultAck before"),
    (Role.COORDINATOR, "commit before"),
    (Role.SILO, "spool put after"),
)  # what a run begins with: here the bits are lost first if they are
BETWEEN = (
    (Kind.DISK_NO_SPACE, COORDINATOR),
    (Kind.KILL_WORKER, ""),
    (Kind.LATE, ""),
    (Kind.KILL, COORDINATOR),
    (Kind.BLACK_HOLE, ""),
    (Kind.DISK_NO_SPACE, ""),
)  # after every second of them; at a silo where no daemon is named


@dataclass(frozen=True)
class Fault:
    """One fault. `duration` in seconds; `count`: at which passage of the point, and how long to `linger` there;
    `amount`: of delay or throttling.
    """

    kind: Kind
    target: str
    duration: float = 0.0
    point: CrashPoint | None = None
    count: int = 1
    linger: float = 0.0
    amount: float = 0.0

    def __str__(self) -> str:
        point = f" '{self.point.name}' #{self.count}" if self.point else ""
        lasting = f" for {self.duration:.1f} s" if self.duration else ""
        return f"{self.kind.value}{point} at {self.target}{lasting}"


class Deck:
    """Gives fault after fault: first what tells most, then every kind and every point in turn, shuffled, for ever."""

    def __init__(self, layout: Layout, chance: random.Random, has_disks: bool) -> None:
        self._layout = layout
        self._chance = chance
        self._kinds = [kind for kind in Kind if kind is not Kind.DISK_FULL or has_disks]
        self._kinds.remove(Kind.CRASH_POINT)
        self._waiting = deque(self._telling())

    def gap(self) -> float:
        """Seconds until the next fault."""
        return self._chance.expovariate(1 / MEAN_GAP)

    def draw(self) -> Fault:
        """The next fault."""
        if not self._waiting:
            self._waiting.extend(self._cycle())
        return self._waiting.popleft()

    def one_of_each(self) -> list[Fault]:
        """Every kind once, at the coordinator and at a silo where it can strike either, and a few points; shuffled."""
        faults = [self._of_kind(kind, self._silo()) for kind in self._kinds if kind not in EVERYBODY]
        faults += [self._of_kind(kind, COORDINATOR) for kind in self._kinds if kind in ANY_DAEMON]
        faults += [self._of_kind(kind) for kind in self._kinds if kind in EVERYBODY]
        self._chance.shuffle(faults)
        return faults

    def again(self, fault: Fault) -> None:
        """A point was not reached: try it once more later."""
        self._waiting.append(fault)

    def _telling(self) -> Iterator[Fault]:
        known = {(point.role, point.name): point for role in Role for point in points(role)}
        for index, place in enumerate(TELLING):
            yield replace(self._at_point(known[place]), linger=LINGER, count=self._chance.randint(1, 2))
            if index % 2:
                kind, target = BETWEEN[index // 2]
                yield replace(self._of_kind(kind, target or self._silo()), duration=2 * SILENCE_LIMIT)

    def _cycle(self) -> list[Fault]:
        here = [point for role in Role for point in points(role)]
        faults = [self._at_point(point) for point in here]
        kinds = self._kinds * (1 + len(here) // len(self._kinds))
        faults += [self._of_kind(kind) for kind in kinds[: len(here)]]
        self._chance.shuffle(faults)
        return faults

    def _at_point(self, point: CrashPoint) -> Fault:
        coordinator = point.role is Role.COORDINATOR
        target = COORDINATOR if coordinator else self._silo()
        count = self._chance.randint(1, 4) if point.occasion is Occasion.WORK else 1
        linger = self._chance.choice((0.0, LINGER))
        return Fault(Kind.CRASH_POINT, target, point=point, count=count, linger=linger)

    def _silo(self) -> str:
        return self._chance.choice(self._layout.numpy_silos)

    def _of_kind(self, kind: Kind, target: str = "") -> Fault:
        chance = self._chance
        if kind in EVERYBODY:
            target = "all"
        elif kind in ANY_DAEMON and not target and chance.random() < 0.4:
            target = COORDINATOR
        target = target or chance.choice(self._layout.silos)
        longest = {Kind.FORGOTTEN: 2.0, Kind.KILL_AGAIN: 1.5}.get(kind, 2.5 * SILENCE_LIMIT)
        amount = {Kind.DELAY: chance.uniform(0.02, 0.4), Kind.THROTTLE: 10 ** chance.uniform(3.7, 6)}.get(kind, 0.0)
        duration = LATE_DURATION if kind is Kind.LATE else chance.uniform(0.2, longest)
        point = None
        if kind in (Kind.DISK_NO_SPACE, Kind.DISK_READ_ONLY) and chance.random() < 0.7:
            point = next(one for role in Role for one in points(role) if one.name == REFUSING[target == COORDINATOR])
        return Fault(kind, target, duration=duration, point=point, amount=amount)
