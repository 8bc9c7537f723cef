"""The frames between daemon and worker: round trips, and what happens to bytes that are not frames."""

import asyncio
import json
import math
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrt.errors import FailureReason, RemoteProtocolError
from fedrt.spec import LocalSpec, ModelSpec, OptimizerName, OptimizerSpec, Precision, Schedule, TrainingSpec
from fedrt.task import TaskKind
from silo.sources import DataSource, FeatureSource, ModelSource
from silo.work import WorkerReport, WorkOrder, WorkOutcome
from silo.worker_frames import (
    Failed,
    Frame,
    Load,
    Misconfigured,
    Progress,
    Ready,
    build,
    encode,
    parse_header,
    receive,
    receive_async,
    send,
    send_async,
)

LOCAL = LocalSpec(
    "promptfl",
    '{"context_length":2}',
    ModelSpec("ViT-B-16", "ab" * 32, 512, 512),
    ("melanoma", "naevus – benign"),
    TrainingSpec(3, 7, OptimizerSpec(OptimizerName.ADAMW, 0.1, 0.9, 1e-17), Schedule.COSINE, Precision.BF16),
    25,
)


def order(**tensors: np.ndarray) -> WorkOrder:
    private = {"own": np.full((2, 1), 7, np.float32)}
    return WorkOrder("t1", "e1", TaskKind.TRAIN, LOCAL, 3, 2**63 - 1, tensors, private)


FRAMES: list[Frame] = [
    Load(
        ModelSource("ViT-B-16", "/opt/w.safetensors", "cuda:0"),
        {
            "north": DataSource("manifest", Path("/d"), Path("/d/m.csv"), 0.1, {"mel": "melanoma"}, 0.3),
            "south": DataSource("image_folder", Path("/e")),
        },
        2,
    ),
    Load(ModelSource("a", "b"), {"": DataSource("image_folder", Path("/d"))}, None),
    Load(
        ModelSource("a", "b"),
        {"": DataSource("image_folder", Path("/d"))},
        None,
        FeatureSource(Path("/f"), 2**40, "float16"),
    ),
    Ready(WorkerReport("a", "00", 4, 8, "cpu", 2**40, {"train": {"x": 1}, "test": {}}, 3, ("promptfl",))),
    Misconfigured('wrong "quotes"\n'),
    Progress(3, 0),
    Failed(FailureReason.OUT_OF_MEMORY, "memory ran out", True),
]


def bytes_of(frame: Frame) -> bytes:
    return b"".join(bytes(piece) for piece in encode(frame))


def through_socket(data: bytes) -> Frame | None:
    ours, theirs = socket.socketpair()
    writer = threading.Thread(target=lambda: (ours.sendall(data), ours.close()))
    writer.start()
    with theirs:
        try:
            return receive(theirs)
        finally:
            theirs.close()
            writer.join()


async def through_stream(data: bytes) -> Frame | None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await receive_async(reader)


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
async def test_a_frame_without_tensors_comes_back_equal(frame: Frame) -> None:
    assert through_socket(bytes_of(frame)) == frame
    assert await through_stream(bytes_of(frame)) == frame


shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), shapes, max_size=4), st.randoms())
def test_tensors_come_back_with_the_same_bits(declared: dict[str, tuple[int, ...]], random: object) -> None:
    generator = np.random.default_rng(len(declared))
    shared = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in declared.items()}
    found = through_socket(bytes_of(order(**shared)))
    assert isinstance(found, WorkOrder)
    assert {**vars(found), "shared": 0, "private": 0} == {**vars(order()), "shared": 0, "private": 0}
    assert set(found.shared) == set(shared)
    for name, array in shared.items():
        assert found.shared[name].shape == array.shape
        assert found.shared[name].tobytes() == array.tobytes()
    assert found.private["own"].tolist() == [[7], [7]]


async def test_metrics_keep_every_bit_even_where_they_are_not_finite() -> None:
    outcome = WorkOutcome({"x": np.float32([1])}, {}, 5, {"loss": math.nan, "rate": 0.1 + 0.2, "inf": math.inf}, 1e-9)
    found = await through_stream(bytes_of(outcome))
    assert isinstance(found, WorkOutcome)
    assert math.isnan(found.metrics["loss"])
    assert (found.metrics["rate"], found.metrics["inf"], found.duration) == (0.1 + 0.2, math.inf, 1e-9)


async def test_frames_follow_each_other_in_both_kinds_of_stream() -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    large = order(weights=np.arange(300_000, dtype=np.float32))

    def echo() -> None:
        with theirs:
            while (frame := receive(theirs)) is not None:
                send(theirs, frame)

    thread = threading.Thread(target=echo)
    thread.start()
    sending = asyncio.create_task(send_async(writer, large))
    back = await receive_async(reader)
    await sending
    await send_async(writer, Progress(1, 2))
    assert isinstance(back, WorkOrder)
    assert back.shared["weights"].tobytes() == large.shared["weights"].tobytes()
    assert await receive_async(reader) == Progress(1, 2)
    writer.close()
    await asyncio.to_thread(thread.join)


async def test_an_end_between_frames_is_none() -> None:
    assert through_socket(b"") is None
    assert await through_stream(b"") is None


async def test_every_truncation_is_refused() -> None:
    whole = bytes_of(order(x=np.float32([1, 2])))
    for length in (1, 3, 4, 5, len(whole) // 2, len(whole) - 1):
        with pytest.raises(RemoteProtocolError, match="cut off"):
            through_socket(whole[:length])
        with pytest.raises(RemoteProtocolError, match="cut off"):
            await through_stream(whole[:length])


async def test_an_oversize_header_is_refused_before_it_is_read() -> None:
    for data in (struct.pack(">I", (64 << 20) + 1), b"\xff\xff\xff\xff"):
        with pytest.raises(RemoteProtocolError, match="allowed are 64 MiB"):
            through_socket(data)
        with pytest.raises(RemoteProtocolError, match="allowed are 64 MiB"):
            await through_stream(data)


def header_of(frame: Frame) -> dict:
    return json.loads(encode(frame)[1])


def test_an_oversize_payload_is_refused_before_it_is_read() -> None:
    header = header_of(order(x=np.float32([1])))
    header["tensors"]["shared"] = [["x", "<f4", [1 << 31]]]
    with pytest.raises(RemoteProtocolError, match="allowed are 4 GiB"):
        parse_header(json.dumps(header).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(frame="Shell"),
        lambda header: header.pop("fields"),
        lambda header: header["fields"].pop("seed"),
        lambda header: header["fields"].update(extra=1),
        lambda header: header["tensors"].pop("private"),
        lambda header: header["tensors"].update(shared=[["x", "|O8", [1]]]),
        lambda header: header["tensors"].update(shared=[["x", "<f4", [-1]]]),
        lambda header: header["tensors"].update(shared=7),
    ],
)
def test_a_malformed_header_is_refused(change: object) -> None:
    header = header_of(order(x=np.float32([1])))
    change(header)  # type: ignore[operator]
    with pytest.raises(RemoteProtocolError):
        parse_header(json.dumps(header).encode())


def test_wrong_values_are_refused() -> None:
    header = header_of(Progress(1, 2))
    header["fields"]["done"] = "many"
    with pytest.raises(RemoteProtocolError, match="wrong values"):
        build(parse_header(json.dumps(header).encode()), b"")
    header = header_of(order())
    header["fields"]["local"]["classes"] = []
    payload = np.full((2, 1), 7, np.float32).tobytes()
    with pytest.raises(RemoteProtocolError, match="classes holds 0 names"):
        build(parse_header(json.dumps(header).encode()), payload)


def test_neither_json_nor_a_frame_is_refused() -> None:
    for text in (b"{", b"[]", b"\xff\xfe", b'{"frame": []}', b"null"):
        with pytest.raises(RemoteProtocolError):
            parse_header(text)


def test_the_daemon_side_imports_neither_torch_nor_pillow() -> None:
    code = (
        "import sys, silo.worker, silo.worker_frames, silo.work, silo.sources, silo.data, silo.data.labels;"
        "print([name for name in ('torch', 'open_clip', 'PIL') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
