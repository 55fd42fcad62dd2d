"""The cases of the self-check: small random updates, and each operation's largest error on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from snell import error_bounds, functional, native
from snell.error_bounds import TF32_ERROR, Update, share_of_bound
from snell.spec import GATES, KERNEL_FUNCTIONS, Spec, num_zeroed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Odd sizes, so that every tile has an edge: out, in, rank, groups, sparsity.
M, N, RANK, GROUPS, SPARSITY = 29, 43, 6, 2, 0.8

#: Tokens of the layer, and of the layer where a backend has a path for few.
TOKENS, FEW = 19, 5


class Setting(NamedTuple):
    """What one case is made of; ``dtype`` is the weight's and the activations'."""

    kernel: str
    gate: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kernel}, {self.gate}, {str(self.dtype).removeprefix('torch.')}"


def settings(thinned: bool) -> list[Setting]:
    """Every combination; or a Latin square of them, in which every two values still meet."""
    return [
        Setting(kernel, gate, dtype)
        for i, kernel in enumerate(KERNEL_FUNCTIONS)
        for j, gate in enumerate(GATES)
        for k, dtype in enumerate(DTYPES)
        if not thinned or (i + j + k) % len(DTYPES) == 0
    ]


class Case:
    """Random tensors of one setting on one device, the same at every call, and tau by the backend in use."""

    def __init__(self, setting: Setting, device: str) -> None:
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.setting, self.device = setting, device
        kernel, gate, dtype = setting
        factors = torch.float64 if dtype == torch.float64 else torch.float32
        self.spec = Spec(RANK, 0.0 if gate == "none" else SPARSITY, kernel, GROUPS, gate)
        theta = torch.tensor(self.spec.initial_theta(0.1), dtype=torch.float64)
        theta = theta * (1 + 0.3 * draw(len(theta)).abs())
        # Small factors: rbf and sigmoid would saturate, and tie.
        A, B, theta = (t.to(device, factors) for t in (0.3 * draw(N, RANK), 0.3 * draw(M, RANK), theta))
        self.weight, self.bias, self.G = (t.to(device, dtype) for t in (draw(M, N), draw(M), draw(M, N)))
        self.x, self.grad_y = (t.to(device, dtype) for t in (draw(TOKENS, N), draw(TOKENS, M)))
        self.k = num_zeroed(self.spec.sparsity, M * N)
        tau = functional.select_threshold(A, B, theta, sparsity=self.spec.sparsity, kernel=kernel, groups=GROUPS)
        self.factors, self.tau = (A, B, theta), tau
        # The soft gate moves with tau, by its very rounding. The others only rank by it: there the reference's own tau
        # stands, in float64, or the entry that tau is would count as one that may as well survive.
        self.expected = Update(A, B, theta, kernel, GROUPS, gate, tau)
        if gate in ("magnitude", "hard"):
            self.expected = replace(self.expected, tau=self.exact_tau())
        self._layers: dict[tuple[int, bool], dict[str, float]] = {}

    def exact_tau(self) -> Tensor:
        """The reference's tau, in float64."""
        magnitudes = self.expected.K().abs().flatten()
        return magnitudes.kthvalue(self.k).values if self.k else magnitudes.new_zeros(())

    @property
    def tf32_error(self) -> float:
        return TF32_ERROR if self.device == "cuda" and self.G.element_size() == 2 else 0.0

    def merge(self, weight: Tensor | None = None, gate: str | None = None) -> Tensor:
        """By the backend in use."""
        A, B, theta = self.factors
        kernel, gate = self.setting.kernel, gate or self.setting.gate
        return functional.merge(A, B, theta, self.tau, weight=weight, kernel=kernel, groups=GROUPS, gate=gate)

    def zeros(self) -> list[Tensor]:
        """Where gradients of the factors are added."""
        return [torch.zeros_like(t) for t in self.factors]

    def layer(self, *names: str, tokens: int = TOKENS, weighted: bool = True) -> float:
        """The largest error of the layer's results that are named, with its first ``tokens`` tokens."""
        key = tokens, weighted
        if key not in self._layers:
            self._layers[key] = self._run_layer(tokens, self.weight if weighted else None)
        return max(self._layers[key][name] for name in names)

    def _run_layer(self, tokens: int, weight: Tensor | None) -> dict[str, float]:
        x = self.x[:tokens].clone().requires_grad_()
        A, B, theta = (t.clone().requires_grad_() for t in self.factors)
        bias, grad_y = None if weight is None else self.bias, self.grad_y[:tokens]
        y = functional.linear(x, weight, bias, A, B, theta, self.tau, self.spec)
        y.backward(grad_y)
        actual = {"y": y, "grad_x": x.grad, "grad_A": A.grad, "grad_B": B.grad, "grad_theta": theta.grad}
        expected = error_bounds.layer(self.expected, x.detach(), weight, bias, grad_y, self.tf32_error)
        return {name: share_of_bound(_present(actual[name]), *pair) for name, pair in expected.items()}


def _present(result: Tensor | None) -> Tensor:
    if result is None:
        raise ValueError("a gradient is missing")
    return result.detach()


def _select(case: Case) -> float:
    # The k-th smallest moves by no more than the entries do.
    return share_of_bound(case.tau, case.exact_tau(), case.expected.K_error().max())


def _survivors(case: Case) -> float:
    """Exact, among the backend's own K: tau has the rank it should, and who is above tau is who is not zero."""
    magnitudes = case.merge(gate="none").abs()
    below, at = int((magnitudes < case.tau).sum()), int((magnitudes == case.tau).sum())
    right_rank = not case.k or below < case.k <= below + at
    right_entries = case.setting.gate == "none" or (case.merge() != 0).equal(magnitudes > case.tau)
    return 0.0 if right_rank and right_entries else torch.inf


def _merge(case: Case) -> float:
    kinds = ((None, case.tau.dtype), (case.weight, case.setting.dtype))
    return max(share_of_bound(case.merge(weight), *case.expected.merged(weight, dtype)) for weight, dtype in kinds)


def _factor_gradients(case: Case) -> float:
    """The gradients; and the weight written beside them must have the bits of merge."""
    merged, grads = torch.empty_like(case.G), case.zeros()
    update = (case.setting.kernel, GROUPS, case.setting.gate)
    torch.ops.snell.factor_grad(case.G, *case.factors, case.tau, case.weight, merged, *grads, *update)
    if not merged.equal(case.merge(case.weight)):
        return torch.inf
    expected = case.expected.gradients(case.G, case.tf32_error * case.G.double().abs())
    return max(share_of_bound(grad, *pair) for grad, pair in zip(grads, expected.values(), strict=True))


_GRADIENTS = ("grad_x", "grad_A", "grad_B", "grad_theta")


def _gradients_of_tokens(case: Case) -> float:
    """What large layers with few survivors take instead of G."""
    (A, B, theta), grads = case.factors, case.zeros()
    dy, x = case.grad_y.t().contiguous(), case.x.t().contiguous()
    native.factor_grad_of_tokens(
        dy, x, A, B, theta, case.tau, grads[0], grads[1], grads[2], case.setting.kernel, GROUPS, case.setting.gate
    )
    expected = error_bounds.layer(case.expected, case.x, case.weight, None, case.grad_y)
    return max(share_of_bound(grad, *expected[name]) for grad, name in zip(grads, _GRADIENTS[1:], strict=True))


def operations(name: str, backend: ModuleType, setting: Setting) -> dict[str, Callable[[Case], float]]:
    """What is checked of a backend, by name: each gives the largest error as a share of its bound."""
    checks: dict[str, Callable[[Case], float]] = {
        "select": _select,
        "survivors": _survivors,
        "merge": _merge,
        "factor gradients": _factor_gradients,
        "linear, forward": lambda case: case.layer("y"),
        "linear, backward": lambda case: case.layer(*_GRADIENTS),
        "x dW^T, both ways": lambda case: case.layer("y", *_GRADIENTS, weighted=False),
    }
    if hasattr(backend, "linear_few"):
        checks["linear, few tokens"] = lambda case: max(case.layer("y", tokens=FEW, weighted=w) for w in (True, False))
    # It takes activations in the factors' dtype alone.
    if name == "cpu" and setting.gate != "none" and setting.dtype in (torch.float32, torch.float64):
        checks["gradients of survivors"] = _gradients_of_tokens
    return checks
