"""The layer's operations one by one on a CPU: what each takes beside a copy and a GEMM, and its share of the step.

    snell bench operations

Every operation works in the blocks that the layer works in. Beside it stands the larger of two times measured in the
same turns: copying the bytes that it must read and write, and a GEMM of as many floating-point instructions. That is a
yardstick and no bound: a block may lie in a cache, and a GEMM does not reach the machine's peak.
"""

from __future__ import annotations

import statistics
from itertools import repeat
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from snell import SnellLinear
from snell.bench import core
from snell.bench.clock import Step, median_ratio, take_turns
from snell.bench.experiments.layer import Layers
from snell.bench.report import Columns, Document, made_by, table

RANK, SPARSITY = 32, 0.9

#: in_features, out_features, tokens.
SHAPES = ((768, 3072, 1576), (4096, 4096, 512), (4096, 11008, 256))

#: Bytes of the copy that tells the machine's rate: far beyond any cache.
COPIED = 2**28


class Operation(NamedTuple):
    """One operation over the whole matrix: the bytes that it moves, and the flops that decide and apply it."""

    step: Step
    moved_bytes: int
    flops: float


def operations(layer: SnellLinear, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, Operation]:
    """Those that a step is made of, each with what it does in one step."""
    update, weight, x = core.of_layer(layer), layer.weight.detach(), x.detach()
    (m, n), tokens, entries, size = weight.shape, x.shape[0], weight.numel(), weight.element_size()
    grads, backend = core.Gradients.zeros(update), core.backend(update)
    rows, columns = core.block_lengths(tokens, m, n, size, "cpu")
    workspace = torch.randn(max(rows * n, columns * m)).to(weight.dtype)

    def gemms(count: int) -> Step:
        products = (lambda: x @ weight.t(), lambda: grad_y @ weight, lambda: grad_y.t() @ x)
        return lambda: [product() for product in products[:count]]

    def select() -> None:
        core.forget()
        core.select(update)

    def merge() -> None:
        for part, W in zip(update.split(rows, 0), weight.split(rows), strict=True):
            backend.merge(part, W, workspace[: W.numel()].view(-1, n))

    def survivors() -> None:
        activations = backend.factor_grad_of_tokens(grad_y, x, update, grads)
        assert activations is not None, "the layer would not take the survivors alone either"
        gradients(activations)

    def gradients(activations: core.Activations | None = None) -> None:
        parts = update.split(columns, 1), weight.split(columns, 1), grads.A.split(columns)
        xs = repeat(None) if activations is None else activations.x.split(columns)
        for part, W, dA, x_block in zip(*parts, xs, strict=False):
            merged = workspace[: W.numel()].view(m, -1)
            G = merged if activations is None else activations.with_columns(x_block)
            backend.factor_grad(G, part, grads.with_columns(dA), W, merged)

    # A subtraction and a multiply-add a rank column, each an instruction, as a GEMM's multiply-add of 2 flops is.
    K = 4 * RANK * entries
    surviving, factors = (1 - SPARSITY) * entries, 4 * RANK * (m + n)
    moved = 2 * 4 * RANK * surviving  # one of each, for dA and for dB
    merging = Operation(merge, 2 * entries * size, K)
    common = {"select": Operation(select, factors, K), "merge, forward": merging}
    if weight.dtype == torch.float32:
        alone = Operation(survivors, factors + 2 * entries * size, K + 2 * surviving * tokens + moved)
        products = {"GEMMs: y, dX": Operation(gemms(2), 0, 4 * entries * tokens)}
        return products | common | {"survivors' G and gradients with merge": alone}
    products = {"GEMMs: y, G, dX": Operation(gemms(3), 0, 6 * entries * tokens)}
    return products | common | {"factor_grad with merge": Operation(gradients, 3 * entries * size, K + moved)}


def measure_layer(n: int, m: int, tokens: int, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """Times, yardsticks and shares of one layer's operations; ``flop_per_s`` is float32's, which K is computed in."""
    layer = SnellLinear(n, m, bias=False, rank=RANK, sparsity=SPARSITY, dtype=dtype)
    x, grad_y = torch.randn(tokens, n, dtype=dtype).requires_grad_(), torch.randn(tokens, m, dtype=dtype)
    parts = operations(layer, x, grad_y)
    source, target = torch.zeros(COPIED, dtype=torch.uint8), torch.empty(COPIED, dtype=torch.uint8)
    square = torch.randn(1024, 1024)
    steps: dict[str, Step] = {"whole": Layers(layer, x, grad_y).step, "copy": lambda: target.copy_(source)}
    steps |= {"product": lambda: square @ square, **{name: part.step for name, part in parts.items()}}
    take_turns(steps, "cpu", 1)
    seconds = take_turns(steps, "cpu", turns)
    byte = [taken / (2 * COPIED) for taken in seconds["copy"]]
    flop = [taken / (2 * 1024**3) for taken in seconds["product"]]
    rows = []
    for name, part in parts.items():
        yardsticks = [max(part.moved_bytes * b, part.flops * f) for b, f in zip(byte, flop, strict=True)]
        # GEMMs of the layer's dtype are what the others are a share beside.
        ratio = None if name.startswith("GEMM") else median_ratio(seconds[name], yardsticks)
        row = {"operation": name, "seconds": statistics.median(seconds[name]), "ratio_to_yardstick": ratio}
        row |= {"share_of_step": median_ratio(seconds[name], seconds["whole"])}
        rows.append(row | {"moved_bytes": part.moved_bytes, "flops": part.flops})
    facts = {"in_features": n, "out_features": m, "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    rates = {"copy_bytes_per_s": 1 / statistics.median(byte), "flop_per_s": 1 / statistics.median(flop)}
    return {**facts, "seconds": statistics.median(seconds["whole"]), **rates, "operations": rows}


def measure(repetitions: int) -> dict[str, Any]:
    """All shapes, in both dtypes."""
    torch.manual_seed(0)
    cases = [(*shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    measured = [measure_layer(*case, repetitions) for case in tqdm(cases, unit="case")]
    return {"file": "operations-cpu", "settings": {"r": RANK, "s": SPARSITY}, "cases": measured}


COLUMNS: Columns = [
    ("in x out, tokens", "{case[in_features]} x {case[out_features]}, {case[tokens]}"),
    ("dtype", "{case[dtype]}"),
    ("operation", "{operation}"),
    ("time", "{seconds:ms}"),
    ("of the step", "{share_of_step:.0%}"),
    ("of a copy or a GEMM", "{ratio_to_yardstick:.2f}"),
]


def report(document: Document) -> str:
    """The results file as Markdown."""
    rows = []
    for case in document["cases"]:
        rows += [{"case": case, **row} for row in case["operations"]]
        together = sum(row["seconds"] for row in case["operations"]) / case["seconds"]
        whole = {"operation": "the layer's step", "seconds": case["seconds"], "share_of_step": together}
        rows.append({"case": case, "ratio_to_yardstick": None, **whole})
    rates = ([case[key] / 1e9 for case in document["cases"]] for key in ("copy_bytes_per_s", "flop_per_s"))
    copies, flops = map(statistics.median, rates)
    return (
        f"{table(COLUMNS, rows)}\n\nThe last row of a case is the layer itself, and the share of it that its "
        f"operations make up. A copy ran at {copies:.0f} GB/s (read and written), a float32 GEMM at {flops:.0f} "
        f"GFLOP/s. {made_by(document)}"
    )
