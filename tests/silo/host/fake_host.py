"""The host daemon without CLIP: python -m tests.silo.host.fake_host YAML [--instant].

Its worker is a child process that needs no CLIP, or, with --instant, one in this process that answers at once.
"""

import sys
from pathlib import Path

from fedrt.daemon import run_daemon
from fedrt.log import configure_logging
from silo.host.app import serve, serve_with
from silo.host.config import load_host_config
from tests.silo.host.fake_child import PROGRAM
from tests.silo.host.hosted import instant

if __name__ == "__main__":
    config = load_host_config(Path(sys.argv[1]))
    configure_logging(config.log.level, config.log.format)
    if "--instant" in sys.argv:
        sys.exit(run_daemon(lambda lifecycle: serve_with(config, lifecycle, instant)))
    sys.exit(run_daemon(lambda lifecycle: serve(config, lifecycle, PROGRAM)))
