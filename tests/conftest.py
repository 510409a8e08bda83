"""Fixtures that know nothing of what they test. "auto" goes by its rule, untimed, unless a test says otherwise."""

import os

os.environ.setdefault("MOE_LORA_BACKEND", "rule")  # also in the processes that tests start

import pytest
import torch


@pytest.fixture
def nan_empty():
    """Uninitialised memory holds NaN, and what has no fixed order of additions raises, while the test runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders with a tiny LLM, tower and data; read, never written."""
    from tests.support import tiny  # transformers is slow to import, and most tests of the engine do without it

    return tiny.save_parts(tmp_path_factory.mktemp("parts"))


def pytest_collection_modifyitems(items):
    """What asks for torch's threads is marked, so that it can run alone."""
    for item in items:
        if "torch_threads" in getattr(item, "fixturenames", ()):
            item.add_marker("threads")
