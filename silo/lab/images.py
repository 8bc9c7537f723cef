"""Brings a lab's images onto disk, once: `python -m silo.lab.images lab.yaml SETTING...` draws and exports them.

A program of its own, so that the lab can be interrupted meanwhile. A folder that lab.yaml names is used as it is.
"""

import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from fedrt.daemon import report
from fedrt.errors import ConfigurationError, FedrtError
from silo.lab.grid import digest_of
from silo.lab.sections import DIGEST_CHARACTERS, LabData, LabFile, load_lab
from silo.lab.world import WorldSection, draw_world, planned_collection
from silo.partition.collection import Collection as ImageCollection
from silo.partition.collection import CollectionSection, read_collection
from silo.partition.torchvision_sets import export_torchvision


def data_of(lab: LabFile, settings: Collection[str] | None = None) -> tuple[LabData, ...]:
    """The data that the settings use, each once, in order; of all settings if none are named."""
    used: list[LabData] = []
    for name, setting in lab.settings.items():
        data = setting.data or lab.data
        is_wanted = settings is None or name in settings
        if is_wanted and data is not None and data not in used:
            used.append(data)
    return tuple(used)


def images_of(data: LabData, directory: Path) -> CollectionSection:
    """Where the images lie or will lie; `directory` is the lab's."""
    if data.layout is not None:
        return data.collection()
    if data.world is not None:
        digest = digest_of(data.world.model_dump(mode="json"))[:DIGEST_CHARACTERS]
        return data.folder(directory / "images" / f"world-{digest}", "domain_folder")
    assert data.torchvision is not None  # a validator sees to it
    return data.folder(directory / "images" / data.torchvision.lower(), "image_folder")


def foreseen_collection(data: LabData, directory: Path) -> ImageCollection | None:
    """The data set as far as it is known before a run: None for one of torchvision that is not exported yet.

    Raises `ConfigurationError` if a folder is not there, or holds no data set.
    """
    section = images_of(data, directory)
    if data.world is not None:
        return planned_collection(data.world, section.root)
    if data.torchvision is not None and not section.root.is_dir():
        if data.root is not None and not data.root.is_dir():
            raise ConfigurationError(
                f"data.root '{data.root}' does not exist; set it to the directory in which torchvision finds its files"
            )
        return None
    return read_collection(section)


def prepare(lab: LabFile, settings: Collection[str] | None = None) -> Iterator[Path]:
    """Draw and export what is missing for these settings, and give every directory of images. Raises `FedrtError`."""
    for data in data_of(lab, settings):
        root = images_of(data, lab.directory).root
        if data.world is not None:
            _draw(data.world, root)
        elif data.torchvision is not None and data.root is not None:
            export_torchvision(data.torchvision, data.root, root)
        yield root


def _draw(world: WorldSection, root: Path) -> None:
    try:
        draw_world(world, root)
    except OSError as error:
        raise ConfigurationError(f"scenes cannot be drawn into '{root}': {error.strerror or error}") from error


def main() -> int:
    """Prepare images of the lab.yaml that the first argument names, for the settings that follow; the exit code."""
    try:
        for _ in prepare(load_lab(Path(sys.argv[1])), sys.argv[2:]):
            pass
    except FedrtError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
