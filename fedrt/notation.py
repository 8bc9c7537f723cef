"""Durations, sizes and addresses as operators write them: "5m", "64MiB", "fed.example.org:7443".

Each is an annotated type for a pydantic model: YAML holds the notation, Python holds seconds (float), bytes (int) or
the checked text (str), and dumping as JSON or YAML gives the notation back. Plain numbers are refused, because nobody
can tell whether 30 means seconds or milliseconds.
"""

import ipaddress
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}  # milliseconds
_DURATION = "".join(rf"(?:([0-9]{{1,9}}){unit})?" for unit in _UNITS)
_DURATION_SCHEMA = r"^(?=.)([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$"
_SIZES = {"GiB": 1024**3, "MiB": 1024**2, "KiB": 1024, "B": 1}
_SIZE = re.compile(r"([0-9]{1,9})(GiB|MiB|KiB|B)")
_ADDRESS = re.compile(r"(?P<host>\[[^\[\]]*\]|[^\[\]:]*):(?P<port>[0-9]{1,5})")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def parse_duration(text: object) -> float:
    """Seconds of a duration such as "30s", "5m", "1h30m" or "500ms". Raises `ValueError`."""
    if isinstance(text, bool) or not isinstance(text, str):
        hint = f"; did you mean '{text}s'?" if isinstance(text, int | float) and not isinstance(text, bool) else ""
        raise ValueError(f"must be a duration with a unit, such as 30s, 5m or 1h30m{hint}")
    match = re.fullmatch(_DURATION, text)
    if not text or match is None:
        raise ValueError("must be a duration such as 500ms, 30s, 5m, 1h30m or 2d: whole numbers, largest unit first")
    scales = _UNITS.values()
    return sum(int(count or 0) * scale for count, scale in zip(match.groups(), scales, strict=True)) / 1000


def format_duration(seconds: float) -> str:
    """The notation of a duration, the inverse of `parse_duration`; rounded to a millisecond."""
    left = round(seconds * 1000)
    if left == 0:
        return "0s"
    if left % 1000 and left < 10_000:
        return f"{left}ms"
    parts = []
    for unit, scale in _UNITS.items():
        count, left = divmod(left, scale)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size(text: object) -> int:
    """Bytes of a size such as "64MiB". Raises `ValueError`."""
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("must be a size with a unit, such as 512KiB, 64MiB or 1GiB (whole numbers)")
    return int(match[1]) * _SIZES[match[2]]


def format_size(size: int) -> str:
    """The notation of a number of bytes, the inverse of `parse_size`, in the largest unit that is exact."""
    unit, scale = next((unit, scale) for unit, scale in _SIZES.items() if size % scale == 0 and (size or scale == 1))
    return f"{size // scale}{unit}"


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 one without brackets) and port of "host:port". Raises `ValueError` saying what to write."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(_address_advice(address))
    host, port = match["host"], int(match["port"])
    if port > 65535:
        raise ValueError(f"must have a port up to 65535; {port} is too large")
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(f"must hold an IPv6 address in the brackets; {host!r} is none") from None
    elif not host:
        raise ValueError(f"must name a host; write '127.0.0.1:{port}' for this machine or '0.0.0.0:{port}' for all")
    elif not _HOST.fullmatch(host):
        raise ValueError(f"must name a host by its name or address; {host!r} is neither")
    return host, port


def _address_advice(address: str) -> str:
    if "://" in address:
        return "must be host:port without a scheme, such as fed.example.org:7443"
    if address.count(":") > 1 and "[" not in address:
        return "must have an IPv6 address in brackets and the whole in quotes, such as '[::1]:7443'"
    return "must be host:port, such as fed.example.org:7443 or '[::1]:7443'"


def _check_address(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be host:port in quotes, such as '127.0.0.1:7443' or '[::1]:7443'")
    split_address(value)
    return value


def _check_remote_address(value: object) -> str:
    address = _check_address(value)
    if split_address(address)[1] == 0:
        raise ValueError("must name the port to connect to; 0 is none")
    return address


def _text_schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


_ADDRESS_SCHEMA = _text_schema(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$", "127.0.0.1:7443")

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    _text_schema(_DURATION_SCHEMA, "5m"),
]
"""Seconds; not negative."""

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    _text_schema(r"^[0-9]+(GiB|MiB|KiB|B)$", "64MiB"),
]
"""Bytes; not negative."""

Address = Annotated[str, BeforeValidator(_check_address), _ADDRESS_SCHEMA]
"""Where to listen, "host:port"; port 0 means any free one."""

RemoteAddress = Annotated[str, BeforeValidator(_check_remote_address), _ADDRESS_SCHEMA]
"""Where to connect to, "host:port"."""


def bounded(low: str, high: str) -> Any:
    """Annotate a `Duration` with the shortest and the longest one that is allowed."""
    limits = parse_duration(low), parse_duration(high)

    def check(value: Any) -> Any:
        if not limits[0] <= parse_duration(value) <= limits[1]:
            raise ValueError(f"must be between {low} and {high}")
        return value

    return BeforeValidator(check)
