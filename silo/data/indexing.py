"""Lists a silo's images with label and split, the same way every time; needs neither torch nor Pillow.

Where the data declare no split, one is made from what the files contain: two copies of an image are never on different
sides, and a renamed or moved file stays on its side.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fedrt.errors import ConfigurationError
from silo.data.folder import scan_folder
from silo.data.labels import renamed
from silo.data.manifest import scan_manifest
from silo.data.records import DataIndex, Entry, Record, Split
from silo.sources import DataSource

_ORDER = {split: position for position, split in enumerate(Split)}
_EDGE_BYTES = 32 * 1024
_READERS = 8
_READ_TOGETHER = 64  # files; to hand a thread a single small one costs more than reading it

_Given = TypeVar("_Given")


def index(source: DataSource) -> DataIndex:
    """Every image of the source, whether readable or not. Raises `ConfigurationError` with the next step."""
    if not source.root.is_dir():
        missing = "is not a directory" if source.root.exists() else "does not exist"
        raise ConfigurationError(f"data.root '{source.root}' {missing}; set it to the folder that holds the images")
    ignored_count = 0
    if source.manifest is not None:
        entries = scan_manifest(source.manifest, source.root)
    else:
        entries, ignored_count = scan_folder(source.root)
    splits = split_by_content(entries, source.test_share) if entries[0].split is None else {}
    names = renamed({entry.label for entry in entries}, source.class_names)
    records = [
        Record(entry.path, entry.name, names[entry.label], entry.split or splits[entry.name]) for entry in entries
    ]
    records.sort(key=lambda record: (_ORDER[record.split], os.fsencode(record.name)))
    return DataIndex(tuple(records), ignored_count)


def split_by_content(entries: Sequence[Entry], test_share: float) -> dict[str, Split]:
    """Entry name -> TRAIN or TEST, about `test_share` of each label to TEST; at least one to each side where it can be.

    Depends on contents, labels and the share only, and on the name of a file that cannot be read. Files that are alike
    go to the same side, also across labels.
    """
    return split_by_fingerprint(entries, fingerprints([entry.path for entry in entries]), test_share)


def split_by_fingerprint(entries: Sequence[Entry], found: Sequence[str | None], test_share: float) -> dict[str, Split]:
    """As `split_by_content`, once the fingerprint of each entry's file is known."""
    alike: dict[str, list[Entry]] = defaultdict(list)
    for print_, entry in zip(found, entries, strict=True):
        alike[print_ or hashlib.sha256(os.fsencode(entry.name)).hexdigest()].append(entry)
    strata: dict[str, list[list[Entry]]] = defaultdict(list)
    for key in sorted(alike):
        strata[min(entry.label for entry in alike[key])].append(alike[key])
    splits: dict[str, Split] = {}
    for groups in strata.values():
        wanted = _test_count(sum(map(len, groups)), test_share)
        for group in groups:
            split = Split.TEST if len(group) <= wanted else Split.TRAIN
            wanted -= len(group) if split is Split.TEST else 0
            splits.update((entry.name, split) for entry in group)
    return splits


def _test_count(count: int, test_share: float) -> int:
    if test_share == 0 or count < 2:
        return 0
    return min(max(round(count * test_share), 1), count - 1)


def fingerprints(paths: Sequence[Path]) -> list[str | None]:
    """The `fingerprint` of each file, in order."""
    return _in_threads(fingerprint, paths)


def fingerprint(path: Path) -> str | None:
    """Equal for files of equal content: a digest of the size and of the first and last 32 KiB.

    Reading no more keeps a start over a network share short; if files that differ only in the middle agree, they
    merely end up on the same side. A file that cannot be read has none.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "big") + file.read(_EDGE_BYTES))
            if size > _EDGE_BYTES:
                file.seek(max(size - _EDGE_BYTES, _EDGE_BYTES))
                digest.update(file.read(_EDGE_BYTES))
    except OSError:
        return None
    return digest.hexdigest()


def identities(paths: Sequence[Path], found: Sequence[str | None]) -> list[str | None]:
    """Equal exactly for files of equal content: the fingerprints found, or a digest of all that a file holds.

    Only large files that agree in their fingerprints are read whole: scans that are not compressed often have the same
    size and the same borders. None for a file that cannot be read.
    """
    counts = Counter(found)
    agreeing = [(path, print_) for path, print_ in zip(paths, found, strict=True) if print_ and counts[print_] > 1]
    whole = dict(zip((path for path, _ in agreeing), _in_threads(_identity, agreeing), strict=True))
    return [whole.get(path, print_) for path, print_ in zip(paths, found, strict=True)]


def _identity(file_and_print: tuple[Path, str]) -> str | None:
    path, found = file_and_print
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= 2 * _EDGE_BYTES:
                return found
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _in_threads(read: Callable[[_Given], str | None], given: Sequence[_Given]) -> list[str | None]:
    parts = [given[start : start + _READ_TOGETHER] for start in range(0, len(given), _READ_TOGETHER)]
    with ThreadPoolExecutor(_READERS) as pool:
        return [found for part in pool.map(lambda part: [read(each) for each in part], parts) for found in part]
