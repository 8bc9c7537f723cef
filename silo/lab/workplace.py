"""Where a federation of the lab lives: its certificates, YAML files, states and logs, written as one would by hand."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from certs.throwaway import Plan, prepare
from fedrt.statefile import ensure_private_directory, storage_error
from fedrt.yaml_text import dump_mapping
from silo.demo.directory import MAX_SOCKET_PATH_BYTES
from silo.lab.grid import Dealt, FederationPlan, digest_of
from silo.lab.sections import DIGEST_CHARACTERS, LabFile
from silo.partition.collection import CollectionSection

FEDERATION = "lab"
CERTIFICATE_LIFE = timedelta(days=60)
LONGEST_SOCKET_NAME = "coordinator.notify"


@dataclass(frozen=True)
class Workplace:
    """Where things lie below a federation's directory, and where its Unix sockets do, whose paths must be short."""

    root: Path
    sockets: Path

    @property
    def certs(self) -> Path:
        """Keys and certificates of a throw-away federation."""
        return self.root / "certs"

    @property
    def logs(self) -> Path:
        """What the daemons said."""
        return self.root / "logs"

    @property
    def admin_socket(self) -> Path:
        """Where the coordinator listens to operators: right here, or with the other sockets if they are elsewhere."""
        return (self.root if self.sockets.parent == self.root else self.sockets) / "admin.sock"

    def yaml(self, name: str) -> Path:
        """The YAML file of the coordinator or the host."""
        return self.root / f"{name}.yaml"


def workplaces(directory: Path, plan: FederationPlan) -> list[Path]:
    """Where a setting with a seed has been run: a directory for each division of the images, and weights, it had."""
    return sorted((directory.absolute() / "work").glob(f"{plan.name}-{'[0-9a-f]' * DIGEST_CHARACTERS}"))


def workplace_of(lab: LabFile, plan: FederationPlan, dealt: Dealt, weights: str) -> Workplace:
    """The directory of a federation that works on exactly these images and weights; kept from run to run.

    Sockets are made anew, elsewhere if the path would be too long. Raises `StorageError`.
    """
    suffix = digest_of([dealt.digest, lab.model.architecture, weights])[:DIGEST_CHARACTERS]
    root = lab.directory.absolute() / "work" / f"{plan.name}-{suffix}"
    ensure_private_directory(root)
    sockets = root / "sockets"
    if len(str(sockets / LONGEST_SOCKET_NAME).encode()) > MAX_SOCKET_PATH_BYTES:
        # always the same one, so that the next run clears up after one that was killed
        sockets = Path(tempfile.gettempdir()) / f"fedrt-lab-{os.geteuid()}-{digest_of(str(root))[:16]}"
    shutil.rmtree(sockets, ignore_errors=True)
    ensure_private_directory(sockets)
    return Workplace(root, sockets)


def write_certificates(place: Workplace, dealt: Dealt) -> None:
    """Make what is missing of the coordinator's and the silos' certificates, and renew them. Raises `FedrtError`."""
    prepare(place.certs, Plan(FEDERATION, tuple(dealt.holdings), life=CERTIFICATE_LIFE), datetime.now(UTC))


def write_daemon_files(
    place: Workplace, lab: LabFile, plan: FederationPlan, images: CollectionSection, port: int
) -> None:
    """Write coordinator.yaml and host.yaml. Raises `StorageError`."""
    _write(place.yaml("coordinator"), _COORDINATOR, _coordinator(place, port))
    _write(place.yaml("host"), _HOST, _host(lab, plan, images, port))


def _coordinator(place: Workplace, port: int) -> dict[str, Any]:
    return {
        "federation": FEDERATION,
        "listen": {"session": f"127.0.0.1:{port}"},
        "identity": {"directory": "certs/coordinator"},
        "state_directory": "state/coordinator",
        "admin_socket": str(place.admin_socket),
        # the cores are busy with training: a late heartbeat is no reason to take a silo for lost
        "heartbeat_interval": "5s",
        "silence_limit": "2m",
        "limits": {"max_sessions": 100_000},
        "shutdown_grace": "3s",
    }


def _host(lab: LabFile, plan: FederationPlan, images: CollectionSection, port: int) -> dict[str, Any]:
    return {
        "federation": FEDERATION,
        "coordinator": {"session_address": f"127.0.0.1:{port}"},
        "identities": "certs/silos",
        "state_directory": "state/host",
        "model": lab.model.model_dump(mode="json"),
        "data": images.model_dump(mode="json"),
        "partition": plan.partition.model_dump(mode="json"),
        "features": {"directory": str(lab.directory.absolute() / "work" / "features")},  # one for all federations
        "shutdown_grace": "1s",
        "reconnect": {"initial": "200ms", "max": "2s"},
    }


def _write(path: Path, heading: str, values: dict[str, Any]) -> None:
    try:
        path.write_text(heading + dump_mapping(values), encoding="utf-8")
    except OSError as error:
        raise storage_error("write", path, error) from error


_COORDINATOR = """\
# Written by fedrt-lab. By hand:  fedrt-coordinator run --config coordinator.yaml
"""
_HOST = """\
# Written by fedrt-lab. By hand:  fedrt-silo host --config host.yaml
"""
