"""Options and fixtures of the whole suite."""

import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# The same examples in every run: nobody's change is refused for an example that only chance drew. To look for new ones:
# `make unit ARGS=--hypothesis-profile=explore`.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
settings.register_profile("fedrt", settings.get_profile("explore"), derandomize=True)
settings.load_profile("fedrt")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A daemon that a test runs in this process configures the logs of the whole process."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if isinstance(handler.formatter, structlog.stdlib.ProcessorFormatter):
            root.removeHandler(handler)
    structlog.reset_defaults()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write the transcripts in tests/golden again; commit the difference only if you understand what caused it",
    )


@pytest.fixture
def rewrite_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-golden"))
