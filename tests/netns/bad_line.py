"""A federation across a bad line: the coordinator's process in one network namespace, the silos' in the other."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.processes import SCRIPTS
from tests.fakes.federation import Federation
from tests.netns.line import ADDRESSES

PORT = 7443  # in a namespace of our own nobody else has it
LIMIT = 100.0  # seconds that anything may take


@dataclass
class BadLine:
    """The line of `tests.netns.line` and the processes at its ends, all of which end with it."""

    directory: Path
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    place: tuple[str, ...] = ()  # the line's process, and the files of the namespaces

    @contextlib.contextmanager
    def laid(self) -> Iterator["BadLine"]:
        """Skips the test where the kernel does not allow it."""
        command = [sys.executable, "-m", "tests.netns.line"]
        self._line = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            word, *self.place = self._line.stdout.readline().split()
            if word == "refused:":
                pytest.skip(f"no network namespaces with TUN devices here: {' '.join(self.place)}")
            assert word == "ready"
            yield self
        finally:
            for process in reversed(self.running):
                process.kill()
                process.wait()
            self._line.stdin.close()
            self._line.wait(LIMIT)
            self._line.stdout.close()

    def order(self, word: str) -> None:
        """`cut`, `mend`, `down` or `up`."""
        print(word, file=self._line.stdin, flush=True)
        assert self._line.stdout.readline() == "done\n"

    def start(self, end: str, name: str, *command: object) -> None:
        """A process at end `a` or `b`; what it says is in NAME.log."""
        pid, *files = self.place
        inside = [sys.executable, "-m", "tests.netns.enter", pid, files["ab".index(end)], *map(str, command)]
        with (self.directory / f"{name}.log").open("w") as log:
            self.running.append(subprocess.Popen(inside, stdout=log, stderr=log, text=True))

    def start_federation(self, federation: Federation) -> None:
        """The coordinator at `a`, all silos at `b`, with the intervals and waits that they have by default."""
        config = federation.directory / "coordinator.yaml"
        config.write_text(
            f"federation: test\nlisten: {{session: '{ADDRESSES['a']}:{PORT}'}}\n"
            f"identity: {{directory: {federation.directory}/certs/coordinator}}\n"
            f"state_directory: {federation.directory}/coordinator\nadmin_socket: {federation.directory}/admin.sock\n"
        )
        self.start("a", "coordinator", SCRIPTS / "fedrt-coordinator", "run", "--config", config)
        until((federation.directory / "admin.sock").exists, "the coordinator does not serve; see coordinator.log")
        root = federation.directory / "data"
        root.mkdir()
        for name in federation.silos:
            path = federation.directory / f"{name}.yaml"
            path.write_text(
                f"coordinator: {{session_address: '{ADDRESSES['a']}:{PORT}', server_name: localhost}}\n"
                f"identity: {{directory: {federation.directory}/certs/silos/{name}}}\n"
                f"state_directory: {federation.directory}/silo-{name}\n"
                f"model: {{architecture: fedrt-tiny, weights: embedded}}\n"
                f"data: {{root: {root}, layout: image_folder}}\n"
            )
            self.start("b", name, sys.executable, "-m", "tests.fakes.instant_silo", path)


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for what nobody tells us."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until_dead(*pids: int) -> None:
    until(lambda: not any(map(alive, pids)), f"some of {pids} are still alive")
