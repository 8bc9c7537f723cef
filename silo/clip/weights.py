"""Where the weights of a CLIP come from (a file, the embedded one, an open_clip tag), and how they enter a model."""

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.pretrained import (
    download_pretrained,
    get_pretrained_cfg,
    get_pretrained_url,
    list_pretrained,
    list_pretrained_models_by_tag,
    list_pretrained_tags_by_model,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedrt.errors import ConfigurationError
from silo.clip.architecture import TINY, embedded_file
from silo.embedded import embedded_paths
from silo.sources import ModelSource

EMBEDDED = "embedded"
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
# what safetensors and torch's unpickler raise on bytes that are not theirs; the latter does not check what it reads
_UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class WeightsFile:
    """A file with weights, and what its tag says about them."""

    path: Path
    quick_gelu: bool = False
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def weights_sha256(source: ModelSource) -> str:
    """The SHA-256 of the weights file in hexadecimal, without loading it. Raises `ConfigurationError`."""
    return file_sha256(find_weights(source).path)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal. Raises `ConfigurationError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigurationError(f"model.weights {str(path)!r} cannot be read: {error.strerror}") from None


def find_weights(source: ModelSource) -> WeightsFile:
    """The file that `source.weights` names; a tag is downloaded unless it is cached. Raises `ConfigurationError`."""
    if source.weights == EMBEDDED:
        if source.architecture != TINY:
            raise ConfigurationError(
                f"model.weights 'embedded' belongs to {TINY!r}, not to {source.architecture!r}; "
                "name a weights file or a pretrained tag"
            )
        return WeightsFile(embedded_file(embedded_paths().weights_path))
    path = Path(source.weights)
    if path.is_file():
        return WeightsFile(path)
    if path.is_dir():
        raise ConfigurationError(f"model.weights {source.weights!r} is a directory; name the file in it")
    if path.suffix in _FILE_SUFFIXES or len(path.parts) > 1:
        raise ConfigurationError(f"model.weights {source.weights!r} does not exist; correct the path or copy it there")
    return _find_tag(source.architecture, source.weights)


def _find_tag(architecture: str, tag: str) -> WeightsFile:
    entry = get_pretrained_cfg(architecture, tag)
    if not entry:
        tags = list_pretrained_tags_by_model(architecture)
        hint = f"tags are {', '.join(tags)}" if tags else "it has no tags"
        raise ConfigurationError(
            f"model.weights {tag!r} is neither a file nor a pretrained tag of {architecture!r}; {hint}"
        )
    try:
        path = Path(download_pretrained(entry))
    except (OSError, RuntimeError) as error:
        quick = f" and model.architecture to {_quick(architecture)!r}" if entry.get("quick_gelu") else ""
        raise ConfigurationError(
            f"the weights {tag!r} of {architecture!r} could not be downloaded ({type(error).__name__}); "
            f"copy the file here from a machine with access and set model.weights to its path{quick}"
        ) from error
    preprocess = {key: entry[key] for key in _PREPROCESS_KEYS if key in entry}
    return WeightsFile(path, bool(entry.get("quick_gelu")), preprocess)


def _quick(architecture: str) -> str:
    """The architecture that states the activation, which a file does not, unlike a tag."""
    return f"{architecture.removesuffix('-quickgelu')}-quickgelu"


@dataclass(frozen=True)
class Checkpoint:
    """A state dict under open_clip's names; `openai` if it came in the form that OpenAI published."""

    tensors: dict[str, Tensor]
    openai: bool


def read_checkpoint(path: Path, sha256: str) -> Checkpoint:
    """Read a file without running code from it. Raises `ConfigurationError` if it is no checkpoint.

    A TorchScript archive is a program, so it is read only if it is one that OpenAI published, recognised by `sha256`.
    """
    openai = False
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        elif _is_torchscript(path):
            _check_published(path, sha256)
            loaded, openai = torch.jit.load(path, map_location="cpu").state_dict(), True  # type: ignore[no-untyped-call]
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ConfigurationError(
            f"model.weights {str(path)!r} is not a checkpoint that can be read safely ({reason}); "
            "it must be a .safetensors file or a state dict saved by torch.save"
        ) from None
    return _state_dict(loaded, path, openai)


def _state_dict(loaded: Any, path: Path, openai: bool) -> Checkpoint:
    inner = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(inner, dict) or not inner:
        raise ConfigurationError(f"model.weights {str(path)!r} holds no state dict")
    named = inner
    if all(str(key).startswith("module.") for key in named):
        named = {key.removeprefix("module."): value for key, value in named.items()}
    openai = openai or all(key in named for key in _OPENAI_EXTRAS)
    tensors = {key: value for key, value in named.items() if key not in _OPENAI_EXTRAS}
    if other := next((key for key, value in tensors.items() if not isinstance(value, Tensor)), None):
        raise ConfigurationError(f"model.weights {str(path)!r} is not a state dict: {other!r} is not a tensor")
    return Checkpoint(tensors, openai)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def published_digests() -> frozenset[str]:
    """The SHA-256 of the TorchScript archives that OpenAI published, as their addresses carry them."""
    addresses = (get_pretrained_url(model, "openai") for model in list_pretrained_models_by_tag("openai"))
    return frozenset(address.split("/")[-2] for address in addresses if "openaipublic" in address)


def published_with_quick_gelu(sha256: str) -> bool:
    """Whether open_clip's table says of the file with this SHA-256 that it was trained with QuickGELU.

    The table has digests of files published by OpenAI (whole) and at open_clip's own address (their first 8 digits), in
    their addresses; of those on the Hugging Face hub it has none.
    """
    for model, tag in list_pretrained():
        address = get_pretrained_url(model, tag) or ""
        if "openaipublic" in address:
            known = address.split("/")[-2]
        elif "mlfoundations" in address:
            known = PurePosixPath(address).stem.rpartition("-")[2]
        else:
            continue
        if sha256.startswith(known) and get_pretrained_cfg(model, tag).get("quick_gelu"):
            return True
    return False


def _check_published(path: Path, sha256: str) -> None:
    if sha256 not in published_digests():
        raise ConfigurationError(
            f"model.weights {str(path)!r} is a TorchScript archive, which is a program, and not one that OpenAI "
            "published; where you trust it, convert it once with "
            "`torch.save(torch.jit.load(path).state_dict(), 'weights.pt')` and name that file"
        )


def fill(model: CLIP, tensors: Mapping[str, Tensor], source: ModelSource) -> None:
    """Copy a state dict into a model, in the model's precision.

    Raises `ConfigurationError` unless names and shapes agree exactly; none of the model is changed then.
    """
    expected: Mapping[str, Tensor] = model.state_dict()
    given = {
        name: value.reshape(expected[name].shape) if name == "logit_scale" and value.numel() == 1 else value
        for name, value in tensors.items()
    }
    problems = [
        _counted("it lacks", expected.keys() - given.keys()),
        _counted("it also holds", given.keys() - expected.keys()),
        *(
            f"{name!r} has shape {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & given.keys())
            if given[name].shape != expected[name].shape
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        more = f", and {len(found) - 3} more differences" if len(found) > 3 else ""
        raise ConfigurationError(
            f"model.weights {source.weights!r} does not fit model.architecture {source.architecture!r}: "
            f"{'; '.join(found[:3])}{more}; "
            "set model.architecture to the one that the weights were trained with"
        )
    model.load_state_dict(given, strict=True)


def _counted(verb: str, names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{verb} {listed[0]!r}{more}" if listed else ""
