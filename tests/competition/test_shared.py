"""One threshold over several layers: the entries that all of them together keep, counted in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snell import backends, functional, native
from snell.competition import shared
from snell.competition.shared import select_shared
from snell.spec import Spec

KERNELS = ("piecewise_linear", "linear", "sigmoid", "rbf", "mixture")


def layer(m, n, kernel="piecewise_linear", rank=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec = Spec(rank, 0.5, kernel, 2)
    A, B = (torch.randn(size, rank, generator=generator, dtype=dtype) for size in (n, m))
    return A, B, torch.tensor(spec.initial_theta(1.0), dtype=dtype), spec


def magnitudes(A, B, theta, spec):
    """\\|K\\| as the backend computes it."""
    made = {"kernel": spec.kernel, "groups": spec.groups, "gate": "none"}
    return functional.merge(A, B, theta, A.new_zeros(()), **made).abs()


def survivors(layers, taus):
    return [int((magnitudes(*one) > tau).sum()) for one, tau in zip(layers, taus, strict=True)]


def expected(layers, sparsity, scales):
    """Survivors by layer, from all entries at once."""
    values = [magnitudes(*one).double() * (1 / scale) for one, scale in zip(layers, scales, strict=True)]
    everything = torch.cat([value.flatten() for value in values])
    x = everything.kthvalue(math.ceil(sparsity * len(everything))).values
    return [int((value > x).sum()) for value in values]


@pytest.fixture(params=["cpu", "blocked"])
def backend(request):
    if request.param == "cpu" and not native.available():
        pytest.skip("the native library is not built")
    with backends.use(request.param, "cpu"):
        yield request.param


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_layers_together_keep_the_total(backend, kernel, dtype):
    layers = [layer(m, n, kernel, dtype=dtype, seed=m) for m, n in ((40, 30), (17, 64), (1, 5))]
    scales = [0.7, 1.0, 2.5]
    found = survivors(layers, select_shared(layers, 0.8, scales))
    assert found == expected(layers, 0.8, scales)
    total = sum(len(A) * len(B) for A, B, *_ in layers)
    if kernel != "mixture":  # a softmax over one row gives ties
        assert sum(found) == total - math.ceil(0.8 * total)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    sparsity=st.floats(0.01, 0.99),
    scales=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    rank=st.sampled_from([2, 6]),
)
def test_random_layers(shapes, sparsity, scales, dtype, rank):
    layers = [layer(m, n, rank=rank, dtype=dtype, seed=i) for i, (m, n) in enumerate(shapes)]
    scales = scales[: len(layers)]
    assert survivors(layers, select_shared(layers, sparsity, scales)) == expected(layers, sparsity, scales)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_magnitudes_far_from_one(backend, size):
    layers = [layer(30, 20, "linear", seed=1), layer(20, 20, "linear", seed=2)]
    layers = [(A * size, B, theta, spec) for A, B, theta, spec in layers]
    scales = [3.0, 0.3]
    assert survivors(layers, select_shared(layers, 0.9, scales)) == expected(layers, 0.9, scales)


def test_one_pass_and_all_passes_find_the_same(monkeypatch):
    """The sample's bracket holds, and what a missed one falls back to gives the same bits."""
    if not native.available():
        pytest.skip("the native library is not built")
    layers, scales = [layer(300, 200, seed=1), layer(100, 250, seed=2), layer(7, 9, seed=3)], [1.0, 0.6, 1.7]
    with monkeypatch.context() as patch:
        patch.setattr(shared.radix, "smallest", once := _Counted(shared.radix.smallest))
        first = select_shared(layers, 0.9, scales)
    assert once.entries < 0.2 * sum(len(A) * len(B) for A, B, *_ in layers)  # those within the bracket alone
    monkeypatch.setattr(shared, "_gathered", lambda *_: None)
    assert select_shared(layers, 0.9, scales) == first
    assert survivors(layers, first) == expected(layers, 0.9, scales)


class _Counted:
    def __init__(self, smallest):
        self.smallest, self.entries = smallest, 0

    def __call__(self, k, tiles, like):
        self.entries += sum(tile.numel() for tile in tiles())
        return self.smallest(k, tiles, like)


def test_ties_fall_together(backend):
    A, B, theta, spec = layer(8, 8, "linear")
    layers = [(torch.ones_like(A), torch.ones_like(B), theta, spec), layer(8, 8, "linear", seed=4)]
    assert survivors(layers, select_shared(layers, 0.9, [1e-6, 1.0]))[0] == 0


@pytest.mark.parametrize(
    ("sparsity", "scales", "reason"),
    [
        (0.0, [1.0, 1.0], "sparsity must lie in"),
        (1.0, [1.0, 1.0], "sparsity must lie in"),
        (0.5, [1.0, 0.0], "scales must be finite numbers above 0; got 0.0"),
        (0.5, [math.inf, 1.0], "scales must be finite numbers above 0; got inf"),
    ],
)
def test_bad_settings(sparsity, scales, reason):
    with pytest.raises(ValueError, match=reason):
        select_shared([layer(4, 4), layer(4, 4)], sparsity, scales)


def test_layers_of_different_dtypes():
    with pytest.raises(ValueError, match=r"one dtype and device; got torch\.float32 on cpu, torch\.float64 on cpu"):
        select_shared([layer(4, 4), layer(4, 4, dtype=torch.float64)], 0.5, [1.0, 1.0])
