"""Drawn scenes as the data of a lab: which scanners and classes, how many images, and where the files go."""

import difflib
import shutil
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from fedrt.config import Section
from silo.data.records import Split
from silo.embedded.scanners import SCANNERS, UNSEEN_SCANNERS
from silo.embedded.world import ALL_PAIRS, COLOURS, HELD_OUT_PAIRS, SEEN_PAIRS, SHAPES, Pair
from silo.partition.collection import Collection, Item

ALL_SCANNERS = (*SCANNERS, *UNSEEN_SCANNERS)
PAIRS = {pair.class_name: pair for pair in ALL_PAIRS}
GROUPS = {"seen": SEEN_PAIRS, "held_out": HELD_OUT_PAIRS, "all": ALL_PAIRS}


def _known(name: str, known: tuple[str, ...], word: str) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known[:12])}"
    raise ValueError(f"the drawn world has no {word} {name!r}; {hint}")


def _scanners(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        _known(name, ALL_SCANNERS, "scanner")
    return _distinct(names)


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("must name each once")
    return names


def _classes(value: Any) -> Any:
    if isinstance(value, str) and value in GROUPS:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= len(ALL_PAIRS):
        return value
    if isinstance(value, list | tuple) and len(value) >= 2 and all(isinstance(name, str) for name in value):
        return _distinct(tuple(_known(name, tuple(PAIRS), "class") for name in value))
    raise ValueError(
        f"must be seen, held_out, all, a number from 2 to {len(ALL_PAIRS)}, or a list such as [red circle, blue star]"
    )


ScannerNames = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_scanners)]
ClassChoice = Annotated[
    Literal["seen", "held_out", "all"] | int | tuple[str, ...],
    BeforeValidator(_classes),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(GROUPS)},
                {"type": "integer", "minimum": 2, "maximum": len(ALL_PAIRS)},
                {"type": "array", "items": {"enum": list(PAIRS)}, "minItems": 2},
            ]
        }
    ),
]


class WorldSection(Section):
    """Drawn scenes: every scanner is a domain, every pair of colour and shape a class."""

    scanners: ScannerNames = Field(description="Scanners, each a domain")
    classes: ClassChoice = Field(
        description="seen: those that the embedded CLIP was trained with; held_out: the others; all; "
        "a number: so many, of all colours and shapes alike; or a list of names"
    )
    train_images: Annotated[int, Field(ge=1, le=100_000)] = Field(
        description="Training images of each class and scanner"
    )
    test_images: Annotated[int, Field(ge=1, le=100_000)] = Field(description="Test images of each class and scanner")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1, description="Seed of the drawings")


def pairs_of(choice: str | int | tuple[str, ...]) -> tuple[Pair, ...]:
    """The classes that a `ClassChoice` means, in the order of the world or of the list."""
    if isinstance(choice, int):
        return _spread()[:choice]
    if isinstance(choice, str):
        return GROUPS[choice]
    return tuple(PAIRS[name] for name in choice)


def _spread() -> tuple[Pair, ...]:
    """All classes in an order in which any first ones have each colour, and nearly each shape, equally often."""
    places = ((number % len(COLOURS), number // len(COLOURS)) for number in range(len(ALL_PAIRS)))
    return tuple(Pair(colour, (3 * colour + 7 * turn) % len(SHAPES)) for colour, turn in places)


def planned_collection(section: WorldSection, root: Path) -> Collection:
    """The images as they will lie below `root`, up to the numbers in the file names: enough to try a partition on."""
    counts = {Split.TRAIN: section.train_images, Split.TEST: section.test_images}
    items = [
        Item(f"{scanner}/{split.value}/{pair.class_name}/{number:05d}.png", pair.class_name, split, scanner)
        for scanner in section.scanners
        for split, count in counts.items()
        for pair in pairs_of(section.classes)
        for number in range(count)
    ]
    return Collection(root, tuple(items))


def draw_world(section: WorldSection, root: Path) -> None:
    """Write `root/<scanner>/{train,test}/<class>/*.png`; a scanner that lacks an image is drawn again."""
    from silo.embedded.datasets import Split as Part  # noqa: PLC0415  # needs Pillow
    from silo.embedded.datasets import write_world_folder  # noqa: PLC0415

    pairs = pairs_of(section.classes)
    for scanner in section.scanners:
        finished, unfinished = root / scanner, root / f".{scanner}.new"
        if _is_drawn(section, scanner, root):
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        for part, count in ((Part.TRAIN, section.train_images), (Part.TEST, section.test_images)):
            write_world_folder(unfinished, scanner, dict.fromkeys(pairs, count), part, section.seed)
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.rename(finished)


def _is_drawn(section: WorldSection, scanner: str, root: Path) -> bool:
    """Whether exactly the planned images of a scanner are there, none of them empty."""
    counts = {Split.TRAIN: section.train_images, Split.TEST: section.test_images}
    planned = {
        (split.value, pair.class_name): count for split, count in counts.items() for pair in pairs_of(section.classes)
    }
    found = Counter(
        path.relative_to(root / scanner).parent.parts
        for path in (root / scanner).glob("*/*/*.png")
        if path.stat().st_size > 0
    )
    return found == planned
