"""`fedrt-silo features` as its operator meets it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from silo.embedded import embedded_paths
from tests.cli.processes import LIMIT, SCRIPTS, assert_one_message, run
from tests.fakes.federation import Federation

with_clip = pytest.mark.skipif(
    not embedded_paths().weights_path.is_file(), reason="the embedded CLIP has not been trained in this checkout"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A silo of twelve images with the embedded CLIP."""
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([number, len(split), ord(label[0])]).integers(
                    0, 256, (40, 40, 3), np.uint8
                )
                Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{number}.png")
    path = Federation(tmp_path).silo_yaml("north")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("model:")]
    path.write_text(
        "\n".join([*lines, "model: {architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}"])
    )
    return path


def features(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run("fedrt-silo", "features", *arguments)


@with_clip
def test_build_show_and_clear(config: Path, tmp_path: Path) -> None:
    first = features("build", "-c", config, "--views", 2)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[:3] == [
        "train: 8 images, 8 of them encoded now",
        "test: 4 images, 4 of them encoded now",
        "train in 2 augmented views: 8 images, 8 of them encoded now",
    ]
    assert "train: 8 images, 0 of them encoded now" in features("build", "-c", config).stdout
    shown = json.loads(features("show", "-c", config, "--json").stdout)
    (kind,) = shown["kinds"]
    assert (kind["architecture"], kind["rows"], kind["patches"]) == ("fedrt-tiny", 12 + 16, False)
    assert shown["bytes"] == kind["bytes"] > 0
    assert shown["max_bytes"] == 50 << 30
    told = features("show", "-c", config).stdout
    assert "of at most 50.00 GiB" in told
    assert "on cpu, float32: 28 rows" in told
    assert features("clear", "-c", config).stdout.startswith("removed 0.")
    assert json.loads(features("show", "-c", config, "--json").stdout)["kinds"] == []
    kept = b"".join(path.read_bytes() for path in Path(shown["directory"]).rglob("*") if path.is_file())
    assert b"cat" not in kept
    assert b".png" not in kept


@with_clip
def test_what_stops_a_build_is_one_message(config: Path, tmp_path: Path) -> None:
    (tmp_path / "data/train/cat/0.png").write_bytes((tmp_path / "data/train/cat/1.png").read_bytes()[:300])
    done = features("build", "-c", config)
    assert done.returncode == 1
    assert "error: 1 of 8 train images are unreadable" in done.stderr
    assert "Traceback" not in done.stderr


@with_clip
def test_a_store_that_refuses_ends_a_build_at_once(config: Path, tmp_path: Path) -> None:
    """Not after hours of encoding what is then lost."""
    (tmp_path / "file").touch()
    config.write_text(config.read_text() + f"\nfeatures: {{directory: {tmp_path / 'file' / 'features'}}}\n")
    for label in ("cat", "dog"):
        for number in range(40):
            content = (tmp_path / "data/train" / label / "0.png").read_bytes() + bytes([number])
            (tmp_path / "data/train" / label / f"more{number}.png").write_bytes(content)
    done = features("build", "-c", config)
    assert done.returncode == 75
    assert "something else of that name is there; check the configured path" in done.stderr.splitlines()[-1]
    assert "88/88" not in done.stderr
    assert done.stdout == ""


def test_a_store_of_a_newer_version_is_refused(config: Path, tmp_path: Path) -> None:
    place = json.loads(features("show", "-c", config, "--json").stdout)["directory"]
    Path(place).mkdir(parents=True, mode=0o700)
    (Path(place) / "version").write_text("fedrt features 9\n")
    for command in ("show", "clear"):
        assert_one_message(features(command, "-c", config), 78, "written by a newer fedrt", "upgrade fedrt")


@with_clip
def test_ctrl_c_ends_a_build_in_order(config: Path, tmp_path: Path) -> None:
    command = [str(SCRIPTS / "fedrt-silo"), "features", "build", "-c", str(config), "--views", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        place = Path(json.loads(features("show", "-c", config, "--json").stdout)["directory"])
        deadline = time.monotonic() + LIMIT
        while not any(path.stat().st_size > 48 for path in place.glob("*/*.keys")) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, err
    assert "what was encoded is kept, and the same command goes on" in err
    assert "Traceback" not in err
    shown = json.loads(features("show", "-c", config, "--json").stdout)
    assert 0 < shown["kinds"][0]["rows"] < 16012
