"""Lets a fault happen to a federation, and takes it back. Faults of one thing wait for each other; others overlap."""

import asyncio
import contextlib
import os
import random
import secrets
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import rounds
from tests.chaos import namespace
from tests.chaos.crash_points import Occasion
from tests.chaos.layout import COORDINATOR, SILENCE_LIMIT, Layout
from tests.chaos.pool import Pool
from tests.chaos.processes import Daemon
from tests.chaos.proxy import FaultyProxy
from tests.chaos.schedule import Fault, Kind

POINT_LIMIT = 12.0  # seconds until a point that was not reached is given up, for now
OCCASION_INTERVAL = 4.0  # seconds after which its occasion is made again
LATENCY = 0.5 * SILENCE_LIMIT  # seconds
WORK_LIMIT = 5.0  # seconds until a worker is struck although it does not train
TAIL_BYTES = 4096
POLL = 0.02  # seconds
REFUSALS = {Kind.DISK_NO_SPACE: "ENOSPC", Kind.DISK_READ_ONLY: "EROFS"}


@dataclass
class Struck:
    """A fault that happened. Times are Unix seconds; `end` is when it was taken back."""

    fault: Fault
    begin: float
    end: float | None = None
    reached: bool = True  # a crash point: whether the process came by
    alone: bool = False  # nothing else happened until all experiments had moved again


@dataclass
class Faults:
    """What faults work on."""

    layout: Layout
    daemons: Mapping[str, Daemon]
    proxies: Mapping[str, FaultyProxy]
    pool: Pool
    chance: random.Random
    struck: list[Struck] = field(default_factory=list)
    _turns: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))

    async def strike(self, fault: Fault, alone: bool = False) -> Struck:
        """Let it happen and take it back."""
        async with self._turns[self._resource(fault)]:
            record = Struck(fault, time.time(), alone=alone)
            self.struck.append(record)
            try:
                record.reached = await self._happen(fault)
            finally:
                record.end = time.time()
        return record

    def _resource(self, fault: Fault) -> str:
        match fault.kind:
            case Kind.CUT | Kind.REFUSE | Kind.DELAY | Kind.THROTTLE | Kind.RESET | Kind.LATE | Kind.FORGOTTEN:
                return f"network of {fault.target}"
            case Kind.BLACK_HOLE | Kind.BLACK_HOLE_UP | Kind.BLACK_HOLE_DOWN:
                return f"network of {fault.target}"
            case Kind.DISK_FULL | Kind.DISK_NO_SPACE | Kind.DISK_READ_ONLY:
                return f"disk of {fault.target}"
            case Kind.KILL_WORKER | Kind.CRASH_WORKER | Kind.STOP_WORKER:
                return f"worker of {fault.target}"
            case Kind.CRASH_POINT:
                return f"point of {fault.target}"
            case _:
                return f"process of {fault.target}"

    async def _happen(self, fault: Fault) -> bool:
        match fault.kind:
            case Kind.CRASH_POINT:
                return await self._crash_point(fault)
            case Kind.KILL | Kind.KILL_AGAIN | Kind.KILL_ALL | Kind.DRAIN | Kind.STOP:
                await self._signal(fault)
            case Kind.KILL_WORKER | Kind.CRASH_WORKER | Kind.STOP_WORKER:
                return await self._signal_worker(fault)
            case Kind.DISK_NO_SPACE | Kind.DISK_READ_ONLY | Kind.DISK_FULL:
                await self._refuse_disk(fault)
            case Kind.PARTITION:
                await asyncio.gather(
                    *(self.strike_network(Fault(Kind.BLACK_HOLE, silo, fault.duration)) for silo in self.layout.silos)
                )
            case Kind.LATE:
                return await self._late(fault)
            case _:
                await self._network(fault)
        return True

    # ---- processes

    async def _signal(self, fault: Fault) -> None:
        daemon = self.daemons.get(fault.target)
        match fault.kind:
            case Kind.KILL_ALL:
                for each in self.daemons.values():
                    each.send(signal.SIGKILL)
            case Kind.KILL if daemon is not None:
                await self._kill(daemon)
            case Kind.KILL_AGAIN if daemon is not None:
                await self._kill(daemon)
                await asyncio.sleep(fault.duration)
                await self._kill(daemon)
            case Kind.DRAIN if daemon is not None:
                await daemon.running()
                daemon.drain()
            case Kind.STOP if daemon is not None:
                await _stopped(await daemon.running(), fault.duration)

    async def _kill(self, daemon: Daemon) -> None:
        await daemon.running()
        daemon.send(signal.SIGKILL)

    async def _signal_worker(self, fault: Fault) -> bool:
        deadline = time.monotonic() + WORK_LIMIT
        while not training(self.layout.log(fault.target)) and time.monotonic() < deadline:  # noqa: ASYNC110  # a log
            await asyncio.sleep(POLL)
        pid = await self.daemons[fault.target].worker()
        if pid is None:
            return False
        match fault.kind:
            case Kind.STOP_WORKER:
                await _stopped(pid, fault.duration)
            case kind:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSEGV if kind is Kind.CRASH_WORKER else signal.SIGKILL)
        return True

    async def _crash_point(self, fault: Fault) -> bool:
        assert fault.point is not None
        control, token = self.layout.control(fault.target), secrets.token_hex(8)
        await self.daemons[fault.target].running()
        (control / "new").write_text(f"{fault.point.name} #{fault.count} {fault.linger:.3f} {token}")
        (control / "new").rename(control / "armed")
        hit, begin, made = control / "hit", time.monotonic(), float("-inf")
        while time.monotonic() - begin < POINT_LIMIT:
            if hit.exists() and token in hit.read_text():
                return True
            if time.monotonic() - made > OCCASION_INTERVAL:
                made = time.monotonic()
                await self._make(fault.point.occasion, fault.target)
            await asyncio.sleep(POLL)
        (control / "armed").unlink(missing_ok=True)
        return hit.exists() and token in hit.read_text()

    async def _make(self, occasion: Occasion, target: str) -> None:
        """See to it that a process comes by a point."""
        daemon, chance = self.daemons[target], self.chance
        other = chance.choice(self.layout.numpy_silos) if target == COORDINATOR else COORDINATOR
        match occasion:
            case Occasion.START:
                daemon.send(signal.SIGKILL)
            case Occasion.DRAIN:
                daemon.drain()
            case Occasion.PEER_DRAIN:
                self.daemons[other].drain()
            case Occasion.CUT:
                self.proxies[other if target == COORDINATOR else target].cut()
            case Occasion.CREATE:
                await self.pool.create(chance.choice(self.pool.among("pair", "transport")), is_doomed=False)
            case Occasion.CANCEL:
                doomed = await self.pool.create(self.pool.among("transport")[0], is_doomed=True)
                await asyncio.sleep(chance.uniform(0.0, 1.0))
                await self.pool.cancel(doomed)
            case Occasion.LARGE if "large" in self.pool.specs:
                if not any(one.spec_name == "large" for one in self.pool.active):
                    await self.pool.create("large")
            case _:
                pass

    # ---- network

    async def strike_network(self, fault: Fault) -> None:
        """A part of a larger fault."""
        async with self._turns[self._resource(fault)]:
            await self._network(fault)

    async def _network(self, fault: Fault) -> None:
        proxy = self.proxies[fault.target]
        match fault.kind:
            case Kind.CUT:
                proxy.cut()
                return
            case Kind.REFUSE:
                proxy.refuse()
                proxy.cut()
            case Kind.DELAY:
                proxy.delay(fault.amount, fault.amount / 2)
            case Kind.THROTTLE:
                proxy.throttle(fault.amount)
            case Kind.RESET:
                proxy.reset_mid_message()
            case Kind.BLACK_HOLE | Kind.FORGOTTEN:
                proxy.black_hole()
            case Kind.BLACK_HOLE_UP:
                proxy.black_hole(down=False)
            case Kind.BLACK_HOLE_DOWN:
                proxy.black_hole(up=False)
        await asyncio.sleep(fault.duration)
        if fault.kind is Kind.FORGOTTEN:
            proxy.forget()
        await proxy.mend()

    async def _late(self, fault: Fault) -> bool:
        """A result is under way while its round, which another silo has lost, closes and is tried again."""
        proxy, daemon = self.proxies[fault.target], self.daemons[fault.target]
        other = self.daemons[self.chance.choice([s for s in self.layout.numpy_silos if s != fault.target])]
        proxy.delay(LATENCY, 0.0)
        reached = False
        deadline = time.monotonic() + fault.duration
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL)
            here, there = (training(self.layout.log(one.name)) for one in (daemon, other))
            pid, victim = await daemon.worker(), await other.worker()
            if here and here == there and pid is not None and victim is not None:
                reached = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                await _stopped(pid, rounds.LOST_GRACE - LATENCY / 2 - self.chance.uniform(0.0, 0.4))
        await proxy.mend()
        return reached

    # ---- disks

    async def _refuse_disk(self, fault: Fault) -> None:
        directory = self.layout.state(fault.target)
        if fault.kind is Kind.DISK_FULL:
            await asyncio.to_thread(namespace.fill, directory)
            try:
                await asyncio.sleep(fault.duration)
            finally:
                await asyncio.to_thread(namespace.free, directory)
            return
        flag = self.layout.control(fault.target) / "disk"
        point = f" #{fault.point.name}" if fault.point else ""
        flag.with_suffix(".new").write_text(REFUSALS[fault.kind] + point)
        flag.with_suffix(".new").rename(flag)
        try:
            await asyncio.sleep(fault.duration)
        finally:
            flag.unlink()


def training(log: Path) -> str:
    """Experiment and round that a silo trains for now, as its log has it; nothing if it does not."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    begun = [(index, line) for index, line in enumerate(lines) if "work begins" in line]
    if not begun:
        return ""
    index, line = begun[-1]
    task_id = line.rpartition("task=")[2]
    if "/train" not in task_id or any(task_id in later for later in lines[index + 1 :]):
        return ""
    return "/".join(task_id.split("/")[:2])


async def _stopped(pid: int, duration: float) -> None:
    try:
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(duration)
    except ProcessLookupError:
        return
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
