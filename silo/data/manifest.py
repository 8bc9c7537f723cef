"""Reads a CSV manifest (path, label, perhaps split and domain) as spreadsheets write it: BOM, CRLF, semicolons."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedrt.errors import ConfigurationError
from silo.data.records import EVALUATED, SPLIT_NAMES, Entry, Split, find_split

REQUIRED = ("path", "label")
OPTIONAL = ("split", "domain")


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str
    domain: str


def scan_manifest(manifest: Path, root: Path) -> list[Entry]:
    """The listed files. A path is relative to `root`, or else to the manifest; it must not lead out of `root`.

    A file that does not exist stays in the list: it counts as unreadable. Either every row names a split or none does.
    A file may be listed once in each split that is for evaluation. Raises `ConfigurationError` naming the line.
    """
    real_root = Path(os.path.realpath(root))
    entries: list[Entry] = []
    seen: dict[Path, list[tuple[_Row, Split | None]]] = defaultdict(list)
    rows = list(_rows(manifest))
    has_splits = any(row.split for row in rows)
    for row in rows:
        where = f"'{manifest}', line {row.line}"
        path = _locate(row.path, manifest, real_root, where)
        split = _split(row.split, where) if has_splits else None
        for earlier, other in seen[path]:
            _check_again(row, split, earlier, other, where)
        seen[path].append((row, split))
        entries.append(Entry(path, path.relative_to(real_root).as_posix(), row.label, split, row.domain or None))
    if not entries:
        raise ConfigurationError(f"data.manifest '{manifest}' lists no images; add one line for each image")
    if not any(entry.path.exists() for entry in entries):
        raise ConfigurationError(
            f"none of the {len(entries)} files that data.manifest '{manifest}' lists exists below '{root}'; "
            "check data.root: paths are relative to it"
        )
    return entries


def _check_again(row: _Row, split: Split | None, earlier: _Row, other: Split | None, where: str) -> None:
    """An image may serve several evaluations, but none that it was trained on."""
    if split is other:
        again = "was listed"
    elif not {split, other} <= EVALUATED:
        again = f"was listed for split '{earlier.split}'"
    elif row.label != earlier.label:
        again = f"has the label '{earlier.label}'"
    else:
        return
    raise ConfigurationError(f"{where}: '{row.path}' {again} in line {earlier.line} already; keep one of the two")


def _rows(manifest: Path) -> Iterator[_Row]:
    text = _text(manifest)
    header_line = text.partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        _check_header(header, manifest)
        for fields in reader:
            where = f"'{manifest}', line {reader.line_num}"
            if not any(value.strip() for value in fields):
                continue
            if len(fields) != len(header):
                raise ConfigurationError(f"{where} has {len(fields)} fields; the header has {len(header)}")
            values = dict(zip(header, (value.strip() for value in fields), strict=True))
            for name in REQUIRED:
                if not values[name]:
                    raise ConfigurationError(f"{where}: the {name} is empty; fill it in or remove the line")
            optional = (values.get(name, "") for name in OPTIONAL)
            yield _Row(reader.line_num, values["path"], values["label"], *optional)
    except csv.Error as error:
        raise ConfigurationError(f"'{manifest}', line {reader.line_num}: {error}; save it as plain CSV") from error


def _text(manifest: Path) -> str:
    try:
        return manifest.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(
            f"cannot read data.manifest '{manifest}': {error.strerror}; check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"data.manifest '{manifest}' is not UTF-8 ({error}); save it as UTF-8") from error


def _check_header(header: list[str], manifest: Path) -> None:
    for name in REQUIRED:
        if name not in header:
            raise ConfigurationError(
                f"data.manifest '{manifest}' has no column '{name}'; its first line must name the columns path, label "
                f"and optionally split and domain, and holds {header}"
            )
    if twice := sorted(name for name in set(header) if name and header.count(name) > 1):
        raise ConfigurationError(f"data.manifest '{manifest}' has two columns '{twice[0]}'; rename one")


def _locate(text: str, manifest: Path, real_root: Path, where: str) -> Path:
    if "\0" in text:
        raise ConfigurationError(f"{where}: the path holds a zero byte; save the file as plain CSV")
    below_root = Path(os.path.realpath(real_root / text))
    beside = Path(os.path.realpath(manifest.parent / text))
    if below_root.is_relative_to(real_root) and (below_root.exists() or not beside.is_relative_to(real_root)):
        return below_root
    if beside.is_relative_to(real_root) and beside.exists():
        return beside
    if below_root.is_relative_to(real_root):
        return below_root
    raise ConfigurationError(f"{where}: '{text}' leads out of data.root; set data.root to a directory above it")


def _split(text: str, where: str) -> Split:
    if not text:
        raise ConfigurationError(f"{where}: the split is empty; name one in every line or in none")
    split = find_split(text)
    if split is None:
        raise ConfigurationError(f"{where}: the split '{text}' is unknown; known are {sorted(SPLIT_NAMES)}")
    return split
