"""Writes data sets that torchvision knows as folders of image files, which every silo can read.

    <target>/train/<class name>/<number>.<suffix>        <target>/test/...

Caltech101 has no split of its own: its classes lie directly below the target, to be split by content. Class names are
those of the papers: underscores are spaces, and Caltech101 has 100 classes, "Faces_easy" being faces cut from "Faces".
Nothing is ever downloaded. Original files are linked or copied byte for byte; what has none (CIFAR) becomes PNG.
"""

import contextlib
import importlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fedrt.errors import ConfigurationError
from fedrt.statefile import storage_error, write_atomic

MARKER = ".fedrt-export.json"
_FORMAT = "fedrt-torchvision-1"

Factory = Callable[..., Any]
"""Builds a data set as the torchvision class does: `factory(root=..., download=False, split=...)`."""

Parts = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class _Recipe:
    """How torchvision's class is asked: what goes to which split ("" for none), and where its files lie below root."""

    place: str
    parts: Parts
    files: str | None = None  # the attribute that holds the paths of the original files
    classes: str = "classes"
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()


def _by_split(train: Sequence[str]) -> Parts:
    return {"train": [{"split": name} for name in train], "test": [{"split": "test"}]}


_CIFAR: Parts = {"train": [{"train": True}], "test": [{"train": False}]}
_RECIPES: Mapping[str, _Recipe] = {
    "CIFAR10": _Recipe("cifar-10-batches-py", _CIFAR),
    "CIFAR100": _Recipe("cifar-100-python", _CIFAR),
    "Caltech101": _Recipe(
        "caltech101",
        {"": [{}]},
        classes="categories",
        renamed={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
        left_out=frozenset({"Faces_easy"}),
    ),
    "DTD": _Recipe("dtd", _by_split(["train", "val"]), "_image_files"),
    "Flowers102": _Recipe(
        "flowers-102",
        _by_split(["train", "val"]),
        "_image_files",
        renamed={"pink-yellow dahlia?": "pink-yellow dahlia"},
    ),
    "Food101": _Recipe("food-101", _by_split(["train"]), "_image_files"),
    "OxfordIIITPet": _Recipe("oxford-iiit-pet", _by_split(["trainval"]), "_images"),
}
SETS: tuple[str, ...] = tuple(_RECIPES)


@dataclass(frozen=True)
class Exported:
    """A data set as image files: class names, sorted, and images per split ("all" where there is none)."""

    root: Path
    classes: tuple[str, ...]
    counts: Mapping[str, int]


def export_torchvision(name: str, source: Path, target: Path, factory: Factory | None = None) -> Exported:
    """Write the data set `name` (one of `SETS`), whose files torchvision expects in `source`, below `target`.

    Done once: a finished `target` is left as it is, and one that was interrupted is completed. `factory` stands in for
    the class `torchvision.datasets.<name>`. Raises `ConfigurationError` if the set is unknown, its files are not there,
    or `target` holds anything else, and `StorageError`.
    """
    if name not in _RECIPES:
        raise ConfigurationError(f"data set '{name}' is unknown; known are {', '.join(SETS)}")
    if (finished := _finished(name, target)) is not None:
        return finished
    recipe, marker = _RECIPES[name], target / MARKER
    # all of it is opened before the first file is written
    opened = [
        (split, _open(name, recipe, source, factory, part)) for split, parts in recipe.parts.items() for part in parts
    ]
    images = [(split, list(_images(name, data, recipe))) for split, data in opened]
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomic(marker, json.dumps({"format": _FORMAT, "name": name, "complete": False}).encode(), 0o644)
        counts = _write(target, images)
        os.sync()  # the marker must not survive a power cut that the images do not
    except OSError as error:
        raise storage_error("write", target, error) from error
    classes = tuple(sorted({image.label for _, part in images for image in part}))
    document = {"format": _FORMAT, "name": name, "complete": True, "classes": classes, "counts": counts}
    write_atomic(marker, json.dumps(document, indent=1).encode(), 0o644)
    return Exported(target, classes, counts)


def _write(target: Path, images: Sequence[tuple[str, Sequence["_Image"]]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for split, part in images:
        for image in part:
            suffix = ".png" if image.file is None else image.file.suffix.lower()
            _place(image, target / split / image.label / f"{counts[split]:06d}{suffix}")
            counts[split] += 1
    return {split or "all": count for split, count in counts.items()}


def _finished(name: str, target: Path) -> Exported | None:
    """What `target` holds if it is complete; None if it is empty or unfinished."""
    try:
        document = json.loads((target / MARKER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigurationError(f"'{target}' holds other files; name an empty or new directory") from None
        return None
    except (OSError, ValueError):
        document = None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ConfigurationError(f"'{target / MARKER}' is damaged; remove '{target}' or name another directory")
    if document["name"] != name:
        raise ConfigurationError(f"'{target}' holds data set '{document['name']}'; name another directory")
    return Exported(target, tuple(document["classes"]), document["counts"]) if document["complete"] else None


def _open(name: str, recipe: _Recipe, source: Path, factory: Factory | None, part: Mapping[str, Any]) -> Any:
    if factory is None:
        place = source / recipe.place
        if not place.is_dir():
            raise _missing(name, place, "there is no such directory")
        factory = _torchvision_class(name)
    try:
        return factory(root=str(source), download=False, **part)
    except ImportError as error:
        raise ConfigurationError(f"torchvision.datasets.{name} needs '{error.name}'; install it with pip") from error
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        raise _missing(name, source / recipe.place, str(error) or type(error).__name__) from error


def _missing(name: str, place: Path, why: str) -> ConfigurationError:
    # torchvision's own message advises download=True, which is not done here
    reason = why.partition(". You can use download")[0].rstrip(".")
    return ConfigurationError(
        f"torchvision.datasets.{name} cannot read '{place}' ({reason}); nothing is downloaded here, so put the files "
        f"there that torchvision.datasets.{name} downloads, complete and unpacked"
    )


def _torchvision_class(name: str) -> Factory:
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ConfigurationError("exporting needs torchvision; install fedrt with the extra [silo]") from error
    found: Factory = getattr(datasets, name)
    return found


def _class_names(name: str, data: Any, recipe: _Recipe) -> list[str | None]:
    """The name of each label, None for one that is left out."""
    cleaned: list[str | None] = []
    for raw in getattr(data, recipe.classes):
        label = " ".join(recipe.renamed.get(raw, raw).replace("_", " ").split())
        if not label or "/" in label or label.startswith("."):
            raise ConfigurationError(f"class '{raw}' of data set '{name}' cannot be the name of a directory")
        cleaned.append(None if raw in recipe.left_out else label)
    if twice := [label for label, count in Counter(cleaned).items() if label and count > 1]:
        raise ConfigurationError(f"two classes of data set '{name}' would both be called '{twice[0]}'")
    return cleaned


@dataclass(frozen=True)
class _Image:
    """One image of a set: the name of its class, and the original file or else how to get its pixels."""

    label: str
    file: Path | None
    draw: Callable[[], Any]


def _images(name: str, data: Any, recipe: _Recipe) -> Iterator[_Image]:
    """Each image of the set that belongs to a class; with original files the pixels are never decoded."""
    names = _class_names(name, data, recipe)
    files = _originals(data, recipe)
    labels = _labels(data)
    for position in range(len(data)):
        label = names[int(data[position][1] if labels is None else labels[position])]
        if label is None:
            continue
        file = None if files is None else files[position]
        if file is not None and not file.is_file():
            raise ConfigurationError(f"file '{file}' of torchvision.datasets.{name} is missing; unpack the set again")
        yield _Image(label, file, partial(_draw, data, position))


def _draw(data: Any, position: int) -> Any:
    return data[position][0]


def _originals(data: Any, recipe: _Recipe) -> list[Path] | None:
    """The paths of the original files, where torchvision knows them."""
    if recipe.files is not None:
        paths = getattr(data, recipe.files, None)
        return None if paths is None else [Path(path) for path in paths]
    if not hasattr(data, "categories"):
        return None
    folder = Path(data.root) / "101_ObjectCategories"
    return [
        folder / data.categories[label] / f"image_{number:04d}.jpg"
        for label, number in zip(data.y, data.index, strict=True)
    ]


def _labels(data: Any) -> Sequence[int] | None:
    """The labels, where they can be had without decoding the images."""
    for attribute in ("targets", "_labels", "y"):
        labels: Sequence[int] | None = getattr(data, attribute, None)
        if labels is not None and len(labels) == len(data):
            return labels
    return None


def _place(image: _Image, place: Path) -> None:
    """Put the image at `place`, whole or not at all; one that is there stays."""
    if place.is_file() and place.stat().st_size:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{place.name}.new")
    unfinished.unlink(missing_ok=True)
    if image.file is None:
        image.draw().save(unfinished, format="PNG")
    else:
        _link_or_copy(image.file, unfinished)
    unfinished.replace(place)


def _link_or_copy(original: Path, place: Path) -> None:
    # not a symbolic link: silos refuse links that lead out of their folder
    with contextlib.suppress(OSError):
        os.link(original.resolve(), place)
        return
    shutil.copyfile(original, place)
