"""Random updates for property tests: shapes, ranks, groups, sparsities, strides and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from snell import functional
from snell.kernel_functions import KERNEL_FUNCTIONS
from snell.spec import GATES, Spec
from snell.update import Update

#: Those where K_ij depends on B_i and A_j alone; tests/test_mixture.py has the one with a softmax.
KERNELS = tuple(name for name, function in KERNEL_FUNCTIONS.items() if function.softmax_of is None)
GATES_THAT_COMPETE = ("soft", "magnitude", "hard")
FACTOR_DTYPES = (torch.float32, torch.float64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "rows", "transposed", "both")

SPARSITIES = st.one_of(st.sampled_from([0.0, 0.01, 0.5, 0.9, 0.99, 0.999]), st.floats(0, 1, exclude_max=True))


@dataclass(frozen=True)
class Drawn:
    """One drawn update; a seed stands for its numbers, so that a failure prints short."""

    m: int
    n: int
    groups: int
    per_group: int
    kernel: str
    gate: str
    sparsity: float
    dtype: torch.dtype
    scale: float
    seed: int

    @property
    def settings(self) -> dict:
        return {"kernel": self.kernel, "groups": self.groups}

    @property
    def rank(self) -> int:
        return self.groups * self.per_group

    def generator(self) -> torch.Generator:
        return torch.Generator(torch.get_default_device()).manual_seed(self.seed)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = self.generator()
        A = torch.randn(self.n, self.rank, generator=rng, dtype=self.dtype) * self.scale
        B = torch.randn(self.m, self.rank, generator=rng, dtype=self.dtype) * self.scale
        theta = self.spec.initial_theta(0.1)
        noise = 1 + 0.3 * torch.rand(len(theta), generator=rng, dtype=self.dtype)
        return A, B, torch.tensor(theta, dtype=self.dtype) * noise

    @property
    def spec(self) -> Spec:
        return Spec(self.rank, self.sparsity, self.kernel, self.groups, self.gate)

    def update(self) -> Update:
        return functional.update(*self.factors(), self.spec)


def cases(small: bool, gates: tuple[str, ...] = GATES) -> st.SearchStrategy[Drawn]:
    """Updates with odd and tiny shapes; larger than one tile of any backend unless ``small``."""
    longest = 40 if small else 150
    return st.builds(
        Drawn,
        m=st.integers(1, longest),
        n=st.integers(1, longest),
        groups=st.integers(1, 3),
        per_group=st.integers(1, 4 if small else 12),
        kernel=st.sampled_from(KERNELS),
        gate=st.sampled_from(gates),
        sparsity=SPARSITIES,
        dtype=st.sampled_from(FACTOR_DTYPES),
        scale=st.sampled_from([0.03, 0.3, 1.0]),
        seed=st.integers(0, 2**32),
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A matrix of the same values with other strides; what lies between them is NaN."""
    rows, cols = values.shape
    if layout == "contiguous":
        return values.clone()
    if layout == "transposed":
        return values.t().contiguous().t()
    padding = (rows * 2, cols * 2) if layout == "both" else (rows, cols + 3)
    room = values.new_full(padding, float("nan"))
    view = room[::2, ::2] if layout == "both" else room[:, 1 : cols + 1]
    view.copy_(values)
    return view
