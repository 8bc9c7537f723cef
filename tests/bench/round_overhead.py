"""Seconds per round and the coordinator's peak memory, with silos that return a delta without training.

The coordinator is its own process, started through its console script, with its durable store. The silos share one
other process, or with --apart are a process each; each has its own certificate, TLS connection, spool and session. A
bare gRPC stream over the same mutual TLS, with nothing behind it, is measured in the same run. Prints JSON.

    python -m tests.bench.round_overhead --silos 2 8 32 --rounds 60
    python -m tests.bench.round_overhead --silos 2 --rounds 8 --payload-mib 64 --apart
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

from fedrt.log import configure_logging
from fedrt.tls import IdentityFiles, channel_credentials, server_credentials
from fedrt.transport import GRPC_OPTIONS
from fedrt.v1 import session_service_pb2 as session_pb
from fedrt.v1 import session_service_pb2_grpc, tensor_pb2
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker

CHUNK = 256 * 1024


def start_coordinator(federation: Federation) -> subprocess.Popen[bytes]:
    script = Path(sys.executable).parent / "fedrt-coordinator"
    config = federation.coordinator_yaml("limits: {max_payload: 1GiB}\n")
    return subprocess.Popen([script, "run", "-c", config])


def peak_mib(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024


async def measure(silo_count: int, rounds: int, context_length: int, apart: bool) -> dict[str, object]:
    processes: list[subprocess.Popen[bytes]] = []
    names = tuple(f"silo-{index:03d}" for index in range(silo_count))
    with tempfile.TemporaryDirectory() as directory:
        federation = Federation(Path(directory) / "f", names)
        coordinator = start_coordinator(federation)
        try:
            async with federation.admin():
                pass
            for name in names:
                if apart:
                    command = [sys.executable, "-m", "tests.fakes.instant_silo", federation.silo_yaml(name)]
                    processes.append(subprocess.Popen(command))  # noqa: ASYNC220
                else:
                    federation.start_silo(name, FakeWorker())
            spec = make_spec(rounds, names, every=0, hyperparameters=json.dumps({"context_length": context_length}))
            await federation.create("bench", spec)
            times = [event async for event in closing_times(federation)]
            gaps = [after - before for before, after in itertools.pairwise(times[1:])]
            memory = peak_mib(coordinator.pid)
        finally:
            await federation.stop()
            for process in processes:
                process.terminate()
                process.wait(20)
            coordinator.terminate()
            coordinator.wait(20)
    return {
        "silos": silo_count,
        "silo_processes": silo_count if apart else 1,
        "payload_bytes": context_length * 512 * 4,
        "rounds": len(gaps),
        "median_seconds": round(statistics.median(gaps), 4),
        "worst_seconds": round(max(gaps), 4),
        "coordinator_peak_mib": round(memory, 1),
    }


async def closing_times(federation: Federation):
    async for event in federation.events("bench"):
        if event.WhichOneof("kind") == "round_closed" and event.round_closed.task_kind == 2:
            yield event.event_time.seconds + event.event_time.nanos / 1e9
        if event.experiment_changed.experiment.state >= 3:
            if event.experiment_changed.experiment.state != 3:
                raise RuntimeError(event.experiment_changed.experiment.status_message)
            return


class BareService(session_service_pb2_grpc.SessionServiceServicer):
    """Sends each client its bytes, reads as many back, and begins again when all have answered."""

    def __init__(self, clients: int, payload: int, rounds: int) -> None:
        self.barrier = asyncio.Barrier(clients)
        self.payload, self.rounds, self.times = payload, rounds, []

    async def OpenSession(self, request_iterator, context):
        data = bytes(CHUNK)
        for _ in range(self.rounds):
            if await self.barrier.wait() == 0:
                self.times.append(time.perf_counter())
            for at in range(0, self.payload, CHUNK):
                chunk = tensor_pb2.PayloadChunk(payload_id="p", offset=at, data=data[: self.payload - at])
                await context.write(session_pb.OpenSessionResponse(payload_chunk=chunk))
            got = 0
            while got < self.payload:
                got += len((await context.read()).payload_chunk.data)


async def bare_stream(silo_count: int, rounds: int, payload: int) -> dict[str, object]:
    """Server in this process, clients in another: as many processes as the real measurement has."""
    with tempfile.TemporaryDirectory() as directory:
        federation = Federation(Path(directory) / "f", ("one",))
        service = BareService(silo_count, payload, rounds)
        server = grpc.aio.server(options=GRPC_OPTIONS)
        session_service_pb2_grpc.add_SessionServiceServicer_to_server(service, server)
        certs = federation.directory / "certs"
        server.add_secure_port(f"localhost:{federation.port}", server_credentials(IdentityFiles(certs / "coordinator")))
        await server.start()
        command = [sys.executable, "-m", "tests.bench.round_overhead", "--bare-client", str(certs / "silos/one")]
        command += [f"localhost:{federation.port}", str(silo_count), str(payload)]
        client = await asyncio.create_subprocess_exec(*command)
        await client.wait()
        await server.stop(0)
    gaps = [after - before for before, after in itertools.pairwise(service.times[1:])]
    return {"silos": silo_count, "payload_bytes": payload, "median_seconds": round(statistics.median(gaps), 4)}


async def bare_client(directory: str, address: str, count: int, payload: int) -> None:
    async def one() -> None:
        options = [*GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        credentials = channel_credentials(IdentityFiles(Path(directory)))
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            call = session_service_pb2_grpc.SessionServiceStub(channel).OpenSession()
            while True:
                chunks, got = [], 0
                while got < payload:
                    message = await call.read()
                    if message is grpc.aio.EOF:
                        return
                    chunks.append(message.payload_chunk)
                    got += len(message.payload_chunk.data)
                for chunk in chunks:
                    await call.write(session_pb.OpenSessionRequest(payload_chunk=chunk))

    await asyncio.gather(*(one() for _ in range(count)))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--payload-mib", type=int, default=0, help="0: a 16x512 float32 context")
    parser.add_argument("--apart", action="store_true", help="one process per silo")
    parser.add_argument("--bare-client", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    configure_logging("error", "console")
    if options.bare_client:
        directory, address, count, payload = options.bare_client
        await bare_client(directory, address, int(count), int(payload))
        return
    length = options.payload_mib * 1024 * 1024 // (512 * 4) if options.payload_mib else 16
    results = []
    for count in options.silos:
        fedrt = await measure(count, options.rounds, length, options.apart)
        bare = await bare_stream(count, options.rounds, length * 512 * 4)
        ratio = round(float(fedrt["median_seconds"]) / float(bare["median_seconds"]), 2)
        results.append({"fedrt": fedrt, "bare_stream": bare, "ratio": ratio})
    print(json.dumps({"benchmark": "round_overhead", "results": results}, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
