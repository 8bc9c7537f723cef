"""Unit-norm image features of a frozen CLIP: one pooled vector per image, and one per patch where a method needs it."""

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor

from fedrt.errors import FailureReason, WorkError
from silo.method import ImageFeatures


def has_patches(model: CLIP) -> bool:
    """Whether the image tower has patch features in the joint space."""
    visual = model.visual
    if isinstance(visual, VisionTransformer):
        return visual.attn_pool is None and visual.pool_type == "tok" and not visual.final_ln_after_pool
    return isinstance(visual, ModifiedResNet)


@torch.no_grad()
def image_features(model: CLIP, images: Tensor, patches: bool) -> ImageFeatures:
    """Unit-norm features of prepared images [B, 3, H, W]; patches [B, M, D] only if asked for.

    Raises `WorkError` if patches are asked of a tower that has none.
    """
    if not patches:
        return ImageFeatures(F.normalize(model.encode_image(images), dim=-1), None)
    if not has_patches(model):
        raise WorkError(
            FailureReason.DATA_UNAVAILABLE,
            "this method needs patch features, which this model's image tower does not have; "
            "use a ViT with a class token or a ResNet of CLIP",
        )
    visual = model.visual
    tokens = _resnet_tokens(visual, images) if isinstance(visual, ModifiedResNet) else _vit_tokens(visual, images)
    unit = F.normalize(tokens, dim=-1)
    return ImageFeatures(unit[:, 0].contiguous(), unit[:, 1:].contiguous())


def _vit_tokens(visual: VisionTransformer, images: Tensor) -> Tensor:
    """All tokens [B, 1 + M, D] through the last layer norm and the projection; index 0 is the class token."""
    tokens: Tensor = visual.ln_post(visual.transformer(visual._embeds(images))) @ visual.proj
    return tokens


def _resnet_tokens(visual: ModifiedResNet, images: Tensor) -> Tensor:
    """Every position as a query of the attention pool, [B, 1 + M, D]; index 0 is the mean, CLIP's own query.

    open_clip's `AttentionPool2d.forward` computes the same and keeps index 0 only.
    """
    pool: AttentionPool2d = visual.attnpool
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    x = x.flatten(2).permute(2, 0, 1)  # [M, B, width]
    x = torch.cat([x.mean(dim=0, keepdim=True), x]) + pool.positional_embedding[:, None]
    tokens, _ = F.multi_head_attention_forward(
        query=x,
        key=x,
        value=x,
        embed_dim_to_check=x.shape[-1],
        num_heads=pool.num_heads,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
    )
    return tokens.transpose(0, 1)
