"""`fedrt-coordinator run` with crash points: python -m tests.chaos.coordinator_process YAML."""

import sys

from fedrt.daemon import prepare_grpc

prepare_grpc()  # before anything imports grpc

from coordinator import app, cli  # noqa: E402
from silo.worker_main import die_with_parent  # noqa: E402
from tests.chaos import crash_points, refusing_disk  # noqa: E402
from tests.chaos.crash_points import Role  # noqa: E402
from tests.chaos.hooks import Hooks  # noqa: E402

if __name__ == "__main__":
    die_with_parent()  # a run that is killed leaves nothing behind
    assert app is not None
    hooks = Hooks.from_environment()
    crash_points.install(Role.COORDINATOR, hooks)
    refusing_disk.install(Role.COORDINATOR, hooks)
    sys.argv = ["fedrt-coordinator", "run", "--config", sys.argv[1]]
    cli.main()
