"""Which experiment is a cell's: the one under way or done with the same code, or else a new one."""

from pathlib import Path

import lab_samples
import pytest

from silo.lab.attempts import Attempt, attempt_at, forget_attempts, read_attempt, write_attempt
from silo.lab.grid import chosen
from silo.lab.perform import forget
from silo.lab.records import read_cells, write_cell

NOW = "ab" * 32


@pytest.mark.parametrize(
    ("states", "last", "number"),
    [
        ({}, None, 1),
        ({}, (1, NOW), 1),  # noted, but never created
        ({1: "running"}, (1, NOW), 1),
        ({1: "succeeded"}, (1, NOW), 1),
        ({1: "succeeded"}, (1, "cd" * 32), 2),  # other code
        ({1: "running"}, None, 2),  # forgotten on purpose
        ({1: "failed"}, (1, NOW), 2),
        ({1: "cancelled", 2: "failed"}, (2, NOW), 3),
        ({1: "failed", 2: "pending"}, (2, NOW), 2),
        ({1: "failed", 10: "failed"}, (10, NOW), 11),
    ],
)
def test_the_experiment_of_a_cell(
    tmp_path: Path, states: dict[int, str], last: tuple[int, str] | None, number: int
) -> None:
    cell, another, *_ = lab_samples.cells(tmp_path)

    def name(attempt: int) -> str:
        return cell.cell_id if attempt == 1 else f"{cell.cell_id}-{attempt}"

    standing = {name(attempt): state for attempt, state in states.items()} | {f"{another.cell_id}-7": "running"}
    noted = None if last is None else Attempt(experiment=name(last[0]), method_digest=last[1])
    assert attempt_at(cell, standing, noted, NOW) == Attempt(experiment=name(number), method_digest=NOW)


def test_an_attempt_is_noted_and_forgotten(tmp_path: Path) -> None:
    attempt = Attempt(experiment="iid-coop-s1-12345678-2", method_digest=NOW)
    assert read_attempt(tmp_path, "iid-coop-s1-12345678") is None
    write_attempt(tmp_path, "iid-coop-s1-12345678", attempt)
    assert read_attempt(tmp_path, "iid-coop-s1-12345678") == attempt
    assert read_attempt(tmp_path, "iid-coop-s1-87654321") is None
    forget_attempts([tmp_path, tmp_path / "another"], "iid-coop-s1-12345678")
    assert read_attempt(tmp_path, "iid-coop-s1-12345678") is None


def test_a_note_that_cannot_be_understood_is_none(tmp_path: Path) -> None:
    write_attempt(tmp_path, "cell", Attempt(experiment="cell", method_digest=NOW))
    (tmp_path / "attempts" / "cell.json").write_text("{")
    assert read_attempt(tmp_path, "cell") is None


def test_cells_that_are_run_again_lose_their_file_and_their_attempts_everywhere(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    again, kept = plans[0].cells
    places = [lab.directory / "work" / f"{plans[0].name}-{digits}" for digits in ("0123abcd", "abcd0123")]
    for cell in (again, kept):
        write_cell(lab.directory, cell, lab_samples.record(cell))
        for place in places:
            write_attempt(place, cell.cell_id, Attempt(experiment=cell.cell_id, method_digest=NOW))
    forget(lab.directory, chosen(plans[:1], ("iid/zeroshot",), "--again"))
    assert list(read_cells(lab.directory, [again, kept])) == [kept.cell_id]
    for place in places:
        assert (read_attempt(place, again.cell_id), read_attempt(place, kept.cell_id) is None) == (None, False)
