"""What only the engine has: recomputation, constants of the first layer, weights in other element types, refusals."""

import copy
from collections.abc import Callable

import pytest
import torch
from open_clip.transformer import LayerScale
from plain_text import text_model, tower_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedrt.context import ClassPosition
from silo.clip import ClipTextTower, FrozenClip
from silo.clip.text_weights import text_weights

NAMES = ["red circle", "blue square", "green cat", "a small red circle"]


def tower(mini: FrozenClip, limit: int) -> ClipTextTower:
    return tower_of(mini.model, NAMES, mini.vocabulary, limit)


def contexts(mini: FrozenClip) -> Tensor:
    drawn = torch.randn(3, 5, mini.context_dim, generator=torch.Generator().manual_seed(1))
    return (0.1 * drawn).requires_grad_()


def step(mini: FrozenClip, limit: int) -> tuple[Tensor, Tensor, int]:
    """Features, gradient, and how many bytes the graph held for the backward pass."""
    held: dict[int, int] = {}
    context = contexts(mini)

    def note(saved: Tensor) -> Tensor:
        held[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        features = tower(mini, limit).encode(context)
    weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weight).sum().backward()
    assert context.grad is not None
    return features.detach(), context.grad, sum(held.values())


def test_recomputing_layers_changes_no_bit_and_holds_less(mini: FrozenClip) -> None:
    kept, repeated = step(mini, 1 << 40), step(mini, 0)
    assert torch.equal(kept[0], repeated[0])
    assert torch.equal(kept[1], repeated[1])
    assert repeated[2] < 0.75 * kept[2]  # two layers, of which the last is never repeated


def test_the_limit_means_about_what_a_step_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model("wide and deep")
    repeated: list[object] = []

    def note(block: Callable[[Tensor], Tensor], x: Tensor, **_: object) -> Tensor:
        repeated.append(block)
        return block(x)

    def held(count: int, limit: int) -> int:
        storages: dict[int, int] = {}

        def keep(saved: Tensor) -> Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        repeated.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            features = tower_of(model, ["dog", "red fox", "t-shirt"], activation_limit=limit).encode(
                torch.randn(count, 16, 128).requires_grad_()
            )
        assert features.requires_grad
        return sum(storages.values())

    monkeypatch.setattr("silo.clip.text_engine.checkpoint", note)
    activations = 2 * (held(16, 1 << 40) - held(8, 1 << 40))  # weights, which the graph refers to, cancel out
    held(16, 2 * activations)
    assert not repeated
    held(16, activations // 2)
    assert len(repeated) == 3  # of four layers; the last is never repeated


def test_nothing_is_recomputed_without_a_gradient(mini: FrozenClip, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a layer was recomputed")

    monkeypatch.setattr("silo.clip.text_engine.checkpoint", refuse)
    with torch.no_grad():
        tower(mini, 0).encode(contexts(mini))
    tower(mini, 0).encode(contexts(mini).detach())
    with pytest.raises(AssertionError, match="recomputed"):
        tower(mini, 0).encode(contexts(mini))


def test_the_first_layer_of_class_names_is_computed_once_unless_context_stands_among_them(mini: FrozenClip) -> None:
    def flops(position: ClassPosition) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ours.encode(contexts(mini), position)
        return counter.get_total_flops()

    ours = tower(mini, 0)
    flops(ClassPosition.FRONT)  # what depends on the weights alone
    slot_count = sum(len(mini.vocabulary.encode(f"{name}.")) + 1 for name in NAMES)  # they share no beginning
    assert flops(ClassPosition.END) - flops(ClassPosition.END) == 6 * slot_count * mini.context_dim**2
    assert flops(ClassPosition.FRONT) == flops(ClassPosition.FRONT)


def test_weights_in_bfloat16_are_those_in_float32_rounded(mini: FrozenClip) -> None:
    exact, rounded = text_weights(mini.model, torch.float32), text_weights(mini.model, torch.bfloat16)
    for one, other in zip(exact.layers, rounded.layers, strict=True):
        assert torch.equal(one.attention.weight.bfloat16(), other.attention.weight)
        assert torch.equal(one.widen.bias.bfloat16(), other.widen.bias)
        assert other.norm_1.weight.dtype == torch.float32
    assert torch.equal(exact.projection.weight, rounded.projection.weight)


def test_the_models_own_weights_are_left_alone(mini: FrozenClip) -> None:
    before = copy.deepcopy(mini.model.state_dict())
    tower(mini, 0).encode(contexts(mini)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        tower(mini, 0).encode(contexts(mini))
    after = mini.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_text_tower_of_other_blocks_is_refused(mini: FrozenClip) -> None:
    model = copy.deepcopy(mini.model)
    model.transformer.resblocks[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="residual blocks"):
        text_weights(model, torch.float32)


def test_layer_scales_are_taken_into_the_weights(mini: FrozenClip) -> None:
    """With a scale of 0 behind both halves of every block, a block does nothing."""
    model = copy.deepcopy(mini.model)
    for block in model.transformer.resblocks:
        block.ls_1, block.ls_2 = LayerScale(mini.context_dim, 0.0), LayerScale(mini.context_dim, 0.0)
    layer = text_weights(model, torch.float32).layers[0]
    for affine in (layer.out, layer.narrow):
        assert not affine.weight.any()
        assert not affine.bias.any()
