"""The recipes: each passes its check once the paths are set, with sets of images that have the true classes' number."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import Flowers102

from fedrt.experiment_file import experiment_spec
from fedrt.methods import BUILT_IN
from silo.data.records import Split
from silo.lab.check import checked_plans, dealt_of
from silo.lab.grid import cells_of, expand, experiment_of
from silo.lab.images import foreseen_collection
from silo.lab.sections import LabFile, load_lab
from silo.lab.shipped import recipe_text, recipe_titles
from silo.partition.dealing import deal

# classes, and files of each: for training and for testing, or without splits
SETS = {
    "cifar100": (100, {"train": 60, "test": 10}),
    "flowers102": (102, {"train": 20, "test": 3}),
    "oxfordiiitpet": (37, {"train": 20, "test": 3}),
    "food101": (101, {"train": 20, "test": 3}),
    "caltech101": (100, {"": 31}),
    "dtd": (47, {"train": 20, "test": 3}),
}
SHORT = ("embedded-quick", "embedded-held-out-domain")  # some methods only
PLACEHOLDER = re.compile(r"/path/to/([\w.-]+)")


FLOWERS = [name.rstrip("?") for name in Flowers102.classes]  # in the order of their labels


def class_name(name: str, label: int) -> str:
    return FLOWERS[label] if name == "flowers102" else f"class {label:03d}"


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the placeholders of the recipes stand for, and exported sets of files that are no images."""
    place = tmp_path_factory.mktemp("fakes")
    for name, (class_count, counts) in SETS.items():
        for split, count in counts.items():
            for label in range(class_count):
                folder = place / "exported" / name / split / class_name(name, label)
                folder.mkdir(parents=True)
                for number in range(count):
                    (folder / f"{number}.png").write_text(f"{split} {label} {number}")
    (place / "torchvision").mkdir()
    for name in ("ViT-B-16.pt", "RN50.pt"):
        (place / name).touch()
    return place


def prepared(directory: Path, fakes: Path, name: str) -> tuple[LabFile, Path]:
    """The recipe as its reader sets it up, its images exported already."""
    path = directory / f"{name}.yaml"
    path.write_text(PLACEHOLDER.sub(lambda found: str(fakes / found[1]), recipe_text(name)))
    lab = load_lab(path)
    lab.directory.mkdir(parents=True)
    (lab.directory / "images").symlink_to(fakes / "exported")
    return lab, path


@pytest.mark.parametrize("name", recipe_titles())
def test_a_recipe_passes_its_check_and_every_partition_can_be_dealt(tmp_path: Path, fakes: Path, name: str) -> None:
    lab, path = prepared(tmp_path, fakes, name)
    plans = checked_plans(lab, path)
    assert (lab.lab, len(plans)) == (name, len(lab.settings) * len(lab.seeds))
    for plan in plans[:: len(lab.seeds)]:
        collection = foreseen_collection(plan.data, lab.directory)
        assert collection is not None, "the test has no fake of this set"
        partition = deal(collection, plan.partition, plan.seed)
        dealt = dealt_of(partition)
        for cell in plan.cells:
            spec = experiment_spec(experiment_of(cell, plan.partition, dealt, lab.model.architecture, "0" * 64))
            assert spec.rounds.count == (0 if cell.method.name == "zeroshot" else cell.rounds.count)
        most = plan.partition.max_train
        assert most is None or max(len(holding.indices[Split.TRAIN]) for holding in partition.holdings) == most


@pytest.mark.parametrize("name", [name for name in recipe_titles() if name not in SHORT])
def test_a_recipe_compares_all_methods_over_three_seeds(tmp_path: Path, fakes: Path, name: str) -> None:
    lab, _ = prepared(tmp_path, fakes, name)
    assert {entry.method.name for entry in lab.methods.values()} == set(BUILT_IN)
    assert lab.seeds == (1, 2, 3)


@pytest.mark.parametrize("name", recipe_titles())
def test_placeholders_are_named_at_the_top(name: str) -> None:
    text = recipe_text(name)
    head = text[: text.index("\nlab:")]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    if PLACEHOLDER.search(text):
        assert "Before it runs, set two paths" in head
        for word in ("weights", "data.root", "last round", "augmentation", "test image"):
            assert word in head, word
    else:
        assert "Runs as it stands" in head


# What the scripts of the authors have (METHODS.md, 1.5 and 2.2 to 2.7), but for fp32, which only FedPGP's has. As many
# views as local epochs in all rounds, or none for CIFAR, are their augmentation.
SGD = {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4}
PUBLISHED = {
    "fedotp-cifar100-dirichlet": {
        "model": "ViT-B-16",
        "training": (1, 32, "constant", "fp32", 0, SGD | {"learning_rate": 0.001}),
        "rounds": (150, 10),
        "partition": {"kind": "dirichlet", "silos": 100, "beta": 0.3},
        "methods": {
            "fedotp": {"context_length": 4, "mass": 0.8, "entropy": 0.1, "threshold": 1e-3, "max_sweeps": 100},
            "promptfl": {"context_length": 4},
            "fedprox": {"context_length": 4, "proximal_weight": 0.5},
        },
        "coop": (1, 30),
    },
    "fedotp-few-shot": {
        "model": "RN50",
        "training": (5, 16, "constant", "fp32", 50, SGD | {"learning_rate": 0.001}),
        "rounds": (10, None),
        "partition": {"kind": "pathological", "silos": 10, "shots": 16},
        "methods": {
            "fedotp": {"context_length": 16, "mass": 0.8, "entropy": 0.01, "threshold": 1e-3, "max_sweeps": 100},
            "promptfl": {"context_length": 16},
            "fedprox": {"context_length": 16, "proximal_weight": 0.5},
        },
        "coop": (1, 30),
    },
    "fedpgp-base-to-novel": {
        "model": "ViT-B-16",
        "training": (2, 16, "constant", "fp32", 50, SGD | {"learning_rate": 0.001}),
        "rounds": (25, None),
        "partition": {"kind": "pathological", "silos": 10, "shots": 16},
        "methods": {
            "fedpgp": {"context_length": 16, "rank": 8, "contrast_weight": 0.5, "temperature": 0.5},
            "promptfl": {"context_length": 16},
            "fedprox": {"context_length": 16, "proximal_weight": 0.5},
        },
        "coop": (1, 30),
    },
    "promptfolio-dirichlet": {
        "model": "ViT-B-16",
        "training": (5, 16, "cosine", "fp32", 50, SGD | {"learning_rate": 0.002}),
        "rounds": (10, None),
        "partition": {"kind": "dirichlet", "silos": 10, "beta": 0.3, "max_train": 16},
        "methods": {
            "promptfolio": {"context_length": 8, "share": 0.4},
            "promptfl": {"context_length": 8},
            "fedprox": {"context_length": 8, "proximal_weight": 1.0},
        },
        "coop": (1, 50),  # not from a script: as many epochs as the others have in all
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_of_a_recipe_are_those_of_the_authors_scripts(tmp_path: Path, fakes: Path, name: str) -> None:
    lab, path = prepared(tmp_path, fakes, name)
    wanted: dict[str, Any] = PUBLISHED[name]
    assert lab.model.architecture == wanted["model"]
    for plan in expand(lab, path.parent):
        assert plan.partition.model_dump().items() >= wanted["partition"].items()
        cells = {cell.label: cell for cell in plan.cells}
        assert (cells["coop"].rounds.count, cells["coop"].training.local_epochs) == wanted["coop"]
        for label, hyperparameters in wanted["methods"].items():
            cell = cells[label]
            training = cell.training.model_dump(mode="json")
            assert cell.method.model_extra == hyperparameters
            assert (cell.rounds.count, cell.rounds.max_silos) == wanted["rounds"]
            keys = ("local_epochs", "batch_size", "schedule", "precision", "views", "optimizer")
            assert tuple(training[key] for key in keys) == wanted["training"]


def test_the_novel_flowers_are_the_second_half_of_the_labels_and_not_of_the_names(tmp_path: Path, fakes: Path) -> None:
    lab, _ = prepared(tmp_path, fakes, "fedpgp-base-to-novel")
    assert lab.settings["flowers"].partition.novel == tuple(FLOWERS[51:])
    assert len(set(FLOWERS[:51]) & set(sorted(FLOWERS)[:51])) == 24
    assert "only 24 of 51 base" in recipe_text("fedpgp-base-to-novel")


def test_silos_of_the_recipe_with_cifar_are_about_equally_large(tmp_path: Path, fakes: Path) -> None:
    lab, path = prepared(tmp_path, fakes, "fedotp-cifar100-dirichlet")
    (plan, *_) = checked_plans(lab, path)
    collection = foreseen_collection(plan.data, lab.directory)
    assert collection is not None
    sizes = [len(holding.indices[Split.TRAIN]) for holding in deal(collection, plan.partition, plan.seed).holdings]
    assert max(sizes) < 3 * 60  # 60 each


def test_each_scanner_is_held_out_once(tmp_path: Path, fakes: Path) -> None:
    lab, _ = prepared(tmp_path, fakes, "embedded-held-out-domain")
    assert lab.data is not None
    assert lab.data.world is not None
    held_out = [setting.partition.held_out_domain for setting in lab.settings.values()]
    assert held_out == list(lab.data.world.scanners)
    assert list(lab.methods) == ["zeroshot", "coop", "promptfl", "promptfolio"]


def test_coop_runs_once_with_every_silo_in_the_recipe_that_draws_silos(tmp_path: Path, fakes: Path) -> None:
    lab, path = prepared(tmp_path, fakes, "fedotp-cifar100-dirichlet")
    rounds = {cell.label: (cell.rounds.count, cell.rounds.max_silos) for cell in cells_of(checked_plans(lab, path))}
    assert rounds["coop"] == (1, None)
    assert rounds["fedotp"] == (150, 10)


def test_every_recipe_has_a_title_of_its_own() -> None:
    titles = recipe_titles()
    assert set(titles) >= {
        "embedded-held-out-domain",
        "embedded-quick",
        "embedded-shifts",
        "fedotp-cifar100-dirichlet",
        "fedotp-few-shot",
        "fedpgp-base-to-novel",
        "promptfolio-dirichlet",
    }
    assert max(Counter(titles.values()).values()) == 1
    assert all(len(title) > 30 for title in titles.values())
