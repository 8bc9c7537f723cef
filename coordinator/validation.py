"""Whether a result may count: a pure function of what was asked and what the silo announced."""

import math
from collections.abc import Iterable

from fedrt.errors import PayloadError, TensorError
from fedrt.payload import ElementType, Manifest
from fedrt.task import Result, Success, TaskKind
from fedrt.tensors import Scope, TensorSpec, of_scope

MAX_METRIC_NAME = 100


def check_announcement(result: Result, kind: TaskKind, specs: Iterable[TensorSpec], sent_sha256: str = "") -> None:
    """Raise `TensorError` or `PayloadError` unless a success announces exactly the shared tensors and sound numbers.

    Nothing of the payload has arrived yet: a wrong announcement costs no memory. `sent_sha256` is the digest (hex) of
    the shared tensors that the work had to begin from. A result that began from others was computed for a round that a
    restored coordinator has forgotten.
    """
    success = result.outcome
    if not isinstance(success, Success):
        return
    if success.received_sha256 not in ("", sent_sha256):
        raise PayloadError("the result was computed from other shared tensors than those of this round")
    expected = () if kind is TaskKind.EVALUATE else of_scope(specs, Scope.SHARED)
    _check_manifest(result.manifest, expected)
    if success.example_count < 1 and kind is not TaskKind.INITIALIZE:
        raise PayloadError("the result counts no examples")
    for name, value in success.metrics.items():
        if not name or len(name) > MAX_METRIC_NAME:
            raise PayloadError(f"a metric name has {len(name)} characters; allowed are 1 to {MAX_METRIC_NAME}")
        if not math.isfinite(value):
            raise PayloadError(f"metric {name!r} is not finite")


def _check_manifest(manifest: Manifest | None, expected: tuple[TensorSpec, ...]) -> None:
    announced = {header.name: header for header in manifest.tensors} if manifest else {}
    declared = {spec.name: spec for spec in expected}
    if unknown := sorted(set(announced) - set(declared)):
        raise TensorError(f"tensor {unknown[0]!r} is not a shared tensor of this task; expected are {sorted(declared)}")
    if missing := sorted(set(declared) - set(announced)):
        raise TensorError(f"tensor {missing[0]!r} is missing")
    for name, header in announced.items():
        if header.shape != declared[name].shape:
            raise TensorError(f"tensor {name!r} has shape {header.shape}; declared is {declared[name].shape}")
        if header.element_type is not ElementType.FLOAT32:
            raise TensorError(f"tensor {name!r} has type {header.element_type.name}; declared is FLOAT32")
