"""Manifests of silos: that a silo reads back what it was dealt, and that a directory is never left in between."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrt.errors import ConfigurationError, StorageError
from silo.data import Split, index
from silo.partition import Collection, Item, Partition, deal, manifests, write_manifests
from silo.sources import DataSource
from tests.silo.partition.drawn import collections, even, paths, section, sections


def on_disk(collection: Collection, root: Path) -> Collection:
    """The same collection with a file for every item."""
    for item in collection.items:
        (root / item.path).parent.mkdir(parents=True, exist_ok=True)
        (root / item.path).write_text(item.path)
    return Collection(root, collection.items)


def two(count: int = 3, **values: Any) -> tuple[Partition, Collection]:
    collection = even(2, 8, 6)
    return deal(collection, section(**({"kind": "iid", "silos": count} | values))), collection


@given(st.data())
@settings(max_examples=25)
def test_a_silo_reads_what_it_was_dealt(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "images"
        collection = on_disk(data.draw(collections(least=8)), root)
        partition = deal(collection, data.draw(sections(collection, generous=True)))
        written = write_manifests(partition, collection, Path(place) / "silos")
        for silo, held in paths(partition, collection).items():
            found = index(DataSource("manifest", root, written[silo]))
            labels = {item.path: item.label for item in collection.items}
            assert {split: [record.name for record in found.of_split(split)] for split in held} == held
            assert {record.split for record in found.records} == {split for split, names in held.items() if names}
            assert all(record.label == labels[record.name] for record in found.records)


def test_names_with_commas_and_quotes_are_read_back(tmp_path: Path) -> None:
    names = ['a "b", c', "d;e\tf", "g\nh", "ü 写真", "#x"]
    items = [
        Item(f"{name}/{side.value} {number}.png", name, side)
        for name in names
        for side in (Split.TRAIN, Split.TEST)
        for number in range(2)
    ]
    collection = on_disk(Collection(tmp_path, tuple(items)), tmp_path / "images")
    written = write_manifests(deal(collection, section(kind="iid", silos=1)), collection, tmp_path / "silos")
    found = index(DataSource("manifest", collection.root, written["silo-01"]))
    assert {(record.name, record.label, record.split) for record in found.records} == {
        (item.path, item.label, item.split) for item in items
    }


def test_the_columns_and_the_record(tmp_path: Path) -> None:
    partition, collection = two(novel=["class 001"], shots=2, seed=5)
    written = write_manifests(partition, collection, tmp_path / "new" / "silos")
    with written["silo-02"].open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["path", "label", "split"]
    assert [split for *_, split in lines[1:]] == ["train"] * 2 + ["test"] * 2 + ["base"] * 6 + ["novel"] * 6
    trained = {path for path, _, split in lines[1:] if split == "train"}
    assert not trained & {path for path, _, split in lines[1:] if split != "train"}
    record = json.loads((tmp_path / "new" / "silos" / "partition.json").read_text())
    assert record == {
        "format": "fedrt-partition-1",
        "complete": True,
        "digest": partition.digest,
        "seed": 5,
        "section": partition.section.model_dump(mode="json"),
        "collection": {"digest": collection.digest, "items": 28},
        "classes": ["class 000"],
        "novel_classes": ["class 001"],
        "copies_left_out": 0,
        "silos": {
            silo: {
                "domain": None,
                "counts": {
                    "train": {"class 000": 2},
                    "test": {"class 000": 2},
                    "base": {"class 000": 6},
                    "novel": {"class 001": 6},
                },
            }
            for silo in partition.silos
        },
    }


def test_manifests_of_silos_that_are_gone_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    write_manifests(*two(4), tmp_path)
    (tmp_path / "mine.csv").write_text("path,label\n")
    written = write_manifests(*two(2), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"silo-01.csv", "silo-02.csv", "mine.csv", "partition.json"}
    before = written["silo-01"].read_bytes()
    assert write_manifests(*two(2), tmp_path) == written
    assert written["silo-01"].read_bytes() == before


@pytest.mark.parametrize("at", range(6))
def test_a_crash_is_seen_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The first write marks the directory; three manifests and the record follow."""
    write_manifests(*two(4), tmp_path)
    real, calls = manifests.write_atomic, iter(range(100))

    def failing(path: Path, *rest: Any) -> None:
        if next(calls) == at:
            raise StorageError("the disk is full")
        real(path, *rest)

    partition, collection = two(3, kind="pathological", silos=2)
    three = two(3)
    with monkeypatch.context() as patched:
        patched.setattr(manifests, "write_atomic", failing)
        if at < 5:
            with pytest.raises(StorageError):
                write_manifests(*three, tmp_path)
        else:
            write_manifests(*three, tmp_path)
    record = json.loads((tmp_path / "partition.json").read_text())
    assert record["complete"] == (at in (0, 5)), "at 0 nothing was changed"
    write_manifests(partition, collection, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"silo-01.csv", "silo-02.csv", "partition.json"}
    assert json.loads((tmp_path / "partition.json").read_text())["digest"] == partition.digest


def test_the_record_cannot_name_a_file_elsewhere_to_be_removed(tmp_path: Path) -> None:
    victim = tmp_path / "victim.csv"
    victim.write_text("precious")
    silos = tmp_path / "silos"
    silos.mkdir()
    record = {"format": "fedrt-partition-1", "complete": True, "silos": {"../victim": {}, "silo-09": {}}}
    (silos / "partition.json").write_text(json.dumps(record))
    (silos / "silo-09.csv").write_text("path,label,split\n")
    write_manifests(*two(2), silos)
    assert victim.read_text() == "precious"
    assert not (silos / "silo-09.csv").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "\xff"])
def test_another_programs_record_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "partition.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=r"is not the record of a partition; choose a directory"):
        write_manifests(*two(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["partition.json"]


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="create directory"):
        write_manifests(*two(), tmp_path / "file" / "silos")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "partition.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*partition\.json"):
        write_manifests(*two(), tmp_path / "taken")
    write_manifests(*two(4), tmp_path / "silos")
    (tmp_path / "silos" / "silo-04.csv").unlink()
    (tmp_path / "silos" / "silo-04.csv").mkdir()
    with pytest.raises(StorageError, match=r"cannot remove .*silo-04\.csv"):
        write_manifests(*two(2), tmp_path / "silos")
