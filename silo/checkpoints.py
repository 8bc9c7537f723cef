"""Checkpoints of a task under way: a file that the worker goes on from after it or the daemon was killed. Never pickle.

A file belongs to one task and is of use for the very same work only: it names a digest of everything that the bits of
the outcome depend on. Whatever is wrong with it, training starts again at the beginning, with the same outcome.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

import fedrt
from fedrt.complaint import Complaint
from fedrt.errors import StorageError
from fedrt.spec import LocalSpec
from fedrt.tensors import Array, Tensors
from silo.examples import Examples
from silo.snapshots import Checkpointer, NoCheckpoints, Snapshot
from silo.tensor_files import read_tensors, write_tensors
from silo.work import WorkOrder

SAVE_INTERVAL = 30.0  # seconds; what a crash may cost, beside the epoch under way
_SPEC: TypeAdapter[LocalSpec] = TypeAdapter(LocalSpec)
_PARAMS, _OPTIMIZER, _SHUFFLE = "params/", "optimizer/", "shuffle"

log = logging.getLogger(__name__)


def checkpoints_of(
    order: WorkOrder, examples: Examples, device: torch.device, clock: Callable[[], float] = time.monotonic
) -> Checkpointer:
    """Where the work of an order is kept; nowhere if the order names no file or the images cannot be told apart."""
    if not order.checkpoint or not examples.digest:
        return NoCheckpoints()
    return FileCheckpointer(Path(order.checkpoint), work_digest(order, examples, device), clock)


def work_digest(order: WorkOrder, examples: Examples, device: torch.device) -> str:
    """Of all that the outcome's bits depend on, as far as this process can know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    facts = {
        "experiment_id": order.experiment_id,
        "kind": order.kind.value,
        "local": _SPEC.dump_python(order.local, mode="json"),
        "round_number": order.round_number,
        "seed": order.seed,
        "silo": order.silo,
        "shared": _digests(order.shared),
        "private": _digests(order.private),
        "examples": [len(examples), examples.view_count, examples.digest],
        "labels": sha256(examples.labels.cpu().numpy().tobytes()).hexdigest(),
        "versions": [fedrt.__version__, str(torch.__version__)],
        "device": [str(device), name, torch.get_num_threads()],
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class FileCheckpointer:
    """Keeps the latest snapshot of one order in a file, one at most every 30 seconds."""

    def __init__(self, path: Path, work: str, clock: Callable[[], float], interval: float | None = None) -> None:
        self._path = path
        self._work = work
        self._clock = clock
        self._interval = SAVE_INTERVAL if interval is None else interval
        self._saved = clock()
        self._complaint = Complaint(clock)

    def load(self) -> Snapshot | None:
        """None if there is no file, if it is of other work, or damaged, which the log then says."""
        try:
            if not self._path.exists():
                return None
            tensors, about = read_tensors(self._path)
            if about.get("work") != self._work:
                log.warning("a checkpoint is of other work; the task starts again")
                return None
            snapshot = _snapshot(tensors, about)
        except (OSError, StorageError, KeyError, ValueError) as error:
            log.warning("the checkpoint '%s' cannot be used; the task starts again: %s", self._path, error)
            return None
        log.info("the task goes on from its checkpoint after %d local epochs", snapshot.epochs_done)
        return snapshot

    def is_due(self) -> bool:
        """Whether the last one, or the beginning, is long enough ago."""
        return self._clock() - self._saved >= self._interval

    def save(self, snapshot: Snapshot) -> None:
        """Write it durably; a disk that refuses costs nothing but the checkpoint."""
        self._saved = self._clock()
        try:
            write_tensors(self._path, _tensors(snapshot), self._about(snapshot))
        except StorageError as error:
            if self._complaint.is_due(str(error)):
                log.warning("no checkpoint of this task can be kept; it goes on: %s", error)
        else:
            self._complaint.end()

    def _about(self, snapshot: Snapshot) -> dict[str, object]:
        return {
            "work": self._work,
            "epochs_done": snapshot.epochs_done,
            "mean_loss": snapshot.mean_loss,
            "scaler": dict(snapshot.scaler),
        }


def _tensors(snapshot: Snapshot) -> dict[str, Array]:
    named = {_PARAMS + name: tensor for name, tensor in snapshot.params.items()}
    for index, state in snapshot.optimizer.items():
        named |= {f"{_OPTIMIZER}{index}/{key}": tensor for key, tensor in state.items()}
    named[_SHUFFLE] = snapshot.shuffle
    return {name: tensor.cpu().numpy() for name, tensor in named.items()}


def _snapshot(tensors: Tensors, about: Mapping[str, object]) -> Snapshot:
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, array in tensors.items():
        if name.startswith(_OPTIMIZER):
            index, key = name.removeprefix(_OPTIMIZER).split("/", 1)
            optimizer.setdefault(int(index), {})[key] = _copied(array)
    params = {name.removeprefix(_PARAMS): _copied(a) for name, a in tensors.items() if name.startswith(_PARAMS)}
    return Snapshot(
        epochs_done=TypeAdapter(int).validate_python(about["epochs_done"]),
        mean_loss=TypeAdapter(float).validate_python(about["mean_loss"]),
        params=params,
        optimizer=optimizer,
        scaler=TypeAdapter(dict[str, float]).validate_python(about["scaler"]),
        shuffle=_copied(tensors[_SHUFFLE]),
    )


def _copied(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array))  # torch's own memory is aligned, and may be written to


def _digests(tensors: Tensors) -> dict[str, list[object]]:
    return {
        name: [array.dtype.str, list(array.shape), sha256(array.tobytes()).hexdigest()]
        for name, array in tensors.items()
    }
