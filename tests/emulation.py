"""CUDA sources as a library for the CPU, by csrc/cuda/emulate.h."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, c_float, c_uint
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from checkout import ROOT
from seeds import SEED
from snell.kernels import cuda

SELECT = ROOT / "csrc/cuda/select.cu"

#: Kernels are checked against Triton's interpreter, whose exponential is numpy's.
_exponential = CFUNCTYPE(c_float, c_float)(lambda x: float(np.exp(np.float32(x))))


def build(source: Path, folder: Path) -> Path:
    """The library of ``source``, in ``folder``."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C++ compiler: there is no {compiler[0]}")
    library = folder / source.with_suffix(".so").name
    # Atomics take an int64_t for CUDA's long long, which C++ calls another type.
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wall", "-Wextra"]
    options += ["-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/cuda'}", "-x", "c++", str(source), "-o", str(library)]
    done = subprocess.run([*compiler, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return library


@contextmanager
def selecting(library: Path, seed: int = SEED) -> Iterator[None]:
    """Inside, the library selects for the Triton backend on the CPU. Its threads take turns by ``seed``."""
    loaded = cuda.load(library)
    loaded.snell_emulate.argtypes = [c_uint, CFUNCTYPE(c_float, c_float)]
    loaded.snell_emulate(seed % 2**32, _exponential)
    with mock.patch.object(cuda, "_library", loaded), cuda.use(True):
        yield
