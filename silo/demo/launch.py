"""Becomes another program that dies with its parent: `python launch.py <parent's process id> <program> <arguments>`.

The kernel is asked to kill this process with the one that started it, so that even `kill -9` of the demo leaves no
orphan; the request survives `exec`. Standard library only, for it must start in no time.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replace this process by the program."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request was made
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606  # the demo's own console scripts


if __name__ == "__main__":
    main()
