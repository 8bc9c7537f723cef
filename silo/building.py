"""Encodes all images of a silo into its store of features, ahead of the first task, and shows how far it is."""

from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedrt.errors import FedrtError, StorageError, WorkError
from fedrt.log import configure_logging
from silo.data import Split
from silo.features import Built, FeatureCache, Features
from silo.loading import load_features
from silo.worker_frames import Load


class BuildFailed(FedrtError):
    """Images cannot be encoded; the message says why."""


@dataclass(frozen=True)
class Line:
    """What was done for one split, in the plain view or in that many augmented ones."""

    wanted: Features
    built: Built

    def __str__(self) -> str:
        views = f" in {self.wanted.views} augmented views" if self.wanted.views else ""
        patches = " with patches" if self.wanted.patches else ""
        counts = f"{self.built.image_count} images, {self.built.encoded_count} of them encoded now"
        return f"{self.wanted.split.value}{views}{patches}: {counts}"


def build_features(load: Load, patches: bool, views: int) -> list[Line]:
    """See that the store has the features of all splits, and `views` augmented views of the training images.

    Raises `FedrtError`; `StorageError` as soon as the store refuses features, for in memory they would be lost at the
    end. Ctrl-C keeps what was encoded.
    """
    _, cache = load_features(load)
    everything = [Features(split, patches) for split in Split]
    everything += [Features(Split.TRAIN, patches, views)] if views else []
    with Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),  # of the images that have to be encoded, from the pace of the last half minute
        console=Console(stderr=True),
    ) as progress:
        configure_logging("info", "console")  # again, to the bar's stand-in for stderr: else lines end up in the bar
        lines = [_build(cache, wanted, progress) for wanted in everything if cache.is_held(wanted.split)]
    if any(line.built.in_memory_count for line in lines):
        raise StorageError(cache.storage_problem or "images changed while they were read; run the same command again")
    return lines


def _build(cache: FeatureCache, wanted: Features, progress: Progress) -> Line:
    name = f"{wanted.split.value}, {wanted.views} views" if wanted.views else wanted.split.value
    task = progress.add_task(f"{name}: looking", total=None)

    def on_images(done: int, total: int) -> None:
        if cache.storage_problem is not None:
            raise StorageError(cache.storage_problem)
        if done:
            progress.update(task, description=f"{name}: encoding", completed=done, total=total)

    try:
        built = cache.build(wanted, on_images)
    except WorkError as error:
        raise BuildFailed(f"{error}; the log names them") from error
    progress.update(task, description=name, completed=built.image_count, total=built.image_count)
    return Line(wanted, built)
