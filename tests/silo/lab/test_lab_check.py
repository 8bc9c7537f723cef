"""What `fedrt-lab check` finds: every mistake of a lab.yaml at once, with its place and the next step."""

import json
import re
from pathlib import Path

import lab_samples
import pytest
from lab_samples import LAB

from fedrt.errors import ConfigurationError
from silo.embedded import embedded_paths
from silo.lab.check import POSITIONS, checked_plans, grid_text, weights_sha256
from silo.lab.grid import cells_of
from silo.lab.sections import load_lab


def complaint(directory: Path, text: str) -> str:
    path = lab_samples.write_lab(directory, text)
    with pytest.raises(ConfigurationError) as raised:
        checked_plans(load_lab(path), path)
    return str(raised.value)


def changed(old: str, new: str) -> str:
    assert old in LAB
    return LAB.replace(old, new)


WORLD = LAB[LAB.index("data:") : LAB.index("training:")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed("lab: trial", "lab: My trial"), "lab: name 'My trial' is not usable"),
        (changed("rounds:", "round:"), "round is not a known key; did you mean 'rounds'?"),
        (changed("seeds: [1, 2]", "seeds: []"), "seeds must be a list of at least 1"),
        (changed("seeds: [1, 2]", "seeds: [1, 1]"), "seeds names a seed twice"),
        (changed("seeds: [1, 2]", "seeds: [-1]"), "seeds[0] must be at least 0"),
        (changed("count: 4", "count: 4, silos: [a, b]"), "rounds: silos follow from the partition; remove silos"),
        (changed("silos: 2}", "silos: 2, seed: 5}"), "settings.iid: partition.seed is set, but seeds are the lab's"),
        (changed("kind: iid", "kind: idd"), "did you mean 'iid'?"),
        (changed("iid:\n", "I I D:\n"), "name 'I I D' is not usable"),
        (
            changed("zeroshot:", f"{'long-' * 9}name:"),
            "is 56 characters long, and names of experiments begin so; shorten",
        ),
        (changed("    method: {name: zeroshot}", "    training: {}"), "methods.zeroshot.method is missing; add it"),
        (changed(WORLD, ""), "setting 'iid' has no data; add data to it or to the lab"),
        (changed(WORLD, "data: {root: images}\n"), "data: none of layout, torchvision and world is given; give"),
        (
            changed(WORLD, "data: {root: images, layout: image_folder, torchvision: CIFAR10}\n"),
            "data: layout and torchvision are all given; give exactly one of",
        ),
        (changed(WORLD, "data: {torchvision: CIFAR10}\n"), "data: root is missing; add the directory"),
        (
            changed(WORLD, "data: {root: x, torchvision: CIFAR1000}\n"),
            "'CIFAR1000' is not known here; known are CIFAR10,",
        ),
        (
            changed(WORLD, "data: {root: x, layout: manifest}\n"),
            "layout is 'manifest', but manifest is missing; add the path of the CSV file",
        ),
        (changed("    test_images: 4\n", "    test_images: 4\n  root: x\n"), "root is set beside world"),
        (
            changed("[tinted, coarse]", "[tinted, course]"),
            "the drawn world has no scanner 'course'; did you mean 'coarse'?",
        ),
        (changed("[tinted, coarse]", "[tinted, tinted]"), "data.world.scanners must name each once"),
        (changed("classes: 4", "classes: 1"), "data.world.classes must be seen, held_out, all, a number from 2"),
        (changed("classes: 4", "classes: [red circle, red cirle]"), "did you mean 'red circle'?"),
        (changed("train_images: 6", "train_images: 0"), "data.world.train_images must be at least 1"),
    ],
)
def test_mistakes_of_the_keys(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed("name: promptfl", "name: promptf"), "methods.promptfl: method 'promptf' is not installed"),
        (changed("context_length: 4", "context_lenght: 4"), "has no hyper-parameter 'context_lenght'"),
        (changed("architecture: fedrt-tiny", "architecture: ViT-B-61"), "did you mean 'ViT-B-16'"),
        (changed("weights: embedded", "weights: missing.pt"), "missing.pt' does not exist; copy the weights there"),
        (changed("fedrt-tiny, weights", "ViT-B-16, weights"), "'embedded' belongs to 'fedrt-tiny', not to 'ViT-B-16'"),
        (changed(WORLD, "data: {root: gone, layout: image_folder}\n"), "gone' does not exist"),
        (changed("kind: iid, silos: 2", "kind: pathological, silos: 5"), "settings.iid (seed 1): partition.silos is 5"),
        (changed("silos: 2}", "silos: 2, held_out_domain: corse}"), "no domain 'corse'; did you mean 'coarse'?"),
        (
            changed("silos: 2}", "silos: 2, novel: half}").replace("length: 4", "length: 4, class_specific: true"),
            "settings.iid with methods.promptfl: method 'promptfl' with these hyper-parameters learns something for "
            "each class, which novel classes lack; remove novel from the setting's partition, or class_specific from",
        ),
        (
            changed("count: 4", "count: 4, max_silos: 3"),
            "settings.iid: rounds.max_silos is 3, but the partition has 2 silos; lower it, or leave it out for all",
        ),
        (
            changed("count: 4", "count: 4, min_results: 3"),
            "settings.iid: rounds.min_results is 3, but the partition has 2 silos; lower it",
        ),
        (
            changed("length: 4}", "length: 4}\n    rounds: {max_silos: 3}"),
            "settings.iid with methods.promptfl: rounds.max_silos is 3, but the partition has 2 silos",
        ),
        (
            changed("context_length: 4", "context_length: 36"),
            "methods.promptfl: context_length is 36, but the text tower of fedrt-tiny has 40 positions, and class",
        ),
        (changed("batch_size: 8", "batch_size: 0"), "settings.iid with methods.zeroshot: training.local_epochs and"),
    ],
)
def test_mistakes_that_only_the_grid_shows(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = changed("name: zeroshot", "name: zeroshott").replace("length: 4", "length: 0").replace("embedded", "a/b.pt")
    lines = complaint(tmp_path, text).splitlines()
    assert lines[0].endswith("lab.yaml: 3 problems")
    assert [re.split(r"[: ]", line.strip())[0] for line in lines[1:]] == [
        "methods.zeroshot",
        "methods.promptfl",
        "model.weights",
    ]


def test_weights_images_methods_and_partitions_are_told_at_once(tmp_path: Path) -> None:
    drawn = "{world: {scanners: [coarse], classes: 4, train_images: 6, test_images: 4}}"
    other = f"  drawn:\n    data: {drawn}\n    partition: {{kind: pathological, silos: 5}}\n"
    text = changed(WORLD, "data: {root: gone, layout: image_folder}\n").replace("embedded", "a/b.pt")
    text = text.replace("name: zeroshot", "name: zero").replace("methods:", f"{other}methods:")
    lines = complaint(tmp_path, text).splitlines()[1:]
    told = ["methods.zeroshot:", "a/b.pt' does", "gone' does", "settings.drawn (seed 1): ", "settings.drawn (seed 2): "]
    assert len(lines) == len(told), lines
    assert all(said in line for line, said in zip(lines, told, strict=True)), lines


def test_a_context_that_just_fits_is_no_mistake(tmp_path: Path) -> None:
    path = lab_samples.write_lab(tmp_path, changed("context_length: 4", "context_length: 35"))
    assert checked_plans(load_lab(path), path)


def test_the_positions_of_the_embedded_text_tower_are_those_of_its_configuration() -> None:
    document = json.loads(embedded_paths().config_path.read_text())
    assert POSITIONS["fedrt-tiny"] == document["text_cfg"]["context_length"]


def test_classes_that_become_the_same_prompt(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("Red_circle", "red circle", "blue star"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}.png").write_text(f"{split} {name} {number}")
    text = changed(WORLD, "data: {root: images, layout: image_folder}\n")
    said = "settings.iid: the classes 'Red_circle' and 'red circle' become the same prompt; give each a name of its own"
    assert said in complaint(tmp_path, text)


def test_more_silos_than_a_partition_has_are_told_before_its_images_are_there(tmp_path: Path) -> None:
    text = changed(WORLD, "data: {root: ., torchvision: CIFAR10}\n")
    assert "rounds.max_silos is 3, but" in complaint(tmp_path, text.replace("count: 4", "count: 4, max_silos: 3"))
    path = lab_samples.write_lab(tmp_path, text.replace("count: 4", "count: 4, min_results: 2"))
    assert checked_plans(load_lab(path), path)


def test_what_every_seed_complains_of_is_told_for_each_setting_once(tmp_path: Path) -> None:
    text = changed("silos: 2}", "silos: 2, novel: half}").replace("length: 4", "length: 4, class_specific: true")
    assert complaint(tmp_path, text).count("learns something for each class") == 1


def test_what_every_method_of_a_setting_shares_is_told_once(tmp_path: Path) -> None:
    assert complaint(tmp_path, changed("count: 4", "count: 4, max_silos: 3")).count("max_silos") == 1


def test_nothing_is_written_or_drawn(tmp_path: Path) -> None:
    path = lab_samples.write_lab(tmp_path)
    assert len(checked_plans(load_lab(path), path)) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["lab.yaml"]


def test_images_of_torchvision_are_not_needed_yet(tmp_path: Path) -> None:
    text = changed(WORLD, "data: {root: somewhere, torchvision: CIFAR10}\n")
    assert "somewhere' does not exist; set it to the directory in which torchvision" in complaint(tmp_path, text)
    (tmp_path / "somewhere").mkdir()
    path = lab_samples.write_lab(tmp_path, text)
    assert len(checked_plans(load_lab(path), path)) == 2


def test_the_grid_in_words(tmp_path: Path) -> None:
    lab, plans = lab_samples.read(tmp_path)
    finished = {next(cells_of(plans)).cell_id: object()}
    assert grid_text(lab, plans, finished).splitlines() == [
        "lab trial: 4 cells = 1 setting x 2 methods x 2 seeds; 1 finished",
        "  setting iid: kind iid, silos 2",
        "    zeroshot: zeroshot, 0 rounds, seeds 1, 2; 1 of 2 finished",
        "    promptfl: promptfl, 4 rounds, seeds 1, 2; 0 of 2 finished",
    ]


def test_the_digest_of_weights(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"abc")
    lab = load_lab(lab_samples.write_lab(tmp_path, changed("weights: embedded", "weights: w.pt")))
    assert weights_sha256(lab.model) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "w.pt").unlink()
    with pytest.raises(ConfigurationError, match=r"w\.pt' cannot be read"):
        weights_sha256(lab.model)
