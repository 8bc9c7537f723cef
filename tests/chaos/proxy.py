"""The network between one silo and the coordinator, with faults: a TCP proxy on loopback that a schedule plays with.

* `cut` and `reset_mid_message` break connections with RST; the latter forwards a random part of what it read before.
* `refuse` closes the port. `delay` and `throttle` slow down. `black_hole` keeps connections open, also new ones, and
  forwards nothing in one or both directions; `mend` lets what was held back go on, as TCP would after an outage.
* `forget` leaves the connections of a black hole dark for ever, as a firewall does that has lost its state.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

PIECE = 65536  # bytes read at once
_RST_ON_CLOSE = struct.pack("ii", 1, 0)  # linger for no time: what is unsent is dropped, and the peer is told so


@dataclass(eq=False)
class _Relay:
    """One relayed connection: the silo's end and the coordinator's."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    dark: bool = False

    def reset(self) -> None:
        for end in (self.near, self.far):
            connection = end.get_extra_info("socket")
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            end.transport.abort()


@dataclass
class FaultyProxy:
    """Relays what dials `port` to `target`, both on loopback. Belongs to one event loop."""

    target: int
    port: int
    chance: random.Random
    latency: float = 0.0  # seconds added to each piece
    jitter: float = 0.0  # seconds, at most added to that
    rate: float | None = None  # bytes per second and direction
    relayed: int = 0  # connections so far
    _upstream: asyncio.Event = field(default_factory=asyncio.Event)
    _downstream: asyncio.Event = field(default_factory=asyncio.Event)
    _resets: bool = False
    _relays: set[_Relay] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _server: asyncio.Server | None = None

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator["FaultyProxy"]:
        """Relay until the end of the block."""
        await self.mend()
        try:
            yield self
        finally:
            self.refuse()
            self.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def mend(self) -> None:
        """Take every fault back; broken connections stay broken."""
        self.latency = self.jitter = 0.0
        self.rate = None
        self._resets = False
        self._upstream.set()
        self._downstream.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Break every connection."""
        for relay in list(self._relays):
            relay.reset()

    def refuse(self) -> None:
        """Refuse new connections; those there are go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def delay(self, latency: float, jitter: float) -> None:
        """Hold each piece back for `latency` seconds and at most `jitter` more."""
        self.latency, self.jitter = latency, jitter

    def throttle(self, rate: float) -> None:
        """Pass on at most `rate` bytes per second in each direction."""
        self.rate = rate

    def black_hole(self, up: bool = True, down: bool = True) -> None:
        """Forward nothing to the coordinator (`up`), to the silo (`down`) or to either, and close nothing."""
        if up:
            self._upstream.clear()
        if down:
            self._downstream.clear()

    def forget(self) -> None:
        """Nothing of what is connected now will ever pass again, nor be told so."""
        for relay in self._relays:
            relay.dark = True

    def reset_mid_message(self) -> None:
        """Break the next connection that says something, after a random part of what it says."""
        self._resets = True

    @property
    def has_reset(self) -> bool:
        """Whether `reset_mid_message` has found its connection."""
        return not self._resets

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self.relayed += 1
        relay = _Relay(writer, far_writer)
        self._relays.add(relay)
        pumps = [
            asyncio.create_task(self._pump(relay, reader, far_writer, self._upstream)),
            asyncio.create_task(self._pump(relay, far_reader, writer, self._downstream)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if relay.dark:
                await asyncio.wait(pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            relay.reset()
            self._relays.discard(relay)

    async def _pump(
        self, relay: _Relay, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event
    ) -> None:
        while True:
            try:
                data = await reader.read(PIECE)
            except OSError:
                data = b""
            await gate.wait()  # also with the end of the stream: nobody hears of it through a black hole
            if not data:
                return
            if relay.dark:
                continue
            if self._resets:
                self._resets = False
                writer.write(data[: self.chance.randrange(len(data))])
                await asyncio.sleep(0)
                relay.reset()
                return
            try:
                await self._forward(data, writer)
            except OSError:
                return

    async def _forward(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        if self.latency or self.jitter:
            await asyncio.sleep(self.latency + self.jitter * self.chance.random())
        step = len(data) if self.rate is None else max(1, int(self.rate / 10))
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            if self.rate is not None:
                await asyncio.sleep(len(piece) / self.rate)
            writer.write(piece)
            await writer.drain()
