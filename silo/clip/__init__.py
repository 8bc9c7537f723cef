"""Frozen CLIP: loading its weights, image features, and the text tower that learnable prompts run through."""

from silo.clip.model import FrozenClip, load_clip
from silo.clip.text import ClipTextTower
from silo.clip.weights import weights_sha256

__all__ = ["ClipTextTower", "FrozenClip", "load_clip", "weights_sha256"]
