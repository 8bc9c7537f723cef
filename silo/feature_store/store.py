"""A directory of image features that all processes of a machine may share: bounded, checked, safe against kill -9.

    version            the format of the store
    lock               held while segments are made or removed
    contents/          digests of files (`silo.feature_store.contents`)
    <kind>/            one directory for each way to compute features, described in kind.json
    <kind>/*.rows      features, and beside them the records of which image and view they are

There is no index beside the records, so none can disagree with them. Names and labels of images are not kept.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedrt.errors import ConfigurationError, StorageError
from fedrt.statefile import ensure_private_directory, storage_error, write_atomic
from silo.feature_store.contents import Contents
from silo.feature_store.kinds import FORMAT, FeatureKind
from silo.feature_store.room import (
    SegmentFiles,
    alone,
    check_owner,
    clear_leftovers,
    make_room,
    remove_unused,
    segment_files,
)
from silo.feature_store.shelf import Shelf

VERSION = "fedrt features"


class FeatureStore:
    """Opened when it is first used, and tried again as long as that fails."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.contents = Contents(directory / "contents")
        self._shelves: dict[FeatureKind, Shelf] = {}
        self._is_open = False

    def open(self) -> None:
        """Make what is missing and clear what dead processes have left.

        Raises `StorageError` if the directory cannot be used, `ConfigurationError` if it is another program's or was
        written by a newer fedrt. A store that we may only read is opened, too.
        """
        if self._is_open:
            return
        if not check_version(self.directory):
            self._create()
        self._is_open = True
        try:
            with alone(self.directory):
                clear_leftovers(self.directory)
                self.contents.clear_excess()
                make_room(self.directory, self.max_bytes)
        except (OSError, StorageError):
            return  # all the same it can be read; whoever wants to write is told

    def shelf(self, kind: FeatureKind) -> Shelf:
        """The rows of one kind. Raises as `open` does."""
        self.open()
        if kind not in self._shelves:
            path = self.directory / kind.name
            if read_kind(path) != kind:
                _write_kind(path, kind)
            self._shelves[kind] = Shelf(self.directory, kind, self.max_bytes)
        return self._shelves[kind]

    def close(self) -> None:
        """Let go of everything; features that were found stay readable."""
        for shelf in self._shelves.values():
            shelf.close()
        self.contents.close()
        self._shelves.clear()

    def _create(self) -> None:
        ensure_private_directory(self.directory)
        ensure_private_directory(self.directory / "contents")
        write_atomic(self.directory / "version", f"{VERSION} {FORMAT}\n".encode())


def check_version(directory: Path) -> bool:
    """Whether there is a store that this version understands; false if there is none yet.

    Raises `StorageError` if that cannot be told, `ConfigurationError` if the directory holds anything else.
    """
    path = directory / "version"
    try:
        text = path.read_text(encoding="ascii").strip() if path.exists() else ""
        others = [] if text or not directory.exists() else [one.name for one in directory.iterdir() if not _ours(one)]
    except UnicodeDecodeError:
        text, others = "?", []
    except OSError as error:
        raise storage_error("open", directory, error) from error
    if not text and not others:
        return False
    name, _, number = text.rpartition(" ")
    if name != VERSION or not number.isdecimal():
        raise ConfigurationError(
            f"features.directory '{directory}' holds something else than a store of features; set another directory, "
            "or empty this one"
        )
    if int(number) != FORMAT:
        raise ConfigurationError(
            f"features.directory '{directory}' was written by a newer fedrt (format {number}, known is {FORMAT}); "
            "upgrade fedrt, or set another directory"
        )
    return True


@dataclass(frozen=True)
class KindSummary:
    """One kind in a store; `kind` is None if its description is damaged. Copies and damaged rows count."""

    name: str
    kind: FeatureKind | None
    row_count: int
    byte_count: int
    used_ns: int


def summarize(directory: Path) -> list[KindSummary]:
    """What a store holds, the kind that was used last first. Raises `FedrtError`."""
    try:
        files = segment_files(directory) if check_version(directory) else []
    except OSError as error:
        raise storage_error("read", directory, error) from error
    by_kind: dict[Path, list[SegmentFiles]] = {}
    for one in files:
        by_kind.setdefault(one.keys_path.parent, []).append(one)
    found = [
        KindSummary(
            path.name,
            read_kind(path),
            sum(one.row_count for one in held),
            sum(one.byte_count for one in held),
            max(one.used_ns for one in held),
        )
        for path, held in by_kind.items()
    ]
    return sorted(found, key=lambda one: (-one.used_ns, one.name))


def clear(directory: Path) -> tuple[int, int]:
    """Remove all features and digests but those in use by live processes; bytes removed, and bytes in use.

    Raises `FedrtError`.
    """
    removed = kept = 0
    if not check_version(directory):
        return 0, 0
    try:
        with alone(directory):
            clear_leftovers(directory)
            Contents(directory / "contents").clear()
            for one in segment_files(directory):
                if remove_unused(one.keys_path):
                    removed += one.byte_count
                else:
                    kept += one.byte_count
    except OSError as error:
        raise storage_error("clear", directory, error) from error
    return removed, kept


def read_kind(path: Path) -> FeatureKind | None:
    """What a directory of rows says it holds, or None."""
    try:
        return FeatureKind(**json.loads((path / "kind.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _write_kind(path: Path, kind: FeatureKind) -> None:
    """Describe the directory for people. A store that we may only read is read without."""
    try:
        check_owner(path.parent)
        ensure_private_directory(path)
        write_atomic(path / "kind.json", (json.dumps(asdict(kind), indent=1) + "\n").encode())
    except StorageError:
        if not path.is_dir():
            raise


def _ours(path: Path) -> bool:
    """Whether a store without `version`, made half or damaged, or a fresh file system may hold such a thing."""
    return (
        path.name in ("contents", "lock", "lost+found") or path.name.endswith(".new") or (path / "kind.json").is_file()
    )
