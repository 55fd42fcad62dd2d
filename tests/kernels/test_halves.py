"""K on tensor cores: its stated error, the same bits in every kernel, and the same instructions in the kernels' PTX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import exact, magnitudes, parameters

from snell import backends, reference
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.kernels import split
from snell.kernels.selection import select_thresholds
from snell.spec import Spec
from snell.testing.bounds import Expected, assert_within
from snell.update import Gradients, Update

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, on inf and NaN

SINGLE = [name for name, function in KERNEL_FUNCTIONS.items() if function.softmax_of is None]


@pytest.fixture
def on_halves(on_triton):
    with split.use(True):
        yield


def triton():
    return backends.AVAILABLE["triton"]


def update(m: int, n: int, rank: int = 6, gate: str = "soft", **options) -> Update:
    A, B, theta, spec = layer = parameters(m, n, rank, sparsity=0.5, gate=gate, **options)
    return Update(A, B, theta, select_thresholds([layer])[0][0], spec.applied)


def statistic(A: torch.Tensor, B: torch.Tensor, kernel: str) -> torch.Tensor:
    """|b - a| or b . a, of one group."""
    theta = torch.ones(1) if kernel == "piecewise_linear" else torch.zeros(0)
    out = torch.empty(len(B), len(A))
    triton().merge(Update(A, B, theta, torch.zeros(()), Spec(A.shape[1], 0.0, kernel, 1).applied), None, out)
    return out.double()


FACTORS = {
    "about zero": lambda x: x,
    "common offset": lambda x: x + 1000 * torch.arange(1.0, 1 + x.shape[1]),
    "huge": lambda x: x * 1e37,
    "tiny": lambda x: x * 1e-30,
    "denormal": lambda x: x * 1e-41,
    "an outlier": lambda x: x.index_fill(0, torch.tensor(3), 1e6),
    "a few equal": lambda x: x.index_fill(0, torch.tensor([1, 5]), 0.25),
    "small rows": lambda x: x * torch.logspace(-9, 0, len(x))[:, None],
}


@pytest.mark.usefixtures("on_halves")
@pytest.mark.parametrize("rank", [5, 18])
@pytest.mark.parametrize("factors", FACTORS)
def test_distances_and_products_keep_the_stated_bound(factors, rank):
    A, B = (FACTORS[factors](torch.randn(lines, rank)) for lines in (70, 40))
    share = (6 + rank / 2) * 2**-22
    a, b = A.double(), B.double()
    mean = torch.cat((a, b)).mean(0)
    norms = (b - mean).square().sum(1, keepdim=True) + (a - mean).square().sum(1)
    square = torch.cdist(b, a, compute_mode="donot_use_mm_for_euclid_dist").square()
    # Off by a share of both norms, and by no more than a share of itself below GUARD: sixteen times the first.
    bound = torch.minimum(share * norms, 16 * share * square)
    distance = statistic(A, B, "piecewise_linear")
    tiny = 2.0**-148
    assert ((distance.square() - square).abs() <= bound + 2**-22 * square + tiny * (distance + tiny)).all()
    bound = share * rank * b.abs().amax(1, keepdim=True) * a.abs().amax(1)
    if factors != "huge":  # its products are infinite
        assert ((statistic(A, B, "linear") - b @ a.T).abs() <= bound + tiny).all()


@pytest.mark.usefixtures("on_halves")
@pytest.mark.parametrize("kernel", SINGLE)
@pytest.mark.parametrize("rank, groups", [(3, 1), (40, 2), (12, 3)])
def test_every_operation_is_right(kernel, rank, groups):
    u = update(45, 70, rank, kernel=kernel, groups=groups if kernel == "piecewise_linear" else 1)
    W, G = torch.randn(45, 70), torch.randn(45, 70)
    grads, merged, out = Gradients.zeros(u), torch.empty(45, 70), torch.empty(45, 70)
    triton().factor_grad(G, u, grads, W, merged)
    triton().merge(u, W, out)
    assert merged.equal(out)
    expected = Expected(u)
    assert_within(out, *expected.merged(W, torch.float32), "merged")
    for name, grad in zip(("grad_A", "grad_B", "grad_theta"), grads[:3], strict=True):
        assert_within(grad, *expected.gradients(G)[name], name)


@pytest.mark.usefixtures("on_halves")
@pytest.mark.parametrize("kernel", SINGLE)
@pytest.mark.parametrize("near", [False, True], ids=["apart", "near each other"])
def test_every_kernel_keeps_the_same_entries(kernel, near):
    m, n = 67, 131
    A, B, theta, spec = parameters(m, n, 6, kernel=kernel, groups=2 if kernel == "piecewise_linear" else 1, gate="hard")
    A, B = 0.4 * A, 0.4 * B  # farther apart, those of rbf are all alike
    if near:  # some on the guard, some equal
        A[:40], A[3] = B[:40] + 0.01 * torch.randn(40, 6), B[3]
    layer = A, B, theta, spec
    tau = select_thresholds([layer])[0][0]
    assert tau == exact(layer)
    u = Update(A, B, theta, tau, spec)
    out, merged = torch.empty(m, n), torch.empty(m, n)
    triton().merge(u, None, out)
    assert out.count_nonzero() == (magnitudes(layer) > tau).sum() == m * n - spec.num_zeroed(m * n)
    triton().factor_grad(torch.ones(m, n), u, Gradients.zeros(u), None, merged)
    assert merged.equal(out)
    whole = triton().prepare(u)
    for rows, columns in ((slice(5, 44), slice(60, 131)), (slice(66, 67), slice(0, 1))):
        part = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        triton().merge(whole.columns(columns).rows(rows), None, part)
        assert part.equal(out[rows, columns])
    for start in (0, 64, n - 16):
        x = torch.eye(n)[start : start + 16]
        assert triton().few_tokens(x, None, None, u).t().equal(out[:, start : start + 16])


@pytest.mark.usefixtures("on_halves")
def test_layers_selected_together_have_their_own_halves():
    layers = [parameters(20, 30), parameters(20, 30), parameters(40, 30)]
    layers[1][0].mul_(100)
    taus, _ = select_thresholds(layers)
    assert taus.tolist() == [exact(layer).item() for layer in layers]


@pytest.mark.usefixtures("on_halves")
@pytest.mark.parametrize("kernel", SINGLE)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_no_other(kernel, value):
    A, B, theta, spec = parameters(20, 30, 4, kernel=kernel, groups=2 if kernel == "piecewise_linear" else 1)
    K = reference.kernel_matrix(A.double(), B.double(), theta.double(), kernel=kernel, groups=spec.groups)
    A[7, 1] = B[4, 2] = value
    u = Update(A, B, theta, torch.zeros(()), Spec(4, 0.0, kernel, spec.groups).applied)
    spoilt, direct = torch.empty(2, 20, 30)
    triton().merge(u, None, spoilt)
    with split.use(False):
        triton().merge(u, None, direct)
    rows, columns = torch.arange(20) != 4, torch.arange(30) != 7
    assert torch.allclose(spoilt[rows][:, columns].double(), K[rows][:, columns], atol=1e-5)
    for same in (spoilt[4], direct[4]), (spoilt[:, 7], direct[:, 7]):
        assert torch.equal(*(t.nan_to_num(7.0, 8.0, 9.0) for t in same))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Triton's compiler")
@pytest.mark.parametrize("kernel", ["piecewise_linear", "linear"])
def test_every_kernel_has_the_same_instructions_for_k(kernel):
    """In a process of its own: this one has the kernels as the interpreter's."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).with_name("sequences.py")), "90", kernel]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"merge_kernel", "factor_grad_kernel", "few_tokens_kernel", "count_kernel"}
    product = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {} {} in place"
    products = [product.format(*pair) for pair in ("AB", "CB", "AD", "EF", "GF", "EH")]
    steps = ["add.rn.f32", *products[:3]] if kernel == "piecewise_linear" else ["mov.b32", *products]
    assert {told for each in found.values() for told in each} == {"; ".join([*steps, "selp.f32"])}
