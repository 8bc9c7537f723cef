import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import CoordinatorConfig, load_coordinator_config
from fedrt.config import effective_yaml
from fedrt.errors import ConfigurationError

TEXT = """
federation: demo
listen: {session: "127.0.0.1:7443"}
identity: {directory: identity}
state_directory: state
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def write_and_load(text: str) -> CoordinatorConfig:
        path = tmp_path / "coordinator.yaml"
        path.write_text(text)
        return load_coordinator_config(path)

    return write_and_load


def test_defaults(load: Any, tmp_path: Path) -> None:
    config = load(TEXT)
    assert config.admin_socket == tmp_path / "state" / "admin.sock"
    assert (config.heartbeat_interval, config.silence_limit, config.shutdown_grace) == (2.5, 5.0, 30.0)
    assert (config.limits.max_payload, config.limits.max_sessions) == (256 * 1024**2, 1000)
    assert (config.listen.admin, config.metrics) == (None, None)
    assert config.retention.updates == math.inf


def test_every_key(load: Any) -> None:
    config = load(
        TEXT.replace('7443"', '0", admin: "[::1]:0"')
        + """
admin_socket: /run/admin.sock
heartbeat_interval: 1s
silence_limit: 2s
limits: {max_payload: 1GiB, max_sessions: 5}
retention: {updates: 90d}
metrics: {listen: "127.0.0.1:0"}
log: {level: debug, format: json}
shutdown_grace: 0s
"""
    )
    assert config.admin_socket == Path("/run/admin.sock")
    assert config.listen.admin == "[::1]:0"
    assert (config.limits.max_payload, config.shutdown_grace) == (1024**3, 0.0)
    assert config.retention.updates == 90 * 86_400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("admin_sock: x", "admin_sock is not a known key; did you mean 'admin_socket'?"),
        (
            "silence_limit: 4s",
            "silence_limit is 4s, less than two heartbeat_interval of 2500ms; set silence_limit to 5s",
        ),
        ("heartbeat_interval: 0s", "heartbeat_interval must be between 100ms and 10m; got '0s'"),
        (
            "limits: {max_payload: 1B}",
            "limits: max_payload is 1B; it must be between 64KiB and 1024GiB, such as 256MiB",
        ),
        ("limits: {max_sessions: 0}", "limits.max_sessions must be at least 1; got 0"),
        ("retention: {updates: 59m}", "retention.updates must be between 1h and 36500d, or forever; got '59m'"),
        ("retention: {updates: 36501d}", "retention.updates must be between 1h and 36500d, or forever"),
        ("retention: {updates: ever}", "largest unit first; or forever; got 'ever'"),
        ("retention: {updates: 5}", "retention.updates must be a duration with a unit"),
        ("metrics: {listen: ':1'}", "metrics.listen must name a host; write '127.0.0.1:1' for this machine"),
        (
            f"admin_socket: /{'x' * 107}",
            "is 108 bytes long, and the path of a Unix socket may have 107; set admin_socket",
        ),
    ],
)
def test_messages(load: Any, line: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(f"{TEXT}{line}\n")
    assert message in str(caught.value)


def test_two_listeners_at_one_address(load: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"session and admin are both '127.*give admin another port"):
        load(TEXT.replace('7443"', '7443", admin: "127.0.0.1:7443"'))


def test_long_state_directory(load: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"set admin_socket to a shorter one such as /run/fedrt/admin\.sock$"):
        load(TEXT.replace("state_directory: state", f"state_directory: /{'x' * 100}"))


def test_a_wrong_state_directory_is_one_problem(load: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"coordinator\.yaml: state_directory must be text; got 5; put it"):
        load(TEXT.replace("state_directory: state", "state_directory: 5"))


def test_effective_configuration_reads_back(load: Any) -> None:
    for text in (TEXT, f"{TEXT}retention: {{updates: forever}}\n", f"{TEXT}retention: {{updates: 1d12h}}\n"):
        config = load(text)
        assert load(effective_yaml(config)) == config
    assert "updates: forever" in effective_yaml(load(TEXT))


def test_configuration_needs_neither_silo_nor_torch() -> None:
    code = "import sys, coordinator.config; print('torch' in sys.modules, 'silo' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False False\n"
