"""A worker process without CLIP: serves orders like `silo.worker_main`, and misbehaves as the method name says."""

import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from fedrt.errors import ConfigurationError, FailureReason, TensorError, WorkError
from silo.work import OnProgress, WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import Load
from silo.worker_main import LOG_FORMAT, die_with_parent, serve

REPORT = WorkerReport("fake", "0" * 64, 4, 8, "cpu", 1 << 30, {"train": {"a": 3}}, 0, ("promptfl",))


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class FakeBench:
    unreadable = 0

    def report(self) -> WorkerReport:
        counts = {"train": {"a": 3 - self.unreadable}}
        return WorkerReport("fake", "0" * 64, 4, 8, "cpu", 1 << 30, counts, self.unreadable, ("promptfl",))

    def perform(self, order: WorkOrder, on_progress: OnProgress) -> WorkOutcome:
        behaviour = order.local.method_name
        match behaviour:
            case "hang":
                on_progress(0, 0)
                time.sleep(600)
            case "stubborn":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                on_progress(0, 0)
                time.sleep(600)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                print("goodbye " + "x" * 10_000, flush=True)
                os._exit(7)
            case "memory":
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB at /secret")
            case "allocator":
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
            case "library":
                print("UserWarning: a line without a level", flush=True)
            case "environment":
                print("CUBLAS_WORKSPACE_CONFIG is " + os.environ.get("CUBLAS_WORKSPACE_CONFIG", "not set"), flush=True)
            case "bug":
                raise KeyError("/data/patients/jane-doe.png")
            case "work-error":
                raise WorkError(FailureReason.NOT_FINITE, "the loss is not finite")
            case "tensor-error":
                raise TensorError("tensor 'context' is missing")
            case "unreadable":
                self.unreadable += 1
        on_progress(1, 2)
        on_progress(2, 2)
        delta = {name: np.asarray(array) + 1 for name, array in order.shared.items()}
        return WorkOutcome(delta, dict(order.private), 3, {"pid": float(os.getpid())}, 0.5)


def fail_as_told(trouble: Path) -> None:
    """Loading fails as long as this file is there, in the way that it names."""
    match trouble.read_text() if trouble.exists() else "none":
        case "mount":
            raise ConfigurationError(f"data.root '{trouble.parent}' does not exist; create it or correct the path")
        case "device":
            raise RuntimeError("CUDA error: no CUDA-capable device is detected")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def open_fake(load: Load) -> FakeBench:
    match load.model.weights:
        case str(told) if told.startswith("trouble:"):
            fail_as_told(Path(told.removeprefix("trouble:")))
        case "missing":
            raise ConfigurationError("model.weights 'missing' does not exist; copy it there")
        case "crash":
            os._exit(3)
        case "bug":
            raise KeyError("secret")
    print("INFO loaded", file=sys.stderr, flush=True)
    print("a line of a library", flush=True)
    return FakeBench()


if __name__ == "__main__":
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, open_fake)
