"""Files that survive a crash: written whole or not at all, readable by their owner only.

A new version is written beside the old one, forced to disk and renamed over it, and the directory is forced to disk as
well: whoever reads sees the old bytes or the new ones, also after a power cut.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from fedrt.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free space and try again",
    errno.EDQUOT: "the disk quota is used up; free space and try again",
    errno.EACCES: "permission denied; make it accessible to the user this program runs as",
    errno.EPERM: "not permitted; make it accessible to the user this program runs as",
    errno.EROFS: "the file system is read-only; remount it or choose another directory",
    errno.ENOENT: "no such file or directory; check the configured path",
    errno.ENOTDIR: "a part of the path is not a directory; check the configured path",
    errno.EEXIST: "something else of that name is there; check the configured path",
    errno.EISDIR: "it is a directory; check the configured path",
}


def write_atomic(path: Path, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Replace the file at `path` by `data`, durably; raises StorageError, and then never leaves half of it."""
    write_atomic_by(path, lambda temporary: _fill(temporary, data), mode)


def write_atomic_by(path: Path, write: Callable[[Path], object], mode: int = 0o600) -> None:
    """Replace the file at `path` by what `write` puts into the empty file it is given; otherwise as `write_atomic`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        try:
            _create(temporary, mode)
            write(temporary)
            _sync(temporary, os.O_RDONLY)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("write", path, error) from error


def remove_unfinished(directory: Path) -> None:
    """Remove what writes that a crash cut off have left in a directory that only this process writes to."""
    try:
        for path in directory.glob(".*.new"):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error("clean", directory, error) from error


def move_durably(source: Path, target: Path) -> None:
    """Force a written file to disk and rename it to `target` on the same file system; raises StorageError."""
    try:
        _sync(source, os.O_RDONLY)
        source.replace(target)
        _sync(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("write", target, error) from error


def sync_directory(path: Path) -> None:
    """Make what was linked, renamed or removed in a directory durable, all of it at once; raises StorageError."""
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("write", path, error) from error


def remove_durably(path: Path) -> None:
    """Remove a file, if it is there, so that a power cut does not bring it back; raises StorageError."""
    try:
        path.unlink(missing_ok=True)
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise storage_error("remove", path, error) from error


def ensure_private_directory(path: Path) -> None:
    """Make `path` a directory that only we can enter (0700), missing parents too; an existing one is checked only.

    What is made is durable before anything is written into it.

    Raises StorageError when it cannot be made, is not ours, or others may write to it: they could swap the files in it.
    """
    try:
        for parent in (*reversed(path.parents), path):
            if not parent.is_dir():
                parent.mkdir(mode=0o700, exist_ok=True)
                _sync(parent.parent, os.O_RDONLY | os.O_DIRECTORY)
        status = path.stat()
    except OSError as error:
        raise storage_error("create directory", path, error) from error
    if status.st_uid != os.geteuid():
        raise StorageError(f"directory '{path}' belongs to user {status.st_uid}, not to us ({os.geteuid()}); chown it")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise StorageError(f"directory '{path}' is writable by others (mode {mode:04o}); run: chmod 700 '{path}'")


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """Say what failed, on which file, and what to do about it; never what was being written."""
    advice = _ADVICE.get(error.errno or 0, f"{error.strerror or type(error).__name__}; check the disk and try again")
    return StorageError(f"cannot {action} '{path}': {advice}")


def _create(path: Path, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)  # the umask may have taken bits away
    finally:
        os.close(descriptor)


def _fill(path: Path, data: bytes | memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    finally:
        os.close(descriptor)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
