"""Where everything of a chaos run lies, and the YAML files of its daemons."""

import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from certs.throwaway import Plan, prepare

HEARTBEAT_INTERVAL = 0.4  # seconds
SILENCE_LIMIT = 2.0  # seconds
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Layout:
    """Directories of one run. `numpy_silos` compute with numpy, `clip_silos` have the real worker."""

    root: Path
    numpy_silos: tuple[str, ...]
    clip_silos: tuple[str, ...] = ()

    @property
    def silos(self) -> tuple[str, ...]:
        """All silos."""
        return (*self.numpy_silos, *self.clip_silos)

    @property
    def daemons(self) -> tuple[str, ...]:
        """All daemons, the coordinator first."""
        return (COORDINATOR, *self.silos)

    @property
    def admin_socket(self) -> Path:
        """Where operators connect to."""
        return self.root / "admin.sock"

    def state(self, name: str) -> Path:
        """The state directory of a daemon."""
        return self.root / "state" / name

    def control(self, name: str) -> Path:
        """What the runner tells a daemon's hooks."""
        return self.root / "control" / name

    def log(self, name: str) -> Path:
        """What a daemon said."""
        return self.root / "logs" / f"{name}.log"

    def yaml(self, name: str) -> Path:
        """The configuration of a daemon."""
        return self.root / f"{name}.yaml"

    def images(self, silo: str) -> Path:
        """A silo's images."""
        return self.root / "images" / silo

    def prepare(self, coordinator_port: int, proxy_ports: dict[str, int]) -> None:
        """Make directories, certificates and YAML files."""
        for name in self.daemons:
            for directory in (self.state(name), self.control(name), self.log(name).parent):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for silo in self.silos:
            self.images(silo).mkdir(mode=0o700, parents=True, exist_ok=True)
        prepare(self.root / "certs", Plan("chaos", self.silos, ("operator",)), datetime.now(UTC))
        self.yaml(COORDINATOR).write_text(
            f"federation: chaos\nlisten: {{session: '127.0.0.1:{coordinator_port}'}}\n"
            f"identity: {{directory: {self.root}/certs/coordinator}}\n"
            f"state_directory: {self.state(COORDINATOR)}\nadmin_socket: {self.admin_socket}\n"
            f"heartbeat_interval: {HEARTBEAT_INTERVAL * 1000:.0f}ms\nsilence_limit: {SILENCE_LIMIT * 1000:.0f}ms\n"
            "shutdown_grace: 3s\nlog: {level: info, format: console}\n"
        )
        for silo in self.silos:
            self.yaml(silo).write_text(
                f"federation: chaos\ncoordinator: {{session_address: 'localhost:{proxy_ports[silo]}'}}\n"
                f"identity: {{directory: {self.root}/certs/silos/{silo}}}\nstate_directory: {self.state(silo)}\n"
                "model: {architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}\n"
                f"data: {{root: {self.images(silo)}, layout: image_folder}}\n"
                f"features: {{directory: {self.root}/features-{silo}}}\n"
                "reconnect: {initial: 50ms, max: 500ms}\nshutdown_grace: 5s\nlog: {level: info, format: console}\n"
            )


def quiet_ports(count: int) -> list[int]:
    """Free ports on loopback that the system gives to nobody who does not ask for them by number.

    A daemon or a proxy that comes back needs its port again: meanwhile an outgoing connection must not get it.
    """
    low = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32768
    found: list[int] = []
    start = 10_000 + secrets.randbelow(10_000)  # other runs look here too
    for port in range(start, low):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"there are no {count} free ports below {low}")
