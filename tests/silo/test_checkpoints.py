"""A task that is cut off after any local epoch and goes on from its checkpoint ends with the same bits."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedrt.errors import StorageError
from fedrt.spec import LocalSpec, ModelSpec, OptimizerName, OptimizerSpec, Schedule, TrainingSpec
from fedrt.task import TaskKind
from fedrt.tensors import Scope, initial_tensors, of_scope
from silo import checkpoints
from silo.checkpoint_directory import CheckpointDirectory
from silo.checkpoints import FileCheckpointer, checkpoints_of, work_digest
from silo.clip.model import FrozenClip, load_clip
from silo.data import Split, index
from silo.examples import Examples
from silo.features import FeatureCache
from silo.method import ImageFeatures
from silo.snapshots import NoCheckpoints, Snapshot
from silo.sources import DataSource, ModelSource
from silo.work import OWN, WorkOrder, WorkOutcome
from silo.workbench import Workbench

CLASSES = ("blue square", "red triangle")
EPOCHS = 4
LABELS = {"promptfl": '{"context_length":2}', "fedotp": '{"context_length":2}'}


class Killed(BaseException):
    """Stands for the end of the process: nothing in between may catch it."""


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return load_clip(ModelSource("fedrt-tiny", "embedded", "cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    for number in range(14):
        label = ("blue_square", "red_triangle")[number % 2]
        (place / label).mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 255, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


@pytest.fixture(autouse=True)
def due_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL", 0.0)


def bench(clip: FrozenClip, root: Path) -> Workbench:
    return Workbench(clip, FeatureCache(clip, {OWN: index(DataSource("image_folder", root, test_share=0.0))}, {OWN: 0}))


def order(clip: FrozenClip, path: Path | str, method: str, optimizer: OptimizerName, views: int = 3) -> WorkOrder:
    how = OptimizerSpec(optimizer, learning_rate=0.02, momentum=0.9, weight_decay=0.01)
    training = TrainingSpec(EPOCHS, 5, how, Schedule.COSINE, views=views)
    model = ModelSpec(clip.architecture, clip.weights_sha256, clip.context_dim, clip.feature_dim)
    local = LocalSpec(method, LABELS[method], model, CLASSES, training, 3)
    shared = initial_tensors(of_scope(local.tensors(), Scope.SHARED), 1)
    return WorkOrder("task", "e", TaskKind.TRAIN, local, 2, 11, shared, checkpoint=str(path))


def bits(outcome: WorkOutcome) -> dict[str, object]:
    tensors = {"shared": outcome.shared, "private": outcome.private}
    named = {f"{kind}/{name}": a.tobytes() for kind, group in tensors.items() for name, a in group.items()}
    return named | dict(outcome.metrics)


class Steps:
    """Counts the steps of training; the process is killed at the first of local epoch `fatal`, from 0."""

    def __init__(self, fatal: int | None = None) -> None:
        self.fatal = fatal
        self.seen: list[int] = []

    def __call__(self, done: int, planned: int) -> None:
        if planned:
            if self.fatal is not None and done > self.fatal * planned // EPOCHS:
                raise Killed
            self.seen.append(done)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


@pytest.mark.parametrize("optimizer", list(OptimizerName))
@pytest.mark.parametrize("method", ["promptfl", "fedotp"])
def test_a_kill_after_any_epoch_changes_no_bit(
    clip: FrozenClip, root: Path, tmp_path: Path, method: str, optimizer: OptimizerName
) -> None:
    undisturbed = bench(clip, root).perform(order(clip, "", method, optimizer), Steps())
    path = tmp_path / "once"
    work = order(clip, path, method, optimizer)
    for fatal in range(1, EPOCHS):
        with pytest.raises(Killed):
            bench(clip, root).perform(work, Steps(fatal))
        assert path.exists()
        rest = Steps()
        resumed = bench(clip, root).perform(work, rest)
        assert rest.seen == list(range(3 * fatal + 1, 3 * EPOCHS + 1))  # 14 examples in batches of 5
        assert bits(resumed) == bits(undisturbed)
        path.unlink()
    for fatal in range(1, EPOCHS):  # and in each life of a single task
        with pytest.raises(Killed):
            bench(clip, root).perform(work, Steps(fatal))
    assert bits(bench(clip, root).perform(work, Steps())) == bits(undisturbed)


def test_nothing_is_kept_of_a_task_that_is_soon_done(
    clip: FrozenClip, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SAVE_INTERVAL", 3600.0)
    bench(clip, root).perform(order(clip, tmp_path / "c", "promptfl", OptimizerName.SGD), Steps())
    assert list(tmp_path.iterdir()) == []


def interrupted(clip: FrozenClip, root: Path, path: Path) -> WorkOrder:
    work = order(clip, path, "promptfl", OptimizerName.ADAMW)
    with pytest.raises(Killed):
        bench(clip, root).perform(work, Steps(2))
    assert path.exists()
    return work


@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-3], lambda content: content[:-1] + b"\x7f"]
)
def test_a_damaged_checkpoint_is_a_start_from_the_beginning(
    clip: FrozenClip, root: Path, tmp_path: Path, told: pytest.LogCaptureFixture, damage
) -> None:
    path = tmp_path / "c"
    work = interrupted(clip, root, path)
    path.write_bytes(damage(path.read_bytes()))
    steps = Steps()
    again = bench(clip, root).perform(work, steps)
    assert steps.seen[0] == 1
    assert bits(again) == bits(bench(clip, root).perform(dataclasses.replace(work, checkpoint=""), Steps()))
    assert [r.levelname for r in told.records if "cannot be used; the task starts again" in r.message] == ["WARNING"]


def test_a_checkpoint_that_lacks_something_is_a_start_from_the_beginning(tmp_path: Path, told) -> None:
    checkpoints.write_tensors(tmp_path / "c", {}, {"work": "w"})
    assert FileCheckpointer(tmp_path / "c", "w", lambda: 0.0).load() is None
    assert "cannot be used" in told.text


def test_a_checkpoint_that_cannot_be_read_is_a_start_from_the_beginning(tmp_path: Path, told) -> None:
    (tmp_path / "c").mkdir()
    assert FileCheckpointer(tmp_path / "c", "w", lambda: 0.0).load() is None
    assert "it is a directory" in told.text


def test_a_full_disk_costs_the_checkpoint_only(
    clip: FrozenClip, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: pytest.LogCaptureFixture
) -> None:
    attempts: list[Path] = []

    def full(path: Path, *_: object) -> None:
        attempts.append(path)
        raise StorageError(f"cannot write '{path}': the disk is full; free space and try again")

    work = order(clip, "", "promptfl", OptimizerName.SGD)
    undisturbed = bench(clip, root).perform(work, Steps())
    monkeypatch.setattr(checkpoints, "write_tensors", full)
    outcome = bench(clip, root).perform(dataclasses.replace(work, checkpoint=str(tmp_path / "c")), Steps())
    assert bits(outcome) == bits(undisturbed)
    assert len(attempts) == EPOCHS - 1
    assert len([r for r in told.records if "no checkpoint of this task can be kept" in r.message]) == 1


def test_other_work_is_never_gone_on_with(clip: FrozenClip, root: Path, tmp_path: Path, told) -> None:
    path = tmp_path / "c"
    work = interrupted(clip, root, path)
    other = dataclasses.replace(work, seed=12)
    steps = Steps()
    outcome = bench(clip, root).perform(other, steps)
    assert steps.seen[0] == 1
    assert "is of other work" in told.text
    assert bits(outcome) == bits(bench(clip, root).perform(dataclasses.replace(other, checkpoint=""), Steps()))


def examples(count: int = 3, digest: str = "d") -> Examples:
    labels = torch.arange(count)
    return Examples(ImageFeatures(torch.ones(count, 2), None), labels, labels, digest)


def test_whatever_the_bits_depend_on_makes_it_other_work(
    clip: FrozenClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, cpu = order(clip, tmp_path / "c", "fedotp", OptimizerName.SGD), torch.device("cpu")
    work = dataclasses.replace(work, private={"own": np.ones(2, np.float32)})
    others = [
        dataclasses.replace(work, seed=1),
        dataclasses.replace(work, round_number=3),
        dataclasses.replace(work, experiment_id="f"),
        dataclasses.replace(work, silo="north"),
        dataclasses.replace(work, local=dataclasses.replace(work.local, classes=("red triangle", "blue square"))),
        dataclasses.replace(work, shared={name: array + 1 for name, array in work.shared.items()}),
        dataclasses.replace(work, private={"own": np.zeros(2, np.float32)}),
        dataclasses.replace(work, private={}),
    ]
    digests = {work_digest(one, examples(), cpu) for one in (work, *others)}
    digests |= {work_digest(work, one, cpu) for one in (examples(4), examples(digest="e"))}
    swapped = dataclasses.replace(examples(), labels=torch.tensor([2, 1, 0]))
    digests.add(work_digest(work, swapped, cpu))
    monkeypatch.setattr("fedrt.__version__", "0.0.0")
    digests.add(work_digest(work, examples(), cpu))
    assert len(digests) == len(others) + 5
    moved = dataclasses.replace(work, checkpoint="elsewhere", task_id="again")
    monkeypatch.undo()
    assert work_digest(moved, examples(), cpu) == work_digest(work, examples(), cpu)


def test_images_that_changed_on_disk_have_another_digest(clip: FrozenClip, root: Path, tmp_path: Path) -> None:
    def digest() -> str:
        held = {OWN: index(DataSource("image_folder", tmp_path / "copy", test_share=0.0))}
        cache = FeatureCache(clip, held, {OWN: 0})

        return cache.examples(OWN, Split.TRAIN, False, {"a": 0}, lambda *_: None).digest

    place = tmp_path / "copy" / "a"
    place.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number}.png")
    before = digest()
    assert digest() == before
    Image.new("RGB", (8, 8), (9, 0, 0)).save(place / "1.png")
    assert digest() != before


def test_images_that_cannot_be_told_apart_have_no_checkpoints(clip: FrozenClip, tmp_path: Path) -> None:
    work, cpu = order(clip, tmp_path / "c", "promptfl", OptimizerName.SGD), torch.device("cpu")
    assert isinstance(checkpoints_of(work, examples(digest=""), cpu), NoCheckpoints)
    assert isinstance(checkpoints_of(dataclasses.replace(work, checkpoint=""), examples(), cpu), NoCheckpoints)
    assert isinstance(checkpoints_of(work, examples(), cpu), FileCheckpointer)


def test_one_checkpoint_in_thirty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    now = 1000.0
    kept = FileCheckpointer(tmp_path / "c", "w", lambda: now)
    assert not kept.is_due()
    now += 29.9
    assert not kept.is_due()
    now += 0.1
    assert kept.is_due()
    kept.save(Snapshot(1, 0.5, {"context": torch.ones(2)}, {}, {}, torch.zeros(8, dtype=torch.uint8)))
    assert not kept.is_due()
    now += 30
    assert kept.is_due()


def test_the_scaler_of_fp16_comes_back_exactly(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    state = scaler.state_dict() | {"scale": 1 / 3, "_growth_tracker": 17}
    kept = FileCheckpointer(tmp_path / "c", "w", lambda: 0.0)
    kept.save(Snapshot(1, 0.1, {}, {0: {"step": torch.tensor(3.0)}}, state, torch.zeros(8, dtype=torch.uint8)))
    found = kept.load()
    assert found is not None
    assert dict(found.scaler) == state
    scaler.load_state_dict(dict(found.scaler))
    assert scaler.get_scale() == 1 / 3
    assert found.optimizer[0]["step"].shape == ()


# ---- the daemon's half


def test_a_task_that_has_ended_leaves_no_checkpoint(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path / "checkpoints")
    path = directory.path("e/1/train/north")
    assert path != directory.path("e/1/train/south")
    assert "north" not in path.name
    path.write_bytes(b"x")
    directory.path("other").write_bytes(b"x")
    path.with_name(f".{path.name}.0badcafe.new").write_bytes(b"half")
    directory.remove("e/1/train/north")
    directory.remove("e/1/train/north")
    assert list((tmp_path / "checkpoints").iterdir()) == [directory.path("other")]


def test_what_nobody_claims_for_seven_days_is_removed(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    directory.path("old").write_bytes(b"x")
    written = directory.path("old").stat().st_mtime
    assert directory.sweep(written + 7 * 86400 - 1) == 0
    assert directory.sweep(written - 30 * 86400) == 0  # a clock that was set back
    assert directory.sweep(written + 7 * 86400 + 1) == 1
    assert list(tmp_path.iterdir()) == []


def test_half_a_checkpoint_of_a_killed_worker_is_removed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / ".c.safetensors.0badcafe.new").write_bytes(b"half")
    CheckpointDirectory(tmp_path)
    assert list(tmp_path.iterdir()) == []
