"""`fedrt-silo run` with crash points: python -m tests.chaos.silo_process YAML numpy|clip; clip is the real worker."""

import functools
import sys

from fedrt.daemon import prepare_grpc

prepare_grpc()  # before anything imports grpc

from silo import agent, app, cli, worker_main  # noqa: E402
from silo.config import SiloConfig, data_source, model_source  # noqa: E402
from silo.work import OWN  # noqa: E402
from silo.worker import ProcessWorker, WorkerLog  # noqa: E402
from tests.chaos import crash_points, refusing_disk  # noqa: E402
from tests.chaos.crash_points import Role  # noqa: E402
from tests.chaos.hooks import Hooks  # noqa: E402

PROGRAM = (sys.executable, "-P", "-m", "tests.chaos.worker_process")
PROGRESS_INTERVAL = 0.05  # seconds; the work of these silos is too short for the usual one


@functools.wraps(app.own_worker)
def numpy_worker(config: SiloConfig, log: WorkerLog) -> ProcessWorker:
    """A worker process that computes with numpy."""
    return ProcessWorker(model_source(config), {OWN: data_source(config)}, None, log, program=PROGRAM)


if __name__ == "__main__":
    worker_main.die_with_parent()  # a run that is killed leaves nothing behind
    _, yaml, kind = sys.argv
    hooks = Hooks.from_environment()
    crash_points.install(Role.SILO, hooks)
    refusing_disk.install(Role.SILO, hooks)
    agent.PROGRESS_INTERVAL = PROGRESS_INTERVAL
    if kind == "numpy":
        app.own_worker = numpy_worker
    sys.argv = ["fedrt-silo", "run", "--config", yaml]
    cli.main()
