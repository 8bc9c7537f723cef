"""A silo daemon whose worker answers at once, as its own process: python -m tests.fakes.instant_silo YAML."""

import sys
from pathlib import Path

from fedrt.daemon import run_daemon
from fedrt.log import configure_logging
from silo.app import serve_with
from silo.config import load_silo_config
from tests.fakes.workers import FakeWorker

if __name__ == "__main__":
    config = load_silo_config(Path(sys.argv[1]))
    configure_logging("error", "console")
    sys.exit(run_daemon(lambda lifecycle: serve_with(config, lifecycle, FakeWorker())))
