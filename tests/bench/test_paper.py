"""The paper's experiments in the small: what each computes is what it says."""

import json
import math
import statistics

import pytest
import torch
from click.testing import CliRunner
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from cases import KERNELS
from snell import SnellLinear, reference
from snell.bench.core import draw
from snell.bench.digits import new_vit
from snell.bench.paper import fit, matrix_rank, sparsify
from snell.bench.paper.sparsify import DenseUpdate
from snell.cli import main
from snell.kernel_functions import KERNEL_FUNCTIONS

FIT = fit.Settings(size=9, ranks=(4,), matrices=3, steps=40, learning_rate=1e-2)


# Fitting random matrices.


@pytest.mark.parametrize("variant", [*map(fit.Variant, KERNELS), fit.Variant("piecewise_linear", 0.8)])
def test_fitting_takes_the_steps_that_autograd_through_the_definition_takes(variant):
    wanted, spec = fit.targets("full-rank", FIT), variant.spec(4)
    torch.manual_seed(5)
    found = fit.fit(wanted, spec, FIT)
    torch.manual_seed(5)
    A, B = torch.empty(3, 9, 4), torch.empty(3, 9, 4)
    theta = torch.tensor(spec.initial_theta(FIT.scale)).repeat(3, 1)
    for i in range(3):
        draw(A[i], B[i], theta[i], spec, FIT.scale)
    trained = [p.double().requires_grad_() for p in (A, B, theta)]
    optimizer = torch.optim.Adam(trained if KERNEL_FUNCTIONS[variant.kernel].trains_theta else trained[:2], lr=1e-2)
    expected = []
    for step in range(FIT.steps + 1):
        optimizer.zero_grad()
        errors = []
        for a, b, t, target in zip(*trained, wanted.double(), strict=True):
            update = {"kernel": spec.kernel, "groups": spec.groups}
            tau = reference.select_threshold(a, b, t, sparsity=spec.sparsity, **update)
            merged = reference.merge(a, b, t, tau, **update, gate=spec.effective_gate)
            errors.append((merged - target).square().mean())
        torch.stack(errors).sum().backward()
        if step in fit.recorded_steps(FIT.steps):
            expected.append(torch.stack(errors).tolist())
        optimizer.step()
    # Float32 against float64 through 40 steps of Adam, which amplifies rounding where gradients are small.
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=0)


def test_linear_fits_a_matrix_of_its_own_rank_and_no_other_better_than_svd():
    settings = fit.Settings(size=12, matrices=2, steps=3000, learning_rate=1e-2)
    spec = fit.Variant("linear").spec(4)
    full = fit.targets("full-rank", settings)
    low = full[:, :, :4] @ full[:, :4, :] / 2
    assert max(fit.fit(low, spec, settings)[-1]) < 1e-4 * low.square().mean()
    for found, best in zip(fit.fit(full, spec, settings)[-1], fit.best_linear(full, 4), strict=True):
        assert best * (1 - 1e-5) < found < 1.1 * best


def test_sparse_targets_are_sparse_and_full_rank_ones_are_of_full_rank():
    settings = fit.Settings(size=64, matrices=4)
    sparse, full = fit.targets("sparse", settings), fit.targets("full-rank", settings)
    # 16384 Bernoulli draws: a standard deviation of 0.0023.
    assert sparse.count_nonzero() / sparse.numel() == pytest.approx(settings.density, abs=0.012)
    assert torch.linalg.matrix_rank(full).tolist() == [64] * 4


# The competition in a dense matrix.


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_a_dense_matrix_keeps_exactly_its_largest_entries(sparsity):
    layer = DenseUpdate(nn.Linear(37, 23), sparsity=sparsity)
    delta, entries = layer.delta_weight().detach(), layer.update.detach()
    survivors = delta != 0
    assert survivors.sum() == entries.numel() - math.ceil(sparsity * entries.numel())
    assert torch.equal(delta[survivors], entries[survivors])
    assert entries[survivors].abs().min() > entries[~survivors].abs().max()


@pytest.mark.parametrize("straight_through", [False, True])
def test_losers_of_a_dense_matrix_get_a_gradient_only_straight_through(straight_through):
    layer = DenseUpdate(nn.Linear(20, 30), sparsity=0.9, straight_through=straight_through)
    x, grad_y = torch.randn(5, 20), torch.randn(5, 30)
    survivors = layer.delta_weight().detach() != 0
    layer(x).backward(grad_y)
    expected = grad_y.T @ x
    if not straight_through:
        expected = expected * survivors
    # Sums of five products, in float32.
    torch.testing.assert_close(layer.update.grad, expected, rtol=1e-5, atol=1e-5)


def test_a_dense_matrix_is_added_to_a_frozen_layer():
    linear = nn.Linear(20, 30)
    layer = DenseUpdate(linear, sparsity=0.9)
    x = torch.randn(5, 20)
    torch.testing.assert_close(layer(x), linear(x) + x @ layer.delta_weight().T, rtol=1e-5, atol=1e-6)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["update"]


# Sparsifying, on real data.


def test_every_contender_changes_every_linear_layer_as_it_says():
    pretrained = new_vit()
    linears = sum(isinstance(module, nn.Linear) for module in pretrained.modules()) - 1
    for contender in sparsify.contenders((8, 16, 32), 0.9):
        model = contender.build(pretrained)
        updates = [module for module in model.modules() if isinstance(module, (SnellLinear, DenseUpdate))]
        assert len(updates) == (0 if contender.matrix == "none" else linears)
        for update in updates:
            delta = update.delta_weight()
            zeros = math.ceil(contender.sparsity * delta.numel())
            assert int((delta == 0).sum()) == zeros
            if contender.rank and not zeros:
                assert update.snell_A.shape[1] == contender.rank


def test_sparsifying_judges_other_draws_than_it_chooses_by_and_reports_what_it_found():
    settings = {"steps": 1, "pretraining_steps": 1, "choosing": 1, "judging": 2}
    chosen = [c for c in sparsify.contenders((8,), 0.9) if c.matrix in ("linear", "piecewise_linear")]
    results = json.loads(json.dumps(sparsify.measure(chosen, **settings)["results"]))
    for result in results:
        assert len(result["test"]) == settings["judging"]
        means = [statistics.fmean(tried) for tried in result["validation"]]
        assert means[result["rates"].index(result["rate"])] == max(means)
    text = sparsify.tables(results)
    klora = next(r for r in results if (r["matrix"], r["sparsity"]) == ("piecewise_linear", 0.0))
    assert f"| 73.2 | 74.2 | {statistics.fmean(klora['test']):.1f} ± " in text
    assert "| linear (LoRA), r = 8 | 75.1 | 65.7 |" in text


def test_a_gain_is_taken_draw_by_draw():
    without, competing = {"test": [50.0, 70.0, 60.0]}, {"test": [52.0, 73.0, 61.0]}
    # Differences 2, 3 and 1: their mean is 2, their standard error 1 / sqrt(3); the methods' own are ten times that.
    assert sparsify.gain(without, competing) == f"+2.0 ± {1 / math.sqrt(3):.1f}"
    assert sparsify.gain(competing, without).startswith("-2.0")


# Ranks of the merged update.


def _ranks(kernel, sparsity=0.0, size=48, rank=8):
    return matrix_rank.drawn(sparsify.Contender(kernel, rank, sparsity), size, 2)


def test_linear_has_the_factors_rank_and_piecewise_linear_the_full_one():
    torch.manual_seed(0)
    assert _ranks("linear")["rank"] == 8
    assert _ranks("piecewise_linear")["rank"] == 48
    assert _ranks("piecewise_linear")["effective"] > 8 >= _ranks("linear")["effective"]


def test_competition_alone_lifts_the_rank_of_a_linear_merge():
    torch.manual_seed(0)
    assert _ranks("linear", sparsity=0.5)["rank"] > 40


def test_ranks_of_a_known_spectrum():
    equal = matrix_rank.measures(torch.tensor([3.0, 3.0, 3.0, 0.0], dtype=torch.float64), 4)
    assert equal == {"rank": 3, "rank_float32": 3, "effective": pytest.approx(3)}
    tail = matrix_rank.measures(torch.tensor([1.0, 0.5, 1e-9, 1e-17], dtype=torch.float64), 4)
    assert (tail["rank"], tail["rank_float32"]) == (3, 2)


# Reports.


def test_the_fit_command_writes_what_it_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "Settings", lambda **options: FIT)
    done = CliRunner().invoke(main, ["bench", "fit", "--out", str(tmp_path)], catch_exceptions=False)
    document = json.loads((tmp_path / "fit.json").read_text())
    text = fit.report(document)
    for result in document["results"]:
        row = (
            f"| {fit.Variant(result['kernel'], result['sparsity']).label} | {statistics.fmean(result['errors']):.4f} ± "
        )
        assert row in text
        assert row in done.output
    assert (tmp_path / "fit.png").stat().st_size > 10_000
