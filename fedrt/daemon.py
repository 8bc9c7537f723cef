"""The life of a daemon: signals, the service manager, exit codes. Everything else is an argument.

starting --ready()--> running --SIGTERM or SIGINT--> draining --main returns--> ended
                                                     a second signal ends it at once
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

import structlog

from fedrt.errors import ExitCode, FedrtError


class Lifecycle:
    """What a daemon's main function sees of its life."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self.reload: list[Callable[[], None]] = []  # called on SIGHUP

    def ready(self, status: str) -> None:
        """Tell the service manager, if there is one, that the daemon serves."""
        notify(f"READY=1\nSTATUS={_one_line(status)}")

    def status(self, text: str) -> None:
        """Tell the service manager what the daemon is doing, in one line."""
        notify(f"STATUS={_one_line(text)}")


def _one_line(text: str) -> str:
    """A line of its own would be a field of its own, and a status may quote what the other side said."""
    return " ".join(text.split())


def prepare_grpc() -> None:
    """Set what gRPC reads when it is imported, so call this before: TLS 1.3 only, and no log of its own on stderr.

    BoringSSL has no switch for the lowest version. But with this one suite of TLS 1.2, which our P-256 certificates
    cannot serve, TLS 1.2 never finds a common cipher; the suites of TLS 1.3 are not concerned.
    """
    os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def notify(message: str) -> None:
    """Send `sd_notify` fields to the socket that systemd names; nothing happens without one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)


def run_daemon(main: Callable[[Lifecycle], Awaitable[None]]) -> ExitCode:
    """Run `main` until it returns; it is asked to by `stopping`. Errors become one line on stderr and an exit code."""
    try:
        asyncio.run(_supervise(main))
    except FedrtError as error:
        return report(error)
    except BaseExceptionGroup as group:
        known = _first_known(group)
        if known is None:
            structlog.get_logger("daemon").exception("internal error")
            return ExitCode.INTERNAL
        return report(known)
    except asyncio.CancelledError:
        print("error: stopped at once, by a second signal", file=sys.stderr)  # noqa: T201
        return ExitCode.INTERNAL
    except Exception:  # the one place where a daemon's bug ends up
        structlog.get_logger("daemon").exception("internal error")
        return ExitCode.INTERNAL
    return ExitCode.DONE


def report(error: FedrtError) -> ExitCode:
    """Print the error as one message on stderr and return its exit code."""
    print(f"error: {error}", file=sys.stderr)  # noqa: T201  # the operator's terminal, also without a log
    return error.exit_code


async def _supervise(main: Callable[[Lifecycle], Awaitable[None]]) -> None:
    lifecycle = Lifecycle()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main(lifecycle))

    def stop() -> None:
        if lifecycle.stopping.is_set():
            task.cancel("a second signal arrived")
            return
        notify("STOPPING=1")
        lifecycle.stopping.set()

    def reload() -> None:
        for action in lifecycle.reload:
            action()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    await task


def _first_known(group: BaseExceptionGroup[BaseException]) -> FedrtError | None:
    for error in group.exceptions:
        if isinstance(error, FedrtError):
            return error
        if isinstance(error, BaseExceptionGroup) and (found := _first_known(error)) is not None:
            return found
    return None
