"""A frozen CLIP on one device: image features, the text tower for class names, and token embeddings of phrases."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg
from PIL.Image import Image
from torch import Tensor

from fedrt.errors import ConfigurationError, FailureReason, WorkError
from silo.clip.architecture import Architecture, find_architecture
from silo.clip.images import has_patches, image_features
from silo.clip.text import ClipTextTower
from silo.clip.text_engine import TextEngine
from silo.clip.tokens import Vocabulary
from silo.clip.views import Preprocessing
from silo.clip.weights import (
    WeightsFile,
    file_sha256,
    fill,
    find_weights,
    published_with_quick_gelu,
    read_checkpoint,
)
from silo.method import ImageFeatures
from silo.sources import ModelSource

ACTIVATION_SHARE = 0.25  # of the memory of the GPU, or of the machine, that a training step may hold in the text tower


def load_clip(source: ModelSource) -> "FrozenClip":
    """Load a CLIP in float32, frozen and in evaluation mode.

    Raises `ConfigurationError` naming what is wrong with the architecture, the weights or the device.
    """
    device = find_device(source.device)
    architecture = find_architecture(source.architecture)
    weights = find_weights(source)
    digest = file_sha256(weights.path)
    checkpoint = read_checkpoint(weights.path, digest)
    quick_gelu = weights.quick_gelu or checkpoint.openai or published_with_quick_gelu(digest)
    model = architecture.build(quick_gelu)
    fill(model, checkpoint.tensors, source)
    return FrozenClip(
        architecture=architecture.name,
        weights_sha256=digest,
        model=model.requires_grad_(False).eval().to(device),
        vocabulary=architecture.vocabulary(),
        preprocess=_preprocess(architecture, weights, model),
    )


@dataclass(frozen=True, eq=False)
class FrozenClip:
    """`preprocess` turns an RGB image into the pixels [3, H, W] that `encode_images` takes."""

    architecture: str
    weights_sha256: str  # hexadecimal, of the weights file
    model: CLIP
    vocabulary: Vocabulary
    preprocess: Preprocessing

    @property
    def context_dim(self) -> int:
        """E, the width of a context vector."""
        return int(self.model.token_embedding.weight.shape[1])

    @property
    def feature_dim(self) -> int:
        """D, the size of the joint space."""
        projection = self.model.text_projection
        return int(projection.out_features if isinstance(projection, torch.nn.Linear) else projection.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where features and contexts live."""
        device: torch.device = self.model.token_embedding.weight.device
        return device

    @property
    def device_name(self) -> str:
        """For people: `cpu`, or for example `cuda:NVIDIA H200`."""
        if self.device.type == "cuda":
            return f"cuda:{torch.cuda.get_device_name(self.device)}"
        return self.device.type

    @property
    def has_patches(self) -> bool:
        """Whether methods that need patch features can run."""
        return has_patches(self.model)

    @property
    def preprocessing_digest(self) -> str:
        """SHA-256, hexadecimal, of what pixels depend on beside the image file, in augmented views too."""
        return self.preprocess.digest

    def augment(self, image: Image, content_digest: str, view: int) -> Tensor:
        """Pixels [3, H, W] of an augmented view, counted from 1, of the image whose file has this SHA-256 digest."""
        return self.preprocess.augment(image, content_digest, view)

    def encode_images(self, images: Tensor, patches: bool) -> ImageFeatures:
        """Unit-norm features of prepared images [B, 3, H, W]: pooled [B, D], patches [B, M, D] if asked for.

        In float32 without TF32, so that features agree between devices. Raises `WorkError` if the tower has no patches.
        """
        if self.device.type == "cpu":
            return image_features(self.model, images, patches)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return image_features(self.model, images.to(self.device), patches)

    def text_tower(self, class_names: Sequence[str]) -> ClipTextTower:
        """The text tower bound to class names. Raises `WorkError` if a name cannot be spelled or is too long."""
        return ClipTextTower(self.text_engine, self.vocabulary, class_names)

    @cached_property
    def text_engine(self) -> TextEngine:
        """What runs the text tower for any class names, with weights of its own."""
        limit = int(memory_bytes(self.device) * ACTIVATION_SHARE)
        return TextEngine(self.model, self.vocabulary.start, limit)

    def embed_phrase(self, text: str, length: int) -> Tensor:
        """Token embeddings [L, E] of a phrase. Raises `WorkError` unless it has exactly `length` tokens."""
        rows = self.vocabulary.encode(text.replace("_", " "))
        if len(rows) != length:
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"the phrase {text!r} has {len(rows)} tokens, but the context has {length}; "
                f"set the context length to {len(rows)} or choose another phrase",
            )
        return self.text_engine.embed(torch.tensor(rows, device=self.device))


def find_device(name: str) -> torch.device:
    """The device of that name. Raises `ConfigurationError` if it is unknown or absent."""
    kind, _, number = name.partition(":")
    if kind not in {"cpu", "cuda"} or (number and not number.isdecimal()) or (kind == "cpu" and ":" in name):
        raise ConfigurationError(f"model.device {name!r} is not known; use 'cpu', 'cuda' or 'cuda:0'")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"model.device is {name!r}, but PyTorch finds no CUDA device; "
            "check `nvidia-smi` and that torch was installed with CUDA, or set model.device to 'cpu'"
        )
    if int(number or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"model.device is {name!r}, but this machine has {torch.cuda.device_count()} CUDA device(s), counted from 0"
        )
    return torch.device("cuda", int(number or 0))


def memory_bytes(device: torch.device) -> int:
    """Of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _preprocess(architecture: Architecture, weights: WeightsFile, model: CLIP) -> Preprocessing:
    fields = {**architecture.preprocess, **weights.preprocess, "size": model.visual.image_size}
    return Preprocessing(PreprocessCfg(**fields))
