"""What finished cells add up to, with numbers that one can recompute by hand."""

import statistics
from pathlib import Path

import lab_samples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_samples import LAB, closed, evaluation, record

from silo.lab.records import CellRecord, read_cell, write_cell
from silo.lab.summary import (
    CellValue,
    Quantity,
    Spread,
    curve,
    harmonic_mean,
    last_values,
    leader,
    over_seeds,
    spread,
)
from silo.lab.tables import percent, summary_markdown

ACCURACY = Quantity("personal", "accuracy")
NOVEL_LAB = LAB.replace("silos: 2}", "silos: 2, novel: half}")


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean(0.5, 0.5, 0.5) == pytest.approx(0.5)
    assert harmonic_mean(0.6, 0.3, 0.2) == pytest.approx(0.3)  # 3 / (5/3 + 10/3 + 5)
    # of three published means; the mean of harmonic means published beside them is 78.03
    assert harmonic_mean(76.36, 76.81, 81.21) == pytest.approx(78.07, abs=0.05)
    assert harmonic_mean(0.9, 0.8, 0.0) == 0.0


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_the_harmonic_mean_lies_between_the_least_and_the_mean(values: list[float]) -> None:
    found = harmonic_mean(*values)
    assert min(values) - 1e-12 <= found <= statistics.fmean(values) + 1e-12


def test_a_spread_has_the_sample_deviation() -> None:
    assert spread([0.7, 0.8, 0.9]) == Spread(pytest.approx(0.8), pytest.approx(0.1), 3)  # sqrt((0.01 + 0 + 0.01) / 2)
    assert spread([0.7]) == Spread(0.7, None, 1)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_numbers_are_those_of_the_last_round_not_the_best(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    found = last_values(
        record(
            cell,
            evaluation(0, {"silo-01": {"accuracy": 0.2}, "silo-02": {"accuracy": 0.2}}),
            closed(1, "train", {"silo-01": {"loss": 1.0}}),
            evaluation(1, {"silo-01": {"accuracy": 1.0}, "silo-02": {"accuracy": 1.0}}),
            evaluation(2, {"silo-01": {"accuracy": 0.5}, "silo-02": {"accuracy": 0.7}}),
            closed(2, "evaluate", {"silo-01": {"accuracy": 0.0}}, succeeded=False),
        )
    )
    assert found == {ACCURACY: CellValue(pytest.approx(0.6), 2, 2)}


def test_the_mean_over_silos_does_not_weigh_them(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    part = evaluation(4, {"silo-01": {"accuracy": 0.0}, "silo-02": {"accuracy": 1.0}})
    silos = dict(part.silos)
    silos["silo-02"] = silos["silo-02"].model_copy(update={"examples": 1_000_000})
    assert last_values(record(cell, part.model_copy(update={"silos": silos})))[ACCURACY].mean == 0.5


def test_a_silo_without_auroc_is_left_out_of_its_mean_only(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    found = last_values(
        record(cell, evaluation(4, {"silo-01": {"accuracy": 0.4, "auroc": 0.9}, "silo-02": {"accuracy": 0.6}}))
    )
    assert found[Quantity("personal", "auroc")] == CellValue(0.9, 1, 2)
    assert found[ACCURACY] == CellValue(0.5, 2, 2)


def test_nothing_is_found_where_nothing_was_measured(tmp_path: Path) -> None:
    assert last_values(record(lab_samples.cells(tmp_path)[1])) == {}
    assert over_seeds([{}], ACCURACY) is None


def novel_record(cell: object, local: float, base: float, novel: float) -> CellRecord:
    metrics = {"accuracy": local, "base_accuracy": base, "novel_accuracy": novel, "novel_macro_f1": 0.25}
    return record(cell, evaluation(4, {"silo-01": metrics, "silo-02": metrics}))  # type: ignore[arg-type]


def test_the_harmonic_mean_is_taken_for_each_seed_and_then_averaged(tmp_path: Path) -> None:
    _, plans = lab_samples.read(tmp_path, NOVEL_LAB)
    rows = [(0.6, 0.3, 0.2), (0.5, 0.5, 0.5)]
    values = [last_values(novel_record(plan.cells[1], *row)) for plan, row in zip(plans, rows, strict=True)]
    found = over_seeds(values, Quantity("harmonic", "accuracy"))
    assert found is not None
    assert found.mean == pytest.approx(0.4)  # of 0.3 and 0.5; that of the means would be 0.432
    assert found.deviation == pytest.approx(0.1414, abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "lower", "expected"),
    [
        (Spread(0.80, 0.02, 3), Spread(0.75, 0.04, 3), False, "a"),  # ahead by 0.05, more than 0.04
        (Spread(0.80, 0.02, 3), Spread(0.75, 0.06, 3), False, None),  # the larger spread is that of the second
        (Spread(0.80, 0.06, 3), Spread(0.75, 0.02, 3), False, None),  # ... or of the first
        (Spread(0.80, 0.02, 3), Spread(0.75, 0.04, 3), True, "b"),
        (Spread(0.80, None, 1), Spread(0.10, 0.01, 3), False, None),  # one seed: nobody knows
        (Spread(0.80, 0.01, 2), Spread(0.10, 0.01, 3), False, None),  # other seeds, other images
        (Spread(0.80, 0.01, 2), Spread(0.10, 0.01, 2), False, None),  # ... and the third is to come
        (Spread(0.80, 0.0, 3), Spread(0.80, 0.0, 3), False, None),  # a tie
        (Spread(0.80, 0.01, 3), None, False, None),
    ],
)
def test_bold_is_who_is_ahead_by_more_than_the_larger_spread(
    first: Spread, second: Spread | None, lower: bool, expected: str | None
) -> None:
    assert leader({"a": first, "b": second}, 3, lower) == expected
    assert leader({"b": second, "a": first}, 3, lower) == expected


def test_the_spread_of_the_third_does_not_matter_for_bold_but_its_seeds_do() -> None:
    column = {"a": Spread(0.8, 0.01, 3), "b": Spread(0.7, 0.01, 3)}
    assert leader(column | {"c": Spread(0.1, 0.5, 3)}, 3) == "a"
    assert leader(column | {"c": Spread(0.1, 0.5, 2)}, 3) is None


def test_nothing_is_bold_with_one_seed() -> None:
    assert leader({"a": Spread(0.8, None, 1), "b": Spread(0.7, None, 1)}, 1) is None


def test_a_curve_has_the_rounds_that_every_seed_has(tmp_path: Path) -> None:
    first, second = (plan.cells[1] for plan in lab_samples.read(tmp_path)[1])
    rounds = [evaluation(number, {"silo-01": {"accuracy": 0.1 * number}}) for number in (0, 1, 2)]
    points = curve([record(first, *rounds), record(second, *rounds[:2])], ACCURACY)
    assert [number for number, _ in points] == [0, 1]
    assert points[1][1] == Spread(pytest.approx(0.1), 0.0, 2)
    assert curve([], ACCURACY) == []


def test_percent() -> None:
    assert percent(Spread(0.73401, 0.00516, 3)) == "73.40 ± 0.52"
    assert percent(Spread(1.0, None, 1)) == "100.00"


def personal(cell: object, accuracy: float, **other: float) -> CellRecord:
    metrics = {"accuracy": accuracy, "macro_f1": 0.5, "auroc": 0.75, "calibration_error": 0.1} | other
    return record(cell, evaluation(4, {"silo-01": metrics, "silo-02": metrics}))  # type: ignore[arg-type]


def test_the_summary_of_a_setting(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    records = {}
    for plan, zeroshot, promptfl in zip(plans, (0.50, 0.52), (0.70, 0.74), strict=True):
        for cell, accuracy in zip(plan.cells, (zeroshot, promptfl), strict=True):
            records[cell.cell_id] = personal(cell, accuracy)
    lines = summary_markdown(lab, plans, records).splitlines()
    assert lines[0] == "# trial"
    assert "4 of 4 cells are finished: 1 setting, 2 methods, 2 seeds." in lines[2]
    assert "| method | accuracy | macro-F1 | AUROC | calibration error |" in lines
    assert "| zeroshot | 51.00 ± 1.41 | 50.00 ± 0.00 | 75.00 ± 0.00 | 10.00 ± 0.00 |" in lines
    assert "| promptfl | **72.00 ± 2.83** | 50.00 ± 0.00 | 75.00 ± 0.00 | 10.00 ± 0.00 |" in lines
    assert not [line for line in lines if "AUROC (" in line or "Not finished" in line]


def blank(directory: Path, text: str) -> str:
    lab, plans = lab_samples.read(directory, text)
    return summary_markdown(lab, plans, {})


def test_what_two_seeds_are_worth_is_said(tmp_path: Path) -> None:
    note = "* A deviation of two seeds rests on two values only"
    assert note in blank(tmp_path, LAB)
    for seeds in ("[1]", "[1, 2, 3]"):
        assert note not in blank(tmp_path, LAB.replace("[1, 2]", seeds))


def test_the_summary_of_base_to_novel(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path, NOVEL_LAB)
    cell = plans[0].cells[1]
    lines = summary_markdown(lab, plans, {cell.cell_id: novel_record(cell, 0.6, 0.3, 0.2)}).splitlines()
    assert "| method | personal | base | novel | harmonic mean |" in lines
    assert "| promptfl (1 of 2 seeds) | 60.00 | 30.00 | 20.00 | 30.00 |" in lines
    (heading,) = (line for line in lines if "macro-F1, novel" in line)
    row = lines[lines.index(heading) + 2].split(" | ")
    assert row[heading.split(" | ").index("macro-F1, novel")] == "25.00"
    assert row[heading.split(" | ").index("macro-F1, base")] == "–"


def test_the_summary_says_what_was_run(tmp_path: Path) -> None:
    text = LAB.replace("silos: 2}", "silos: 3}").replace("rounds: {count: 4}", "rounds: {count: 4, max_silos: 2}")
    text = text.replace("context_length: 4}", "context_length: 16, context_init: a scan}\n    rounds: {count: 9}")
    text = text.replace("rounds: {count: 9}", "rounds: {count: 9}\n    training: {optimizer: {learning_rate: 0.5}}")
    lab, plans = lab_samples.read(tmp_path, text)
    cell = plans[0].cells[1]
    held = {f"silo-0{number}": {"train": number, "test": 10} for number in (1, 2, 3)}
    experiment = {"classes": ["a", "b", "c", "d"], "evaluation": {"novel_classes": []}}
    lines = summary_markdown(
        lab, plans, {cell.cell_id: record(cell, holdings=held, experiment=experiment)}
    ).splitlines()
    assert "* `zeroshot`: method zeroshot; measured once, without training." in lines
    assert (
        "* `promptfl`: method promptfl, context_init a scan; rounds: count 9; training: optimizer.learning_rate 0.5."
        in lines
    )
    assert (
        "Data: drawn scenes of the scanners tinted, coarse. Partition: kind iid, silos 3. Dealt to 3 silos: 4 classes, "
        "6 training images, 30 test images of their own. 4 rounds of 2 silos, 1 local epoch, batches of 8, adamw with "
        "learning rate 0.01, momentum 0.9 and weight decay 0.0005 (constant), fp32, but for what is said of a method "
        "above."
    ) in lines


def test_augmented_views_are_told(tmp_path: Path) -> None:
    text = LAB.replace("training: {batch_size: 8,", "training: {views: 50, batch_size: 8,")
    lab, plans = lab_samples.read(tmp_path, text)
    assert "(constant), fp32, 50 augmented views of each image, but for" in summary_markdown(lab, plans, {})


def test_rounds_of_more_silos_than_there_are_are_rounds_of_all(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path, LAB.replace("rounds: {count: 4}", "rounds: {count: 4, max_silos: 10}"))
    cell = plans[0].cells[1]
    assert "4 rounds, 1 local" in summary_markdown(lab, plans, {cell.cell_id: record(cell)})


def test_base_to_novel_says_among_how_many_classes_a_split_is_scored(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path, NOVEL_LAB)
    cell = plans[0].cells[1]
    experiment = {"classes": ["a", "b", "c"], "evaluation": {"novel_classes": ["d", "e"]}}
    text = summary_markdown(lab, plans, {cell.cell_id: record(cell, experiment=experiment)})
    assert "2 silos: 3 base classes and 2 novel ones, 40 training images" in text
    assert "every silo has the same 30 of the split base and 40 of the split novel" in text
    assert "Personal and base are scored among the 3 base classes, novel among the 2 novel ones." in text


def test_the_summary_says_what_is_missing_or_left_out(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    zeroshot, promptfl = plans[0].cells
    metrics = {"accuracy": 0.5}
    records = {
        zeroshot.cell_id: record(zeroshot, evaluation(0, {"silo-01": {"accuracy": 0.5, "auroc": 0.6}})),
        promptfl.cell_id: record(
            promptfl,
            evaluation(4, {"silo-01": metrics, "silo-02": metrics}),
            software="0.2.0",
            weights_sha256="cd" * 32,
        ),
    }
    text = summary_markdown(lab, plans, records)
    assert "* Not finished: iid/zeroshot, seed 2; iid/promptfl, seed 2." in text
    assert "AUROC (personal) is not defined for 2 of 3 silos measured" in text
    assert "zeroshot, seed 1: 1 of 2 silos were measured after the last round" in text
    assert "different weights" in text
    assert "different versions of fedrt: 0.1.0, 0.2.0" in text


def test_different_images_of_one_seed_are_said(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    records = {cell.cell_id: record(cell, partition_digest=cell.label) for cell in plans[0].cells}
    assert "The methods of iid (seed 1) were run on different images" in summary_markdown(lab, plans, records)


def test_a_setting_without_finished_cells(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    assert "No cell of this setting is finished yet." in summary_markdown(lab, plans, {})


def test_a_cell_of_another_digest_is_not_finished(tmp_path: Path) -> None:
    before = lab_samples.cells(tmp_path)[1]
    write_cell(tmp_path, before, record(before))
    assert read_cell(tmp_path, before) == record(before)
    after = lab_samples.cells(tmp_path, LAB.replace("count: 4", "count: 5"))[1]
    assert read_cell(tmp_path, after) is None
