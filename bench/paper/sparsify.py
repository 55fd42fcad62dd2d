"""Table 5 of the paper on real data: which matrix is worth sparsifying, and what its rank does.

    snell bench sparsify

The demonstration's small vision transformer moves from upright digits to turned, inverted and noisy ones (see
``snell demo``). The update of every linear layer is a trainable full-rank matrix, LoRA's merge or the kernelised one,
each with a competition for one entry in ten and without, and both merges at several ranks. Each picks its learning
rate by the validation images over some draws of labels; other draws, the same for all, are judged on the test images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snell import SnellLinear, reference
from snell.bench import digits
from snell.bench.contenders import replaced
from snell.bench.digits import Transfer, linear_probe
from snell.bench.memory import num_trained
from snell.bench.paper.sparsify_report import draw, report
from snell.bench.protocol import judged
from snell.kernel_functions import KERNEL_FUNCTIONS

__all__ = ["draw", "measure", "report"]

#: Learning rates to choose from: half decades around what a first look, with other draws, found best.
RATES = {
    "none": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "full-rank": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "straight-through": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "linear": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "piecewise_linear": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
#: Where losers never move, survivors have further to go; the kernelised merge has another scale where it competes.
COMPETING_RATES = {
    ("full-rank", "hard"): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("piecewise_linear", "hard"): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ("piecewise_linear", "soft"): (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
#: Scales of the kernelised merge where it competes: those at which LoRA's rates train it (``snell bench gates``).
COMPETING_SCALES = {"hard": 1.0, "soft": 3.0}


class DenseUpdate(nn.Module):
    """A frozen linear layer plus a trainable matrix dW of its size, whose largest entries survive (the hard gate).

    Args:
        linear: the layer; its weight ``[m, n]`` and bias are shared and frozen.
        sparsity: share of dW's entries that are zero, in [0, 1).
        straight_through: whether losers get the gradient of their entry too, as if they had survived. Otherwise the
            gate counts as a constant, as in SNELL; but where factors are shared by a row, losers here never move.
    """

    #: Standard deviation of the matrix at the start. It cannot be 0: entries that tie with the threshold lose.
    START = 1e-3

    def __init__(self, linear: nn.Linear, *, sparsity: float, straight_through: bool = False) -> None:
        super().__init__()
        self.base, self.sparsity, self.straight_through = linear.requires_grad_(False), sparsity, straight_through
        self.update = nn.Parameter(self.START * torch.randn_like(linear.weight))

    def delta_weight(self) -> Tensor:
        """Dense dW ``[m, n]``, losers zero."""
        losers = math.ceil(self.sparsity * self.update.numel())
        if not losers:
            return self.update
        tau = self.update.detach().abs().flatten().kthvalue(losers).values
        survivors = self.update * reference.gate_values(self.update, tau, gate="hard")
        return self.update + (survivors - self.update).detach() if self.straight_through else survivors

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n] -> [..., m]``."""
        return nn.functional.linear(x, self.base.weight + self.delta_weight(), self.base.bias)


@dataclass(frozen=True)
class Settings:
    """``choosing`` and ``judging`` are how many draws of labels serve either."""

    steps: int = 120
    pretraining_steps: int = 700
    choosing: int = 4
    judging: int = 12
    ranks: tuple[int, ...] = (8, 16, 32)
    sparsity: float = 0.9


class Contender(NamedTuple):
    """``matrix``: a key of :data:`RATES`; a full-rank matrix has rank None."""

    matrix: str
    rank: int | None = None
    sparsity: float = 0.0
    gate: str = "hard"

    def layer(self, linear: nn.Linear) -> nn.Module:
        """``linear`` with this update."""
        if self.rank is None:
            return DenseUpdate(linear, sparsity=self.sparsity, straight_through=self.matrix == "straight-through")
        groups = 2 if KERNEL_FUNCTIONS[self.matrix].grouped else 1
        spec = {"rank": self.rank, "sparsity": self.sparsity, "kernel": self.matrix, "groups": groups}
        scale = COMPETING_SCALES[self.gate] if self.sparsity else None
        return SnellLinear.from_linear(linear, **spec, gate=self.gate, scale=scale)

    def build(self, pretrained: nn.Module) -> nn.Module:
        """The pre-trained network, frozen, with this update in every linear layer and a new head."""
        model = linear_probe(pretrained)
        return model if self.matrix == "none" else replaced(model, self.layer)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from."""
        rates = RATES[self.matrix]
        return COMPETING_RATES.get((self.matrix, self.gate), rates) if self.sparsity else rates


def contenders(settings: Settings, rank: int = 8) -> list[Contender]:
    """Every row of both tables; ``rank`` is that of the first, where the paper's own gate runs too."""
    sparse = settings.sparsity
    dense = [Contender("none"), Contender("full-rank"), Contender("full-rank", None, sparse)]
    dense.append(Contender("straight-through", None, sparse))
    merges = ("linear", "piecewise_linear")
    ranked = [Contender(merge, r, s) for merge in merges for r in settings.ranks for s in (0.0, sparse)]
    return [*dense, *ranked, Contender("piecewise_linear", rank, sparse, "soft")]


def measure(settings: Settings | None = None, chosen: Sequence[Contender] | None = None) -> dict[str, Any]:
    """Every contender's row, of one pre-trained network."""
    settings = settings or Settings()
    chosen = chosen or contenders(settings)
    judging = range(settings.judging)
    choosing = range(settings.judging, settings.judging + settings.choosing)
    tunings = sum(settings.choosing * len(contender.rates) + settings.judging for contender in chosen)
    shared = digits.Settings(pretraining_steps=settings.pretraining_steps, steps=settings.steps)
    rows = []
    with tqdm(total=shared.pretraining_steps + settings.steps * tunings, unit="step", mininterval=1) as bar:
        transfer = Transfer(shared, bar)
        for one in chosen:
            row = judged(partial(transfer.accuracies, one.build), one.rates, choosing, judging)
            rows.append(one._asdict() | {"trainable": num_trained(one.build(transfer.pretrained))} | row)
    return {"settings": asdict(settings), "results": rows}
