"""What a coordinator's operator sets: the keys of coordinator.yaml."""

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from fedrt.config import (
    FederationName,
    IdentitySection,
    LocalPath,
    LogSection,
    MetricsSection,
    Section,
    duration,
    load_yaml,
    size,
)
from fedrt.notation import Address, Duration, Size, bounded, format_duration, format_size, parse_duration

MAX_SOCKET_PATH_BYTES = 107  # sockaddr_un of Linux, less the final zero
MIN_PAYLOAD_LIMIT = 64 * 1024
_RETENTION_PATTERN = r"^(forever|(?=.)([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?)$"
FOREVER, MIN_RETENTION, MAX_RETENTION = "forever", "1h", "36500d"


def _default_socket(values: dict[str, Any]) -> Path:
    return Path(values["state_directory"]) / "admin.sock"


def _parse_retention(value: object) -> float:
    if value == FOREVER:
        return math.inf
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise ValueError(f"{error}; or {FOREVER}") from None
    if not parse_duration(MIN_RETENTION) <= seconds <= parse_duration(MAX_RETENTION):
        raise ValueError(f"must be between {MIN_RETENTION} and {MAX_RETENTION}, or {FOREVER}")
    return seconds


def _format_retention(seconds: float) -> str:
    return FOREVER if math.isinf(seconds) else format_duration(seconds)


Retention = Annotated[
    float,
    BeforeValidator(_parse_retention),
    PlainSerializer(_format_retention, return_type=str, when_used="json"),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": rf"^({FOREVER}|(?=.)([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?)$",
            "examples": ["90d"],
        }
    ),
]
"""Seconds that something is kept; infinity for "forever"."""


class ListenSection(Section):
    """Where the coordinator listens."""

    session: Address = Field(description="Address for the silos' sessions, such as 0.0.0.0:7443")
    admin: Address | None = Field(
        default=None, description="Address for operators with a certificate; only the Unix socket if not set"
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.admin == self.session and not self.session.endswith(":0"):
            raise ValueError(f"session and admin are both {self.session!r}; give admin another port")
        return self


class LimitsSection(Section):
    """What silos may use of the coordinator."""

    max_payload: Size = size("256MiB", "Largest tensors of one result")
    max_sessions: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=1000, description="Silos that may be connected at the same time"
    )

    @model_validator(mode="after")
    def _hold_something(self) -> Self:
        if not MIN_PAYLOAD_LIMIT <= self.max_payload <= 2**40:
            raise ValueError(
                f"max_payload is {format_size(self.max_payload)}; it must be between 64KiB and 1024GiB, such as 256MiB"
            )
        return self


class RetentionSection(Section):
    """How long the coordinator keeps what nothing needs to go on."""

    updates: Retention = Field(
        default=math.inf,
        description="How long the updates of an experiment are kept after its end; a replay needs them",
        json_schema_extra={"default": "forever"},
    )


class CoordinatorConfig(Section):
    """The keys of coordinator.yaml."""

    federation: FederationName = Field(description="Name of the federation, such as skin.example.org")
    listen: ListenSection = Field(description="Where the coordinator listens")
    identity: IdentitySection = Field(description="Where the coordinator's key and certificate lie")
    state_directory: LocalPath = Field(description="Directory of the store and the tensors; private to the service")
    admin_socket: LocalPath = Field(
        default_factory=_default_socket,
        description="Unix socket of fedrtctl; admin.sock in the state directory if not set",
    )
    heartbeat_interval: Annotated[Duration, bounded("100ms", "10m")] = duration(
        "2500ms", "How often each side of a session says that it is alive"
    )
    silence_limit: Annotated[Duration, bounded("200ms", "1h")] = duration(
        "5s", "Silence after which a session counts as lost"
    )
    limits: LimitsSection = Field(default_factory=LimitsSection, description="What silos may use of the coordinator")
    retention: RetentionSection = Field(
        default_factory=RetentionSection, description="How long is kept what no experiment needs to go on"
    )
    metrics: MetricsSection | None = Field(default=None, description="Prometheus metrics; none if not set")
    log: LogSection = Field(default_factory=LogSection, description="What is logged to stderr")
    shutdown_grace: Annotated[Duration, bounded("0s", "1d")] = duration(
        "30s", "Time that sessions are given to end at shutdown"
    )

    @model_validator(mode="after")
    def _socket_path_is_short(self) -> Self:
        length = len(str(self.admin_socket).encode())
        if length > MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"admin_socket '{self.admin_socket}' is {length} bytes long, and the path of a Unix socket may have "
                f"{MAX_SOCKET_PATH_BYTES}; set admin_socket to a shorter one such as /run/fedrt/admin.sock"
            )
        return self

    @model_validator(mode="after")
    def _silence_outlasts_a_lost_heartbeat(self) -> Self:
        least = 2 * self.heartbeat_interval
        if self.silence_limit < least:
            raise ValueError(
                f"silence_limit is {format_duration(self.silence_limit)}, less than two heartbeat_interval of "
                f"{format_duration(self.heartbeat_interval)}; set silence_limit to {format_duration(least)} or more"
            )
        return self


def load_coordinator_config(path: Path) -> CoordinatorConfig:
    """Read coordinator.yaml. Raises `ConfigurationError` that lists every problem."""
    return load_yaml(path, CoordinatorConfig)
