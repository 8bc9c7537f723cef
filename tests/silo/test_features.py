"""Features from the store and from the image tower: the same bits, and each image encoded once."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedrt.errors import ConfigurationError, FailureReason, WorkError
from silo.building import Line
from silo.clip.model import FrozenClip, load_clip
from silo.data import Split, index
from silo.embedded import embedded_paths
from silo.encoding import BATCH, VIEWS_AT_ONCE, Wanted, decode_all
from silo.extraction import Extraction
from silo.feature_store import FeatureStore, Row
from silo.feature_tables import HostTable, ResidentTable, _fits, _resident, rows_device, table_of
from silo.features import FeatureCache, Features
from silo.loading import load_features
from silo.method import ImageFeatures
from silo.sources import DataSource, ElementType, FeatureSource, ModelSource
from silo.work import OWN
from silo.worker_frames import Load

pytestmark = pytest.mark.skipif(
    not embedded_paths().weights_path.is_file(), reason="the embedded CLIP has not been trained in this checkout"
)
MODEL = ModelSource("fedrt-tiny", "embedded")
CLASSES = {"blue": 0, "red": 1}
BOUND = 1 << 30


@pytest.fixture(scope="module")
def clip() -> Iterator[FrozenClip]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_clip(MODEL)
    torch.set_num_threads(threads)


class Counting:
    """A tower that remembers what it was given."""

    def __init__(self, clip: FrozenClip) -> None:
        self._clip = clip
        self.batches: list[int] = []
        self.augmented: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._clip, name)

    def augment(self, image: Image.Image, content_digest: str, view: int) -> torch.Tensor:
        self.augmented.append(view)
        return self._clip.augment(image, content_digest, view)

    def encode_images(self, images: torch.Tensor, patches: bool) -> ImageFeatures:
        self.batches.append(len(images))
        return self._clip.encode_images(images, patches)


def draw(path: Path, number: int, colour: tuple[int, int, int] = (40, 60, 230)) -> None:
    noise = np.random.default_rng(number).normal(0, 20, (40, 36, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty training images and two test images of two classes."""
    for number in range(20):
        draw(tmp_path / "images/train/blue" / f"{number:02}.png", number)
        draw(tmp_path / "images/train/red" / f"{number:02}.png", number, (230, 40, 40))
    draw(tmp_path / "images/test/blue/0.png", 100)
    draw(tmp_path / "images/test/red/0.png", 101)
    return tmp_path / "images"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "features"


def cache_of(
    tower: Counting, root: Path, place: Path | None, share: float = 0.0, element_type: ElementType = "float32"
) -> FeatureCache:
    """As a new process has it."""
    store = None if place is None else FeatureStore(place, BOUND)
    found = index(DataSource("image_folder", root))
    return FeatureCache(tower, {OWN: found}, {OWN: share}, store, element_type)  # type: ignore[arg-type]


def pixels_seen(
    cache: FeatureCache, split: Split = Split.TRAIN, patches: bool = False, views: int = 0
) -> ImageFeatures:
    """All features of the first view."""
    return cache.examples(OWN, split, patches, CLASSES, quiet, views).batch(slice(None)).images


def quiet(done: int, total: int) -> None:
    pass


def same(one: ImageFeatures, other: ImageFeatures) -> bool:
    if one.patches is None or other.patches is None:
        return one.patches is other.patches and torch.equal(one.pooled, other.pooled)
    return torch.equal(one.pooled, other.pooled) and torch.equal(one.patches, other.patches)


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("element_type", ["float32", "float16"])
def test_kept_features_have_the_bits_of_computed_ones(
    clip: FrozenClip, root: Path, place: Path, patches: bool, element_type: ElementType
) -> None:
    without = pixels_seen(cache_of(Counting(clip), root, None, element_type=element_type), patches=patches)
    first, later = Counting(clip), Counting(clip)
    computed = pixels_seen(cache_of(first, root, place, element_type=element_type), patches=patches)
    kept = pixels_seen(cache_of(later, root, place, element_type=element_type), patches=patches)
    assert same(without, computed)
    assert same(computed, kept)
    assert kept.pooled.dtype == torch.float32
    assert (first.batches, later.batches) == ([BATCH, BATCH], [])
    if patches:
        assert kept.patches is not None
        assert kept.patches.is_contiguous()


def test_what_else_the_store_holds_makes_no_difference(clip: FrozenClip, root: Path, place: Path) -> None:
    expected = pixels_seen(cache_of(Counting(clip), root, None))
    pixels_seen(cache_of(Counting(clip), root, place), Split.TEST, True)
    pixels_seen(cache_of(Counting(clip), root, place), Split.TRAIN, True, 2)
    part = root.with_name("part")
    shutil.copytree(root / "train" / "blue", part / "train" / "red")  # under another name and label
    shutil.copytree(root / "test", part / "test")
    tower = Counting(clip)
    assert len(cache_of(tower, part, place).examples(OWN, Split.TRAIN, False, CLASSES, quiet)) == 20
    assert same(pixels_seen(cache_of(tower, root, place)), expected)
    assert tower.batches == [BATCH, BATCH]  # twenty, and the twenty that were not yet there


def test_views_are_encoded_once_and_are_those_of_the_clip(clip: FrozenClip, root: Path, place: Path) -> None:
    tower = Counting(clip)
    cache_of(tower, root, place).build(Features(Split.TRAIN, True, 1), quiet)
    assert tower.augmented == [1] * 40
    examples = cache_of(tower, root, place).examples(OWN, Split.TRAIN, True, CLASSES, quiet, views=3)
    assert sorted(tower.augmented) == [1] * 40 + [2] * 40 + [3] * 40
    assert (examples.view_count, len(examples), examples.rows.shape) == (3, 40, (3, 40))
    path = sorted((root / "train" / "blue").iterdir())[5]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pixels = torch.stack([clip.augment(Image.open(path).convert("RGB"), digest, view) for view in (1, 2, 3)])
    filled = torch.cat([pixels, pixels[:1].expand(BATCH - 3, -1, -1, -1)])
    expected = clip.encode_images(filled, patches=True)
    for view in range(3):
        found = examples.batch(torch.tensor([5]), view).images
        assert torch.equal(found.pooled[0], expected.pooled[view])
        assert found.patches is not None
        assert expected.patches is not None
        assert torch.equal(found.patches[0], expected.patches[view])


def test_many_views_are_made_in_parts(clip: FrozenClip, root: Path, place: Path) -> None:
    seen: list[tuple[int, int]] = []
    tower = Counting(clip)
    built = cache_of(tower, root, place).build(Features(Split.TEST, False, 70), lambda *counts: seen.append(counts))
    assert (built.image_count, built.encoded_count) == (2, 2)
    assert sorted(tower.augmented) == sorted([*range(1, 71)] * 2)
    assert [counts for counts in seen if counts[0]][-1] == (2, 2)
    examples = cache_of(tower, root, None).examples(OWN, Split.TEST, False, CLASSES, quiet, views=70)
    kept = cache_of(tower, root, place).examples(OWN, Split.TEST, False, CLASSES, quiet, views=70)
    assert all(same(examples.batch(slice(2), view).images, kept.batch(slice(2), view).images) for view in range(70))


def test_an_image_that_was_replaced_is_encoded_anew(clip: FrozenClip, root: Path, place: Path) -> None:
    before = pixels_seen(cache_of(Counting(clip), root, place))
    draw(root / "train/blue/03.png", 77, (0, 255, 0))
    tower = Counting(clip)
    after = pixels_seen(cache_of(tower, root, place))
    assert tower.batches == [BATCH]
    changed = (before.pooled != after.pooled).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3]
    assert same(after, pixels_seen(cache_of(Counting(clip), root, None)))


def test_copies_of_an_image_are_encoded_once(clip: FrozenClip, root: Path) -> None:
    for number in range(1, 20):
        shutil.copy(root / "train/blue/00.png", root / f"train/blue/{number:02}.png")
        shutil.copy(root / "train/blue/00.png", root / f"train/red/{number:02}.png")
    built = cache_of(Counting(clip), root, None).build(Features(Split.TRAIN, False), quiet)
    assert (built.image_count, built.encoded_count) == (40, 2)


def test_a_damaged_store_costs_work_and_nothing_else(clip: FrozenClip, root: Path, place: Path) -> None:
    expected = pixels_seen(cache_of(Counting(clip), root, place))
    (path,) = place.glob("*/*.rows")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    tower = Counting(clip)
    assert same(pixels_seen(cache_of(tower, root, place)), expected)
    assert tower.batches == [BATCH]
    assert same(pixels_seen(cache_of(tower, root, place)), expected)
    assert tower.batches == [BATCH]
    shutil.rmtree(place)
    assert same(pixels_seen(cache_of(tower, root, place)), expected)


def test_an_unusable_directory_costs_durability_and_nothing_else(
    clip: FrozenClip, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = cache_of(Counting(clip), root, tmp_path / "file" / "features")
    assert same(pixels_seen(cache), pixels_seen(cache_of(Counting(clip), root, None)))
    assert caplog.text.count("features stay in memory") == 1
    assert cache.build(Features(Split.TRAIN, False), quiet).in_memory_count == 40
    (tmp_path / "file").unlink()
    pixels_seen(cache, Split.TEST)  # the disk is back: what it had refused is kept with the rest
    tower = Counting(clip)
    pixels_seen(cache_of(tower, root, tmp_path / "file" / "features"))
    assert tower.batches == []


class LyingStore(FeatureStore):
    """Keeps nothing of what it is given."""

    def shelf(self, kind: object) -> object:  # type: ignore[override]
        class Nothing:
            def find(self, wanted: object, on_segment: object) -> dict[bytes, Row]:
                return {}

            def save(self, rows: dict[bytes, Row]) -> None:
                rows.clear()

        return Nothing()


def test_a_disk_that_keeps_nothing_is_replaced_by_memory(clip: FrozenClip, root: Path, place: Path) -> None:
    tower = Counting(clip)
    records = index(DataSource("image_folder", root)).of_split(Split.TRAIN)
    extraction = Extraction(tower, False, LyingStore(place, BOUND), "float32")  # type: ignore[arg-type]
    assert len(extraction.rows(records, 0, quiet).rows) == 40
    assert tower.batches == [BATCH] * 4


def test_a_file_that_changes_meanwhile_has_the_features_of_what_was_decoded(clip: FrozenClip, root: Path) -> None:
    class Restless(Counting):
        def preprocess(self, image: Image.Image) -> torch.Tensor:
            self.batches.append(0)
            draw(root / "train/blue/00.png", 1000 + len(self.batches))
            return self._clip.preprocess(image)

    tower = Restless(clip)
    records = index(DataSource("image_folder", root)).of_split(Split.TRAIN)[:1]
    extracted = Extraction(tower, False, None, "float32").rows(records, 0, quiet)  # type: ignore[arg-type]
    assert len(extracted.rows) == 1
    with_store_of_none = Extraction(clip, False, None, "float32").rows(records, 0, quiet)
    assert not np.array_equal(extracted.rows[records[0].path], with_store_of_none.rows[records[0].path])


def test_rows_that_never_come_are_given_up(clip: FrozenClip, root: Path) -> None:
    class Forgetful(Extraction):
        def _find(self, *_arguments: object) -> dict[bytes, Row]:
            return {}

    with pytest.raises(WorkError, match="images of this silo change while they are read") as caught:
        Forgetful(clip, False, None, "float32").rows(index(DataSource("image_folder", root)).records[:1], 0, quiet)
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE


def test_what_cannot_be_read_is_told_once_and_counted(
    clip: FrozenClip, root: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("blue/00.png", "blue/01.png"):
        (root / "train" / name).write_bytes((root / "train/blue/02.png").read_bytes()[:200])
    cache = cache_of(Counting(clip), root, place)
    with pytest.raises(WorkError, match=r"2 of 40 train images are unreadable; this silo skips up to 0\.00%") as caught:
        cache.build(Features(Split.TRAIN, False), quiet)
    assert caught.value.reason is FailureReason.DATA_UNAVAILABLE
    lenient = cache_of(Counting(clip), root, place, share=0.1)
    assert len(lenient.examples(OWN, Split.TRAIN, False, CLASSES, quiet)) == 38
    assert lenient.unreadable_count == 2
    assert "unreadable image 'train/blue/00.png'" in caplog.text


def test_an_unreadable_image_is_none_in_any_part_of_its_views(clip: FrozenClip, root: Path) -> None:
    """And it does not count as encoded."""
    (root / "train/blue/00.png").write_bytes((root / "train/blue/02.png").read_bytes()[:200])
    found = index(DataSource("image_folder", root)).of_split(Split.TRAIN)
    extracted = Extraction(clip, False, None, "float32").rows(found[:2], 2 * VIEWS_AT_ONCE + 1, quiet)
    assert list(extracted.rows) == [found[1].path]
    assert list(extracted.problems) == [found[0].path]
    assert extracted.encoded_count == 1


def test_a_file_that_vanishes_leaves_its_copies_readable(clip: FrozenClip, root: Path) -> None:
    found = index(DataSource("image_folder", root)).of_split(Split.TRAIN)
    shutil.copy(found[0].path, found[1].path)

    class Vanishing(Extraction):
        def _find(self, *arguments: object) -> object:  # type: ignore[override]
            found[0].path.unlink(missing_ok=True)  # after its digest was taken
            return super()._find(*arguments)  # type: ignore[arg-type]

    extracted = Vanishing(clip, False, None, "float32").rows(found[:3], 0, quiet)
    assert set(extracted.rows) == {found[1].path, found[2].path}
    assert extracted.problems == {found[0].path: "No such file or directory"}


def test_half_precision_is_reported_and_bounded(
    clip: FrozenClip, root: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exact = pixels_seen(cache_of(Counting(clip), root, None), patches=True)
    with caplog.at_level("INFO"):
        rounded = pixels_seen(cache_of(Counting(clip), root, place, element_type="float16"), patches=True)
    assert exact.patches is not None
    assert rounded.patches is not None
    worst = max(
        float((exact.pooled - rounded.pooled).norm(dim=-1).max()),
        float((exact.patches - rounded.patches).norm(dim=-1).max()),
    )
    assert 0 < worst < 2**-11  # half a unit in the last place of each element of a unit vector
    (message,) = [record for record in caplog.records if "float16 changes" in record.getMessage()]
    told, of_logit = message.args  # type: ignore[misc]
    assert told == pytest.approx(worst, rel=1e-6)
    assert of_logit == pytest.approx(worst * float(clip.model.logit_scale.exp()), rel=1e-5)


def test_a_build_says_what_it_did_and_goes_on_after_an_interruption(clip: FrozenClip, root: Path, place: Path) -> None:
    seen: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done == BATCH:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_of(Counting(clip), root, place).build(Features(Split.TRAIN, False), interrupt)
    assert seen[-1] == (BATCH, 40)
    tower = Counting(clip)
    built = cache_of(tower, root, place).build(
        Features(Split.TRAIN, False), lambda done, total: seen.append((done, total))
    )
    assert (built.image_count, built.encoded_count, built.in_memory_count) == (40, 40 - BATCH, 0)
    assert str(Line(Features(Split.TRAIN, True, 3), built)) == (
        "train in 3 augmented views with patches: 40 images, 8 of them encoded now"
    )
    again = cache_of(tower, root, place).build(Features(Split.TRAIN, False), quiet)
    assert (again.image_count, again.encoded_count) == (40, 0)


def test_a_newer_store_stops_the_worker_at_its_start(root: Path, place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / "version").write_text("fedrt features 2\n")
    load = Load(MODEL, {OWN: DataSource("image_folder", root)}, 1, FeatureSource(place, BOUND))
    with pytest.raises(ConfigurationError, match="newer fedrt"):
        load_features(load)


def test_images_are_decoded_in_order_however_many_views_are_wanted(clip: FrozenClip, root: Path) -> None:
    records = index(DataSource("image_folder", root)).of_split(Split.TRAIN)
    wanted = [Wanted(record, tuple(range(1, 1 + 7 * (number % 9)))) for number, record in enumerate(records)]
    decoded = list(decode_all(wanted, clip))
    assert [one.wanted for one in decoded] == wanted
    assert [len(one.pixels) for one in decoded] == [len(one.views) for one in wanted]


def stored(count: int, tokens: int, element_type: str) -> list[Row]:
    numbers = np.random.default_rng(0).standard_normal((count, tokens, 6))
    return list(numbers.astype(element_type))


@pytest.mark.parametrize("element_type", ["float32", "float16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_table_gives_the_rows_that_are_asked_for(tokens: int, element_type: str) -> None:
    rows, cpu = stored(300, tokens, element_type), torch.device("cpu")
    chosen = torch.tensor([299, 0, 7, 7])
    for table in (table_of(rows, cpu), HostTable(rows, cpu), _resident(rows, cpu)):
        taken = table.take(chosen)
        whole = torch.from_numpy(np.stack([rows[number] for number in chosen])).float()
        assert table.has_patches == (tokens > 1)
        assert torch.equal(taken.pooled, whole[:, 0])
        assert taken.pooled.dtype == torch.float32
        if taken.patches is not None:
            assert torch.equal(taken.patches, whole[:, 1:])
        assert (taken.patches is None) == (tokens == 1)


def test_patches_stay_on_disk_and_pooled_features_are_read() -> None:
    cpu = torch.device("cpu")
    assert isinstance(table_of(stored(3, 5, "float32"), cpu), HostTable)
    assert isinstance(table_of(stored(3, 1, "float16"), cpu), ImageFeatures)
    assert isinstance(_resident(stored(3, 5, "float16"), cpu), ResidentTable)
    host = table_of(stored(3, 5, "float32"), cpu)
    assert rows_device(host, torch.device("cuda")) == cpu
    assert rows_device(table_of(stored(3, 1, "float32"), cpu), torch.device("cuda")) == torch.device("cuda")


def test_pooled_features_without_room_on_a_gpu_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many views of many images, say: the task would end for want of memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 1 << 30))
    rows = [np.zeros((1, 25), np.float32) for _ in range(11)]
    assert not _fits(rows, torch.device("cuda"))
    assert _fits(rows[:10], torch.device("cuda"))
    assert isinstance(table_of(rows, torch.device("cuda")), HostTable)


def test_an_empty_choice_of_rows_is_an_empty_batch() -> None:
    taken = table_of(stored(3, 5, "float32"), torch.device("cpu")).take(torch.tensor([], dtype=torch.long))
    assert taken.pooled.shape == (0, 6)
    assert taken.patches is not None
    assert taken.patches.shape == (0, 4, 6)
