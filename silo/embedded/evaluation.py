"""Zero-shot accuracy of the embedded CLIP, with the class token or with the mean of the patches."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor

from silo.embedded.captions import HANDCRAFTED_PROMPT
from silo.embedded.scanners import scan
from silo.embedded.tokens import CompactVocabulary, compact_vocabulary
from silo.embedded.towers import encode_image, encode_text, normalised
from silo.embedded.world import ALL_PAIRS, Pair, draw_scenes, scenes_of

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Accuracies:
    """Shares of images [0, 1] whose nearest class is the right one."""

    class_token: float
    mean_patch: float
    image_count: int


def read_package(folder: Path) -> tuple[Any, CompactVocabulary]:
    """Load the three files that pre-training writes: the frozen model, giving patch tokens too, and its vocabulary.

    Raises:
        ValueError: the vocabulary in the folder is not the one that today's captions produce.
    """
    config = json.loads((folder / "config.json").read_text())
    vocabulary = compact_vocabulary()
    if json.loads((folder / "vocabulary.json").read_text()) != list(vocabulary.kept):
        raise ValueError(f'"{folder / "vocabulary.json"}" does not fit the captions; run silo.embedded.pretrain again')
    model = CLIP(**{key: value for key, value in config.items() if key != "fedrt"})
    weights = {name: tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()}
    model.load_state_dict(weights)
    model.visual.output_tokens = True
    model.requires_grad_(requires_grad=False)
    return model.eval(), vocabulary


def sample_images(
    pairs: Sequence[Pair], scanner: str, per_class: int, rng: np.random.Generator
) -> tuple[FloatArray, IntArray]:
    """Draw images [B, 32, 32, 3] of every pair through the scanner, with labels [B] into `ALL_PAIRS`."""
    labels = np.repeat([ALL_PAIRS.index(pair) for pair in pairs], per_class)
    chosen = np.array(ALL_PAIRS, dtype=np.int64)[labels]
    return scan(draw_scenes(scenes_of(chosen, rng)), scanner, rng), labels.astype(np.int64)


def class_features(model: Any, vocabulary: CompactVocabulary, class_names: Sequence[str]) -> Tensor:
    """Unit-norm text features [C, 96] of the handcrafted prompt for every class."""
    texts = [HANDCRAFTED_PROMPT.replace("{class}", name) for name in class_names]
    with torch.inference_mode():
        return encode_text(model, torch.from_numpy(vocabulary.encode(texts)))


def image_features(model: Any, images: FloatArray, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """Unit-norm class-token and mean-patch features, both [B, 96]."""
    with torch.inference_mode():
        parts = [encode_image(model, normalised(images[i : i + chunk])) for i in range(0, len(images), chunk)]
    return torch.cat([pooled for pooled, _ in parts]), torch.cat([patches for _, patches in parts])


def zero_shot(model: Any, text: Tensor, images: FloatArray, labels: IntArray) -> Accuracies:
    """Accuracies over images [B, 32, 32, 3] with labels [B] into the rows of `text` [C, 96]."""
    target = torch.from_numpy(labels)
    pooled, patches = image_features(model, images)
    return Accuracies(
        class_token=_share_right(pooled, text, target),
        mean_patch=_share_right(patches, text, target),
        image_count=len(labels),
    )


def _share_right(image: Tensor, text: Tensor, target: Tensor) -> float:
    return float(((image @ text.T).argmax(dim=1) == target).float().mean())
