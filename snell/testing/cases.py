"""The cases of the self-check: small random updates, and the error of each operation on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snell import backends, competition, functional
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.spec import GATES, Spec
from snell.testing import bounds, edits, smooth_max
from snell.testing.bounds import Expected, share_of_bound
from snell.update import Gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Odd sizes, so that every tile has an edge: out, in, rank, groups, sparsity.
M, N, RANK, GROUPS, SPARSITY = 29, 43, 6, 2, 0.8

#: Tokens of the layer, and few enough for the path that some backends have for few.
TOKENS, FEW = 19, 5


class Setting(NamedTuple):
    """The settings of a case. ``dtype`` is that of the weight and the activations."""

    kernel: str
    gate: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kernel}, {self.gate}, {str(self.dtype).removeprefix('torch.')}"


def settings(thinned: bool) -> list[Setting]:
    """Every combination, or a Latin square of them, which still has every pair of values."""
    return [
        Setting(kernel, gate, dtype)
        for i, kernel in enumerate(KERNEL_FUNCTIONS)
        for j, gate in enumerate(GATES)
        for k, dtype in enumerate(DTYPES)
        if not thinned or (i + j + k) % len(DTYPES) == 0
    ]


class Case:
    """Random tensors of one setting on one device, the same every time; the backend in use selects tau."""

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
        # Small factors: with larger ones rbf and sigmoid saturate, and entries tie.
        A, B, theta = (t.to(device, factors) for t in (0.3 * draw(N, RANK), 0.3 * draw(M, RANK), theta))
        self.weight, self.bias, self.G = (t.to(device, dtype) for t in (draw(M, N), draw(M), draw(M, N)))
        self.x, self.grad_y = (t.to(device, dtype) for t in (draw(TOKENS, N), draw(TOKENS, M)))
        self.k = self.spec.num_zeroed(M * N)
        self.update = functional.update(A, B, theta, self.spec)
        # The soft gate changes with tau, so it is judged at the tau that the backend selected. The others only compare
        # with tau, so they are judged at the exact one: the entry that tau comes from would otherwise be undecided.
        self.expected = Expected(self.update)
        if gate in ("magnitude", "hard"):
            self.expected = Expected(self.update._replace(tau=self.exact_tau()))
        self._layers: dict[tuple[int, bool], dict[str, float]] = {}

    def exact_tau(self) -> Tensor:
        """The reference's tau, in float64."""
        magnitudes = self.expected.K().abs().flatten()
        return magnitudes.kthvalue(self.k).values if self.k else magnitudes.new_zeros(())

    def merge(self, weight: Tensor | None = None, *, ungated: bool = False) -> Tensor:
        """dW, or weight + dW, by the backend in use; K itself if ``ungated``."""
        spec = Spec(RANK, 0.0, self.spec.kernel, GROUPS).applied if ungated else self.update.spec
        return functional.dense(self.update._replace(spec=spec), weight=weight)

    def layer(self, *names: str, tokens: int = TOKENS, weighted: bool = True) -> float:
        """The largest error of the named results of the layer, for the first ``tokens`` tokens."""
        if "grad_theta" in names and self.update.smooth_max is not None:
            names = *names, "grad_smooth_max"
        key = tokens, weighted
        if key not in self._layers:
            self._layers[key] = self._run_layer(tokens, self.weight if weighted else None)
        return max(self._layers[key][name] for name in names)

    def _run_layer(self, tokens: int, weight: Tensor | None) -> dict[str, float]:
        x = self.x[:tokens].clone().requires_grad_()
        A, B, theta = (t.clone().requires_grad_() for t in self.update[:3])
        bias, grad_y = None if weight is None else self.bias, self.grad_y[:tokens]
        maxima = None if self.update.smooth_max is None else self.update.smooth_max.clone().requires_grad_()
        update = self.update._replace(A=A, B=B, theta=theta, smooth_max=maxima)
        y = functional.linear(x, weight, bias, update)
        y.backward(grad_y)
        actual = {"y": y, "grad_x": x.grad, "grad_A": A.grad, "grad_B": B.grad, "grad_theta": theta.grad}
        if maxima is not None:
            actual["grad_smooth_max"] = maxima.grad
        expected = bounds.layer(self.expected, x.detach(), weight, bias, grad_y)
        return {name: share_of_bound(_present(actual[name]), *pair) for name, pair in expected.items()}


def _present(result: Tensor | None) -> Tensor:
    if result is None:
        raise ValueError("a gradient is missing")
    return result.detach()


def _select(case: Case) -> float:
    # The k-th smallest is off by no more than the entries are.
    return share_of_bound(case.update.tau, case.exact_tau(), case.expected.K_error().max())


def _survivors(case: Case) -> float:
    """Exactly right for the backend's own K: tau has its rank, and the entries above tau are those that are not 0."""
    magnitudes, tau = case.merge(ungated=True).abs(), case.update.tau
    below, at = int((magnitudes < tau).sum()), int((magnitudes == tau).sum())
    right_rank = not case.k or below < case.k <= below + at
    right_entries = case.setting.gate == "none" or (case.merge() != 0).equal(magnitudes > tau)
    return 0.0 if right_rank and right_entries else torch.inf


def _merge(case: Case) -> float:
    kinds = ((None, case.update.tau.dtype), (case.weight, case.setting.dtype))
    return max(share_of_bound(case.merge(weight), *case.expected.merged(weight, dtype)) for weight, dtype in kinds)


def _factor_gradients(case: Case) -> float:
    """The gradients. The merged weight of the same pass must have the bits of merge's."""
    merged, grads = torch.empty_like(case.G), Gradients.zeros(case.update)
    backends.of(case.update.A).factor_grad(case.G, case.update, grads, case.weight, merged)
    if not merged.equal(case.merge(case.weight)):
        return torch.inf
    expected = case.expected.gradients(case.G)
    return max(share_of_bound(grad, *pair) for grad, pair in zip(_held(grads), expected.values(), strict=True))


def _held(grads: Gradients) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


_GRADIENTS = ("grad_x", "grad_A", "grad_B", "grad_theta")


def _gradients_of_tokens(case: Case) -> float | None:
    """The path of large layers with few survivors, which forms no G."""
    grads, backend = Gradients.zeros(case.update), backends.of(case.update.A)
    activations = backend.factor_grad_of_tokens(case.grad_y, case.x, case.update, grads, always=True)
    if activations is None:
        return None
    backend.factor_grad(activations, case.update, grads)
    expected = bounds.layer(case.expected, case.x, case.weight, None, case.grad_y)
    named = (
        (getattr(grads, name.removeprefix("grad_")), pair) for name, pair in expected.items() if name[5:] not in "xy"
    )
    return max(share_of_bound(grad, *pair) for grad, pair in named)


def _few_tokens(case: Case) -> float:
    return max(case.layer("y", tokens=FEW, weighted=weighted) for weighted in (True, False))


def _start(case: Case) -> float:
    """Less itself an update is 0 and leaves the weight's bits. Less another one it is the sum of both, one negated."""
    A, B, theta = case.update[:3]
    other = functional.update(A.roll(1, 0), B.roll(1, 0), theta, case.spec)
    same, less = case.update._replace(start=case.update), case.update._replace(start=other)
    if not functional.dense(same, weight=case.weight).equal(case.weight) or functional.dense(same).any():
        return torch.inf
    expected = functional.dense(case.update).detach() - functional.dense(other).detach()
    return 0.0 if functional.dense(less).equal(expected) else torch.inf


def _smooth_max(case: Case) -> float | None:
    """The smooth maxima of columns and their gradients."""
    A, B, theta, _, spec, _, maxima, *_ = case.update
    if maxima is None:
        return None
    grad = case.G[0].to(A.dtype)
    results = (
        competition.smooth_max(A, B, theta, spec),
        *competition.smooth_max_backward(grad, maxima, A, B, theta, spec),
    )
    expected = smooth_max.smooth_max(case.update, grad)
    return max(share_of_bound(result, *pair) for result, pair in zip(results, expected.values(), strict=True))


def _edit(case: Case) -> float:
    """The edit of the layer's outputs, and its gradients, with a column of the factors for each vector."""
    u, grad = case.grad_y.clone().requires_grad_(), case.grad_y.flip(0)
    scaling, bias = (column.clone().requires_grad_() for column in case.update.B.T[:2])
    z = functional.edit(u, scaling, bias)
    results = (z.detach(), *torch.autograd.grad(z, (u, scaling, bias), grad))
    expected = edits.edit(u, scaling, bias, grad)
    return max(share_of_bound(result, *pair) for result, pair in zip(results, expected.values(), strict=True))


#: The checks of a backend. Each returns the largest error as a share of its bound, or None if the backend lacks it.
OPERATIONS: dict[str, Callable[[Case], float | None]] = {
    "select": _select,
    "survivors": _survivors,
    "smooth maxima": _smooth_max,
    "merge": _merge,
    "merge, less a start": _start,
    "factor gradients": _factor_gradients,
    "linear, forward": lambda case: case.layer("y"),
    "linear, backward": lambda case: case.layer(*_GRADIENTS),
    "x dW^T, both ways": lambda case: case.layer("y", *_GRADIENTS, weighted=False),
    "linear, few tokens": _few_tokens,
    "gradients of survivors": _gradients_of_tokens,
    "edit, both ways": _edit,
}
