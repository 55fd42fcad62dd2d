"""``SnellLinear``: an ``nn.Linear`` with a frozen weight and a trainable sparse low-rank update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from snell import functional
from snell.initial import (
    Start,
    check_seed,
    draw,
    draw_identity,
    identity_start,
    relative_size,
    warn_if_dead,
    warn_if_large,
)
from snell.merging import Merged, row_blocks
from snell.precision import factor_dtype, keep_precision
from snell.spec import Spec
from snell.update import Parameters, Update

__all__ = ["SnellLinear"]


class SnellLinear(nn.Module):
    """Drop-in for :class:`torch.nn.Linear`: ``y = x (W0 + dW)^T + bias``, W0 and bias frozen.

    ``dW = K * gate(|K|)`` with ``K_ij = kappa(B_i, A_j)``; the ``sparsity`` share of entries with the
    smallest \\|K\\| is zero. dW is rebuilt block by block in every pass and never kept.

    Args:
        in_features, out_features: n and m.
        bias: whether the layer has a (frozen) bias.
        rank: columns r of the factors; a multiple of ``groups``.
        sparsity: share of the entries of dW that are zero, in [0, 1); at 0 dW = K.
        kernel: kernel function: ``piecewise_linear``, ``linear``, ``sigmoid``, ``rbf`` or ``mixture``.
        groups: groups P that the rank axis splits into (the paper uses 2).
        gate: ``soft`` (the paper's), ``magnitude`` (the published code's) or ``hard`` (top-k).
        scale: size of the kernel function's scalar parameters at the start; by default as the gate says: 3 for
            ``soft`` and ``magnitude``, 0.1 for ``hard`` and without sparsity (``spec.DEFAULT_SCALES``).
        train_theta: whether those are trained; by default as the kernel function says.
        init_weights: True: factors drawn as published; dW is small, but not 0. ``"identity"``: the layer starts as
            its base, to the bit, and trains: it subtracts the constant dW of its first factors, which are drawn from
            ``init_seed`` again when a state dict is loaded. Up to 2 (1 - s) m n entries of the weight then change.
            (With ``sparsity=0`` and a dot product B starts at 0 instead, as in LoRA.)
        init_seed: what an identity start draws its factors from, in place of PyTorch's generator.
        device, dtype: of weight and bias. The factors are float32, or float64 where dtype is.

    Attributes:
        weight: ``[m, n]`` frozen.  bias: ``[m]`` frozen, or None.
        snell_A: ``[n, r]``.  snell_B: ``[m, r]``.  snell_theta: ``[t]``, empty for ``linear``.

    Raises:
        ValueError, TypeError: settings that do not fit, naming the argument.

    Source: arXiv 2411.01800.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 32,
        sparsity: float = 0.9,
        kernel: str = "piecewise_linear",
        groups: int = 2,
        gate: str = "soft",
        scale: float | None = None,
        train_theta: bool | None = None,
        init_weights: bool | str = True,
        init_seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1; got {size!r}")
        if dtype is not None and dtype not in functional.WEIGHT_DTYPES:
            raise TypeError(f"dtype must be one of {functional.WEIGHT_DTYPES}; got {dtype}")
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        spec = Spec(rank, sparsity, kernel, groups, gate)
        self._build(base.weight, base.bias, spec, scale, train_theta, init_weights, init_seed)

    def _build(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spec: Spec,
        scale: float | None,
        train_theta: bool | None,
        init_weights: bool | str,
        init_seed: int,
    ) -> None:
        super().__init__()
        if init_weights not in (True, "identity"):
            raise ValueError(f"init_weights must be True or 'identity'; got {init_weights!r}")
        check_seed(init_seed)
        self.out_features, self.in_features = weight.shape
        self.spec, self.scale = spec, spec.default_scale if scale is None else scale
        self.weight = weight.requires_grad_(False)
        self.bias = None if bias is None else bias.requires_grad_(False)
        options: dict[str, Any] = {"device": weight.device, "dtype": factor_dtype(weight.dtype)}
        if train_theta is None:
            train_theta = spec.function.trains_theta
        theta = spec.initial_theta(self.scale)
        self.snell_A = nn.Parameter(torch.empty(self.in_features, spec.rank, **options))
        self.snell_B = nn.Parameter(torch.empty(self.out_features, spec.rank, **options))
        self.snell_theta = nn.Parameter(torch.empty(len(theta), **options), requires_grad=train_theta)
        self._merged: Merged | None = None
        self.init_weights, self.init_seed = init_weights, init_seed
        self.snell_start: Start | None = None
        self.reset_update()
        warn_if_dead(spec, self.out_features, self.in_features, type(self).__name__)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int = 32,
        sparsity: float = 0.9,
        kernel: str = "piecewise_linear",
        groups: int = 2,
        gate: str = "soft",
        scale: float | None = None,
        train_theta: bool | None = None,
        init_weights: bool | str = True,
        init_seed: int = 0,
    ) -> SnellLinear:
        """A layer around ``linear``'s own weight and bias, which it shares and freezes.

        Raises:
            TypeError: ``linear`` is no nn.Linear, or its weight is no float matrix (quantised).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}")
        # By its type, not its dtype: a quantised tensor names the dtype it stands for.
        if type(linear.weight) is not nn.Parameter or linear.weight.dtype not in functional.WEIGHT_DTYPES:
            got = f"{type(linear.weight).__name__} of {linear.weight.dtype}"
            raise TypeError(f"linear must hold a plain floating-point weight; got {got}")
        layer = cls.__new__(cls)
        spec = Spec(rank, sparsity, kernel, groups, gate)
        layer._build(linear.weight, linear.bias, spec, scale, train_theta, init_weights, init_seed)
        if not layer.weight.is_meta and init_weights is True:
            size = relative_size(layer.snell_A, layer.snell_B, layer.snell_theta, layer.spec, layer.weight)
            warn_if_large({cls.__name__: size}, layer.scale)
        return layer.train(linear.training)

    def reset_update(self) -> None:
        """Draw the factors anew, as published: uniform in +-1/sqrt(n*r/P) and +-1/sqrt(m*r/P)."""
        factors = self.snell_A, self.snell_B, self.snell_theta
        if self.init_weights == "identity":
            self.snell_start = draw_identity(*factors, self.spec, self.scale, self.init_seed)
        else:
            draw(*factors, self.spec, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        if self._merged is not None:
            return nn.functional.linear(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias, self._update())

    def threshold(self) -> Tensor:
        """tau: what an entry's \\|K\\| must exceed to survive. 0-dim, of the factors' dtype and device."""
        return self._update().tau

    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense dW ``[m, n]``, less that of an identity start; differentiable. In the factors' dtype by default."""
        delta = functional.dense(self._update())
        return delta if dtype is None else delta.to(dtype)

    @torch.no_grad()
    def num_survivors(self) -> int:
        """How many entries of the weight dW changes, counted block by block from what merge writes."""
        update = self._update()
        return sum(int(functional.dense(update, rows).count_nonzero()) for rows in row_blocks(update))

    def snell_parameters(self) -> Iterator[Parameters]:
        """A, B, theta and the make-up of the layer's update, for what works on all updates of a model."""
        yield self.snell_A, self.snell_B, self.snell_theta, self.spec

    @property
    def merged(self) -> bool:
        """Whether ``weight`` holds W0 + dW at present."""
        return self._merged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Add dW into ``weight`` in place; the layer then costs what an nn.Linear does.

        Until :meth:`unmerge` the layer keeps a copy of the factors and the base weights that dW changes:
        (1 - s) * m * n numbers, up to twice as many with an identity start. An interrupt leaves the weight as it was,
        or merged; :attr:`merged` tells.
        """
        if self._merged is not None:
            return
        record = Merged.of(self._update())
        try:
            self._merged = record
            record.put_in(self.weight)
        except BaseException:  # KeyboardInterrupt too: undo
            record.take_out(self.weight)
            self._merged = None
            raise

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        record = self._merged
        if record is None:
            return
        try:
            record.take_out(self.weight)
            self._merged = None
        except BaseException:  # KeyboardInterrupt too: finish
            record.take_out(self.weight)
            self._merged = None
            raise

    def to_linear(self) -> nn.Linear:
        """An ordinary nn.Linear with weight W0 + dW (a copy) and the bias."""
        options: dict[str, Any] = {"device": "meta", "dtype": self.weight.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)
        with torch.no_grad():
            weight = self.weight.clone() if self.merged else functional.dense(self._update(), weight=self.weight)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rank={spec.rank}, sparsity={spec.sparsity}, kernel={spec.kernel!r}, groups={spec.groups}, "
            f"gate={spec.gate!r}{', merged' if self.merged else ''}"
        )

    def _update(self) -> Update:
        start = None if self.snell_start is None else self.snell_start.like(self.snell_A).update
        return functional.update(self.snell_A, self.snell_B, self.snell_theta, self.spec, start)

    @torch.no_grad()
    def _base_weight(self) -> Tensor:
        """W0, also while ``weight`` holds W0 + dW."""
        if self._merged is None:
            return self.weight
        base = self.weight.detach().clone()
        self._merged.take_out(base)
        return base

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A state dict always holds W0: with W0 + dW in it, loading would add the update twice.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self._base_weight()
        if self.snell_start is not None:
            # What draws it again: with another start the same factors are another update.
            start = [self.snell_start.seed, self.snell_start.scale]
            destination[prefix + "snell_start"] = torch.tensor(start, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.unmerge()
        if self.snell_start is not None:
            start = state_dict.pop(prefix + "snell_start", None)
            if start is None:
                args[2].append(prefix + "snell_start")  # missing keys
            else:
                seed, self.scale = start.tolist()
                self.init_seed = int(seed)
                self.snell_start = identity_start(
                    self.out_features, self.snell_A, self.spec, self.scale, self.init_seed
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SnellLinear:
        # Another device or dtype may decide survivors by other bits, so a merged update comes out first.
        merged = self.merged
        self.unmerge()
        update = (self.snell_A, self.snell_B, self.snell_theta)
        factors = {id(t) for factor in update for t in (factor, factor.grad) if t is not None}
        super()._apply(lambda t: keep_precision(t, fn(t)) if id(t) in factors else fn(t), recurse)
        if self.snell_start is not None:
            self.snell_start = self.snell_start.like(self.snell_A)
        if merged:
            self.merge()
        return self
