"""The hospitals' image folders: deterministic, train and test disjoint, different scanners and class mixes."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from silo.embedded.datasets import (
    DIGIT_SCANNERS,
    WORLD_PAIRS,
    WORLD_SCANNERS,
    Hospital,
    Split,
    counts_of,
    digit_class_names,
    world_class_names,
    write_digit_hospitals,
    write_digits_folder,
    write_world_folder,
    write_world_hospitals,
)
from silo.embedded.world import HELD_OUT_PAIRS


def digests_of(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*.png"))}


def counts_in(folder: Path) -> dict[str, int]:
    return {child.name: len(list(child.glob("*.png"))) for child in folder.iterdir()}


def check_hospitals(hospitals: tuple[Hospital, ...], root: Path, class_names: tuple[str, ...]) -> None:
    digests = digests_of(root)
    assert len(set(digests.values())) == len(digests)  # no image twice: not in train and test, not at two hospitals
    for hospital in hospitals:
        assert counts_in(hospital.root / "train") == dict(hospital.train_counts)
        assert counts_in(hospital.root / "test") == dict(hospital.test_counts)
        assert set(hospital.train_counts) == set(hospital.test_counts) == set(class_names)
        assert min(hospital.test_counts.values()) >= 2
    mixes = [np.array([h.train_counts[name] for name in class_names]) for h in hospitals]
    shares = [mix / mix.sum() for mix in mixes]
    assert min(np.abs(shares[i] - shares[j]).sum() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.2


def test_world_hospitals(tmp_path: Path) -> None:
    hospitals = write_world_hospitals(tmp_path, seed=1)
    assert [h.scanner for h in hospitals] == list(WORLD_SCANNERS)
    check_hospitals(hospitals, tmp_path, world_class_names())
    assert set(HELD_OUT_PAIRS) <= set(WORLD_PAIRS)
    assert all(sum(h.train_counts.values()) == 384 and sum(h.test_counts.values()) == 480 for h in hospitals)


def test_digit_hospitals_share_all_digits_among_them(tmp_path: Path) -> None:
    hospitals = write_digit_hospitals(tmp_path, seed=1)
    assert [h.scanner for h in hospitals] == list(DIGIT_SCANNERS)
    check_hospitals(hospitals, tmp_path, digit_class_names())
    total: Counter[str] = Counter()
    for hospital in hospitals:
        total += Counter(hospital.train_counts) + Counter(hospital.test_counts)
    assert sum(total.values()) == 1797


def test_same_seed_writes_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_world_hospitals(tmp_path / name, seed, WORLD_PAIRS[:6], train_count=30, test_count=20)
    assert digests_of(tmp_path / "a") == digests_of(tmp_path / "b")
    assert set(digests_of(tmp_path / "a").values()).isdisjoint(digests_of(tmp_path / "c").values())


def test_folders_hold_32_pixel_rgb_files(tmp_path: Path) -> None:
    write_world_folder(tmp_path, "clean", {WORLD_PAIRS[0]: 2}, Split.TRAIN, seed=0)
    write_digits_folder(tmp_path, "inverted", [0, 1], Split.TEST, seed=0)
    files = sorted(tmp_path.rglob("*.png"))
    assert {str(file.relative_to(tmp_path).parent) for file in files} == {
        f"train/{WORLD_PAIRS[0].class_name}",
        "test/digit zero",
        "test/digit one",
    }
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")


def test_counts_follow_the_mix_by_largest_remainders() -> None:
    assert counts_of(np.array([0.5, 0.3, 0.2]), 11, minimum=1) == [5, 3, 3]
    assert counts_of(np.array([1.0, 0.0]), 7, minimum=2) == [5, 2]


def test_too_few_images_for_all_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match="ask for 12"):
        counts_of(np.array([0.5, 0.3, 0.2]), 11, minimum=4)
