"""The faulty proxy: each fault does what it says, and nothing after it was mended."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator

import pytest

from tests.chaos.proxy import FaultyProxy

LIMIT = 30.0  # seconds for what must come
MOMENT = 0.2  # seconds in which something must not come: a slow machine makes that only more likely


class Echo:
    """A server that sends back what it gets, and knows how much it got and how connections ended."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.resets = 0
        self.changed = asyncio.Event()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.received += data
                self._tell()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            self.resets += 1
            self._tell()
        finally:
            writer.close()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def until_received(self, count: int) -> None:
        async with asyncio.timeout(LIMIT):
            while len(self.received) < count:
                await self.changed.wait()

    async def until_reset(self) -> None:
        async with asyncio.timeout(LIMIT):
            while not self.resets:
                await self.changed.wait()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    echo.port = server.sockets[0].getsockname()[1]
    yield echo
    server.close()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[FaultyProxy]:
    async with FaultyProxy(echo.port, 0, random.Random(1)).started() as proxy:
        yield proxy


async def dial(proxy: FaultyProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def heard(reader: asyncio.StreamReader, count: int) -> bytes:
    async with asyncio.timeout(LIMIT):
        return await reader.readexactly(count)


async def is_silent(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(MOMENT):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_without_a_fault_it_passes_everything_on(proxy: FaultyProxy) -> None:
    reader, writer = await dial(proxy)
    text = random.Random(2).randbytes(300_000)
    writer.write(text)
    assert await heard(reader, len(text)) == text
    writer.close()


async def test_an_end_is_passed_on(proxy: FaultyProxy, echo: Echo) -> None:
    reader, writer = await dial(proxy)
    writer.write(b"x")
    await heard(reader, 1)
    writer.close()
    await echo.until_reset()


async def test_cut_resets_both_ends_and_lets_new_connections_in(proxy: FaultyProxy, echo: Echo) -> None:
    reader, writer = await dial(proxy)
    writer.write(b"x")
    await heard(reader, 1)
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await heard(reader, 1)
    await echo.until_reset()
    reader, writer = await dial(proxy)
    writer.write(b"y")
    assert await heard(reader, 1) == b"y"


async def test_refuse_closes_the_port_until_it_is_mended(proxy: FaultyProxy) -> None:
    port = proxy.port
    reader, writer = await dial(proxy)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await dial(proxy)
    writer.write(b"x")
    assert await heard(reader, 1) == b"x"  # who is in stays in
    await proxy.mend()
    assert proxy.port == port
    reader, writer = await dial(proxy)
    writer.write(b"y")
    assert await heard(reader, 1) == b"y"


async def test_nobody_behind_it_is_a_broken_connection(proxy: FaultyProxy) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, but not listening
        proxy.target = nobody.getsockname()[1]
        reader, writer = await dial(proxy)
        writer.write(b"x")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await heard(reader, 1)


async def test_delay_holds_back_but_keeps_the_order(proxy: FaultyProxy) -> None:
    proxy.delay(0.3, 0.1)
    reader, writer = await dial(proxy)
    begin = asyncio.get_running_loop().time()
    writer.write(b"first")
    await writer.drain()
    writer.write(b"second")
    assert await heard(reader, 11) == b"firstsecond"
    assert asyncio.get_running_loop().time() - begin >= 0.6  # there and back


async def test_throttle_limits_the_rate(proxy: FaultyProxy) -> None:
    proxy.throttle(20_000)
    reader, writer = await dial(proxy)
    begin = asyncio.get_running_loop().time()
    writer.write(bytes(10_000))
    await heard(reader, 10_000)
    assert asyncio.get_running_loop().time() - begin >= 0.5


@pytest.mark.parametrize("side", ["up", "down"])
async def test_a_black_hole_in_one_direction(proxy: FaultyProxy, echo: Echo, side: str) -> None:
    reader, writer = await dial(proxy)
    proxy.black_hole(up=side == "up", down=side == "down")
    writer.write(b"x")
    if side == "down":
        await echo.until_received(1)
    assert await is_silent(reader)
    assert bytes(echo.received) == (b"" if side == "up" else b"x")
    await proxy.mend()
    assert await heard(reader, 1) == b"x"


async def test_a_black_hole_takes_new_connections_and_hides_ends(proxy: FaultyProxy, echo: Echo) -> None:
    _, writer = await dial(proxy)
    proxy.black_hole()
    second_reader, second = await dial(proxy)
    second.write(b"x")
    writer.close()
    assert await is_silent(second_reader)
    assert echo.resets == 0
    assert bytes(echo.received) == b""
    await proxy.mend()
    assert await heard(second_reader, 1) == b"x"
    await echo.until_reset()


async def test_what_a_black_hole_has_forgotten_stays_dark(proxy: FaultyProxy, echo: Echo) -> None:
    reader, writer = await dial(proxy)
    writer.write(b"x")
    await heard(reader, 1)
    proxy.black_hole()
    writer.write(b"lost")
    proxy.forget()
    await proxy.mend()
    second_reader, second = await dial(proxy)
    second.write(b"y")
    assert await heard(second_reader, 1) == b"y"
    writer.write(b"lost as well")
    assert await is_silent(reader)
    assert bytes(echo.received) == b"xy"
    writer.close()
    second.write(b"z")
    assert await heard(second_reader, 1) == b"z"
    assert echo.resets == 0  # not even the end is told


async def test_a_reset_in_the_middle_of_a_message_strikes_once(proxy: FaultyProxy, echo: Echo) -> None:
    reader, writer = await dial(proxy)
    proxy.reset_mid_message()
    writer.write(bytes(1000))
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await heard(reader, 1000)
    assert proxy.has_reset
    assert len(echo.received) < 1000
    reader, writer = await dial(proxy)
    writer.write(b"y")
    assert await heard(reader, 1) == b"y"


async def test_its_end_breaks_what_is_open(echo: Echo) -> None:
    async with FaultyProxy(echo.port, 0, random.Random(1)).started() as proxy:
        reader, writer = await dial(proxy)
        writer.write(b"x")
        await heard(reader, 1)
        proxy.black_hole()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await heard(reader, 1)
    with pytest.raises(ConnectionRefusedError):
        await dial(proxy)
