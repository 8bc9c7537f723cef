"""Accuracy of the embedded CLIP, zero-shot and with a tuned prompt: `python tests/bench/embedded_clip.py` prints JSON.

Zero-shot accuracy is over all 80 colour-shape classes (chance 0.0125) or the ten digits (chance 0.1). The tuned prompt
is CoOp's: 16 learned vectors in front of the class name, trained on a few images of one scanner with both towers
frozen; it says how much prompt learning can gain where zero-shot stops.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from silo.embedded import embedded_paths
from silo.embedded.datasets import digit_class_names, handwritten_digits, scan_digits
from silo.embedded.evaluation import class_features, image_features, read_package, sample_images, zero_shot
from silo.embedded.scanners import SCANNERS
from silo.embedded.tokens import CompactVocabulary
from silo.embedded.world import ALL_PAIRS, HELD_OUT_PAIRS, SEEN_PAIRS

PROMPT_LENGTH = 16


def encode_prompts(model: Any, vocabulary: CompactVocabulary, context: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Unit-norm text features [C, 96] of start, context [16, 96], class name, full stop and end."""
    tokens = torch.from_numpy(vocabulary.encode([f"{name}." for name in class_names]))
    embedded = model.token_embedding(tokens)
    room = embedded.shape[1] - len(context)
    x = torch.cat([embedded[:, :1], context.expand(len(tokens), -1, -1), embedded[:, 1:room]], dim=1)
    x = model.ln_final(model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask))
    end = tokens.argmax(dim=1) + len(context)
    return functional.normalize(x[torch.arange(len(x)), end] @ model.text_projection, dim=-1)


def tuned_accuracy(
    model: Any,
    vocabulary: CompactVocabulary,
    class_names: tuple[str, ...],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    steps: int,
) -> float:
    """Test accuracy of a 16-vector context trained by Adam on the training images, whole batch, both towers frozen."""
    generator = torch.Generator().manual_seed(0)
    context = (0.02 * torch.randn(PROMPT_LENGTH, 96, generator=generator)).requires_grad_()
    optimiser = torch.optim.Adam([context], lr=0.01)
    features = image_features(model, train[0])[0].clone()
    target = torch.from_numpy(train[1])
    for _ in range(steps):
        text = encode_prompts(model, vocabulary, context, class_names)
        loss = functional.cross_entropy(model.logit_scale.exp() * features @ text.T, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        text = encode_prompts(model, vocabulary, context, class_names)
    return zero_shot(model, text, *test).class_token


def world_report(model: Any, vocabulary: CompactVocabulary, per_class: int) -> dict[str, Any]:
    text = class_features(model, vocabulary, [pair.class_name for pair in ALL_PAIRS])
    report = {}
    for index, scanner in enumerate(SCANNERS):
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


def tuned_report(model: Any, vocabulary: CompactVocabulary, shots: int, steps: int) -> dict[str, Any]:
    """Zero-shot against tuned accuracy on test images of one scanner, 80 classes or ten digits."""
    report: dict[str, Any] = {}
    names = tuple(pair.class_name for pair in ALL_PAIRS)
    text = class_features(model, vocabulary, names)
    for index, scanner in enumerate(SCANNERS):
        train = sample_images(ALL_PAIRS, scanner, shots, np.random.default_rng([7, index]))
        test = sample_images(ALL_PAIRS, scanner, 30, np.random.default_rng([8, index]))
        report[f"world, {scanner}"] = {
            "zero_shot": zero_shot(model, text, *test).class_token,
            "tuned": tuned_accuracy(model, vocabulary, names, train, test, steps),
        }
    names = digit_class_names()
    text = class_features(model, vocabulary, names)
    digits, labels = handwritten_digits()
    order = np.random.default_rng(9).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == digit][:shots] for digit in range(10)])
    rest = np.setdiff1d(order, chosen)
    for scanner in ("clean", "inverted", "blurred"):
        images = scan_digits(digits, scanner, np.random.default_rng(10))
        test = (images[rest], labels[rest])
        report[f"digits, {scanner}"] = {
            "zero_shot": zero_shot(model, text, *test).class_token,
            "tuned": tuned_accuracy(model, vocabulary, names, (images[chosen], labels[chosen]), test, steps),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=embedded_paths().config_path.parent)
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200, help="0 leaves out the tuned prompts")
    arguments = parser.parse_args()
    started = time.monotonic()
    model, vocabulary = read_package(arguments.folder)
    report = {
        "world_zero_shot": world_report(model, vocabulary, arguments.per_class),
        "digits_zero_shot": digits_report(model, vocabulary),
    }
    if arguments.steps:
        report["tuned"] = tuned_report(model, vocabulary, arguments.shots, arguments.steps)
    report["seconds"] = round(time.monotonic() - started, 1)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
