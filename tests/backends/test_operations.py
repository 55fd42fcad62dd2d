"""Every operation of every backend against the float64 reference, and against what it itself writes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import GATES_THAT_COMPETE, KERNELS, LAYOUTS, WEIGHT_DTYPES, Drawn, cases, laid_out
from snell import backends, competition, functional
from snell.spec import GATES, Spec
from snell.testing.bounds import Expected, assert_within
from snell.update import Activations, Gradients, Update

ops = torch.ops.snell


def merge_out(update: Update, weight, out) -> None:
    backends.of(update.A).merge(update, weight, out)


def factor_grad(update: Update, G, weight=None, merged=None, grads=None) -> list[Tensor]:
    """The gradients that the update has; added to ``grads`` where those are given."""
    grads = Gradients.zeros(update) if grads is None else grads
    backends.of(update.A).factor_grad(G, update, grads, weight, merged)
    return [grad for grad in grads if grad is not None]


def merge(update: Update, weight=None, gate=None):
    spec = update.spec
    return functional.merge(*update[:4], weight=weight, kernel=spec.kernel, groups=spec.groups, gate=gate or spec.gate)


def made_up(kernel, groups, gate, A, B, theta, tau) -> Update:
    """An update with a threshold of one's own."""
    return Update(A, B, theta, tau, Spec(A.shape[1], 0.5, kernel, groups, gate))


def assert_gradients(update: Update, grads: list[Tensor], G, name="") -> None:
    for grad, (which, (value, bound)) in zip(grads, Expected(update).gradients(G).items(), strict=True):
        assert_within(grad, value, bound, f"{name} {which}")


def examples(small: bool, count: int):
    # Few examples leave little to chance anyway: an interpreted backend gets the same ones every time.
    return settings(max_examples=max(count // 6, 3) if small else count, derandomize=small)


def random_update(m, n, rank=8, kernel="piecewise_linear", groups=2, gate="soft", sparsity=0.9, dtype=torch.float32):
    case = Drawn(m, n, groups, rank // groups, kernel, gate, sparsity, dtype, 0.3, int(torch.randint(2**31, ())))
    return case.update()


# --- select_threshold


def test_tau_has_the_bits_of_the_sorted_K_of_its_own_backend(backend, small):
    @examples(small, 60)
    @given(cases(small))
    def check(case):
        update = case.update()
        ranked = merge(update, gate="none").abs().flatten().sort().values
        k = case.spec.num_zeroed(ranked.numel())
        expected = ranked[k - 1] if k else ranked.new_zeros(())
        assert update.tau.dtype == case.dtype
        assert update.tau.shape == ()
        assert update.tau.equal(expected), f"tau {update.tau.item()!r} is not the sort's {expected.item()!r}"

    check()


def test_tau_lies_within_rounding_of_the_reference(backend, small):
    @examples(small, 40)
    @given(cases(small))
    def check(case):
        update = case.update()
        if case.sparsity == 0.0:
            assert update.tau == 0
            return
        k, expected = case.spec.num_zeroed(case.m * case.n), Expected(update)
        # The k-th smallest moves by no more than the entries do.
        tau = expected.K().abs().flatten().kthvalue(k).values
        assert_within(update.tau, tau, expected.K_error().max(), "tau")

    check()


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("gate", GATES_THAT_COMPETE)
def test_survivors_are_counted_exactly_from_what_merge_writes(backend, small, gate, sparsity):
    m, n = (33, 47) if small else (151, 233)
    # float64 factors: no two of the m*n entries tie.
    update = random_update(m, n, gate=gate, sparsity=sparsity, dtype=torch.float64)
    assert merge(update).count_nonzero() == m * n - math.ceil(sparsity * (m * n))


@pytest.mark.parametrize("m, n, dtype", [(768, 3072, torch.float64), (11008, 4096, torch.float32)])
def test_survivors_are_exact_at_the_size_of_a_language_model(m, n, dtype):
    if "cpu" not in backends.AVAILABLE:
        pytest.skip("needs the native library: minutes in plain PyTorch")
    with backends.use("cpu"):
        update = random_update(m, n, rank=32, dtype=dtype)
        A, B, theta = update.A, update.B, update.theta
        magnitudes = merge(update, gate="none").abs_()
        for sparsity in (0.01, 0.5, 0.9, 0.99, 0.999):
            tau = functional.select_threshold(A, B, theta, sparsity=sparsity, kernel="piecewise_linear", groups=2)
            k = math.ceil(sparsity * (m * n))
            below = int(magnitudes.lt(tau).count_nonzero())
            # Among 45 million float32 some tie with tau and lose with it; among float64 none do.
            ties = int(magnitudes.eq(tau).count_nonzero())
            assert below < k <= below + ties
            assert dtype == torch.float32 or ties == 1
            survivors = merge(made_up("piecewise_linear", 2, "hard", A, B, theta, tau)).count_nonzero()
            assert survivors == m * n - k - (below + ties - k)


# --- merge


def test_merge_matches_the_reference(backend, small):
    @examples(small, 80)
    @given(cases(small), st.sampled_from([None, *WEIGHT_DTYPES]), st.sampled_from(LAYOUTS))
    def check(case, weight_dtype, layout):
        update = case.update()
        weight = None
        if weight_dtype is not None:
            weight = torch.randn(case.m, case.n, generator=case.generator()).to(weight_dtype)
            weight = laid_out(weight, layout)
        merged = merge(update, weight)
        assert merged.dtype == (weight_dtype or case.dtype)
        assert_within(merged, *Expected(update).merged(weight, merged.dtype), "merged")

    check()


def test_merge_out_writes_its_block_and_nothing_else(backend, small):
    @examples(small, 40)
    @given(cases(small), st.sampled_from(LAYOUTS), st.sampled_from(WEIGHT_DTYPES), st.sampled_from(WEIGHT_DTYPES))
    def check(case, layout, weight_dtype, out_dtype):
        update = case.update()
        weight = laid_out(torch.randn(case.m, case.n, generator=case.generator()).to(weight_dtype), layout)
        room = torch.full((case.m + 2, case.n + 3), 7.0, dtype=out_dtype)
        out = room[1 : case.m + 1, 2 : case.n + 2]
        merge_out(update, weight, out)
        assert_within(out, *Expected(update).merged(weight, out_dtype), "out")
        room[1 : case.m + 1, 2 : case.n + 2] = 7.0
        assert bool((room == 7.0).all()), "wrote beside its block"
        transposed = torch.full((case.n, case.m), 7.0, dtype=out_dtype).t()
        merge_out(update, weight, transposed)
        assert_within(transposed, *Expected(update).merged(weight, out_dtype), "transposed out")

    check()


def test_any_rectangle_has_the_bits_of_the_whole(backend, small):
    @examples(small, 60)
    @given(cases(small), st.data())
    def check(case, data):
        update = case.update()
        r0, c0 = data.draw(st.integers(0, case.m - 1)), data.draw(st.integers(0, case.n - 1))
        r1, c1 = data.draw(st.integers(r0 + 1, case.m)), data.draw(st.integers(c0 + 1, case.n))
        weight = torch.randn(case.m, case.n, generator=case.generator())
        block = update.columns(slice(c0, c1)).rows(slice(r0, r1))
        for base in (None, weight):
            part = merge(block, None if base is None else base[r0:r1, c0:c1])
            assert part.equal(merge(update, base)[r0:r1, c0:c1])

    check()


@pytest.mark.parametrize("gate", GATES_THAT_COMPETE)
def test_losers_keep_the_bits_of_the_weight(backend, gate):
    update = random_update(19, 27, gate=gate)
    weight = torch.where(torch.rand(19, 27) < 0.5, -0.0, torch.randn(19, 27, dtype=torch.float64))
    losers = merge(update) == 0
    assert losers.sum() == math.ceil(0.9 * (19 * 27))
    for dtype, bits in zip(WEIGHT_DTYPES, (torch.int32, torch.int16, torch.int16, torch.int64), strict=True):
        base = weight.to(dtype)
        merged = merge(update, base)
        assert merged.view(bits)[losers].equal(base.view(bits)[losers])


def test_an_update_of_zero_keeps_the_bits_of_the_weight(backend):
    A, B, theta = torch.zeros(14, 4), torch.zeros(9, 4), torch.tensor([0.1, -0.1])
    weight = torch.where(torch.rand(9, 14) < 0.5, -0.0, torch.randn(9, 14))
    for gate in GATES:
        merged = merge(made_up("piecewise_linear", 2, gate, A, B, theta, torch.zeros(())), weight)
        assert merged.view(torch.int32).equal(weight.view(torch.int32))


# --- factor_grad


def test_factor_gradients_match_the_reference(backend, small):
    @examples(small, 80)
    @given(cases(small), st.sampled_from(WEIGHT_DTYPES), st.sampled_from(LAYOUTS))
    def check(case, dtype, layout):
        update = case.update()
        G = laid_out(torch.randn(case.m, case.n, generator=case.generator()).to(dtype), layout)
        assert_gradients(update, factor_grad(update, G), G)

    check()


def test_factor_grad_adds_to_what_is_there(backend, small):
    for kernel in KERNELS:
        update = random_update(21, 34, kernel=kernel, gate="magnitude")
        G = torch.randn(21, 34)
        before = [torch.randn_like(t) for t in update[:3]]
        after = factor_grad(update, G, grads=Gradients(*(t.clone() for t in before)))
        expected = Expected(update)
        for start, end, (name, (value, bound)) in zip(before, after, expected.gradients(G).items(), strict=True):
            # One more rounding, of the sum with what was there.
            extra = 64 * expected.eps * (start.double().abs() + value.abs())
            assert_within(end, start.double() + value, bound + extra, f"{kernel} {name}")


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_factor_grad_leaves_the_bits_of_merge(backend, small, layout, in_place):
    """Forward and backward agree on every survivor because they write the same bits."""

    @examples(small, 30)
    @given(cases(small), st.sampled_from(WEIGHT_DTYPES), st.sampled_from(WEIGHT_DTYPES))
    def check(case, weight_dtype, dtype):
        update = case.update()
        weight = laid_out(torch.randn(case.m, case.n, generator=case.generator()).to(weight_dtype), layout)
        G = laid_out(torch.randn(case.m, case.n).to(dtype), layout)
        expected = torch.empty_like(G)
        merge_out(update, weight, expected)
        given, merged = G.clone(), G if in_place else torch.empty_like(G)
        grads = factor_grad(update, G, weight, merged)
        assert merged.equal(expected)
        assert_gradients(update, grads, given)

    check()


# --- repetition and threads


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_inputs_give_the_same_bits(backend, small, kernel):
    m, n = (20, 30) if small else (257, 391)
    update, again = random_update(m, n, kernel=kernel), []
    G = torch.randn(m, n)
    for _ in range(2):
        competition.forget()
        tau = ops.select_threshold(*update[:3], 0.7, kernel, 2)
        again.append([tau, merge(update), *factor_grad(update, G)])
    assert all(first.equal(second) for first, second in zip(*again, strict=True))


def test_survivors_do_not_depend_on_the_number_of_threads(backend, small):
    m, n = (20, 30) if small else (257, 391)
    update = random_update(m, n)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            competition.forget()
            results.append((functional.update(*update[:3], update.spec).tau, merge(update)))
    finally:
        torch.set_num_threads(threads)
    assert all(one.equal(three) for one, three in zip(*results, strict=True))


# --- degenerate updates


SHAPES = [(1, 1), (1, 37), (37, 1), (2, 2), (5, 129)]


@pytest.mark.parametrize("m, n", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_thin_matrices_and_rank_one(backend, m, n, kernel):
    for sparsity in (0.0, 0.3, 0.999):
        update = random_update(m, n, rank=1, groups=1, kernel=kernel, sparsity=sparsity, gate="magnitude")
        assert update.spec.gate == ("none" if sparsity == 0.0 else "magnitude")
        ranked = merge(update, gate="none").abs().flatten().sort().values
        k = math.ceil(sparsity * (m * n))
        assert update.tau == (ranked[k - 1] if k else 0)
        assert_within(merge(update), *Expected(update).merged(None, torch.float32), "merged")
        G = torch.randn(m, n)
        assert_gradients(update, factor_grad(update, G), G)


@pytest.mark.parametrize("fill", [0.0, 0.25])
@pytest.mark.parametrize("kernel", KERNELS)
def test_where_every_entry_ties_nothing_survives(backend, kernel, fill):
    m, n, rank = 23, 31, 6
    A, B = torch.full((n, rank), fill), torch.full((m, rank), -fill)
    theta = torch.tensor(Spec(rank, 0.5, kernel, 2).initial_theta(0.3)) * 1.01
    tau = functional.select_threshold(A, B, theta, sparsity=0.5, kernel=kernel, groups=2)
    for gate in GATES_THAT_COMPETE:
        update = made_up(kernel, 2, gate, A, B, theta, tau)
        assert tau.equal(merge(update, gate="none")[0, 0].abs())
        assert merge(update).count_nonzero() == 0
        assert all(grad.count_nonzero() == 0 for grad in factor_grad(update, torch.randn(m, n)))


@pytest.mark.parametrize("distinct", [2, 3])
def test_ties_at_tau_all_lose(backend, distinct):
    # Rows of B repeat, so whole rows of K tie; tau falls inside a run of equal values.
    A, B = torch.randn(30, 4), torch.randn(distinct, 4).repeat(12 // distinct, 1)
    theta = torch.tensor([0.1, -0.1])
    tau = functional.select_threshold(A, B, theta, sparsity=0.5, kernel="piecewise_linear", groups=2)
    update = made_up("piecewise_linear", 2, "hard", A, B, theta, tau)
    magnitudes = merge(update, gate="none").abs()
    assert tau.equal(magnitudes.flatten().sort().values[180 - 1])
    assert (magnitudes == tau).sum() >= 12 // distinct
    assert merge(update).count_nonzero() == (magnitudes > tau).sum()


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_huge_outlier(backend, kernel):
    case = Drawn(29, 43, 2, 4, kernel, "magnitude", 0.95, torch.float32, 0.3, int(torch.randint(2**31, ())))
    A, B, theta = case.factors()
    B[7] *= 1e6
    tau = functional.select_threshold(A, B, theta, sparsity=0.95, **case.settings)
    update = made_up(kernel, 2, "hard", A, B, theta, tau)
    ranked = merge(update, gate="none").abs().flatten().sort().values
    assert tau.equal(ranked[math.ceil(0.95 * (29 * 43)) - 1])
    assert merge(update).count_nonzero() == (ranked > tau).sum()
    expected = Expected(update)
    assert_within(merge(update, gate="none"), expected.K(), expected.K_error() + 1e-37, "K")


@pytest.mark.parametrize("magnitude", [1e-30, 1e-41])
def test_denormal_K_is_ranked_and_kept(backend, magnitude):
    """linear: K of denormals must neither flush to zero nor tie."""
    A = torch.arange(1, 21, dtype=torch.float32).unsqueeze(1) * magnitude
    B = torch.ones(3, 1)
    theta = A.new_zeros(0)
    update = made_up("linear", 1, "none", A, B, theta, torch.zeros(()))
    assert merge(update).equal(A.T.expand(3, 20))
    tau = functional.select_threshold(A, B, theta, sparsity=0.5, kernel="linear", groups=1)
    assert tau.equal(A[9, 0])
    hard = merge(made_up("linear", 1, "hard", A, B, theta, tau))
    assert hard.count_nonzero() == 30
    assert hard[:, 10:].equal(A[10:].T.expand(3, 10))


@pytest.mark.parametrize("m", [10, 90])  # the native library sorts more than 1024 entries into buckets
def test_K_that_overflows_is_ranked_as_infinity(backend, m):
    A, B = torch.randn(20, 2), torch.randn(m, 2)
    B[3] = 3e38
    A[:, :] = A.abs() + 2
    theta = A.new_zeros(0)
    tau = functional.select_threshold(A, B, theta, sparsity=0.5, kernel="linear", groups=1)
    update = made_up("linear", 1, "hard", A, B, theta, tau)
    K = merge(update, gate="none")
    assert K[3].isinf().all()
    assert tau.equal(K.abs().flatten().sort().values[10 * m - 1])
    assert merge(update)[3].isinf().all()
    above = functional.select_threshold(A, B, theta, sparsity=1 - 0.5 / m, kernel="linear", groups=1)
    assert above.isinf()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_infinity_reach_exactly_their_entries(backend, kernel, gate):
    update = random_update(17, 26, kernel=kernel, sparsity=0.6)
    A, B = update.A.clone(), update.B.clone()
    A[4, 3], B[9, 0] = float("nan"), float("nan")
    poisoned = made_up(kernel, 2, gate, A, B, update.theta, update.tau)
    expected = torch.zeros(17, 26, dtype=torch.bool)
    expected[:, 4] = expected[9] = True
    for weight in (None, torch.randn(17, 26)):
        clean = merge(made_up(kernel, 2, gate, *update[:4]), weight)
        dirty = merge(poisoned, weight)
        assert dirty.isnan().equal(expected)
        assert dirty[~expected].equal(clean[~expected])
    grads = factor_grad(poisoned, torch.ones(17, 26))
    assert grads[0][4].isnan().any()
    assert grads[1][9].isnan().any()


@pytest.mark.parametrize("gate", GATES)
def test_nan_in_G_reaches_the_gradients_of_its_survivors(backend, gate):
    update = random_update(17, 26, gate=gate, sparsity=0.6)
    survives = merge(update) != 0
    i, j = survives.nonzero()[3].tolist()
    G = torch.randn(17, 26)
    G[i, j] = float("nan")
    grads = factor_grad(update, G)
    assert grads[0][j].isnan().all()
    assert grads[1][i].isnan().all()
    assert grads[2].isnan().all()
    assert grads[0].isnan().any(1).sum() == 1
    assert grads[1].isnan().any(1).sum() == 1


def test_nan_in_the_weight_stays_where_it_is(backend):
    update = random_update(13, 22)
    weight = torch.randn(13, 22)
    weight[5, 6], weight[1, 2] = float("nan"), float("inf")
    merged = merge(update, weight)
    assert merged.isnan().equal(weight.isnan())
    assert merged[1, 2] == float("inf")


@pytest.mark.parametrize("kernel", ["piecewise_linear", "rbf"])
def test_gradients_are_finite_where_a_distance_is_zero(backend, kernel):
    update = random_update(11, 14, kernel=kernel, gate="none", sparsity=0.0)
    A, B = update.A.clone(), update.B.clone()
    A[2], B[3] = 0.5, 0.5
    update = made_up(kernel, 2, "none", A, B, update.theta, torch.zeros(()))
    G = torch.randn(11, 14)
    assert_gradients(update, factor_grad(update, G), G)


def test_activations_stand_for_their_product(backend):
    update = random_update(11, 14)
    activations = Activations(torch.randn(11, 16), torch.randn(14, 16))
    G = activations.grad_y @ activations.x.t()
    assert_gradients(update, factor_grad(update, activations), G)


def test_opcheck(backend):
    update = random_update(9, 13)
    flat = (*update[:4], "piecewise_linear", 2, "soft")
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.select_threshold.default, (*update[:3], 0.9, "piecewise_linear", 2), test_utils=utils)
    for weight in (None, torch.randn(9, 13), torch.randn(9, 13).bfloat16()):
        torch.library.opcheck(ops.merge.default, (weight, *flat, *[None] * 4), test_utils=utils)
    torch.library.opcheck(ops.merge_backward.default, (torch.randn(9, 13), *flat), test_utils=utils)
