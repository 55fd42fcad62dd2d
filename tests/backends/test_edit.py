"""The edit of a layer's outputs and its gradients, on every backend, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cases import FACTOR_DTYPES, WEIGHT_DTYPES
from snell import functional, reference
from snell.testing import edits
from snell.testing.bounds import assert_within

#: Leading axes and m: one number, tails of vectors, several slabs of rows, no tokens.
SHAPES = [((1,), 1), ((5,), 7), ((2, 3), 64), ((131,), 37), ((9000,), 3), ((0,), 5), ((), 6)]


def drawn(lead, m, dtype=torch.float32, vectors=torch.float32):
    u, grad = torch.randn(*lead, m).to(dtype), torch.randn(*lead, m).to(dtype)
    scaling, bias = torch.randn(2, m, dtype=vectors)
    return u.requires_grad_(), scaling.clone().requires_grad_(), bias.clone().requires_grad_(), grad


def both_ways(u, scaling, bias, grad):
    z = functional.edit(u, scaling, bias)
    return [z.detach(), *torch.autograd.grad(z, (u, scaling, bias), grad)]


@pytest.mark.parametrize("vectors", FACTOR_DTYPES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("lead, m", SHAPES)
def test_the_edit_and_its_gradients_match_the_reference(backend, small, lead, m, dtype, vectors):
    if small and lead == (9000,):
        lead = (300,)
    tensors = drawn(lead, m, dtype, vectors)
    found = both_ways(*tensors)
    assert [t.dtype for t in found] == [dtype, dtype, vectors, vectors]
    for (name, pair), actual in zip(edits.edit(*tensors).items(), found, strict=True):
        assert_within(actual, *pair, name)


def test_gradcheck(backend):
    u, scaling, bias, _ = drawn((2, 5), 7, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(functional.edit, (u, scaling, bias))


def test_the_gradient_of_the_scaling_is_the_difference_quotient(backend):
    u, scaling, bias, grad = drawn((9,), 5, torch.float64, torch.float64)
    found = both_ways(u, scaling, bias, grad)[2]
    for j in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[j] = 1e-6
        up, down = (functional.edit(u, scaling + sign * step, bias) for sign in (1, -1))
        assert found[j].item() == pytest.approx(((up - down) * grad).sum().item() / 2e-6, rel=1e-6)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_each_gradient_alone_has_the_bits_it_has_beside_the_others(backend, needed):
    *leaves, grad = drawn((40,), 33)
    together = torch.autograd.grad(functional.edit(*leaves), leaves, grad)
    some = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needed, strict=True)]
    (alone,) = torch.autograd.grad(functional.edit(*some), [leaf for leaf in some if leaf.requires_grad], grad)
    assert torch.equal(alone, together[needed.index(True)])


def test_one_and_minus_zero_keep_every_bit(backend):
    u = torch.tensor([0.0, -0.0, 1.5, float("inf"), -float("inf"), 1e-45, -3e38])
    for dtype, integers in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        outputs = u.to(dtype)
        z = functional.edit(outputs, torch.ones(7), torch.full((7,), -0.0))
        assert torch.equal(z.view(integers), outputs.view(integers))


def test_a_scaling_of_zero_leaves_the_bias_and_finite_gradients(backend):
    u, scaling, bias, grad = drawn((20,), 9)
    scaling = torch.zeros_like(scaling).requires_grad_()
    z, grad_u, grad_scaling, _ = both_ways(u, scaling, bias, grad)
    assert torch.equal(z, bias.expand_as(z))
    assert not grad_u.any()
    assert grad_scaling.isfinite().all()
    assert (grad_scaling != 0).all()


def test_float32_has_the_bits_of_a_product_and_a_sum(backend):
    if backend == "blocked":
        pytest.skip("PyTorch may fuse them")
    u, scaling, bias, _ = drawn((50,), 45)
    assert torch.equal(functional.edit(u, scaling, bias), reference.edit(u, scaling, bias))


def test_strides_do_not_matter(backend):
    u, scaling, bias, grad = drawn((6, 4), 10)
    plain = both_ways(u, scaling, bias, grad)
    room = torch.full((4, 6, 20), float("nan"))
    room[:, :, ::2] = u.detach().transpose(0, 1)
    turned = room[:, :, ::2].transpose(0, 1).requires_grad_()
    for one, other in zip(both_ways(turned, scaling, bias, grad), plain, strict=True):
        assert torch.equal(one, other)
    # A sum's gradient has strides of 0.
    expanded = torch.ones(()).expand_as(grad)
    whole = both_ways(u, scaling, bias, expanded.clone())
    for one, other in zip(both_ways(u, scaling, bias, expanded), whole, strict=True):
        assert torch.equal(one, other)


def test_the_bits_do_not_depend_on_the_number_of_threads(backend, small):
    tensors, threads = drawn((64 if small else 4000,), 70, torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both_ways(*tensors))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def saved(u, scaling, bias) -> list[torch.Tensor]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.edit(u, scaling, bias)
    return kept


def test_u_is_kept_only_where_the_scaling_trains(backend):
    u, scaling, bias, _ = drawn((8,), 6)
    assert [t.data_ptr() for t in saved(u, scaling, bias)] == [u.data_ptr(), scaling.data_ptr()]
    assert [t.data_ptr() for t in saved(u, scaling.detach(), bias)] == [scaling.data_ptr()]


def test_compiled_whole_it_gives_the_same(backend):
    u, scaling, bias, grad = drawn((3, 11), 13)
    compiled = torch.compile(lambda *tensors: functional.edit(*tensors) * 2, fullgraph=True, backend="aot_eager")
    z = compiled(u, scaling, bias)
    grads = torch.autograd.grad(z, (u, scaling, bias), grad / 2)
    for one, other in zip((z / 2, *grads), both_ways(u, scaling, bias, grad), strict=True):
        assert torch.equal(one, other)


def test_opcheck_of_the_edit(backend):
    u, scaling, bias, grad = drawn((2, 3), 9)
    torch.library.opcheck(torch.ops.snell.edit.default, (u, scaling, bias))
    for needs in ([True, True, True], [True, False, False], [False, True, True]):
        torch.library.opcheck(
            torch.ops.snell.edit_backward.default,
            (grad, u.detach() if needs[1] else None, scaling.detach(), needs),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_a_second_derivative_is_refused(backend):
    u, scaling, bias, _ = drawn((4,), 3)
    (first,) = torch.autograd.grad(functional.edit(u, scaling, bias).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


GOOD = {"u": torch.zeros(2, 3), "scaling": torch.zeros(3), "bias": torch.zeros(3)}


@pytest.mark.parametrize(
    "bad, error",
    [
        ({"u": [1.0]}, TypeError),
        ({"u": torch.zeros(2, 3, dtype=torch.int32)}, TypeError),
        ({"scaling": torch.zeros(3, dtype=torch.bfloat16)}, TypeError),
        ({"scaling": torch.zeros(3, 1)}, ValueError),
        ({"scaling": torch.zeros(2)}, ValueError),
        ({"scaling": torch.zeros(3, device="meta")}, ValueError),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, TypeError),
        ({"bias": torch.zeros(4)}, ValueError),
    ],
)
def test_a_bad_argument_is_named(bad, error):
    (name,) = bad
    with pytest.raises(error, match=f"^{name} must"):
        functional.edit(**{**GOOD, **bad})
    with pytest.raises(ValueError, match=r"^scaling must be as long"):
        functional.edit(torch.zeros(()), torch.zeros(1), torch.zeros(1))
