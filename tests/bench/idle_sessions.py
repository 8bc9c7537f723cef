"""What a thousand idle sessions cost the coordinator: memory, processor time, stalls, and how soon they open and end.

The coordinator is its own process, started through its console script, with heartbeats as by default. The silos speak
the protocol by hand, a few processes of them; each has its own certificate and TLS connection. A bare gRPC server with
the same clients, which echoes each message, is measured in the same run. Prints JSON.

    python -m tests.bench.idle_sessions --silos 1000
    python -m tests.bench.idle_sessions --silos 100 --idle 5
    python -m tests.bench.idle_sessions --profile idle.pstats     # cProfile, which slows it down
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedrt.log import configure_logging
from fedrt.tls import IdentityFiles, server_credentials
from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import session_service_pb2_grpc
from tests.bench.round_overhead import peak_mib
from tests.fakes.federation import Federation, free_port
from tests.fakes.raw_silo import credentials

DIALS_AT_ONCE = 16  # of one process of silos
HEARTBEAT = 2.5  # seconds, the default
OPEN = re.compile(r"^fedrt_coordinator_sessions_open ([0-9.]+)", re.MULTILINE)
LIMIT = 300.0  # seconds that anything may take
TICKS = os.sysconf("SC_CLK_TCK")


# ---- silos


async def silo(address: str, identity: Path, dialling: asyncio.Semaphore, opened: asyncio.Semaphore) -> None:
    """One session that says nothing but that it is alive."""
    options = [*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.secure_channel(address, credentials(identity), options) as channel:
        async with dialling:
            await channel.channel_ready()
            call = session_service_pb2_grpc.SessionServiceStub(channel).OpenSession()
            await call.write(session_pb.OpenSessionRequest(hello=session_pb.Hello(software_version="bench")))
            await call.read()
        opened.release()
        reading = asyncio.create_task(read(call))
        while not reading.done():
            await call.write(session_pb.OpenSessionRequest(heartbeat=session_pb.Heartbeat()))
            await asyncio.wait({reading}, timeout=HEARTBEAT)
        await reading


async def read(call: grpc.aio.StreamStreamCall) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass
    raise ConnectionError(f"the session ended: {await call.code()}, {await call.details()}")


async def silos(address: str, directory: Path, first: int, last: int) -> None:
    """Print a line once all are open, and keep them open."""
    dialling, opened = asyncio.Semaphore(DIALS_AT_ONCE), asyncio.Semaphore(0)
    async with asyncio.TaskGroup() as group:
        for index in range(first, last):
            group.create_task(silo(address, directory / name_of(index), dialling, opened))
        for _ in range(first, last):
            await opened.acquire()
        print("open", flush=True)


def name_of(index: int) -> str:
    return f"silo-{index:05d}"


# ---- the bare server


class Echo(session_service_pb2_grpc.SessionServiceServicer):
    async def OpenSession(self, request_iterator, context):
        while await context.read() is not grpc.aio.EOF:
            await context.write(session_pb.OpenSessionResponse(heartbeat=session_pb.Heartbeat()))


async def bare_server(address: str, directory: Path) -> None:
    server = grpc.aio.server(options=GRPC_OPTIONS)
    session_service_pb2_grpc.add_SessionServiceServicer_to_server(Echo(), server)
    server.add_secure_port(address, server_credentials(IdentityFiles(directory)))
    await server.start()
    await server.wait_for_termination()


# ---- measuring


@dataclass(frozen=True)
class Server:
    """The process that is measured."""

    process: subprocess.Popen[bytes]

    @property
    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status).group(1))

    @property
    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[Server]:
    try:
        yield Server(process)
    finally:
        process.terminate()
        process.wait(LIMIT)


@contextlib.contextmanager
def client_processes(address: str, directory: Path, count: int, processes: int) -> Iterator[list[subprocess.Popen]]:
    bounds = [count * index // processes for index in range(processes + 1)]
    command = [sys.executable, "-m", "tests.bench.idle_sessions", "--clients", address, directory]
    running = [
        subprocess.Popen([*map(str, [*command, first, last])], stdout=subprocess.PIPE)
        for first, last in itertools.pairwise(bounds)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()  # also one that is stopped
            process.wait(LIMIT)


async def ready(address: str, identity: Path) -> None:
    options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50)]
    async with grpc.aio.secure_channel(address, credentials(identity), options) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)


@contextlib.asynccontextmanager
async def asking(address: str, identity: Path) -> AsyncIterator[list[float]]:
    """Seconds of answers to questions about health, one after the other: how long the event loop makes one wait."""
    taken: list[float] = []

    async def ask() -> None:
        async with grpc.aio.secure_channel(address, credentials(identity)) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                began = time.perf_counter()
                await stub.Check(health_pb2.HealthCheckRequest())
                taken.append(time.perf_counter() - began)
                await asyncio.sleep(0.01)

    task = asyncio.create_task(ask())
    try:
        yield taken
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def in_milliseconds(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {
        "median": round(1e3 * ordered[len(ordered) // 2], 1),
        "p99": round(1e3 * ordered[len(ordered) * 99 // 100], 1),
        "worst": round(1e3 * ordered[-1], 1),
        "count": len(ordered),
    }


def sessions_open(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as response:
        return int(float(OPEN.search(response.read().decode()).group(1)))


async def idle(server: Server, address: str, certs: Path, options: argparse.Namespace, metrics: int | None) -> dict:
    """Everything about one server; without metrics nobody can tell how soon silence is noticed."""
    await ready(address, certs / "silos" / name_of(0))
    before, count = server.resident_kib, options.silos
    asker = certs / "silos" / name_of(count)
    began, busy = time.perf_counter(), server.processor_seconds
    with client_processes(address, certs / "silos", count, options.processes) as clients:
        async with contextlib.AsyncExitStack() as stack:
            opening = await stack.enter_async_context(asking(address, asker)) if metrics else []
            for client in clients:
                line = await asyncio.to_thread(client.stdout.readline)
                if line != b"open\n":
                    raise RuntimeError("a process of silos ended early")
            seconds, busy = time.perf_counter() - began, server.processor_seconds - busy
        await asyncio.sleep(2 * HEARTBEAT)
        after, used, since = server.resident_kib, server.processor_seconds, time.perf_counter()
        await asyncio.sleep(options.idle)
        used, since = server.processor_seconds - used, time.perf_counter() - since
        result = {
            "seconds_until_all_open": round(seconds, 2),
            "sessions_opened_per_second": round(count / seconds, 1),
            "processor_seconds_while_opening": round(busy, 2),
            "resident_mib_before": round(before / 1024, 1),
            "resident_mib_idle": round(after / 1024, 1),
            "kib_per_session": round((after - before) / count, 1),
            "processor_seconds_per_second_idle": round(used / since, 4),
        }
        if metrics:
            async with asking(address, asker) as waited:
                await asyncio.sleep(options.idle)
            result["health_answer_ms_while_opening"] = in_milliseconds(opening)
            result["health_answer_ms_idle"] = in_milliseconds(waited)
            result |= await silence(clients, metrics)
            result["resident_mib_peak"] = round(peak_mib(server.process.pid), 1)
            result["resident_mib_after"] = round(server.resident_kib / 1024, 1)
    return result


async def silence(clients: list[subprocess.Popen], metrics: int) -> dict:
    """Stop the silos' processes, as a power cut would: their sockets stay open and say nothing."""
    there = await asyncio.to_thread(sessions_open, metrics)
    for client in clients:
        client.send_signal(signal.SIGSTOP)
    began, first = time.perf_counter(), None
    while (left := await asyncio.to_thread(sessions_open, metrics)) > 0:
        if first is None and left < there:
            first = time.perf_counter() - began
        await asyncio.sleep(0.05)
    return {
        "sessions_when_silenced": there,
        "seconds_until_first_noticed": round(first or 0.0, 2),
        "seconds_until_all_noticed": round(time.perf_counter() - began, 2),
    }


def coordinator(federation: Federation, metrics: int, count: int, profile: str | None) -> subprocess.Popen[bytes]:
    extra = f"limits: {{max_sessions: {count + 10}}}\nmetrics: {{listen: '127.0.0.1:{metrics}'}}\n"
    script = str(Path(sys.executable).parent / "fedrt-coordinator")
    profiled = [sys.executable, "-m", "cProfile", "-o", profile] if profile else []
    return subprocess.Popen([*profiled, script, "run", "-c", str(federation.coordinator_yaml(extra))])


async def measure(options: argparse.Namespace) -> dict[str, object]:
    count = options.silos
    with tempfile.TemporaryDirectory() as directory:
        federation = Federation(Path(directory) / "f", tuple(name_of(index) for index in range(count + 1)))
        certs, metrics = federation.directory / "certs", free_port()
        address = f"localhost:{federation.port}"
        with ended(coordinator(federation, metrics, count, options.profile)) as server:
            ours = await idle(server, address, certs, options, metrics)
        address = f"localhost:{free_port()}"
        command = [sys.executable, "-m", "tests.bench.idle_sessions", "--bare", address, str(certs / "coordinator")]
        with ended(subprocess.Popen(command)) as server:  # noqa: ASYNC220
            bare = await idle(server, address, certs, options, None)
    beyond = round(ours["kib_per_session"] - bare["kib_per_session"], 1)
    return {"coordinator": ours, "bare_grpc": bare, "kib_per_session_beyond_grpc": beyond}


def raise_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4, help="that the silos share")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to measure over")
    parser.add_argument("--profile", help="write the coordinator's cProfile here")
    parser.add_argument("--clients", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    raise_open_files()
    configure_logging("error", "console")
    if options.clients:
        address, directory, first, last = options.clients
        await silos(address, Path(directory), int(first), int(last))
    elif options.bare:
        await bare_server(options.bare[0], Path(options.bare[1]))
    else:
        load = os.getloadavg()[0]
        result = await measure(options)
        setting = {"silos": options.silos, "client_processes": options.processes, "load_before": round(load, 2)}
        print(json.dumps({"benchmark": "idle_sessions", **setting, **result}, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
