"""The cost model counts what a layer does, and growth reports honestly how far it is off."""

import gc
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from snell import SnellLinear, backends, competition, native
from snell.backends import cpu
from snell.bench.experiments import cost_model, growth
from snell.bench.experiments.cost_model import (
    Point,
    at_rank,
    predicted_bytes,
    predicted_seconds,
    rates_of,
    takes_products,
    work_of,
)
from snell.bench.experiments.growth import (
    figures,
    prediction_table,
    slope,
    slopes,
    summary,
    within_tolerance,
)
from snell.cli import main
from snell.update import Update

needs_native = pytest.mark.skipif("cpu" not in backends.AVAILABLE, reason="the counts are the native backend's")

POINT = Point(in_features=1024, out_features=512, tokens=1024, rank=32, sparsity=0.75, depth=3)


def test_work_by_hand_where_products_are_taken_alone() -> None:
    # 2^19 entries, 2^17 survivors; 1024 tokens are one slab, whose pass leaves W0 + dW.
    assert work_of(POINT, products=True) == {
        "call": 1,
        "select": 524_288,
        "gemm": 2_147_483_648,
        "merge": 524_288,
        "list": 524_288,
        "move": 131_072,
        "product": 134_217_728,
        "transpose": 1_572_864,
    }


def test_work_by_hand_where_G_is_formed() -> None:
    expected = {"call": 1, "select": 524_288, "gemm": 3_221_225_472, "merge": 524_288, "fused": 524_288}
    assert work_of(POINT, products=False) == expected | {"fused move": 131_072}
    # Without competition nothing is selected and every entry has a gradient.
    del expected["select"]
    assert work_of(replace(POINT, sparsity=0.0), products=False) == expected | {"fused move": 524_288}


def test_a_prediction_is_work_times_rates_times_depth() -> None:
    rates = {"call": 1.0, "select": 2**-19, "gemm": 2**-30, "merge": 2**-18, "fused": 2**-17, "fused move": 2**-15}
    seconds = predicted_seconds(POINT, products=False, rates=rates)
    assert seconds == {"call": 3, "select": 3, "gemm": 9, "merge": 6, "fused": 12, "fused move": 12}


def test_rates_lie_on_the_line_through_two_ranks() -> None:
    low, high = {"select": 2.0, "move": 1.0}, {"select": 5.0, "move": 9.0}
    assert at_rank(low, high, (32, 128), 64) == pytest.approx({"select": 3.0, "move": 1.0 + 8 / 3})
    assert at_rank(low, high, (32, 128), 8) == {"select": 1.25, "move": -1.0}


def test_predicted_bytes_by_hand() -> None:
    point = Point(in_features=4096, out_features=8192, tokens=16, rank=8, sparsity=0.9, depth=1)
    # 16 MiB hold 1024 rows of 4096 float32 numbers.
    assert predicted_bytes(point, False, 4, "cpu") == {
        "saved": 16 * 4096 * 4 + 4,
        "outputs": 16 * (4096 + 8192) * 4 + 4 * 8 * (4096 + 8192),
        "workspace": 16 * 2**20,
    }
    # Backward holds 1024 transposed tokens beside W0 + dW.
    assert predicted_bytes(POINT, True, 4, "cpu")["workspace"] == (1024 * (1024 + 512) + 1024 * 512) * 4
    assert predicted_bytes(POINT, False, 4, "cpu")["workspace"] == 1024 * 512 * 4


@needs_native
@pytest.mark.parametrize(
    "point",
    [
        # Rows and columns in several blocks of 2^24 bytes where the layer is long enough.
        Point(256, 384, 800, 16, 0.95),
        Point(16384, 300, 16, 8, 0.95),
        Point(256, 384, 800, 16, 0.5),
        Point(256, 384, 800, 16, 0.0),
        # Too little to ask for the share of survivors.
        Point(256, 384, 8, 16, 0.95),
    ],
)
def test_the_work_is_what_the_layer_does(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    done: Counter[str] = Counter()

    def spy(module: Any, name: str, count: Any) -> None:
        original = getattr(module, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            done.update(count(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    def entries(update: Update) -> int:
        return math.prod(update.shape)

    def gemm(a: torch.Tensor, b: torch.Tensor) -> dict[str, int]:
        return {"gemm": 2 * a.shape[0] * a.shape[1] * b.shape[1]}

    spy(torch, "mm", gemm)
    spy(torch, "addmm", lambda _bias, a, b: gemm(a, b))
    spy(native, "select", lambda A, B, *_: {"select": A.shape[0] * B.shape[0]})
    spy(native, "merge", lambda update, *_: {"merge": entries(update)})
    spy(native, "factor_grad", lambda update, _, G, *__: {"fused" if torch.is_tensor(G) else "list": entries(update)})
    layer = SnellLinear(point.in_features, point.out_features, rank=point.rank, sparsity=point.sparsity)
    x = torch.randn(point.tokens, point.in_features, requires_grad=True)
    competition.forget()
    layer(x).sum().backward()

    products = takes_products(point, "cpu")
    work = work_of(point, products)
    assert products == ("list" in done)
    assert {kind: work[kind] for kind in done} == dict(done)
    assert {"gemm", "merge"} < done.keys()


@needs_native
def test_only_float32_takes_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point(256, 512, 512, 8, 0.9)
    assert takes_products(point, "cpu")
    monkeypatch.setitem(cost_model.DTYPES, "cpu", torch.bfloat16)
    assert not takes_products(point, "cpu")


@needs_native
def test_calibration_gives_back_the_rates_that_made_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost_model.SIDE, "cpu", 64)
    names = ("select", "merge", "fused", "fused move", "list", "move", "product", "transpose")
    rates = {name: random.uniform(1, 2) for name in names}
    entries = 64 * 64

    def products(sparsity: float, tokens: int) -> float:
        return entries * (rates["list"] + (1 - sparsity) * (rates["move"] + tokens * rates["product"]))

    times = {
        "select": entries * rates["select"],
        "merge": entries * rates["merge"],
        "fused, none": entries * rates["fused"],
        "fused, many": entries * (rates["fused"] + (1 - cost_model.MANY) * rates["fused move"]),
        "products, none": products(1.0, cost_model.SHORT),
        "products, short": products(cost_model.FEW, cost_model.SHORT),
        "products, long": products(cost_model.FEW, cost_model.LONG),
        "transpose": 2 * 64 * cost_model.LONG * rates["transpose"],
    }
    work = {name: units for name, (_, units) in cost_model.operations(8, "cpu").items()}
    assert work.keys() == times.keys()
    assert rates_of(work, times) == pytest.approx(rates)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 1.7])
def test_a_slope_is_the_exponent(exponent: float) -> None:
    xs = [3.0, 10.0, 70.0, 900.0]
    assert slope(xs, [0.02 * x**exponent for x in xs]) == pytest.approx(exponent, abs=1e-12)


def test_there_is_no_slope_where_a_figure_is_missing() -> None:
    assert slope([1.0, 2.0], [None, 1.0]) is None
    assert slope([1.0, 2.0], [0.0, 1.0]) is None


def row(side: int, seconds: float, ratio: float, clock: float = 1.0) -> dict[str, Any]:
    """A made-up row of the results."""
    return {
        "in_features": side,
        "out_features": side,
        "tokens": 512,
        "rank": 32,
        "sparsity": 0.9,
        "depth": 1,
        "survivors_products_alone": True,
        "seconds": {"snell": seconds, "lora": seconds, "floor": seconds},
        "clock_seconds": clock,
        "measured_over_predicted": ratio,
        "measured_over_predicted_single_rate": 1.0,
        "snell_over_floor": 1.0,
        "snell_over_lora": 1.0,
        "memory": {name: {"saved_bytes": side, "extra_peak_bytes": None} for name in ("snell", "lora")},
        "predicted_bytes": {"saved": side, "outputs": side, "workspace": side},
    }


@pytest.mark.parametrize(("ratio", "flagged"), [(1.25, True), (1.19, False), (0.81, False), (0.75, True)])
def test_a_time_beyond_a_fifth_of_the_prediction_is_flagged(ratio: float, flagged: bool) -> None:
    rows = {"m*n": [row(64, 1.0, ratio), row(128, 1.0, 1.0)]}
    assert within_tolerance(ratio) != flagged
    assert prediction_table(rows).count("off**") == flagged
    assert f": {2 - flagged} of 2 points" in summary(rows)


def test_slopes_hold_the_clock_still(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second point ran at half the clock: twice the seconds, and twice the calibration's.
    rows = [row(64, 1.0, 1.0), row(128, 8.0, 0.5, clock=2.0), row(256, 16.0, 0.25)]
    assert figures(rows[1], clock=1.0)["snell"] == 4.0
    monkeypatch.setattr(growth, "AXES", {"m*n": growth.AXES["m*n"]})
    found = slopes({"m*n": rows})[0]
    assert found["snell"] == pytest.approx(1.0)
    assert found["model"] == pytest.approx(1.5)
    assert found["snell saved"] == pytest.approx(0.5)
    assert found["snell extra"] is None


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """What is alive already is not searched again each time that memory is measured."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@needs_native
@pytest.mark.usefixtures("quick_collection")
def test_a_small_run_writes_finite_results_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost_model.SIDE, "cpu", 64)
    middle = Point(64, 96, 32, 8, 0.9)
    grown = {
        "m*n": [middle, replace(middle, out_features=192)],
        "rank": [middle, replace(middle, rank=16)],
        "tokens": [middle, replace(middle, tokens=64)],
        "survivors": [middle, replace(middle, sparsity=0.0)],
        "depth": [replace(middle, out_features=64, depth=d) for d in (1, 2)],
        "other shapes": [replace(middle, out_features=32)],
    }
    monkeypatch.setattr(growth, "axes", lambda device: grown)
    # A process of its own would import everything again, for longer than all else here takes.
    monkeypatch.setattr(growth, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    # So little that every product is worth asking for: both ways through backward are run.
    monkeypatch.setattr(cpu, "WORTH_ASKING", 1)
    result = CliRunner().invoke(main, ["bench", "growth", "--seconds", "0.01", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "growth-cpu.json").read_text())
    assert document["axes"].keys() == growth.axes("cpu").keys()
    for rows in document["axes"].values():
        for found in rows:
            assert all(math.isfinite(number) for number in numbers(found))
            assert all(seconds > 0 for seconds in found["seconds"].values())
            assert found["measured_over_predicted"] > 0
            assert found["memory"]["snell"]["saved_bytes"] == found["predicted_bytes"]["saved"]
    assert {r["survivors_products_alone"] for r in document["axes"]["survivors"]} == {True, False}
    assert (tmp_path / "growth-cpu.png").stat().st_size > 10_000
    text = growth.report(document)
    assert "extra peak" in text
    assert document["command"] in text


def test_both_methods_adapt_every_layer() -> None:
    point = Point(16, 16, 4, 4, 0.5, depth=3)
    layers, _ = growth.built(point, "cpu")
    assert layers.keys() == {"snell", "lora"}
    for method in layers.values():
        assert sum(p.numel() for p in method.module.parameters() if p.requires_grad) == 3 * 4 * (16 + 16)
