"""Files of tensors with a record about them and a digest over both: whole and unchanged, or known to be damaged."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from fedrt.errors import DamageError
from fedrt.statefile import storage_error, write_atomic
from fedrt.tensors import Tensors

_KEY = "record"  # a single entry: safetensors writes several in any order, and the same content is the same bytes


def write_tensors(path: Path, tensors: Tensors, about: Mapping[str, object]) -> None:
    """Replace the file durably. `about` is anything that JSON can hold. Raises `StorageError`."""
    text = json.dumps(about, sort_keys=True)
    record = json.dumps({"about": text, "sha256": _digest(tensors, text)})
    write_atomic(path, safetensors.numpy.save(dict(tensors), {_KEY: record}))


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors, and what was said about them. Raises `DamageError` saying in what way, otherwise `StorageError`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise storage_error("read", path, error) from error
    try:
        tensors = safetensors.numpy.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"][_KEY])
        text, expected = str(record["about"]), record["sha256"]
        about: dict[str, Any] = json.loads(text)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamageError(f"'{path}' is damaged ({type(error).__name__})") from error
    if _digest(tensors, text) != expected:
        raise DamageError(f"'{path}' is damaged (its content does not fit its digest)")
    return tensors, about


def _digest(tensors: Tensors, about: str) -> str:
    digest = sha256(json.dumps(about).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
