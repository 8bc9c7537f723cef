"""The frozen weights of CLIP's text tower as the engine multiplies them, once for each element type.

Quick GELU, x·σ(1.702·x), is SiLU of 1.702·x over 1.702: with both factors taken into the weights around it one fused
kernel does what three passes did. The factor 1/√d of attention goes into the queries' weights likewise. All of that
changes a result by roundings only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

QUICK = 1.702  # the factor in quick GELU


class Affine(NamedTuple):
    """x ↦ x·weightᵀ + bias, with weight [out, in]; of a layer norm, weight and bias [E] and its ε."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """A layer norm over the last axis, always in float32."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised x [..., E]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Layer:
    """One residual block. `attention` gives queries, keys and values [3·E]; the queries are scaled already."""

    head_count: int
    dtype: torch.dtype  # of the matrices
    norm_1: Norm
    attention: Affine
    out: Affine
    norm_2: Norm
    widen: Affine
    narrow: Affine
    activation: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TextWeights:
    """All blocks, and what comes after the last one, in float32."""

    layers: tuple[Layer, ...]
    final_norm: Norm
    projection: Affine  # to the joint space


@torch.no_grad()
def text_weights(model: CLIP, dtype: torch.dtype) -> TextWeights:
    """The weights of a model's text tower. Raises `ValueError` if it is built of other parts than CLIP's."""
    blocks = list(model.transformer.resblocks)
    if not all(type(block) is ResidualAttentionBlock for block in blocks):
        raise ValueError("the text tower is not built of CLIP's residual blocks")
    projection = model.text_projection
    if isinstance(projection, nn.Linear):
        bias = torch.zeros_like(projection.weight[:, 0]) if projection.bias is None else projection.bias
        joint = Affine(projection.weight, bias)
    else:
        joint = Affine(projection.T.contiguous(), torch.zeros_like(projection[0]))
    return TextWeights(
        layers=tuple(_layer(block, dtype) for block in blocks),
        final_norm=_norm(model.ln_final),
        projection=joint,
    )


def _layer(block: ResidualAttentionBlock, dtype: torch.dtype) -> Layer:
    attention, widen, narrow = block.attn, block.mlp.c_fc, block.mlp.c_proj
    scales = torch.ones_like(attention.in_proj_bias)
    scales[: attention.embed_dim] = 1 / math.sqrt(attention.head_dim)
    quick = isinstance(block.mlp.gelu, QuickGELU)
    factor = QUICK if quick else 1.0
    return Layer(
        head_count=attention.num_heads,
        dtype=dtype,
        norm_1=_norm(block.ln_1),
        attention=_affine(attention.in_proj_weight * scales[:, None], attention.in_proj_bias * scales, dtype),
        out=_scaled(attention.out_proj, block.ls_1, dtype),
        norm_2=_norm(block.ln_2),
        widen=_affine(widen.weight * factor, widen.bias * factor, dtype),
        narrow=_scaled(narrow, block.ls_2, dtype, factor),
        activation=F.silu if quick else block.mlp.gelu,
    )


def _scaled(linear: nn.Linear, scale: nn.Module, dtype: torch.dtype, divisor: float = 1.0) -> Affine:
    """A linear map with the layer scale after it, if there is one, and its input divided by `divisor`."""
    gamma = scale.gamma if isinstance(scale, LayerScale) else torch.ones_like(linear.bias)
    return _affine(linear.weight * gamma[:, None] / divisor, linear.bias * gamma, dtype)


def _affine(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Affine:
    return Affine(weight.detach().to(dtype), bias.detach().to(dtype))


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)
