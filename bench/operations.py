"""The layer's operations one by one on a CPU: what each takes beside a copy and a GEMM, and its share of the step.

    snell bench operations

Every operation works in the blocks that the layer works in. Beside it stands the larger of two times measured in the
same turns: copying the bytes that it must read and write, and a GEMM of as many floating-point instructions. That is a
yardstick and no bound: a block may lie in a cache, and a GEMM does not reach the machine's peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from snell import SnellLinear, memo
from snell.backends import cpu
from snell.bench.measure import Step, interleaved, median_ratio
from snell.bench.record import made_by, out_option, write
from snell.schedule import block_length
from snell.spec import Spec

RANK, SPARSITY = 32, 0.9

#: in_features, out_features, tokens.
SHAPES = ((768, 3072, 1576), (4096, 4096, 512), (4096, 11008, 256))

#: Bytes of the copy that tells the machine's rate: far beyond any cache.
COPIED = 2**28


@dataclass(frozen=True)
class Operation:
    """One operation over the whole matrix: ``step`` runs it; its bytes, and the flops that decide and apply it."""

    name: str
    step: Step
    moved_bytes: int
    flops: float


class Layer:
    """A layer, a batch, and the layer's operations on them."""

    def __init__(self, in_features: int, out_features: int, tokens: int, dtype: torch.dtype) -> None:
        m, n = out_features, in_features
        self.layer = SnellLinear(n, m, bias=False, rank=RANK, sparsity=SPARSITY, dtype=dtype)
        self.x = torch.randn(tokens, n, dtype=dtype).requires_grad_()
        self.grad_y = torch.randn(tokens, m, dtype=dtype)
        self.A, self.B, self.theta = (
            t.detach() for t in (self.layer.snell_A, self.layer.snell_B, self.layer.snell_theta)
        )
        self.tau, self.weight = self.layer.threshold(), self.layer.weight.detach()
        self.grads = tuple(torch.zeros_like(t) for t in (self.A, self.B, self.theta))
        self.rows = block_length(n * dtype.itemsize, m)
        self.columns = block_length(m * dtype.itemsize, n)
        self.workspace = torch.randn(max(self.rows * n, self.columns * m)).to(dtype)
        spec: Spec = self.layer.spec
        self.setting = (spec.kernel, spec.groups, spec.effective_gate)

    def step(self) -> None:
        memo.clear()
        torch.autograd.grad(self.layer(self.x), (self.x, self.layer.snell_A, self.layer.snell_B), self.grad_y)

    def _select(self) -> None:
        memo.clear()
        self.layer.threshold()

    def _merge(self) -> None:
        n = self.A.shape[0]
        for B, W in zip(self.B.split(self.rows), self.weight.split(self.rows), strict=True):
            out = self.workspace[: W.numel()].view(-1, n)
            cpu.merge_out(self.A, B, self.theta, self.tau, W, out, *self.setting)

    def _survivors(self) -> None:
        x = self.x.detach()
        took = cpu.factor_grad_of_tokens(
            self.grad_y, x, self.A, self.B, self.theta, self.tau, *self.grads, *self.setting
        )
        assert took, "the layer would not take the survivors alone either"

    def _gradients(self) -> None:
        m = self.B.shape[0]
        for A, W, dA in zip(
            *(t.split(self.columns, d) for t, d in ((self.A, 0), (self.weight, 1), (self.grads[0], 0))), strict=True
        ):
            G = self.workspace[: W.numel()].view(m, -1)
            cpu.factor_grad(G, A, self.B, self.theta, self.tau, W, G, dA, *self.grads[1:], *self.setting)

    def _gemms(self, count: int) -> Step:
        x = self.x.detach()
        products: list[Callable[[], Tensor]] = [lambda: x @ self.weight.t(), lambda: self.grad_y @ self.weight]
        products += [lambda: self.grad_y.t() @ x]

        def run() -> None:
            for product in products[:count]:
                product()

        return run

    def operations(self) -> list[Operation]:
        """Those that a step is made of, each with what it does in one step."""
        (m, n), (tokens, _) = self.weight.shape, self.x.shape
        entries, size = m * n, self.weight.element_size()
        # A subtraction and a multiply-add a rank column, each an instruction, as a GEMM's multiply-add of 2 flops is.
        K = 4 * RANK * entries
        survivors = (1 - SPARSITY) * entries
        moved = 2 * 4 * RANK * survivors  # one of each, for dA and for dB
        factors = 4 * RANK * (m + n)
        select = Operation("select", self._select, factors, K)
        if self.weight.dtype == torch.float32:
            return [
                Operation("GEMMs: y, dX", self._gemms(2), 0, 4 * entries * tokens),
                select,
                Operation("merge, forward", self._merge, 2 * entries * size, K),
                Operation("survivors' G and gradients", self._survivors, factors, K + 2 * survivors * tokens + moved),
                Operation("merge, backward", self._merge, 2 * entries * size, K),
            ]
        return [
            Operation("GEMMs: y, G, dX", self._gemms(3), 0, 6 * entries * tokens),
            select,
            Operation("merge, forward", self._merge, 2 * entries * size, K),
            Operation("factor_grad with merge", self._gradients, 3 * entries * size, K + moved),
        ]


def measure(in_features: int, out_features: int, tokens: int, dtype: torch.dtype, repetitions: int) -> dict[str, Any]:
    """Times, yardsticks and shares of one layer's operations; ``flop_per_s`` is float32's, which K is computed in."""
    layer = Layer(in_features, out_features, tokens, dtype)
    operations = layer.operations()
    source, target = torch.zeros(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    square = torch.randn(1024, 1024)
    rates: list[Step] = [lambda: target.copy_(source), lambda: square @ square]
    steps = [layer.step, *rates, *(operation.step for operation in operations)]
    whole, copied, product, *times = interleaved(steps, "cpu", repetitions, lambda: None)
    byte_seconds = [seconds / (2 * COPIED) for seconds in copied]
    flop_seconds = [seconds / (2 * 1024**3) for seconds in product]
    rows = []
    for operation, taken in zip(operations, times, strict=True):
        yardsticks = [
            max(operation.moved_bytes * byte, operation.flops * flop)
            for byte, flop in zip(byte_seconds, flop_seconds, strict=True)
        ]
        rows.append(
            {
                "operation": operation.name,
                "seconds": statistics.median(taken),
                "share_of_step": median_ratio(taken, whole),
                # GEMMs of the layer's dtype are what the others are a share beside.
                "ratio_to_yardstick": None if operation.name.startswith("GEMM") else median_ratio(taken, yardsticks),
                "moved_bytes": operation.moved_bytes,
                "flops": operation.flops,
            }
        )
    return {
        "in_features": in_features,
        "out_features": out_features,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": statistics.median(whole),
        "copy_bytes_per_s": 1 / statistics.median(byte_seconds),
        "flop_per_s": 1 / statistics.median(flop_seconds),
        "operations": rows,
    }


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table, a row an operation."""
    lines = ["| in x out, tokens | dtype | operation | time | of the step | of a copy or a GEMM |", "|" + "---|" * 6]
    for case in cases:
        shape = f"{case['in_features']} x {case['out_features']}, {case['tokens']} | {case['dtype']}"
        for row in case["operations"]:
            ratio = "" if row["ratio_to_yardstick"] is None else f"{row['ratio_to_yardstick']:.2f}"
            taken = f"{row['seconds'] * 1e3:.3g} ms | {row['share_of_step']:.0%}"
            lines.append(f"| {shape} | {row['operation']} | {taken} | {ratio} |")
        together = sum(row["seconds"] for row in case["operations"])
        lines.append(
            f"| {shape} | the layer's step | {case['seconds'] * 1e3:.3g} ms | {together / case['seconds']:.0%} | |"
        )
    return "\n".join(lines)


def report(document: dict[str, Any]) -> str:
    """The results file as Markdown."""
    copies = statistics.median(case["copy_bytes_per_s"] for case in document["cases"]) / 1e9
    flops = statistics.median(case["flop_per_s"] for case in document["cases"]) / 1e9
    return (
        f"{table(document['cases'])}\n\nThe last row of a case is the layer itself, and the share of it that its "
        f"operations make up. A copy ran at {copies:.0f} GB/s (read and written), a float32 GEMM at {flops:.0f} "
        f"GFLOP/s. {made_by(document)}"
    )


@click.command(help=__doc__)
@click.option("--repetitions", type=click.IntRange(1), default=11, show_default=True, help="Timed runs of each.")
@out_option
def main(repetitions: int, out: Path) -> None:
    torch.manual_seed(0)
    with tqdm([(*shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES], unit="case") as bar:
        cases = [measure(*case, repetitions) for case in bar]
    click.echo(table(cases))
    write(out, "operations-cpu", {"settings": {"r": RANK, "s": SPARSITY}, "cases": cases}, benchmark="operations")


if __name__ == "__main__":
    main()
