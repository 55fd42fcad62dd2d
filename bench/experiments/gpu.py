"""One operation in bf16 on a GPU, beside what the same machine copies and multiplies.

    snell bench merge|select|factor-grad|generate [--rank 8 --rank 32] [--shape IN OUT]

merge: W0 + dW of a whole layer, beside a copy of the same bytes. select: tau of a layer, of a layer whose factors did
not change, and of all layers of a model in one call. factor-grad: dA, dB and W0 + dW out of a block of G (all rows,
and as many columns as the layer's workspace), beside a copy. generate: one unmerged layer for a few tokens, beside the
plain layer and PEFT's LoRA. Inputs rotate among sets that together exceed the cache; figures are medians.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snell import refresh_thresholds
from snell.bench import core
from snell.bench.clock import Step, machine_rates, median_seconds, num_sets
from snell.bench.contenders import one_layer
from snell.bench.memory import extra_peak_bytes
from snell.bench.report import Document, fill, table

#: in_features, out_features: attention and MLP of a 7B model, MLP of a 70B model, output layer.
SHAPES = ((4096, 4096), (4096, 11008), (8192, 28672), (4096, 128256))

#: in, out of every adapted layer of one transformer block, and how many blocks.
MODELS = {
    "ViT-B/16": ([(768, 768)] * 4 + [(768, 3072), (3072, 768)], 12),
    "7B Llama": ([(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)], 32),
}

#: Tokens of generation.
TOKENS = (1, 4, 16)

Row = dict[str, Any]


def _matrices(m: int, n: int, device: str, each: int) -> list[list[Tensor]]:
    """Sets of ``each`` bf16 matrices of ``m x n``, enough of them to exceed the cache."""
    sets = range(num_sets(2 * each * m * n, device))
    return [[torch.randn(m, n, device=device, dtype=torch.bfloat16) for _ in range(each)] for _ in sets]


def _steps(call: Callable[..., object], sets: list[list[Tensor]]) -> list[Step]:
    return [lambda tensors=tensors: call(*tensors) for tensors in sets]


def merge(m: int, n: int, rank: int, device: str) -> Iterator[Row]:
    update, sets = core.new_update(m, n, rank, device), _matrices(m, n, device, 2)
    seconds = median_seconds(_steps(lambda W, out: core.backend(update).merge(update, W, out), sets), device)
    copied = median_seconds(_steps(lambda W, out: out.copy_(W), sets), device)
    # A subtraction and a fused multiply-add a column.
    rates = {"TB/s": 4 * m * n / seconds / 1e12, "fp32 TFLOP/s": 3 * rank * m * n / seconds / 1e12}
    yield {"in": n, "out": m, "rank": rank, "ms": seconds * 1e3, "ms of a copy": copied * 1e3, **rates}


def factor_grad(m: int, n: int, rank: int, device: str) -> Iterator[Row]:
    cols, whole = core.block_lengths(8192, m, n, 2, device)[1], core.new_update(m, n, rank, device)
    backend = core.backend(whole)
    update = backend.prepare(whole).columns(slice(cols))
    grads, sets = core.Gradients.zeros(update), _matrices(m, cols, device, 3)
    seconds = median_seconds(_steps(lambda G, W, out: backend.factor_grad(G, update, grads, W, out), sets), device)
    copied = median_seconds(_steps(lambda G, W, out: out.copy_(G), sets), device)
    times = {"ms": seconds, "ms of the layer": seconds * n / cols, "ms of a copy and a half": 1.5 * copied}
    # The statistic as in merge, and two products on tensor cores.
    rates = {"TB/s": 6 * m * cols / seconds / 1e12, "TFLOP/s": (3 + 4) * rank * m * cols / seconds / 1e12}
    yield {"out": m, "columns": cols, "rank": rank, **{key: 1e3 * s for key, s in times.items()}, **rates}


def _selected(name: str, rank: int, entries: int, anew: Step, beside: Row, seconds: float, device: str) -> Row:
    rates = {"entries/ns": entries / seconds / 1e9, "fp32 TFLOP/s": 3 * rank * entries / seconds / 1e12}
    peak = (extra_peak_bytes(anew, device) or 0) / 2**20
    return {"layers": name, "rank": rank, "ms": seconds * 1e3, **beside, **rates, "extra MiB": peak}


def select(m: int, n: int, rank: int, device: str) -> Iterator[Row]:
    update = core.new_update(m, n, rank, device)

    def anew() -> None:
        core.forget()
        core.select(update)

    seconds, known = median_seconds([anew], device), median_seconds([lambda: core.select(update)], device)
    yield _selected(f"{n} x {m}", rank, m * n, anew, {"ms known": known * 1e3}, seconds, device)


def select_model(name: str, rank: int, device: str) -> Row:
    """All layers of a model in one call, and one by one."""
    block, blocks = MODELS[name]
    updates = [core.new_update(m, n, rank, device) for n, m in block * blocks]

    def together() -> None:
        core.forget()
        core.select_together(updates)

    def apart() -> None:
        core.forget()
        for update in updates:
            core.select_together([update])

    seconds, alone = (median_seconds([step], device, repetitions=5) for step in (together, apart))
    entries = blocks * sum(n * m for n, m in block)
    return _selected(name, rank, entries, together, {"ms one by one": alone * 1e3}, seconds, device)


def generate(m: int, n: int, rank: int, device: str) -> Iterator[Row]:
    plain = [nn.Linear(n, m, device=device, dtype=torch.bfloat16) for _ in range(num_sets(2 * m * n, device))]
    layers = {"plain": plain}
    layers |= {name: [one_layer(name, copy.copy(linear), rank) for linear in plain] for name in ("lora", "snell")}
    for layer in layers["snell"]:
        refresh_thresholds(layer)
    for tokens in TOKENS:
        x = torch.randn(tokens, n, device=device, dtype=torch.bfloat16)
        with torch.inference_mode():
            seconds = {
                name: median_seconds([lambda layer=layer, x=x: layer(x) for layer in same], device)
                for name, same in layers.items()
            }
        snell = seconds["snell"]
        ratios = {"to the plain layer": snell / seconds["plain"], "to LoRA": snell / seconds["lora"]}
        found = {"us": snell * 1e6, **ratios, "TB/s": 2 * m * n / snell / 1e12}
        yield {"in": n, "out": m, "rank": rank, "tokens": tokens, **found}


OPERATIONS = {"merge": merge, "select": select, "factor-grad": factor_grad, "generate": generate}


def measure(operation: str, device: str, rank: Sequence[int], shape: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The operation at every shape and rank; select also for whole models."""
    cases = [(m, n, r) for n, m in shape or SHAPES for r in rank]
    rows = [row for m, n, r in tqdm(cases, desc=operation) for row in OPERATIONS[operation](m, n, r, device)]
    whole = [(name, r) for name in MODELS for r in rank] if operation == "select" and device == "cuda" else []
    return {**machine_rates(device), "rows": rows, "models": [select_model(*case, device) for case in tqdm(whole)]}


def report(document: Document) -> str:
    """The rows as Markdown, under what the machine copies and multiplies."""
    rates = {key: value / 1e12 for key, value in document.items() if key.endswith("_per_s")}
    parts = [fill("Copy {copy_bytes_per_s:.2f} TB/s, bf16 GEMM {gemm_flop_per_s:.0f} TFLOP/s.", rates)]
    for rows in filter(None, (document["rows"], document["models"])):
        formats = {name: ":.4g" if isinstance(value, float) else "" for name, value in rows[0].items()}
        parts.append(table([(name, f"{{{name}{form}}}") for name, form in formats.items()], rows))
    return "\n\n".join(parts)
