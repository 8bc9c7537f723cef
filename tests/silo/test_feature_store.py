"""The store of features: what is found is what was written, whoever writes and whatever happens to the files."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fedrt.errors import ConfigurationError, StorageError
from silo.feature_store import (
    Contents,
    FeatureKind,
    FeatureStore,
    KeptRows,
    Row,
    RowKey,
    Shelf,
    clear,
    map_in_parts,
    row_key,
    summarize,
)
from silo.feature_store import contents as contents_module
from silo.feature_store import records as records_module
from silo.feature_store import segments as segments_module
from silo.feature_store import shelf as shelf_module
from silo.feature_store.records import RecordWriter, lock_file, read_records, sealed, valid
from silo.feature_store.room import NoRoom, segment_bytes

KIND = FeatureKind("ViT-B-16", False, "ab" * 32, "cd" * 32, "cpu", patches=False, element_type="float32")
MIB = 1 << 20


def key(number: int, view: int = 0) -> RowKey:
    return row_key(hashlib.sha256(str(number).encode()).digest(), view)


def row(number: int, width: int = 4) -> Row:
    return np.random.default_rng(number).standard_normal((1, width)).astype(np.float32)


def rows(*numbers: int, width: int = 4) -> dict[RowKey, Row]:
    return {key(number): row(number, width) for number in numbers}


def agree(found: dict[RowKey, Row], expected: dict[RowKey, Row]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[one], expected[one]) for one in found)


@contextlib.contextmanager
def opened(directory: Path, kind: FeatureKind = KIND, max_bytes: int = 64 * MIB) -> Iterator[Shelf]:
    """As a process of its own has it: locks belong to open files, not to processes."""
    store = FeatureStore(directory, max_bytes)
    yield store.shelf(kind)
    store.close()


def files(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.glob(f"*/*.{suffix}"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "features"


def test_another_process_finds_what_was_saved(place: Path) -> None:
    with opened(place) as shelf:
        waiting = rows(1, 2, 3)
        shelf.save(waiting)
        assert waiting == {}
        with opened(place) as other:
            assert agree(other.find([key(1), key(3), key(4)]), rows(1, 3))
    with opened(place) as later:
        assert agree(later.find([key(2)]), rows(2))


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "ViT-B-32"},
        {"quick_gelu": True},
        {"weights_sha256": "00" * 32},
        {"preprocessing": "00" * 32},
        {"device": "cuda"},
        {"patches": True},
        {"element_type": "float16"},
    ],
    ids=str,
)
def test_what_was_computed_otherwise_is_not_found(place: Path, change: dict[str, object]) -> None:
    with opened(place) as shelf:
        shelf.save(rows(1))
    with opened(place, dataclasses.replace(KIND, **change)) as other:  # type: ignore[arg-type]
        assert other.find([key(1)]) == {}


def test_views_of_an_image_are_rows_of_their_own(place: Path) -> None:
    with opened(place) as shelf:
        shelf.save({key(1, view): row(view) for view in (0, 1, 7)})
        found = shelf.find([key(1, view) for view in range(9)])
    assert agree(found, {key(1, view): row(view) for view in (0, 1, 7)})


def test_half_precision_takes_half_the_space(place: Path) -> None:
    kind = dataclasses.replace(KIND, element_type="float16")
    half = row(1).astype(np.float16)
    with opened(place, kind) as shelf:
        shelf.save({key(1): half})
        found = shelf.find([key(1)])[key(1)]
    assert found.dtype == np.float16
    assert np.array_equal(found, half)
    assert files(place, "rows")[0].stat().st_size == 8


def test_only_the_owner_may_look(place: Path) -> None:
    before = os.umask(0)
    try:
        with opened(place) as shelf:
            shelf.save(rows(1))
    finally:
        os.umask(before)
    for path in [place, *place.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_next_process_goes_on_in_the_same_segment(place: Path) -> None:
    for number in range(3):
        with opened(place) as shelf:
            shelf.save(rows(number))
    assert len(files(place, "keys")) == 1
    with opened(place) as shelf:
        assert agree(shelf.find([key(0), key(1), key(2)]), rows(0, 1, 2))


def test_processes_that_write_at_once_have_segments_of_their_own_and_copies_do_no_harm(place: Path) -> None:
    with opened(place) as one, opened(place) as other:
        one.save(rows(1, 2))
        other.save(rows(2, 3))
        one.save(rows(4))
        assert agree(one.find([key(n) for n in range(9)]), rows(1, 2, 3, 4))
        assert agree(other.find([key(n) for n in range(9)]), rows(1, 2, 3, 4))
    assert len(files(place, "keys")) == 2


def test_rows_found_before_stay_when_the_segment_grows(place: Path) -> None:
    with opened(place) as shelf:
        shelf.save(rows(1))
        before = shelf.find([key(1)])
        shelf.save(rows(2))
        assert agree(shelf.find([key(1), key(2)]), rows(1, 2))
        assert agree(before, rows(1))


@pytest.mark.parametrize("written", [48, 96, 110])
def test_rows_with_a_record_stay_when_the_disk_refuses_the_rest(
    place: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Another process may have mapped them: it would be killed where they are cut off, and misled where replaced."""
    with opened(place) as shelf, opened(place) as reader:
        shelf.save(rows(1))
        keys_path = files(place, "keys")[0]

        def refuse(descriptor: int, content: memoryview, at: int) -> None:
            os.pwrite(descriptor, content[:written], at)
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(records_module, "write_all", refuse)
        with pytest.raises(StorageError, match="the disk is full"):
            shelf.save(rows(2, 3, 4))
        monkeypatch.undo()
        before = reader.find([key(n) for n in range(9)])
        assert agree(before, rows(*range(1, 2 + written // 48)))
        shelf.save(rows(5, 6, 7))
        assert agree(before, rows(*range(1, 2 + written // 48)))
        assert agree(reader.find([key(n) for n in range(5, 9)]), rows(5, 6, 7))
        assert valid(read_records(keys_path, 12)).all()


def test_a_long_part_is_written_in_pieces_of_which_those_that_fit_are_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "WRITTEN_AT_ONCE", 2 * 16)
    waiting = rows(*range(7))
    writes: list[int] = []

    def write_some(descriptor: int, content: memoryview, at: int) -> None:
        writes.append(len(content))
        if at >= 4 * 16:
            raise OSError(errno.ENOSPC, "full")
        os.pwrite(descriptor, content, at)

    with opened(place) as shelf:
        monkeypatch.setattr(segments_module, "write_all", write_some)
        with pytest.raises(StorageError, match="the disk is full"):
            shelf.save(waiting)
        assert waiting.keys() == rows(4, 5, 6).keys()
        assert writes == [32, 32, 32]
        monkeypatch.undo()
        shelf.save(waiting)
        assert agree(shelf.find(rows(*range(7))), rows(*range(7)))


def test_threads_are_given_some_of_many_files_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "MAPPED_AT_ONCE", 3)
    with ThreadPoolExecutor(1) as pool:
        assert list(map_in_parts(pool, str, [])) == []
        given: list[int] = []
        results = map_in_parts(pool, given.append, range(8))
        next(results)
        pool.submit(int).result()  # the one thread is through with all that it was given
        assert given == [0, 1, 2]
        assert len(list(results)) == 7
    assert given == list(range(8))


def damaged_copy(place: Path, suffix: str, content: bytes) -> Path:
    """The store once more, with other content in its only file of that kind."""
    copy = place.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)
    files(copy, suffix)[0].write_bytes(content)
    return copy


@pytest.mark.parametrize("suffix", ["rows", "keys"])
def test_no_flipped_byte_is_served_and_what_it_cost_is_saved_again(place: Path, suffix: str) -> None:
    expected = rows(1, 2, 3)
    with opened(place) as shelf:
        shelf.save(dict(expected))
    whole = files(place, suffix)[0].read_bytes()
    for at in range(0, len(whole), 3):
        copy = damaged_copy(place, suffix, whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with opened(copy) as shelf:
            found = shelf.find(expected)
            assert len(found) < 3
            assert all(np.array_equal(value, expected[one]) for one, value in found.items())
            shelf.save({one: value for one, value in expected.items() if one not in found})
            assert agree(shelf.find(expected), expected)


@pytest.mark.parametrize("suffix", ["rows", "keys"])
def test_a_file_of_any_length_gives_whole_rows_only(place: Path, suffix: str) -> None:
    expected = rows(1, 2, 3)
    with opened(place) as shelf:
        shelf.save(dict(expected))
    whole = files(place, suffix)[0].read_bytes()
    for length in range(0, len(whole), 11):
        copy = damaged_copy(place, suffix, whole[:length])
        with opened(copy) as shelf:
            found = shelf.find(expected)
            assert len(found) == max(0, length // (16 if suffix == "rows" else 48) - (suffix == "keys"))
            shelf.save({one: value for one, value in expected.items() if one not in found})
        with opened(copy) as shelf:
            assert agree(shelf.find(expected), expected)


@pytest.mark.parametrize("suffix", ["rows", "keys"])
def test_a_segment_that_lacks_a_file_is_cleared(place: Path, suffix: str) -> None:
    with opened(place) as shelf:
        shelf.save(rows(1))
    files(place, suffix)[0].unlink()
    with opened(place) as shelf:
        assert shelf.find([key(1)]) == {}
        if suffix == "keys":
            assert files(place, "rows") == []
        shelf.save(rows(1))
        assert agree(shelf.find([key(1)]), rows(1))


def test_zeros_left_by_a_crash_are_no_record() -> None:
    assert not valid(np.zeros((3, 12), np.uint32)).any()
    records = sealed(np.arange(22, dtype=np.uint32).reshape(2, 11))
    assert valid(records).all()
    records[1, 4] += 1
    assert valid(records).tolist() == [True, False]


def test_a_record_that_was_cut_off_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(sealed(np.ones((1, 3), np.uint32)).tobytes() + b"torn")
    descriptor = lock_file(path, os.O_RDWR, "exclusive")
    assert descriptor is not None
    assert lock_file(path, os.O_RDWR, "exclusive") is None
    RecordWriter(descriptor, 4).append(np.full((1, 3), 2, np.uint32))
    os.close(descriptor)
    records = read_records(path, 4)
    assert valid(records).all()
    assert records[:, 0].tolist() == [1, 2]


WIDE = 1 << 16  # a row of a quarter of a MiB: three fit into a segment with their records, or four by size alone


def segments_of(place: Path, *numbers: int) -> None:
    """A segment of four rows for each number, the first one used least recently."""
    for number in numbers:
        with opened(place, max_bytes=4 * MIB) as shelf:
            shelf.save(rows(*range(10 * number, 10 * number + 4), width=WIDE))
    for age, path in enumerate(sorted(files(place, "keys"), key=lambda one: one.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))


def held(shelf: Shelf, number: int) -> int:
    return len(shelf.find([key(n) for n in range(10 * number, 10 * number + 4)]))


def test_the_least_recently_used_segment_makes_room(place: Path) -> None:
    assert segment_bytes(4 * MIB) == MIB
    segments_of(place, 1, 2, 3)
    with opened(place, max_bytes=4 * MIB) as shelf:
        assert held(shelf, 1) == 4  # now the segment that was used last
    segments = files(place, "keys")
    with opened(place, max_bytes=4 * MIB) as shelf:
        shelf.save(rows(90, width=WIDE))
    assert len(set(segments) - set(files(place, "keys"))) == 1
    with opened(place, max_bytes=64 * MIB) as shelf:
        assert [held(shelf, number) for number in (1, 2, 3)] == [4, 0, 4]
        assert agree(shelf.find([key(90)]), rows(90, width=WIDE))


def test_segments_in_use_stay_and_a_full_store_says_what_to_do(place: Path) -> None:
    segments_of(place, 1, 2, 3)
    with opened(place, max_bytes=64 * MIB) as user:
        found = {number: user.find([key(10 * number)]) for number in (1, 2, 3)}
        waiting = rows(90, 91, width=WIDE)
        with opened(place, max_bytes=3 * MIB) as shelf:
            with pytest.raises(NoRoom, match=r"may hold 3MiB, and all of that is in use; raise features\.max_size"):
                shelf.save(waiting)
            assert len(waiting) == 2
            assert sum(path.stat().st_size for path in files(place, "rows")) == 3 * MIB
        assert all(agree(one, rows(10 * number, width=WIDE)) for number, one in found.items())
    del found
    with opened(place, max_bytes=3 * MIB) as shelf:
        shelf.save(waiting)
        assert waiting == {}


def test_rows_that_are_mapped_outlive_their_files(place: Path) -> None:
    with opened(place) as shelf:
        shelf.save(rows(1))
        found = shelf.find([key(1)])
    shutil.rmtree(place)
    assert agree(found, rows(1))


def test_a_smaller_bound_holds_from_the_next_start(place: Path) -> None:
    segments_of(place, 1, 2, 3)
    FeatureStore(place, 2 * MIB).open()
    assert sum(path.stat().st_size for path in place.rglob("*.*s")) <= 2 * MIB
    assert len(files(place, "keys")) == 1


def test_another_version_and_another_programs_directory_are_refused(place: Path) -> None:
    with opened(place) as shelf:
        shelf.save(rows(1))
    (place / "version").write_text("fedrt features 2\n")
    with pytest.raises(ConfigurationError, match=r"by a newer fedrt \(format 2, known is 1\); upgrade fedrt"):
        FeatureStore(place, MIB).open()
    for text in ("hello\n", "\xff"):
        (place / "version").write_text(text, encoding="latin-1")
        with pytest.raises(ConfigurationError, match="holds something else than a store of features"):
            FeatureStore(place, MIB).open()
    (place / "version").unlink()
    with opened(place) as shelf:  # all but the version is a store's
        assert agree(shelf.find([key(1)]), rows(1))
    foreign = place.with_name("foreign")
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ConfigurationError, match="set another directory, or empty this one"):
        FeatureStore(foreign, MIB).open()


def test_a_path_that_is_no_directory_is_a_matter_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "features"):
        with pytest.raises(StorageError, match="file"):
            FeatureStore(place, MIB).open()


def test_a_damaged_description_is_written_anew(place: Path) -> None:
    with opened(place) as shelf:
        shelf.save(rows(1))
    (description,) = place.glob("*/kind.json")
    description.write_text("{")
    assert summarize(place)[0].kind is None
    with opened(place) as shelf:
        assert agree(shelf.find([key(1)]), rows(1))
    assert json.loads(description.read_text())["architecture"] == "ViT-B-16"


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A directory that we may read and not write."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    try:
        yield place
    finally:
        os.seteuid(0)
        shutil.rmtree(place)


def test_a_store_that_may_only_be_read_is_read(as_nobody: Path) -> None:
    place = as_nobody / "features"
    with opened(place) as shelf:
        shelf.save(rows(1))
    for path in [place, *place.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    os.seteuid(65534)
    with opened(place) as shelf:
        assert agree(shelf.find([key(1)]), rows(1))
        with pytest.raises(StorageError, match="belongs to user 0, not to us"):
            shelf.save(rows(2))
    with pytest.raises(StorageError, match="permission denied"):
        FeatureStore(as_nobody / "new", MIB).open()


@pytest.fixture
def of_nobody(as_nobody: Path) -> Path:
    """A store with one row that belongs to another user, while we are root."""
    as_nobody.chmod(0o777)
    os.seteuid(65534)
    with opened(as_nobody / "features") as shelf:
        shelf.save(rows(1))
    os.seteuid(0)
    return as_nobody / "features"


def test_root_leaves_nothing_in_another_users_store(of_nobody: Path, tmp_path: Path) -> None:
    """The daemon that the store belongs to could not read it."""
    before = sorted(of_nobody.rglob("*"))
    (tmp_path / "image").touch()
    os.utime(tmp_path / "image", (1000, 1000))
    with opened(of_nobody) as shelf:
        assert agree(shelf.find([key(1)]), rows(1))
        with pytest.raises(StorageError, match=r"belongs to user 65534, not to us \(0\); run this as that user"):
            shelf.save(rows(2))
    with pytest.raises(StorageError, match="belongs to user 65534"):
        FeatureStore(of_nobody, MIB).shelf(dataclasses.replace(KIND, patches=True))
    with pytest.raises(StorageError, match="belongs to user 65534"):
        clear(of_nobody)
    contents = Contents(of_nobody / "contents", now=lambda: 2**62)
    contents.digests([tmp_path / "image"], lambda: None)
    assert sorted(of_nobody.rglob("*")) == before


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_segment_that_another_user_has_left_is_passed_over(of_nobody: Path, mode: int) -> None:
    os.seteuid(65534)
    with opened(of_nobody) as one, opened(of_nobody) as other:
        one.save(rows(2))
        other.save(rows(3))
    os.seteuid(0)
    for path in of_nobody.glob("*/*.*s"):
        if path.stem == files(of_nobody, "keys")[0].stem:
            os.chown(path, 0, 0)
            path.chmod(mode)
    os.seteuid(65534)
    with opened(of_nobody) as shelf:
        assert len(shelf.find(rows(1, 2, 3))) in (1, 2, 3)
        waiting = rows(*range(9))
        shelf.save(waiting)
        assert agree(shelf.find(rows(*range(9))), rows(*range(9)))


def test_a_file_system_of_its_own_holds_a_store(place: Path) -> None:
    (place / "lost+found").mkdir(parents=True)
    with opened(place) as shelf:
        shelf.save(rows(1))
        assert agree(shelf.find([key(1)]), rows(1))


def test_what_a_store_holds_can_be_told_and_cleared(place: Path) -> None:
    assert summarize(place) == []
    assert clear(place) == (0, 0)
    with opened(place) as shelf:
        shelf.save(rows(1, 2))
    with opened(place, dataclasses.replace(KIND, patches=True)) as user:
        user.save({key(1): np.ones((3, 4), np.float32)})
        found = user.find([key(1)])
        used, other = summarize(place)
        assert (used.kind, used.row_count, used.byte_count) == (user._kind, 1, 3 * 16 + 2 * 48)
        assert (other.kind, other.row_count, other.byte_count) == (KIND, 2, 2 * 16 + 3 * 48)
        assert clear(place) == (2 * 16 + 3 * 48, 3 * 16 + 2 * 48)
        assert [one.kind for one in summarize(place)] == [user._kind]
    del found, user
    assert clear(place) == (3 * 16 + 2 * 48, 0)
    assert summarize(place) == []


class FakeShelf:
    """Saves one row less than it is given while it is full."""

    def __init__(self) -> None:
        self.saved: dict[RowKey, Row] = {}
        self.problem: str | None = None

    def find(self, wanted: list[RowKey], on_segment: object) -> dict[RowKey, Row]:
        return {one: self.saved[one] for one in wanted if one in self.saved}

    def save(self, part: dict[RowKey, Row]) -> None:
        for one in list(part)[: len(part) - (self.problem is not None)]:
            self.saved[one] = part.pop(one)
        if self.problem is not None:
            raise StorageError(self.problem)


def quiet() -> None:
    pass


def test_a_disk_that_refuses_is_made_up_for_by_memory_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    shelf = FakeShelf()
    kept = KeptRows(lambda: shelf)  # type: ignore[arg-type,return-value]
    shelf.problem = "cannot write 'x': the disk is full; free space and try again"
    for number in (1, 2):
        kept.add(key(number), row(number))
    kept.settle()
    assert set(shelf.saved) == {key(1)}
    assert kept.in_memory_count == 1
    assert agree(kept.find([key(1), key(2), key(3)], quiet), rows(1, 2))
    kept.add(key(3), row(3))
    kept.settle()
    assert caplog.text.count("features stay in memory") == 1
    assert "free space and try again" in caplog.text
    shelf.problem = None
    with caplog.at_level("INFO"):
        kept.add(key(4), row(4))
        kept.settle()
    assert (kept.in_memory_count, kept.problem) == (0, None)
    assert agree(shelf.saved, rows(1, 2, 3, 4))
    assert "features are kept on disk again" in caplog.text


def test_rows_are_saved_now_and_then_and_not_one_by_one() -> None:
    shelf, now = FakeShelf(), [0.0]
    kept = KeptRows(lambda: shelf, lambda: now[0])  # type: ignore[arg-type,return-value]
    kept.add(key(1), row(1))
    now[0] = 1.9
    kept.add(key(2), row(2))
    assert shelf.saved == {}
    now[0] = 2.0
    kept.add(key(3), row(3))
    kept.settle()
    assert agree(shelf.saved, rows(1, 2, 3))


def test_without_a_store_rows_stay_in_memory() -> None:
    kept = KeptRows(None)
    kept.add(key(1), row(1))
    kept.settle()
    assert agree(kept.find([key(1), key(2)], quiet), rows(1))
    assert kept.in_memory_count == 1


def test_a_program_error_while_saving_is_not_taken_for_the_disk(place: Path) -> None:
    store = FeatureStore(place, 64 * MIB)
    kept = KeptRows(lambda: store.shelf(KIND))
    kept.add(key(1), row(1))
    kept.add(b"short", row(2))
    with pytest.raises(ValueError):
        kept.settle()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "secret-name.png"
    path.write_bytes(b"pixels")
    return path


def digests(contents: Contents, *paths: Path) -> tuple[dict[Path, bytes], int]:
    read = 0

    def on_file() -> None:
        nonlocal read
        read += 1

    found, _ = contents.digests(paths, on_file)
    contents.close()
    return found, read


def later() -> int:
    return 1 << 62


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, image: Path) -> None:
    place = tmp_path / "contents"
    place.mkdir()
    first = {image: hashlib.sha256(b"pixels").digest()}
    assert digests(Contents(place, later), image) == (first, 1)
    assert digests(Contents(place, later), image) == (first, 0)
    status = image.stat()
    image.write_bytes(b"PIXELS")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digests(Contents(place, later), image) == ({image: hashlib.sha256(b"PIXELS").digest()}, 1)
    (known,) = place.iterdir()
    assert b"secret" not in known.read_bytes()
    content = bytearray(known.read_bytes())
    content[68 + 40] ^= 1
    known.write_bytes(content)
    assert digests(Contents(place, later), image)[1] == 1


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, image: Path) -> None:
    changed = image.stat().st_ctime_ns
    for age, read in ((2_000_000_000, 1), (2_000_000_001, 0)):
        contents = Contents(tmp_path, lambda age=age: changed + age)  # type: ignore[misc]
        digests(contents, image)
        assert digests(contents, image)[1] == read


def test_files_that_cannot_be_read_are_told(tmp_path: Path, image: Path) -> None:
    missing, directory = tmp_path / "missing.png", tmp_path / "directory"
    directory.mkdir()
    found, problems = Contents(None).digests([missing, image, directory], quiet)
    assert set(found) == {image}
    assert problems == {missing: "No such file or directory", directory: "Is a directory"}


def test_too_much_that_is_remembered_is_forgotten(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests(Contents(tmp_path, later), image)
    monkeypatch.setattr("silo.feature_store.contents.MAX_BYTES", 67)
    Contents(tmp_path).clear_excess()
    assert list(tmp_path.glob("*.contents")) == []
