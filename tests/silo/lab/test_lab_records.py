"""Cells and results.csv on disk: read back as they were written, and damage is named."""

from pathlib import Path

import lab_samples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_samples import closed, evaluation, record

from fedrt.errors import DamageError, StorageError
from silo.lab.measurements import COLUMNS, Measurement, measurements, read_csv, split_metric, write_csv
from silo.lab.records import cell_path, read_cell, read_cells, remove_cell, write_cell

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
ROWS = st.builds(
    Measurement,
    setting=NAMES,
    method=NAMES,
    seed=st.integers(0, 2**63 - 1),
    round=st.integers(0, 1000),
    silo=NAMES,
    split=NAMES,
    measure=NAMES,
    value=st.floats(allow_nan=False, allow_infinity=False),
    examples=st.none() | st.integers(0, 10**9),
)


@given(st.lists(ROWS, max_size=5))
def test_results_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, rows: list[Measurement]) -> None:
    path = tmp_path_factory.mktemp("csv") / "results.csv"
    write_csv(path, rows)
    assert read_csv(path) == rows


def test_the_columns_of_results(tmp_path: Path) -> None:
    write_csv(tmp_path / "results.csv", [Measurement("iid", "coop", 1, 4, "silo-01", "base", "accuracy", 0.1, 30)])
    assert (tmp_path / "results.csv").read_text() == (
        "setting,method,seed,round,silo,split,measure,value,examples\niid,coop,1,4,silo-01,base,accuracy,0.1,30\n"
    )
    assert COLUMNS[0] == "setting"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", "is not a results.csv"),
        (",".join(COLUMNS) + "\niid,coop,one,4,silo-01,base,accuracy,0.1,30\n", "line 2"),
        (",".join(COLUMNS) + "\niid,coop\n", "line 2"),
    ],
)
def test_another_file_is_no_results(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(DamageError, match=said):
        read_csv(path)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"results\.csv"):
        read_csv(tmp_path / "results.csv")


def test_the_measurements_of_a_cell(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    found = list(
        measurements(
            record(
                cell,
                closed(1, "train", {"silo-01": {"loss": 2.0}}),
                closed(1, "train", {"silo-02": {"loss": 3.0}}, succeeded=False),
                evaluation(1, {"silo-02": {"accuracy": 0.5, "novel_macro_f1": 0.25, "domain_loss": 1.5}}),
            )
        )
    )
    assert [(row.round, row.silo, row.split, row.measure, row.value, row.examples) for row in found] == [
        (1, "silo-01", "train", "loss", 2.0, 10),
        (1, "silo-02", "personal", "accuracy", 0.5, 10),
        (1, "silo-02", "domain", "loss", 1.5, None),  # a result does not say of how many images
        (1, "silo-02", "novel", "macro_f1", 0.25, None),
    ]
    assert {(row.setting, row.method, row.seed) for row in found} == {("iid", "promptfl", 1)}


def test_the_split_of_a_metric() -> None:
    assert split_metric("accuracy") == ("personal", "accuracy")
    assert split_metric("base_macro_f1") == ("base", "macro_f1")
    assert split_metric("calibration_error") == ("personal", "calibration_error")


def test_cells_read_back_as_they_were_written(tmp_path: Path) -> None:
    first, second, *_ = lab_samples.cells(tmp_path)
    written = record(first, evaluation(0, {"silo-01": {"accuracy": 0.1 + 0.2}}))
    write_cell(tmp_path, first, written)
    assert read_cell(tmp_path, first) == written
    assert read_cells(tmp_path, [first, second]) == {first.cell_id: written}


@pytest.mark.parametrize("text", ["", "{}", '{"format": "fedrt-lab-cell-2"}'])
def test_a_damaged_cell_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    cell = lab_samples.cells(tmp_path)[0]
    path = cell_path(tmp_path, cell)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(
        DamageError, match=rf"{cell.cell_id}\.json' is damaged at .*; run the cell anew with --again iid/zeroshot"
    ):
        read_cell(tmp_path, cell)


def test_the_silos_that_were_not_measured_in_the_end(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    both, one = ({silo: {"accuracy": 0.5} for silo in silos} for silos in (("silo-01", "silo-02"), ("silo-01",)))
    lacking = evaluation(1, one).model_copy(update={"absent": {"silo-02": "not connected"}})
    assert record(cell, lacking, closed(2, "train", both), evaluation(2, both)).unmeasured() == {}
    assert record(cell, evaluation(0, both), closed(1, "train", both), lacking).unmeasured() == {
        "silo-02": "not connected"
    }
    never = dict.fromkeys(("silo-01", "silo-02"), "it was not evaluated after the last round")
    assert record(cell, evaluation(0, both), closed(1, "train", both)).unmeasured() == never
    assert record(cell).unmeasured() == never
    nothing_to_measure = {"silo-01": {"train": 4, "test": 4}, "silo-02": {"train": 4, "test": 0}}
    assert record(cell, lacking, holdings=nothing_to_measure).unmeasured() == {}


def test_a_cell_that_the_first_version_has_finished_is_kept_until_it_is_run_anew(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    former = record(cell, digest=cell.former_digest, method_digest="")
    path = tmp_path / "cells" / f"{cell.former_id}.json"
    path.parent.mkdir()
    path.write_text(former.model_dump_json(exclude={"method_digest"}))
    assert read_cells(tmp_path, [cell]) == {cell.cell_id: former}
    write_cell(tmp_path, cell, record(cell))
    assert read_cell(tmp_path, cell) == record(cell)
    remove_cell(tmp_path, cell)
    assert read_cell(tmp_path, cell) is None
