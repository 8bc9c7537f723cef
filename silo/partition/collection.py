"""A data set as a table: every image with its label, side and domain, read from folders or a CSV manifest."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import structlog
from pydantic import Field, model_validator

from fedrt.config import LocalPath, Section
from fedrt.errors import ConfigurationError
from silo.config import Text
from silo.data.folder import scan_folder
from silo.data.indexing import fingerprints, identities, split_by_fingerprint
from silo.data.labels import renamed
from silo.data.manifest import scan_manifest
from silo.data.records import Entry, Split, find_split
from silo.sources import DataSource

_SIDES = {Split.TRAIN: Split.TRAIN, Split.TEST: Split.TEST, Split.VALIDATION: None}


@dataclass(frozen=True, slots=True)
class Item:
    """One image file; `path` is relative to the root of the collection, with "/" between its parts.

    `split` is TRAIN or TEST, or None for an image that is dealt to nobody: the data declare it for validation.
    `content` is equal for copies of one image; None if the file cannot be read or is not there yet.
    """

    path: str
    label: str
    split: Split | None
    domain: str | None = None
    content: str | None = None


@dataclass(frozen=True)
class Collection:
    """A data set below `root`. Raises `ConfigurationError` for a table that no data set can have."""

    root: Path
    items: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not any(item.split for item in self.items):
            raise ConfigurationError(f"data.root '{self.root}' holds no training and no test images; add some")
        path, count = Counter(item.path for item in self.items).most_common(1)[0]
        if count > 1:
            raise ConfigurationError(f"'{path}' is in the collection {count} times; keep one")
        for item in self.items:
            if item.split not in (Split.TRAIN, Split.TEST, None):
                raise ConfigurationError(
                    f"'{item.path}' is declared for the split '{item.split.value}', but a collection knows only train, "
                    "validation and test; point data at the data set itself, not at a silo's part of it"
                )
        without = next((item for item in self.items if item.domain is None), None)
        if without and any(item.domain is not None for item in self.items):
            raise ConfigurationError(f"'{without.path}' has no domain, but others have; give every image one or none")

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The distinct labels of training and test images, sorted."""
        return tuple(sorted({item.label for item in self.items if item.split}))

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """The distinct domains of training and test images, sorted; empty in a collection without domains."""
        return tuple(sorted({item.domain for item in self.items if item.split and item.domain is not None}))

    @cached_property
    def test_contents(self) -> frozenset[str]:
        """What test images contain, as far as it is known."""
        return frozenset(item.content for item in self.items if item.split is Split.TEST and item.content is not None)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Positions in `items`, sorted by path: what is decided in this order does not depend on that of `items`."""
        return tuple(sorted(range(len(self.items)), key=lambda index: self.items[index].path))

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that agree exactly when the items do, in any order; the root is not part of it.

        Contents are part of it as far as `silo.data.indexing.fingerprint` sees them: a size, a beginning, an end.
        """
        rows = []
        for index in self.order:
            item = self.items[index]
            row = [item.path, item.label, item.split.value if item.split else None, item.domain]
            rows.append(row if item.content is None else [*row, item.content])
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


Layout = Literal["image_folder", "domain_folder", "manifest"]


def check_layout(layout: Layout, manifest: Path | None) -> None:
    """Raises `ValueError`, as a validator does, unless there is a manifest exactly if the layout is one."""
    if layout == "manifest" and manifest is None:
        raise ValueError("layout is 'manifest', but manifest is missing; add the path of the CSV file")
    if layout != "manifest" and manifest is not None:
        raise ValueError(f"manifest is set, but layout is '{layout}'; remove manifest or set layout: manifest")


class CollectionSection(Section):
    """The data set that is dealt out to the silos."""

    root: LocalPath = Field(description="Directory of the images")
    layout: Layout = Field(
        description="image_folder: <class>/<image> or <split>/<class>/<image>; domain_folder: the same below "
        "a directory per domain; manifest: a CSV file with path, label and optionally split and domain"
    )
    manifest: LocalPath | None = Field(default=None, description="The CSV file, for layout manifest only")
    class_names: dict[Text, Text] = Field(
        default_factory=dict, description="The data's name of a class: the experiments' name of it"
    )
    test_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=DataSource.test_share,
        description="Share of each class kept for evaluation where the data name no split",
    )

    @model_validator(mode="after")
    def _manifest_goes_with_its_layout(self) -> Self:
        check_layout(self.layout, self.manifest)
        return self


def read_collection(section: CollectionSection) -> Collection:
    """Every image of the data set, sorted by path. Blocks: it reads up to 64 KiB of each file, and copies whole.

    Where the data declare no split, one is made from what the files contain, over all domains at once: copies of one
    image are on one side. A declared split is taken as it is; a warning says how many training images are copies of
    test images, which `deal` leaves out. Raises `ConfigurationError` with the next step.
    """
    root = section.root
    if not root.is_dir():
        missing = "is not a directory" if root.exists() else "does not exist"
        raise ConfigurationError(f"data.root '{root}' {missing}; set it to the folder that holds the images")
    if section.manifest is not None:
        entries = scan_manifest(section.manifest, root)
    elif section.layout == "domain_folder":
        entries = list(_domain_folders(root))
    else:
        entries = scan_folder(root).entries
    entries = _distinct(entries)
    _check_names(entries)
    paths = [entry.path for entry in entries]
    prints = fingerprints(paths)
    made = split_by_fingerprint(entries, prints, section.test_share) if entries[0].split is None else {}
    names = renamed({entry.label for entry in entries}, section.class_names)
    items = [
        Item(entry.name, names[entry.label], _side(entry.split or made[entry.name]), entry.domain, content)
        for entry, content in zip(entries, identities(paths, prints), strict=True)
    ]
    collection = Collection(root, tuple(sorted(items, key=lambda item: item.path)))
    if copy_count := sum(item.split is Split.TRAIN and item.content in collection.test_contents for item in items):
        structlog.get_logger("silo.partition").warning(
            "training images are copies of test images; nobody trains on them", copy_count=copy_count
        )
    return collection


def _side(split: Split) -> Split | None:
    return _SIDES.get(split, split)


def _domain_folders(root: Path) -> Iterable[Entry]:
    declared: dict[bool, str] = {}
    for directory in _directories(root):
        if directory.is_symlink():
            raise ConfigurationError(f"'{directory}' is a link to a directory; move the domain itself below data.root")
        if find_split(directory.name) is not None:
            raise ConfigurationError(
                f"data.root '{root}' holds '{directory.name}' where domain_folder expects the directories of domains; "
                "set data.layout to image_folder, or put split directories below those of the domains"
            )
        entries = scan_folder(directory).entries
        declared.setdefault(entries[0].split is not None, directory.name)
        for entry in entries:
            yield replace(entry, name=f"{directory.name}/{entry.name}", domain=directory.name)
    if not declared:
        raise ConfigurationError(f"data.root '{root}' holds no directories; lay it out as <domain>/<class>/<image>")
    if len(declared) == 2:
        raise ConfigurationError(
            f"domain '{declared[True]}' has the directories train and test, but domain '{declared[False]}' has not; "
            "give them to every domain or to none"
        )


def _directories(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the directory '{root}': {error.strerror}; make it readable for the user this program runs as"
        ) from error


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Without further names of a file that links within the root show twice: a manifest lists a file once."""
    by_file: dict[Path, Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        file = entry.path.resolve() if entry.path.is_symlink() else entry.path
        first = by_file.setdefault(file, entry)
        if (first.label, first.split, first.domain) != (entry.label, entry.split, entry.domain):
            raise ConfigurationError(
                f"'{first.name}' and '{entry.name}' are links to one file, but differ in class, split or domain; "
                "keep one of the two"
            )
    return list(by_file.values())


def _check_names(entries: Sequence[Entry]) -> None:
    """A manifest is UTF-8, and spaces around its values mean nothing."""
    for entry in entries:
        for text in (entry.name, entry.label, entry.domain or ""):
            if text != text.strip():
                raise ConfigurationError(f"the name {text!r} begins or ends with white space; rename it")
            if not text.isascii() and text.encode(errors="replace").decode() != text:
                raise ConfigurationError(f"the name {text!r} is not UTF-8; rename it")
