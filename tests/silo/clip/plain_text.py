"""The textbook that every text tower must equal: open_clip's own modules, all 77 positions, every class in full."""

import copy
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from fedrt.context import ClassPosition
from silo.clip import ClipTextTower
from silo.clip.text_engine import TextEngine
from silo.clip.tokens import Vocabulary

TINY_VIT = {"image_size": 8, "patch_size": 8, "width": 32, "layers": 1, "head_width": 32}
TOKENIZER = SimpleTokenizer()
VOCABULARY = Vocabulary()
TOLERANCE = 5e-5  # in float32; rounding alone stays below 1e-5

# Embedding size, activation and text tower; RN50 is the real one's text tower (its image tower is not built).
TEXT_MODELS: dict[str, tuple[int, bool, dict[str, int | bool]]] = {
    "heads of 32": (48, True, {"context_length": 77, "width": 64, "heads": 2, "layers": 2}),
    "heads of 64": (64, False, {"context_length": 77, "width": 64, "heads": 1, "layers": 3}),
    "wide and deep": (32, True, {"context_length": 40, "width": 128, "heads": 2, "layers": 4}),
    "short": (80, False, {"context_length": 25, "width": 96, "heads": 3, "layers": 2}),
    "one layer": (32, True, {"context_length": 16, "width": 64, "heads": 2, "layers": 1, "proj_bias": True}),
    "RN50": (1024, True, {"context_length": 77, "width": 512, "heads": 8, "layers": 12}),
}


def tower_of(
    model: CLIP, class_names: Sequence[str], vocabulary: Vocabulary = VOCABULARY, activation_limit: int = 1 << 40
) -> ClipTextTower:
    """The tower under test; with a limit of 0 its layers are computed again for the backward pass."""
    return ClipTextTower(TextEngine(model, vocabulary.start, activation_limit), vocabulary, class_names)


class PlainText:
    """CoOp's construction in float32 or float64: embed "X X … X name.", overwrite the X, run everything, pick the end.

    Takes no shortcut and trusts autograd with the gradient, so it is what a faster tower is measured against.
    """

    def __init__(self, model: CLIP, class_names: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        self._model = model
        self._dtype = dtype
        self._names = [name.replace("_", " ") for name in class_names]
        self._name_lengths = [len(TOKENIZER.encode(name)) for name in self._names]
        self._transformer = copy.deepcopy(model.transformer).to(dtype)
        self._ln_final = copy.deepcopy(model.ln_final).to(dtype)
        self._projection = copy.deepcopy(model.text_projection).to(dtype)

    def encode(
        self, context: Tensor, position: ClassPosition = ClassPosition.END, class_specific: bool = False
    ) -> Tensor:
        """Unit-norm features [..., C, D] of a context [..., L, E], or [..., C, L, E] with one for each class."""
        *leading, length, width = context.shape
        if class_specific:
            leading.pop()
        else:
            context = context.unsqueeze(-3).expand(*leading, len(self._names), length, width)
        flat = context.reshape(-1, len(self._names), length, width).to(self._dtype)  # [G, C, L, E]
        ids = self._token_ids(length)  # [C, T]
        rows = self._model.token_embedding(ids).to(self._dtype)  # [C, T, E]
        prompts = [
            torch.cat(_in_order(one[index], rows[index], self._name_lengths[index], position))
            for one in flat
            for index in range(len(self._names))
        ]
        features = self._features(torch.stack(prompts), ids.argmax(-1).repeat(len(flat)))
        return features.reshape(*leading, len(self._names), -1)

    def _token_ids(self, length: int) -> Tensor:
        texts = [f"{' '.join(['X'] * length)} {name}." for name in self._names]
        limit = self._model.context_length
        assert all(2 + len(TOKENIZER.encode(text)) <= limit for text in texts), "the tokeniser would cut a prompt short"
        return TOKENIZER(texts, limit)

    def _features(self, prompts: Tensor, ends: Tensor) -> Tensor:
        x = prompts + self._model.positional_embedding.to(self._dtype)  # [P, T, E]
        x = self._ln_final(self._transformer(x, attn_mask=self._model.attn_mask.to(self._dtype)))
        x = x[torch.arange(len(x)), ends]
        linear = isinstance(self._projection, torch.nn.Linear)
        return F.normalize(self._projection(x) if linear else x @ self._projection, dim=-1)


def _in_order(context: Tensor, rows: Tensor, name_length: int, position: ClassPosition) -> list[Tensor]:
    """The parts of one prompt [T, E]: the name stands after, in the middle of, or before the context."""
    before = {ClassPosition.END: len(context), ClassPosition.MIDDLE: len(context) // 2, ClassPosition.FRONT: 0}
    first, second = context[: before[position]], context[before[position] :]
    suffix = rows[1 + len(context) :]
    return [rows[:1], first, suffix[:name_length], second, suffix[name_length:]]


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to 1 + the largest number; infinite where one is not a number."""
    assert actual.shape == expected.shape
    worst = (actual.double() - expected.double()).abs().max() / (1 + expected.double().abs().max())
    return float(worst.detach().nan_to_num(torch.inf))


@cache
def text_model(kind: str) -> CLIP:
    """A frozen CLIP with one of the text towers in `TEXT_MODELS`; no parameter is left at a value such as 0 or 1.

    Fresh biases are zero and fresh layer norms the identity: a tower that forgets or misplaces them would pass.
    """
    embed_dim, quick_gelu, text = TEXT_MODELS[kind]
    generator = torch.Generator().manual_seed(11)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        model = CLIP(embed_dim, TINY_VIT, {**text, "vocab_size": 49408}, quick_gelu=quick_gelu)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("in_proj_bias", "c_fc.bias")):
            parameter.data = 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.1 * noise
        elif "ln_" in name:
            parameter.data = 1 + 0.3 * noise
        elif name == "positional_embedding":
            parameter.data = 0.02 * noise
        elif parameter.dim() > 0:
            parameter.data += 0.3 * parameter.data.std() * noise
    return model.eval().requires_grad_(False)
