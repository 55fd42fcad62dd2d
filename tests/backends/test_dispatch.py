"""Which backend serves what, and for how long another takes its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snell import backends, native
from snell.backends import layout
from snell.backends.base import Backend

ROOT = Path(__file__).parents[2]


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    before = backends.serving("cpu")
    with pytest.raises(ValueError, match=r"one of blocked.*got 'none'"), backends.use("none"):
        pass
    assert backends.serving("cpu") is before


def test_a_backend_in_anothers_place_gives_it_back_whatever_happens() -> None:
    before = backends.serving("cpu")
    with backends.use("blocked"):
        assert backends.serving("cpu").name == "blocked"
        assert backends.of(torch.zeros(1)).name == "blocked"
        assert backends.serving("meta").name == "blocked"
    with pytest.raises(KeyError), backends.use("blocked"):
        raise KeyError
    assert backends.serving("cpu") is before
    assert backends.of(torch.zeros(1)) is before


def test_factors_of_a_dtype_that_a_backend_does_not_serve_go_to_the_one_that_serves_all() -> None:
    class Single(Backend):
        name, dtypes = "single", (torch.float32,)

        def merge(self, update, weight, out):
            raise NotImplementedError

        def factor_grad(self, G, update, grads, weight=None, merged=None):
            raise NotImplementedError

    single = Single()
    backends.AVAILABLE["single"] = single
    try:
        with backends.use("single"):
            assert backends.of(torch.zeros(1)) is single
            assert backends.of(torch.zeros(1, dtype=torch.float64)).name == "blocked"
        with backends.use("single", "meta"):
            assert backends.of(torch.zeros(1)).name != "single"
            assert backends.of(torch.zeros(1, device="meta")) is single
    finally:
        del backends.AVAILABLE["single"]


def test_the_defaults_of_a_backend_say_that_it_has_no_further_ability() -> None:
    assert not Backend.remembers
    blocked = backends.AVAILABLE["blocked"]
    assert blocked.select_together([]) is None
    assert blocked.few_tokens(torch.zeros(1, 2), None, None, None) is None
    assert blocked.factor_grad_of_tokens(torch.zeros(1, 2), torch.zeros(1, 2), None, None) is None
    with pytest.raises(NotImplementedError, match="blocked selects for one layer at a time"):
        blocked.verify(*[torch.zeros(())] * 5)


@pytest.mark.parametrize("interpreted", [False, True])
def test_triton_is_there_with_a_gpu_or_interpreted(interpreted) -> None:
    code = "from snell import backends; print(*backends.AVAILABLE, backends.serving('cpu').name)"
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = ["blocked", *(["cpu"] if native.available() else [])]
    expected += ["triton"] if interpreted or torch.cuda.is_available() else []
    assert done.stdout.split() == [*expected, "cpu" if native.available() else "blocked"], done.stderr


ROWS = torch.zeros(4, 6)
VIEWS = {
    "rows": (ROWS, False),
    "columns": (ROWS.t(), True),
    "some rows": (ROWS[::2, 1:5], False),
    "one column": (ROWS[:, :1], False),
    "one row": (ROWS.t()[:1], True),
    "one entry": (ROWS.t()[:1, :1], False),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_matrix_to_write_is_taken_as_it_lies(name) -> None:
    matrix, transposed = VIEWS[name]
    assert layout.is_transposed(matrix) == transposed
    assert layout.readable(matrix) is matrix
    given = matrix.t() if transposed else matrix
    assert layout.row_major(given) is given


def test_a_matrix_with_neither_rows_nor_columns_is_read_by_way_of_a_copy_and_never_written() -> None:
    matrix = torch.randn(8, 12)[::2, ::2]
    with pytest.raises(ValueError, match=r"contiguous rows or columns; its strides are \(24, 2\)"):
        layout.is_transposed(matrix)
    copy = layout.readable(matrix)
    assert copy.equal(matrix)
    assert copy.is_contiguous()
    for given in (matrix, matrix.t()):
        copy = layout.row_major(given)
        assert copy.equal(given)
        assert copy.is_contiguous()
