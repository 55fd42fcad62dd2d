"""How an update starts: initial factors, and warnings about starts that cannot train or change too much."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from functools import cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from snell import backends, counter, functional, reference
from snell.spec import Spec
from snell.update import Update

__all__ = [
    "Start",
    "check_seed",
    "draw",
    "draw_identity",
    "draw_visible",
    "identity_start",
    "relative_size",
    "size_at_start",
    "warn_if_dead",
    "warn_if_large",
]

#: Rows and columns of a sample. At the start all entries have the same distribution, so a sample represents them.
_SAMPLE = 256


@torch.no_grad()
def draw(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float) -> None:
    """Fill the factors as published: uniform in +-1/sqrt(n*r/P) and +-1/sqrt(m*r/P)."""
    for factor in (A, B):
        nn.init.uniform_(factor, -1, 1).div_(math.sqrt(factor.numel() / spec.groups))
    theta.copy_(torch.tensor(spec.initial_theta(scale)))


@torch.no_grad()
def draw_identity(A: Tensor, B: Tensor, theta: Tensor, spec: Spec, scale: float, seed: int = 0) -> Start | None:
    """Fill the factors so that the layer starts as its base layer, to the bit, and has a gradient.

    Without competition and with a dot product, B is 0, as LoRA starts: dW is 0 and trains. Elsewhere no such factors
    exist. With competition an entry of dW is 0 if its gate is 0, and its gradient is multiplied by the same gate. A
    distance of 0 has a gradient of 0. There the layer subtracts the update that it starts with.

    Returns:
        What the layer has to subtract, if anything.
    """
    start = identity_start(len(B), A, spec, scale, seed)
    if start is None:
        draw(A, B, theta, spec, scale)
        B.zero_()
    else:
        for tensor, constant in zip((A, B, theta), start.update[:3], strict=True):
            tensor.copy_(constant)
    return start


def check_seed(seed: int, name: str = "init_seed") -> None:
    """Check a seed that is saved.

    Raises:
        TypeError, ValueError: it is no int, or not in [0, 2^53), where JSON and float64 are exact.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an int; got {seed!r} ({type(seed).__name__})")
    if not 0 <= seed < 2**53:
        raise ValueError(f"{name} must lie in [0, 2^53); got {seed}")


@dataclass(frozen=True, eq=False)
class Start:
    """The constant update that an identity start subtracts from a layer's own.

    It is drawn from the layer's settings and never saved. The device, the dtype, the process and the release of PyTorch
    change no bit of its factors. Layers of one shape and one seed share it, and its threshold.
    """

    update: Update
    scale: float
    seed: int
    elsewhere: dict[tuple, Start] = field(default_factory=dict, repr=False)

    def like(self, A: Tensor) -> Start:
        """The same with A's device and dtype. FSDP moves a layer's parameters without telling the layer."""
        kept, place = self.update.A, (A.device, A.dtype)
        if (kept.device, kept.dtype) == place:
            return self
        if place not in self.elsewhere:
            start = identity_start(len(self.update.B), A, self.update.spec, self.scale, self.seed)
            assert start is not None  # it was before
            self.elsewhere[place] = start
        return self.elsewhere[place]


@torch.no_grad()
def identity_start(m: int, A: Tensor, spec: Spec, scale: float, seed: int) -> Start | None:
    """What a layer with ``A [n, r]`` and m rows has to subtract to start as its base; None if B starts at 0 instead."""
    if not spec.sparsity and spec.function.statistic == "dot":
        return None
    key = m, len(A), spec.applied, scale, seed, A.device, A.dtype, backends.of(A).name
    start = _starts.get(key)
    if start is None:
        A0, B0, theta = (t.to(A.device, A.dtype) for t in _from_seed(len(A), m, spec, scale, seed))
        _starts[key] = start = Start(functional.update(A0, B0, theta, spec), scale, seed)
    return start


#: Starts that a layer holds, by all that decides their bits.
_starts: WeakValueDictionary[tuple, Start] = WeakValueDictionary()


def _from_seed(n: int, m: int, spec: Spec, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and theta as :func:`draw` draws them, but float32 on the CPU, with bits that the arguments alone decide."""
    both = counter.uniform((n + m) * spec.rank, seed).view(n + m, spec.rank)
    A, B = (factor.div_(math.sqrt(factor.numel() / spec.groups)) for factor in (both[:n], both[n:]))
    return A, B, torch.tensor(spec.initial_theta(scale), dtype=torch.float32, device="cpu")


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


@cache
@torch.no_grad()
def size_at_start(m: int, n: int, spec: Spec, sparsity: float) -> float:
    """A magnitude that about this share of a fresh ``[m, n]`` update's \\|K\\| do not exceed, at a scale of 1.

    It is the quantile of 256 x 256 entries drawn as :func:`draw` draws, from the same numbers for every shape, rounded
    to 11 bits so that it is the same on every machine. The part of K that is a softmax over all rows is left out.
    """
    spec = replace(spec, kernel=spec.function.softmax_of or spec.kernel)
    A, B = counter.uniform(2 * _SAMPLE * spec.rank, seed=0).double().view(2, _SAMPLE, spec.rank)
    A, B = (factor / math.sqrt(length * spec.rank / spec.groups) for factor, length in ((A, n), (B, m)))
    K = _sampled(A, B, A.new_tensor(spec.initial_theta(1.0)), spec)
    mantissa, exponent = math.frexp(K.abs().flatten().kthvalue(max(math.ceil(sparsity * K.numel()), 1)).values.item())
    return math.ldexp(round(mantissa * 2**11), exponent - 11)


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
