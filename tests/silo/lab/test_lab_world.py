"""Drawn scenes as a lab's data: what is drawn is what was foreseen, once."""

import shutil
from collections import Counter
from pathlib import Path

import lab_samples
import pytest
from lab_samples import LAB

from fedrt.errors import FedrtError
from silo.embedded.world import ALL_PAIRS, HELD_OUT_PAIRS, SEEN_PAIRS, SHAPES
from silo.lab.images import data_of, foreseen_collection, images_of, prepare
from silo.lab.perform import Order, plans_of
from silo.lab.world import pairs_of, planned_collection
from silo.partition.collection import read_collection
from silo.partition.dealing import deal


def test_the_classes_of_a_choice() -> None:
    assert pairs_of("seen") == SEEN_PAIRS
    assert pairs_of("held_out") == HELD_OUT_PAIRS
    assert pairs_of("all") == ALL_PAIRS
    assert [pair.class_name for pair in pairs_of(("blue star", "red circle"))] == ["blue star", "red circle"]
    assert set(pairs_of(len(ALL_PAIRS))) == set(ALL_PAIRS)


@pytest.mark.parametrize("count", [8, 24, 40])
def test_a_number_of_classes_has_colours_and_shapes_alike(count: int) -> None:
    chosen = pairs_of(count)
    assert len(set(chosen)) == count
    assert set(Counter(pair.colour for pair in chosen).values()) == {count // 8}
    shapes = Counter(pair.shape for pair in chosen)
    assert max(shapes.values()) - min(shapes[shape] for shape in range(len(SHAPES))) <= 2
    assert set(chosen) & set(HELD_OUT_PAIRS)
    assert set(pairs_of(count - 1)) < set(chosen)


def test_what_is_drawn_is_what_was_foreseen(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path, LAB.replace("kind: iid, silos: 2", "kind: domain, novel: half"))
    (data,) = data_of(lab)
    foreseen = foreseen_collection(data, lab.directory)
    (root,) = prepare(lab)
    drawn = read_collection(images_of(data, lab.directory))
    assert foreseen is not None
    assert root == drawn.root == foreseen.root
    assert len(list(root.rglob("*.png"))) == 2 * 4 * (6 + 4)
    before, after = (deal(collection, plans[0].partition) for collection in (foreseen, drawn))
    assert before.silos == after.silos == ("coarse", "tinted")
    assert [one.class_counts for one in before.holdings] == [one.class_counts for one in after.holdings]


def test_scenes_are_drawn_once_and_what_was_interrupted_is_drawn_again(tmp_path: Path) -> None:
    lab, _ = lab_samples.read(tmp_path)
    (root,) = prepare(lab)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    half, *_ = (root / "coarse").rglob("*.png")
    (root / "coarse").rename(root / ".coarse.new")
    list(prepare(lab))
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert before.keys() == after.keys()
    assert after[half] > before[half]
    assert all(after[path] == before[path] for path in before if path.is_relative_to(root / "tinted"))
    assert not (root / ".coarse.new").exists()


@pytest.mark.parametrize("damage", ["an image", "an empty image", "a class", "a split", "one too many"])
def test_a_scanner_that_lacks_an_image_is_drawn_again(tmp_path: Path, damage: str) -> None:
    lab, _ = lab_samples.read(tmp_path)
    (root,) = prepare(lab)
    before = {path: path.read_bytes() for path in root.rglob("*.png")}
    untouched = {path: path.stat().st_mtime_ns for path in before if path.is_relative_to(root / "tinted")}
    image = min(path for path in before if path.is_relative_to(root / "coarse"))
    match damage:
        case "an image":
            image.unlink()
        case "an empty image":
            image.write_bytes(b"")
        case "a class":
            shutil.rmtree(image.parent)
        case "a split":
            shutil.rmtree(image.parent.parent)
        case _:
            shutil.copy(image, image.with_name("copy.png"))
    list(prepare(lab))
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


def test_other_scenes_lie_elsewhere(tmp_path: Path) -> None:
    roots = set()
    another_seed = LAB.replace("    test_images: 4", "    test_images: 4\n    seed: 2")
    for text in (
        LAB,
        another_seed,
        LAB.replace("tinted", "dark"),
    ):
        lab, _ = lab_samples.read(tmp_path, text)
        roots.add(images_of(data_of(lab)[0], lab.directory).root)
    assert len(roots) == 3


def test_scenes_that_cannot_be_drawn_are_told(tmp_path: Path) -> None:
    lab, _ = lab_samples.read(tmp_path)
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(FedrtError, match="scenes cannot be drawn into"):
        list(prepare(lab))


def test_a_foreseen_collection_has_a_domain_for_each_scanner(tmp_path: Path) -> None:
    lab, _ = lab_samples.read(tmp_path)
    world = data_of(lab)[0].world
    assert world is not None
    collection = planned_collection(world, tmp_path)
    assert collection.domains == ("coarse", "tinted")
    assert len(collection.items) == 80


def test_data_that_several_settings_share_are_prepared_once(tmp_path: Path) -> None:
    text = LAB.replace("methods:", "  other:\n    partition: {kind: iid, silos: 3}\nmethods:")
    lab, _ = lab_samples.read(tmp_path, text)
    assert len(data_of(lab)) == 1
    text = text.replace("silos: 3}\n", "silos: 3}\n    data: {root: pictures, layout: image_folder}\n")
    lab, plans = lab_samples.read(tmp_path, text)
    assert [data.layout for data in data_of(lab)] == [None, "image_folder"]
    assert images_of(plans[-1].data, lab.directory).root == tmp_path / "pictures"


def test_only_the_data_of_the_settings_that_are_asked_for_are_looked_at_and_prepared(tmp_path: Path) -> None:
    other = "  other:\n    partition: {kind: iid, silos: 3}\n    data: {root: gone, layout: image_folder}\nmethods:"
    lab, _ = lab_samples.read(tmp_path, LAB.replace("methods:", other))
    with pytest.raises(FedrtError, match="gone"):
        plans_of(lab, Order(tmp_path / "lab.yaml"))
    plans, wanted = plans_of(lab, Order(tmp_path / "lab.yaml", only=("iid/*",)))
    assert [plan.name for plan in plans] == ["iid-s1", "iid-s2", "other-s1", "other-s2"]
    assert [plan.name for plan in wanted] == ["iid-s1", "iid-s2"]
    assert len(list(prepare(lab, ["iid"]))) == 1
    assert list(prepare(lab, ["other"])) == [tmp_path / "gone"]
