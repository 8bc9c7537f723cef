"""`fedrt-tiny`: loaded from package data alone, with a compact vocabulary and its own normalisation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from fedrt.errors import ConfigurationError, WorkError
from fedrt.methods.zeroshot import ZeroShot
from silo.clip import architecture, load_clip, weights
from silo.clip.tokens import Vocabulary
from silo.embedded import EmbeddedPaths, embedded_paths
from silo.evaluation import evaluate
from silo.examples import Examples
from silo.methods import zeroshot
from silo.sources import ModelSource

TINY = ModelSource("fedrt-tiny", "embedded")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedPaths:
    """A package of the embedded kind with random weights in half precision."""
    full = Vocabulary()
    kept = sorted({0, full.start, full.end, *full.encode("a photo of a red blue circle square.")})
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 20, "vocab_size": len(kept), "width": 24, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng():
        state = CLIP(**config).state_dict()
    paths = EmbeddedPaths(tmp_path / "config.json", tmp_path / "vocabulary.json", tmp_path / "weights.safetensors")
    paths.config_path.write_text(json.dumps(config | {"fedrt": {"mean": MEAN, "std": STD, "training": {}}}))
    paths.vocabulary_path.write_text(json.dumps(kept))
    save_file({key: value.half() for key, value in state.items()}, paths.weights_path)
    monkeypatch.setattr(architecture, "embedded_paths", lambda: paths)
    monkeypatch.setattr(weights, "embedded_paths", lambda: paths)
    return paths


def test_package_is_loaded(package: EmbeddedPaths) -> None:
    clip = load_clip(TINY)
    assert (clip.architecture, clip.context_dim, clip.feature_dim) == ("fedrt-tiny", 24, 16)
    assert clip.weights_sha256 == weights.weights_sha256(TINY)
    patches = clip.encode_images(torch.zeros(2, 3, 32, 32), patches=True).patches
    assert patches is not None
    assert patches.shape == (2, 64, 16)
    assert clip.text_tower(["red circle", "blue square"]).handcrafted().shape == (2, 16)
    assert all(p.dtype == torch.float32 for p in clip.model.parameters())


def test_its_own_mean_and_deviation(package: EmbeddedPaths) -> None:
    prepared = load_clip(TINY).preprocess(Image.new("RGB", (32, 32), (255, 255, 255)))
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(prepared.mean(dim=(1, 2)), expected)


def test_words_that_it_does_not_know(package: EmbeddedPaths) -> None:
    clip = load_clip(TINY)
    with pytest.raises(WorkError, match="does not hold 'melanoma', 'nevus'; use other words"):
        clip.text_tower(["red circle", "melanoma", "red nevus"])
    with pytest.raises(WorkError, match="'lesion'"):
        clip.embed_phrase("a lesion", 2)
    with pytest.raises(WorkError, match="does not hold the placeholder 'X'"):
        clip.text_tower(["red circle"]).placeholder(2)


def test_weights_of_ones_own_for_the_embedded_architecture(package: EmbeddedPaths, tmp_path: Path) -> None:
    other = tmp_path / "mine.safetensors"
    other.write_bytes(package.weights_path.read_bytes())
    assert load_clip(ModelSource("fedrt-tiny", str(other))).weights_sha256 == weights.weights_sha256(TINY)


@pytest.mark.parametrize("missing", ["config_path", "vocabulary_path", "weights_path"])
def test_package_data_missing(package: EmbeddedPaths, missing: str) -> None:
    path: Path = getattr(package, missing)
    path.unlink()
    with pytest.raises(ConfigurationError, match=rf"the embedded CLIP lacks '.*{path.name}'; install fedrt again"):
        load_clip(TINY)


@pytest.mark.skipif(not embedded_paths().weights_path.is_file(), reason="the embedded CLIP has not been trained here")
def test_the_real_one_recognises_its_world() -> None:
    from silo.embedded.world import SEEN_PAIRS, draw_scenes, scenes_of

    clip = load_clip(TINY)
    pairs, per_class = SEEN_PAIRS[::8], 6
    labels = np.repeat(np.arange(len(pairs)), per_class)
    drawn = draw_scenes(scenes_of(np.array(pairs)[labels], np.random.default_rng(0)))
    pictures = [Image.fromarray((image * 255).round().astype(np.uint8)) for image in drawn]
    images = clip.encode_images(torch.stack([clip.preprocess(picture) for picture in pictures]), patches=False)
    method = zeroshot.build(ZeroShot(), clip.text_tower([pair.class_name for pair in pairs]))
    examples = Examples(images, torch.arange(len(labels)), torch.from_numpy(labels))
    accuracy = evaluate(method.classify({}), examples)["accuracy"]
    assert accuracy > 4 / len(pairs)
