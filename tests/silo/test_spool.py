import errno
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from structlog.testing import capture_logs

from fedrt.errors import FailureReason, StorageError, WorkError
from fedrt.payload import unpack
from fedrt.session.frames import TaskResult
from fedrt.task import Failure, Success, TaskKind
from fedrt.tensors import Scope, TensorSpec, of_scope
from fedrt.wire import request_to_pb
from silo.departures import check_release
from silo.spool import Spool, Spooled
from silo.tensor_files import write_tensors

names = st.sampled_from(["context", "global", "local", "own", "head_0"])
tensors = st.dictionaries(
    names, hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1, 1, width=32))
)
finite = st.floats(allow_nan=False, allow_infinity=False)
outcomes = st.builds(
    Success, st.integers(0, 2**64 - 1), st.dictionaries(st.text(max_size=9), finite, max_size=3), st.floats(0, 1e9)
) | st.builds(Failure, st.sampled_from(FailureReason), st.text(max_size=50))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@st.composite
def results(draw: st.DrawFn) -> Spooled:
    return Spooled(
        task_id=draw(texts),
        experiment_id=draw(texts),
        round_number=draw(st.integers(0, 2**32 - 1)),
        kind=draw(st.sampled_from(TaskKind)),
        outcome=draw(outcomes),
        shared=draw(tensors),
        private=draw(tensors),
    )


def sample(task_id: str = "e/1/train/north", value: float = 1.0, size: int = 8) -> Spooled:
    array = np.full(size, value, np.float32)
    return Spooled(task_id, "e", 1, TaskKind.TRAIN, Success(10, {"loss": 0.5}, 1.5), {"context": array}, {"own": array})


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


@given(results())
def test_what_is_put_is_loaded_by_the_next_run(tmp_path_factory: pytest.TempPathFactory, result: Spooled):
    directory = tmp_path_factory.mktemp("spool")
    Spool(directory).put(result)
    (loaded,) = Spool(directory).load()
    assert (loaded.task_id, loaded.experiment_id, loaded.round_number, loaded.kind, loaded.outcome) == (
        result.task_id,
        result.experiment_id,
        result.round_number,
        result.kind,
        result.outcome,
    )
    assert same(loaded.shared, result.shared)
    assert same(loaded.private, result.private)


def test_results_are_loaded_oldest_first(tmp_path: Path):
    spool = Spool(tmp_path)
    for index in (3, 1, 2):
        spool.put(sample(f"t{index}"))
        path = max(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(path, ns=(index_time := 10**9 * len(list(tmp_path.iterdir())), index_time))
    assert [result.task_id for result in spool.load()] == ["t3", "t1", "t2"]


def test_putting_a_task_again_replaces_it_and_removing_forgets_it(tmp_path: Path):
    spool = Spool(tmp_path)
    spool.put(sample(value=1))
    spool.put(sample(value=2))
    assert [result.shared["context"][0] for result in spool.load()] == [2]
    assert spool.size()[0] == 1
    assert spool.size()[1] == sum(file.stat().st_size for file in tmp_path.iterdir())
    spool.remove("e/1/train/north")
    spool.remove("e/1/train/north")
    assert spool.load() == []
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_ours_alone_and_their_names_say_nothing(tmp_path: Path):
    Spool(tmp_path / "spool").put(sample("../../etc/passwd"))
    (file,) = (tmp_path / "spool").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert "passwd" not in file.name


def damage(content: bytes, kind: str) -> bytes:
    match kind:
        case "cut off":
            return content[: len(content) // 2]
        case "empty":
            return b""
        case "garbage":
            return b"\xff" * len(content)
        case "a flipped bit":
            return content[:-1] + bytes([content[-1] ^ 1])
        case "no record":
            return safetensors.numpy.save({"shared/context": np.ones(1, np.float32)})
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind", ["cut off", "empty", "garbage", "a flipped bit", "no record", "a record of another version"]
)
def test_a_damaged_file_is_set_aside_and_the_others_are_loaded(tmp_path: Path, kind: str):
    spool = Spool(tmp_path)
    spool.put(sample())
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    if kind == "a record of another version":
        write_tensors(file, {}, {"task_id": "e/1/train/north", "kind": "trein"})
    else:
        file.write_bytes(damage(before, kind))
    content = file.read_bytes()
    assert content != before
    spool.put(sample("other"))
    with capture_logs() as logs:
        assert [result.task_id for result in spool.load()] == ["other"]
    aside = Path(f"{file}.damaged")
    assert aside.read_bytes() == content
    assert [(entry["event"], entry["kept_as"]) for entry in logs] == [("damaged result set aside", str(aside))]
    assert logs[0]["log_level"] == "error"
    assert f"'{file}' is damaged" in logs[0]["reason"]
    assert "computed again" in logs[0]["meaning"]
    assert spool.size()[0] == 1
    with capture_logs() as logs:
        assert len(Spool(tmp_path).load()) == 1
    assert logs == []  # told once
    spool.put(sample())
    assert len(spool.load()) == 2


def test_a_damaged_file_that_cannot_be_set_aside_is_left_out_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spool = Spool(tmp_path)
    spool.put(sample())
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"")

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with capture_logs() as logs, monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert spool.load() == []
    assert [entry["event"] for entry in logs] == ["damaged result left where it is"]
    assert "read-only" in logs[0]["refusal"]
    assert file.exists()


@pytest.mark.parametrize("call", ["load", "size"])
def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    spool = Spool(tmp_path)
    spool.put(sample())

    def refuse(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match="permission denied"):
        getattr(spool, call)()


def test_a_full_disk_leaves_the_earlier_result_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spool = Spool(tmp_path)
    spool.put(sample(value=1))

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full; free space and try again"):
            spool.put(sample(value=2))
    assert [result.shared["context"][0] for result in spool.load()] == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_write_left_behind_is_cleared_away_at_the_next_start(tmp_path: Path):
    spool = Spool(tmp_path)
    spool.put(sample())
    (file,) = tmp_path.iterdir()
    leftover = tmp_path / f".{file.name}.0badcafe.new"
    leftover.write_bytes(file.read_bytes()[:-7])
    reopened = Spool(tmp_path)
    assert [result.task_id for result in reopened.load()] == ["e/1/train/north"]
    assert reopened.size()[0] == 1
    assert not leftover.exists()


# ---- the one property that the whole project rests on

specs = st.lists(
    st.builds(TensorSpec, names, st.lists(st.integers(1, 3), max_size=2).map(tuple), st.sampled_from(Scope)),
    max_size=4,
    unique_by=lambda spec: spec.name,
)


@given(results())
def test_a_private_tensor_is_not_part_of_what_is_sent(result: Spooled):
    sent, data = result.to_send
    assert (
        {header.name for header in sent.manifest.tensors} == set(result.shared) if result.shared else not sent.manifest
    )
    assert (data is None) == (not result.shared)
    if data is not None:
        assert same(unpack(sent.manifest.tensors, data), {name: np.asarray(a) for name, a in result.shared.items()})


@given(specs, st.data())
def test_whatever_a_worker_returns_only_exactly_the_shared_tensors_are_released(
    declared: list[TensorSpec], data: st.DataObject
):
    pool = {
        spec.name: data.draw(
            st.sampled_from(
                [
                    np.zeros(spec.shape, np.float32),
                    np.zeros((*spec.shape, 2), np.float32),
                    np.zeros(spec.shape, np.float64),
                    np.full(spec.shape, np.nan, np.float32),
                ]
            )
        )
        for spec in declared
    }
    returned = {name: pool.get(name, np.zeros(1, np.float32)) for name in data.draw(st.sets(names))}
    shared = {spec.name: spec for spec in of_scope(declared, Scope.SHARED)}
    sound = returned.keys() == shared.keys() and all(
        array.shape == shared[name].shape and array.dtype == np.float32 and np.isfinite(array).all()
        for name, array in returned.items()
    )
    if not sound:
        with pytest.raises(WorkError, match=r"^tensor ") as refused:
            check_release(declared, returned)
        assert refused.value.reason in (FailureReason.INTERNAL, FailureReason.NOT_FINITE)
        return
    check_release(declared, returned)
    private = {spec.name: np.full(spec.shape, 7.25, np.float32) for spec in of_scope(declared, Scope.PRIVATE)}
    outcome = Spooled("t", "e", 1, TaskKind.TRAIN, Success(1, {}, 0.0), returned, private)
    result, body = outcome.to_send
    wire = request_to_pb(TaskResult(result)).SerializeToString() + (bytes(body) if body is not None else b"")
    for name, array in private.items():
        assert name.encode() not in wire
        assert array.tobytes() not in wire
