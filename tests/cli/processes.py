"""Console scripts as operators run them: their own processes, with a service manager that listens."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 90.0  # seconds that anything may take, also on a machine with other work
SCRIPTS = Path(sys.executable).parent


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a console script to its end."""
    command = [str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=LIMIT)


def assert_one_message(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """It ended with this code and one line on stderr that holds all the parts."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr


class Manager:
    """What systemd is to a daemon: it starts it, is told how it fares, sends signals and looks at how it ended."""

    def __init__(self, directory: Path, command: list[object]) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(LIMIT)
        address = directory / f"notify-{len(list(directory.glob('notify-*')))}"
        self.socket.bind(str(address))
        self.log = (directory / f"{address.name}.log").open("w+")
        self.process = subprocess.Popen(
            list(map(str, command)),
            stderr=self.log,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"NOTIFY_SOCKET": str(address)},
        )
        self.heard: list[str] = []

    def hear(self, word: str) -> str:
        """Wait until the daemon says this, and return the whole message."""
        while True:
            self.heard.append(self.socket.recv(4096).decode())
            if word in self.heard[-1].split("\n"):
                return self.heard[-1]

    def ends_or_says(self, word: str) -> int | str:
        """Its exit code, or the word if it says that first."""
        self.socket.settimeout(0.05)
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                if word in self.socket.recv(4096).decode().split("\n"):
                    return word
            if self.process.poll() is not None:
                return self.process.returncode
        raise TimeoutError(f"neither the end nor {word}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its end and return the exit code."""
        return self.process.wait(LIMIT)

    @property
    def stderr(self) -> str:
        return Path(self.log.name).read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.socket.close()
        self.log.close()


@contextlib.contextmanager
def managed(directory: Path, *command: object) -> Iterator[Manager]:
    manager = Manager(directory, list(command))
    try:
        yield manager
    finally:
        manager.close()


def coordinator(directory: Path, config: Path) -> contextlib.AbstractContextManager[Manager]:
    return managed(directory, SCRIPTS / "fedrt-coordinator", "run", "--config", config)


def instant_silo(directory: Path, config: Path) -> contextlib.AbstractContextManager[Manager]:
    """The silo daemon with a worker that needs no CLIP."""
    return managed(directory, sys.executable, "-m", "tests.fakes.instant_silo", config)
