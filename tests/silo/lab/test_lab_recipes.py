"""The recipes: each passes its check once the paths are set, with sets of images that have the true classes' number."""

import re
from collections import Counter
from pathlib import Path

import pytest

from fedrt.experiment_file import experiment_spec
from fedrt.methods import BUILT_IN
from silo.data.records import Split
from silo.lab.check import checked_plans, dealt_of
from silo.lab.grid import cells_of, experiment_of
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
PLACEHOLDER = re.compile(r"/path/to/([\w.-]+)")


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the placeholders of the recipes stand for, and exported sets of files that are no images."""
    place = tmp_path_factory.mktemp("fakes")
    for name, (class_count, counts) in SETS.items():
        for split, count in counts.items():
            for label in range(class_count):
                folder = place / "exported" / name / split / f"class {label:03d}"
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


@pytest.mark.parametrize("name", [name for name in recipe_titles() if name != "embedded-quick"])
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


def test_the_published_numbers_of_the_methods_that_give_recipes_their_names(tmp_path: Path, fakes: Path) -> None:
    """As the script of FedOTP's authors has them."""
    lab, _ = prepared(tmp_path, fakes, "fedotp-cifar100-dirichlet")
    assert lab.methods["fedotp"].method.model_extra == {
        "context_length": 4, "mass": 0.8, "entropy": 0.1, "threshold": 1e-3, "max_sweeps": 100,
    }  # fmt: skip
    assert (lab.rounds.count, lab.rounds.max_silos, lab.training.batch_size) == (150, 10, 32)
    assert (lab.training.local_epochs, lab.training.optimizer.learning_rate) == (1, 0.001)


def test_coop_runs_once_with_every_silo_in_the_recipe_that_draws_silos(tmp_path: Path, fakes: Path) -> None:
    lab, path = prepared(tmp_path, fakes, "fedotp-cifar100-dirichlet")
    rounds = {cell.label: (cell.rounds.count, cell.rounds.max_silos) for cell in cells_of(checked_plans(lab, path))}
    assert rounds["coop"] == (1, None)
    assert rounds["fedotp"] == (150, 10)


def test_every_recipe_has_a_title_of_its_own() -> None:
    titles = recipe_titles()
    assert set(titles) >= {
        "embedded-quick",
        "embedded-shifts",
        "fedotp-cifar100-dirichlet",
        "fedotp-few-shot",
        "fedpgp-base-to-novel",
        "promptfolio-dirichlet",
    }
    assert max(Counter(titles.values()).values()) == 1
    assert all(len(title) > 30 for title in titles.values())
