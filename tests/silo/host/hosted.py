"""A federation whose silos are virtual ones of one host."""

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from fedrt.daemon import Lifecycle
from silo.host import app
from silo.host.config import load_host_config
from silo.sources import DataSource, ModelSource
from silo.vault import Vault
from silo.work import Worker, WorkerReport
from silo.worker import ProcessWorker
from tests.fakes.federation import Daemon, Federation
from tests.fakes.workers import FakeWorker, report
from tests.silo.host.fake_child import PROGRAM


def names(count: int) -> tuple[str, ...]:
    return tuple(f"silo-{number:02d}" for number in range(1, count + 1))


def write_files(root: Path, train: int, test: int) -> Path:
    """So many files of each of two classes; what they hold matters only to those who decode them."""
    for split, count in (("train", train), ("test", test)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                (root / split / label / f"{number:03d}.png").write_bytes(f"{split} {label} {number}".encode())
    return root


class Told(Lifecycle):
    """Remembers what it told the service manager."""

    def __init__(self) -> None:
        super().__init__()
        self.statuses: list[str] = []
        self.is_ready = asyncio.Event()

    def ready(self, status: str) -> None:
        self.statuses.append(f"ready: {status}")
        self.is_ready.set()

    def status(self, text: str) -> None:
        self.statuses.append(text)


def instant(data: Mapping[str, DataSource]) -> Worker:
    """A worker in this process that answers at once."""
    return FakeWorker(description=hosting(tuple(data)))


def hosting(silos: tuple[str, ...], examples: int = 10) -> WorkerReport:
    counts = {name: {"train": {"cat": examples}, "test": {"dog": 2}} for name in silos}
    return replace(report(), class_counts={}, hosted=counts)


def with_child(data: Mapping[str, DataSource]) -> Worker:
    """A worker with a child process that answers as a test tells it."""
    return ProcessWorker(ModelSource("fake", "here"), data, 1, structlog.get_logger("silo"), PROGRAM)


@dataclass
class HostedFederation(Federation):
    """A host with all the silos that are named at construction, in this process or in one of its own."""

    silos: tuple[str, ...] = names(3)
    told: Told | None = field(default=None)

    @property
    def state(self) -> Path:
        return self.directory / "host"

    def host_yaml(
        self, partition: str = "", model: str = "", identities: Path | None = None, log: str = "error"
    ) -> Path:
        root = self.directory / "images"
        if not root.exists():
            write_files(root, len(self.silos), len(self.silos))
        path = self.directory / "host.yaml"
        path.write_text(
            f"coordinator: {{session_address: 'localhost:{self.dial_port or self.port}'}}\n"
            f"identities: {identities or self.directory / 'certs/silos'}\nstate_directory: {self.state}\n"
            f"model: {model or '{architecture: fedrt-tiny, weights: embedded}'}\n"
            f"data: {{root: {root}, layout: image_folder}}\n"
            f"partition: {partition or f'{{kind: iid, silos: {len(self.silos)}}}'}\n"
            f"shutdown_grace: 5s\nreconnect: {{initial: 50ms, max: 200ms}}\nlog: {{level: {log}}}\n"
        )
        return path

    def start_host(self, make_worker: app.MakeWorker = instant, identities: Path | None = None) -> Daemon:
        self.told = Told()
        config = load_host_config(self.host_yaml(identities=identities))
        daemon = Daemon(self.told, asyncio.create_task(app.serve_with(config, self.told, make_worker)))
        self.running["host"] = daemon
        return daemon

    async def ready(self, limit: float = 20) -> None:
        """Wait until the host says that all sessions are open, or fail with what ended it."""
        assert self.told is not None
        said = asyncio.create_task(self.told.is_ready.wait())
        host = self.running["host"].task
        await asyncio.wait({said, host}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if host.done():
            host.result()
        assert said.done(), self.told.statuses
        said.cancel()

    def silo_directory(self, name: str) -> Path:
        return self.state / "silos" / name

    def spooled(self, name: str) -> list[Path]:
        return list((self.silo_directory(name) / "spool").glob("*.safetensors"))

    def own(self, name: str, experiment: str) -> float:
        """The private tensor that counts accepted rounds."""
        held = Vault(self.silo_directory(name) / "vault").load(experiment, sys.maxsize)
        return float(held["own"][0]) if held else 0.0


@dataclass(frozen=True)
class Reins:
    """How a test holds up the fake child and learns what it did."""

    directory: Path

    def hold(self, *silos: str) -> None:
        for name in silos:
            (self.directory / f"hold-{name}").touch()

    def release(self, *silos: str) -> None:
        for name in silos:
            (self.directory / f"hold-{name}").unlink(missing_ok=True)

    def begun(self) -> list[dict[str, object]]:
        """The orders that any child has begun, oldest first."""
        path = self.directory / "begun.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    async def until_begun(self, task: str, limit: float = 20) -> int:
        """Wait until an order is being done; returns the child's process id."""
        async with asyncio.timeout(limit):
            while True:
                found = [line for line in self.begun() if line["task"] == task]
                if found:
                    return int(str(found[-1]["pid"]))
                await asyncio.sleep(0.01)


def command(config: Path) -> list[object]:
    """The host daemon with the fake child as a process of its own."""
    return [sys.executable, "-m", "tests.silo.host.fake_host", config]
