"""The native library on every instruction set this machine has, and the package without the library."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from snell import competition, functional, native
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.spec import GATES, Spec
from snell.testing import smooth_max
from snell.testing.bounds import Expected, assert_within
from snell.update import Gradients, Update

SKIP = pytest.mark.skipif(not native.available(), reason="the native library was not built")

CHECK = """
import torch
from snell import backends, functional, native
from snell.spec import Spec
from snell.testing import smooth_max
from snell.testing.bounds import Expected, assert_within
from snell.update import Gradients

torch.manual_seed({seed})
assert native.instruction_set() == "{isa}", native.instruction_set()
m, n, rank, groups = 53, 77, 12, 3
for dtype in (torch.float64, torch.float32):
    for kernel in ("piecewise_linear", "linear", "sigmoid", "rbf", "mixture"):
        # Small factors: rbf and sigmoid would saturate, and tie, in float32.
        A, B = 0.3 * torch.randn(n, rank, dtype=dtype), 0.3 * torch.randn(m, rank, dtype=dtype)
        spec = Spec(rank, 0.8, kernel, groups)
        update = functional.update(A, B, torch.tensor(spec.initial_theta(0.3), dtype=dtype), spec)
        K = functional.dense(update._replace(spec=Spec(rank, 0.0, kernel, groups).applied))
        assert update.tau == K.abs().flatten().sort().values[spec.num_zeroed(m * n) - 1]
        delta, expected = functional.dense(update), Expected(update)
        assert (delta != 0).equal(K.abs() > update.tau)
        assert_within(delta, *expected.merged(None, dtype), kernel)
        G, grads = torch.randn(m, n, dtype=dtype), Gradients.zeros(update)
        backends.of(A).factor_grad(G, update, grads)
        for grad, (name, pair) in zip(grads, expected.gradients(G).items()):
            assert_within(grad, *pair, f"{{kernel}} {{name}}")
        if update.smooth_max is not None:
            grad, grads = torch.randn(n, dtype=dtype), Gradients.zeros(update)
            assert backends.of(A).smooth_max_grad(grad, update, grads)
            results = update.smooth_max, *grads[:3]
            for result, (name, pair) in zip(results, smooth_max.smooth_max(update, grad).items(), strict=True):
                assert_within(result, *pair, f"{{kernel}} {{name}}")
        for half in (torch.bfloat16, torch.float16):
            if dtype == torch.float32:
                weight = torch.randn(m, n).to(half)
                merged = functional.dense(update, weight=weight)
                assert torch.equal(merged, (weight.float() + delta).to(half)), half
print("agrees")
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, env={"PATH": "", **environment}, capture_output=True, text=True, check=False)


def _can_run(isa: str) -> bool:
    probe = "from snell import native; print(native.instruction_set())"
    return _run(probe, SNELL_ISA=isa).stdout.strip() == isa


@SKIP
def test_the_library_knows_every_kernel_function_and_gate() -> None:
    assert set(native._KERNELS) == set(KERNEL_FUNCTIONS)
    assert set(native._GATES) == set(GATES)


@SKIP
@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_instruction_set_agrees_with_the_reference(isa: str) -> None:
    if not _can_run(isa):
        pytest.skip(f"this machine does not run {isa}")
    seed = int(torch.randint(2**31, ()))
    done = _run(CHECK.format(seed=seed, isa=isa), SNELL_ISA=isa)
    assert done.stdout.strip() == "agrees", f"seed {seed}: {done.stderr}"


def test_without_the_library_the_package_says_so_once_and_works() -> None:
    done = _run("""
import ctypes
load = ctypes.CDLL
def refuse(name, *args, **kwargs):
    if "_native" in str(name):
        raise OSError("no such library")
    return load(name, *args, **kwargs)
ctypes.CDLL = refuse
import torch, snell
assert list(snell.backends.AVAILABLE)[0] == "blocked" and "cpu" not in snell.backends.AVAILABLE
layer = snell.SnellLinear(24, 16, rank=4)
layer(torch.randn(3, 24)).sum().backward()
assert layer.snell_A.grad.abs().sum() > 0 and layer.num_survivors() == 24 * 16 - 346
print("works")
""")
    assert done.stdout.strip() == "works", done.stderr
    assert done.stderr.count("snell's native library") == 1


@SKIP
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_library_cut_short_is_refused_before_it_kills_the_process(tmp_path, monkeypatch, share: float) -> None:
    whole = native.PATH.read_bytes()
    cut = tmp_path / "_native.so"
    cut.write_bytes(whole[: int(share * len(whole))])
    monkeypatch.setattr(native, "PATH", cut)
    library, problem = native._load()
    assert library is None
    expected = f"does not load: {cut}: file too short" if share == 0 else f"it holds {cut.stat().st_size} of"
    assert expected in problem
    cut.write_bytes(whole)
    assert native._load()[1] is None


def test_a_library_of_another_version_is_refused(tmp_path, monkeypatch) -> None:
    other = _library_of_the_system()
    monkeypatch.setattr(native, "PATH", other)
    library, problem = native._load()
    assert library is None
    assert problem.startswith("is not of this version")
    assert "snell_isa" in problem


def _library_of_the_system() -> Path:
    """Any shared library that is not ours: one that this process has mapped."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of loaded libraries here")
    paths = (line.split()[-1] for line in maps.read_text().splitlines())
    return next(Path(path) for path in paths if path.rsplit("/", 1)[-1].startswith("libc.so"))


@SKIP
def test_ties_and_a_missed_bracket_are_settled_by_the_radix_passes() -> None:
    # Two values only, each half a million times: the bracket gathers far more than luck allows.
    A, B = torch.zeros(1000, 2), torch.ones(1000, 2)
    B[:400] = 3.0
    theta = torch.tensor([1.0])
    for k, row in ((399_999, 999), (600_000, 999), (600_001, 0), (1_000_000, 0)):
        tau = native.select(A, B, theta, Spec(2, 0.5, groups=1), k)
        assert tau == torch.linalg.vector_norm(B[row]).item(), k


@SKIP
def test_more_than_all_entries_gives_the_largest() -> None:
    # As when factors shrink between two radix passes: fewer keys are left than are still to be passed over.
    A, B = torch.randn(70, 4), torch.randn(90, 4)
    for dtype in (torch.float32, torch.float64):
        factors = A.to(dtype), B.to(dtype), torch.tensor([1.0], dtype=dtype)
        for excess in (1, 1000, 2**40):
            tau = native.select(*factors, Spec(4, 0.5, groups=1), 70 * 90 + excess)
            assert tau == native.select(*factors, Spec(4, 0.5, groups=1), 70 * 90)


HOGWILD = """
import threading, torch
from snell import native
from snell.spec import Spec

A, B, theta = torch.zeros(400, 2), torch.ones(400, 2), torch.ones(1)
done = threading.Event()
def write():
    value = 1.0
    while not done.is_set():
        value = 4.0 - value
        B.fill_(value)
threading.Thread(target=write).start()
try:
    taus = torch.stack([native.select(A, B, theta, Spec(2, 0.5, groups=1), 144_000) for _ in range(100)])
finally:
    done.set()
smallest, largest = (torch.linalg.vector_norm(torch.full((2,), value)) for value in (1.0, 3.0))
# A radix pass that finds nothing left of what the last one found answers that one's lower edge, 3 bits below 2^e.
assert (taus >= smallest * (1 - 2**-3)).all() and (taus <= largest).all(), taus
print("bounded")
"""


@SKIP
def test_factors_that_change_meanwhile_leave_tau_among_the_magnitudes() -> None:
    done = _run(HOGWILD)
    assert done.stdout.strip() == "bounded", done.stderr


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@SKIP
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("rank", [10, 32])  # padded to whole vectors on every instruction set, and on none
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", list(KERNEL_FUNCTIONS))
def test_threads_share_out_the_gradients_without_a_loss(kernel: str, dtype, rank: int, threads: int) -> None:
    m, n = 257, 391
    assert m * n * rank >> 18 >= threads, "so small a layer is left to fewer threads (Operand::threads)"
    A, B = 0.3 * torch.randn(n, rank, dtype=dtype), 0.3 * torch.randn(m, rank, dtype=dtype)
    spec = Spec(rank, 0.9, kernel, 2)
    theta = torch.tensor(spec.initial_theta(0.3), dtype=dtype)
    update = functional.update(A, B, theta, spec)
    G = torch.randn(m, n, dtype=dtype)

    def gradients(threads: int) -> Gradients:
        torch.set_num_threads(threads)
        grads = Gradients.zeros(update)
        native.factor_grad(update, grads, G, None, None)
        return grads

    shared, alone = gradients(threads), gradients(1)
    assert not shared.A.equal(alone.A), "dA was summed in the order of one thread"
    held = [grad for grad in shared if grad is not None]
    for grad, (name, pair) in zip(held, Expected(update).gradients(G).items(), strict=True):
        assert_within(grad, *pair, name)


@SKIP
@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1.0, -0.2])
def test_threads_share_out_the_smooth_maxima(dtype, threads: int, gamma: float) -> None:
    m, n, spec = 257, 391, Spec(32, 0.9, "mixture", 2)
    A, B = 0.3 * torch.randn(n, 32, dtype=dtype), 0.3 * torch.randn(m, 32, dtype=dtype)
    update = functional.update(A, B, torch.tensor([0.3, -0.3, 1.0, 0.0, gamma], dtype=dtype), spec)
    grad, found = torch.randn(n, dtype=dtype), []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        competition.forget()
        maxima = competition.smooth_max(*update[:3], spec)
        found.append((maxima, *competition.smooth_max_backward(grad, maxima, *update[:3], spec)))
        expected = smooth_max.smooth_max(update._replace(smooth_max=maxima), grad)
        for result, (name, pair) in zip(found[-1], expected.items(), strict=True):
            assert_within(result, *pair, name)
    assert not found[1][1].equal(found[0][1]), "dA was summed in the order of one thread"
    assert all(one.equal(other) for one, other in zip(found[1], found[2], strict=True))


def _near_pairs(offset: float, spread: float, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of which many rows nearly coincide: a common row, and differences of ``spread`` of it."""
    row = torch.randn(32) * offset
    return tuple(size * (row + spread * torch.randn(count, 32)) for count in (83, 61))


@pytest.mark.parametrize("kernel, groups", [("piecewise_linear", 2), ("piecewise_linear", 1), ("rbf", 1)])
@pytest.mark.parametrize(
    "offset, spread, size",
    [(0, 1, 1), (1, 0.3, 1), (1, 1e-3, 1), (1, 1e-6, 1), (100, 1, 0.01), (0, 1, 1e-18), (0, 1, 1e-25), (0, 1, 1e15)],
)
def test_distances_lose_nothing_where_norms_and_products_cancel(kernel, groups, offset, spread, size) -> None:
    A, B = _near_pairs(offset, spread, size)
    A[3], B[5] = B[2], 0  # an exact match, and a row of zeros
    spec = Spec(32, 0.0, kernel, groups)
    theta = torch.tensor([1.0, -1.0][:groups] if kernel == "piecewise_linear" else [1.0, 1.0, -1.0])
    update = Update(A, B, theta, torch.zeros(()), spec.applied)
    expected = Expected(update)
    K = functional.dense(update)
    # Squares of 1e-25 are denormal: their error is absolute.
    assert_within(K, expected.K(), expected.K_error() + 32 * 2**-74, "K")
    if kernel == "piecewise_linear" and groups == 1:
        assert K[2, 3] == 0


def test_an_entry_does_not_depend_on_its_tile() -> None:
    """Near pairs take another sum than their neighbours. It must not matter where the tile begins."""
    A, B = _near_pairs(1, 0.3, 1)
    A[::7] = torch.randn(12, 32)
    update = Update(A, B, torch.tensor([1.0, -0.7]), torch.zeros(()), Spec(32, 0.0, "piecewise_linear", 2).applied)
    whole = functional.dense(update)
    for row, column in ((0, 1), (1, 0), (2, 17), (57, 33)):
        part = functional.dense(Update(A[column:].contiguous(), B[row:].contiguous(), *update[2:]))
        assert part.equal(whole[row:, column:])
    assert functional.dense(update.transposed()).equal(whole.t())
