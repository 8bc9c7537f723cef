"""A method that somebody else has written: packaged, installed, allowed by a site, run, and refused where it must be.

Every program here is a process of its own, and the package is installed for those only that have it in their path.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

PACKAGE = Path(__file__).parent.parent / "thirdparty" / "classbias"
SCRIPTS = Path(sys.executable).parent
LIMIT = 120.0  # seconds that anything may take; these processes share few cores with others
COLOURS = {"green circle": (40, 200, 60), "blue square": (40, 60, 230), "red triangle": (230, 40, 40)}
SILOS = ("north", "south", "strict", "bare", "other")


def install(source: Path, target: Path) -> Path:
    """Build and install a package for those whose path names the target; needs no network and leaves no trace here."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return target


def draw(root: Path, counts: tuple[int, int, int]) -> Path:
    """So many noisy images of each class to train on, and two of each to test on."""
    noise = np.random.default_rng(0)
    for count, (name, colour) in zip(counts, COLOURS.items(), strict=True):
        for split, number in (("train", count), ("test", 2)):
            (root / split / name).mkdir(parents=True)
            for at in range(number):
                pixels = np.clip(np.array(colour) + noise.normal(0, 20, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{at}.png")
    return root


def call(script: str, *arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a console script to its end, with `path` in its PYTHONPATH."""
    command = [str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False, env=environment(path))


def environment(path: Path | None) -> dict[str, str]:
    rest = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return rest | {"PYTHONPATH": str(path)} if path else rest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Federation:
    """A coordinator that has the package, and silos that a test starts, each with the packages it is given."""

    directory: Path
    site: Path  # where the package is installed
    port: int = field(default_factory=free_port)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_coordinator(self) -> None:
        self.yaml("coordinator").write_text(
            f"federation: shapes\nlisten: {{session: '127.0.0.1:{self.port}'}}\n"
            "identity: {directory: certs/coordinator}\nstate_directory: state/coordinator\n"
            "admin_socket: admin.sock\nshutdown_grace: 5s\n"
        )
        self.start("coordinator", "fedrt-coordinator", self.site)
        deadline = time.monotonic() + LIMIT
        while not (self.directory / "admin.sock").exists():
            assert self.running["coordinator"].poll() is None, self.log("coordinator")
            assert time.monotonic() < deadline, self.log("coordinator")
            time.sleep(0.05)

    def start_silo(self, name: str, path: Path | None, images: Path, allowed: str) -> None:
        self.yaml(name).write_text(
            f"coordinator: {{session_address: 'localhost:{self.port}'}}\n"
            f"identity: {{directory: certs/silos/{name}}}\nstate_directory: state/{name}\n"
            "model: {architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}\n"
            f"data: {{root: {images}, layout: image_folder}}\n"
            f"policy: {{methods: [{allowed}]}}\nshutdown_grace: 5s\n"
        )
        self.start(name, "fedrt-silo", path)

    def start(self, name: str, script: str, path: Path | None) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [str(SCRIPTS / script), "run", "--config", str(self.yaml(name))],
                stdout=log,
                stderr=log,
                env=environment(path),
            )

    def stop(self, name: str) -> None:
        """End it in order."""
        process = self.running.pop(name)
        process.terminate()
        try:
            code = process.wait(LIMIT)
        finally:
            process.kill()
        assert code == 0, self.log(name)
        assert "Traceback" not in self.log(name)

    def create(self, experiment: Path) -> subprocess.CompletedProcess[str]:
        """Create an experiment and wait for its end."""
        return self.ctl("create", experiment, "--watch")

    def ctl(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return call("fedrtctl", "--socket", self.directory / "admin.sock", *arguments, path=self.site)

    def yaml(self, name: str) -> Path:
        return self.directory / f"{name}.yaml"

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def departed(self, name: str) -> list[dict[str, object]]:
        lines = (self.directory / "state" / name / "departures.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, so that building it leaves nothing in this checkout."""
    unwanted = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*")
    return Path(shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / "classbias", ignore=unwanted))


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(source, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def federation(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    directory = tmp_path_factory.mktemp("f")
    silos = [word for name in SILOS for word in ("--silo", name)]
    done = call("fedrt-certs", "dev", "--directory", directory / "certs", "--federation", "shapes", *silos)
    assert done.returncode == 0, done.stderr
    built = Federation(directory, site)
    try:
        built.start_coordinator()
        yield built
        for name in sorted(built.running, key="coordinator".__eq__):  # the coordinator last
            built.stop(name)
    finally:
        for process in built.running.values():
            process.kill()
            process.wait()


# ---- before anything runs


def test_the_package_is_found_through_its_entry_points(site: Path) -> None:
    program = (
        "from fedrt.methods import find_method, method_names\n"
        "from silo.methods import find_local_method, local_method_names\n"
        "print('classbias' in method_names(), 'classbias' in local_method_names())\n"
        "print(find_method('classbias').__module__, find_local_method('classbias').__module__)\n"
    )
    said = []
    for path in (site, None):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            env=environment(path),
        )
        said.append(done.stdout.splitlines())
        assert (path is None) == ("SpecError: method 'classbias' is not installed" in done.stderr), done.stderr
    assert said == [["True True", "classbias.declaration classbias.local"], ["False False"]]


def test_its_hyper_parameters_are_checked_like_those_of_a_built_in_method(site: Path, tmp_path: Path) -> None:
    good = PACKAGE / "experiment.yaml"
    assert "bias_scale: 5.0" in call("fedrtctl", "check-config", good, path=site).stdout
    for wrong, complaint in (
        ("bias_scle: 5.0", "has no hyper-parameter 'bias_scle'; did you mean 'bias_scale'?"),
        ("bias_scale: fast", "method 'classbias': bias_scale: Input should be a valid number"),
        ("bias_scale: -1", "bias_scale is -1.0; it must not be negative"),
    ):
        (tmp_path / "wrong.yaml").write_text(good.read_text().replace("bias_scale: 5.0", wrong))
        done = call("fedrtctl", "check-config", tmp_path / "wrong.yaml", path=site)
        assert done.returncode == 78
        assert complaint in done.stderr
    assert "method 'classbias' is not installed" in call("fedrtctl", "check-config", good).stderr


def test_the_example_names_the_weights_that_come_with_fedrt() -> None:
    from silo.clip import weights_sha256
    from silo.sources import ModelSource

    digest = weights_sha256(ModelSource("fedrt-tiny", "embedded"))
    assert f"weights_sha256: {digest}\n" in (PACKAGE / "experiment.yaml").read_text()


# ---- the experiment


def test_two_silos_that_allow_it_run_the_example_to_its_end_and_keep_what_is_private(federation: Federation) -> None:
    images = {"north": (8, 2, 2), "south": (1, 2, 9)}
    for name, counts in images.items():
        federation.start_silo(name, federation.site, draw(federation.directory / "images" / name, counts), "classbias")
    done = federation.create(PACKAGE / "experiment.yaml")
    assert done.returncode == 0, done.stderr + federation.log("north") + federation.log("south")

    shown = json.loads(federation.ctl("show", "shapes-1", "--json", "--rounds", 0).stdout)
    assert (shown["state"], shown["method"]) == ("succeeded", "classbias")
    trained = [closed for closed in shown["rounds"] if closed["task"] == "train"]
    assert [closed["round"] for closed in trained] == [1, 2, 3]
    for closed in shown["rounds"]:
        assert set(closed["silos"]) == set(images)
        assert all(math.isfinite(part["metrics"]["loss"]) for part in closed["silos"].values())
    losses = [closed["metrics"]["loss"] for closed in trained]
    assert losses[-1] < losses[0]

    federation.ctl("export", "shapes-1", "--to", federation.directory / "export")
    learned = load_file(federation.directory / "export" / "prompt.safetensors")
    assert set(learned) == {"context"}
    check_that_the_bias_stayed(federation, learned["context"])


def check_that_the_bias_stayed(federation: Federation, context: np.ndarray) -> None:
    """The silos' own records name the context only, and what they hold is nowhere at the coordinator."""
    biases = []
    for name in ("north", "south"):
        (private,) = (federation.directory / "state" / name / "vault").glob("shapes-1-*/round-*3.safetensors")
        held = load_file(private)
        assert set(held) == {"bias"}
        assert np.abs(held["bias"]).min() > 0
        biases.append(held["bias"].tobytes())
        entries = federation.departed(name)
        left = [tensor for entry in entries for tensor in entry.get("tensors", [])]
        assert [(tensor["name"], tensor["shape"]) for tensor in left] == [("context", [4, 96])] * 3
        assert "bias" not in json.dumps(entries)
    assert biases[0] != biases[1]
    place = federation.directory / "state" / "coordinator"
    stored = [path.read_bytes() for path in place.rglob("*") if path.is_file()]
    assert any(context[0, :3].tobytes() in content for content in stored)  # so a bias would be found if it were there
    assert not any(bias in content for bias in biases for content in stored)


# ---- refusals


@pytest.fixture(scope="module")
def other_version(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as installed, but with a declaration that would share the bias."""
    copy = Path(shutil.copytree(site, tmp_path_factory.mktemp("other") / "site"))
    declaration = copy / "classbias" / "declaration.py"
    changed, count = re.subn(r"Scope\.PRIVATE", "Scope.SHARED", declaration.read_text())
    assert count == 1
    declaration.write_text(changed)
    return copy


@pytest.mark.parametrize(
    ("name", "allowed", "reason"),
    [
        ("strict", "promptfl, zeroshot", "refused (policy): policy.methods of this silo does not allow 'classbias'"),
        ("bare", '"*"', "refused (method_mismatch): method 'classbias' is not installed at this silo; installed are "),
        ("other", '"*"', "refused (method_mismatch): this silo's 'classbias' declares other tensors than the coord"),
    ],
    ids=["policy", "not installed", "another declaration"],
)
def test_a_silo_refuses_what_it_does_not_allow_does_not_have_or_has_otherwise(
    federation: Federation, other_version: Path, name: str, allowed: str, reason: str
) -> None:
    path = {"strict": federation.site, "bare": None, "other": other_version}[name]
    federation.start_silo(name, path, draw(federation.directory / "images" / name, (1, 1, 1)), allowed)
    text = (PACKAGE / "experiment.yaml").read_text().replace("experiment: shapes-1", f"experiment: {name}")
    asked = federation.directory / f"experiment-{name}.yaml"
    asked.write_text(text.replace("silos: [north, south]", f"silos: [{name}]\n  on_too_few: fail"))
    done = federation.create(asked)
    assert done.returncode == 1, federation.log(name)
    assert f"experiment '{name}' failed: " in done.stderr
    assert f"{name}: {reason}" in done.stderr
    federation.stop(name)
    left = {entry["message"] for entry in federation.departed(name)}
    assert "TaskReply" in left
    assert left.isdisjoint({"TaskResult", "PayloadChunk"})
    assert not list((federation.directory / "state" / name / "vault").iterdir())
