"""Accuracy of the embedded CLIP, zero-shot and with a tuned prompt: `python tests/bench/embedded_clip.py` prints JSON.

Zero-shot accuracy is over all 80 colour-shape classes (chance 0.0125) or the ten digits (chance 0.1). The tuned prompt
is CoOp's: 16 learned vectors in front of the class name, trained with both towers frozen on the demo's hospitals, each
alone and all together; it says how much prompt learning can gain where zero-shot stops.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from silo.embedded import embedded_paths
from silo.embedded.datasets import (
    Hospital,
    digit_class_names,
    handwritten_digits,
    scan_digits,
    world_class_names,
    write_digit_hospitals,
    write_world_hospitals,
)
from silo.embedded.evaluation import class_features, image_features, read_package, sample_images, zero_shot
from silo.embedded.scanners import SCANNERS, UNSEEN_SCANNERS
from silo.embedded.tokens import CompactVocabulary
from silo.embedded.world import ALL_PAIRS, HELD_OUT_PAIRS, SEEN_PAIRS

PROMPT_LENGTH = 16
Writer = Callable[[Path, int], tuple[Hospital, ...]]


@dataclass(frozen=True)
class Examples:
    images: np.ndarray  # [B, 32, 32, 3] in [0, 1]
    labels: np.ndarray  # [B]


def encode_prompts(model: Any, vocabulary: CompactVocabulary, context: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Unit-norm text features [C, 96] of start, context [16, 96], class name, full stop and end."""
    tokens = torch.from_numpy(vocabulary.encode([f"{name}." for name in class_names]))
    embedded = model.token_embedding(tokens)
    room = embedded.shape[1] - len(context)
    x = torch.cat([embedded[:, :1], context.expand(len(tokens), -1, -1), embedded[:, 1:room]], dim=1)
    x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
    end = tokens.argmax(dim=1) + len(context)
    return functional.normalize(x[torch.arange(len(x)), end] @ model.text_projection, dim=-1)


def tuned_text(
    model: Any,
    vocabulary: CompactVocabulary,
    class_names: tuple[str, ...],
    train: Examples,
    steps: int,
) -> Tensor:
    """Text features [C, 96] of a 16-vector context, trained by Adam on the training images with both towers frozen."""
    generator = torch.Generator().manual_seed(0)
    context = (0.02 * torch.randn(PROMPT_LENGTH, 96, generator=generator)).requires_grad_()
    optimiser = torch.optim.Adam([context], lr=0.01)
    features = image_features(model, train.images)[0].clone()
    target = torch.from_numpy(train.labels)
    for _ in range(steps):
        text = encode_prompts(model, vocabulary, context, class_names)
        loss = functional.cross_entropy(model.logit_scale.exp() * features @ text.T, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return encode_prompts(model, vocabulary, context, class_names)


def world_report(model: Any, vocabulary: CompactVocabulary, per_class: int) -> dict[str, Any]:
    text = class_features(model, vocabulary, [pair.class_name for pair in ALL_PAIRS])
    report = {}
    for index, scanner in enumerate((*SCANNERS, *UNSEEN_SCANNERS)):
        rng = np.random.default_rng([1_000_003, index])
        report[scanner] = {
            "seen": asdict(zero_shot(model, text, *sample_images(SEEN_PAIRS, scanner, per_class, rng))),
            "held_out": asdict(zero_shot(model, text, *sample_images(HELD_OUT_PAIRS, scanner, per_class, rng))),
        }
    return report


def digits_report(model: Any, vocabulary: CompactVocabulary) -> dict[str, Any]:
    text = class_features(model, vocabulary, digit_class_names())
    images, labels = handwritten_digits()
    rng = np.random.default_rng(1_000_003)
    scanners = ("inverted", *SCANNERS)
    return {name: asdict(zero_shot(model, text, scan_digits(images, name, rng), labels)) for name in scanners}


def read_split(folder: Path, class_names: tuple[str, ...]) -> Examples:
    """Every PNG file of one split of a hospital, labelled by its directory."""
    files = [(path, label) for label, name in enumerate(class_names) for path in sorted((folder / name).glob("*.png"))]
    images = np.stack([np.asarray(Image.open(path), dtype=np.float32) / np.float32(255) for path, _ in files])
    return Examples(images, np.array([label for _, label in files], dtype=np.int64))


def hospitals_report(
    model: Any, vocabulary: CompactVocabulary, write: Writer, class_names: tuple[str, ...], steps: int
) -> dict[str, Any]:
    """Test accuracy of every hospital: zero-shot, and with a prompt tuned on its own images or on all images."""
    with tempfile.TemporaryDirectory() as folder:
        hospitals = write(Path(folder), 0)
        train = [read_split(hospital.root / "train", class_names) for hospital in hospitals]
        test = [read_split(hospital.root / "test", class_names) for hospital in hospitals]
    together = Examples(np.concatenate([t.images for t in train]), np.concatenate([t.labels for t in train]))
    texts = {
        "zero_shot": [class_features(model, vocabulary, class_names)] * len(hospitals),
        "tuned_alone": [tuned_text(model, vocabulary, class_names, t, steps) for t in train],
        "tuned_together": [tuned_text(model, vocabulary, class_names, together, steps)] * len(hospitals),
    }
    return {
        hospital.scanner: {"train_images": len(train[i].labels), "test_images": len(test[i].labels)}
        | {kind: zero_shot(model, text[i], test[i].images, test[i].labels).class_token for kind, text in texts.items()}
        for i, hospital in enumerate(hospitals)
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=embedded_paths().config_path.parent)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200, help="of prompt tuning; 0 leaves out the tuned prompts")
    arguments = parser.parse_args()
    started = time.monotonic()
    model, vocabulary = read_package(arguments.folder)
    report = {
        "world_zero_shot": world_report(model, vocabulary, arguments.per_class),
        "digits_zero_shot": digits_report(model, vocabulary),
    }
    if arguments.steps:
        report["hospitals"] = {
            "world": hospitals_report(model, vocabulary, write_world_hospitals, world_class_names(), arguments.steps),
            "digits": hospitals_report(model, vocabulary, write_digit_hospitals, digit_class_names(), arguments.steps),
        }
    report["seconds"] = round(time.monotonic() - started, 1)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
