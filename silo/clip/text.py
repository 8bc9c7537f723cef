"""CLIP's frozen text tower, bound to class names: class features of learnable contexts, exact and fast.

A prompt is [start, context, class name, '.', end]. How its tokens are laid out so that none is computed twice is
`silo.clip.packing`'s business, and what is computed of them `silo.clip.text_engine`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrt.context import ClassPosition
from fedrt.errors import FailureReason, WorkError
from silo.clip.packing import pack
from silo.clip.text_engine import Arrangement, TextEngine
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
    """Implements `silo.method.TextTower`.

    Raises `WorkError` when built if a class name cannot be spelled or leaves no room for a context.
    """

    def __init__(self, engine: TextEngine, vocabulary: Vocabulary, class_names: Sequence[str]) -> None:
        self._engine = engine
        self._classes = _tokenise(vocabulary, class_names)
        self._vocabulary = vocabulary
        self._check_length(1)
        self._constants: dict[tuple[str, ClassPosition], Tensor] = {}  # features of fixed phrases
        self._arrangements: dict[tuple[int, ClassPosition, bool], Arrangement] = {}
        self._scale = engine.logit_scale

    @property
    def logit_scale(self) -> Tensor:
        """The exponential of CLIP's trained temperature, a scalar."""
        return self._scale

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        """Unit-norm features [..., C, D] of a context [..., L, E] that all classes share.

        With `class_specific`, of one context per class, [..., C, L, E]. Under autocast the products of matrices are in
        its element type. Raises `WorkError` if a prompt does not fit into the model's context length.
        """
        device = self._engine.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        return self._encode(context, position, class_specific, dtype)

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
        """Computed once, in float32, whatever autocast the first caller trains under. It serves later experiments."""
        key = (phrase, position)
        if key not in self._constants:
            rows = torch.tensor(self._vocabulary.encode(phrase), device=self._engine.device)
            with torch.no_grad():
                self._constants[key] = self._encode(self._engine.embed(rows), position, False, torch.float32)
        return self._constants[key]

    def _encode(self, context: Tensor, position: ClassPosition, class_specific: bool, dtype: torch.dtype) -> Tensor:
        axes = (len(self._classes),) if class_specific else ()
        *leading, length, width = context.shape
        kept = len(leading) - len(axes)
        if width != self._engine.width or tuple(leading[kept:]) != axes:
            raise ValueError(f"context has shape {tuple(context.shape)}; this tower has {self._engine.width} wide "
                             f"tokens and {len(self._classes)} classes")  # fmt: skip
        key = (length, position, class_specific)
        if key not in self._arrangements:
            self._check_length(length)
            self._arrangements[key] = self._arrange(*key)
        arrangement = self._arrangements[key]
        features = self._engine.features(context.reshape(-1, arrangement.row_count, width), arrangement, dtype)
        return features.reshape(*leading[:kept], *features.shape[1:])

    def _arrange(self, length: int, position: ClassPosition, class_specific: bool) -> Arrangement:
        """How prompts with a context of this length are computed; the rows of a class's own context stand together."""
        before = {ClassPosition.FRONT: 0, ClassPosition.MIDDLE: length // 2, ClassPosition.END: length}[position]
        shared = 0 if class_specific else before
        paths = []
        for number, entry in enumerate(self._classes):
            offset = number * length if class_specific else 0
            context = [~(offset + row) for row in range(length)]
            name, rest = entry.rows[: entry.name_length], entry.rows[entry.name_length :]
            paths.append([*context[shared:before], *name, *context[before:], *rest])
        row_count = length * len(paths) if class_specific else length
        return self._engine.arrange(pack(paths, 1 + shared), shared, row_count)

    def _check_length(self, length: int) -> None:
        limit = self._engine.context_length
        longest = max(self._classes, key=lambda entry: len(entry.rows))
        needed = 1 + length + len(longest.rows)
        if needed > limit:
            raise WorkError(
                FailureReason.DATA_UNAVAILABLE,
                f"the prompt of class {longest.name!r} needs {needed} tokens (start, {length} of context, "
                f"{longest.name_length} of the name, '.', end), but the model's context length is {limit}; "
                "shorten the name or the context",
            )


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
