"""Runs virtual silos side by side: lets a few dial at a time, and goes on without those that are refused."""

import asyncio
from collections.abc import Callable, Mapping
from functools import partial

import structlog

from fedrt.daemon import Lifecycle
from fedrt.errors import IdentityError
from silo.app import Silo

DIALLING = 16  # silos that may be opening their first session at the same time
DIAL_LIMIT = 1.0  # seconds after which the next may dial although this one's session is not open


class Crew:
    """The virtual silos of a host, and which of them are connected or refused."""

    def __init__(self, silos: Mapping[str, Silo], lifecycle: Lifecycle, address: str) -> None:
        self._silos = silos
        self._lifecycle = lifecycle
        self._address = address
        self._log = structlog.get_logger("silo.host")
        self._been: set[str] = set()  # connected at some time
        self._connected: set[str] = set()
        self._is_ready = False
        self._refused: dict[str, IdentityError] = {}
        self._lines = asyncio.Semaphore(DIALLING)

    async def run(self) -> None:
        """Serve until told to stop, then drain all at once.

        A silo whose identity is refused ends alone, until the host is started again. Raises `IdentityError` once every
        silo has been refused, and whatever else ends a silo.
        """
        async with asyncio.TaskGroup() as group:
            for name, silo in self._silos.items():
                await self._lines.acquire()
                if self._lifecycle.stopping.is_set():
                    break
                hang_up = self._hang_up()
                silo.link.on_connected = partial(self._on_connected, name, hang_up)
                silo.link.on_disconnected = partial(self._on_disconnected, name)
                asyncio.get_running_loop().call_later(DIAL_LIMIT, hang_up)
                group.create_task(self._serve(name, silo, hang_up))
        if len(self._refused) == len(self._silos):
            first, error = next(iter(self._refused.items()))
            raise IdentityError(f"all {len(self._silos)} virtual silos were refused, the first one, '{first}': {error}")

    async def _serve(self, name: str, silo: Silo, hang_up: Callable[[], None]) -> None:
        structlog.contextvars.bind_contextvars(silo=name)
        try:
            await silo.run(self._lifecycle.stopping)
        except IdentityError as error:
            self._refused[name] = error
            self._connected.discard(name)
            self._log.error("this silo is refused; the others go on", reason=str(error))
            self._tell()
        finally:
            hang_up()

    def _hang_up(self) -> Callable[[], None]:
        """Let the next silo dial; only the first call does so."""
        held = True

        def hang_up() -> None:
            nonlocal held
            if held:
                held = False
                self._lines.release()

        return hang_up

    def _on_connected(self, name: str, hang_up: Callable[[], None]) -> None:
        hang_up()
        self._been.add(name)
        if name not in self._connected:
            self._connected.add(name)
            self._tell()

    def _on_disconnected(self, name: str, why: str) -> None:
        if name in self._connected:
            self._connected.remove(name)
            self._tell(f"; '{name}' has just been lost: {why}")

    def _tell(self, more: str = "") -> None:
        """Tell the service manager how many sessions are open, and that it serves once all have been opened."""
        count = len(self._silos)
        status = f"{len(self._connected)} of {count} silos connected"
        refused = f", {len(self._refused)} refused" if self._refused else ""
        if not self._been - self._refused.keys() or self._been | self._refused.keys() < self._silos.keys():
            self._lifecycle.status(f"{status}{refused}{more}")
            return
        status = f"{status} to {self._address}{refused}{more}"
        if self._is_ready:
            self._lifecycle.status(status)
        else:
            self._is_ready = True
            self._lifecycle.ready(status)
