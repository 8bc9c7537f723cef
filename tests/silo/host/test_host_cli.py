"""`fedrt-silo host` and `fedrt-silo partition` as their operator meets them."""

import asyncio
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedrt.errors import ConfigurationError
from fedrt.locking import DirectoryLock
from silo.data import Split, index
from silo.host import app
from silo.host.config import load_host_config
from silo.host.dealing import prepare_parts, show
from silo.sources import DataSource
from tests.cli.processes import SCRIPTS, assert_one_message, managed, run
from tests.fakes.federation import make_spec
from tests.integration.following import State
from tests.silo.host.hosted import HostedFederation, command


@pytest.fixture
def federation(tmp_path: Path) -> HostedFederation:
    return HostedFederation(tmp_path)


# ---- what keeps it from running


def test_a_mistake_in_the_file_ends_with_78(federation: HostedFederation) -> None:
    config = federation.host_yaml()
    config.write_text(config.read_text().replace("identities:", "identity:"))
    for subcommand in ("host", "partition"):
        done = run("fedrt-silo", subcommand, "-c", config)
        assert done.returncode == 78
        assert "identity is not a known key; did you mean 'identities'?" in done.stderr
        assert "Traceback" not in done.stderr


def test_missing_certificates_end_with_77_and_the_command(federation: HostedFederation, tmp_path: Path) -> None:
    for name in federation.silos[1:]:
        shutil.rmtree(tmp_path / "certs/silos" / name)
    done = run("fedrt-silo", "host", "-c", federation.host_yaml())
    made = f"fedrt-certs dev --directory {tmp_path}/certs --federation test --silo=silo-{{02..03}}"
    assert_one_message(done, 77, "2 of 3 virtual silos: 'silo-02', 'silo-03';", made)
    subprocess.run(["bash", "-c", f"{SCRIPTS}/{made}"], check=True, capture_output=True, timeout=60)
    assert all((tmp_path / "certs/silos" / name / "certificate.pem").exists() for name in federation.silos)


def test_more_silos_than_certificates_end_with_77(federation: HostedFederation) -> None:
    done = run("fedrt-silo", "host", "-c", federation.host_yaml("{kind: iid, silos: 5}"))
    assert_one_message(done, 77, "lacks the certificates of 2 of 5 virtual silos: 'silo-04', 'silo-05'")


def test_more_silos_than_the_data_can_serve_end_with_78(federation: HostedFederation) -> None:
    done = run("fedrt-silo", "host", "-c", federation.host_yaml("{kind: pathological, silos: 3}"))
    assert_one_message(done, 78, "partition.silos is 3", "2 classes")


def test_a_state_directory_in_use_ends_with_78(federation: HostedFederation) -> None:
    lock = DirectoryLock(federation.state)
    done = run("fedrt-silo", "host", "-c", federation.host_yaml())
    lock.release()
    assert_one_message(done, 78, f"state_directory '{federation.state}' is in use by another running daemon")


def test_the_state_of_one_silo_in_use_by_its_own_daemon_ends_with_78(federation: HostedFederation) -> None:
    lock = DirectoryLock(federation.silo_directory("silo-02"))
    done = run("fedrt-silo", "host", "-c", federation.host_yaml())
    lock.release()
    assert_one_message(done, 78, f"'{federation.silo_directory('silo-02')}' is in use by another running daemon")


def test_missing_weights_end_with_78(federation: HostedFederation) -> None:
    config = federation.host_yaml(model="{architecture: ViT-B-16, weights: /nowhere/vit.pt}")
    assert_one_message(run("fedrt-silo", "host", "-c", config), 78, "model.weights: file '/nowhere/vit.pt'")


def test_images_that_cannot_be_read_end_with_78(federation: HostedFederation) -> None:
    """The real child opens every file, and those of these tests are none."""
    config = federation.host_yaml(model="{architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}")
    done = run("fedrt-silo", "host", "-c", config)
    assert_one_message(done, 78, "images are unreadable")


def test_the_limit_of_open_files_is_raised_or_complained_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1000))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    app._allow_files(200)
    assert asked == []
    app._allow_files(1000)
    assert asked == [(1000, 1000)]
    with pytest.raises(ConfigurationError, match=r"need up to 1001 open files, but this process may have 1000; raise"):
        app._allow_files(1001)


def test_no_torch_is_loaded_by_the_host_itself() -> None:
    program = "import sys, silo.host.app; print([n for n in ('torch', 'open_clip', 'matplotlib') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---- dealing


def test_partition_prints_draws_and_writes_what_the_host_will_deal(
    federation: HostedFederation, tmp_path: Path
) -> None:
    config, parts, figure = federation.host_yaml(), tmp_path / "parts", tmp_path / "who.png"
    done = run("fedrt-silo", "partition", "-c", config, "--to", parts, "--plot", figure)
    assert (done.returncode, done.stderr) == (0, "")
    for name in federation.silos:
        assert name in done.stdout
    assert f"manifests of 3 silos: {parts}" in done.stdout.splitlines()
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")
    assert not federation.state.exists()  # nothing is locked, and a host may be running
    prepare_parts(load_host_config(config))
    written = {path.name: path.read_bytes() for path in parts.iterdir()}
    assert {path.name: path.read_bytes() for path in (federation.state / "partition").iterdir()} == written
    held = [index(DataSource("manifest", tmp_path / "images", parts / f"{name}.csv")) for name in federation.silos]
    train = [record.path for one in held for record in one.of_split(Split.TRAIN)]
    assert sorted(train) == sorted((tmp_path / "images/train").glob("*/*.png"))


def test_partition_without_options_writes_nothing(federation: HostedFederation, tmp_path: Path) -> None:
    config = federation.host_yaml()
    before = sorted(tmp_path.rglob("*"))
    assert run("fedrt-silo", "partition", "-c", config).returncode == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_a_deal_that_differs_from_the_last_one_is_warned_about(federation: HostedFederation, tmp_path: Path) -> None:
    config = load_host_config(federation.host_yaml())
    with capture_logs() as logs:
        first = prepare_parts(config)
        again = prepare_parts(config)
    assert (first.digest, logs) == (again.digest, [])
    (tmp_path / "images/train/cat/new.png").write_bytes(b"another one")
    with capture_logs() as logs:
        prepare_parts(config)
    assert [entry["event"] for entry in logs] == [
        "the silos hold other images than at the last start; for a fresh start set another state_directory"
    ]


# ---- its life


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_is_ready_serves_and_ends_in_order(
    federation: HostedFederation, tmp_path: Path, number: signal.Signals
) -> None:
    federation.start_coordinator()
    with managed(tmp_path, *command(federation.host_yaml())) as manager:
        ready = await asyncio.to_thread(manager.hear, "READY=1")
        assert f"STATUS=3 of 3 silos connected to localhost:{federation.port}" in ready
        await federation.create("brief", make_spec(2))
        experiment, _ = await federation.finish("brief")
        assert experiment.state == State.STATE_SUCCEEDED
        manager.signal(number)
        await asyncio.to_thread(manager.hear, "STOPPING=1")
        assert await asyncio.to_thread(manager.end) == 0
        assert manager.stderr == ""
    await federation.stop()


async def test_a_terminal_sees_a_table_and_a_log_a_line_for_each_silo(
    federation: HostedFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    partition = prepare_parts(load_host_config(federation.host_yaml()))
    show(partition)
    assert capsys.readouterr().out.count("virtual silo") == 3
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show(partition)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(name in shown.err for name in federation.silos)
