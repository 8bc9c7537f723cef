"""State files: whole or not at all, private, and an operator learns what to do when the disk refuses."""

import errno
import os
import stat

import pytest

from fedrt.errors import StorageError
from fedrt.statefile import ensure_private_directory, remove_durably, sync_directory, write_atomic


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_written_and_replaced_privately(tmp_path):
    path = tmp_path / "state"
    for content in (b"first", b"", b"x" * 100_000):
        write_atomic(path, content)
        assert path.read_bytes() == content
        assert mode_of(path) == 0o600
    assert os.listdir(tmp_path) == ["state"]


def test_the_mode_is_as_asked_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomic(tmp_path / "public", b"", mode=0o644)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "public") == 0o644


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_atomic(tmp_path / "state", b"0123456789")
    assert (tmp_path / "state").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "check the disk")],
)
def test_a_refusing_disk_leaves_the_old_content(tmp_path, monkeypatch, call, number, advice):
    path = tmp_path / "state"
    write_atomic(path, b"old")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(StorageError) as caught:
            write_atomic(path, b"secret new content")
    assert f"'{path}'" in str(caught.value)
    assert advice in str(caught.value)
    assert "secret" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]
    write_atomic(path, b"new")  # space has returned
    assert path.read_bytes() == b"new"


def test_everything_is_forced_to_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    forced = []
    fsync = os.fsync

    def watch(descriptor):
        forced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "state").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomic(tmp_path / "state", b"x")
    assert forced == [(False, False), (True, True)]


def test_a_removal_and_a_new_directory_are_forced_to_disk(tmp_path, monkeypatch):
    forced = []
    fsync = os.fsync

    def watch(descriptor):
        forced.append(os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else str(tmp_path))
        fsync(descriptor)

    write_atomic(tmp_path / "state", b"x")
    monkeypatch.setattr(os, "fsync", watch)
    remove_durably(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    remove_durably(tmp_path / "state")
    assert forced == [str(tmp_path)] * 2
    ensure_private_directory(tmp_path / "made")
    ensure_private_directory(tmp_path / "made")
    assert forced == [str(tmp_path)] * 3


def test_a_removal_that_the_disk_refuses_names_the_file(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(StorageError, match=r"cannot remove '.*/state'"):
        remove_durably(tmp_path / "state")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(StorageError, match="no such file or directory; check the configured path"):
        write_atomic(tmp_path / "absent" / "state", b"x")


def test_a_private_directory_is_made_once(tmp_path):
    path = tmp_path / "a" / "b"
    ensure_private_directory(path)
    ensure_private_directory(path)
    assert mode_of(path) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_directory_that_others_may_write_is_refused(tmp_path, mode):
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(StorageError, match=r"writable by others .*chmod 700"):
        ensure_private_directory(path)
    assert mode_of(path) == mode


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StorageError, match="belongs to user"):
        ensure_private_directory(tmp_path)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot create directory '.*/file'"):
        ensure_private_directory(tmp_path / "file")


def test_a_directory_is_synchronised_or_the_reason_is_said(tmp_path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.fstat(descriptor).st_ino))
    sync_directory(tmp_path)
    assert synchronised == [tmp_path.stat().st_ino]
    with pytest.raises(StorageError, match="no such file or directory"):
        sync_directory(tmp_path / "absent")
