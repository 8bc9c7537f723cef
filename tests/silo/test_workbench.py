"""Orders carried out with the embedded CLIP on a small folder of real image files, in this process and in a child."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from structlog.testing import CapturingLogger

import fedrt.methods
import silo.methods
from fedrt.aggregation import ServerState, Update
from fedrt.errors import ConfigurationError, FailureReason, SpecError, TensorError, WorkError
from fedrt.method import ModelDims
from fedrt.spec import EvaluationSplit, LocalEvaluationSpec, LocalSpec, ModelSpec, Precision, Schedule, TrainingSpec
from fedrt.task import TaskKind
from fedrt.tensors import Normal, Scope, TensorSpec, initial_tensors
from silo.clip.model import FrozenClip, load_clip
from silo.clip.text import ClipTextTower
from silo.data import Split, index
from silo.data.images import read_image
from silo.embedded import embedded_paths
from silo.examples import Examples
from silo.features import FeatureCache
from silo.method import Classifier, ImageFeatures, LocalMethod, Params, TextTower, cross_entropy
from silo.sources import DataSource, ModelSource
from silo.training import Start, Trained, train
from silo.work import OWN, WorkOrder
from silo.workbench import Workbench, open_workbench
from silo.worker import ProcessWorker
from silo.worker_frames import Load

pytestmark = pytest.mark.skipif(
    not embedded_paths().weights_path.is_file(), reason="the embedded CLIP has not been trained in this checkout"
)
MODEL = ModelSource("fedrt-tiny", "embedded")
CLASSES = ("green circle", "blue square", "red triangle")


@pytest.fixture(scope="module")
def clip() -> Iterator[FrozenClip]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model on busy cores: more threads only wait for each other
    yield load_clip(MODEL)
    torch.set_num_threads(threads)


def draw(root: Path) -> Path:
    """Ten red and ten blue images with noise; the silo has no green ones and writes its labels its own way."""
    noise = np.random.default_rng(0)
    for label, colour in {"Blue_Square": (40, 60, 230), "RED triangle": (230, 40, 40)}.items():
        (root / label).mkdir(parents=True)
        for number in range(10):
            pixels = np.clip(np.array(colour) + noise.normal(0, 20, (40, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw(tmp_path / "images")


def bench(clip: FrozenClip, root: Path, share: float = 0.0, test_share: float = 0.2) -> Workbench:
    source = DataSource("image_folder", root, test_share=test_share)
    return Workbench(clip, FeatureCache(clip, {OWN: index(source)}, {OWN: share}))


def local(clip: FrozenClip, method: str = "promptfl", hyperparameters: str = '{"context_length":2}') -> LocalSpec:
    model = ModelSpec(clip.architecture, clip.weights_sha256, clip.context_dim, clip.feature_dim)
    return LocalSpec(method, hyperparameters, model, CLASSES, TrainingSpec(local_epochs=2, batch_size=5), 4)


def order(spec: LocalSpec, kind: TaskKind = TaskKind.TRAIN, seed: int = 11) -> WorkOrder:
    shared = {} if kind is TaskKind.INITIALIZE else shared_of(spec)
    return WorkOrder("t1", "e1", kind, spec, 1, seed, shared)


def shared_of(spec: LocalSpec) -> dict[str, np.ndarray]:
    return initial_tensors([one for one in spec.tensors() if one.scope is Scope.SHARED], 1)


def quiet(done: int, planned: int) -> None:
    pass


def test_the_report_says_what_is_held(clip: FrozenClip, root: Path) -> None:
    report = bench(clip, root).report()
    assert report.weights_sha256 == clip.weights_sha256
    assert report.class_counts == {
        "train": {"Blue_Square": 8, "RED triangle": 8},
        "test": {"Blue_Square": 2, "RED triangle": 2},
    }
    assert report.example_count == 16
    assert (report.device, report.unreadable_count) == ("cpu", 0)
    assert report.memory_bytes > 1 << 28


def test_training_gives_a_delta_that_lowers_the_loss(clip: FrozenClip, root: Path) -> None:
    spec = local(clip)
    work, steps = bench(clip, root), []
    outcome = work.perform(order(spec), lambda done, planned: steps.append((done, planned)))
    assert outcome.example_count == 16
    assert outcome.shared["context"].dtype == np.float32
    assert outcome.shared["context"].shape == (2, clip.context_dim)
    assert np.abs(outcome.shared["context"]).max() > 0
    assert outcome.private == {}
    assert steps[0] == (0, 0)
    assert steps[-1] == (8, 8)
    assert outcome.duration > 0
    evaluate = order(spec, TaskKind.EVALUATE)
    before = work.perform(evaluate, quiet)
    trained = {"context": evaluate.shared["context"] + outcome.shared["context"]}
    after = work.perform(dataclasses.replace(evaluate, shared=trained), quiet)
    assert (before.example_count, before.shared, before.private) == (4, {}, {})
    assert after.metrics["loss"] < before.metrics["loss"]
    assert 0 <= before.metrics["accuracy"] <= after.metrics["accuracy"] <= 1


def test_training_depends_on_the_seed_and_nothing_else(clip: FrozenClip, root: Path) -> None:
    spec = local(clip)
    first, second = bench(clip, root), bench(clip, root)
    second.perform(order(spec, TaskKind.EVALUATE), quiet)
    torch.manual_seed(5)
    one, other = (each.perform(order(spec), quiet).shared["context"].tobytes() for each in (first, second))
    assert one == other
    assert first.perform(order(spec, seed=12), quiet).shared["context"].tobytes() != one


def test_zero_shot_evaluates_without_tensors(clip: FrozenClip, root: Path) -> None:
    outcome = bench(clip, root).perform(order(local(clip, "zeroshot", "{}"), TaskKind.EVALUATE), quiet)
    assert set(outcome.metrics) == {"accuracy", "loss", "macro_f1", "calibration_error", "auroc"}


def test_initial_values_with_a_phrase_come_from_clip(clip: FrozenClip, root: Path) -> None:
    spec = local(clip, hyperparameters='{"context_length":3,"context_init":"a photo of"}')
    outcome = bench(clip, root).perform(order(spec, TaskKind.INITIALIZE), quiet)
    expected = clip.embed_phrase("a photo of", 3).detach().numpy()
    assert outcome.shared["context"].tobytes() == expected.astype(np.float32).tobytes()
    assert outcome.example_count == 0


def test_several_contexts_start_from_the_words_with_noise(clip: FrozenClip, root: Path) -> None:
    spec = local(clip, hyperparameters='{"context_length":3,"context_init":"a photo of","context_count":2}')
    outcome = bench(clip, root).perform(order(spec, TaskKind.INITIALIZE), quiet)
    noise = outcome.shared["context"] - clip.embed_phrase("a photo of", 3).detach().numpy()
    assert noise.shape == (2, 3, clip.context_dim)
    assert 0.015 < noise.std() < 0.025
    assert not np.array_equal(noise[0], noise[1])
    again = bench(clip, root).perform(order(spec, TaskKind.INITIALIZE, seed=9), quiet)
    assert again.shared["context"].tobytes() == outcome.shared["context"].tobytes()
    other = bench(clip, root).perform(order(dataclasses.replace(spec, seed=2), TaskKind.INITIALIZE), quiet)
    assert other.shared["context"].tobytes() != outcome.shared["context"].tobytes()


def test_initial_values_without_a_phrase_are_those_of_every_machine(clip: FrozenClip, root: Path) -> None:
    spec = local(clip)
    outcome = bench(clip, root).perform(order(dataclasses.replace(spec, seed=9), TaskKind.INITIALIZE), quiet)
    assert outcome.shared["context"].tobytes() == initial_tensors(spec.tensors(), 9)["context"].tobytes()


# --- private tensors -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twofold:
    """A method with a shared and a private context."""

    name: ClassVar[str] = "twofold"
    needs_patches: ClassVar[bool] = True

    def tensors(self, dims: ModelDims) -> tuple[TensorSpec, ...]:
        shape = (2, dims.context_dim)
        return (
            TensorSpec("context", shape, Scope.SHARED),
            TensorSpec("own", shape, Scope.PRIVATE, Normal(0.02)),
        )

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        return state


def build_twofold(declaration: Twofold, tower: TextTower) -> LocalMethod:
    def classify(params: Params) -> Classifier:
        features = tower.encode(params["context"] + params["own"])

        def logits(images: ImageFeatures) -> torch.Tensor:
            assert images.patches is not None
            return tower.logit_scale * images.pooled @ features.T

        return logits

    return LocalMethod(classify, cross_entropy(classify))


@pytest.fixture
def twofold(clip: FrozenClip, monkeypatch: pytest.MonkeyPatch) -> LocalSpec:
    monkeypatch.setitem(fedrt.methods.BUILT_IN, "twofold", Twofold)
    monkeypatch.setitem(silo.methods.BUILT_IN, "twofold", build_twofold)
    return local(clip, "twofold", "{}")


def test_private_tensors_start_from_the_experiment_and_go_on_from_what_is_held(
    clip: FrozenClip, root: Path, twofold: LocalSpec
) -> None:
    work = bench(clip, root)
    first = order(twofold)
    implicit = work.perform(first, quiet)
    start = initial_tensors([twofold.tensors()[1]], 1)
    explicit = work.perform(dataclasses.replace(first, private=start), quiet)
    assert set(implicit.shared) == {"context"}
    assert set(implicit.private) == {"own"}
    assert implicit.private["own"].tobytes() == explicit.private["own"].tobytes() != start["own"].tobytes()
    same = work.perform(dataclasses.replace(first, experiment_id="e2"), quiet)
    assert same.private["own"].tobytes() == implicit.private["own"].tobytes()
    elsewhere = work.perform(dataclasses.replace(first, local=dataclasses.replace(twofold, seed=2)), quiet)
    assert elsewhere.private["own"].tobytes() != implicit.private["own"].tobytes()
    onward = work.perform(dataclasses.replace(first, private=implicit.private, round_number=2), quiet)
    assert onward.private["own"].tobytes() != implicit.private["own"].tobytes()


def test_private_tensors_of_another_shape_are_this_silo_s_fault(
    clip: FrozenClip, root: Path, twofold: LocalSpec
) -> None:
    wrong = dataclasses.replace(order(twofold), private={"own": np.zeros((9, 9), np.float32)})
    with pytest.raises(WorkError, match="the private tensors that this silo holds") as caught:
        bench(clip, root).perform(wrong, quiet)
    assert caught.value.reason is FailureReason.INTERNAL


# --- what is refused -----------------------------------------------------------------------------------------------


def test_other_weights_than_the_experiment_s_are_refused_with_both_digests(clip: FrozenClip, root: Path) -> None:
    model = dataclasses.replace(local(clip).model, weights_sha256="ab" * 32)
    with pytest.raises(WorkError, match=f"asks for weights {'ab' * 32}, this silo holds {clip.weights_sha256}"):
        bench(clip, root).perform(order(dataclasses.replace(local(clip), model=model)), quiet)
    model = dataclasses.replace(local(clip).model, feature_dim=7)
    with pytest.raises(WorkError, match="names context and feature sizes"):
        bench(clip, root).perform(order(dataclasses.replace(local(clip), model=model)), quiet)


def test_a_method_that_is_not_installed_is_refused(clip: FrozenClip, root: Path) -> None:
    wrong = dataclasses.replace(order(local(clip)), local=local(clip, "promptfool"))
    with pytest.raises(SpecError, match="did you mean 'promptfl'"):
        bench(clip, root).perform(wrong, quiet)


@pytest.mark.parametrize(
    "shared", [{}, {"context": np.zeros((3, 1), np.float32)}, {"context": np.full((2, 96), np.nan, np.float32)}]
)
def test_tensors_that_are_not_the_declared_ones_are_refused(
    clip: FrozenClip, root: Path, shared: dict[str, np.ndarray]
) -> None:
    with pytest.raises(TensorError):
        bench(clip, root).perform(dataclasses.replace(order(local(clip)), shared=shared), quiet)


def test_unknown_labels_are_listed_in_the_log_and_counted_for_the_coordinator(
    clip: FrozenClip, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "Jane Doe").mkdir()
    Image.new("RGB", (8, 8)).save(root / "Jane Doe" / "0.png")
    with pytest.raises(WorkError, match="1 of this silo's 3 labels") as caught:
        bench(clip, root).perform(order(local(clip)), quiet)
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE
    assert "Jane" not in str(caught.value)
    assert "label 'Jane Doe' is no class of the experiment" in caplog.text


def test_an_unknown_label_among_the_test_images_shows_in_training(clip: FrozenClip, tmp_path: Path) -> None:
    for split, label in (("train", "red triangle"), ("test", "red triangle"), ("test", "Jane Doe")):
        (tmp_path / split / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / label / "0.png")
    with pytest.raises(WorkError, match="1 of this silo's 2 labels"):
        bench(clip, tmp_path).perform(order(local(clip)), quiet)


def test_without_test_examples_there_is_nothing_to_evaluate(clip: FrozenClip, root: Path) -> None:
    with pytest.raises(WorkError, match="this silo has no test examples") as caught:
        bench(clip, root, test_share=0).perform(order(local(clip), TaskKind.EVALUATE), quiet)
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE


# --- unreadable files ----------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


def test_truncated_files_are_skipped_up_to_the_share(
    clip: FrozenClip, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        truncate(root / "Blue_Square" / f"{number}.png")
    strict = bench(clip, root, 0.1, test_share=0)
    with pytest.raises(
        WorkError, match=r"3 of 20 train images are unreadable; this silo skips up to 10\.00%"
    ) as caught:
        strict.perform(order(local(clip)), quiet)
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE
    assert "0.png" not in str(caught.value)
    assert "unreadable image 'Blue_Square/0.png': damaged" in caplog.text
    lenient = bench(clip, root, 0.15, test_share=0)
    assert lenient.perform(order(local(clip)), quiet).example_count == 17
    report = lenient.report()
    assert report.unreadable_count == 3
    assert report.class_counts == {"train": {"Blue_Square": 7, "RED triangle": 10}}


def test_the_survey_finds_wrong_types_before_any_work(clip: FrozenClip, root: Path) -> None:
    (root / "Blue_Square" / "0.png").write_text("hello")
    load = Load(MODEL, {OWN: DataSource("image_folder", root)}, 1)
    with pytest.raises(ConfigurationError, match=r"1 of \d+ \w+ images are unreadable.*the log names them: repair"):
        open_workbench(load)
    source = dataclasses.replace(load.data[OWN], max_unreadable_share=0.5)
    lenient = open_workbench(dataclasses.replace(load, data={OWN: source}))
    assert lenient.report().unreadable_count == 1


def test_features_are_computed_once_for_each_split(clip: FrozenClip, root: Path, twofold: LocalSpec) -> None:
    calls: list[tuple[int, bool]] = []

    class Counting:
        preprocess, device = staticmethod(clip.preprocess), clip.device

        def encode_images(self, images: torch.Tensor, patches: bool) -> ImageFeatures:
            calls.append((len(images), patches))
            return clip.encode_images(images, patches)

    source = DataSource("image_folder", root, test_share=0)
    cache = FeatureCache(Counting(), {"a": index(source), "b": index(source)}, {"a": 0, "b": 0})  # type: ignore[arg-type]
    seen: list[tuple[int, int]] = []
    classes = {"Blue_Square": 1, "RED triangle": 2}
    for name in ("a", "b"):
        pooled = cache.examples(name, Split.TRAIN, False, classes, lambda done, total: seen.append((done, total)))
        found = cache.examples(name, Split.TRAIN, True, classes, lambda done, total: None)
    assert calls == [(32, False), (32, True)]  # twenty images, in batches of one size
    assert seen == [(20, 20)]
    assert found.labels.tolist() == [1] * 10 + [2] * 10
    images = found.batch(slice(None)).images
    assert images.patches is not None
    assert images.patches.shape[0] == 20
    torch.testing.assert_close(images.pooled.norm(dim=1), torch.ones(20))
    assert pooled.batch(slice(3)).images.patches is None


def test_features_depend_neither_on_neighbours_nor_on_what_came_before(clip: FrozenClip, root: Path) -> None:
    everything = index(DataSource("image_folder", root, test_share=0))
    alone = dataclasses.replace(everything, records=everything.records[7:8])
    classes = {"Blue_Square": 0, "RED triangle": 1}

    def first(cache: FeatureCache, silo: str) -> torch.Tensor:
        return cache.examples(silo, Split.TRAIN, False, classes, quiet).batch(slice(1)).images.pooled

    together = FeatureCache(clip, {"all": everything, "one": alone}, {"all": 0, "one": 0})
    expected = first(FeatureCache(clip, {OWN: alone}, {OWN: 0}), OWN)
    assert torch.equal(first(together, "one"), expected)
    later = dataclasses.replace(everything, records=everything.records[:7])
    grown = FeatureCache(clip, {"later": dataclasses.replace(later), "one": alone}, {"later": 0, "one": 0})
    first(grown, "later")
    assert torch.equal(first(grown, "one"), expected)


def test_features_that_are_not_finite_are_refused(clip: FrozenClip, root: Path) -> None:
    class Damaged:
        preprocess, device = staticmethod(clip.preprocess), clip.device

        def encode_images(self, images: torch.Tensor, patches: bool) -> ImageFeatures:
            pooled, _ = clip.encode_images(images, patches)
            return ImageFeatures(torch.where(torch.arange(len(pooled))[:, None] == 3, torch.nan, pooled), None)

    cache = FeatureCache(Damaged(), {OWN: index(DataSource("image_folder", root))}, {OWN: 0})  # type: ignore[arg-type]
    with pytest.raises(WorkError, match="features of some images are not finite; check the model's weights") as caught:
        cache.examples(OWN, Split.TRAIN, False, {"Blue_Square": 0, "RED triangle": 1}, quiet)
    assert caught.value.reason is FailureReason.NOT_FINITE


def test_one_image_of_one_class_and_a_batch_larger_than_the_data(clip: FrozenClip, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "red triangle").mkdir(parents=True)
        Image.new("RGB", (32, 32), (220, 30, 30)).save(tmp_path / split / "red triangle" / "0.png")
    work = bench(clip, tmp_path)
    for method in ("promptfl", "coop", "fedotp", "fedpgp", "promptfolio"):
        spec = local(clip, method, '{"context_length":2,"rank":1}' if method == "fedpgp" else '{"context_length":2}')
        trained = work.perform(order(spec), quiet)
        assert trained.example_count == 1
        assert np.isfinite(trained.metrics["loss"])
        measured = work.perform(order(spec, TaskKind.EVALUATE), quiet)
        assert set(measured.metrics) == {"accuracy", "loss", "macro_f1", "calibration_error"}


def test_virtual_silos_hold_what_is_theirs(clip: FrozenClip, root: Path) -> None:
    everything = index(DataSource("image_folder", root, test_share=0))
    (blue, red) = (
        dataclasses.replace(everything, records=tuple(r for r in everything.records if r.label == label))
        for label in ("Blue_Square", "RED triangle")
    )
    truncate(root / "Blue_Square" / "3.png")
    work = Workbench(clip, FeatureCache(clip, {"blue": blue, "red": red}, {"blue": 0.0, "red": 0.0}))
    assert (work.report().of("blue").example_count, work.report().unreadable_count) == (10, 0)
    spec = dataclasses.replace(local(clip), classes=("red triangle", "green circle"))
    assert work.perform(dataclasses.replace(order(spec), silo="red"), quiet).example_count == 10
    with pytest.raises(WorkError, match="no class in common"):
        work.perform(dataclasses.replace(order(spec), silo="blue"), quiet)
    with pytest.raises(WorkError, match=r"1 of 10 train images are unreadable; this silo skips up to 0\.00%"):
        work.perform(dataclasses.replace(order(local(clip)), silo="blue"), quiet)
    with pytest.raises(WorkError, match="this silo has no test examples"):
        work.perform(dataclasses.replace(order(spec, TaskKind.EVALUATE), silo="red"), quiet)
    assert work.report().of("red").example_count == 10
    assert (work.report().of("blue").example_count, work.report().unreadable_count) == (9, 1)


def test_a_cosine_ends_with_the_experiment(clip: FrozenClip, root: Path) -> None:
    work = bench(clip, root)
    training = dataclasses.replace(local(clip).training, schedule=Schedule.COSINE, local_epochs=1)
    spec = dataclasses.replace(local(clip), training=training)
    first, last = (
        np.abs(work.perform(dataclasses.replace(order(spec), round_number=number), quiet).shared["context"]).max()
        for number in (1, 4)
    )
    assert 0 < last < 0.3 * first


def test_a_label_that_means_nothing_in_an_evaluation_shows_in_the_first_round(clip: FrozenClip, root: Path) -> None:
    rows = [f"Blue_Square/{n}.png,Blue_Square,{'train' if n < 6 else 'test'}" for n in range(10)]
    (root.parent / "m.csv").write_text("\n".join(["path,label,split", *rows, "RED triangle/0.png,RED triangle,novel"]))
    cache = FeatureCache(clip, {OWN: index(DataSource("manifest", root, root.parent / "m.csv"))}, {OWN: 0.0})
    wanted = LocalEvaluationSpec((EvaluationSplit.PERSONAL, EvaluationSplit.NOVEL), ("purple star",))
    spec = dataclasses.replace(local(clip), evaluation=wanted)
    with pytest.raises(WorkError, match="no class in common"):
        Workbench(clip, cache).perform(order(spec), quiet)


def test_an_evaluation_runs_the_text_tower_once_for_each_list_of_classes(
    clip: FrozenClip, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = ClipTextTower.encode

    def counted(self: ClipTextTower, context: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(1)
        assert not torch.is_grad_enabled()
        return plain(self, context, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ClipTextTower, "encode", counted)
    rows = [f"Blue_Square/{n}.png,Blue_Square,{s}" for n, s in enumerate(["train", "test", "base", "domain"])]
    (root.parent / "m.csv").write_text("\n".join(["path,label,split", *rows, "RED triangle/0.png,RED triangle,novel"]))
    cache = FeatureCache(clip, {OWN: index(DataSource("manifest", root, root.parent / "m.csv"))}, {OWN: 0.0})
    spec = dataclasses.replace(
        local(clip), classes=("blue square",), evaluation=LocalEvaluationSpec(tuple(EvaluationSplit), ("red triangle",))
    )
    Workbench(clip, cache).perform(order(spec, TaskKind.EVALUATE), quiet)
    assert len(calls) == 2


def test_an_evaluation_measures_each_split_that_is_held(clip: FrozenClip, root: Path, tmp_path: Path) -> None:
    rows = [f"Blue_Square/{n}.png,Blue_Square,{s}" for n, s in enumerate(["train"] * 6 + ["test"] * 2 + ["base"] * 2)]
    rows += [f"RED triangle/{n}.png,RED triangle,novel" for n in range(10)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,split", *rows, "Blue_Square/6.png,Blue_Square,base"]))
    source = DataSource("manifest", root, tmp_path / "m.csv")
    work = Workbench(clip, FeatureCache(clip, {OWN: index(source)}, {OWN: 0}))
    splits = (EvaluationSplit.PERSONAL, EvaluationSplit.BASE, EvaluationSplit.NOVEL, EvaluationSplit.DOMAIN)
    spec = dataclasses.replace(
        local(clip),
        classes=("blue square", "green circle"),
        evaluation=LocalEvaluationSpec(splits, ("red triangle", "pink star")),
    )
    outcome = work.perform(order(spec, TaskKind.EVALUATE), quiet)
    assert outcome.example_count == 2
    names = {"accuracy", "loss", "macro_f1", "calibration_error"}  # no auroc: each split holds one class
    assert set(outcome.metrics) == names | {f"base_{n}" for n in names} | {f"novel_{n}" for n in names}
    swapped = dataclasses.replace(spec, evaluation=LocalEvaluationSpec(splits, ("pink star", "red triangle")))
    again = work.perform(order(swapped, TaskKind.EVALUATE), quiet)
    assert again.metrics["novel_accuracy"] == outcome.metrics["novel_accuracy"]
    only = dataclasses.replace(spec, evaluation=LocalEvaluationSpec((EvaluationSplit.DOMAIN,)))
    with pytest.raises(WorkError, match="this silo has no domain examples"):
        work.perform(order(only, TaskKind.EVALUATE), quiet)


# --- views and precision -------------------------------------------------------------------------------------------


def training(spec: LocalSpec, **settings: object) -> LocalSpec:
    return dataclasses.replace(spec, training=dataclasses.replace(spec.training, **settings))  # type: ignore[arg-type]


class NotingTrain:
    """Notes the examples that each training of the workbench has, and trains."""

    def __init__(self) -> None:
        self.seen: list[Examples] = []

    def __call__(self, method: LocalMethod, specs: tuple[TensorSpec, ...], start: Start, *rest: Any) -> Trained:
        self.seen.append(rest[0])
        return train(method, specs, start, *rest)


@pytest.mark.parametrize("method", ["promptfl", "fedotp"])
def test_views_are_of_the_training_images_only(
    clip: FrozenClip, root: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    noting, work = NotingTrain(), bench(clip, root)
    monkeypatch.setattr("silo.workbench.train", noting)
    spec = training(local(clip, method), views=3)
    outcome = work.perform(order(spec), quiet)
    assert outcome.example_count == 16
    (examples,) = noting.seen
    assert (len(examples), examples.view_count) == (16, 3)
    everything = index(DataSource("image_folder", root, test_share=0.2)).of_split(Split.TRAIN)
    expected = torch.stack(
        [
            clip.augment(read_image(record.path), hashlib.sha256(record.path.read_bytes()).hexdigest(), 2)
            for record in everything
        ]
    )
    features = clip.encode_images(expected, patches=method == "fedotp")
    found = examples.batch(slice(None), 1).images  # the second view has the number 2
    torch.testing.assert_close(found.pooled, features.pooled, atol=1e-5, rtol=0)
    assert (found.patches is None) == (features.patches is None)
    evaluated = [
        bench(clip, root).perform(order(each, TaskKind.EVALUATE), quiet).metrics for each in (local(clip, method), spec)
    ]
    assert evaluated[0] == evaluated[1]


def test_training_on_views_repeats_bit_for_bit_and_goes_on_with_the_rounds(clip: FrozenClip, root: Path) -> None:
    def after(views: int, round_number: int) -> bytes:
        given = dataclasses.replace(order(training(local(clip), views=views)), round_number=round_number)
        return bench(clip, root).perform(given, quiet).shared["context"].tobytes()

    assert after(3, 1) == after(3, 1)
    assert len({after(0, 1), after(1, 1), after(3, 1), after(3, 2), after(3, 3)}) == 5
    assert after(3, 4) == after(3, 1)  # two epochs in each of three rounds are two times three views


@pytest.mark.parametrize("method", ["promptfl", "coop", "fedprox", "fedpgp", "promptfolio", "fedotp"])
def test_bf16_reports_the_error_of_its_features_and_repeats_bit_for_bit(
    clip: FrozenClip, root: Path, method: str
) -> None:
    hyperparameters = '{"context_length":2,"rank":1}' if method == "fedpgp" else '{"context_length":2}'
    full = local(clip, method, hyperparameters)
    half = training(full, precision=Precision.BF16)
    exact, first, again = (bench(clip, root).perform(order(spec), quiet) for spec in (full, half, half))
    assert set(exact.metrics) == {"loss"}
    assert set(first.metrics) == {"loss", "feature_error"}
    assert 0 < first.metrics["feature_error"] < 0.05
    assert first.metrics == again.metrics
    for one, other in ((first.shared, again.shared), (first.private, again.private)):
        assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in other.items()}
    assert first.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.1)


def test_the_error_is_that_of_the_tensors_to_start_from(clip: FrozenClip, root: Path) -> None:
    spec, work = training(local(clip), precision=Precision.BF16), bench(clip, root)
    given = order(spec)
    tower = clip.text_tower(CLASSES)
    context = torch.from_numpy(given.shared["context"])
    with torch.no_grad():
        exact = tower.encode(context)
        with torch.autocast("cpu", torch.bfloat16):
            reduced = tower.encode(context)
    expected = float((exact - reduced.float()).abs().max())
    assert work.perform(given, quiet).metrics["feature_error"] == expected
    moved = dataclasses.replace(given, shared={"context": given.shared["context"] * 2}, round_number=2)
    assert work.perform(moved, quiet).metrics["feature_error"] != expected


def test_evaluation_is_in_float32_whatever_training_computes_in(clip: FrozenClip, root: Path) -> None:
    work, full = bench(clip, root), local(clip)
    measured = [
        work.perform(order(training(full, precision=precision), TaskKind.EVALUATE), quiet).metrics
        for precision in Precision
    ]
    assert measured[0] == measured[1] == measured[2]
    assert "feature_error" not in measured[0]


def test_fp16_on_a_cpu_is_refused_before_anything_is_computed(clip: FrozenClip, root: Path) -> None:
    with pytest.raises(WorkError, match="fp16, which needs CUDA"):
        bench(clip, root).perform(order(training(local(clip), precision=Precision.FP16)), quiet)


@pytest.mark.parametrize(("slow", "warnings"), [(True, 1), (False, 0)])
def test_a_cpu_that_is_slow_with_bf16_is_told_once(
    clip: FrozenClip,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    slow: bool,
    warnings: int,
) -> None:
    monkeypatch.setattr("silo.workbench.is_slow", lambda precision, device: slow)
    spec, work = training(local(clip), precision=Precision.BF16, local_epochs=1), bench(clip, root)
    for _ in range(2):
        work.perform(order(spec), quiet)
    assert caplog.text.count("training.precision is bf16, for which this CPU has no instructions") == warnings


# --- in a child ----------------------------------------------------------------------------------------------------


async def test_two_processes_train_to_the_same_bits(clip: FrozenClip, root: Path) -> None:
    spec = local(clip)
    wrong = dataclasses.replace(spec, model=dataclasses.replace(spec.model, context_dim=1))
    shared = {"context": np.zeros((2, 1), np.float32)}
    found = []
    for _ in range(2):
        log = CapturingLogger()
        worker = ProcessWorker(MODEL, {OWN: DataSource("image_folder", root)}, 1, log)
        try:
            report = await worker.describe()
            assert report.weights_sha256 == clip.weights_sha256
            outcome = await worker.run(order(spec), quiet)
            found.append(outcome.shared["context"].tobytes())
            with pytest.raises(WorkError, match="names context and feature sizes"):
                await worker.run(dataclasses.replace(order(wrong), shared=shared), quiet)
        finally:
            await worker.stop()
        assert all(call.method_name == "info" for call in log.calls), log.calls
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ModelSource("fedrt-tiny", "/no/such/file.safetensors"), "/no/such/file.safetensors"),
        (dataclasses.replace(MODEL, device="cuda:99"), "cuda"),
    ],
)
async def test_what_cannot_be_loaded_is_the_operator_s_to_mend(root: Path, model: ModelSource, words: str) -> None:
    worker = ProcessWorker(model, {OWN: DataSource("image_folder", root)}, 1, CapturingLogger())
    with pytest.raises(ConfigurationError, match=words):
        await worker.describe()
    assert worker.process_id is None
