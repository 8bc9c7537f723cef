"""The recorded values lie beside the repository; without them these tests are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recorded import FOLDER, Reference, load_reference


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not FOLDER.is_dir():
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="../shared/reference/values is not here"))


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: waiting for a second thread costs more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference() -> Reference:
    return load_reference()
