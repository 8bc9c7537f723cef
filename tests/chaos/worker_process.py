"""A worker process whose training is numpy arithmetic: every bit depends on shared, private, seed and round.

So a private tensor that advanced twice or not at all, a task that began from outdated tensors and a result that was
counted twice each end in another digest. An evaluation's metric is a digest of what it was given, as a fraction.
"""

import hashlib
import logging
import signal
import socket
import sys
import time
import zlib

import numpy as np

from fedrt.task import TaskKind
from fedrt.tensors import Array, Scope, Tensors, initial_tensors, of_scope, seeded_generator
from silo.work import OWN, OnProgress, WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import Load
from silo.worker_main import LOG_FORMAT, die_with_parent, serve

WEIGHTS = "cd" * 32
CONTEXT_DIM = 64
METHODS = ("promptfl", "fedotp", "fedpgp", "promptfolio")
STEPS = 6


def example_count(silo: str) -> int:
    """How many examples a silo has: from its name."""
    return 10 + zlib.crc32(silo.encode()) % 90


def perform(order: WorkOrder, silo: str, on_progress: OnProgress) -> WorkOutcome:
    """Do the work, at once but for what `on_progress` does."""
    specs = order.local.tensors()
    private: Tensors = order.private or initial_tensors(of_scope(specs, Scope.PRIVATE), order.local.seed)
    if order.kind is TaskKind.EVALUATE:
        on_progress(STEPS, STEPS)
        return WorkOutcome({}, {}, example_count(silo), {"accuracy": _fraction(order.shared, private)}, 0.0)
    here = {name: np.array(array) for name, array in order.shared.items()}
    own = {name: np.array(array) for name, array in private.items()}
    for step in range(STEPS):
        _move(here, own, order, step)
        on_progress(step + 1, STEPS)
    delta = {name: np.subtract(here[name], order.shared[name], dtype=np.float32) for name in here}
    return WorkOutcome(delta, own, example_count(silo), {"loss": _fraction(here, own)}, 0.0)


def _move(here: dict[str, Array], own: dict[str, Array], order: WorkOrder, step: int) -> None:
    """One step: shared and private tensors move by a seeded draw and by a bounded function of each other's mean."""
    pull = np.float32(0.1) * np.tanh(np.float32(sum(array.mean() for array in own.values())))
    push = np.float32(0.1) * np.tanh(np.float32(sum(array.mean() for array in here.values())))
    for group, other in ((here, pull), (own, push)):
        for name, array in group.items():
            draw = seeded_generator(order.seed, order.round_number, name, step).standard_normal(array.shape, np.float32)
            group[name] = np.float32(0.95) * array + np.float32(0.01) * draw + np.float32(other)


def _fraction(*groups: Tensors) -> float:
    digest = hashlib.sha256()
    for group in groups:
        for name in sorted(group):
            digest.update(np.ascontiguousarray(group[name]).tobytes())
    return int.from_bytes(digest.digest()[:6], "big") / 2**48


class NumpyBench:
    """Serves orders of one silo."""

    def __init__(self, silo: str) -> None:
        self._silo = silo

    def report(self) -> WorkerReport:
        """What is held."""
        counts = {"train": {"cat": example_count(self._silo)}, "test": {"cat": example_count(self._silo)}}
        return WorkerReport("numpy", WEIGHTS, CONTEXT_DIM, CONTEXT_DIM, "cpu", 1 << 30, counts, 0, METHODS)

    def perform(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        """Do the work in 50 to 400 ms, as the seed says."""
        pause = (0.05 + order.seed % 351 / 1000) / STEPS

        def report(done: int, planned: int) -> None:
            on_progress(done, planned)
            time.sleep(pause)

        return perform(order, self._silo, report)


def open_numpy(load: Load) -> NumpyBench:
    """The bench of the silo whose images lie in a directory of its name."""
    return NumpyBench(load.data[OWN].root.name)


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, open_numpy)
