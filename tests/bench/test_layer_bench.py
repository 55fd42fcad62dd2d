"""The layer benchmark measures what it says, and the README repeats what was measured."""

import math

import pytest
import torch
from torch import nn

from snell import functional
from snell.bench.layer import repetitions_within, run_case, table
from snell.bench.layer_methods import GROUPS, LAYERS, SCALE, SPARSITY, Case, Published
from snell.bench.measure import extra_peak_bytes, median_ratio, saved_bytes
from snell.bench.pages import pages, rendered


def test_a_case_reports_every_method() -> None:
    result = run_case(Case(96, 64, 24, torch.float32, "cpu"), budget=0.01, tick=lambda: None)
    assert set(result["methods"]) == {"floor", *LAYERS}
    assert all(entry["seconds"] > 0 for entry in result["methods"].values())
    assert result["methods"]["floor"]["ratio_to_floor"] == 1
    # SNELL keeps tau and nothing else beside its inputs; the published merge keeps matrices.
    assert result["methods"]["snell"]["saved_bytes_beyond_x"] <= 64
    assert result["methods"]["published"]["saved_bytes_beyond_x"] >= 96 * 64 * 4
    assert len(table([result]).splitlines()) == 3


def test_a_method_that_raises_is_reported_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setitem(LAYERS, "published", Refuses)
    result = run_case(Case(32, 32, 4, torch.float32, "cpu"), budget=0.01, tick=lambda: None)
    assert result["methods"]["published"] == {"error": "quantile() input tensor is too large"}
    assert "**raises**" in table([result])


def test_the_published_algorithm_is_the_magnitude_gate() -> None:
    layer = Published(nn.Linear(40, 30))
    theta = torch.tensor([SCALE, -SCALE])
    settings = {"kernel": "piecewise_linear", "groups": GROUPS}
    delta = layer._merge(layer.A, layer.B)
    # quantile interpolates between the two entries around s * (N - 1); nothing lies between them.
    tau = functional.select_threshold(layer.A, layer.B, theta, sparsity=SPARSITY, **settings)
    expected = functional.merge(layer.A, layer.B, theta, tau, gate="magnitude", **settings)
    assert delta.count_nonzero() == 40 * 30 - math.ceil(SPARSITY * 40 * 30)
    assert (delta - expected).norm() <= 1e-4 * expected.norm()


def test_saved_bytes_counts_each_storage_once_and_leaves_out_what_is_held() -> None:
    x, weight = torch.randn(10, 20, requires_grad=True), torch.randn(20, 20, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight).exp(), [x, weight]) == 10 * 20 * 4
    assert saved_bytes(lambda: x * x, []) == 10 * 20 * 4


def test_extra_peak_sees_an_allocation_that_is_gone_at_the_end() -> None:
    peak = extra_peak_bytes(lambda: torch.ones(2**24).sum(), "cpu")
    if peak is None:
        pytest.skip("the resident set's high-water mark cannot be read here")
    assert 60 * 2**20 <= peak <= 90 * 2**20


def test_repetitions_are_odd_and_within_bounds() -> None:
    assert repetitions_within(1.0, 1e-9) % 2 == 1
    assert repetitions_within(1.0, 100.0) == 7
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_the_pages_repeat_the_results() -> None:
    for page in pages():
        text = page.read_text()
        assert rendered(text) == text, f"{page.name}: run python -m snell.bench.pages"
