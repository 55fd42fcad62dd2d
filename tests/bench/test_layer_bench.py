"""The layer benchmark measures what it says, and the README repeats what was measured."""

import json
import math
import weakref

import pytest
import torch
from torch import nn

from snell import functional
from snell.bench import clock, report
from snell.bench.clock import median_ratio, slow, take_turns, turns_of_each, turns_within
from snell.bench.contenders import ADAPT, GROUPS, RANK, SCALE, SPARSITY, Published, PublishedMixture
from snell.bench.experiments import layer
from snell.bench.experiments.layer import COLUMNS, Case
from snell.bench.memory import extra_peak_bytes, saved_bytes
from snell.bench.names import METHODS
from snell.bench.pages import pages, rendered


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("layer")
    document = layer.measure("cpu", 0.5, [Case(96, 64, 24, torch.float32, "cpu")])
    report.publish(out, "layer", layer, document)
    assert (out / "layer-cpu.png").stat().st_size > 10_000
    return json.loads((out / "layer-cpu.json").read_text())["cases"][0]


def test_a_case_reports_every_method(result: dict) -> None:
    assert set(result["methods"]) == {"floor", *METHODS}
    assert all(entry["seconds"] > 0 for entry in result["methods"].values())
    assert result["methods"]["floor"]["ratio_to_floor"] == 1
    assert result["methods"]["lora"]["ratio_to_lora"] == 1
    # SNELL keeps tau and nothing else beside its inputs; the published merge keeps matrices.
    assert result["methods"]["snell"]["saved_bytes_beyond_x"] <= 64
    assert result["methods"]["published"]["saved_bytes_beyond_x"] >= 96 * 64 * 4
    assert len(report.table(COLUMNS, [result]).splitlines()) == 3


def test_every_low_rank_method_and_shira_train_as_many_numbers(result: dict) -> None:
    for method in ("snell", "lora", "shira", "published"):
        assert result["methods"][method]["trainable"] == RANK * (96 + 64)
        # AdamW: two moments of each, in float32, and the count of steps of each tensor.
        assert 0 < result["methods"][method]["optimizer_bytes"] - 2 * 4 * RANK * (96 + 64) <= 4 * 2
    assert result["methods"]["dora"]["trainable"] == RANK * (96 + 64) + 64
    assert result["methods"]["full"]["trainable"] == 96 * 64 + 64


def test_a_method_that_raises_is_reported_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, rank: int) -> nn.Module:
        raise RuntimeError("quantile() input tensor is too large")

    monkeypatch.setitem(ADAPT, "published", refuse)
    document = layer.measure("cpu", 0.5, [Case(64, 64, 4, torch.float32, "cpu")])
    published = document["cases"][0]["methods"]["published"]
    assert published == {"error": "quantile() input tensor is too large"}
    text = layer.report({"command": "", "machine": {"cpu": "", "threads": 1, "torch": ""}, **document})
    # Its time and what it is a multiple of; and in the tables of all methods.
    assert text.count("**raises**") == 4


def test_a_step_that_takes_longer_than_the_budget_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step = layer.Layers.step
    monkeypatch.setattr(layer.Layers, "step", lambda self: calls.append(self) or step(self))
    found = layer.measure("cpu", 1e-9, [Case(64, 64, 4, torch.float32, "cpu")])["cases"][0]["methods"]
    assert len(calls) == len(METHODS)
    assert all(entry["repetitions"] == 1 for entry in found.values())


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


def test_the_published_mixture_is_the_magnitude_gate() -> None:
    layer = PublishedMixture(nn.Linear(40, 30))
    with torch.no_grad():
        for scalar, value in ((layer.alpha, 0.5), (layer.beta, 0.01), (layer.gamma, 0.2)):
            scalar.fill_(value)
    theta = torch.cat([torch.tensor([SCALE, -SCALE]), layer.alpha, layer.beta, layer.gamma])
    settings = {"kernel": "mixture", "groups": GROUPS}
    delta = layer._merge(layer.A, layer.B)
    tau = functional.select_threshold(layer.A, layer.B, theta, sparsity=SPARSITY, **settings)
    expected = functional.merge(layer.A, layer.B, theta, tau, gate="magnitude", **settings)
    assert (delta - expected).norm() <= 1e-4 * expected.norm()


def test_saved_bytes_counts_each_storage_once_and_leaves_out_what_is_held() -> None:
    x, weight = torch.randn(10, 20, requires_grad=True), torch.randn(20, 20, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight).exp(), [x, weight]) == 10 * 20 * 4
    assert saved_bytes(lambda: x * x, []) == 10 * 20 * 4
    # A sparse tensor is its indices, two int64 an entry here, and its values.
    sparse = torch.eye(20).to_sparse_coo()
    assert saved_bytes(lambda: torch.sparse.mm(sparse, weight), [weight]) == 20 * (2 * 8 + 4)


def test_saved_bytes_leaves_nothing_behind() -> None:
    x, made = torch.randn(10, requires_grad=True), []

    def forward() -> torch.Tensor:
        out = x.exp()  # kept by its own node
        made.append(weakref.ref(out))
        return out.sum()

    assert saved_bytes(forward, []) == 40
    assert made[0]() is None


def test_extra_peak_sees_an_allocation_that_is_gone_at_the_end() -> None:
    peak = extra_peak_bytes(lambda: torch.ones(2**24).sum(), "cpu")
    if peak is None:
        pytest.skip("the resident set's high-water mark cannot be read here")
    assert 60 * 2**20 <= peak <= 90 * 2**20


def test_repetitions_are_odd_and_within_bounds() -> None:
    assert turns_within(1.0, 1e-9) == clock.MOST | 1
    assert turns_within(20.0, 100.0) == 7
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_slow_methods_have_fewer_turns_and_the_others_equal_ones() -> None:
    seconds = {"a": 0.1, "b": 0.1, "c": 0.2, "d": 5.0}
    assert slow(seconds) == {"d"}
    assert turns_of_each(20.0, seconds) == {"a": 13, "b": 13, "c": 13, "d": 3}
    # A first look is no longer than it is told to be.
    assert turns_of_each(1.0, dict.fromkeys("abc", 2.0)) == {"a": 1, "b": 1, "c": 1}


def test_a_step_with_fewer_turns_takes_them_in_the_first_rounds() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = take_turns(steps, "cpu", {"a": 3, "b": 1}, lambda: calls.append("|"))
    assert "".join(calls) == "ab|a|a|"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 1}
    # Only rounds that both were in are compared.
    assert median_ratio([8.0, 9.0, 9.0], [4.0]) == 2.0


def test_an_empty_section_is_filled_and_takes_nothing_of_the_next() -> None:
    empty = "<!-- results: resources -->\n<!-- end -->\nbetween\n"
    page = rendered(empty + "<!-- results: layer-cpu brief -->\nold\n<!-- end -->\nlast")
    first, rest = page.split("\n<!-- end -->\nbetween\n")
    assert first.startswith("<!-- results: resources -->\n| kernel |")
    assert rest.startswith("<!-- results: layer-cpu brief -->\n| in x out, tokens |")
    assert rest.endswith("\n<!-- end -->\nlast")
    assert "old" not in rest
    assert rendered(page) == page


def test_the_pages_repeat_the_results() -> None:
    for page in pages():
        text = page.read_text()
        assert rendered(text) == text, f"{page.name}: run python -m snell.bench.pages"
