"""The emulation of CUDA itself: faults of a kernel that it must show."""

from __future__ import annotations

from ctypes import CDLL, c_bool, c_int, c_uint, c_void_p

import numpy as np
import pytest

from checkout import ROOT
from emulation import build

THREADS = 128


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> CDLL:
    loaded = CDLL(str(build(ROOT / "tests/kernels/emulated.cu", tmp_path_factory.mktemp("emulated"))))
    for name in ("run_rotate", "run_diverge", "run_sum_warps", "run_count_blocks"):
        getattr(loaded, name).argtypes = [c_void_p, c_bool if name == "run_rotate" else c_int]
    loaded.run_sum_warps.argtypes = loaded.run_count_blocks.argtypes = [c_void_p]
    loaded.snell_emulate.argtypes = [c_uint, c_void_p]
    loaded.snell_emulate(1, None)
    return loaded


def test_a_barrier_is_kept_by_all_threads(library):
    out = np.empty((3, THREADS), np.int32)
    assert library.run_rotate(out.ctypes.data, True) == 0
    assert (out == np.roll(np.arange(THREADS), 1)).all()


def test_a_missing_barrier_shows(library):
    out = np.empty((3, THREADS), np.int32)
    assert library.run_rotate(out.ctypes.data, False) == 0
    assert (out != np.roll(np.arange(THREADS), 1)).any(1).all()


@pytest.mark.parametrize("leaving, status", [(0, 0), (1, 719), (32, 719)])
def test_a_barrier_that_some_threads_never_reach_is_an_error(library, leaving, status):
    out = np.zeros(THREADS, np.int32)
    assert library.run_diverge(out.ctypes.data, leaving) == status
    assert out.any() == (leaving == 0)


def test_a_warp_exchanges_among_its_own(library):
    out = np.empty(THREADS, np.int32)
    assert library.run_sum_warps(out.ctypes.data) == 0
    assert (out.reshape(4, 32) == np.arange(THREADS).reshape(4, 32).sum(1, keepdims=True)).all()


def test_every_block_of_the_grid_runs_once(library):
    out = np.zeros(1, np.int32)
    assert library.run_count_blocks(out.ctypes.data) == 0
    assert out[0] == THREADS * sum(x + 10 * y for x in range(4) for y in range(2))
