"""A federation of real processes with a faulty network, for as long as a block lasts."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import psutil

from tests.chaos import clip_images, namespace
from tests.chaos.layout import Layout, quiet_ports
from tests.chaos.processes import Daemon, make_daemons, marked
from tests.chaos.proxy import FaultyProxy
from tests.chaos.watching import Watcher


@contextlib.asynccontextmanager
async def federation(
    layout: Layout, has_disks: bool, mark: str, chance: random.Random
) -> AsyncIterator[tuple[dict[str, Daemon], dict[str, FaultyProxy], Watcher]]:
    """Daemons, a proxy before each silo, and an operator who watches, all running. Raises `OSError`."""
    silos = layout.silos
    port, *proxy_ports = quiet_ports(1 + len(silos))
    layout.prepare(port, dict(zip(silos, proxy_ports, strict=True)))
    for name in layout.daemons if has_disks else ():
        if problem := namespace.mount_disk(layout.state(name)):
            raise OSError(problem)
    for silo in layout.clip_silos:
        clip_images.write(layout.images(silo), silo)
    daemons = make_daemons(layout, mark, chance)
    watcher = Watcher(layout.admin_socket)
    async with contextlib.AsyncExitStack() as stack:
        proxies = {
            silo: await stack.enter_async_context(
                FaultyProxy(port, proxy_port, random.Random(chance.random())).started()
            )
            for silo, proxy_port in zip(silos, proxy_ports, strict=True)
        }
        watching = asyncio.create_task(watcher.run())
        try:
            for daemon in daemons.values():
                daemon.begin()
            yield daemons, proxies, watcher
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            for daemon in daemons.values():
                await daemon.kill()
            for process in marked(mark):  # orphans of a broken product, already counted
                with contextlib.suppress(psutil.Error):
                    process.kill()
