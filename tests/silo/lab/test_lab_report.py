"""The files of a report: figures that can be opened, whatever is finished, and what is said where one cannot be."""

from pathlib import Path

import lab_samples
import pytest
from lab_samples import LAB, evaluation, record
from PIL import Image
from typer.testing import CliRunner

from silo.lab.cli import app
from silo.lab.figures import accuracy_curves
from silo.lab.grid import cells_of
from silo.lab.measurements import read_csv
from silo.lab.records import CellRecord, read_cells, write_cell
from silo.lab.report import write_report
from silo.lab.shipped import recipe_text, recipe_titles


def finish(directory: Path, text: str = LAB) -> list[Path]:
    """Finish every cell by hand and report."""
    lab, plans = lab_samples.read(directory, text)
    for cell in cells_of(plans):
        numbers = range(cell.rounds.count + 1)
        metrics = {f"{split}accuracy": 0.5 + 0.01 * cell.seed for split in ("", "base_", "novel_")}
        write_cell(lab.directory, cell, record(cell, *(evaluation(number, {"silo-01": metrics}) for number in numbers)))
    written, complaints = write_report(lab, plans, read_cells(lab.directory, cells_of(plans)))
    assert complaints == []
    return written


@pytest.mark.parametrize("text", [LAB, LAB.replace("silos: 2}", "silos: 2, novel: half}")])
def test_figures_are_pictures_of_a_readable_size(tmp_path: Path, text: str) -> None:
    written = finish(tmp_path, text)
    figures = [path for path in written if path.suffix == ".png"]
    assert [path.name for path in figures] == ["iid-curves.png", "iid-last-round.png", "iid-holdings.png"]
    for path in figures:
        with Image.open(path) as image:
            assert min(image.size) >= 300
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    assert len(read_csv(tmp_path / "results" / "results.csv")) == 2 * (1 + 5) * 3


def test_what_trained_and_was_measured_once_is_a_mark_at_its_round_and_no_line(tmp_path: Path) -> None:
    found: dict[str, list[CellRecord]] = {}
    for plan in lab_samples.read(tmp_path)[1]:
        for cell in plan.cells:
            part = evaluation(cell.rounds.count, {"silo-01": {"accuracy": 0.5 + 0.1 * cell.seed}})
            found.setdefault(cell.label, []).append(record(cell, part))
    (axes,) = accuracy_curves("iid", found, list(found)).axes
    broken, mark = axes.get_lines()[:2]
    assert (broken.get_linestyle(), list(broken.get_xdata())) == ("--", [0, 4])
    assert (mark.get_linestyle(), mark.get_marker(), list(mark.get_xdata())) == ("None", "s", [4])
    assert list(mark.get_ydata()) == [pytest.approx(65.0)]
    (container,) = axes.containers
    low, high = container.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 100 * 0.1 / 2**0.5)


def test_a_report_without_finished_cells(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    written, complaints = write_report(lab, plans, {})
    assert [path.name for path in written] == ["results.csv", "summary.md", "iid-holdings.png"]
    assert complaints == []
    assert read_csv(written[0]) == []


def test_images_that_are_gone_are_no_reason_to_fail(tmp_path: Path) -> None:
    text = LAB.replace(LAB[LAB.index("  world:") : LAB.index("training:")], "  {root: gone, layout: image_folder}\n")
    lab, plans = lab_samples.read(tmp_path, text)
    cell = plans[0].cells[0]
    written, complaints = write_report(
        lab, plans, {cell.cell_id: record(cell, evaluation(0, {"silo-01": {"accuracy": 1}}))}
    )
    assert len(written) == 4
    assert len(complaints) == 1
    assert "who holds what in 'iid' is not drawn" in complaints[0]


def test_the_command_prints_what_it_wrote(tmp_path: Path) -> None:
    finish(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "lab.yaml")])
    assert done.exit_code == 0
    assert [Path(line).name for line in done.stdout.splitlines()][:2] == ["results.csv", "summary.md"]


def test_the_check_prints_the_grid_or_one_error(tmp_path: Path) -> None:
    path = lab_samples.write_lab(tmp_path)
    done = CliRunner().invoke(app, ["check", str(path)])
    assert (done.exit_code, done.stdout.splitlines()[0]) == (
        0,
        "lab trial: 4 cells = 1 setting x 2 methods x 2 seeds; 0 finished",
    )
    lab_samples.write_lab(tmp_path, LAB.replace("promptfl,", "promtfl,"))
    done = CliRunner().invoke(app, ["check", str(path)])
    assert (done.exit_code, done.stdout) == (78, "")
    assert done.stderr.startswith("error: ")


def test_the_commands_about_recipes() -> None:
    names = list(recipe_titles())
    listed = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == names
    assert CliRunner().invoke(app, ["recipe", names[0]]).stdout == recipe_text(names[0])
    done = CliRunner().invoke(app, ["recipe", names[0][:-1]])
    assert (done.exit_code, done.stderr) == (
        78,
        f"error: there is no recipe {names[0][:-1]!r}; did you mean {names[0]!r}?\n",
    )
