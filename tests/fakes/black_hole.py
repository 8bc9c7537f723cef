"""An address behind which packets vanish: a TCP port that swallows what is sent to it until a test mends it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

# a server's handshake record that announces more bytes than ever come
HALF_A_RECORD = bytes([22, 3, 3, 64, 0]) + b"\x02\x00\x3f\xfc"


@dataclass
class BlackHole:
    """`kind`: "no answer" (dials get none), "silence" (TCP connects, then nothing) or "half a handshake" (of TLS)."""

    kind: str
    target: int
    port: int = 0
    dialled: int = 0  # connections that were taken; none of the kind "no answer"
    _listener: socket.socket = field(default_factory=socket.socket)
    _fillers: list[socket.socket] = field(default_factory=list)
    _mended: bool = False
    _server: asyncio.Server | None = None

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator["BlackHole"]:
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        try:
            if self.kind == "no answer":
                self._fill_backlog()
            else:
                await self._serve()
            yield self
        finally:
            for filler in self._fillers:
                filler.close()
            if self._server is not None:
                self._server.close()
            self._listener.close()

    async def mend(self) -> None:
        """From now on everything reaches the target."""
        self._mended = True
        for filler in self._fillers:
            filler.close()
        if self._server is None:
            await self._serve()

    def _fill_backlog(self) -> None:
        """The kernel drops the first packet of a dial when the queue of those not taken yet is full."""
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._relay, sock=self._listener)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dialled += 1
        if not self._mended:
            if self.kind == "half a handshake":
                await reader.read(1)
                writer.write(HALF_A_RECORD)
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                while await reader.read(65536):
                    pass
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        pumps = [asyncio.create_task(_pump(reader, far_writer)), asyncio.create_task(_pump(far_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            writer.transport.abort()
            far_writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while received := await reader.read(65536):
            writer.write(received)
            await writer.drain()
