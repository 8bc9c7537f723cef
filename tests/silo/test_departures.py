import errno
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedrt.errors import FailureReason, StorageError
from fedrt.payload import CHUNK_BYTES, chunks, describe
from fedrt.session.frames import Drain, Frame, Heartbeat, Hello, PayloadChunk, TaskProgress, TaskReply, TaskResult
from fedrt.task import Failure, Result, Success
from silo import departures
from silo.departures import Departures

CLOCK = 1_700_000_000.1234


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def recorded(path: Path, frames: list[Frame]) -> list[dict]:
    departures = Departures(path, lambda: CLOCK)
    for frame in frames:
        departures.record(frame)
    departures.close()
    return read(path)


def result_frames(task_id: str, sizes: dict[str, int]) -> tuple[list[Frame], int]:
    """A result with its chunks, and the bytes of its tensors."""
    if not sizes:
        return [TaskResult(Result(task_id, Failure(FailureReason.INTERNAL, "no"), None))], 0
    manifest, data = describe(task_id, {name: np.ones(size, np.float32) for name, size in sizes.items()})
    result = TaskResult(Result(task_id, Success(10, {"loss": 0.5}, 1.0), manifest))
    return [result, *(PayloadChunk(chunk) for chunk in chunks(task_id, data))], manifest.byte_count


small = st.sampled_from([Hello("1"), TaskReply("t"), TaskProgress("t", 1, 2), Drain("bye", 1.0, False)])
sizes = st.dictionaries(
    st.sampled_from(["context", "global"]), st.sampled_from([1, 7, CHUNK_BYTES // 4, 200_000]), max_size=2
)


@given(st.lists(st.just(Heartbeat(0.0)) | small | sizes, max_size=12))
def test_the_lines_add_up_to_the_messages_that_left_and_name_every_tensor(
    tmp_path_factory: pytest.TempPathFactory, history: list
):
    frames, tensors = [], Counter()
    for index, entry in enumerate(history):
        if isinstance(entry, dict):
            more, _ = result_frames(f"t{index}", entry)
            frames += more
            for name, size in entry.items():
                tensors[name, size] += 1
        else:
            frames.append(entry)
    lines = recorded(tmp_path_factory.mktemp("d") / "departures.jsonl", frames)
    counted = Counter()
    for line in lines:
        counted[line["message"]] += line["count"]
        assert line["time"] == round(CLOCK, 3)
    assert counted == Counter(type(frame).__name__ for frame in frames)
    listed = Counter()
    for tensor in itertools.chain.from_iterable(line.get("tensors", []) for line in lines):
        assert tensor["type"] == "FLOAT32"
        assert tensor["bytes"] == 4 * tensor["shape"][0]
        listed[tensor["name"], tensor["shape"][0]] += 1
    assert listed == tensors


def test_a_line_says_what_left_and_holds_no_value_of_a_tensor(tmp_path: Path):
    frames, _ = result_frames("e/1/train/north", {"context": 100_000})
    assert recorded(tmp_path / "d", [Heartbeat(0.0), Heartbeat(1.0), *frames]) == [
        {"time": 1700000000.123, "message": "Heartbeat", "count": 2},
        {
            "time": 1700000000.123,
            "message": "TaskResult",
            "count": 1,
            "task": "e/1/train/north",
            "outcome": "Success",
            "example_count": 10,
            "metrics": {"loss": 0.5},
        },
        {
            "time": 1700000000.123,
            "message": "PayloadChunk",
            "count": 2,
            "task": "e/1/train/north",
            "tensors": [{"name": "context", "shape": [100000], "type": "FLOAT32", "bytes": 400000}],
            "sha256": frames[0].result.manifest.sha256.hex(),
        },
    ]


def test_every_line_is_on_disk_as_soon_as_the_message_has_left(tmp_path: Path):
    departures = Departures(tmp_path / "d")
    departures.record(TaskReply("t"))
    assert [line["message"] for line in read(tmp_path / "d")] == ["TaskReply"]
    departures.close()


def test_interleaved_payloads_are_told_apart(tmp_path: Path):
    one, _ = result_frames("one", {"context": 200_000})
    two, _ = result_frames("two", {"global": 200_000})
    mixed = [frame for pair in zip(one, two, strict=True) for frame in pair]
    lines = [line for line in recorded(tmp_path / "d", mixed) if line["message"] == "PayloadChunk"]
    assert [(line["task"], line["count"], line["tensors"][0]["name"]) for line in lines] == [
        ("one", 4, "context"),
        ("two", 4, "global"),
    ]


def test_chunks_of_a_payload_that_never_completed_are_counted_too(tmp_path: Path):
    frames, _ = result_frames("t", {"context": 200_000})
    lines = recorded(tmp_path / "d", frames[:3])  # the result and two of its four chunks
    counted = Counter()
    for line in lines:
        counted[line["message"]] += line["count"]
    assert counted == {"TaskResult": 1, "PayloadChunk": 2}


def test_a_payload_that_is_sent_again_after_a_loss_adds_up(tmp_path: Path):
    frames, _ = result_frames("t", {"context": 200_000})
    lines = recorded(tmp_path / "d", [*frames[:3], Hello("1"), *frames])
    counted = Counter()
    for line in lines:
        counted[line["message"]] += line["count"]
    assert counted == {"TaskResult": 2, "PayloadChunk": 6, "Hello": 1}


def test_the_record_is_ours_alone_and_is_continued(tmp_path: Path):
    path = tmp_path / "departures.jsonl"
    recorded(path, [TaskReply("t1")])
    recorded(path, [TaskReply("t2")])
    assert [line["task"] for line in read(path)] == ["t1", "t2"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(StorageError, match=str(tmp_path)):
        Departures(tmp_path)


def test_a_refusing_disk_is_told_once_and_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = Departures(tmp_path / "d", lambda: CLOCK)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with capture_logs() as logs:
        with monkeypatch.context() as patch:
            patch.setattr(departures, "append", full)
            for number in range(5):
                record.record(TaskReply(f"t{number}"))
        record.record(TaskReply("t5"))
    record.close()
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [
        ("error", "departures are kept in memory until the disk accepts writes"),
        ("info", "the disk accepts departures again, and has those kept in memory"),
    ]
    assert [line["task"] for line in read(tmp_path / "d")] == [f"t{number}" for number in range(6)]
