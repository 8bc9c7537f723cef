"""The embedded CLIP's two towers: their open_clip configuration, and how images and captions become unit features."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import text_global_pool
from torch import Tensor
from torch.nn import functional

from silo.embedded.tokens import CONTEXT_LENGTH
from silo.embedded.world import RESOLUTION

FloatArray = NDArray[np.float32]

WIDTH = 96


def model_config(vocab_size: int) -> dict[str, Any]:
    """The open_clip configuration of the embedded CLIP, arguments of `open_clip.model.CLIP`."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": RESOLUTION, "patch_size": 4, "layers": 4, "width": WIDTH, "head_width": 32},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocab_size,
            "width": WIDTH,
            "heads": 3,
            "layers": 4,
        },
    }


def normalised(images: FloatArray) -> Tensor:
    """Images [B, R, R, 3] in [0, 1] as the towers' input [B, 3, R, R]."""
    scaled = (images - np.float32(OPENAI_DATASET_MEAN)) / np.float32(OPENAI_DATASET_STD)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32))


def encode_image(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm features of the class token and of the mean of the projected patch tokens, both [B, 96].

    `model.visual.output_tokens` must be set; the patch tokens come out of `ln_post` and lack only the projection.
    """
    pooled, tokens = model.visual(images)
    patches = (tokens @ model.visual.proj).float().mean(dim=1)
    return functional.normalize(pooled.float(), dim=-1), functional.normalize(patches, dim=-1)


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Unit-norm text features [B, 96]; padding after the longest caption is cut off, which a causal tower ignores."""
    length = int((tokens != 0).sum(dim=1).max())
    short = tokens[:, :length]
    x = model.token_embedding(short) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return functional.normalize((text_global_pool(x, short) @ model.text_projection).float(), dim=-1)


def encode_captions(model: Any, tokens: Tensor) -> Tensor:
    """`encode_text` in four parts sorted by length, because most captions are far shorter than the longest."""
    order = (tokens != 0).sum(dim=1).argsort()
    parts = [encode_text(model, tokens[rows]) for rows in order.chunk(4)]
    return torch.cat(parts)[order.argsort()]
