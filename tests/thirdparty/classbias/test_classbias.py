"""What a method must keep, tried with the small CLIP that comes with fedrt: run `pytest` beside this file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classbias.declaration import ClassBias
from classbias.local import build
from torch import Tensor

from fedrt.aggregation import ServerState, Update
from fedrt.method import ModelDims
from fedrt.methods.promptfl import PromptFL
from fedrt.tensors import Scope, initial_tensors
from silo.clip import load_clip
from silo.method import Batch, ImageFeatures, TextTower
from silo.methods import promptfl
from silo.sources import ModelSource

METHOD = ClassBias(context_length=4, bias_scale=5.0)
SPECS = METHOD.tensors(ModelDims(context_dim=96, feature_dim=96, class_count=3))  # the sizes of fedrt-tiny
POOLED = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
BATCH = Batch(ImageFeatures(F.normalize(POOLED, dim=-1), None), torch.tensor([0, 1, 2, 2, 2]))


@pytest.fixture(scope="module")
def text() -> TextTower:
    clip = load_clip(ModelSource("fedrt-tiny", "embedded"))
    return clip.text_tower(["green circle", "blue square", "red triangle"])


def initial() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).requires_grad_() for name, array in initial_tensors(SPECS, seed=1).items()}


def test_what_leaves_the_silo_and_what_stays() -> None:
    assert {spec.name: spec.scope for spec in SPECS} == {"context": Scope.SHARED, "bias": Scope.PRIVATE}


def test_the_gradient_reaches_every_tensor_and_the_bias_learns_what_is_frequent(text: TextTower) -> None:
    params, local = initial(), build(METHOD, text)
    local.loss(params, params, BATCH).backward()
    assert params["context"].grad.abs().max() > 0
    expected = local.classify(params)(BATCH.images).softmax(1).mean(0) - torch.tensor([0.2, 0.2, 0.6])
    torch.testing.assert_close(params["bias"].grad, 5.0 * expected)  # zero where the mean prediction is the frequency


def test_logits_have_a_column_per_class_and_without_a_scale_they_are_those_of_promptfl(text: TextTower) -> None:
    params = initial() | {"bias": torch.tensor([1.0, 2.0, 3.0])}
    plain = promptfl.build(PromptFL(context_length=4), text).classify(params)(BATCH.images)
    assert plain.shape == (5, 3)
    for scale in (0.0, 5.0):
        logits = build(ClassBias(context_length=4, bias_scale=scale), text).classify(params)(BATCH.images)
        torch.testing.assert_close(logits - plain, (scale * params["bias"]).expand(5, 3), atol=1e-4, rtol=0)


def test_aggregation_of_one_adds_its_delta_and_the_order_changes_no_bit() -> None:
    state = ServerState({"context": np.zeros((4, 96), np.float32)})
    deltas = np.random.default_rng(1).standard_normal((3, 4, 96), np.float32)
    updates = [Update(f"silo-{at}", {"context": delta}, 10 + at) for at, delta in enumerate(deltas)]
    assert (METHOD.aggregate(state, updates[:1]).shared["context"] == deltas[0]).all()
    forth, back = (METHOD.aggregate(state, order).shared["context"] for order in (updates, updates[::-1]))
    assert forth.tobytes() == back.tobytes()


def test_a_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="bias_scale is -1"):
        ClassBias(bias_scale=-1)
