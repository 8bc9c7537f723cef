"""Writes the three hospitals' image files: `python -m silo.demo.hospitals world|digits <directory> <seed> <images>`.

A program of its own, so that the demo can be interrupted while images are drawn. Prints the hospitals as JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silo.embedded.datasets import (
    Hospital,
    digit_class_names,
    world_class_names,
    write_digit_hospitals,
    write_world_hospitals,
)

SILOS = ("north", "south", "west")
CLASS_NAMES = {"world": world_class_names, "digits": digit_class_names}
"""The experiment's classes, by data set."""


@dataclass(frozen=True)
class SiloData:
    """What lies at one silo: image counts in sum, and per class of both parts together."""

    scanner: str
    train_count: int
    test_count: int
    class_counts: dict[str, int]


def main() -> None:
    """Write the images and print what was written."""
    data, directory, seed, images = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if data == "world":
        hospitals = write_world_hospitals(directory, seed, train_count=images, test_count=images)
    else:
        hospitals = write_digit_hospitals(directory, seed)
    document = {}
    for name, hospital in zip(SILOS, hospitals, strict=True):
        hospital.root.rename(directory / name)
        document[name] = _summary(hospital)
    sys.stdout.write(json.dumps(document))


def silo_data(document: str) -> dict[str, SiloData]:
    """What `main` printed."""
    return {name: SiloData(**fields) for name, fields in json.loads(document).items()}


def _summary(hospital: Hospital) -> dict[str, Any]:
    classes = {name: hospital.train_counts[name] + hospital.test_counts[name] for name in hospital.train_counts}
    return {
        "scanner": hospital.scanner,
        "train_count": sum(hospital.train_counts.values()),
        "test_count": sum(hospital.test_counts.values()),
        "class_counts": classes,
    }


if __name__ == "__main__":
    main()
