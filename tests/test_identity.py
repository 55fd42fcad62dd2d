"""The identity start: a fresh layer is its base to the bit and trains; then it is W0 + dW(A, B) - dW(A0, B0)."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from cases import GATES_THAT_COMPETE, KERNELS
from snell import SnellLinear, backends, competition, counter, functional, initial, reference
from snell.spec import Spec
from snell.testing.bounds import Expected, assert_within, rounded
from snell.update import Gradients

M, N = 29, 43


def started(kernel: str = "piecewise_linear", gate: str = "soft", sparsity: float = 0.8, **options) -> SnellLinear:
    base = nn.Linear(N, M, dtype=options.pop("dtype", None))
    with torch.no_grad():
        base.weight[3, 5] = -0.0  # adding +0 would lose the sign
    settings = {"rank": 6, "kernel": kernel, "gate": gate, "sparsity": sparsity, "init_weights": "identity"}
    return SnellLinear.from_linear(base, **settings | options)


def moved(layer: SnellLinear) -> SnellLinear:
    """The layer with other factors than its first, as after some training."""
    with torch.no_grad():
        for factor in (layer.snell_A, layer.snell_B, layer.snell_theta):
            factor.mul_(1 + 0.5 * torch.rand_like(factor))
    return layer


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8)


SETTINGS = [*product(KERNELS, GATES_THAT_COMPETE, [0.8]), ("piecewise_linear", "soft", 0.0), ("rbf", "hard", 0.0)]


def thinned(backend: str) -> list[tuple[str, str, float]]:
    return SETTINGS[::7] if backend == "triton" else SETTINGS


def test_a_fresh_layer_is_its_base_to_the_bit(monkeypatch, backend) -> None:
    """Also by merge's own bits, as on a GPU, where the host does not ask whether the factors have moved."""
    dtypes = torch.float32, torch.bfloat16, torch.float64
    for setting, dtype in product(thinned(backend), dtypes[: 2 if backend == "triton" else 3]):
        layer = started(*setting, dtype=dtype)
        assert bits(functional.dense(layer._update(), weight=layer.weight)).equal(bits(layer.weight)), (setting, dtype)
        for asked, tokens in ((True, 5), (False, 19), (False, 5)):  # few tokens take another path on some backends
            if not asked:
                monkeypatch.setattr("snell.blocks._adds_nothing", lambda *_: False)
            x, dy = torch.randn(tokens, N, dtype=dtype), torch.randn(tokens, M, dtype=dtype)
            mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, base = layer(mine), nn.functional.linear(theirs, layer.weight, layer.bias)
            torch.autograd.backward([y, base], [dy, dy])
            assert mine.grad.equal(theirs.grad), (setting, dtype)
            if backend == "triton" and tokens == 5 and not asked:  # a kernel of its own, which sums in another order
                torch.testing.assert_close(y, base)
            else:
                assert y.equal(base), (setting, dtype)
            assert layer.snell_A.grad.any()
            assert layer.snell_B.grad.any()
        monkeypatch.undo()


def test_the_start_is_a_constant_and_the_gradients_are_those_of_the_update_alone(backend) -> None:
    for setting in thinned(backend):
        layer = moved(started(*setting))
        alone = layer._update()._replace(start=None)
        leaves = [t.detach().clone().requires_grad_() for t in alone[:3]]
        x, dy = torch.randn(19, N), torch.randn(19, M)
        functional.linear(
            x, layer.weight, layer.bias, alone._replace(A=leaves[0], B=leaves[1], theta=leaves[2])
        ).backward(dy)
        layer(x).backward(dy)
        for parameter, leaf in zip((layer.snell_A, layer.snell_B, layer.snell_theta), leaves, strict=True):
            if parameter.requires_grad and parameter.numel():
                assert parameter.grad.equal(leaf.grad), setting


def test_factor_grad_writes_the_bits_of_merge_with_a_start_too(backend) -> None:
    for setting, dtype in product(thinned(backend), (torch.float32, torch.bfloat16)):
        layer = moved(started(*setting, dtype=dtype))
        update, weight = layer._update(), layer.weight.detach()
        for out, base in product((torch.randn(M, N, dtype=dtype), torch.randn(N, M, dtype=dtype).t()), (weight, None)):
            backends.of(update.A).factor_grad(out, update, Gradients.zeros(update), base, out)
            expected = torch.empty_like(out)
            backends.of(update.A).merge(update, base, expected)
            assert out.equal(expected), (setting, dtype)


def test_a_trained_layer_adds_the_difference_of_both_updates(backend) -> None:
    """Also where rows or columns are computed a block at a time, and without a weight."""
    for (kernel, gate, sparsity), dtype in product(thinned(backend), (torch.float32, torch.bfloat16)):
        layer = moved(started(kernel, gate, sparsity, dtype=dtype))
        update = layer._update()
        (delta, error), (first, first_error) = (
            Expected(u).delta() for u in (update._replace(start=None), update.start)
        )
        exact = tuple(t.detach().double() for t in update.start[:4])
        options = {"kernel": kernel, "groups": 2, "gate": update.spec.gate}
        value = reference.merge(*(t.detach().double() for t in update[:4]), **options, start=exact)
        assert value.equal(delta - first)
        bound = error + first_error + 2**-23 * (delta.abs() + first.abs())
        assert_within(functional.dense(update).detach(), value, bound, "dW")
        merged = value + layer.weight.double()
        bound = rounded(merged, bound + 2**-23 * (merged.abs() + layer.weight.double().abs()), dtype)
        assert_within(functional.dense(update, weight=layer.weight).detach(), merged, bound, "W0 + dW")
        rows, columns = slice(3, 17), slice(8, 40)
        part = functional.dense(update.rows(rows).columns(columns))
        assert part.equal(functional.dense(update)[rows, columns])
        x = torch.eye(N, dtype=dtype)
        y = functional.linear(x, None, None, update)
        assert_within(y.detach().T, value, rounded(value, error + first_error + 2**-22 * delta.abs(), dtype), "x dW^T")
        assert layer(x).equal(nn.functional.linear(x, functional.dense(update, weight=layer.weight), layer.bias))


def test_a_large_fresh_layer_is_its_base_to_the_bit_though_it_is_computed_in_blocks(monkeypatch, backend) -> None:
    """A GEMM in blocks may round otherwise; so these blocks are made to."""
    monkeypatch.setattr("snell.blocks.WORKSPACE_BYTES", 16 * N * 4)
    monkeypatch.setattr("snell.blocks.BLOCK_MULTIPLE", 4)
    layer = started()
    x, dy = torch.randn(2, 3, N, requires_grad=True), torch.randn(2, 3, M)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad(base, x, dy)
    with monkeypatch.context() as patch:
        patch.setattr(type(backends.serving("cpu")), "merge", lambda *_: pytest.fail("W0 + dW is written"))
        y = layer(x)
        assert y.equal(base)
        assert torch.autograd.grad(y, x, dy, retain_graph=True)[0].equal(expected)
    with torch.no_grad():
        layer.snell_B[0, 0] += 1
    assert not layer(x).equal(base)


def test_blocks_of_a_large_layer_carry_their_part_of_the_start(monkeypatch, backend) -> None:
    monkeypatch.setattr("snell.blocks.WORKSPACE_BYTES", 16 * N * 4)
    monkeypatch.setattr("snell.blocks.BLOCK_MULTIPLE", 4)
    layer = moved(started())
    merged = functional.dense(layer._update(), weight=layer.weight).detach()
    x = torch.randn(19, N, requires_grad=True)
    dy = torch.randn(19, M)
    y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(y, nn.functional.linear(x, merged, layer.bias))
    torch.testing.assert_close(x.grad, dy @ merged)


@pytest.mark.parametrize(("kernel", "gate"), [("piecewise_linear", "soft"), ("sigmoid", "hard"), ("rbf", "magnitude")])
def test_gradcheck(kernel, gate) -> None:
    with backends.use("blocked"):  # its K has the reference's bits, and so its survivors
        layer = moved(started(kernel, gate, dtype=torch.float64))
        update = layer._update()
    x = torch.randn(3, N, dtype=torch.float64, requires_grad=True)
    gates = reference.gate_values(
        reference.kernel_matrix(*(t.detach() for t in update[:3]), kernel=kernel, groups=2), update.tau, gate=gate
    )
    first = reference.merge(*update.start[:4], kernel=kernel, groups=2, gate=gate)

    def by_hand(x: Tensor, A: Tensor, B: Tensor, theta: Tensor) -> Tensor:
        K = reference.kernel_matrix(A, B, theta, kernel=kernel, groups=2)
        return nn.functional.linear(x, layer.weight + (K * gates - first), layer.bias)

    leaves = x, *(t.detach().clone().requires_grad_() for t in update[:3])
    # The gates count as constants, so this is what the layer differentiates.
    assert torch.autograd.gradcheck(by_hand, leaves)
    dy = torch.randn(3, M, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(*leaves), leaves, dy)
    A, B, theta = leaves[1:]
    with backends.use("blocked"):
        y = functional.linear(x, layer.weight, layer.bias, update._replace(A=A, B=B, theta=theta))
        grads = torch.autograd.grad(y, leaves, dy)
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-12)


def test_merging_and_unmerging_are_exact(backend) -> None:
    layer = started()
    base = layer.weight.detach().clone()
    layer.merge()
    assert bits(layer.weight).equal(bits(base))
    layer.unmerge()
    moved(layer)
    expected = functional.dense(layer._update(), weight=base)
    changed = layer.num_survivors()
    assert 0 < changed <= 2 * 0.2 * M * N
    layer.merge()
    assert layer.weight.equal(expected)
    assert sum(len(block) for block in layer._merged.replaced) == changed
    assert layer.to_linear().weight.equal(expected)
    layer.unmerge()
    assert bits(layer.weight).equal(bits(base))


def test_a_state_dict_says_from_which_seed_and_scale_the_start_is_drawn_again() -> None:
    layer = moved(started(init_seed=2**53 - 1, scale=2.5))
    state = layer.state_dict()
    assert state["snell_start"].tolist() == [2**53 - 1, 2.5]
    x = torch.randn(4, N)
    other = SnellLinear(N, M, rank=6, sparsity=0.8, init_weights="identity")
    other.load_state_dict(state)
    assert other(x).equal(layer(x))
    del state["snell_start"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"snell_start"'):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"snell_start"'):
        SnellLinear(N, M, rank=6, sparsity=0.8).load_state_dict(layer.state_dict())
    assert "snell_start" not in SnellLinear(N, M, rank=6).state_dict()
    assert copy.deepcopy(layer)(x).equal(layer(x))


def test_a_change_of_dtype_or_from_the_meta_device_draws_the_same_numbers() -> None:
    layer = started("sigmoid")
    base = layer.weight.detach().double()
    double = copy.deepcopy(layer).double()
    assert functional.dense(double._update(), weight=double.weight).equal(base)
    with torch.device("meta"):
        empty = SnellLinear(N, M, rank=6, sparsity=0.8, kernel="sigmoid", init_weights="identity")
    assert empty(torch.empty(2, N, device="meta")).shape == (2, M)
    empty.to_empty(device="cpu").load_state_dict(moved(layer).state_dict())
    x = torch.randn(4, N)
    assert empty(x).equal(layer(x))


def test_the_seed_decides_every_bit_of_the_factors(monkeypatch) -> None:
    # The first numbers of SplitMix64's own test for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [z % 2**64 for z in counter._splitmix64(4, 1234567, 0).tolist()] == expected
    spec = Spec(6, 0.8)
    A, B, theta = initial._from_seed(200, 300, spec, 3.0, 7)
    for factor in (A, B):
        bound = (2 / factor.numel()) ** 0.5
        assert 0.98 * bound < factor.max() <= bound
        assert -bound <= factor.min() < -0.98 * bound
        assert abs(factor.mean()) < 0.1 * bound
        assert len(factor.unique()) > 0.99 * factor.numel()
    assert theta.tolist() == [3.0, -3.0]
    torch.manual_seed(1)
    again = initial._from_seed(200, 300, spec, 3.0, 7)
    assert all(one.equal(other) for one, other in zip((A, B, theta), again, strict=True))
    assert not initial._from_seed(200, 300, spec, 3.0, 8)[0].equal(A)


def test_layers_of_one_shape_share_their_start_and_its_threshold(monkeypatch) -> None:
    competition.forget()
    calls, select = [], type(backends.serving("cpu")).select
    monkeypatch.setattr(type(backends.serving("cpu")), "select", lambda *args: calls.append(1) or select(*args))
    layers = [started(init_seed=11) for _ in range(3)]
    assert len({id(layer.snell_start) for layer in layers}) == 1
    for layer in layers:
        layer(torch.randn(2, N))
    assert len(calls) == 1
    assert started(init_seed=12).snell_start is not layers[0].snell_start
    # Moved without the layer's knowledge, as FSDP moves parameters: drawn there once.
    layer = layers[0]
    for parameter in layer.parameters():
        parameter.data = parameter.data.double()
    first, second = layer._update().start, layer._update().start
    assert first is second
    assert first.A.dtype == torch.float64
    assert functional.dense(layer._update(), weight=layer.weight).equal(layer.weight)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"init_weights": "zero"}, ValueError), ({"init_seed": -1}, ValueError), ({"init_seed": 1.0}, TypeError)],
)
def test_settings_that_do_not_fit_are_refused_by_name(options, error) -> None:
    with pytest.raises(error, match=next(iter(options))):
        started(**options)


def test_compiled_whole_it_gives_the_same() -> None:
    layer = moved(started())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(4, N), []
    for run in (layer, compiled):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = run(inputs)
        y.square().sum().backward()
        results.append((y.detach(), inputs.grad, layer.snell_A.grad.clone(), layer.snell_B.grad.clone()))
    for one, other in zip(*results, strict=True):
        assert one.equal(other)
