"""What left the building: the one gate for tensors, and a record of every message that was sent."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from fedrt.errors import FailureReason, TensorError, WorkError
from fedrt.session.frames import Frame, Heartbeat, PayloadChunk, TaskResult
from fedrt.statefile import storage_error
from fedrt.task import Result, Success
from fedrt.tensors import Scope, Tensors, TensorSpec, check_tensors, of_scope


def check_release(specs: Iterable[TensorSpec], tensors: Tensors) -> None:
    """Raise `WorkError` unless these are exactly the declared SHARED tensors, finite: nothing else may leave."""
    try:
        check_tensors(of_scope(specs, Scope.SHARED), tensors)
    except TensorError as error:
        reason = FailureReason.NOT_FINITE if "finite" in str(error) else FailureReason.INTERNAL
        raise WorkError(reason, str(error)) from None


class Departures:
    """Appends one line of JSON per message that left, to a file that the site can read and keep.

    A heartbeat says nothing but that the silo is alive: heartbeats are counted and written with the next other message.
    Chunks are written as one line when their payload is complete.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._heartbeats = 0
        self._chunks: Counter[str] = Counter()
        self._open: dict[str, Result] = {}
        try:
            self._file = path.open("a", encoding="utf-8")
            path.chmod(0o600)
        except OSError as error:
            raise storage_error("write", path, error) from error

    def close(self) -> None:
        """Write what is still counted and close the file."""
        if self._heartbeats:
            self._write("heartbeats", {})
        self._file.close()

    def record(self, frame: Frame) -> None:
        """Note a frame that has left."""
        match frame:
            case Heartbeat():
                self._heartbeats += 1
            case PayloadChunk(chunk):
                self._chunk(chunk.payload_id, chunk.offset + len(chunk.data))
            case TaskResult(result):
                self._result(result)
            case _:
                self._write(type(frame).__name__, {"task": getattr(frame, "task_id", None)})

    def _result(self, result: Result) -> None:
        fields: dict[str, object] = {"task": result.task_id, "outcome": type(result.outcome).__name__}
        if isinstance(result.outcome, Success):
            fields |= {"example_count": result.outcome.example_count, "metrics": dict(result.outcome.metrics)}
        self._write("TaskResult", fields)
        if result.manifest is not None:
            self._open[result.manifest.payload_id] = result

    def _chunk(self, payload_id: str, end: int) -> None:
        self._chunks[payload_id] += 1
        result = self._open.get(payload_id)
        if result is None or result.manifest is None or end < result.manifest.byte_count:
            return
        tensors = [
            {"name": h.name, "shape": list(h.shape), "type": h.element_type.name, "bytes": h.byte_count}
            for h in result.manifest.tensors
        ]
        digest = result.manifest.sha256.hex()
        count = self._chunks.pop(payload_id)
        self._write("PayloadChunk", {"task": result.task_id, "tensors": tensors, "sha256": digest}, count)
        del self._open[payload_id]

    def _write(self, kind: str, fields: dict[str, object], message_count: int = 1) -> None:
        if self._heartbeats and kind != "heartbeats":
            self._write("heartbeats", {})
        if kind == "heartbeats":
            kind, message_count, self._heartbeats = "Heartbeat", self._heartbeats, 0
        line = {"time": round(self._clock(), 3), "message": kind, "count": message_count, **fields}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()
