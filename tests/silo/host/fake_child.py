"""A worker process without CLIP for many virtual silos; a test holds it up and reads what it did through a directory.

The directory is named by FEDRT_TEST_CHILD. `begun.jsonl` there gets a line when an order begins. While `hold-<silo>`
exists there, an order of that silo does not end.
"""

import json
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from fedrt.tensors import Scope, of_scope
from silo.data import index
from silo.work import OWN, OnProgress, WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import Load
from silo.worker_main import LOG_FORMAT, die_with_parent, serve
from tests.fakes.workers import WEIGHTS

PROGRAM = (sys.executable, "-m", "tests.silo.host.fake_child")


class FakeBench:
    """Adds one to every shared tensor, and counts the accepted rounds in a private one."""

    def __init__(self, load: Load) -> None:
        counts = {silo: index(source).class_counts for silo, source in load.data.items()}
        methods = ("promptfl", "zeroshot")
        self._report = WorkerReport("ViT-B-16", WEIGHTS, 512, 512, "cpu", 0, counts.pop(OWN, {}), 0, methods, counts)

    def report(self) -> WorkerReport:
        return self._report

    def perform(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        if place := os.environ.get("FEDRT_TEST_CHILD"):
            self._wait(Path(place), order, on_progress)
        return plus_one(order, sum(self._report.hosted[order.silo]["train"].values()))

    @staticmethod
    def _wait(place: Path, order: WorkOrder, on_progress: OnProgress) -> None:
        with (place / "begun.jsonl").open("a") as begun:
            begun.write(json.dumps({"silo": order.silo, "task": order.task_id, "pid": os.getpid()}) + "\n")
        while (place / f"hold-{order.silo}").exists():
            on_progress(0, 0)
            time.sleep(0.005)


def plus_one(order: WorkOrder, examples: int) -> WorkOutcome:
    shared = {}
    if order.kind.value == "train":
        shared = {spec.name: np.ones(spec.shape, np.float32) for spec in of_scope(order.local.tensors(), Scope.SHARED)}
    own = order.private.get("own", np.zeros(1, np.float32)) + 1
    return WorkOutcome(shared, {"own": own}, examples, {"accuracy": 0.5}, 0.0)


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, FakeBench)
