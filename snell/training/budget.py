"""SNELLA's budgets: layers compete for the entries that they keep, while they train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from snell.peft import AdaptedLinear
from snell.training.allocation import BudgetSchedule, water_fill

__all__ = ["SparsityBudget"]

#: ``importance(layer, adapter) ->`` a score, not negative.
Importance = Callable[[AdaptedLinear, str], float]


class _Layer(NamedTuple):
    name: str
    layer: AdaptedLinear
    factors: tuple[nn.Parameter, nn.Parameter]

    @property
    def size(self) -> int:
        return self.layer.in_features * self.layer.out_features


class SparsityBudget:
    """Divides a total number of kept entries among the SNELL layers of a model, by their importance.

    Call :meth:`update_and_allocate` after each ``optimizer.step()`` while gradients are still there, as for PEFT's
    AdaLoRA. An adapter is saved with its sparsities and evaluates with them.

    Args:
        model: with a SNELL adapter that trains.
        schedule: a :class:`BudgetSchedule`. Its ``initial`` sparsity is set at once.
        importance: ``"sensitivity"``: \\|Q dQ\\| of each factor's entry, its running mean E and the running mean U of
            its distance from E; a layer's score is mean(E U) of A plus that of B. ``"magnitude"``: \\|Q\\| in the
            place of \\|Q dQ\\|. Or a callable ``(layer, adapter) ->`` a score.
        beta1, beta2: decay of E and of U.
        adapter_name: of the adapter.

    Attributes:
        history: sparsities by layer name after each allocation, with its step.

    A layer that is given all its entries keeps all but one: with none zeroed, the gate would not apply. E and U take
    as much memory as AdamW's state of the factors. Entries whose gradient is not finite count as 0.

    Raises:
        ValueError, TypeError: an argument out of its range, by name.

    Source: arXiv 2510.24037 and its code, whose sums miss the total by some entries and whose averages an infinite
    gradient ends.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: BudgetSchedule,
        *,
        importance: str | Importance = "sensitivity",
        beta1: float = 0.85,
        beta2: float = 0.85,
        adapter_name: str = "default",
    ) -> None:
        if not isinstance(schedule, BudgetSchedule):
            raise TypeError(f"schedule must be a BudgetSchedule; got {type(schedule).__name__}")
        if not callable(importance) and importance not in ("sensitivity", "magnitude"):
            raise ValueError(f"importance must be sensitivity, magnitude or a callable; got {importance!r}")
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < 1:
                raise ValueError(f"{name} must be a number in [0, 1); got {beta!r}")
        self.schedule, self.importance, self.betas, self.adapter = schedule, importance, (beta1, beta2), adapter_name
        self.layers = list(_trained(model, adapter_name))
        if any(adapter_name in layer.layer.snell_competition for layer in self.layers):
            raise ValueError(f"adapter {adapter_name!r} must not have competition='model': its layers compete already")
        if not self.layers:
            raise ValueError(f"model must have a SNELL adapter {adapter_name!r} that is trained")
        self.history: list[tuple[int, dict[str, float]]] = []
        factors = [_local(p) for layer in self.layers for p in layer.factors]
        self._means = [torch.zeros_like(p) for p in factors] if not callable(importance) else []
        self._spreads = [torch.zeros_like(mean) for mean in self._means]
        self._set(0, [1.0] * len(self.layers))

    @property
    def entries(self) -> int:
        """Entries of all layers."""
        return sum(layer.size for layer in self.layers)

    def update_and_allocate(self, step: int) -> bool:
        """:meth:`update`, and :meth:`allocate`: once an optimizer step.

        Args:
            step: of the training, from 1.

        Returns:
            Whether sparsities were set.
        """
        self.update()
        return self.allocate(step)

    def allocate(self, step: int) -> bool:
        """Divide the total anew, where the schedule says so. Returns whether it did."""
        if not self.schedule.allocates(step):
            return False
        self._set(step, self.scores())
        return True

    @torch.no_grad()
    def update(self) -> None:
        """Take the gradients that the factors have into account."""
        if not self._means:
            return
        factors = [p for layer in self.layers for p in layer.factors]
        values = [_local(p) for p in factors]
        if self.importance == "sensitivity":
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in factors]
            # An embedding may have sparse gradients.
            now = torch._foreach_mul(values, [_local(grad).to_dense() for grad in grads])
            torch._foreach_abs_(now)
            for one in now:
                one.nan_to_num_(0.0, 0.0, 0.0)
        else:
            now = torch._foreach_abs(values)
        beta1, beta2 = self.betas
        torch._foreach_lerp_(self._means, now, 1 - beta1)
        torch._foreach_sub_(now, self._means)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(self._spreads, now, 1 - beta2)

    @torch.no_grad()
    def scores(self) -> list[float]:
        """Each layer's importance at present, the same on every process."""
        if callable(self.importance):
            return [float(self.importance(layer.layer, self.adapter)) for layer in self.layers]
        products = torch._foreach_mul(self._means, self._spreads)
        sums = torch.stack([product.sum(dtype=torch.float64) for product in products])
        counts = torch.tensor([product.numel() for product in products], dtype=torch.float64, device=sums.device)
        first = self.layers[0].factors[0]
        if hasattr(first, "device_mesh"):
            both = torch.stack([sums, counts])
            dist.all_reduce(both, group=first.device_mesh.get_group())
            sums, counts = both
        means = (sums / counts).view(-1, 2).sum(1)
        return means.nan_to_num(0.0, 0.0, 0.0).tolist()

    def _set(self, step: int, scores: Sequence[float]) -> None:
        sizes = [layer.size - 1 for layer in self.layers]  # one entry is zeroed in any case
        total = min(self.schedule.kept(step, self.entries), sum(sizes))
        kept = water_fill(total, scores if step else [float(size) for size in sizes], sizes)
        found = {}
        for layer, entries in zip(self.layers, kept, strict=True):
            # Half an entry less than the number, so that rounding up gives it whatever the division rounds to.
            found[layer.name] = (layer.size - entries - 0.5) / layer.size
            layer.layer.set_sparsity(self.adapter, found[layer.name])
        self.history.append((step, found))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs, for ``torch.save``."""
        averages = {"means": self._means, "spreads": self._spreads}
        sparsities = {layer.name: layer.layer.snell_spec[self.adapter].sparsity for layer in self.layers}
        return {**averages, "sparsities": sparsities, "history": list(self.history)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the training that :meth:`state_dict` is of.

        Raises:
            ValueError: the state is of other layers.
        """
        if list(state["sparsities"]) != [layer.name for layer in self.layers]:
            raise ValueError("state must be of the same layers: theirs and the model's differ")
        for own, saved in ((self._means, state["means"]), (self._spreads, state["spreads"])):
            for one, other in zip(own, saved, strict=True):
                one.copy_(other)
        for layer, sparsity in zip(self.layers, state["sparsities"].values(), strict=True):
            layer.layer.set_sparsity(self.adapter, sparsity)
        self.history = list(state["history"])


def _trained(model: nn.Module, adapter: str) -> Iterator[_Layer]:
    for name, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear) and adapter in layer.adapter_names:
            modules: list[Any] = [layer.snell_A[adapter], layer.snell_B[adapter]]
            factors = modules[0].weight, modules[1].weight
            if all(factor.requires_grad for factor in factors):
                yield _Layer(name, layer, factors)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
