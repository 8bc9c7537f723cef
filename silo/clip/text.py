"""CLIP's frozen text tower, bound to class names: class features of learnable contexts, exact and plain.

A prompt is [start, context, class name, '.', end]. Attention is causal, so everything after the last end token is cut:
no feature depends on it. Gradients flow to the context only. A faster engine may take the place of `ClipTextTower`;
this one says what it must compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.errors import FailureReason, WorkError
from silo.clip.tokens import Vocabulary, unknown_words_error

HANDCRAFTED = "a photo of a"
PLACEHOLDER = "X"  # what CoOp's code writes where the context will stand


@dataclass(frozen=True)
class _ClassTokens:
    """Token rows of "<name>." and end; the first `name_length` of them are the name alone."""

    name: str
    rows: tuple[int, ...]
    name_length: int


class ClipTextTower:
    """Implements `silo.method.TextTower` with open_clip's own modules.

    Raises `WorkError` when built if a class name cannot be spelled or leaves no room for a context.
    """

    def __init__(self, model: CLIP, vocabulary: Vocabulary, class_names: Sequence[str]) -> None:
        self._model = model
        self._classes = _tokenise(vocabulary, class_names)
        self._vocabulary = vocabulary
        self._check_length(1)
        device = model.token_embedding.weight.device
        longest = max(len(entry.rows) for entry in self._classes)
        rows = [entry.rows + (vocabulary.end,) * (longest - len(entry.rows)) for entry in self._classes]
        self._suffix = embed(model, torch.tensor(rows, device=device))  # [C, S, E]
        self._start = embed(model, torch.tensor([vocabulary.start], device=device))  # [1, E]
        self._constants: dict[tuple[str, ClassPosition], Tensor] = {}  # features of fixed phrases
        self._scale: Tensor = model.logit_scale.detach().exp().reshape(())

    @property
    def logit_scale(self) -> Tensor:
        """The exponential of CLIP's trained temperature, a scalar."""
        return self._scale

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        """Unit-norm features [..., C, D] of a context [..., L, E] that all classes share.

        With `class_specific`, of one context per class, [..., C, L, E]. Raises `WorkError` if a prompt does not fit
        into the model's context length.
        """
        if not class_specific:
            *leading, length, width = context.shape
            context = context.unsqueeze(-3).expand(*leading, len(self._classes), length, width)
        return self._encode(context, position)

    def handcrafted(self) -> Tensor:
        """Unit-norm features [C, D] of "a photo of a {class}.", without gradient; always the same tensor."""
        return self._constant(HANDCRAFTED, ClassPosition.END)

    def placeholder(self, length: int, position: ClassPosition = ClassPosition.END) -> Tensor:
        """Unit-norm features [C, D] of "X X … X {class}." with `length` X, without gradient; always the same tensor.

        Raises `WorkError` if the model's vocabulary lacks the X, or a prompt does not fit.
        """
        if self._vocabulary.unknown_words(PLACEHOLDER):
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"the vocabulary of this model is small and does not hold the placeholder {PLACEHOLDER!r}; "
                "use the handcrafted prompt (for fedpgp, positive: handcrafted), or a CLIP with the full vocabulary",
            )
        return self._constant(" ".join([PLACEHOLDER] * length), position)

    def _constant(self, phrase: str, position: ClassPosition) -> Tensor:
        """Computed once, in the model's own precision, whatever autocast the first caller trains under.

        It serves later experiments as well.
        """
        key = (phrase, position)
        if key not in self._constants:
            device = self._start.device
            rows = embed(self._model, torch.tensor(self._vocabulary.encode(phrase), device=device))
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                self._constants[key] = self._encode(rows.expand(len(self._classes), -1, -1), position)
        return self._constants[key]

    def _encode(self, context: Tensor, position: ClassPosition) -> Tensor:
        *leading, classes, length, width = context.shape
        if classes != len(self._classes) or width != self._suffix.shape[-1]:
            raise ValueError(f"context has shape {tuple(context.shape)}; this tower has {self._suffix.shape[-1]} wide "
                             f"tokens and {len(self._classes)} classes")  # fmt: skip
        self._check_length(length)
        flat = context.reshape(-1, classes, length, width)
        start = self._start.expand(*flat.shape[:2], -1, -1)
        suffix = self._suffix.expand(flat.shape[0], -1, -1, -1)
        prompts = torch.cat([start, flat, suffix], dim=2)  # [G, C, T, E]
        if position is not ClassPosition.END:
            order = self._order(length, position)  # [C, T]
            prompts = prompts[:, torch.arange(classes, device=order.device)[:, None], order]
        ends = torch.tensor([length + len(entry.rows) for entry in self._classes], device=context.device)
        raw = prompt_features(self._model, prompts.flatten(0, 1), ends.repeat(flat.shape[0]))
        return F.normalize(raw, dim=-1).reshape(*leading, classes, -1)

    def _order(self, length: int, position: ClassPosition) -> Tensor:
        """For each class and place [C, T]: which token of [start, context, name, rest] stands there."""
        before = length // 2 if position is ClassPosition.MIDDLE else 0
        total = 1 + length + self._suffix.shape[1]
        orders = []
        for entry in self._classes:
            name = range(1 + length, 1 + length + entry.name_length)
            rest = range(1 + length + entry.name_length, total)
            orders.append([*range(1 + before), *name, *range(1 + before, 1 + length), *rest])
        return torch.tensor(orders, device=self._start.device)

    def _check_length(self, length: int) -> None:
        limit = int(self._model.positional_embedding.shape[0])
        longest = max(self._classes, key=lambda entry: len(entry.rows))
        needed = 1 + length + len(longest.rows)
        if needed > limit:
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"the prompt of class {longest.name!r} needs {needed} tokens (start, {length} of context, "
                f"{longest.name_length} of the name, '.', end), but the model's context length is {limit}; "
                "shorten the name or the context",
            )


def embed(model: CLIP, rows: Tensor) -> Tensor:
    """The frozen token embeddings of rows [...], as [..., E]."""
    return F.embedding(rows, model.token_embedding.weight.detach())


def prompt_features(model: CLIP, prompts: Tensor, ends: Tensor) -> Tensor:
    """Features [P, D], not normalised, of embedded prompts [P, T, E] whose end tokens stand at `ends` [P]."""
    length = prompts.shape[1]
    x = prompts + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x[torch.arange(x.shape[0], device=x.device), ends])
    projection = model.text_projection
    features: Tensor = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
    return features


def _tokenise(vocabulary: Vocabulary, class_names: Sequence[str]) -> tuple[_ClassTokens, ...]:
    """Underscores become spaces, as in CoOp; the tokeniser lower-cases."""
    if not class_names:
        raise ValueError("a text tower needs at least one class name")
    clean = [name.replace("_", " ").strip() for name in class_names]
    unknown = [word for name in clean for word in vocabulary.unknown_words(f"{name}.")]
    if unknown:
        raise unknown_words_error([word.removesuffix(".") or word for word in unknown])
    entries = []
    for name, text in zip(class_names, clean, strict=True):
        length = len(vocabulary.encode(text))
        if length == 0:
            raise WorkError(FailureReason.DATA_UNAVAILABLE, f"the class name {name!r} holds no words; rename the class")
        entries.append(_ClassTokens(name, (*vocabulary.encode(f"{text}."), vocabulary.end), length))
    return tuple(entries)
