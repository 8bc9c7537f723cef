"""Follows an experiment until it has ended: its events as they are pushed, and once a second what the silos work at."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Protocol

from fedrt.admin_client import AdminClient, UnreachableError
from fedrt.ctl_progress import WatchState, plan_of
from fedrt.v1 import admin_service_pb2 as pb
from fedrt.wire_values import experiment_spec_from_pb

REFRESH_INTERVAL = 0.5  # seconds between two displays while nothing happens
SILOS_INTERVAL = 1.0  # seconds between two looks at the silos
OUTAGE_LIMIT = 60.0  # seconds that the coordinator may be away, for example to restart
REDIAL_DELAY = 1.0
STABLE_AFTER = 5.0  # seconds without an error after which a stream of events counts as open
SHORTEST_DISPLAY = 0.1  # seconds that a display stays at least, while old events rush by


class Audience(Protocol):
    """Who is told what happens."""

    def heard(self, event: pb.Event) -> None:
        """An event, each once."""

    def shown(self, state: WatchState) -> None:
        """How the experiment stands now; repeatedly."""


async def follow(client: AdminClient, experiment_id: str, audience: Audience) -> WatchState:
    """The state at the end. Raises `FedrtError` if the experiment does not exist or the coordinator stays away."""
    experiment = await client.get(experiment_id)
    state = WatchState(plan_of(experiment_id, experiment_spec_from_pb(experiment.spec)))
    events = _events(client, experiment_id)
    upcoming = asyncio.ensure_future(anext(events))
    looked = shown = float("-inf")
    try:
        while not state.has_ended:
            done, _ = await asyncio.wait({upcoming}, timeout=REFRESH_INTERVAL)
            if done:
                event = upcoming.result()
                audience.heard(event)
                state = state.step(event)
                upcoming = asyncio.ensure_future(anext(events))
            if time.monotonic() - looked >= SILOS_INTERVAL:
                looked = time.monotonic()
                state = await _with_silos(client, state)
            if time.monotonic() - shown >= SHORTEST_DISPLAY:
                shown = time.monotonic()
                audience.shown(state)
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
        await events.aclose()
    audience.shown(state)
    return state


async def _events(client: AdminClient, experiment_id: str) -> AsyncGenerator[pb.Event]:
    """Events without end, taken up again after an outage of the coordinator."""
    after, lost = 0, None
    while True:
        dialled = time.monotonic()
        try:
            async for event in client.watch(experiment_id, after):
                after, lost = event.event_number, None
                yield event
        except UnreachableError:
            now = time.monotonic()
            if lost is None or now - dialled > STABLE_AFTER:  # it was there meanwhile, with nothing to tell
                lost = now
            if now - lost > OUTAGE_LIMIT:
                raise
            await asyncio.sleep(REDIAL_DELAY)


async def _with_silos(client: AdminClient, state: WatchState) -> WatchState:
    try:
        return state.with_silos(await client.silos())
    except UnreachableError:
        return state
