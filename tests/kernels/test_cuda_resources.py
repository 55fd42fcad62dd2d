"""The CUDA kernels compile for every architecture and keep to its registers. Where there is nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from emulation import SELECT

#: Threads of a block, by kernel.
BLOCKS = {"bracket_kernel": 1024, "count_kernel": 256}
REGISTERS = 64 * 1024


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_spill_nothing_and_fit_their_blocks(arch, tmp_path):
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-Xptxas=-v",
        "-cubin",
        f"-arch=sm_{arch}",
        SELECT,
        "-o",
        tmp_path / "cubin",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Five kernel functions each; `stack frame` is of what spills or is indexed.
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert set(stacks) == {("0", "0", "0")}
    used = re.findall(
        r"Compiling entry function '\w*?(bracket_kernel|count_kernel)\w*'.*?Used (\d+) registers", done.stderr, re.S
    )
    assert len(used) == len(stacks) == 10
    assert all(int(registers) * BLOCKS[kernel] <= REGISTERS for kernel, registers in used)
