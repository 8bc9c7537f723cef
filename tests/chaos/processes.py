"""The daemons of a chaos run: started, started again when they die, as a service manager does, and accounted for."""

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.hooks import CONTROL, RUN, STATE
from tests.chaos.layout import COORDINATOR, Layout

ROOT = Path(__file__).resolve().parent.parent.parent
RESTART_PAUSE = (0.1, 0.4)  # seconds
STAYS_DOWN = {2, 77, 78}  # exit codes after which a service manager does not start a daemon again
PATIENCE = 300.0  # seconds for whatever must come by itself


@dataclass
class Daemon:
    """One daemon and its lives so far."""

    name: str
    layout: Layout
    command: tuple[str, ...]
    environment: dict[str, str]
    chance: random.Random
    wanted: bool = True
    process: asyncio.subprocess.Process | None = None
    exits: list[tuple[float, int]] = field(default_factory=list)  # time and exit code, below 0 a signal
    is_draining: bool = False
    started: asyncio.Event = field(default_factory=asyncio.Event)
    _keeper: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start it, and keep it running."""
        self._keeper = asyncio.create_task(self._keep())

    async def running(self) -> int:
        """Its process id, as soon as it runs."""
        async with asyncio.timeout(PATIENCE):
            await self.started.wait()
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    def drain(self) -> None:
        """Ask it to stop in order, if it runs; once only in each life, for a second time would end it at once."""
        if not self.is_draining:
            self.is_draining = True
            self.send(signal.SIGTERM)

    async def worker(self) -> int | None:
        """The process id of its worker, if it has one now."""
        if self.process is None:
            return None
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return children[0].pid if children else None
        return None

    async def stop(self) -> int | None:
        """End it in order; returns its exit code, or None if it had to be killed."""
        self.wanted = False
        self.drain()
        assert self._keeper is not None
        done, _ = await asyncio.wait({self._keeper}, timeout=PATIENCE)
        if not done:
            self.send(signal.SIGKILL)
            await self._keeper
            return None
        return self.exits[-1][1] if self.exits else 0

    async def kill(self) -> None:
        """End it at once, for ever."""
        self.wanted = False
        self.send(signal.SIGKILL)
        if self._keeper is not None:
            await asyncio.wait({self._keeper}, timeout=PATIENCE)

    async def _keep(self) -> None:
        while self.wanted:
            with self.layout.log(self.name).open("ab") as log:
                log.write(f"--- start {len(self.exits) + 1} at {time.time():.3f}\n".encode())
                log.flush()
                self.process = await asyncio.create_subprocess_exec(
                    *self.command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
                )
            self.is_draining = False
            self.started.set()
            code = await self.process.wait()
            self.started.clear()
            self.exits.append((time.time(), code))
            if self.wanted:
                await asyncio.sleep(self.chance.uniform(*RESTART_PAUSE))


def make_daemons(layout: Layout, mark: str, chance: random.Random) -> dict[str, Daemon]:
    """All daemons of a layout, not yet started; every process that descends from them carries `mark`."""
    daemons = {}
    for name in layout.daemons:
        module = "tests.chaos.coordinator_process" if name == COORDINATOR else "tests.chaos.silo_process"
        kind = () if name == COORDINATOR else ("clip" if name in layout.clip_silos else "numpy",)
        environment = os.environ | {
            CONTROL: str(layout.control(name)),
            STATE: str(layout.state(name)),
            RUN: f"{mark}/{name}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = (sys.executable, "-m", module, str(layout.yaml(name)), *kind)
        daemons[name] = Daemon(name, layout, command, environment, random.Random(chance.random()))
    return daemons


def marked(mark: str) -> list[psutil.Process]:
    """Every living process that descends from a daemon of the run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(RUN, "").startswith(mark) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def orphans(mark: str, daemons: dict[str, Daemon]) -> list[psutil.Process]:
    """Those whose daemon is dead: neither a daemon that runs, nor a child of one."""
    living = {daemon.process.pid for daemon in daemons.values() if daemon.process is not None}
    found = []
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            if process.pid not in living and process.ppid() not in living:
                found.append(process)
    return found
