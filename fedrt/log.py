"""Structured logs on stderr, for people or as JSON lines, with secrets, tensors and images taken out of them.

Our own events (structlog) and those of libraries (stdlib logging: grpc, sqlalchemy, asyncio) end in the same lines.
Redaction goes by the name of a field, which is the contract: whatever is secret is logged, if at all, under its own
name. Beyond that only plain values are shown: of bytes the number, of any other object the type, of a private key in
PEM form nothing.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from enum import Enum
from numbers import Real
from pathlib import PurePath
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from fedrt.config import LogFormat, LogLevel
from fedrt.errors import FedrtError

REDACTED = "[redacted]"
# fmt: off
SECRET_NAMES = frozenset({
    "authorization", "csr", "delta", "features", "image", "images", "key", "keys", "label", "labels", "passphrase",
    "password", "payload", "pem", "private", "secret", "shared", "tensor", "tensors", "token", "tokens",
})
# fmt: on
SECRET_PATHS = frozenset({"data_path", "image_path", "manifest_path"})
# Their debug output shows SQL parameters and metadata, so it stays off whatever the configured level.
_QUIET = ("sqlalchemy", "grpc", "asyncio", "PIL")
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_WORDS = re.compile(r"[^a-z]+")


def configure_logging(level: LogLevel, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (stderr if None). Called again, it replaces the earlier set-up."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # a daemon that reloads its configuration must not keep old loggers
    )
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.PositionalArgumentsFormatter()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                redact,
                *_renderers(log_format, output.stream),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [output]
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    set_level(level)


def reload_level(read: Callable[[], LogLevel]) -> None:
    """Set the level that the operator's file says now; a file that is wrong is logged and changes nothing."""
    log = structlog.get_logger("log")
    try:
        set_level(read())
    except FedrtError as error:
        log.error("the log level stays as it was", reason=str(error))


def set_level(level: LogLevel) -> None:
    """Change the least severe level that is logged, for example when the configuration is read again."""
    logging.getLogger().setLevel(level.upper())


def redact(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Replace the values of secret fields at any depth, bytes, arrays and private keys. A structlog processor."""
    return {name: REDACTED if _is_secret(name) else _clean(value) for name, value in event.items()}


def _renderers(log_format: LogFormat, stream: TextIO) -> list[Processor]:
    if log_format == "json":
        return [structlog.processors.JSONRenderer(sort_keys=True, default=str)]
    return [
        structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=0,
            # Not rich's formatter: it prints local variables, and those hold tokens and tensors.
            exception_formatter=structlog.dev.plain_traceback,
        )
    ]


def _is_secret(name: str) -> bool:
    """By its last word: `join_token` is secret, `token_count` and `payload_bytes` are not."""
    return name in SECRET_PATHS or _WORDS.split(name.lower())[-1] in SECRET_NAMES


def _clean(value: Any) -> Any:
    match value:
        case str():
            return _PEM.sub(REDACTED, value)
        case bytes() | bytearray() | memoryview():
            return f"[{len(value)} bytes]"
        case Mapping():
            return {name: REDACTED if _is_secret(str(name)) else _clean(inner) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_clean(inner) for inner in value]
        case Enum():
            return _clean(value.value)
        case BaseException():
            return _clean(f"{type(value).__name__}: {value}")
        case None | bool() | int() | float():
            return value
        case Real():  # numpy's
            return float(value)
        case PurePath() | date() | timedelta():
            return str(value)
    # Anything else might show a tensor or a token by its repr, as a dataclass does.
    return f"<{type(value).__name__}>"
