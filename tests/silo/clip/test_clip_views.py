"""Augmented views: torchvision's crops and flips, but drawn from the file's digest: the same bits everywhere."""

import hashlib
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

import silo.clip.views as views
from silo.clip import FrozenClip
from silo.clip.views import AREA, RATIO, Crop, Draws, Preprocessing, draw_crop
from silo.embedded import embedded_paths

DIGESTS = [hashlib.sha256(bytes([number])).hexdigest() for number in range(4)]
DRAWS = 4000  # crops of each kind that are compared


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise: no two crops of it look alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def preprocessing(size: int | tuple[int, int] = 32, **fields: object) -> Preprocessing:
    return Preprocessing(PreprocessCfg(size=size, **fields))  # type: ignore[arg-type]


# --- the same everywhere -------------------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_bits_in_any_thread_and_order() -> None:
    prepare, image = preprocessing(), picture(48, 40)
    wanted = [(digest, view) for digest in DIGESTS for view in range(1, 6)]
    first = {key: prepare.augment(image, *key) for key in wanted}
    together = threading.Barrier(4)

    def all_of(order: list[int]) -> dict[tuple[str, int], Tensor]:
        together.wait(60)
        return {wanted[at]: preprocessing().augment(image, *wanted[at]) for at in order}

    with ThreadPoolExecutor(4) as pool:
        orders = [list(np.random.default_rng(seed).permutation(len(wanted))) for seed in range(4)]
        for found in pool.map(all_of, orders):
            assert all(torch.equal(found[key], first[key]) for key in wanted)
    pixels = {tensor.numpy().tobytes() for tensor in first.values()}
    assert len(pixels) == len(wanted)  # every view and every file its own


def test_no_global_generator_is_used_or_moved() -> None:
    prepare, image = preprocessing(), picture(40, 40)
    torch.manual_seed(1)
    np.random.seed(1)
    before, state = prepare.augment(image, DIGESTS[0], 1), torch.get_rng_state()
    drawn = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(prepare.augment(image, DIGESTS[0], 1), before)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    np.random.seed(1)
    assert np.random.get_state()[1].tolist() == drawn  # type: ignore[index,union-attr]


def test_the_numbers_are_those_of_philox_under_the_digest() -> None:
    seed = hashlib.sha256(f"fedrt view 3 of {DIGESTS[1]}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(seed[:16], "big")).random_raw(3).tolist()
    draws = Draws(DIGESTS[1], 3)
    assert draws.uniform(0.0, 1.0) == (bits[0] >> 11) / 2**53
    assert draws.uniform(-2.0, 2.0) == -2 + 4 * (bits[1] >> 11) / 2**53
    assert draws.below(10) == 10 * (bits[2] >> 11) // 2**53


def test_what_is_drawn_never_changes() -> None:
    """Features on disk go by it: a change here needs a new `VERSION`."""
    assert views.VERSION == 1
    assert [draw_crop(640, 480, Draws("ab" * 32, view)) for view in (1, 2)] == [
        Crop(top=42, left=324, height=296, width=224, flipped=True),
        Crop(top=106, left=41, height=336, width=258, flipped=False),
    ]


@pytest.mark.parametrize("view", [0, -1])
def test_views_are_counted_from_one(view: int) -> None:
    with pytest.raises(ValueError, match=f"there is no view {view}; augmented views are counted from 1"):
        preprocessing().augment(picture(8, 8), DIGESTS[0], view)


# --- torchvision's augmentation -------------------------------------------------------------------------------------


@pytest.fixture
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield


def measured(crops: list[tuple[int, int, int, int]], width: int, height: int) -> dict[str, np.ndarray]:
    top, left, down, across = np.array(crops, dtype=float).T
    return {
        "area": down * across / (width * height),
        "log ratio": np.log(across / down),
        "top": np.where(down < height, top / np.maximum(height - down, 1), 0.5),
        "left": np.where(across < width, left / np.maximum(width - across, 1), 0.5),
    }


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of two samples' distribution functions (Kolmogorov and Smirnov)."""
    everything = np.sort(np.concatenate([ours, theirs]))
    shares = [np.searchsorted(np.sort(one), everything, side="right") / len(one) for one in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.usefixtures("_seeded")
@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (200, 900), (400, 60)])
def test_crops_are_distributed_as_torchvision_draws_them(width: int, height: int) -> None:
    drawn = [draw_crop(width, height, Draws(DIGESTS[0], view)) for view in range(1, DRAWS + 1)]
    ours = measured([(crop.top, crop.left, crop.height, crop.width) for crop in drawn], width, height)
    blank = Image.new("RGB", (width, height))
    given = [RandomResizedCrop.get_params(blank, list(AREA), list(RATIO)) for _ in range(DRAWS)]
    theirs = measured(given, width, height)
    # for two samples of 4,000 of one distribution, 0.044 is exceeded with a probability of 0.001
    assert {name: distance(ours[name], theirs[name]) for name in ours} == {
        name: pytest.approx(0.0, abs=0.044) for name in ours
    }
    assert ours["area"].min() >= AREA[0] * 0.8
    assert all(0 <= crop.top <= height - crop.height and 0 <= crop.left <= width - crop.width for crop in drawn)
    flips = sum(crop.flipped for crop in drawn)
    assert abs(flips - DRAWS / 2) < 4 * math.sqrt(DRAWS / 4)


def test_the_numbers_of_one_view_do_not_follow_from_those_of_another() -> None:
    areas = [draw_crop(500, 500, Draws(DIGESTS[0], view)) for view in range(1, 2001)]
    sizes = np.array([crop.height * crop.width for crop in areas], dtype=float)
    others = np.array(
        [crop.height * crop.width for crop in (draw_crop(500, 500, Draws(DIGESTS[1], v)) for v in range(1, 2001))]
    )
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0, 1]) < 0.1
    assert abs(np.corrcoef(sizes, others)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 40), (19, 0, 1, 1)),  # 1 / (3/4) rounds to 1
        ((40, 1), (0, 19, 1, 1)),
        ((3, 150), (73, 0, 4, 3)),
        ((150, 3), (0, 73, 3, 4)),
    ],
)
def test_a_narrow_image_gives_its_middle(size: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    class Largest(Draws):
        """Asks for all of the area each time, which no allowed ratio of so narrow an image has."""

        def uniform(self, least: float, most: float) -> float:
            return most if (least, most) == AREA else super().uniform(least, most)

    crop = draw_crop(*size, Largest(DIGESTS[0], 1))
    assert (crop.top, crop.left, crop.height, crop.width) == expected
    pixels = preprocessing().augment(picture(*size), DIGESTS[0], 1)
    assert pixels.shape == (3, 32, 32)
    assert bool(torch.isfinite(pixels).all())


def test_an_image_of_one_pixel_is_that_pixel() -> None:
    pixels = preprocessing().augment(Image.new("RGB", (1, 1), (10, 20, 30)), DIGESTS[0], 1)
    assert torch.equal(pixels, preprocessing()(Image.new("RGB", (32, 32), (10, 20, 30))))


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 224, (32, 48)])
def test_a_view_is_torchvisions_crop_resized_mirrored_and_normalised(size: int | tuple[int, int]) -> None:
    prepare, image = preprocessing(size), picture(90, 70)
    flips = set()
    for view in range(1, 7):
        crop = draw_crop(90, 70, Draws(DIGESTS[2], view))
        box = (crop.top, crop.left, crop.height, crop.width)
        expected = tv.resized_crop(
            image, *box, [size, size] if isinstance(size, int) else list(size), InterpolationMode.BICUBIC
        )
        expected = tv.hflip(expected) if crop.flipped else expected
        normalised = tv.normalize(tv.to_tensor(expected), prepare.config.mean, prepare.config.std)
        assert torch.equal(prepare.augment(image, DIGESTS[2], view), normalised)
        flips.add(crop.flipped)
    assert flips == {False, True}


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_the_way_to_resize_a_plain_image_does_not_reach_a_view(mode: str) -> None:
    image = picture(90, 70)
    found = preprocessing(resize_mode=mode).augment(image, DIGESTS[0], 1)
    assert torch.equal(found, preprocessing().augment(image, DIGESTS[0], 1))


def test_mean_and_deviation_are_the_models() -> None:
    image = picture(90, 70)
    plain = preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)).augment(image, DIGESTS[0], 1)
    assert 0 <= float(plain.min()) < float(plain.max()) <= 1
    halved = preprocessing(mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5)).augment(image, DIGESTS[0], 1)
    assert torch.equal(halved, plain / 0.5)


def test_the_image_itself_is_not_changed() -> None:
    image = picture(90, 70)
    before = image.tobytes()
    preprocessing().augment(image, DIGESTS[0], 1)
    assert image.tobytes() == before


# --- the digest ----------------------------------------------------------------------------------------------------


def test_the_digest_covers_what_pixels_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = preprocessing()
    changes = [
        preprocessing(33),
        preprocessing(mean=(0.5, 0.5, 0.5)),
        preprocessing(std=(0.5, 0.5, 0.5)),
        preprocessing(interpolation="bilinear"),
        preprocessing(resize_mode="squash"),
        preprocessing(fill_color=255),
    ]
    digests = [one.digest for one in (first, *changes)]
    for name, value in (("VERSION", 2), ("AREA", (0.5, 1.0)), ("RATIO", (1.0, 1.0)), ("TRIES", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(views, name, value)
            digests.append(first.digest)
    monkeypatch.setattr("PIL.__version__", "999.1.0")
    digests.append(first.digest)
    assert len(set(digests)) == len(digests)
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)


def test_the_digest_covers_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    first = preprocessing().digest
    assert preprocessing((32, 32)).digest == first  # the same size in other words
    assert Preprocessing(replace(PreprocessCfg(), size=32)).digest == first
    major = views.PIL.__version__.partition(".")[0]
    monkeypatch.setattr("PIL.__version__", f"{major}.99.99")
    assert preprocessing().digest == first


def test_a_loaded_clip_has_both(mini: FrozenClip) -> None:
    image = picture(90, 70)
    pixels = mini.augment(image, DIGESTS[0], 1)
    assert pixels.shape == mini.preprocess(image).shape
    assert torch.equal(pixels, mini.preprocess.augment(image, DIGESTS[0], 1))
    assert mini.preprocessing_digest == mini.preprocess.digest
    features = mini.encode_images(pixels[None], patches=False).pooled
    assert float(features.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.skipif(not embedded_paths().weights_path.is_file(), reason="the embedded CLIP has not been trained")
def test_the_embedded_clip_augments_in_its_own_size() -> None:
    from silo.clip import load_clip
    from silo.sources import ModelSource

    clip = load_clip(ModelSource("fedrt-tiny", "embedded"))
    assert clip.augment(picture(40, 36), DIGESTS[0], 1).shape == (3, 32, 32)
