"""What left the building: the one gate for tensors, and a record of every message that was sent."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from fedrt.complaint import Complaint
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
        self._log = structlog.get_logger("silo.departures")
        self._complaint = Complaint()
        try:
            self._file = path.open("ab", buffering=0)
            path.chmod(0o600)
            self._unwritten = _line_end(path)
        except OSError as error:
            raise storage_error("write", path, error) from error

    def close(self) -> None:
        """Write what is still counted, also of payloads that never completed, and close the file."""
        for payload_id, count in self._chunks.items():
            result = self._open.get(payload_id)
            self._write("PayloadChunk", {"task": result.task_id if result else payload_id, "complete": False}, count)
        if self._heartbeats:
            self._write("heartbeats", {})
        if self._unwritten:
            self._log.error("the record of departures is incomplete", lost_bytes=len(self._unwritten))
        with contextlib.suppress(OSError):
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
        self._unwritten += json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            while self._unwritten:
                del self._unwritten[: append(self._file, self._unwritten)]
        except OSError as error:
            if self._complaint.is_due(str(error.strerror)):
                self._log.error("departures are kept in memory until the disk accepts writes", reason=error.strerror)
        else:
            if self._complaint.end():
                self._log.info("the disk accepts departures again, and has those kept in memory")


def append(file: BinaryIO, data: bytes | bytearray) -> int:
    """Write to an unbuffered file opened for appending; returns how many bytes it took. Raises `OSError`."""
    return file.write(data)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every entry of a record; a line that a crash cut off is passed over. Raises `OSError`."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _line_end(path: Path) -> bytearray:
    """What to write first: a crash may have cut the last line off, and it must not swallow the next one."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        return bytearray(b"" if file.read() in (b"", b"\n") else b"\n")
