"""tau once per parameter version: never too often, and never stale."""

import math

import pytest
import torch

from snell import SnellLinear, backends, functional
from snell.competition import memo

PIECEWISE = {"sparsity": 0.8, "kernel": "piecewise_linear", "groups": 2}


def draw():
    return torch.randn(17, 6), torch.randn(11, 6), torch.tensor([0.3, -0.3])


def expected(A, B, theta, sparsity=0.8, kernel="piecewise_linear", groups=2):
    K = functional.merge(A, B, theta, A.new_zeros(()), kernel=kernel, groups=groups, gate="none")
    return K.abs().flatten().sort().values[math.ceil(sparsity * K.numel()) - 1]


@pytest.fixture
def selections(backend, monkeypatch):
    """How often a threshold was really computed."""
    if backend == "triton":
        pytest.skip("remembers on the device: tests/backends/test_triton.py")
    count = []
    remember = memo.remember

    def counting(key, compute):
        return remember(key, lambda: count.append(1) or compute())

    monkeypatch.setattr(memo, "remember", counting)
    return count


def test_the_same_factors_are_selected_among_once(backend, selections):
    A, B, theta = draw()
    first = functional.select_threshold(A, B, theta, **PIECEWISE)
    assert functional.select_threshold(A, B, theta, **PIECEWISE).equal(first)
    # What they hold counts, not who holds them.
    assert functional.select_threshold(A.clone(), B.clone(), theta.clone(), **PIECEWISE).equal(first)
    assert len(selections) == 1


def test_a_step_of_accumulation_evaluation_and_checkpointing_selects_once(backend, selections):
    layer = SnellLinear(17, 11, rank=6)
    for _ in range(3):
        y = torch.utils.checkpoint.checkpoint(layer, torch.randn(4, 17), use_reentrant=False)
        y.sum().backward()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 17))
    assert len(selections) == 1


EDITS = {
    "in place": lambda layer: layer.snell_A.mul_(1.7),
    "data": lambda layer: layer.snell_A.data.mul_(1.7),
    "one entry of data": lambda layer: layer.snell_B.data.view(-1)[5:6].add_(10),
    "the last byte": lambda layer: layer.snell_A.data.view(torch.uint8).view(-1)[-1:].bitwise_xor_(1),
    "data replaced": lambda layer: setattr(layer.snell_B, "data", layer.snell_B.data.clone() * 1.7),
    "numpy": lambda layer: layer.snell_A.detach().numpy().__imul__(1.7),
    "theta": lambda layer: layer.snell_theta.data[0].mul_(1.5),
    "swapped rows": lambda layer: layer.snell_A.data.copy_(layer.snell_A.data.flip(1)),
    "copy": lambda layer: layer.load_state_dict(SnellLinear(17, 11, rank=6, scale=0.2).state_dict()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_no_edit_of_the_factors_goes_unseen(backend, selections, edit):
    layer = SnellLinear(17, 11, rank=6)
    layer.threshold()
    with torch.no_grad():
        EDITS[edit](layer)
    tau = layer.threshold()
    assert len(selections) == 2
    assert tau.equal(expected(layer.snell_A, layer.snell_B, layer.snell_theta, 0.9))


def test_every_setting_is_part_of_the_question(backend):
    A, B, theta = draw()
    asked = [
        {**PIECEWISE},
        {**PIECEWISE, "sparsity": 0.81},
        {**PIECEWISE, "kernel": "sigmoid", "groups": 1},
        {**PIECEWISE, "kernel": "rbf", "groups": 1},
        {**PIECEWISE, "kernel": "linear", "groups": 1},
    ]
    taus = []
    for options in asked:
        scalars = {"piecewise_linear": theta, "linear": theta[:0]}.get(options["kernel"], torch.tensor([0.3, 1, 0.1]))
        taus.append(functional.select_threshold(A, B, scalars, **options))
        assert taus[-1].equal(expected(A, B, scalars, **options))
    assert len({tau.item() for tau in taus}) == len(asked)


def test_shapes_of_the_same_bytes_are_told_apart(backend):
    values = torch.randn(24)
    taus = set()
    for n, m in ((2, 4), (4, 2)):
        A, B = values[: n * 4].view(n, 4), values[n * 4 :].view(m, 4)
        tau = functional.select_threshold(A, B, torch.tensor([0.3, -0.2]), **PIECEWISE)
        assert tau.equal(expected(A, B, torch.tensor([0.3, -0.2])))
        taus.add(tau.item())
    # The same bytes as float64 are other numbers.
    A, B = torch.randn(4, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    assert functional.select_threshold(A, B, theta, **PIECEWISE).dtype == torch.float64


def test_one_backend_is_never_given_the_threshold_of_another():
    A, B = torch.randn(61, 24), torch.randn(53, 24)
    theta = torch.tensor([0.3, -0.3])
    for _ in range(2):
        for name in backends.AVAILABLE:
            with backends.use(name):
                assert functional.select_threshold(A, B, theta, **PIECEWISE).equal(expected(A, B, theta)), name


def test_what_a_caller_does_to_tau_stays_his():
    A, B, theta = draw()
    tau = functional.select_threshold(A, B, theta, **PIECEWISE)
    kept = tau.clone()
    tau.zero_()
    again = functional.select_threshold(A, B, theta, **PIECEWISE)
    assert again.equal(kept)
    again.fill_(7)
    assert functional.select_threshold(A, B, theta, **PIECEWISE).equal(kept)


def test_the_memo_forgets_the_least_recently_used(monkeypatch):
    monkeypatch.setattr(memo, "CAPACITY", 3)
    calls = []

    def ask(key):
        return memo.remember(key, lambda: calls.append(key) or torch.tensor(float(key)))

    for key in (1, 2, 3, 1, 4, 1, 2):
        assert ask(key) == key
    assert calls == [1, 2, 3, 4, 2]
    memo.forget()
    ask(1)
    assert calls[-1] == 1
