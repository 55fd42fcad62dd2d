"""factor_grad on the device: rectangles, launches and who adds change no sum but in its order; tf32 keeps its bound."""

from __future__ import annotations

import pytest
import torch
from launching import exact, parameters, recorded

from snell import waves
from snell.kernels import factor_grad, launch, rectangles
from snell.kernels.table import Row
from snell.testing.bounds import Expected, assert_within
from snell.update import Gradients, Update

pytestmark = pytest.mark.usefixtures("on_triton")

EPS = torch.finfo(torch.float32).eps


def update(m: int, n: int, rank: int = 4, **options) -> Update:
    A, B, theta, spec = layer = parameters(m, n, rank, sparsity=0.5, **options)
    return Update(A, B, theta, exact(layer), spec)


def gradients(u: Update, G: torch.Tensor) -> tuple[torch.Tensor, ...]:
    grads = Gradients(*(torch.ones_like(t) for t in u[:3]))
    factor_grad.factor_grad(G, u, grads)
    return grads.A, grads.B, grads.theta


@pytest.mark.parametrize("adds", [True, False], ids=["the last program adds", "a launch adds"])
@pytest.mark.parametrize(
    "tall, wide, height",
    [(1, 1, 192), (1, 4, 192), (3, 1, 192), (2, 2, 192), (3, 4, 192), (1, 2, 64), (2, 1, 128)],
)
@pytest.mark.parametrize("kernel, groups", [("piecewise_linear", 2), ("piecewise_linear", 6), ("sigmoid", 1)])
def test_any_rectangle_gives_the_same_sums(monkeypatch, kernel, groups, tall, wide, height, adds):
    if groups > 2:
        monkeypatch.setattr(launch, "row", lambda *_: Row(64, 64, 8))
    monkeypatch.setattr(rectangles, "plan", lambda *_: rectangles.Plan(height, tall, wide))
    monkeypatch.setattr(rectangles, "adds", lambda *_: adds)
    u = update(150, 200, 6, kernel=kernel, groups=groups)
    G = torch.randn(150, 200)
    first, again = gradients(u, G), gradients(u, G)
    expected = Expected(u).gradients(G)
    for name, grad, same in zip(("grad_A", "grad_B", "grad_theta"), first, again, strict=True):
        assert grad.equal(same), f"{name} has other bits when computed again"
        value, bound = expected[name]
        assert_within(grad, value + 1, bound + EPS * (1 + value.abs()), name)


@pytest.mark.parametrize("m, n", [(4096, 2048), (4096, 3072), (11008, 384), (28672, 384), (28672, 512), (768, 768)])
@pytest.mark.parametrize("rank", [8, 32, 64])
def test_shares_keep_within_the_workspace_and_programs_are_busy(m, n, rank):
    row, processors = Row(64, 64, 8), 132
    limit = max(rectangles.LEAST_BYTES, rectangles.TOTAL_BYTES - 2 * m * n)
    plan = rectangles.plan(m, n, rank, row, processors, limit)
    down, across = -(-min(m, plan.height) // (64 * plan.tall)), -(-n // (64 * plan.wide))
    shares = 4 * rank * (down * n * (down > 1) + across * plan.height * (across > 1))
    launches = -(-m // plan.height)
    assert shares <= limit
    rounds = launches * -(-down * across // processors)
    busy = -(-m // 64) * -(-n // 64) / (processors * rounds * plan.tall * plan.wide)
    assert busy > (0.5 if m * n < 2**20 or rank > 32 else 0.84)


def test_no_plan_that_fits_is_the_smallest():
    plan = rectangles.plan(640, 640, 64, Row(64, 64, 8), 132, 0)
    assert (plan.tall >= 10) or (plan.wide >= 10)


def truncated(x: torch.Tensor) -> torch.Tensor:
    """As tensor cores read a float32: 10 bits after the leading one, the others cut off."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("offset", [0.0, 3.0], ids=["about zero", "near each other"])
@pytest.mark.parametrize("kernel, groups", [("piecewise_linear", 2), ("linear", 1), ("rbf", 1)])
def test_products_of_half_precision_keep_their_bound_where_the_hardware_cuts_operands_off(
    monkeypatch, kernel, groups, offset
):
    import triton.runtime.interpreter as interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def cut_off(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(truncated(torch.from_numpy(t.data.copy())).numpy(), t.dtype.scalar) for t in (a, b)
        )
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", cut_off)
    u = update(70, 66, 8, kernel=kernel, groups=groups)
    u = u._replace(A=u.A + offset, B=u.B + offset)
    G = torch.randn(70, 66).bfloat16()
    expected = Expected(u).gradients(G)
    for name, grad in zip(("grad_A", "grad_B", "grad_theta"), gradients(u, G), strict=True):
        value, bound = expected[name]
        assert_within(grad, value + 1, bound + EPS * (1 + value.abs()), name)


def test_one_block_is_one_launch_where_little_is_to_add(monkeypatch):
    monkeypatch.setattr(waves, "num_processors", lambda device: 132)
    u = Update(*parameters(4096, 2048, 32)[:3], torch.zeros(()), parameters(1, 1, 32)[3])
    with recorded(skip=True) as launched:
        factor_grad.factor_grad(torch.empty(4096, 2048, dtype=torch.bfloat16), u, Gradients.zeros(u))
    assert launched == ["factor_grad_kernel"]
