"""The grid of a lab.yaml: which cells there are, what their experiments are, and what changes their digests."""

import dataclasses
import shutil
from pathlib import Path

import lab_samples
import pytest
from lab_samples import LAB

from fedrt.errors import ConfigurationError, SpecError
from fedrt.experiment_file import experiment_spec
from fedrt.spec import NAME, EvaluationSplit, OptimizerName, Schedule
from silo.lab.grid import Dealt, chosen, experiment_of, overlaid, partition_words, splits_of
from silo.lab.sections import load_lab

DEALT = Dealt(("red circle", "blue star"), (), {"silo-01": {"train": 3}, "silo-02": {"train": 4}}, "f" * 64)


def test_a_cell_for_every_setting_method_and_seed_in_order(tmp_path: Path) -> None:
    text = LAB.replace("methods:", "  other:\n    partition: {kind: pathological, silos: 2}\nmethods:")
    _, plans = lab_samples.read(tmp_path, text)
    assert [plan.name for plan in plans] == ["iid-s1", "iid-s2", "other-s1", "other-s2"]
    for plan in plans:
        assert [cell.label for cell in plan.cells] == ["zeroshot", "promptfl"]
        assert plan.partition.seed == plan.seed
        for cell in plan.cells:
            assert (cell.setting, cell.seed) == (plan.setting, plan.seed)
            assert cell.cell_id == f"{plan.setting}-{cell.label}-s{plan.seed}-{cell.digest[:8]}"
            assert NAME.fullmatch(cell.cell_id)
    assert len({cell.digest for plan in plans for cell in plan.cells}) == 8


def test_what_trains_nothing_has_no_rounds(tmp_path: Path) -> None:
    zeroshot, promptfl = lab_samples.cells(tmp_path)[:2]
    assert (zeroshot.rounds.count, promptfl.rounds.count) == (0, 4)


def test_changes_of_a_method_come_after_those_of_its_setting(tmp_path: Path) -> None:
    text = LAB.replace(
        "silos: 2}\n",
        "silos: 2}\n    training: {batch_size: 2, schedule: cosine, optimizer: {momentum: 0.5}}\n"
        "    rounds: {time_limit: 1m, max_silos: 1}\n    evaluation: {every: 2}\n",
    ).replace(
        "context_length: 4}\n",
        "context_length: 4}\n    training: {batch_size: 3, optimizer: {learning_rate: 0.5}}\n    rounds: {count: 9}\n",
    )
    zeroshot, promptfl = lab_samples.cells(tmp_path, text)[:2]
    assert (zeroshot.training.batch_size, promptfl.training.batch_size) == (2, 3)
    assert promptfl.training.schedule is Schedule.COSINE
    optimizer = promptfl.training.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == (OptimizerName.ADAMW, 0.5, 0.5)
    assert (promptfl.rounds.count, promptfl.rounds.time_limit, promptfl.rounds.max_silos) == (9, 60.0, 1)
    assert (zeroshot.rounds.count, zeroshot.rounds.time_limit, zeroshot.every) == (0, 60.0, 2)


def test_the_experiment_of_a_cell_names_all_silos_and_classes_and_its_seed(tmp_path: Path) -> None:
    _, plans = lab_samples.read(tmp_path)
    cell = plans[1].cells[1]
    spec = experiment_spec(experiment_of(cell, plans[1].partition, DEALT, "fedrt-tiny", "0" * 64))
    assert spec.rounds.silos == ("silo-01", "silo-02")
    assert spec.local.classes == DEALT.classes
    assert (spec.seed, spec.rounds.count, spec.evaluation.every) == (2, 4, 1)
    assert spec.local.evaluation.splits == (EvaluationSplit.PERSONAL,)
    assert spec.local.training.optimizer.learning_rate == 0.01


@pytest.mark.parametrize(
    ("keys", "splits"),
    [
        ("", "personal"),
        (", base: true", "personal base"),
        (", novel: half", "personal base novel"),
        (", held_out_domain: coarse", "personal domain"),
        (", novel: half, held_out_domain: coarse", "personal base novel domain"),
    ],
)
def test_what_is_measured_follows_from_the_partition(tmp_path: Path, keys: str, splits: str) -> None:
    _, plans = lab_samples.read(tmp_path, LAB.replace("silos: 2}", f"silos: 2{keys}}}"))
    assert [split.value for split in splits_of(plans[0].partition)] == splits.split()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed", "seed"),
        ("count: 4", "count: 5"),
        ("learning_rate: 0.01", "learning_rate: 0.02"),
        ("batch_size: 8", "batch_size: 9"),
        ("batch_size: 8", "views: 1, batch_size: 8"),
        ("context_length: 4", "context_length: 5"),
        ("name: promptfl", "name: promptfolio"),
        ("kind: iid, silos: 2", "kind: iid, silos: 3"),
        ("classes: 4", "classes: 5"),
        ("settings:", "evaluation: {every: 2}\nsettings:"),
        ("weights: embedded", "weights: other.pt"),
    ],
)
def test_the_digest_covers_what_decides_the_outcome(tmp_path: Path, old: str, new: str) -> None:
    before = lab_samples.cells(tmp_path)[1]
    after = lab_samples.cells(tmp_path, LAB.replace(old, new))[1]
    assert (before.digest == after.digest) == (old == new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("device: cpu, threads: 1", "device: cuda, threads: 8"),
        ("lab: trial", "lab: another"),
        ("directory: results", "directory: elsewhere"),
        ("seeds: [1, 2]", "seeds: [3, 2, 1]"),
        ("zeroshot:", "baseline:"),
        ("context_length: 4}", "context_length: 4, class_position: end}"),
        ("count: 4", "count: 4, time_limit: 2h, retries: 7"),
    ],
)
def test_the_digest_covers_nothing_else(tmp_path: Path, old: str, new: str) -> None:
    def of_promptfl(text: str) -> str:
        return next(
            cell.digest for cell in lab_samples.cells(tmp_path, text) if (cell.label, cell.seed) == ("promptfl", 1)
        )

    assert of_promptfl(LAB) == of_promptfl(LAB.replace(old, new))


def test_neither_training_nor_rounds_belong_to_a_method_that_trains_nothing(tmp_path: Path) -> None:
    text = LAB.replace("count: 4", "count: 5").replace("batch_size: 8", "batch_size: 9")
    before, after = (lab_samples.cells(tmp_path, each) for each in (LAB, text))
    assert [cell.digest == other.digest for cell, other in zip(before, after, strict=True)] == [True, False] * 2


def test_cells_finished_before_there_were_views_keep_their_digests(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[1]
    assert (cell.digest[:16], cell.former_digest[:16]) == ("18b7dcc4ed5409d3", "5eea629b5dc715df")
    assert lab_samples.cells(tmp_path, LAB.replace("batch_size: 8", "views: 0, batch_size: 8"))[1] == cell


def test_a_lab_that_is_moved_keeps_its_digests(tmp_path: Path) -> None:
    text = LAB.replace("weights: embedded", "weights: model/weights.pt")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    before = [cell.digest for cell in lab_samples.cells(first, text)]
    shutil.move(first, second)
    assert [cell.digest for cell in lab_samples.cells(second, text)] == before


def test_only_some_cells(tmp_path: Path) -> None:
    _, plans = lab_samples.read(tmp_path)
    assert chosen(plans, ()) == plans
    assert [cell.label for plan in chosen(plans, ("iid/prompt*",)) for cell in plan.cells] == ["promptfl"] * 2
    assert [len(plan.cells) for plan in chosen(plans, ("iid",))] == [2, 2]
    with pytest.raises(ConfigurationError, match=r"--only 'iid/promtfl' means no cell; there are iid/promptfl, iid/"):
        chosen(plans, ("iid/zeroshot", "iid/promtfl"))
    with pytest.raises(ConfigurationError, match="--again 'idd' means no cell"):
        chosen(plans, ("idd",), "--again")


def test_overlaying_changes_no_section_in_place(tmp_path: Path) -> None:
    lab = load_lab(lab_samples.write_lab(tmp_path))
    changed = overlaid(lab.training, lab.training.model_copy(update={"batch_size": 1}))
    assert (lab.training.batch_size, changed.batch_size) == (8, 1)
    assert overlaid(lab.training, None) is lab.training


def test_an_unknown_method_is_said_with_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'promptfl'"):
        lab_samples.read(tmp_path, LAB.replace("name: promptfl", "name: promptfll"))


def test_a_partition_in_words(tmp_path: Path) -> None:
    text = LAB.replace("kind: iid, silos: 2", "kind: dirichlet, silos: 2, beta: 0.3, novel: [red circle, blue star]")
    _, plans = lab_samples.read(tmp_path, text)
    words = partition_words(plans[0].partition)
    assert words == "kind dirichlet, novel red circle and blue star, beta 0.3, silos 2"


def test_cells_are_values(tmp_path: Path) -> None:
    cell = lab_samples.cells(tmp_path)[0]
    assert dataclasses.replace(cell) == cell
    assert cell.name == "iid/zeroshot, seed 1"
