"""The operations as functions. Arguments are checked here and nowhere below; the device's backend does the work."""

from __future__ import annotations

import torch
from torch import Tensor

from snell import ops, red, softmax
from snell.spec import Spec
from snell.update import Update

__all__ = ["edit", "merge", "select_threshold", "snell_linear"]

_FACTOR_DTYPES = (torch.float32, torch.float64)

#: Any sparsity above 0, for an update whose tau is given.
_GIVEN = 0.5

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _require_tensor(name: str, value: object, ndim: int | None, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {names}; got {value.dtype}: convert it with .to()")
    if ndim is not None and value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s); got shape {tuple(value.shape)}")


def _check_factors(A: Tensor, B: Tensor, theta: Tensor, sparsity: float, kernel: str, groups: int, gate: str) -> Spec:
    _require_tensor("A", A, 2, _FACTOR_DTYPES)
    for name, tensor, ndim in (("B", B, 2), ("theta", theta, 1)):
        _require_tensor(name, tensor, ndim, _FACTOR_DTYPES)
        if tensor.dtype != A.dtype:
            raise TypeError(f"{name} must have A's dtype, {A.dtype}; got {tensor.dtype}")
        if tensor.device != A.device:
            raise ValueError(f"{name} must be on A's device, {A.device}; got {tensor.device}")
    for name, tensor in (("A", A), ("B", B)):
        if not tensor.numel():
            raise ValueError(f"{name} must not be empty; got shape {tuple(tensor.shape)}")
    if A.shape[1] != B.shape[1]:
        raise ValueError(
            f"A [in_features, rank] and B [out_features, rank] must share their rank; got {tuple(A.shape)} and "
            f"{tuple(B.shape)}"
        )
    spec = Spec(A.shape[1], sparsity, kernel, groups, gate)
    if theta.shape[0] != spec.num_theta:
        raise ValueError(
            f"theta must hold {spec.num_theta} value(s) for kernel {kernel!r} with groups={groups}; "
            f"got {theta.shape[0]}"
        )
    return spec


def _check_tau(tau: Tensor, A: Tensor) -> None:
    _require_tensor("tau", tau, 0, (A.dtype,))
    if tau.device != A.device:
        raise ValueError(f"tau must be on A's device, {A.device}; got {tau.device}")


def _check_weight(weight: Tensor, A: Tensor, B: Tensor) -> None:
    _require_tensor("weight", weight, 2, WEIGHT_DTYPES)
    expected = (B.shape[0], A.shape[0])
    if tuple(weight.shape) != expected:
        swapped = " (A and B look swapped)" if tuple(weight.shape) == expected[::-1] else ""
        raise ValueError(
            f"weight must be [out_features, in_features] = {list(expected)}, as B and A say; "
            f"got {list(weight.shape)}{swapped}"
        )
    if weight.device != A.device:
        raise ValueError(f"weight must be on A's device, {A.device}; got {weight.device}")


def _check_finite(name: str, tensor: Tensor) -> None:
    # On an accelerator this check would cost a synchronisation. NaN factors give NaN outputs there.
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not tensor.isfinite().all():
        raise ValueError(f"{name} contains NaN or infinite values; no threshold can be selected")


def select_threshold(A: Tensor, B: Tensor, theta: Tensor, *, sparsity: float, kernel: str, groups: int) -> Tensor:
    """tau, the ceil(s*m*n)-th smallest \\|K_ij\\| of the whole matrix, exact. The matrix is never stored.

    Args:
        A: ``[n, r]`` float32 or float64.
        B: ``[m, r]`` of A's dtype and device.
        theta: ``[t]`` of A's dtype: the kernel function's scalar parameters.
        sparsity: share of the entries that are set to 0, in [0, 1); at 0 tau is 0 and all entries are kept.
        kernel: ``piecewise_linear``, ``linear``, ``sigmoid``, ``rbf`` or ``mixture``.
        groups: number of contiguous groups of the rank axis.

    Returns:
        A 0-dim tensor of A's dtype on A's device, without gradient. It is selected once for the same factors. On an
        accelerator NaN and infinite factors are not refused; NaN counts as larger than infinity.

    Raises:
        ValueError: wrong shapes, devices or settings; NaN or infinite factors on a CPU.
        TypeError: an unsupported dtype.

    Source: arXiv 2411.01800, equation 5.
    """
    spec = _check_factors(A, B, theta, sparsity, kernel, groups, "soft")
    for name, tensor in (("A", A), ("B", B), ("theta", theta)):
        _check_finite(name, tensor)
    return update(A.contiguous(), B.contiguous(), theta.contiguous(), spec).tau


def update(
    A: Tensor, B: Tensor, theta: Tensor, spec: Spec, start: Update | None = None, tau: Tensor | None = None
) -> Update:
    """The update with its threshold, from factors that need no checks. A layer builds it in each forward.

    Args:
        tau: the threshold, where it is not the matrix's own.
    """
    maxima = softmax.smooth_max(A, B, theta, spec)
    if tau is None:
        tau = ops.select_threshold(A, B, theta, spec, maxima) if spec.sparsity else A.new_zeros(())
    return Update(A, B, theta, tau, spec.applied, start, maxima)


def _given(A: Tensor, B: Tensor, theta: Tensor, tau: Tensor, spec: Spec) -> Update:
    return Update(A, B, theta, tau, spec, smooth_max=softmax.smooth_max(A, B, theta, spec))


def merge(
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    tau: Tensor,
    *,
    weight: Tensor | None = None,
    kernel: str,
    groups: int,
    gate: str,
) -> Tensor:
    """``dW = K * gate(|K|)`` as a dense [m, n] matrix, or ``weight + dW``.

    Args:
        A, B, theta, kernel, groups: as in :func:`select_threshold`.
        tau: 0-dim tensor of A's dtype, from :func:`select_threshold`.
        weight: ``[m, n]`` float64, float32, bfloat16 or float16; entries that are not kept have its bits.
        gate: ``soft``, ``magnitude``, ``hard``, or ``none`` (which a sparsity of 0 means).

    Returns:
        ``[m, n]`` in the weight's dtype, or in A's without a weight. Differentiable once in A, B, theta and weight;
        the gate and tau count as constants.

    Raises:
        ValueError, TypeError: as :func:`select_threshold`.
    """
    spec = _check_factors(A, B, theta, _GIVEN, kernel, groups, gate)
    _check_tau(tau, A)
    if weight is not None:
        _check_weight(weight, A, B)
    return ops.merge(weight, _given(A.contiguous(), B.contiguous(), theta.contiguous(), tau, spec))


def dense(update: Update, rows: slice | None = None, weight: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The given rows of scale * dW, added to the same rows of a weight if they are given. Differentiable like merge."""
    update = update if rows is None else update.rows(rows)
    if scale == 1:
        return ops.merge(weight, update)
    delta = ops.merge(None, update) * scale
    if weight is None:
        return delta
    # Where nothing is added the weight keeps its bits: -0 + 0 is 0.
    return torch.where(delta == 0, weight, (weight + delta).to(weight.dtype))


def snell_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    theta: Tensor,
    *,
    sparsity: float,
    kernel: str,
    groups: int,
    gate: str,
    tau: Tensor | None = None,
) -> Tensor:
    """``y = x (W0 + dW)^T + bias``. dW is recomputed block by block and never kept.

    Args:
        x: ``[..., n]`` float64, float32, bfloat16 or float16; any batch shape, including zero tokens.
        weight: ``[m, n]`` in x's dtype (any of those dtypes under autocast).
        bias: ``[m]`` in the weight's dtype, or None.
        A, B, theta, sparsity, kernel, groups: as in :func:`select_threshold`.
        gate: ``soft``, ``magnitude`` or ``hard``.
        tau: the threshold, if the caller has it already; otherwise selected here.

    Returns:
        ``[..., m]`` in x's dtype (autocast's, where it is on). Differentiable once in x, weight, bias,
        A, B and theta; the gate and tau count as constants. Saved for backward: x, the factors, tau and a
        reference to the weight.

    Raises:
        ValueError, TypeError: as :func:`select_threshold`.
    """
    spec = _check_factors(A, B, theta, sparsity, kernel, groups, gate)
    _check_weight(weight, A, B)
    if bias is not None:
        _require_tensor("bias", bias, 1, (weight.dtype,))
        if bias.shape[0] != B.shape[0]:
            raise ValueError(f"bias must have out_features = {B.shape[0]} entries; got {bias.shape[0]}")
        if bias.device != weight.device:
            raise ValueError(f"bias must be on weight's device, {weight.device}; got {bias.device}")
    A, B, theta = A.contiguous(), B.contiguous(), theta.contiguous()
    if tau is not None:
        _check_tau(tau, A)
        return linear(x, weight, bias, _given(A, B, theta, tau, spec.applied))
    for name, tensor in (("A", A), ("B", B), ("theta", theta)):
        _check_finite(name, tensor)
    return linear(x, weight, bias, update(A, B, theta, spec))


def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Update) -> Tensor:
    """:func:`snell_linear` for parameters that need no checks. A layer calls it; only x is checked.

    Without a weight the result is ``x dW^T``, for a base whose weight cannot be added to.
    """
    _require_tensor("x", x, None, WEIGHT_DTYPES)
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device_type))
    elif weight is not None and x.dtype != weight.dtype:
        raise TypeError(f"x must have weight's dtype, {weight.dtype}, outside autocast; got {x.dtype}")
    A = update.A
    if not x.dim() or x.shape[-1] != A.shape[0]:
        raise ValueError(f"x must be [..., in_features={A.shape[0]}]; got shape {tuple(x.shape)}")
    if x.device != A.device:
        raise ValueError(f"x must be on the factors' device, {A.device}; got {x.device}")
    return ops.linear(x, weight, bias, update)


def edit(u: Tensor, scaling: Tensor, bias: Tensor) -> Tensor:
    """``scaling * u + bias`` along the last axis, in one pass; backward takes one pass too, and gives the same bits.

    Args:
        u: ``[..., m]`` float64, float32, bfloat16 or float16: a layer's output.
        scaling: ``[m]`` float32 or float64.
        bias: ``[m]`` in the scaling's dtype.

    Returns:
        ``[..., m]`` in u's dtype; computed in the scaling's, or in float64 where u is. Differentiable once in all
        three. Saved for backward: u where the scaling needs a gradient, and the scaling.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: an unsupported dtype.

    Source: RED, arXiv 2402.15179.
    """
    _require_tensor("u", u, None, WEIGHT_DTYPES)
    _require_tensor("scaling", scaling, 1, _FACTOR_DTYPES)
    _require_tensor("bias", bias, 1, (scaling.dtype,))
    for name, vector in (("scaling", scaling), ("bias", bias)):
        if not u.dim() or u.shape[-1] != vector.shape[0] or not vector.shape[0]:
            raise ValueError(
                f"{name} must be as long as u's last axis; got {vector.shape[0]} for u of shape {tuple(u.shape)}"
            )
        if vector.device != u.device:
            raise ValueError(f"{name} must be on u's device, {u.device}; got {vector.device}")
    if u.dtype == torch.float64:
        scaling, bias = scaling.double(), bias.double()
    return red.edit(u, scaling, bias)
