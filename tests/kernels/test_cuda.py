"""Select in CUDA C++, emulated on the CPU: the tests of Triton's select again, and its bits beside Triton's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import test_select
import torch
from launching import exact, parameters, recorded

from emulation import SELECT, build, selecting
from snell import backends, functional
from snell.competition import columns
from snell.kernels import cuda, selection
from snell.kernels.selection import select_thresholds
from snell.spec import Spec

#: Tests of Triton's launches, and of the host's part, which is the same.
ELSEWHERE = {
    "test_one_pass_over_K_is_the_rule",
    "test_a_selection_is_three_launches_known_or_not",
    "test_like_layers_share_launches_and_each_gets_its_own_tau",
    "test_a_group_beyond_the_workspace_goes_in_several_calls",
    "test_the_memory_is_not_allocated_by_the_calling_thread",
}

globals().update(
    {name: test for name, test in vars(test_select).items() if name.startswith("test_") and name not in ELSEWHERE}
)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(SELECT, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def _emulated(library, on_triton):
    with selecting(library):
        yield


def of_triton(layer, smooth_max=None):
    """tau and fingerprint by Triton's kernels."""
    with cuda.use(False):
        selection.forget()
        return select_thresholds([layer], smooth_max)


def test_it_is_this_library_that_selects():
    layer = parameters(20, 30)
    with recorded() as launched:
        assert select_thresholds([layer])[0] == exact(layer)
    assert "count_kernel" not in launched


def test_a_kernel_function_that_the_library_lacks_is_tritons(monkeypatch):
    monkeypatch.setattr(cuda, "KERNELS", ("linear",))
    layer = parameters(20, 30)
    with recorded() as launched:
        assert select_thresholds([layer])[0] == exact(layer)
    assert "count_kernel" in launched


@pytest.mark.parametrize("kernel, groups", [("linear", 1), ("sigmoid", 1), ("rbf", 1), ("piecewise_linear", 3)])
@pytest.mark.parametrize("m, n, per_group", [(1, 1, 1), (64, 64, 32), (65, 63, 33), (3, 200, 70), (130, 5, 2)])
def test_tau_has_the_bits_of_tritons_at_every_edge_of_a_tile(kernel, groups, m, n, per_group):
    layer = parameters(m, n, groups * per_group, 0.7, kernel=kernel, groups=groups)
    tau, fingerprint = select_thresholds([layer])
    assert tau.equal(exact(layer)[None])
    # Triton's `verify` checks it.
    assert fingerprint.equal(of_triton(layer)[1])


@pytest.mark.parametrize("gamma", [0.5, 0.0, -0.3, -1e-9])
def test_a_softmax_over_the_columns_is_a_part_of_K(gamma):
    A, B, theta, spec = parameters(70, 90, 6, 0.8, kernel="mixture")
    theta[-3:] = torch.tensor([0.7, 0.2, gamma])
    maxima = columns.smooth_max(A, B, theta, spec)
    layer = A, B, theta, spec
    assert select_thresholds([layer], maxima)[0].equal(of_triton(layer, maxima)[0])


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_tau_may_be_an_end_of_the_bracket_that_many_entries_share(monkeypatch, sparsity):
    """Half the entries are 0, half are equal: both values are ends, and nothing lies between them."""
    test_select.planned(monkeypatch, samples=1000, low=100, high=900)
    A, B = torch.zeros(70, 4), torch.zeros(66, 4)
    A[::2] = 1.0
    layer = A, B, torch.tensor([0.5, 0.25]), Spec(4, sparsity)
    assert select_thresholds([layer])[0] == exact(layer) == (1.0606601 if sparsity > 0.5 else 0.0)


def test_the_sample_brackets_tau_as_closely_as_planned(monkeypatch):
    monkeypatch.setattr(selection, "PASSES", 0)
    states, call = [], cuda.select

    def keep(device, **numbers):
        states.append(numbers["state"])
        call(device, **numbers)

    monkeypatch.setattr(cuda, "select", keep)
    layer = A, B, theta, spec = parameters(1100, 2000, 2, 0.8)
    select_thresholds([layer])
    plan = selection._plan(layer)
    assert plan.samples == selection.SAMPLES
    with backends.use("blocked"):
        K = functional.merge(A, B, theta, torch.zeros(()), kernel=spec.kernel, groups=spec.groups, gate="none")
    for end, order in zip(states[0][0, :2].int().view(torch.float32), (plan.low, plan.high), strict=True):
        q = order / plan.samples
        assert float((K.abs() <= end).float().mean()) == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / plan.samples))


def test_nothing_of_a_pass_is_left_to_the_next(monkeypatch):
    """Two brackets that miss: the first has 40 % of the entries at its upper end."""
    test_select.planned(monkeypatch, samples=1000, low=100, high=500)
    A = torch.tensor([1.0] * 20 + [1.0001] * 40 + [2.0] * 40)[:, None]
    layer = A, torch.zeros(30, 1), torch.ones(1), Spec(1, 0.65, groups=1)
    assert select_thresholds([layer])[0] == 2.0


def test_a_tau_of_other_factors_in_the_memo_is_not_taken():
    """As another stream leaves it that has written half."""
    layer = parameters(30, 40)
    select_thresholds([layer])
    test_select.poison(layer[0].device)
    selection._memos[layer[0].device]._held[:, 1] ^= 1 << 40
    assert select_thresholds([layer])[0] == exact(layer)


def test_ties_and_what_is_not_a_number_at_random():
    """Factors of few different values: hundreds of entries share each |K|, some of them infinite or NaN."""
    rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    for _ in range(12):
        m, n = (int(torch.randint(1, 90, (), generator=rng)) for _ in range(2))
        A, B = (torch.randint(-1, 2, (length, 4), generator=rng).float() for length in (n, m))
        A[torch.rand(A.shape, generator=rng) < 0.01] = float("nan")
        B[torch.rand(B.shape, generator=rng) < 0.01] = float("inf")
        sparsity = float(torch.rand((), generator=rng))
        layer = A, B, torch.tensor([0.5, -0.5]), Spec(4, max(sparsity, 0.01))
        assert torch.equal(select_thresholds([layer])[0].nan_to_num(-1), exact(layer)[None].nan_to_num(-1))


def test_threads_and_blocks_may_take_turns_in_any_order(library, monkeypatch):
    layer = parameters(150, 170, 8)
    monkeypatch.setattr(selection, "PROGRAMS", 5)
    for seed in range(4):
        with selecting(library, seed):
            selection.forget()
            assert select_thresholds([layer])[0] == exact(layer)


def test_layers_of_a_group_each_get_their_own():
    layers = [parameters(20, 70, 6) for _ in range(3)]
    taus, fingerprints = select_thresholds(layers)
    assert taus.tolist() == [float(exact(layer)) for layer in layers]
    assert fingerprints.tolist() == [int(of_triton(layer)[1]) for layer in layers]


def test_triton_and_this_library_remember_for_each_other():
    layer = parameters(30, 40)
    of_triton(layer)
    test_select.poison(layer[0].device)
    assert select_thresholds([layer])[0] == 7.0
