"""Options that every method with contexts has: several of them, class position, class-specific ones, words to start."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from towers import DIMS, drawn, images, labelled, local, make, tensors, variables

from fedrt.context import ClassPosition
from fedrt.spec import TrainingSpec
from fedrt.tensors import Phrase, Scope
from silo.clip import FrozenClip, load_clip
from silo.examples import Examples
from silo.methods import BUILT_IN, find_local_method
from silo.sources import ModelSource
from silo.training import Plan, RoundPosition, Start, train

OPTIONS: list[dict[str, Any]] = [
    {},
    {"context_count": 3},
    {"class_specific": True},
    {"context_count": 2, "class_specific": True},
    *({"class_position": str(position)} for position in ClassPosition),
    {"context_count": 2, "class_specific": True, "class_position": "middle"},
]
EXACT: dict[str, dict[str, Any]] = {
    "fedotp": {"threshold": 1e-7, "max_sweeps": 10_000}
}  # for more than two prompts: search to the end

every_learning_method = pytest.mark.parametrize("name", sorted(set(BUILT_IN) - {"zeroshot"}))


@every_learning_method
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_of_the_context_works(name: str, options: dict[str, Any]) -> None:
    declared = make(name, **options)
    params = variables(declared)
    received = {key: value.detach() + 1 for key, value in params.items()}
    loss = local(declared).loss(params, received, labelled())
    for gradient in torch.autograd.grad(loss, list(params.values())):
        assert float(gradient.abs().max()) > 0
    expected = (options.get("context_count", 1), *((3,) if options.get("class_specific") else ()), 3, 6)
    for key in (key for key in params if "context" in key):
        assert params[key].numel() == math.prod(expected)
    assert local(declared).classify(params)(images()).shape == (5, 3)


@every_learning_method
def test_the_class_position_reaches_the_text_tower(name: str) -> None:
    params = tensors(make(name))
    logits = [local(make(name, class_position=str(at))).classify(params)(images()) for at in ClassPosition]
    assert all(float((one - other).abs().max()) > 1e-3 for one, other in itertools.combinations(logits, 2))


@every_learning_method
@pytest.mark.parametrize("option", [{"class_specific": True}, {"context_count": 3}], ids=str)
def test_equal_contexts_are_one_context(name: str, option: dict[str, Any]) -> None:
    """Of all classes, or of all voters."""
    plain, wide = make(name, **EXACT.get(name, {})), make(name, **EXACT.get(name, {}), **option)
    params = tensors(plain)
    copies = {spec.name: params[spec.name].broadcast_to(spec.shape) for spec in wide.tensors(DIMS)}
    torch.testing.assert_close(local(wide).classify(copies)(images()), local(plain).classify(params)(images()))
    losses = [local(one).loss(at, at, labelled()) for one, at in ((wide, copies), (plain, params))]
    torch.testing.assert_close(*losses)


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return load_clip(ModelSource("fedrt-tiny", "embedded"))


@every_learning_method
@pytest.mark.parametrize("option", [{}, {"context_count": 2}, {"class_specific": True, "class_position": "front"}])
def test_contexts_that_start_from_words_train_on_clip(clip: FrozenClip, name: str, option: dict[str, Any]) -> None:
    classes = ("red circle", "blue square")
    declared = make(name, context_length=4, context_init="a photo of a", **option)
    specs = declared.tensors(replace(DIMS, context_dim=clip.context_dim, feature_dim=clip.feature_dim, class_count=2))
    start: dict[str, Tensor] = {}
    for spec in specs:
        assert isinstance(spec.init, Phrase) == ("context" in spec.name)
        words = clip.embed_phrase(spec.init.text, 4) if isinstance(spec.init, Phrase) else drawn(1, *spec.shape) / 50
        start[spec.name] = words.broadcast_to(spec.shape)
    held = {scope: {spec.name: start[spec.name] for spec in specs if spec.scope is scope} for scope in Scope}
    size = clip.model.visual.image_size[0]
    data = Examples(
        clip.encode_images(drawn(8, 6, 3, size, size), declared.needs_patches), torch.arange(6), torch.arange(6) % 2
    )
    method = find_local_method(name)(declared, clip.text_tower(classes))
    plan = Plan(TrainingSpec(local_epochs=8), RoundPosition(1, 1), seed=1)
    before = method.loss(start, held[Scope.SHARED], data.batch(slice(None)))
    result = train(method, specs, Start(held[Scope.SHARED], held[Scope.PRIVATE]), data, plan, lambda *_: None)
    assert result.metrics["loss"] < float(before)
    after = {**result.shared, **result.private}
    assert all(not torch.equal(after[key], start[key]) for key in start)
