"""A silo daemon with the worker of `tests.fakes.held_worker`, as its own process: python -m ... YAML MARKER."""

import sys
from pathlib import Path

import structlog

from fedrt.daemon import run_daemon
from fedrt.log import configure_logging
from silo.app import serve_with
from silo.config import data_source, load_silo_config, model_source
from silo.work import OWN
from silo.worker import ProcessWorker

if __name__ == "__main__":
    config = load_silo_config(Path(sys.argv[1]))
    configure_logging("info", "console")
    log = structlog.get_logger("silo")
    program = (sys.executable, "-m", "tests.fakes.held_worker", sys.argv[2])
    worker = ProcessWorker(model_source(config), {OWN: data_source(config)}, 1, log, program)
    sys.exit(run_daemon(lambda lifecycle: serve_with(config, lifecycle, worker)))
