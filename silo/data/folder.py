"""Finds the images of a folder with one directory per class, with or without split directories above them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedrt.errors import ConfigurationError
from silo.data.records import Entry, Split, find_split

_RASTER = (".bmp", ".gif", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
_JPEG = (".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
IMAGE_SUFFIXES = frozenset((*_RASTER, *_JPEG))


class Found(NamedTuple):
    """Image files, and how many files were passed over: hidden ones, other types, and any outside a class directory."""

    entries: list[Entry]
    ignored_count: int


def scan_folder(root: Path) -> Found:
    """Every image file below `root/<class>` or `root/<split>/<class>`, at any depth.

    With `train` and `test` directories the split is theirs, and `base`, `novel` and `domain` may lie beside them;
    otherwise no entry has one. Hidden files and directories are passed over. Raises `ConfigurationError` for a folder
    without images, unreadable directories, an incomplete or mixed set of split directories, and links that lead out of
    the root.
    """
    real_root = Path(os.path.realpath(root))
    found = Found([], 0)
    for split, directory in _split_directories(root, real_root):
        part = _scan_classes(directory, real_root, split)
        found = Found(found.entries + part.entries, found.ignored_count + part.ignored_count)
    if not found.entries:
        ignored = f" ({found.ignored_count} other files were passed over)" if found.ignored_count else ""
        raise ConfigurationError(
            f"data.root '{root}' holds no images{ignored}; lay them out as <class>/<image> with one of the file types "
            + " ".join(sorted(IMAGE_SUFFIXES))
        )
    return found


def _split_directories(root: Path, real_root: Path) -> Iterator[tuple[Split | None, Path]]:
    names = [entry.name for entry in _visible(real_root) if entry.is_dir()]
    splits: dict[Split, str] = {}
    for name in names:
        if (split := find_split(name)) is not None:
            if split in splits:
                raise ConfigurationError(f"data.root '{root}' holds both '{splits[split]}' and '{name}'; keep one")
            splits[split] = name
    if Split.TRAIN in splits and Split.TEST in splits:
        if others := sorted(set(names) - set(splits.values())):
            raise ConfigurationError(
                f"data.root '{root}' holds '{others[0]}' beside split directories; "
                "move class directories below 'train' and 'test', or rename the split directories"
            )
        yield from ((split, real_root / name) for split, name in splits.items())
    elif {Split.TRAIN, Split.TEST, Split.VALIDATION} & set(splits) and len(splits) == len(names):
        raise ConfigurationError(
            f"data.root '{root}' holds {sorted(names)} only; add both 'train' and 'test', "
            "or put the class directories directly below the root to have them split"
        )
    else:
        yield None, real_root


def _scan_classes(directory: Path, root: Path, split: Split | None) -> Found:
    entries: list[Entry] = []
    ignored = 0
    for child in _visible(directory):
        if not child.is_dir():
            ignored += 1
            continue
        label = _label(child.name)
        for path in _files(Path(child.path), root):
            if path.suffix.casefold() in IMAGE_SUFFIXES and not path.name.startswith("."):
                entries.append(Entry(path, path.relative_to(root).as_posix(), label, split))
            else:
                ignored += 1
    return Found(entries, ignored)


def _files(directory: Path, root: Path) -> Iterator[Path]:
    _refuse_escape(directory, root)
    for entry in _list(directory):
        path = Path(entry.path)
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _files(path, root)
            continue
        if entry.is_symlink():
            _refuse_escape(path, root)
        yield path


def _refuse_escape(path: Path, root: Path) -> None:
    """A directory must not be a link at all (it could show an image twice), a file must not leave the root."""
    if path.is_symlink() and (path.is_dir() or not Path(os.path.realpath(path)).is_relative_to(root)):
        raise ConfigurationError(
            f"'{path}' is a link to a directory or out of data.root; "
            "use data.layout 'manifest' with data.root where the files really lie"
        )


def _visible(directory: Path) -> list["os.DirEntry[str]"]:
    return [entry for entry in _list(directory) if not entry.name.startswith(".")]


def _list(directory: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the directory '{directory}': {error.strerror}; "
            "make it readable for the user this program runs as"
        ) from error


def _label(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"the class directory {name!r} has a name that is not UTF-8; rename it") from None
    return name
