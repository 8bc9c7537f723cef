"""The recorded values, their tolerances, and the small CLIP that they were computed with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor

from fedrt.spec import OptimizerSpec
from silo.clip import FrozenClip
from silo.clip.tokens import Vocabulary
from silo.method import Batch

FOLDER = Path(__file__).parents[2].parent / "shared" / "reference" / "values"
SGD = OptimizerSpec(learning_rate=0.005, momentum=0.9, weight_decay=0.05)  # of every recorded case
BATCH = 4
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 23, "width": 128, "heads": 2, "layers": 2},
}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 64}


def values(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def settings(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return loaded


def close(actual: Tensor, expected: Tensor) -> None:
    """Features, logits, losses and gradients: 5e-5 · (1 + max|expected|), as METHODS.md section 7 says."""
    within(actual, expected, 5e-5 * (1 + float(expected.abs().max())))


def within(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Parameters and aggregates: 1e-5."""
    assert actual.shape == expected.shape
    worst = float((actual.detach() - expected).abs().max())
    assert worst <= tolerance, f"off by {worst:.2e}, allowed are {tolerance:.2e}"


@dataclass(frozen=True)
class Reference:
    """What the recorded cases share: one text tower with two image towers, class names, images and labels."""

    clip: FrozenClip
    resnet: FrozenClip
    class_names: tuple[str, ...]
    images: Tensor
    labels: Tensor

    def batch(self, number: int) -> Batch:
        """Batch `number` of the ViT's images, as features."""
        rows = slice(number * BATCH, (number + 1) * BATCH)
        return Batch(self.clip.encode_images(self.images[rows], patches=False), self.labels[rows])


def load_reference() -> Reference:
    kept = values("tokens")["vocab_ids"].tolist()
    state = values("clip_vit")
    vit = CLIP(**CONFIG)
    vit.load_state_dict(state, strict=True)
    resnet = CLIP(**CONFIG | {"vision_cfg": RESNET})
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    resnet.load_state_dict(text | values("clip_rn_visual"), strict=True)
    data = values("images")
    names = tuple(settings("tokens")["class_names"])
    return Reference(_frozen(vit, kept), _frozen(resnet, kept), names, data["images"], data["labels"])


def _frozen(model: CLIP, kept_ids: list[int]) -> FrozenClip:
    def unused(_: object) -> Tensor:
        raise AssertionError("the recorded images are prepared already")

    return FrozenClip("reference", "0" * 64, model.eval().requires_grad_(False), Vocabulary(kept_ids), unused)
