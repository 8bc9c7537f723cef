"""Exports of torchvision's data sets: its own classes on tiny trees, and stand-ins for what a checksum protects."""

import hashlib
import json
import os
import pickle
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedrt.errors import ConfigurationError, StorageError
from silo.data import Split
from silo.partition import CollectionSection, deal, read_collection
from silo.partition.torchvision_sets import MARKER, SETS, Exported, export_torchvision
from tests.silo.partition.drawn import section


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade % 256, 50, 7)).save(path, quality=90)
    return path


def tree(root: Path) -> dict[str, int]:
    """Directory -> number of files in it, hidden ones left out."""
    counts: dict[str, int] = {}
    for path in root.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            parent = path.parent.relative_to(root).as_posix()
            counts[parent] = counts.get(parent, 0) + 1
    return counts


class InMemory:
    """What an export needs of a data set of torchvision."""

    def __init__(self, classes: Sequence[str], labels: Sequence[int], shade: int = 0) -> None:
        self.classes = list(classes)
        self.labels = list(labels)
        self.shade = shade

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 4), (self.shade + position, 0, 0)), self.labels[position]


# --- torchvision's own classes -------------------------------------------------------------------------------------


def test_cifar_becomes_png(tmp_path: Path) -> None:
    import torchvision.datasets

    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3072), dtype=np.uint8)

    def batch(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    class TinyCifar(torchvision.datasets.CIFAR10):
        """The real reader, with the checksums of these files."""

        train_list = (batch("data_batch_1", {"data": pixels[:3], "labels": [0, 3, 3]}),)
        test_list = (batch("test_batch", {"data": pixels[3:], "labels": [1, 0]}),)

        @property
        def meta(self) -> dict[str, str]:
            return {"key": "label_names", "filename": "batches.meta", "md5": checksum}

    _, checksum = batch("batches.meta", {"label_names": ["airplane", "automobile", "bird", "aquarium_fish"]})
    target = tmp_path / "target"
    exported = export_torchvision("CIFAR10", tmp_path / "source", target, TinyCifar)
    assert exported == Exported(target, ("airplane", "aquarium fish", "automobile"), {"train": 3, "test": 2})
    found = {path.relative_to(target).as_posix() for path in target.rglob("*.png")}
    assert found == {
        "train/airplane/000000.png",
        "train/aquarium fish/000001.png",
        "train/aquarium fish/000002.png",
        "test/automobile/000000.png",
        "test/airplane/000001.png",
    }
    read = np.asarray(Image.open(target / "train" / "aquarium fish" / "000002.png"))
    assert (read == pixels[2].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def food(source: Path) -> None:
    for label in ("apple_pie", "ramen"):
        for number in range(3):
            picture(source / "food-101" / "images" / label / f"{number}.jpg", 10 * number + len(label))
    for side, numbers in (("train", (0, 1)), ("test", (2,))):
        listing = {label: [f"{label}/{number}" for number in numbers] for label in ("apple_pie", "ramen")}
        (source / "food-101" / "meta").mkdir(exist_ok=True)
        (source / "food-101" / "meta" / f"{side}.json").write_text(json.dumps(listing))


def test_food_keeps_its_splits_and_original_bytes(tmp_path: Path) -> None:
    food(tmp_path)
    exported = export_torchvision("Food101", tmp_path, tmp_path / "out")
    assert exported.classes == ("apple pie", "ramen")
    assert exported.counts == {"train": 4, "test": 2}
    copies = sorted((tmp_path / "out" / "test").rglob("*.jpg"))
    assert [path.relative_to(tmp_path / "out").as_posix() for path in copies] == [
        "test/apple pie/000000.jpg",
        "test/ramen/000001.jpg",
    ]
    originals = [tmp_path / "food-101" / "images" / name / "2.jpg" for name in ("apple_pie", "ramen")]
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in originals]
    assert copies[0].stat().st_ino == originals[0].stat().st_ino


def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    food(tmp_path)
    export_torchvision("Food101", tmp_path, tmp_path / "out")
    copy, original = tmp_path / "out/test/ramen/000001.jpg", tmp_path / "food-101/images/ramen/2.jpg"
    assert copy.read_bytes() == original.read_bytes()
    assert copy.stat().st_ino != original.stat().st_ino


def test_flowers_train_on_validation_images_too(tmp_path: Path) -> None:
    import scipy.io
    import torchvision.datasets

    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        picture(folder / "jpg" / f"image_{number:05d}.jpg", 40 * number)

    def mat(name: str, **content: list[int]) -> tuple[str, str]:
        scipy.io.savemat(folder / name, content)
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    class TinyFlowers(torchvision.datasets.Flowers102):
        """The real reader, with the checksums of these files."""

        _file_dict = types.MappingProxyType(
            {
                "label": mat("imagelabels.mat", labels=[1, 60, 60, 1, 60, 1]),
                "setid": mat("setid.mat", trnid=[1, 2], valid=[3, 4], tstid=[5, 6]),
            }
        )

    exported = export_torchvision("Flowers102", tmp_path, tmp_path / "out", TinyFlowers)
    assert exported == Exported(tmp_path / "out", ("pink primrose", "pink-yellow dahlia"), {"train": 4, "test": 2})
    copies = ["train/pink primrose/000000", "train/pink-yellow dahlia/000001", "train/pink-yellow dahlia/000002"]
    copies += ["train/pink primrose/000003", "test/pink-yellow dahlia/000000", "test/pink primrose/000001"]
    for number, copy in enumerate(copies, 1):
        original = folder / "jpg" / f"image_{number:05d}.jpg"
        assert (tmp_path / "out" / f"{copy}.jpg").read_bytes() == original.read_bytes()


def test_pets_and_textures_and_their_validation_images(tmp_path: Path) -> None:
    pets = tmp_path / "oxford-iiit-pet"
    (pets / "annotations").mkdir(parents=True)
    for side, numbers in (("trainval", (1, 2)), ("test", (3,))):
        lines = [
            f"{name}_{n} {label} 1 1" for n in numbers for label, name in ((1, "Abyssinian"), (2, "american_bulldog"))
        ]
        (pets / "annotations" / f"{side}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            picture(pets / "images" / f"{line.split()[0]}.jpg", len(line))
    exported = export_torchvision("OxfordIIITPet", tmp_path, tmp_path / "out-pets")
    assert exported.classes == ("Abyssinian", "American Bulldog")
    assert tree(tmp_path / "out-pets") == {
        "train/Abyssinian": 2, "train/American Bulldog": 2, "test/Abyssinian": 1, "test/American Bulldog": 1
    }  # fmt: skip
    for number, side in enumerate(("train", "val", "test")):
        labels = tmp_path / "dtd" / "dtd" / "labels" / f"{side}1.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("".join(f"{label}/{label}_{side}.jpg\n" for label in ("banded", "polka-dotted")))
        for label in ("banded", "polka-dotted"):
            picture(tmp_path / "dtd" / "dtd" / "images" / label / f"{label}_{side}.jpg", number)
    exported = export_torchvision("DTD", tmp_path, tmp_path / "out-dtd")
    assert exported.counts == {"train": 4, "test": 2}
    assert exported.classes == ("banded", "polka-dotted")


def test_caltech_has_the_classes_of_the_papers_and_no_split(tmp_path: Path) -> None:
    place = tmp_path / "caltech101" / "101_ObjectCategories"
    for label in ("BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "car_side"):
        for number in range(1, 5):
            picture(place / label / f"image_{number:04d}.jpg", 40 * number + len(label))
    target = tmp_path / "out"
    exported = export_torchvision("Caltech101", tmp_path, target)
    assert exported == Exported(target, ("car side", "face", "leopard"), {"all": 12})
    assert tree(target) == {"car side": 4, "face": 4, "leopard": 4}
    collection = read_collection(CollectionSection(root=target, layout="image_folder", test_share=0.25))
    assert [item.split for item in collection.items].count(Split.TEST) == 3
    assert len(deal(collection, section(kind="pathological", silos=3)).holdings) == 3


@pytest.mark.parametrize("name", SETS)
def test_files_that_are_not_there_are_asked_for_and_not_downloaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "source").mkdir()
    words = rf"torchvision\.datasets\.{name} cannot read '.*/source/\S+' \(there is no such .*nothing is downloaded"
    with pytest.raises(ConfigurationError, match=words):
        export_torchvision(name, tmp_path / "source", tmp_path / "target")
    assert list((tmp_path / "source").iterdir()) == []
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", [name for name in SETS if name != "Caltech101"])
def test_incomplete_files_are_named_without_advice_to_download(tmp_path: Path, name: str) -> None:
    places = ("cifar-10-batches-py", "cifar-100-python", "dtd", "flowers-102", "food-101", "oxford-iiit-pet")
    for place in places:
        (tmp_path / place).mkdir()
    with pytest.raises(ConfigurationError, match=rf"{name} cannot read .* \(Dataset not found.*\); nothing") as caught:
        export_torchvision(name, tmp_path, tmp_path / "target")
    assert "download=True" not in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    food(tmp_path)
    (tmp_path / "food-101" / "images" / "ramen" / "2.jpg").unlink()
    with pytest.raises(ConfigurationError, match=r"ramen/2\.jpg' of torchvision\.datasets\.Food101 is missing"):
        export_torchvision("Food101", tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


# --- stand-ins -----------------------------------------------------------------------------------------------------


def flowers(root: str, split: str, download: bool) -> InMemory:
    assert not download
    labels = {"train": [0, 1], "val": [1, 2], "test": [0, 1, 2]}[split]
    return InMemory(["colt's foot", "pink-yellow dahlia?", "desert-rose"], labels, shade=len(split) * 10)


def test_validation_images_of_flowers_train(tmp_path: Path) -> None:
    exported = export_torchvision("Flowers102", tmp_path, tmp_path / "out", flowers)
    assert exported.classes == ("colt's foot", "desert-rose", "pink-yellow dahlia")
    assert exported.counts == {"train": 4, "test": 3}
    assert tree(tmp_path / "out") == {
        "train/colt's foot": 1, "train/pink-yellow dahlia": 2, "train/desert-rose": 1,
        "test/colt's foot": 1, "test/pink-yellow dahlia": 1, "test/desert-rose": 1,
    }  # fmt: skip
    collection = read_collection(CollectionSection(root=tmp_path / "out", layout="image_folder"))
    assert collection.labels == exported.classes
    assert len(collection.items) == 7


def test_what_is_finished_stays(tmp_path: Path) -> None:
    first = export_torchvision("Flowers102", tmp_path, tmp_path / "out", flowers)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}

    def gone(**_: Any) -> InMemory:
        raise AssertionError("nothing needs to be read again")

    assert export_torchvision("Flowers102", tmp_path / "unplugged", tmp_path / "out", gone) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_what_was_interrupted_is_completed(tmp_path: Path) -> None:
    drawn: list[int] = []

    def cifar(allowed: int) -> Any:
        class Counting(InMemory):
            @property
            def targets(self) -> list[int]:
                return self.labels

            def __getitem__(self, position: int) -> tuple[Image.Image, int]:
                if len(drawn) == allowed:
                    raise KeyboardInterrupt
                drawn.append(position)
                return super().__getitem__(position)

        return lambda **_: Counting(["cat", "dog"], [0, 1] * 3)

    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        export_torchvision("CIFAR10", tmp_path, target, cifar(4))
    assert json.loads((target / MARKER).read_text())["complete"] is False
    assert sum(tree(target).values()) == 4
    (target / "train" / "cat" / "000002.png").write_bytes(b"")  # as a power cut may leave it
    (target / "train" / "cat" / ".000004.png.new").write_bytes(b"half")
    exported = export_torchvision("CIFAR10", tmp_path, target, cifar(100))
    assert exported.counts == {"train": 6, "test": 6}
    assert tree(target) == {"train/cat": 3, "train/dog": 3, "test/cat": 3, "test/dog": 3}
    assert len(drawn) == 4 + 9, "three images were there already"
    assert not list(target.rglob("*.new"))
    assert np.asarray(Image.open(target / "train" / "cat" / "000002.png"))[0, 0, 0] == 2


def test_a_target_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(ConfigurationError, match="holds other files; name an empty or new directory"):
            export_torchvision("Flowers102", tmp_path, tmp_path / name, flowers)
    export_torchvision("Flowers102", tmp_path, tmp_path / "out", flowers)
    with pytest.raises(ConfigurationError, match="holds data set 'Flowers102'; name another directory"):
        export_torchvision("CIFAR10", tmp_path, tmp_path / "out", flowers)
    (tmp_path / "out" / MARKER).write_text("[]")
    with pytest.raises(ConfigurationError, match="is damaged; remove"):
        export_torchvision("Flowers102", tmp_path, tmp_path / "out", flowers)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(
        ConfigurationError, match="data set 'MNIST' is unknown; known are CIFAR10, CIFAR100, Caltech101"
    ):
        export_torchvision("MNIST", Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["a_b", "a b"], "two classes .* would both be called 'a b'"),
        (["../a", "b"], r"class '\.\./a' of data set 'CIFAR10' cannot be the name of a directory"),
        ([".a", "b"], "cannot be the name of a directory"),
        (["_", "b"], "cannot be the name of a directory"),
    ],
)
def test_class_names_must_make_directories(tmp_path: Path, classes: list[str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        export_torchvision("CIFAR10", tmp_path, tmp_path / "out", lambda **_: InMemory(classes, [0, 1]))


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    def needy(**_: Any) -> InMemory:
        raise ImportError("No module named 'scipy'", name="scipy")

    with pytest.raises(ConfigurationError, match=r"torchvision\.datasets\.Flowers102 needs 'scipy'; install it"):
        export_torchvision("Flowers102", tmp_path, tmp_path / "out", needy)


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        export_torchvision("Flowers102", tmp_path, tmp_path / "file" / "out", flowers)
