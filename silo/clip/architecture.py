"""CLIP architectures by name: open_clip's own, and `fedrt-tiny`, which is embedded in this package."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg

from fedrt.errors import ConfigurationError
from silo.clip.tokens import Vocabulary
from silo.embedded import embedded_paths

TINY = "fedrt-tiny"
FULL_VOCABULARY_SIZE = 49408
# options of open_clip that `silo.clip.text_engine` does not know; no published architecture with CLIP's tokens has one
OWN_PARTS = (
    "block_type",
    "embed_cls",
    "qk_norm",
    "scale_attn",
    "scale_attn_inner",
    "scale_fc",
    "scale_heads",
    "scaled_cosine_attn",
)


@dataclass(frozen=True)
class Architecture:
    """An open_clip configuration, how its images are prepared, and the token ids that its embedding keeps."""

    name: str
    config: Mapping[str, Any]  # keyword arguments of open_clip's CLIP
    preprocess: Mapping[str, Any]  # fields of open_clip's PreprocessCfg, without the size
    kept_ids: tuple[int, ...] | None = None  # None: the full vocabulary

    def build(self, quick_gelu: bool) -> CLIP:
        """The model on the CPU in float32 with arbitrary weights; the global random state is left as it was.

        `quick_gelu` forces the activation that OpenAI's weights were trained with.
        """
        with torch.random.fork_rng(devices=[]):
            return CLIP(**{**self.config, "quick_gelu": quick_gelu or bool(self.config.get("quick_gelu"))})

    def vocabulary(self) -> Vocabulary:
        """The tokeniser whose ids are rows of this model's token embedding."""
        return Vocabulary(self.kept_ids)


def find_architecture(name: str) -> Architecture:
    """The architecture of that name. Raises `ConfigurationError` if it is unknown or not a plain CLIP."""
    if name == TINY:
        return _tiny()
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, [TINY, *known], 3, 0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"{TINY!r} and 'ViT-B-16' are two of them"
        raise ConfigurationError(f"model.architecture {name!r} is not one that open_clip knows; {hint}")
    config = open_clip.get_model_config(name)
    if reason := _unsupported(config):
        raise ConfigurationError(
            f"model.architecture {name!r} is not supported: {reason}; "
            "use a CLIP with the original text tower, for example 'ViT-B-16' or 'RN50'"
        )
    config.pop("custom_text", None)
    return Architecture(name, config, asdict(PreprocessCfg()))


def embedded_file(path: Path) -> Path:
    """A file of the embedded CLIP. Raises `ConfigurationError` if it was not installed."""
    if not path.is_file():
        raise ConfigurationError(
            f"the embedded CLIP lacks {str(path)!r}; install fedrt again, or run `python -m silo.embedded.pretrain`"
        )
    return path


def _tiny() -> Architecture:
    paths = embedded_paths()
    config: dict[str, Any] = json.loads(embedded_file(paths.config_path).read_text(encoding="utf-8"))
    ours = config.pop("fedrt", {})
    kept_ids = tuple(json.loads(embedded_file(paths.vocabulary_path).read_text(encoding="utf-8")))
    preprocess = asdict(PreprocessCfg()) | {key: tuple(ours[key]) for key in ("mean", "std") if key in ours}
    return Architecture(TINY, config, preprocess, kept_ids)


def _unsupported(config: Mapping[str, Any]) -> str | None:
    """Why prompts cannot be learnt through this text tower, or None if they can."""
    text = config["text_cfg"]
    if "hf_model_name" in text or "multimodal_cfg" in config or config.get("custom_text"):
        return "its text tower is not CLIP's (CustomTextCLIP)"
    if "hf_tokenizer_name" in text or text.get("vocab_size", FULL_VOCABULARY_SIZE) != FULL_VOCABULARY_SIZE:
        return "its tokeniser is not CLIP's"
    if text.get("no_causal_mask") or text.get("pool_type", "argmax") != "argmax":
        return "its text tower is not causal with the feature at the end token"
    if own := sorted(option for option in OWN_PARTS if text.get(option)):
        return f"its text tower has parts that CLIP's lacks ({', '.join(own)})"
    return None
