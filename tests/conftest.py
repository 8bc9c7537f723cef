"""Options and fixtures of the whole suite."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("fedrt", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
settings.load_profile("fedrt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write the transcripts in tests/golden again; commit the difference only if you understand what caused it",
    )


@pytest.fixture
def rewrite_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--rewrite-golden"))
