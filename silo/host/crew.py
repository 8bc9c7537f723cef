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
    """The virtual silos of a host, and which of them have been connected or refused."""

    def __init__(self, silos: Mapping[str, Silo], lifecycle: Lifecycle, address: str) -> None:
        self._silos = silos
        self._lifecycle = lifecycle
        self._address = address
        self._log = structlog.get_logger("silo.host")
        self._connected: set[str] = set()
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
        if name not in self._connected:
            self._connected.add(name)
            self._tell()

    def _tell(self) -> None:
        """Tell the service manager how many sessions have been opened, and when they all are."""
        connected, count = len(self._connected - self._refused.keys()), len(self._silos)
        refused = f", {len(self._refused)} refused" if self._refused else ""
        if self._connected | self._refused.keys() < self._silos.keys():
            self._lifecycle.status(f"{connected} of {count} silos connected{refused}")
        elif connected:
            self._lifecycle.ready(f"{connected} of {count} silos connected to {self._address}{refused}")
