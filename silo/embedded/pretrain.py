"""Pre-train the embedded CLIP on the drawn world: `python -m silo.embedded.pretrain --out DIR --steps N --seed S`.

Every step draws its own batch from (seed, step), so a run resumed from a checkpoint takes the same batches as one that
was never interrupted. Two contrastive losses are added: one on the class token, one on the mean of the projected patch
tokens, without which patches carry no meaning and methods that match patches with text cannot work. Linear heads that
name the shape and the digit join them, because with captions alone colours are learned at once and shapes hardly at all
in so few steps; the heads are thrown away.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from silo.embedded.batches import BATCH_SIZE, Batch, sample_batch
from silo.embedded.tokens import CompactVocabulary, compact_vocabulary
from silo.embedded.towers import WIDTH, encode_captions, encode_image, model_config, normalised
from silo.embedded.world import ABSENT, DIGITS, SHAPES, Attribute

PEAK_LEARNING_RATE = 1.2e-3
WEIGHT_DECAY = 0.05
PATCH_LOSS_WEIGHT = 1.0
HEAD_LOSS_WEIGHT = 1.0
HEAD_SCALE = 10.0
LOGIT_SCALE_LIMIT = float(np.log(100.0))


class AttributeHeads(nn.Module):
    """Linear heads on unit-norm image features that name the shape and the digit; for pre-training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, len(SHAPES))
        self.digit = nn.Linear(width, len(DIGITS))

    def loss(self, features: Tensor, attributes: Tensor) -> Tensor:
        """Cross-entropies from features [B, 96]; a row of `attributes` [B, 8] without shape or digit is left out."""
        shape = self._loss(self.shape, features, attributes[:, Attribute.SHAPE])
        return shape + self._loss(self.digit, features, attributes[:, Attribute.DIGIT])

    @staticmethod
    def _loss(head: nn.Linear, features: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(head(HEAD_SCALE * features), target, ignore_index=ABSENT)


@dataclass(frozen=True)
class Settings:
    """What determines the weights (steps, seed), and where a run keeps its state."""

    steps: int
    seed: int
    checkpoint_path: Path | None
    checkpoint_interval: int = 100


@dataclass(frozen=True)
class Losses:
    """The scalar losses of one batch."""

    class_token: Tensor
    mean_patch: Tensor
    heads: Tensor

    def total(self) -> Tensor:
        """The weighted sum that is minimised."""
        return self.class_token + PATCH_LOSS_WEIGHT * self.mean_patch + HEAD_LOSS_WEIGHT * self.heads


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds besides the step."""

    trained: nn.ModuleDict
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, excluded: Tensor) -> Tensor:
    """Symmetric InfoNCE over unit features [B, D]; pairs in `excluded` [B, B] are true, hence no negatives."""
    logits = (scale * image @ text.T).masked_fill(excluded, float("-inf"))
    target = torch.arange(len(logits))
    return 0.5 * (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target))


def train(settings: Settings) -> tuple[Any, CompactVocabulary]:
    """Train from scratch, or from the checkpoint where one exists, and return the model and its vocabulary."""
    torch.manual_seed(settings.seed)
    vocabulary = compact_vocabulary()
    model = CLIP(**model_config(len(vocabulary.kept)))
    model.visual.output_tokens = True
    heads = AttributeHeads(WIDTH)
    trained = nn.ModuleDict({"model": model, "heads": heads})
    optimiser = torch.optim.AdamW(_parameter_groups(trained), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_LEARNING_RATE, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    run = Run(trained, optimiser, schedule)
    first = _restore(settings, run)
    started = time.monotonic()
    for step in range(first, settings.steps):
        batch = sample_batch(np.random.default_rng([settings.seed, step]))
        losses = _losses(model, heads, batch, vocabulary)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.total())
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=LOGIT_SCALE_LIMIT)
        if (step + 1) % settings.checkpoint_interval == 0:
            _report(step + 1, losses, time.monotonic() - started)
            _save(settings, step + 1, run)
    return model, vocabulary


def write_package(out: Path, model: Any, vocabulary: CompactVocabulary, settings: Settings) -> None:
    """Write `config.json`, `vocabulary.json` and `weights.safetensors` (float16) into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "weights.safetensors")
    config = model_config(len(vocabulary.kept))
    config["fedrt"] = {
        "architecture": "fedrt-tiny",
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "training": {"steps": settings.steps, "seed": settings.seed, "batch_size": BATCH_SIZE},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "vocabulary.json").write_text(json.dumps(list(vocabulary.kept)) + "\n")


def main() -> None:
    """Parse the command line, train, and write the three package files."""
    parser = argparse.ArgumentParser(description="Pre-train the embedded CLIP.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=None, help="file to resume from and to save to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(arguments.steps, arguments.seed, arguments.checkpoint)
    model, vocabulary = train(settings)
    write_package(arguments.out, model, vocabulary, settings)


def _parameter_groups(trained: nn.Module) -> Iterator[dict[str, Any]]:
    matrices = [p for p in trained.parameters() if p.ndim >= 2]
    others = [p for p in trained.parameters() if p.ndim < 2]
    yield {"params": matrices, "weight_decay": WEIGHT_DECAY}
    yield {"params": others, "weight_decay": 0.0}


def _losses(model: Any, heads: AttributeHeads, batch: Batch, vocabulary: CompactVocabulary) -> Losses:
    """The losses of one batch.

    The towers run in bfloat16 with plain attention, which halves the time on CPUs that have bfloat16 instructions: the
    fused attention's bfloat16 backward pass is several times slower than the plain one.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        text = encode_captions(model, torch.from_numpy(vocabulary.encode(batch.captions)))
        pooled, patches = encode_image(model, normalised(batch.images))
    off_diagonal = ~torch.eye(len(batch.truth), dtype=torch.bool)
    excluded = torch.from_numpy(batch.truth) & off_diagonal
    scale = model.logit_scale.exp()
    attributes = torch.from_numpy(batch.attributes)
    return Losses(
        class_token=contrastive_loss(pooled, text, scale, excluded),
        mean_patch=contrastive_loss(patches, text, scale, excluded),
        heads=heads.loss(pooled, attributes) + heads.loss(patches, attributes),
    )


def _report(step: int, losses: Losses, seconds: float) -> None:
    line = {
        "step": step,
        "class_token": losses.class_token.item(),
        "mean_patch": losses.mean_patch.item(),
        "heads": losses.heads.item(),
        "seconds": seconds,
    }
    print(json.dumps({key: round(value, 3) for key, value in line.items()}), flush=True)  # noqa: T201


def _save(settings: Settings, step: int, run: Run) -> None:
    if settings.checkpoint_path is None:
        return
    state = {
        "step": step,
        "trained": run.trained.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "schedule": run.schedule.state_dict(),
    }
    unfinished = settings.checkpoint_path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(settings.checkpoint_path)


def _restore(settings: Settings, run: Run) -> int:
    """Load the checkpoint where one exists and return the number of steps already taken."""
    if settings.checkpoint_path is None or not settings.checkpoint_path.exists():
        return 0
    state = torch.load(settings.checkpoint_path, weights_only=True)
    run.trained.load_state_dict(state["trained"])
    run.optimiser.load_state_dict(state["optimiser"])
    run.schedule.load_state_dict(state["schedule"])
    return int(state["step"])


if __name__ == "__main__":
    main()
