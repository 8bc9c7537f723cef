"""FLOPs of a training step: counted while it runs, and by formula what the textbook and the least engine need.

Only products of matrices are counted, a multiplication and an addition as two: linear layers, convolutions, attention,
cosines. What is left out (layer norms, activations, softmax, transport) is cheap in FLOPs on both sides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import CLIP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
PRODUCTS = ("mm", "linear", "attention", "conv", "einsum", "matmul", "lstm", "dot", "mv")


@dataclass(frozen=True)
class Tower:
    """A transformer: E wide, with MLPs four times as wide, and a projection to D."""

    width: int
    layers: int
    feature_dim: int

    def linear(self, tokens: int) -> int:
        """Forward FLOPs of the linear layers of one block: QKV 6·E², output 2·E², MLP 16·E² for each token."""
        return 24 * tokens * self.width**2

    def attention(self, pairs: int) -> int:
        """Forward FLOPs of attention in one block for so many pairs of query and key, over all heads."""
        return 4 * pairs * self.width

    def projection(self, tokens: int) -> int:
        """Forward FLOPs into the joint space."""
        return 2 * tokens * self.width * self.feature_dim


@dataclass(frozen=True)
class Step:
    """What is asked for: prompts of one method, classes by the tokens of "<name>." and end, B images; with gradient or
    only forward, as in evaluation.
    """

    method: str
    context_length: int
    suffix_lengths: Sequence[int]
    batch_size: int
    trains: bool = True

    @property
    def prompts(self) -> int:
        """Prompts of each class that are encoded; FedPGP evaluates the personal one only."""
        return 1 if self.method == "promptfl" or (self.method == "fedpgp" and not self.trains) else 2

    @property
    def passes(self) -> tuple[int, int]:
        """Linear layers and attention, in units of going forward: back to its input, attention costs two of them."""
        return (2, 3) if self.trains else (1, 1)


def text_tower(model: CLIP) -> Tower:
    """The text tower of a CLIP."""
    return Tower(model.transformer.width, model.transformer.layers, model.text_projection.shape[1])


def textbook_flops(model: CLIP, step: Step) -> int:
    """Every token of every prompt forward and back to its input, and the image tower forward."""
    text = textbook_text_flops(model, step)
    return text + image_flops(model, step.batch_size, step.method == "fedotp") + head_flops(model, step)


def textbook_text_flops(model: CLIP, step: Step) -> int:
    """Of the prompts alone."""
    tower, length = text_tower(model), model.context_length
    rows, (linear, attention) = step.prompts * len(step.suffix_lengths), step.passes
    block = linear * tower.linear(rows * length) + attention * tower.attention(rows * length**2)
    return tower.layers * block + linear * tower.projection(rows)


def needed_flops(model: CLIP, step: Step) -> int:
    """The least of a step on features that exist."""
    return needed_text_flops(model, step) + head_flops(model, step)


def needed_text_flops(model: CLIP, step: Step) -> int:
    """The least for exact class features, classes sharing nothing but the prefix [start, context] of a prompt.

    The prefix once for each prompt, suffixes without padding, causal pairs only, the last layer at the end token only
    (but keys and values of all tokens). Not taken off: what is constant in the first layer.
    """
    tower, prefix, (linear, attention) = text_tower(model), 1 + step.context_length, step.passes
    tokens = prefix + sum(step.suffix_lengths)
    pairs = prefix * (prefix + 1) // 2 + sum(n * prefix + n * (n + 1) // 2 for n in step.suffix_lengths)
    ends, last_pairs = len(step.suffix_lengths), sum(prefix + n for n in step.suffix_lengths)
    full = (tower.layers - 1) * (linear * tower.linear(tokens) + attention * tower.attention(pairs))
    keys_and_values, rest = 4 * tokens * tower.width**2, 20 * ends * tower.width**2
    last = linear * (keys_and_values + rest) + attention * tower.attention(last_pairs)
    return step.prompts * (full + last + linear * tower.projection(ends))


def image_flops(model: CLIP, images: int, patches: bool) -> int:
    """The image tower forward: of a vision transformer, with the projection of the pooled token or of all."""
    visual = model.visual
    tower = Tower(visual.transformer.width, visual.transformer.layers, visual.proj.shape[1])
    count = int(visual.positional_embedding.shape[0])
    convolution = 2 * (count - 1) * visual.conv1.weight.numel()
    block = tower.linear(count) + tower.attention(count**2)
    return images * (convolution + tower.layers * block + tower.projection(count if patches else 1))


def head_flops(model: CLIP, step: Step) -> int:
    """Cosines of images, or of patches, with the prompts, and back to the prompts."""
    patches = int(model.visual.positional_embedding.shape[0]) - 1
    pairs = step.batch_size * len(step.suffix_lengths) * (2 * patches if step.method == "fedotp" else 1)
    return step.passes[0] * 2 * pairs * int(model.visual.proj.shape[1])


@dataclass(frozen=True)
class Counted:
    """FLOPs that PyTorch's counter saw, operators that look like products but have no formula there, and calls of any.

    Most calls of an operator start a kernel on a GPU; views do not.
    """

    flops: int
    uncounted: tuple[str, ...]
    calls: int


def counted_flops(run: Callable[[], object]) -> Counted:
    """Run once under PyTorch's counter. Takes the same path as without: fused attention is counted by formula.

    On a CPU the counter knows scaled_dot_product_attention forward and backward (5 products backward, as it computes
    the scores again), and sees inside custom autograd functions. It does not know the fused block of frozen attention
    layers and in-place products, for which the formulas are added here.
    """
    seen = _Seen()
    formulas: dict[Any, Any] = {
        aten._native_multi_head_attention: _frozen_attention,
        aten.addmm_: lambda self, a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
        aten.baddbmm_: lambda self, a, b, *_, **__: 2 * a[0] * a[1] * a[2] * b[-1],
        aten.mv: lambda a, b, *_, **__: 2 * a[0] * a[1],
        aten.linear: lambda x, w, *_, **__: 2 * _size(x) * w[0],
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with seen, counter:
        run()
    known = {str(packet) for packet in counter.flop_registry}
    names = {str(packet) for packet in seen.packets if any(part in str(packet) for part in PRODUCTS)}
    return Counted(counter.get_total_flops(), tuple(sorted(names - known)), seen.calls)


class _Seen(TorchDispatchMode):
    """Notes which operators are run, below the counter."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: set[Any] = set()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.packets.add(func.overloadpacket)
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _frozen_attention(query: Any, _key: Any, _value: Any, width: int, *_: Any, **__: Any) -> int:
    """QKV, scores, values and output for [B, T, E]."""
    batch, length, _e = query
    return int(batch * length * (8 * width**2 + 4 * length * width))


def _size(shape: Sequence[int]) -> int:
    total = 1
    for axis in shape:
        total *= axis
    return total
