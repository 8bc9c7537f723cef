"""Writes a partition as one CSV manifest for each silo, the form in which a silo daemon reads its images."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedrt.errors import ConfigurationError
from fedrt.spec import NAME
from fedrt.statefile import remove_unfinished, storage_error, write_atomic
from silo.data.records import Split
from silo.partition.collection import Collection
from silo.partition.holdings import Indices, Partition

RECORD = "partition.json"
FORMAT = "fedrt-partition-1"
HEADER = "path,label,split"


def write_manifests(partition: Partition, collection: Collection, directory: Path) -> dict[str, Path]:
    """Write `<silo>.csv` (path, label, split) for each silo and the record `partition.json`; silo -> its manifest.

    Paths are relative to the collection's root, which the silo's `data.root` has to be. Manifests of silos that an
    earlier partition in `directory` had are removed. The record is complete once every manifest is: until then, also
    after a crash, it says `"complete": false`, and to write again mends it. Raises `ConfigurationError` if `directory`
    holds another program's `partition.json`, and `StorageError`.
    """
    _make(directory)
    record = directory / RECORD
    earlier = _silos_of(record)
    begun = dict.fromkeys(sorted({*earlier, *partition.silos}))
    _write_json(record, {"format": FORMAT, "complete": False, "silos": begun})
    written = {}
    rows: dict[tuple[Split, Indices], str] = {}  # what all silos share is put into words once
    for holding in partition.holdings:
        for split, indices in holding.indices.items():
            if (split, indices) not in rows:
                rows[split, indices] = _rows(collection, split, indices)
        lines = "".join(rows[part] for part in holding.indices.items())
        written[holding.silo] = directory / f"{holding.silo}.csv"
        write_atomic(written[holding.silo], f"{HEADER}\n{lines}".encode())
    _remove(directory / f"{name}.csv" for name in earlier if name not in written)
    _write_json(record, _record(partition, collection))
    return written


def _rows(collection: Collection, split: Split, indices: Indices) -> str:
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    for index in indices:
        item = collection.items[index]
        lines.writerow((item.path, item.label, split.value))
    return text.getvalue()


def _record(partition: Partition, collection: Collection) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "complete": True,
        "digest": partition.digest,
        "seed": partition.seed,
        "section": partition.section.model_dump(mode="json"),
        "collection": {"digest": collection.digest, "items": len(collection.items)},
        "classes": partition.classes,
        "novel_classes": partition.novel_classes,
        "copies_left_out": partition.copy_count,
        "silos": {
            holding.silo: {
                "domain": holding.domain,
                "counts": {split.value: dict(counts) for split, counts in holding.class_counts.items()},
            }
            for holding in partition.holdings
        },
    }


def _silos_of(record: Path) -> list[str]:
    try:
        document = json.loads(record.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error("read", record, error) from error
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigurationError(
            f"'{record}' is not the record of a partition; choose a directory of their own for manifests"
        )
    # what is removed later must be a manifest's name, whoever wrote the record
    return [name for name in document["silos"] if NAME.fullmatch(name)]


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create directory", directory, error) from error
    remove_unfinished(directory)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("remove", path, error) from error
