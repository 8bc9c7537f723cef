"""A federation for each test, and what its daemons logged."""

from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.fakes.federation import Federation

Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logs]:
    """Everything that was logged, of all daemons."""
    monkeypatch.setattr("coordinator.app.configure_logging", lambda *settings: None)  # it would replace the capture
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
async def federation(tmp_path: Path, logs: Logs) -> AsyncIterator[Federation]:
    """Not yet started; whatever a test starts is stopped, and must not have died by itself."""
    built = Federation(tmp_path)
    yield built
    ended = {name: daemon.task for name, daemon in built.running.items() if daemon.task.done()}
    await built.stop()
    died = {name: task.exception() for name, task in ended.items() if not task.cancelled() and task.exception()}
    assert not died, f"daemons died: {died}"
