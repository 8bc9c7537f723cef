"""The worker against real child processes that crash, hang, run out of memory and lose their parent."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from structlog.testing import CapturingLogger

from fedrt.errors import ConfigurationError, ExitCode, FailureReason, WorkError
from fedrt.spec import LocalSpec, ModelSpec, TrainingSpec
from fedrt.task import TaskKind
from silo.sources import DataSource, ModelSource
from silo.work import WorkOrder
from silo.worker import ProcessWorker

ROOT = Path(__file__).parents[2]
FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
DATA = {"": DataSource("image_folder", Path("/nowhere"))}
SHARED = {"context": np.arange(6, dtype=np.float32).reshape(2, 3)}


def text(log: CapturingLogger) -> str:
    return "\n".join(map(str, log.calls))


def order(behaviour: str = "work", shared: dict[str, np.ndarray] = SHARED) -> WorkOrder:
    local = LocalSpec(behaviour, "{}", ModelSpec("fake", "0" * 64, 4, 8), ("a", "b"), TrainingSpec(), 5)
    private = {"own": np.float32([5])}
    return WorkOrder("task-1", "experiment-1", TaskKind.TRAIN, local, 1, 7, shared, private)


def quiet(done: int, planned: int) -> None:
    pass


@pytest.fixture
def log() -> CapturingLogger:
    return CapturingLogger()


@pytest.fixture
async def worker(log: CapturingLogger) -> AsyncIterator[ProcessWorker]:
    worker = ProcessWorker(ModelSource("fake", "here"), DATA, 1, log, FAKE)
    yield worker
    process_id = worker.process_id
    await worker.stop()
    assert process_id is None or not alive(process_id)


def alive(process_id: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    return False


async def until(condition: Callable[[], bool], limit: float = 10) -> None:
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 - what is waited for lives in another process
            await asyncio.sleep(0.01)


async def start_hanging(worker: ProcessWorker, behaviour: str = "hang") -> "asyncio.Task[object]":
    begun = asyncio.Event()
    task = asyncio.create_task(worker.run(order(behaviour), lambda done, planned: begun.set()))
    await asyncio.wait_for(begun.wait(), 10)
    return task


async def test_an_order_is_done_in_another_process(worker: ProcessWorker, log: CapturingLogger) -> None:
    report = await worker.describe()
    assert (report.architecture, report.example_count) == ("fake", 3)
    seen: list[tuple[int, int]] = []
    outcome = await worker.run(order(), lambda done, planned: seen.append((done, planned)))
    assert outcome.metrics["pid"] == worker.process_id != os.getpid()
    assert outcome.shared["context"].tolist() == (SHARED["context"] + 1).tolist()
    assert outcome.private["own"].tolist() == [5]
    assert seen == [(1, 2), (2, 2)]
    again = await worker.run(order(), quiet)
    assert again.metrics["pid"] == outcome.metrics["pid"]
    await worker.stop()
    assert ("info", ("worker",), {"line": "loaded"}) in log.calls
    assert ("info", ("worker",), {"line": "a line of a library"}) in log.calls


async def test_orders_wait_for_their_turn_and_large_tensors_pass(worker: ProcessWorker) -> None:
    large = {"weights": np.zeros(3_000_000, np.float32)}
    outcomes = await asyncio.gather(*(worker.run(order(shared=large), quiet) for _ in range(3)))
    assert all(outcome.shared["weights"].sum() == 3_000_000 for outcome in outcomes)
    assert len({outcome.metrics["pid"] for outcome in outcomes}) == 1


async def test_the_report_follows_what_the_work_finds(worker: ProcessWorker) -> None:
    assert (await worker.describe()).unreadable_count == 0
    await worker.run(order("unreadable"), quiet)
    report = await worker.describe()
    assert (report.unreadable_count, report.example_count) == (1, 2)


@pytest.mark.parametrize(
    ("behaviour", "reason", "words"),
    [
        ("work-error", FailureReason.NOT_FINITE, "the loss is not finite"),
        ("tensor-error", FailureReason.PAYLOAD_CORRUPT, "tensor 'context' is missing"),
    ],
)
async def test_a_failed_order_leaves_the_process_running(
    worker: ProcessWorker, behaviour: str, reason: FailureReason, words: str
) -> None:
    await worker.describe()
    process_id = worker.process_id
    with pytest.raises(WorkError, match=words) as caught:
        await worker.run(order(behaviour), quiet)
    assert caught.value.reason is reason
    assert (await worker.run(order(), quiet)).metrics["pid"] == process_id


@pytest.mark.parametrize(
    ("behaviour", "reason", "words"),
    [
        ("memory", FailureReason.OUT_OF_MEMORY, "memory ran out"),
        ("allocator", FailureReason.OUT_OF_MEMORY, "memory ran out"),
        ("bug", FailureReason.INTERNAL, "an unexpected KeyError"),
        ("exit", FailureReason.INTERNAL, "exit code 7"),
        ("segfault", FailureReason.INTERNAL, "signal 11"),
    ],
)
async def test_a_broken_process_is_replaced(
    worker: ProcessWorker, log: CapturingLogger, behaviour: str, reason: FailureReason, words: str
) -> None:
    await worker.describe()
    process_id = worker.process_id
    assert process_id is not None
    with pytest.raises(WorkError, match=words) as caught:
        await worker.run(order(behaviour), quiet)
    assert caught.value.reason is reason
    assert "jane" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not alive(process_id)
    assert (await worker.run(order(), quiet)).metrics["pid"] not in (process_id, os.getpid())
    if behaviour == "bug":
        assert "jane-doe" in text(log)  # the silo's own log holds the details
    if behaviour == "exit":
        assert "goodbye" in text(log)


async def test_a_traceback_has_the_level_of_the_error_that_it_explains(
    worker: ProcessWorker, log: CapturingLogger
) -> None:
    await worker.run(order("library"), quiet)
    with pytest.raises(WorkError):
        await worker.run(order("bug"), quiet)
    level_of = {fields["line"].strip(): level for level, _, fields in log.calls if "line" in fields}
    assert level_of["UserWarning: a line without a level"] == "info"
    assert level_of["unexpected failure"] == "error"
    assert level_of["Traceback (most recent call last):"] == "error"
    assert level_of["KeyError: '/data/patients/jane-doe.png'"] == "error"


@pytest.mark.parametrize(("ours", "theirs"), [(None, ":4096:8"), (":16:8", ":16:8")])
async def test_cublas_is_asked_for_a_fixed_order_unless_the_operator_says_otherwise(
    worker: ProcessWorker, log: CapturingLogger, monkeypatch: pytest.MonkeyPatch, ours: str | None, theirs: str
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if ours:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ours)
    await worker.run(order("environment"), quiet)
    await worker.stop()
    assert f"CUBLAS_WORKSPACE_CONFIG is {theirs}" in text(log)


async def test_kill_9_in_the_middle_is_an_out_of_memory_failure(worker: ProcessWorker) -> None:
    task = await start_hanging(worker)
    assert worker.process_id is not None
    os.kill(worker.process_id, signal.SIGKILL)
    with pytest.raises(WorkError, match=r"killed by signal 9, often the kernel's out-of-memory killer") as caught:
        await task
    assert caught.value.reason is FailureReason.OUT_OF_MEMORY
    assert (await worker.run(order(), quiet)).example_count == 3


async def test_a_death_between_two_orders_is_not_noticed_by_the_next(worker: ProcessWorker) -> None:
    await worker.describe()
    first = worker.process_id
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: not alive(first))
    await asyncio.sleep(0.2)
    assert (await worker.run(order(), quiet)).metrics["pid"] != first


async def test_the_report_can_be_had_while_the_child_works(worker: ProcessWorker) -> None:
    task = await start_hanging(worker)
    assert (await asyncio.wait_for(worker.describe(), 1)).architecture == "fake"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_ends_the_work_at_once(worker: ProcessWorker) -> None:
    task = await start_hanging(worker)
    process_id = worker.process_id
    assert process_id is not None
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 1
    assert not alive(process_id)
    assert (await worker.run(order(), quiet)).metrics["pid"] != process_id


@pytest.mark.parametrize("obstacle", ["ignores", "stopped"])
async def test_cancelling_kills_what_does_not_end(worker: ProcessWorker, obstacle: str) -> None:
    task = await start_hanging(worker, "stubborn" if obstacle == "ignores" else "hang")
    process_id = worker.process_id
    assert process_id is not None
    if obstacle == "stopped":
        os.kill(process_id, signal.SIGSTOP)
        await until(lambda: psutil.Process(process_id).status() == psutil.STATUS_STOPPED)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 1.5 < time.monotonic() - began < 4
    assert not alive(process_id)


async def test_cancelling_twice_kills_at_once(worker: ProcessWorker) -> None:
    task = await start_hanging(worker, "stubborn")
    process_id = worker.process_id
    assert process_id is not None
    task.cancel()
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(process_id), 1)
    assert worker.process_id is None
    await until(lambda: not worker._outputs, 1)


async def test_cancelling_one_that_waits_does_not_disturb_the_one_that_works(worker: ProcessWorker) -> None:
    working = await start_hanging(worker)
    process_id = worker.process_id
    waiting = asyncio.create_task(worker.run(order(), quiet))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert worker.process_id == process_id
    assert not working.done()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_stopping_in_the_middle_fails_the_order_as_cancelled(worker: ProcessWorker) -> None:
    task = await start_hanging(worker)
    await worker.stop()
    with pytest.raises(WorkError, match="stopped") as caught:
        await task
    assert caught.value.reason is FailureReason.CANCELLED
    await worker.stop()


async def test_a_configuration_error_is_for_the_operator_and_not_for_the_coordinator(
    log: CapturingLogger,
) -> None:
    worker = ProcessWorker(ModelSource("fake", "missing"), DATA, None, log, FAKE)
    with pytest.raises(ConfigurationError, match=r"model\.weights 'missing' does not exist; copy it there"):
        await worker.describe()
    with pytest.raises(WorkError, match="its log says why") as caught:
        await worker.run(order(), quiet)
    assert "missing" not in str(caught.value)
    assert "model.weights 'missing' does not exist" in text(log)
    assert worker.process_id is None


@pytest.mark.parametrize(("weights", "words"), [("crash", "exit code 3"), ("bug", "unexpected KeyError")])
async def test_a_child_that_dies_while_it_loads_is_a_work_error(log: CapturingLogger, weights: str, words: str) -> None:
    worker = ProcessWorker(ModelSource("fake", weights), DATA, None, log, FAKE)
    with pytest.raises(WorkError, match=words) as caught:
        await worker.describe()
    assert worker.process_id is None
    assert caught.value.exit_code is ExitCode.TEMPORARY  # not a bug of the daemon, which ends with it: start it again


@pytest.mark.parametrize(
    ("trouble", "reason", "words"),
    [
        ("mount", FailureReason.INTERNAL, "this silo's worker cannot load its model or data; its log says why"),
        ("device", FailureReason.INTERNAL, "an unexpected RuntimeError stopped the work; see the silo's log"),
        ("segfault", FailureReason.INTERNAL, "the worker process was killed by signal 11"),
        ("kill", FailureReason.OUT_OF_MEMORY, "the worker process was killed by signal 9"),
    ],
)
async def test_a_fresh_worker_that_cannot_load_fails_its_orders_until_the_cause_is_gone(
    tmp_path: Path, log: CapturingLogger, trouble: str, reason: FailureReason, words: str
) -> None:
    """A mount or a GPU that is gone when a worker is replaced, and comes back: no restart of the daemon is needed."""
    place = tmp_path / "trouble"
    worker = ProcessWorker(ModelSource("fake", f"trouble:{place}"), DATA, 1, log, FAKE)
    try:
        first = (await worker.run(order(), quiet)).metrics["pid"]
        with pytest.raises(WorkError):
            await worker.run(order("segfault"), quiet)
        place.write_text(trouble)
        for _ in range(2):
            with pytest.raises(WorkError, match=words) as found:
                await worker.run(order(), quiet)
            assert found.value.reason is reason
            assert str(tmp_path) not in str(found.value)
            assert worker.process_id is None
        place.unlink()
        assert (await worker.run(order(), quiet)).metrics["pid"] != first
    finally:
        await worker.stop()


async def test_a_program_that_does_not_exist_is_a_work_error(log: CapturingLogger) -> None:
    worker = ProcessWorker(ModelSource("fake", "here"), DATA, None, log, ("/does/not/exist",))
    with pytest.raises(WorkError, match="could not be started"):
        await worker.describe()


PARENT = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from test_worker import FAKE, DATA, CapturingLogger, ModelSource, ProcessWorker, order
async def main():
    worker = ProcessWorker(ModelSource("fake", "here"), DATA, 1, CapturingLogger(), FAKE)
    await worker.describe()
    print(worker.process_id, flush=True)
    await worker.run(order("hang"), lambda done, planned: print("begun", flush=True))
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_the_child_ends_with_its_parent(number: signal.Signals) -> None:
    code = PARENT.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220 - brief
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "begun\n"
        assert alive(child)
        parent.send_signal(number)
        parent.wait(5)
        await until(lambda: not alive(child), 2)


async def test_the_end_of_the_stream_alone_ends_the_child(worker: ProcessWorker) -> None:
    """Where the kernel does not tell of a parent's death, a child deep in its work must still see it."""
    task = await start_hanging(worker)
    process_id = worker.process_id
    assert process_id is not None
    assert worker._child is not None
    worker._child.writer.close()
    await until(lambda: not alive(process_id), 2)
    with pytest.raises(WorkError):
        await task


async def test_an_interrupt_does_not_end_the_child(worker: ProcessWorker) -> None:
    await worker.describe()
    process_id = worker.process_id
    assert process_id is not None
    os.kill(process_id, signal.SIGINT)
    assert os.getpgid(process_id) != os.getpgid(0)
    assert (await worker.run(order(), quiet)).metrics["pid"] == process_id
