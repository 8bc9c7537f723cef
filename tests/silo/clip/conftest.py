"""A small CLIP of open_clip's make, registered as architectures of its own, so that the real loader can load it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from silo.clip import FrozenClip, load_clip
from silo.sources import ModelSource

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "test-mini-vit": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT},
    "test-mini-resnet": {"embed_dim": 32, "vision_cfg": RESNET, "text_cfg": TEXT},
}
REFUSED = {"test-mini-other-text": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT | {"qk_norm": True}}}

Originals = Callable[[str, bool], CLIP]


def scramble(model: CLIP) -> CLIP:
    """Random values everywhere, batch norm included, in evaluation mode; the generator is its own."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.5 + (0.5 if "var" in name else 0.0))
    for name, parameter in model.named_parameters():
        if name.endswith(("bn3.weight", "ln_1.bias", "ln_2.bias", "in_proj_bias", "ln_post.bias")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: waiting for a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _mini_architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, config in {**CONFIGS, **REFUSED}.items():
        path = tmp_path_factory.mktemp("architectures") / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)


@pytest.fixture(scope="session")
def original(_mini_architectures: None) -> Originals:
    """Builds a model with random weights: (architecture, quick_gelu)."""
    made: dict[tuple[str, bool], CLIP] = {}

    def build(architecture: str, quick_gelu: bool = False) -> CLIP:
        if (architecture, quick_gelu) not in made:
            with torch.random.fork_rng():
                torch.manual_seed(7)
                config = open_clip.get_model_config(architecture) | {"quick_gelu": quick_gelu}
                made[architecture, quick_gelu] = scramble(CLIP(**config))
        return made[architecture, quick_gelu]

    return build


@pytest.fixture(scope="session", params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def mini(original: Originals, architecture: str, tmp_path_factory: pytest.TempPathFactory) -> FrozenClip:
    """The small CLIP, loaded through the real loader."""
    path = tmp_path_factory.mktemp("weights") / "mini.safetensors"
    save_file(original(architecture, False).state_dict(), path)
    return load_clip(ModelSource(architecture, str(path)))


@pytest.fixture(scope="session")
def mini_vit_file(original: Originals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(original("test-mini-vit", False).state_dict(), path)
    return path
