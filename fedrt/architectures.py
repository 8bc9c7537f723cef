"""The two dimensions of open_clip's common CLIP architectures, so that an experiment need not state them.

The coordinator has no open_clip to ask. The numbers are those of open_clip 3's own `model_configs`, and a test compares
them where it is installed. Architectures with a foreign text tower (SigLIP, MobileCLIP, Hugging Face) are left out.
"""

import difflib
from typing import NamedTuple

from fedrt.errors import SpecError


class ClipDims(NamedTuple):
    """The width of the text tower (E, of a context vector) and of the joint space (D, of a feature)."""

    context_dim: int
    feature_dim: int


_NAMES = {
    ClipDims(96, 96): "fedrt-tiny",
    ClipDims(384, 384): "ViT-S-32 ViT-S-16 ViT-M-32-alt ViT-M-16-alt",
    ClipDims(512, 512): (
        "ViT-B-32 ViT-B-32-quickgelu ViT-B-32-256 ViT-B-16 ViT-B-16-quickgelu ViT-M-32 ViT-M-16 "
        "RN101 RN101-quickgelu convnext_base"
    ),
    ClipDims(512, 1024): "RN50 RN50-quickgelu",
    ClipDims(640, 640): (
        "RN50x4 RN50x4-quickgelu ViT-B-32-plus-256 ViT-B-16-plus ViT-B-16-plus-240 convnext_base_w convnext_base_w_320"
    ),
    ClipDims(768, 768): (
        "ViT-L-14 ViT-L-14-quickgelu ViT-L-14-280 ViT-L-14-336 ViT-L-14-336-quickgelu ViT-L-16 ViT-L-16-320 "
        "RN50x16 RN50x16-quickgelu convnext_large convnext_large_d convnext_large_d_320"
    ),
    ClipDims(1024, 1024): (
        "ViT-H-14 ViT-H-14-quickgelu ViT-H-14-378 ViT-H-14-378-quickgelu ViT-H-16 ViT-g-14 "
        "RN50x64 RN50x64-quickgelu convnext_xxlarge convnext_xxlarge_320"
    ),
    ClipDims(1280, 1280): "ViT-bigG-14 ViT-bigG-14-quickgelu ViT-e-14",
}
ARCHITECTURES = {name: dims for dims, names in _NAMES.items() for name in names.split()}


def clip_dims(architecture: str, context_dim: int | None = None, feature_dim: int | None = None) -> ClipDims:
    """The dimensions of an architecture: those of the table, else the two stated ones.

    Raises `SpecError` if neither knows them, or if a stated one contradicts the table.
    """
    known = ARCHITECTURES.get(architecture)
    if known is not None:
        for key, stated, actual in (
            ("context_dim", context_dim, known.context_dim),
            ("feature_dim", feature_dim, known.feature_dim),
        ):
            if stated not in (None, actual):
                raise SpecError(f"model.{key} is {stated}, but {architecture!r} has {actual}; remove model.{key}")
        return known
    if context_dim is not None and feature_dim is not None:
        return ClipDims(context_dim, feature_dim)
    close = difflib.get_close_matches(architecture, ARCHITECTURES, 1)
    hint = f"did you mean {close[0]!r}? If not, " if close else ""
    raise SpecError(
        f"model.architecture {architecture!r} is not one whose dimensions fedrt knows; {hint}add model.context_dim "
        "(width of its text tower) and model.feature_dim (embed_dim), as open_clip's model_configs give them"
    )
