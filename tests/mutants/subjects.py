"""Which files are changed, how often, and the tests that must notice: those that are quick and about that file."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["GROUPS", "Group"]


class Group(NamedTuple):
    """Files, how many changes of each, and the tests that must notice them."""

    files: tuple[str, ...]
    number: int
    tests: tuple[str, ...]
    keyword: str = ""
    interpreted: bool = False


OPERATIONS = ("tests/backends/test_operations.py", "tests/test_functional.py", "tests/test_blocks.py")
LAYER = ("tests/test_linear.py", "tests/test_linear_modes.py", "tests/test_linear_state.py", "tests/test_precision.py",
         "tests/test_half_precision_sums.py")  # fmt: skip
COMPETITION = ("tests/competition", "tests/backends/test_cpu.py")
DISPATCH = ("tests/backends/test_dispatch.py", "tests/backends/test_workspaces.py")
ERRORS = ("tests/test_spec.py", "tests/test_functional_errors.py", "tests/test_reference.py", "tests/test_precision.py")
TRITON = ("tests/kernels/test_select.py", "tests/backends/test_triton.py")
NATIVE = (
    *OPERATIONS[:2],
    *COMPETITION,
    "tests/test_native.py",
    "tests/test_identity.py",
    "tests/backends/test_rounding.py",
)
EDITS = ("tests/backends/test_edit.py", "tests/peft/test_red_layer.py", "tests/test_functional_errors.py")
ON_TRITON = "not blocked and not cpu"

GROUPS = (
    Group(("snell/spec.py", "snell/kernel_functions.py", "snell/reference.py", "snell/precision.py"), 8,
          (*ERRORS, *LAYER[:3], "tests/test_golden.py")),
    Group(("snell/functional.py", "snell/update.py"), 12, (*ERRORS, *OPERATIONS[1:], *LAYER)),
    Group(("snell/blocks.py", "snell/ops.py", "snell/merging.py", "snell/dispatch.py"), 16,
          (*OPERATIONS, *LAYER, *COMPETITION)),
    Group(("snell/linear.py", "snell/initial.py"), 10, (*LAYER, "tests/test_initial.py", "tests/test_golden.py")),
    Group(("snell/backends/__init__.py", "snell/backends/base.py", "snell/backends/blocked.py", "snell/backends/cpu.py",
           "snell/backends/layout.py"), 7, (*DISPATCH, *OPERATIONS, *COMPETITION, "tests/test_native.py", *LAYER)),
    Group(("snell/native.py",), 8, ("tests/test_native.py", *OPERATIONS[:1], *COMPETITION)),
    Group(("snell/competition/memo.py", "snell/competition/radix.py", "snell/competition/thresholds.py"), 7,
          (*COMPETITION, *OPERATIONS[:2])),
    Group(("csrc/cpu/select.cpp", "csrc/cpu/factor_grad.cpp"), 10, NATIVE, "not blocked"),
    Group(("csrc/cpu/tiles.h", "csrc/cpu/kappa.h", "csrc/cpu/simd.h"), 5, NATIVE, "not blocked"),
    Group(("csrc/cpu/merge.cpp", "csrc/cpu/merge.h", "csrc/cpu/library.cpp"), 3, NATIVE, "not blocked"),
    Group(("snell/competition/held.py", "snell/competition/together.py", "snell/backends/triton.py"), 5,
          (*TRITON, *COMPETITION[:1]), ON_TRITON, True),
    Group(("kernels/select.py", "kernels/count.py", "kernels/selection.py", "kernels/fingerprint.py"), 4,
          (*TRITON, *OPERATIONS[:1]), ON_TRITON, True),
    Group(("kernels/merge.py", "kernels/kappa.py", "kernels/factor_grad.py", "kernels/few_tokens.py",
           "kernels/launch.py"), 4, (*OPERATIONS, *TRITON[1:]), ON_TRITON, True),
    Group(("snell/competition/processes.py", "snell/distributed.py"), 5, ("tests/distributed",)),
    Group(("csrc/cpu/red.cpp", "snell/red.py"), 6, EDITS, "not blocked"),
    Group(("snell/peft/red/layer.py",), 8, (*EDITS, "tests/peft/test_red_model.py")),
    Group(("snell/training/adapters.py", "snell/training/cka.py", "snell/training/folding.py",
           "snell/training/freezing.py", "snell/training/prefix.py", "snell/training/schedule.py"), 5,
          ("tests/training",)),
)  # fmt: skip
