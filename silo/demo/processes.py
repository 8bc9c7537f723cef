"""The demo's processes: started apart from the terminal, awaited, watched, and ended whatever happens.

Each is in a session of its own, so that a terminal's Ctrl-C reaches the demo alone, which then ends them in order; and
each dies with the demo (see `launch`). What daemons print goes to files. A daemon says that it is ready as it does to
systemd: through the socket named by NOTIFY_SOCKET.
"""

import asyncio
import contextlib
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fedrt.errors import FedrtError
from silo.demo import launch

STOP_LIMIT = 8.0  # seconds between SIGTERM and SIGKILL
READY_LIMIT = 120.0  # seconds until a daemon must be ready; importing torch can take long on a busy machine
BLAME_DELAY = 1.0  # seconds in which the death of a daemon explains why the work failed
TAIL_LINES = 15
_T = TypeVar("_T")


class DemoError(FedrtError):
    """The demo cannot go on; the message says why."""


class DaemonEnded(DemoError):
    """A daemon ended of itself; `status` is its exit code, below 0 the signal that killed it."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class _Daemon:
    name: str
    process: asyncio.subprocess.Process
    log_path: Path
    notices: socket.socket
    status: str = ""
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def read_notices(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                for line in self.notices.recv(4096).decode(errors="replace").splitlines():
                    key, _, value = line.partition("=")
                    if key == "STATUS":
                        self.status = value
                    elif key == "READY":
                        self.ready.set()


class Processes:
    """Used with `async with`; at its end no process is left."""

    def __init__(self, logs: Path, sockets: Path) -> None:
        self._logs = logs
        self._sockets = sockets
        self._daemons: dict[str, _Daemon] = {}
        self._calls: set[asyncio.subprocess.Process] = set()

    async def __aenter__(self) -> "Processes":
        self._logs.mkdir(parents=True, exist_ok=True)
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        finally:
            self.kill()
            for daemon in self._daemons.values():
                asyncio.get_running_loop().remove_reader(daemon.notices.fileno())
                daemon.notices.close()
            shutil.rmtree(self._sockets, ignore_errors=True)

    async def start(self, name: str, *command: str) -> int:
        """Start a daemon's console script; returns its process id."""
        notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        path = self._sockets / f"{name}.notify"
        notices.bind(str(path))
        log_path = self._logs / f"{name}.log"
        with log_path.open("wb") as log:
            process = await self._spawn(command, log, log, {"NOTIFY_SOCKET": str(path)})
        daemon = _Daemon(name, process, log_path, notices)
        self._daemons[name] = daemon
        asyncio.get_running_loop().add_reader(notices.fileno(), daemon.read_notices)
        return process.pid

    async def ready(self, name: str) -> str:
        """Wait until a daemon serves; returns its own words. Raises `DemoError` after two minutes."""
        daemon = self._daemons[name]
        try:
            async with asyncio.timeout(READY_LIMIT):
                await daemon.ready.wait()
        except TimeoutError:
            last = f"it last said: {daemon.status}" if daemon.status else "it said nothing"
            raise DemoError(f"{name} was not ready after {READY_LIMIT:.0f} seconds ({last}); {_tail(daemon)}") from None
        return daemon.status

    async def call(self, *command: str) -> str:
        """Run a program to its end and return what it prints. Raises `DemoError` with its complaint if it fails."""
        process = await self._spawn(command, asyncio.subprocess.PIPE, asyncio.subprocess.PIPE, {})
        self._calls.add(process)
        try:
            out, complaint = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._calls.discard(process)
        if process.returncode:
            words = complaint.decode(errors="replace").strip() or "it gave no reason"
            called = shlex.join([Path(command[0]).name, *command[1:]])[:120]
            raise DemoError(f"`{called}` failed with exit code {process.returncode}: {words}")
        return out.decode()

    async def guarding(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do the work; raises `DemoError` with the end of its log as soon as a daemon dies meanwhile."""
        task, death = asyncio.create_task(work), asyncio.create_task(self._first_death())
        try:
            await asyncio.wait({task, death}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is not None:
                await asyncio.wait({death}, timeout=BLAME_DELAY)
            if death.done():
                daemon = death.result()
                status = daemon.process.returncode
                raise DaemonEnded(f"{daemon.name} ended with exit code {status}; {_tail(daemon)}", status)
            return task.result()
        finally:
            task.cancel()
            death.cancel()
            await asyncio.gather(task, death, return_exceptions=True)

    async def stop(self) -> None:
        """End the silos, then the coordinator: SIGTERM, and SIGKILL for whoever takes too long."""
        for process in self._calls:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        names = [name for name in self._daemons if name != "coordinator"]
        await self._end([self._daemons[name].process for name in names])
        await self._end([daemon.process for name, daemon in self._daemons.items() if name not in names])

    def kill(self) -> None:
        """End all at once."""
        for process in [*self._calls, *(daemon.process for daemon in self._daemons.values())]:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

    async def _end(self, processes: Sequence[asyncio.subprocess.Process]) -> None:
        running = [process for process in processes if process.returncode is None]
        if not running:
            return
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        waits = [asyncio.create_task(process.wait()) for process in running]
        _, late = await asyncio.wait(waits, timeout=STOP_LIMIT)
        if late:
            for process in running:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
            await asyncio.wait(waits)

    async def _first_death(self) -> _Daemon:
        while True:
            for daemon in self._daemons.values():
                if daemon.process.returncode is not None:
                    return daemon
            await asyncio.sleep(0.1)

    async def _spawn(
        self, command: Sequence[str], out: Any, err: Any, extra: dict[str, str]
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-IS",
            launch.__file__,
            str(os.getpid()),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env=os.environ | extra,
        )


def script(name: str) -> str:
    """The path of one of our console scripts, beside the running Python. Raises `DemoError` if it is not installed."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise DemoError(f"'{path}' does not exist; install fedrt with: pip install 'fedrt[demo]'")
    return str(path)


def _tail(daemon: _Daemon) -> str:
    lines = daemon.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    quoted = "".join(f"\n  | {line}" for line in lines) or " (empty)"
    return f"the end of '{daemon.log_path}':{quoted}"
