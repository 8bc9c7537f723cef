"""A short chaos run in every test run: real processes, a schedule of faults, and the bits of an undisturbed run.

`make chaos` runs it longer, with every named crash point and with silos that have CLIP.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.processes import ROOT

MINUTES = 0.75  # in which faults strike; before comes the undisturbed run, after it everything must come to its end
SEED = 5
LIMIT = 1500  # seconds: a run that hangs says so itself after some minutes, with an account
SPECS = "transport,momentum,large"


@pytest.mark.timeout(LIMIT + 60)
def test_every_experiment_ends_with_the_bits_of_an_undisturbed_run(tmp_path: Path) -> None:
    report_path = tmp_path / "report.json"
    options = [
        "--minutes",
        str(MINUTES),
        "--seed",
        str(SEED),
        "--json",
        str(report_path),
        "--specs",
        SPECS,
        "--no-clip",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(report_path.read_text())
    assert report["problems"] == []
    assert report["digests_equal"] == report["digests_total"] > 0
    assert report["orphan_processes"] == 0
    assert report["fault_count"] >= 5  # a machine ten times slower than usual still gets that far
    assert report["crash_points_hit"] >= 2
