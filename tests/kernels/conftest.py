"""The kernels' tests run them in Triton's interpreter, on CPU tensors, and start with nothing remembered."""

from __future__ import annotations

import os

import pytest

from snell import backends


@pytest.fixture
def on_triton():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    with backends.use("triton"):
        yield
