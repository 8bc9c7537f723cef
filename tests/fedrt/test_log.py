import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from fedrt.config import LogFormat
from fedrt.log import configure_logging, redact, set_level
from fedrt.task import TaskKind

PEM = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\n-----END PRIVATE KEY-----"


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_have_a_utc_time_a_level_and_a_logger(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    structlog.get_logger("silo.link").info("session open", coordinator="fed:7443", attempt=2)
    (line,) = lines(stream)
    moment = datetime.fromisoformat(line.pop("timestamp"))
    assert moment.utcoffset() == UTC.utcoffset(None)
    assert line == {
        "event": "session open", "level": "info", "logger": "silo.link", "coordinator": "fed:7443", "attempt": 2,
    }  # fmt: skip


def test_console_lines_are_for_people(stream: io.StringIO) -> None:
    configure_logging("info", "console", stream)
    structlog.get_logger("silo.link").info("session open", attempt=2)
    assert "[info     ] session open [silo.link] attempt=2\n" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_libraries_end_in_the_same_lines(stream: io.StringIO) -> None:
    configure_logging("debug", "json", stream)
    logging.getLogger("grpc._server").warning("lost %s of %d", "frame", 3)
    logging.getLogger("sqlalchemy.engine").info("INSERT INTO experiment VALUES ('private')")
    logging.getLogger("grpc").debug("metadata")
    assert [(line["event"], line["logger"], line["level"]) for line in lines(stream)] == [
        ("lost frame of 3", "grpc._server", "warning")
    ]


def test_level_can_change_while_running(stream: io.StringIO) -> None:
    configure_logging("warning", "json", stream)
    log = structlog.get_logger("silo")
    log.info("one")
    set_level("debug")
    log.debug("two")
    set_level("error")
    log.warning("three")
    assert [line["event"] for line in lines(stream)] == ["two"]


def test_configuring_again_does_not_double_the_lines(stream: io.StringIO) -> None:
    configure_logging("info", "console", io.StringIO())
    configure_logging("info", "json", stream)
    structlog.get_logger("silo").info("once")
    assert len(lines(stream)) == 1


def test_context_variables_are_in_every_line(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    with structlog.contextvars.bound_contextvars(experiment_id="skin-1"):
        structlog.get_logger("silo").info("round")
        logging.getLogger("other").info("library")
    assert [line["experiment_id"] for line in lines(stream)] == ["skin-1", "skin-1"]


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "join_token",
        "Authorization",
        "private_key",
        "key",
        "key_pem",
        "password",
        "passphrase",
        "csr",
        "payload",
        "tensors",
        "shared",
        "private",
        "secret",
        "client-key",
        "labels",
        "image",
        "data_path",
    ],
)
def test_secret_fields_are_redacted(name: str) -> None:
    assert redact(None, "info", {name: "abc", "x": {name: "abc"}, "y": [{name: "abc"}]}) == {
        name: "[redacted]",
        "x": {name: "[redacted]"},
        "y": [{name: "[redacted]"}],
    }


@pytest.mark.parametrize("name", ["payload_bytes", "token_expiry_time", "tensor_count", "task_id", "state_path"])
def test_other_fields_are_not(name: str) -> None:
    assert redact(None, "info", {name: 5}) == {name: 5}


def test_only_plain_values_are_shown() -> None:
    @dataclass
    class Result:
        values: Any

    shown = redact(
        None,
        "info",
        {
            "event": f"read {PEM} twice",
            "a": b"12345",
            "b": np.ones((2, 3)),
            "c": Result(np.ones(3)),
            "d": Path("/x"),
            "e": TaskKind.TRAIN,
            "f": ValueError(f"bad {PEM}"),
            "g": np.float32(0.5),
            "h": datetime(2026, 11, 20, tzinfo=UTC),
            "i": (None, True, 1, 0.5),
        },
    )
    assert shown == {
        "event": "read [redacted] twice",
        "a": "[5 bytes]",
        "b": "<ndarray>",
        "c": "<Result>",
        "d": "/x",
        "e": "train",
        "f": "ValueError: bad [redacted]",
        "g": 0.5,
        "h": "2026-11-20 00:00:00+00:00",
        "i": [None, True, 1, 0.5],
    }


def test_half_a_private_key_is_redacted_too() -> None:
    assert redact(None, "info", {"event": PEM[:40]})["event"] == "[redacted]"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_tracebacks_show_no_variables(stream: io.StringIO, log_format: LogFormat) -> None:
    configure_logging("info", log_format, stream)
    hidden = "do not " + "show"
    try:
        raise ValueError(f"{len(hidden)} {PEM}")
    except ValueError:
        structlog.get_logger("silo").exception("failed")
        logging.getLogger("library").exception("failed too")
    assert stream.getvalue().count("ValueError: 11") == 2
    assert "do not show" not in stream.getvalue()
    assert "MIGHAgEAMBMGByqGSM49" not in stream.getvalue()


def test_warnings_are_logged(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream)
    logging.getLogger("py.warnings").warning("deprecated")
    assert lines(stream)[0]["logger"] == "py.warnings"
