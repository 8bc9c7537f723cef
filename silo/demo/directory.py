"""The demo's directory: what lies where, and the YAML files, written as one would write them by hand."""

import hashlib
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedrt.errors import ConfigurationError
from fedrt.locking import DirectoryLock
from fedrt.statefile import ensure_private_directory, storage_error
from silo.demo.hospitals import SILOS
from silo.demo.recipes import Recipe

MARKER = ".fedrt-demo"
KEPT = {MARKER, "lock", "certs"}  # of an earlier run; fedrt-certs keeps what is still valid
FEDERATION = "demo"
OPERATOR = "operator"
MAX_SOCKET_PATH_BYTES = 107
LONGEST_SOCKET_NAME = "coordinator.notify"


@dataclass(frozen=True)
class Layout:
    """Where things lie below the demo's directory."""

    root: Path

    @property
    def certs(self) -> Path:
        """Keys and certificates of the throw-away federation."""
        return self.root / "certs"

    @property
    def images(self) -> Path:
        """A folder of images per silo."""
        return self.root / "images"

    @property
    def logs(self) -> Path:
        """What the daemons said."""
        return self.root / "logs"

    @property
    def export(self) -> Path:
        """Where the trained prompt goes."""
        return self.root / "export"

    @property
    def summary(self) -> Path:
        """All figures, for programs."""
        return self.root / "summary.json"

    @property
    def curves(self) -> Path:
        """All figures, for people."""
        return self.root / "curves.png"

    def yaml(self, name: str) -> Path:
        """The YAML file of a daemon or an experiment."""
        return self.root / f"{name}.yaml"

    def departures(self, silo: str) -> Path:
        """The silo's own record of what left it."""
        return self.root / "state" / silo / "departures.jsonl"

    def sockets(self) -> Path:
        """A directory for Unix sockets, whose paths must be short: here, or else a new temporary one."""
        here = self.root / "sockets"
        fits = len(str(here / LONGEST_SOCKET_NAME).encode()) <= MAX_SOCKET_PATH_BYTES
        return here if fits else Path(tempfile.mkdtemp(prefix="fedrt-demo-"))

    def admin_socket(self, sockets: Path) -> Path:
        """Where fedrtctl connects to: right here, or with the other sockets if they must be elsewhere."""
        return (self.root if sockets.is_relative_to(self.root) else sockets) / "admin.sock"


def open_directory(root: Path) -> tuple[Layout, DirectoryLock]:
    """An empty directory but for certificates, held by the lock. Raises `ConfigurationError` if it holds other things.

    Only what an earlier demo has left is removed, which the marker tells.
    """
    root = root.absolute()
    if root.is_dir() and any(root.iterdir()) and not (root / MARKER).exists():
        raise ConfigurationError(
            f"directory '{root}' holds files that are not the demo's; choose another one with --directory"
        )
    ensure_private_directory(root)
    (root / MARKER).touch()
    try:
        lock = DirectoryLock(root)
    except ConfigurationError:
        raise ConfigurationError(
            f"another demo runs in '{root}'; wait for its end, or choose another --directory"
        ) from None
    try:
        for entry in root.iterdir():
            if entry.name in KEPT:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        raise storage_error("empty", root, error) from error
    return Layout(root), lock


def write_daemon_files(layout: Layout, port: int, admin_socket: Path) -> None:
    """Write coordinator.yaml and a YAML file per silo."""
    place = admin_socket.relative_to(layout.root) if admin_socket.is_relative_to(layout.root) else admin_socket
    layout.yaml("coordinator").write_text(_COORDINATOR.format(port=port, socket=place, federation=FEDERATION))
    for silo in SILOS:
        layout.yaml(silo).write_text(_SILO.format(silo=silo, port=port, federation=FEDERATION))


def write_experiment_files(layout: Layout, recipe: Recipe, weights_path: Path) -> None:
    """Write zeroshot.yaml and promptfl.yaml."""
    common = {
        "digest": hashlib.sha256(weights_path.read_bytes()).hexdigest(),
        "classes": "\n".join(f"  - {name}" for name in recipe.classes),
        "silos": ", ".join(SILOS),
        "seed": recipe.seed,
    }
    layout.yaml("zeroshot").write_text(_ZEROSHOT.format(**common))
    layout.yaml("promptfl").write_text(_PROMPTFL.format(**common, **vars(recipe.prompt)))


def free_port() -> int:
    """A TCP port on which nobody listens on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_COORDINATOR = """\
# The coordinator of the demo: it decides rounds and averages what the silos send. It sees no image.
# By hand:  fedrt-coordinator run --config coordinator.yaml

federation: {federation}
listen:
  session: "127.0.0.1:{port}" # where the silos connect to; TLS with certificates on both sides
  # admin: "127.0.0.1:7445" # for operators on other computers; without it, only the socket below
identity:
  directory: certs/coordinator # private key, certificate and trust bundle
state_directory: state/coordinator # experiments, rounds and tensors
admin_socket: {socket} # where fedrtctl connects to
log: {{level: info, format: console}}
shutdown_grace: 3s
"""
_SILO = """\
# The silo of hospital "{silo}": it connects outwards only, and its images stay in the folder named below.
# By hand:  fedrt-silo run --config {silo}.yaml

federation: {federation}
coordinator:
  session_address: "127.0.0.1:{port}"
identity:
  directory: certs/silos/{silo} # private key, certificate and trust bundle
state_directory: state/{silo} # tasks, results under way, and departures.jsonl: all that left the building
model:
  architecture: fedrt-tiny # the small CLIP that comes with fedrt
  weights: embedded
  device: cpu
  threads: 1 # three silos share this machine's cores
data:
  root: images/{silo}
  layout: image_folder # one directory per class, below train/ and test/
features:
  directory: state/features # computed once; in a hospital this is the silo's own directory
policy:
  methods: [zeroshot, promptfl] # what may run here; nobody else can change it
  experiments: ["*"]
  min_examples: 20
log: {{level: info, format: console}}
shutdown_grace: 2s # in a hospital rather 5m: time for work under way
reconnect: {{initial: 200ms, max: 2s}}
"""
_ZEROSHOT = """\
# What CLIP knows already: the handcrafted prompt "a photo of a <class>.", nothing trained. The silos evaluate it once.
# By hand:  fedrtctl create zeroshot.yaml --watch

experiment: zeroshot
method:
  name: zeroshot
model:
  architecture: fedrt-tiny
  weights_sha256: {digest}
classes:
{classes}
rounds:
  count: 0 # only evaluate
  time_limit: 5m
  silos: [{silos}]
seed: {seed}
"""
_PROMPTFL = """\
# PromptFL: the silos learn {context_length} context vectors together; the rest of CLIP stays frozen.
# By hand:  fedrtctl create promptfl.yaml --watch

experiment: promptfl
method:
  name: promptfl
  context_length: {context_length}
model:
  architecture: fedrt-tiny
  weights_sha256: {digest} # a silo with other weights refuses
classes:
{classes}
training: # at each silo, in each round
  local_epochs: {local_epochs}
  batch_size: {batch_size}
  optimizer: {{name: {optimizer}, learning_rate: {learning_rate}, momentum: 0.9, weight_decay: 0.0}}
  schedule: cosine # over all rounds
rounds:
  count: {rounds}
  time_limit: 5m
  silos: [{silos}] # begins when all three are connected
evaluation:
  every: 1
seed: {seed}
"""
