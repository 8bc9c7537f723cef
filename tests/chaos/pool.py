"""Keeps experiments going while faults strike, and creates those that a fault needs."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedrt.admin_client import AdminClient
from fedrt.spec import ExperimentSpec
from tests.chaos.watching import History, Watcher

AT_ONCE = 3


@dataclass
class Pool:
    """Creates experiments of these specifications, several at a time."""

    watcher: Watcher
    specs: Mapping[str, ExperimentSpec]
    chance: random.Random
    news: asyncio.Event = field(default_factory=asyncio.Event)
    _number: int = 0
    _bag: list[str] = field(default_factory=list)

    @property
    def active(self) -> list[History]:
        """Those that have not ended."""
        return [history for history in self.watcher.histories.values() if not history.has_ended]

    def among(self, *names: str) -> list[str]:
        """Those of these experiments that this run has, or else all that it has."""
        return [name for name in names if name in self.specs] or list(self.specs)

    async def keep(self, clock_is_over: asyncio.Event) -> None:
        """Keep several going until the time is over."""
        while not clock_is_over.is_set():
            if sum(not history.is_doomed for history in self.active) < AT_ONCE:
                await self.create(self._next())
            else:
                await self.watcher.until(self._has_room_or(clock_is_over), patience=float("inf"))

    async def create(self, spec_name: str, is_doomed: bool = False) -> History:
        """Create one; returns once the coordinator has acknowledged it, however often it dies meanwhile."""
        self._number += 1
        name, spec = f"{spec_name}-{self._number:04}", self.specs[spec_name]
        history = await submit(self.watcher, name, spec_name, spec, is_doomed)
        return history

    async def cancel(self, history: History) -> None:
        """Cancel one that was made for it."""
        assert history.is_doomed

        async def ask(client: AdminClient) -> Any:
            return await client.cancel(history.name)

        await self.watcher.ask(ask)

    def _has_room_or(self, clock_is_over: asyncio.Event) -> Any:
        return lambda: clock_is_over.is_set() or sum(not history.is_doomed for history in self.active) < AT_ONCE

    def _next(self) -> str:
        if not self._bag:
            self._bag = list(self.specs)
            self.chance.shuffle(self._bag)
        return self._bag.pop()


async def submit(watcher: Watcher, name: str, spec_name: str, spec: ExperimentSpec, is_doomed: bool = False) -> History:
    """Create an experiment under a name, and follow it."""
    history = History(name, spec_name, spec, asyncio.get_running_loop().time(), is_doomed)
    watcher.histories[name] = history

    async def ask(client: AdminClient) -> Any:
        return await client.create(name, spec)

    await watcher.ask(ask)
    history.created = True
    return history
