"""Small disks of our own: a private mount namespace with a tmpfs on each state directory, where the system allows it.

A disk is filled up by shrinking it to what it holds and laying a ballast file into the rest, and freed the other way.
"""

import ctypes
import os
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MNT_DETACH = 0x2
MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20, 0x4000, 0x40000
ROOMY = "1g"  # a bound, not a reservation
BALLAST = "ballast"
SPARE = 64 * 1024  # bytes left for the ballast


def enter() -> str:
    """Move this process, which must have one thread only, into a mount namespace of its own.

    Returns why not, or nothing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS):
        if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
            return f"the system allows no mount namespace ({os.strerror(ctypes.get_errno())})"
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        except OSError as error:
            return f"the system allows no user namespace ({error.strerror})"
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        return f"the mount namespace cannot be made private ({os.strerror(ctypes.get_errno())})"
    return ""


def mount_disk(directory: Path) -> str:
    """Put an empty disk of its own on a directory; returns why not, or nothing."""
    return _mount(directory, 0, f"size={ROOMY},mode=0700")


def fill(directory: Path) -> None:
    """Leave no byte of the disk free. Raises `OSError` if that cannot be done."""
    status = os.statvfs(directory)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    problem = _mount(directory, MS_REMOUNT, f"size={used + SPARE}")
    if problem:
        raise OSError(problem)
    descriptor = os.open(directory / BALLAST, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError:
        return  # full
    finally:
        os.close(descriptor)


def free(directory: Path) -> None:
    """Give the space back. Raises `OSError` if that cannot be done."""
    (directory / BALLAST).unlink(missing_ok=True)
    problem = _mount(directory, MS_REMOUNT, f"size={ROOMY}")
    if problem:
        raise OSError(problem)


def unmount_disk(directory: Path) -> None:
    """Take the disk away, with all that is on it."""
    ctypes.CDLL(None).umount2(os.fsencode(directory), MNT_DETACH)


def _mount(directory: Path, flags: int, options: str) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", flags, options.encode()):
        return f"no tmpfs on '{directory}': {os.strerror(ctypes.get_errno())}"
    return ""
