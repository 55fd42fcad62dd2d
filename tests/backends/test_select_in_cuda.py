"""The operations' tests of select again, with the CUDA C++ kernels emulated on the CPU, beside Triton's merge."""

from __future__ import annotations

import pytest
import test_operations

from emulation import SELECT, build, selecting
from snell import backends

for _name in (
    "test_tau_has_the_bits_of_the_sorted_K_of_its_own_backend",
    "test_tau_lies_within_rounding_of_the_reference",
    "test_survivors_are_counted_exactly_from_what_merge_writes",
):
    globals()[_name] = getattr(test_operations, _name)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(SELECT, tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def backend(library, request):
    if "triton" not in backends.AVAILABLE:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    with backends.use("triton"), selecting(library):
        yield "triton"


@pytest.fixture
def small() -> bool:
    return True
