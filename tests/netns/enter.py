"""Runs a command in a namespace of a line until our parent dies: `python -m tests.netns.enter PID FILE COMMAND...`."""

import os
import sys

from tests.netns.line import CLONE_NEWNET, CLONE_NEWUSER, call, die_with_parent

if __name__ == "__main__":
    line, number, command = sys.argv[1], sys.argv[2], sys.argv[3:]
    user = os.open(f"/proc/{line}/ns/user", os.O_RDONLY)
    network = os.open(f"/proc/{line}/fd/{number}", os.O_RDONLY)
    if os.fstat(user).st_ino != os.stat("/proc/self/ns/user").st_ino:
        call("setns", user, CLONE_NEWUSER)
    call("setns", network, CLONE_NEWNET)
    die_with_parent()
    os.execv(command[0], command)
