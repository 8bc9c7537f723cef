"""PromptFL through a real text tower: training learns, repeats bit for bit, and leaves CLIP as it was."""

import hashlib

import pytest
import torch
import torch.nn.functional as F

from fedrt.method import ModelDims
from fedrt.methods.promptfl import PromptFL
from fedrt.spec import OptimizerSpec, Precision, TrainingSpec
from silo.clip import FrozenClip
from silo.evaluation import evaluate
from silo.examples import Examples
from silo.method import ImageFeatures
from silo.methods import promptfl
from silo.training import Plan, RoundPosition, Start, Trained, train

NAMES = ("dog", "ice cream", "St. Bernard")
METHOD = PromptFL(context_length=4)


def digest(clip: FrozenClip) -> str:
    sums = hashlib.sha256()
    for tensor in clip.model.state_dict().values():
        sums.update(tensor.numpy().tobytes())
    return sums.hexdigest()


def examples(clip: FrozenClip) -> Examples:
    """Thirty features, each nearest to one of three directions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    centres = torch.randn(3, clip.feature_dim, generator=generator)
    pooled = centres[labels] + 0.3 * torch.randn(30, clip.feature_dim, generator=generator)
    return Examples(ImageFeatures(F.normalize(pooled, dim=-1), None), torch.arange(30), labels)


def run(clip: FrozenClip, seed: int, precision: Precision = Precision.FP32) -> tuple[dict[str, float], Trained]:
    """Metrics before training, and what five epochs make of it."""
    specs = METHOD.tensors(ModelDims(clip.context_dim, clip.feature_dim, len(NAMES)))
    method = promptfl.build(METHOD, clip.text_tower(NAMES))
    context = 0.02 * torch.randn(4, clip.context_dim, generator=torch.Generator().manual_seed(1))
    settings = TrainingSpec(5, 8, OptimizerSpec(learning_rate=0.05), precision=precision)
    before = evaluate(method.classify({"context": context}), examples(clip))
    start = Start({"context": context}, {})
    trained = train(
        method, specs, start, examples(clip), Plan(settings, RoundPosition(1, 1), seed), lambda done, planned: None
    )
    return before, trained


def test_training_learns_and_clip_stays(mini: FrozenClip) -> None:
    was = digest(mini)
    before, trained = run(mini, seed=1)
    after = evaluate(promptfl.build(METHOD, mini.text_tower(NAMES)).classify(trained.shared), examples(mini))
    assert after["loss"] < 0.8 * before["loss"]
    assert after["accuracy"] > before["accuracy"]
    assert digest(mini) == was


def test_same_seed_same_bits_other_seed_other_bits(mini: FrozenClip) -> None:
    contexts = [run(mini, seed)[1].shared["context"] for seed in (1, 1, 2)]
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[0], contexts[2])


def test_bf16_is_near_fp32(mini: FrozenClip) -> None:
    full, half = run(mini, 1)[1], run(mini, 1, Precision.BF16)[1]
    assert half.shared["context"].dtype == torch.float32
    assert half.metrics["loss"] == pytest.approx(full.metrics["loss"], rel=0.1)
