"""Every kernel compiles for every architecture, keeps to its registers and to its shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")

#: Bytes of shared memory one block may take (CUDA C++ programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 64 * 1024

KERNELS = {
    "merge_kernel",
    "factor_grad_kernel",
    "add_shares_kernel",
    "few_tokens_kernel",
    "add_splits_kernel",
    "edit_kernel",
    "edit_grad_kernel",
    "bracket_kernel",
    "count_kernel",
    "verify_kernel",
    "softmax_grad_kernel",
    "centre_kernel",
    "split_kernel",
}


def run(*command: str | Path) -> str:
    """In a process of its own: this one may have the kernels as the interpreter's."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def faults(found: dict) -> list[str]:
    """What keeps a kernel from running at speed, or at all, on its architecture."""
    name = f"{found['kernel']} for sm_{found['arch']} ({found['settings']}, {found['dtypes']})"
    told = [f"{name} spills: {found[kind]} bytes of {kind}" for kind in ("stack", "local") if found[kind]]
    if found["shared"] > SHARED[found["arch"]]:
        told.append(f"{name} takes {found['shared']} bytes of shared memory")
    if found["registers"] * 32 * found["warps"] > REGISTERS:
        told.append(f"{name} takes {found['registers']} registers for each of {found['warps']} warps")
    return told


@pytest.fixture(scope="module", params=SHARED)
def compiled(request, tmp_path_factory) -> tuple[int, dict]:
    """An architecture and what ``snell bench resources`` writes for it."""
    out = tmp_path_factory.mktemp("resources")
    run("-m", "snell", "bench", "resources", "--arch", str(request.param), "--out", out)
    return request.param, json.loads((out / "resources.json").read_text())


def test_kernels_keep_to_registers_and_shared_memory(compiled, capsys):
    arch, table = compiled[0], compiled[1]["kernels"]
    with capsys.disabled():
        print(f"\n{'sm_' + str(arch):20}{'settings':28}{'dtypes':36}{'warps':>6}{'regs':>6}{'shared':>8}{'stack':>6}")
        for row in table:
            print(
                f"{row['kernel']:20}{row['settings']:28}{row['dtypes']:36}{row['warps']:6}{row['registers']:6}"
                f"{row['shared']:8}{row['stack']:6}"
            )
    assert {row["kernel"] for row in table} == KERNELS
    assert [fault for row in table for fault in faults(row)] == []


def slots_of(document: dict, arch: int) -> dict[tuple, list[float]]:
    """Slots an entry of every kernel that was counted, of its variants in the order they were compiled."""
    found: dict[tuple, list[float]] = {}
    for row in document["kernels"]:
        if row["slots"] and row["arch"] == arch:
            total = sum(count for pipe, count in row["slots"].items() if pipe != "products")
            found.setdefault((row["kernel"], row["settings"], row["dtypes"]), []).append(total)
    return found


def grown(before: dict[tuple, list[float]], now: dict[tuple, list[float]]) -> list[str]:
    """Kernels that take over 5 % more slots than before."""
    return [
        f"{' '.join(key)}: {after:.1f} slots an entry, {then:.1f} in bench/results/resources.json"
        for key, counts in now.items()
        for then, after in zip(before[key], counts, strict=True)
        if after > 1.05 * then
    ]


def test_no_kernel_takes_more_slots_than_recorded(compiled):
    arch, now = compiled
    recorded = json.loads((ROOT / "bench" / "results" / "resources.json").read_text())
    if recorded["triton"] != now["triton"]:
        pytest.skip(f"slots were recorded with Triton {recorded['triton']}")
    before, after = slots_of(recorded, arch), slots_of(now, arch)
    assert before.keys() == after.keys()
    assert grown(before, after) == []
    more = {key: [1.06 * count for count in counts] for key, counts in before.items()}
    assert len(grown(before, more)) == sum(map(len, before.values())) > 0


def test_a_kernel_that_spills_is_found():
    found = json.loads(run(Path(__file__).with_name("spilling.py")))
    assert [fault for fault in faults(found) if "spills" in fault]
