"""Whose a directory is: a lab's own, a new one, one from before there was a marker, and none of anybody else."""

from pathlib import Path

import lab_samples
import pytest
from lab_samples import LAB
from typer.testing import CliRunner

from fedrt.errors import ConfigurationError
from silo.lab.cli import app
from silo.lab.directory import MARKER, claim, locked
from silo.lab.perform import Order, perform
from silo.lab.sections import LabFile


@pytest.fixture
def lab(tmp_path: Path) -> LabFile:
    return lab_samples.read(tmp_path)[0]


def test_a_new_or_an_empty_directory_becomes_the_labs(lab: LabFile) -> None:
    claim(lab)
    assert (lab.directory / MARKER).read_text() == "trial\n"
    claim(lab)
    (lab.directory / MARKER).unlink()
    claim(lab)
    assert (lab.directory / MARKER).exists()


def test_files_of_somebody_else_are_left_alone(
    tmp_path: Path, lab: LabFile, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.directory.mkdir()
    (lab.directory / "results.csv").write_text("mine")
    said = "holds files that are not a lab's; set directory to a new or an empty one"
    with pytest.raises(ConfigurationError, match=said):
        claim(lab)
    assert perform(Order(tmp_path / "lab.yaml")) == 78
    assert said in capsys.readouterr().err
    assert said in CliRunner().invoke(app, ["report", str(tmp_path / "lab.yaml")]).stderr
    assert [path.name for path in lab.directory.iterdir()] == ["results.csv"]
    assert (lab.directory / "results.csv").read_text() == "mine"


@pytest.mark.parametrize("traces", [["cells"], ["work", "lock"]])
def test_a_directory_from_before_there_was_a_marker_is_taken_over(lab: LabFile, traces: list[str]) -> None:
    (lab.directory / traces[0]).mkdir(parents=True)
    for file in traces[1:]:
        (lab.directory / file).touch()
    claim(lab)
    assert (lab.directory / MARKER).read_text() == "trial\n"


def test_the_directory_of_another_lab_is_left_alone(tmp_path: Path, lab: LabFile) -> None:
    claim(lab)
    another, _ = lab_samples.read(tmp_path, LAB.replace("lab: trial", "lab: another"))
    with pytest.raises(
        ConfigurationError, match=r"belongs to the lab 'trial', not to 'another'; set another directory"
    ):
        claim(another)
    (lab.directory / MARKER).write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="belongs to the lab ''"):
        claim(lab)


def test_one_lab_at_a_time(lab: LabFile) -> None:
    claim(lab)
    lock = locked(lab.directory)
    with pytest.raises(ConfigurationError, match="another fedrt-lab runs in"):
        locked(lab.directory)
    lock.release()
