"""What every test shares: the backend it runs on, and a seed that is fresh each run and printed."""

import os
import zlib

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter; it must be told before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from checkout import ROOT
from seeds import SEED
from snell import backends, competition

# An interpreted backend runs a program instance at a time in Python: it gets the same tests, fewer and smaller.
INTERPRETED = frozenset({"triton"})

hypothesis.settings.register_profile(
    "snell",
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=30,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("snell")


def pytest_report_header() -> str:
    return f"snell: {ROOT}, seed {SEED} (SNELL_TEST_SEED repeats it), backends {', '.join(backends.AVAILABLE)}"


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))
    competition.forget()


# Compiled, that backend takes a GPU's tensors alone: tests/backends/test_on_gpu.py repeats these tests there.
ON_CPU = [name for name in backends.AVAILABLE if name != "triton" or os.environ.get("TRITON_INTERPRET") == "1"]


@pytest.fixture(params=ON_CPU)
def backend(request: pytest.FixtureRequest):
    """Every operation of the test runs on this backend."""
    with backends.use(request.param):
        yield request.param


@pytest.fixture
def small(backend: str) -> bool:
    """Whether the backend is too slow for more than a few tiles."""
    return backend in INTERPRETED
