"""Two network namespaces and the bad line between them, as one process: `python -m tests.netns.line`.

Each namespace has a TUN device; this process carries the packets from one to the other: late, a share of them not at
all, and no faster than the line is. It does what `tc netem` does, which many small kernels lack. The namespaces have
no name: they end with the processes in them, however these end, and nothing is left behind.

    namespace "a", 10.77.0.1  <-- TUN -- this process -- TUN -->  namespace "b", 10.77.0.2

It says `ready PID A B` (file numbers of the two namespaces in /proc/PID/fd) or `refused: why`. Then it reads orders,
one a line, and answers each with `done`: `cut` (a black hole, both ways), `mend`, `down` and `up` (the link of "b").
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_PDEATHSIG = 1
TUNSETIFF, SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x400454CA, 0x8913, 0x8914, 0x8916, 0x891C
IFF_UP, IFF_TUN, IFF_NO_PI = 0x1, 0x1, 0x1000
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
ONE_WAY = 0.05  # seconds: 100 ms there and back
LOSS = 0.01
BITS_PER_SECOND = 10e6
MAX_WAITING = 1000  # packets in a direction; more are lost, as in a router
MTU = 1500

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int) -> None:
    """A function of libc; raises `OSError`."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def die_with_parent() -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def own_namespace() -> int:
    """Move into a new network namespace and return a file that keeps it; without the right to, as root of our own."""
    try:
        call("unshare", CLONE_NEWNET)
    except PermissionError:
        user, group = os.geteuid(), os.getegid()
        call("unshare", CLONE_NEWUSER | CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    set_up("lo")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def set_up(name: str, is_up: bool = True, by: socket.socket | None = None) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as own:
        request = struct.pack("16sH14x", name.encode(), 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(by or own, SIOCGIFFLAGS, request))[1]
        wanted = flags | IFF_UP if is_up else flags & ~IFF_UP
        fcntl.ioctl(by or own, SIOCSIFFLAGS, struct.pack("16sH14x", name.encode(), wanted))


def make_tun(name: str, address: str) -> int:
    """A device of the namespace we are in, up; returns the file that its packets come from and go to."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as control:
        for what, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.252")):
            numbers = struct.pack("16sHH4s8x", name.encode(), socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, what, numbers)
    set_up(name)
    return file


class Direction:
    """Packets on their way; a packet takes its share of the line, then the delay, unless it is lost."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: list[tuple[float, int, bytes]] = []
        self._free_at = 0.0
        self._number = 0

    def send(self, packet: bytes, now: float) -> None:
        if self._random.random() < LOSS or len(self._waiting) >= MAX_WAITING:
            return
        self._free_at = max(now, self._free_at) + len(packet) * 8 / BITS_PER_SECOND
        self._number += 1
        heapq.heappush(self._waiting, (self._free_at + ONE_WAY, self._number, packet))

    def arrived(self, now: float) -> Iterator[bytes]:
        while self._waiting and self._waiting[0][0] <= now:
            yield heapq.heappop(self._waiting)[2]

    def clear(self) -> None:
        self._waiting.clear()

    @property
    def next_arrival(self) -> float | None:
        return self._waiting[0][0] if self._waiting else None


class Line:
    """Carries packets and obeys orders until its standard input ends."""

    def __init__(self) -> None:
        self.namespaces = [own_namespace()]
        ends = [make_tun("line", ADDRESSES["a"])]
        self.namespaces.append(own_namespace())
        ends.append(make_tun("line", ADDRESSES["b"]))
        self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # of namespace b, where we stay
        self._ways = {ends[0]: (Direction(1), ends[1]), ends[1]: (Direction(2), ends[0])}
        self._is_cut = False

    def run(self) -> None:
        while True:
            now = time.monotonic()
            due = [way.next_arrival for way, _ in self._ways.values() if way.next_arrival is not None]
            readable, _, _ = select.select([0, *self._ways], [], [], max(0.0, min(due) - now) if due else None)
            for file in readable:
                if file != 0:
                    self._take(file)
                elif not self._obey(os.read(0, 100).decode().split()):
                    return
            now = time.monotonic()
            for way, target in self._ways.values():
                for packet in way.arrived(now):
                    with contextlib.suppress(OSError):  # the device is down
                        os.write(target, packet)

    def _take(self, file: int) -> None:
        with contextlib.suppress(OSError):  # nothing more, or the device is down
            while True:
                packet = os.read(file, MTU)
                if not self._is_cut:
                    self._ways[file][0].send(packet, time.monotonic())

    def _obey(self, orders: list[str]) -> bool:
        for order in orders:
            if order in ("cut", "mend"):
                self._is_cut = order == "cut"
                for way, _ in self._ways.values():
                    way.clear()
            else:
                set_up("line", order == "up", self._control)
            print("done", flush=True)
        return bool(orders)


if __name__ == "__main__":
    die_with_parent()
    try:
        line = Line()
    except OSError as error:
        print(f"refused: {error}", flush=True)
        sys.exit(0)
    print("ready", os.getpid(), *line.namespaces, flush=True)
    line.run()
