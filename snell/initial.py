"""How an update starts: initial factors, and warnings about starts that cannot train or change too much."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from snell import reference
from snell.spec import Spec

__all__ = ["draw", "draw_identity", "draw_visible", "relative_size", "warn_if_dead", "warn_if_large"]

#: Rows and columns of a sample. At the start all entries have the same distribution, so a sample represents them.
_SAMPLE = 256


@torch.no_grad()
def draw(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    """Fill the factors as published: uniform in +-1/sqrt(n*r/P) and +-1/sqrt(m*r/P)."""
    for factor in (A, B):
        nn.init.uniform_(factor, -1, 1).div_(math.sqrt(factor.numel() / spec.groups))
    theta.copy_(torch.tensor(spec.initial_theta(scale)))


@torch.no_grad()
def draw_identity(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    """Fill the factors so that dW is exactly 0 and has a gradient, as LoRA starts.

    This is possible only without competition. With it, an entry of dW is 0 if its gate is 0, and its gradient is
    multiplied by the same gate, so an update of exactly 0 would never train. It is not possible with distances either:
    a distance of 0 has a gradient of 0, and equal groups of opposite sign cancel only up to rounding.

    Raises:
        ValueError: ``sparsity > 0``, or a kernel function of distances.
    """
    if spec.sparsity or spec.function.statistic != "dot":
        raise ValueError(
            "an identity start that still trains exists for sparsity=0 and the kernel functions linear and sigmoid "
            f"alone; got sparsity={spec.sparsity}, kernel={spec.kernel!r}. The published start is small, but not 0"
        )
    draw(A, B, theta, spec, scale)
    B.zero_()


@torch.no_grad()
def draw_visible(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    """Fill the factors with normal numbers, halved until no sampled \\|K\\| exceeds 1/2: a visible dW for tests."""
    draw(A, B, theta, spec, scale)
    for factor in (A, B):
        # exp(-distance^2) is 0 between factors of many columns: then all entries of K are alike.
        nn.init.normal_(factor, std=spec.rank**-0.5 if spec.kernel == "rbf" else 1.0)
    while not A.is_meta and _sampled(A, B, theta, spec).abs().max() > 0.5:
        A.div_(2)
        B.div_(2)


def warn_if_dead(spec: Spec, m: int, n: int, name: str) -> None:
    """Warn if the sparsity keeps no entry of an [m, n] update: dW and its gradient are then always 0."""
    if spec.num_zeroed(m * n) < m * n:
        return
    most = (m * n - 1) / (m * n)
    while Spec(spec.rank, most, spec.kernel, spec.groups, spec.gate).num_zeroed(m * n) == m * n:
        most = math.nextafter(most, 0)
    warnings.warn(
        f"{name} [out_features={m}, in_features={n}] has no entry to train: sparsity={spec.sparsity} sets all "
        f"{m * n} entries of its update to 0 for ever. A sparsity of at most {most:.17g} leaves one",
        stacklevel=3,
    )


@torch.no_grad()
def relative_size(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, weight: Tensor) -> float:
    """Estimate of norm(dW) / norm(weight) at the start, from at most 256 rows and columns; 0 if the weight is 0.

    Args:
        A, B, theta: ``[n, r]``, ``[m, r]`` and ``[t]``, as drawn.
        weight: ``[m, n]``.
    """
    rows, columns = (slice(None, None, max(len(factor) // _SAMPLE, 1)) for factor in (B, A))
    K, base = _sampled(A[columns], B[rows], theta, spec), weight[rows, columns][:_SAMPLE, :_SAMPLE].to(A.dtype)
    zeroed = spec.num_zeroed(K.numel())
    tau = K.abs().flatten().kthvalue(zeroed).values if zeroed else K.new_zeros(())
    delta, base_norm = K * reference.gate_values(K, tau, gate=spec.effective_gate), base.norm().item()
    return delta.norm().item() / base_norm if base_norm else 0.0


def warn_if_large(sizes: dict[str, float], scale: float) -> None:
    """Warn once if updates start larger than their weights; ``sizes`` has :func:`relative_size` by layer name."""
    large = {name: size for name, size in sizes.items() if size > 1}
    if large:
        name, size = max(large.items(), key=lambda item: item[1])
        warnings.warn(
            f"the update starts larger than the weight in {len(large)} of {len(sizes)} layer(s): in {name} its norm is "
            f"about {size:.2g} times the weight's. A scale below {scale:g} starts smaller",
            stacklevel=3,
        )


def _sampled(A: Tensor, B: Tensor, theta: Tensor, spec: Spec) -> Tensor:
    return reference.kernel_matrix(A[:_SAMPLE], B[:_SAMPLE], theta, kernel=spec.kernel, groups=spec.groups)
