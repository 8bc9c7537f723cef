"""`fedrtctl` as an operator uses it: what it prints, and its exit codes."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors import safe_open
from typer.testing import CliRunner

from fedrt.ctl import app
from fedrt.ctl_view import effective_experiment
from fedrt.errors import FailureReason, WorkError
from fedrt.spec import ExperimentSpec, OnTooFew
from tests.fakes.federation import Federation, make_spec
from tests.fakes.workers import FakeWorker, failing

FEDRTCTL = Path(sys.executable).parent / "fedrtctl"
EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "experiment.yaml"


@pytest.fixture
async def federation(tmp_path: Path) -> AsyncIterator[Federation]:
    federation = Federation(tmp_path / "f")
    async with federation.started({"north": FakeWorker(), "south": FakeWorker()}), federation.admin():
        yield federation


async def ctl(federation: Federation, *arguments: object) -> Result:
    socket = str(federation.directory / "admin.sock")
    return await asyncio.to_thread(invoke, "--socket", socket, *arguments)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


async def start_ctl(federation: Federation, *arguments: str) -> asyncio.subprocess.Process:
    """In a process of its own: one that goes on while the test does something else."""
    return await asyncio.create_subprocess_exec(
        str(FEDRTCTL),
        *arguments,
        env=os.environ | {"FEDRT_ADMIN_SOCKET": str(federation.directory / "admin.sock")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 20)).decode()


async def end_of(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    out, complaint = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode, out.decode(), complaint.decode()


def write(federation: Federation, name: str, spec: ExperimentSpec) -> Path:
    path = federation.directory / f"{name}.yaml"
    path.write_text(effective_experiment(name, spec))
    return path


async def test_an_experiment_from_creation_to_export(federation: Federation, tmp_path: Path) -> None:
    path = write(federation, "e1", make_spec(rounds=2, every=1, silos=("north", "south")))
    created = await ctl(federation, "create", path, "--watch")
    assert (created.exit_code, created.stderr) == (0, "")
    lines = created.stdout.splitlines()
    assert lines[0].startswith("experiment 'e1': ")
    assert lines[-1] == "succeeded"
    assert any(line.startswith("round 2 training: ") and "north 1.000, south 1.000" in line for line in lines)
    assert lines.count("running") == 1

    watched = await ctl(federation, "watch", "e1", "--json")
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert watched.exit_code == 0
    assert events[-1]["state"] == "succeeded"
    assert {event["kind"] for event in events} == {"experiment_changed", "round_closed"}

    shown = json.loads((await ctl(federation, "show", "e1", "--json", "--rounds", "0")).stdout)
    assert (shown["state"], shown["round"], shown["spec"]["rounds"]["count"]) == ("succeeded", 2, 2)
    assert [closed["task"] for closed in shown["rounds"]] == ["evaluate", "train", "evaluate", "train", "evaluate"]
    assert shown["rounds"][1]["silos"]["south"]["payload_bytes"] == 16 * 512 * 4
    text = (await ctl(federation, "show", "e1")).stdout
    assert all(part in text for part in ("succeeded", "context_length: 16", "north", "south"))

    await _export(federation, tmp_path / "out" / "deep")


async def _export(federation: Federation, directory: Path) -> None:
    exported = await ctl(federation, "export", "e1", "--to", directory)
    assert exported.exit_code == 0
    prompt, record = directory / "prompt.safetensors", directory / "experiment.json"
    assert exported.stdout.split() == [str(prompt), str(record)]
    with safe_open(prompt, "np") as file:
        metadata = file.metadata()
        assert abs(float(np.mean(file.get_tensor("context"))) - 2.0) < 0.01
    assert (metadata["experiment"], metadata["round"], metadata["method"]) == ("e1", "2", "promptfl")
    assert json.loads(metadata["classes"]) == ["cat", "dog"]
    assert metadata["weights_sha256"] == "ab" * 32
    assert len(json.loads(record.read_text())["rounds"]) == 5

    prompt.write_bytes(b"precious")
    again = await ctl(federation, "export", "e1", "--to", directory)
    assert again.exit_code == 78
    assert again.stderr == f"error: '{prompt}' exists already; choose another directory, or overwrite it with --force\n"
    assert prompt.read_bytes() == b"precious"
    assert (await ctl(federation, "export", "e1", "--to", directory, "--force")).exit_code == 0
    assert len(prompt.read_bytes()) > 16 * 512 * 4
    assert sorted(os.listdir(directory)) == ["experiment.json", "prompt.safetensors"]


async def test_lists(federation: Federation) -> None:
    assert "no experiment yet" in (await ctl(federation, "list")).stdout
    await ctl(federation, "create", write(federation, "e1", make_spec(silos=("west",))))
    listed = json.loads((await ctl(federation, "list", "--json")).stdout)
    assert [(one["experiment"], one["state"], one["method"]) for one in listed] == [("e1", "pending", "promptfl")]
    assert "west" in listed[0]["message"]
    assert "pending" in (await ctl(federation, "list")).stdout
    async with asyncio.timeout(10):
        while len(silos := json.loads((await ctl(federation, "silos", "--json")).stdout)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert [(silo["silo"], silo["connected"], silo["device"]) for silo in silos] == [
        ("north", True, "cpu"),
        ("south", True, "cpu"),
    ]
    assert "north" in (await ctl(federation, "silos")).stdout


async def test_a_failed_experiment_ends_the_watch_with_its_reason(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "f", ("north",))
    broken = FakeWorker(failing(WorkError(FailureReason.OUT_OF_MEMORY, "no memory left")))
    async with federation.started({"north": broken}), federation.admin():
        spec = make_spec(silos=("north",), on_too_few=OnTooFew.FAIL)
        watched = await ctl(federation, "create", write(federation, "e1", spec), "--watch")
    assert watched.exit_code == 1
    assert watched.stderr.startswith("experiment 'e1' failed: round 1 (train) got 0 of the 1 results it needs")
    assert "no memory left" in watched.stderr


async def test_cancel_ends_the_watch(federation: Federation) -> None:
    await ctl(federation, "create", write(federation, "e1", make_spec(silos=("west",))))
    watching = await start_ctl(federation, "watch", "e1")
    assert (await first_line(watching)).startswith("pending")
    cancelled = await ctl(federation, "cancel", "e1")
    assert (cancelled.exit_code, cancelled.stdout) == (0, "experiment 'e1': cancelled, cancelled by an operator\n")
    code, _, complaint = await end_of(watching)
    assert (code, complaint) == (1, "experiment 'e1' was cancelled: cancelled by an operator\n")
    assert (await ctl(federation, "cancel", "e1")).exit_code == 0


async def test_mistakes_get_one_line_and_an_exit_code(federation: Federation, tmp_path: Path) -> None:
    mistyped = tmp_path / "mistyped.yaml"
    mistyped.write_text(effective_experiment("e1", make_spec()).replace("batch_size", "batch_sise"))
    await ctl(federation, "create", write(federation, "e1", make_spec(silos=("west",), method="zeroshot", rounds=0)))
    spec = make_spec(silos=("west",))
    other = write(federation, "e1", replace(spec, local=replace(spec.local, seed=8)))
    for arguments, code, words in (
        (("create", mistyped), 78, "batch_sise"),
        (("create", tmp_path / "none.yaml"), 78, "does not exist"),
        (("create", other), 1, "exists with another specification"),
        (("show", "nobody"), 1, "'nobody' does not exist; `fedrtctl list` shows"),
        (("watch", "nobody"), 1, "'nobody' does not exist"),
        (("cancel", "nobody"), 1, "'nobody' does not exist"),
        (("export", "nobody", "--to", tmp_path / "out"), 1, "'nobody' does not exist"),
        (("export", "e1", "--to", tmp_path / "out"), 1, "no shared tensors yet"),
    ):
        result = await ctl(federation, *arguments)
        assert (result.exit_code, result.stdout) == (code, ""), arguments
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
    assert not (tmp_path / "out").exists()
    assert "did you mean 'batch_size'?" in (await ctl(federation, "create", mistyped)).stderr


def test_no_coordinator(tmp_path: Path) -> None:
    result = invoke("--socket", tmp_path / "admin.sock", "list")
    assert result.exit_code == 75
    assert result.stderr == (
        f"error: socket '{tmp_path}/admin.sock' does not exist; is the coordinator running? If so, give the "
        "admin_socket of its coordinator.yaml with --socket\n"
    )


def test_the_socket_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDRT_ADMIN_SOCKET", str(tmp_path / "elsewhere.sock"))
    assert "elsewhere.sock" in invoke("silos").stderr


def test_address_and_identity_go_together(tmp_path: Path) -> None:
    assert invoke("--address", "localhost:1", "list").exit_code == 2
    assert invoke("--identity", tmp_path, "list").exit_code == 2
    result = invoke("--address", "localhost:1", "--identity", tmp_path, "list")
    assert result.exit_code == 77
    assert "key.pem' is missing" in result.stderr


def test_a_silos_certificate_is_no_operators(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "f", ("north",))
    identity = federation.directory / "certs" / "silos" / "north"
    result = invoke("--address", f"localhost:{federation.port}", "--identity", identity, "list")
    assert result.exit_code == 77
    assert "silo" in result.stderr


def test_check_config_and_schema(tmp_path: Path) -> None:
    checked = invoke("check-config", EXAMPLE)
    assert checked.exit_code == 0
    again = tmp_path / "again.yaml"
    again.write_text(checked.stdout)
    assert invoke("check-config", again).stdout == checked.stdout
    assert json.loads(invoke("schema").stdout)["$schema"].startswith("https://json-schema.org/")
    assert invoke("version").stdout.strip()


async def test_ctrl_c_ends_a_watch_but_not_the_experiment(federation: Federation) -> None:
    await ctl(federation, "create", write(federation, "e1", make_spec(silos=("west",))))
    watching = await start_ctl(federation, "watch", "e1")
    await first_line(watching)
    watching.send_signal(signal.SIGINT)
    code, _, complaint = await end_of(watching)
    assert (code, complaint) == (130, "stopped; the federation goes on\n")
    assert json.loads((await ctl(federation, "show", "e1", "--json")).stdout)["state"] == "pending"


async def test_a_watch_survives_a_restart_of_the_coordinator(federation: Federation) -> None:
    await ctl(federation, "create", write(federation, "e1", make_spec(rounds=1, silos=("west",))))
    watching = await start_ctl(federation, "watch", "e1")
    await first_line(watching)
    await federation.running.pop("coordinator").stop()
    await asyncio.sleep(0.2)
    federation.start_coordinator()
    federation.start_silo("west", FakeWorker())
    code, out, complaint = await end_of(watching)
    assert complaint == ""
    assert code == 0
    assert out.splitlines()[-1] == "succeeded"
