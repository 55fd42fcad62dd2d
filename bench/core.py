"""All that the benchmarks use of snell below its public interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snell import SnellLinear, backends, blocks, functional, native
from snell.backends import Backend, cpu
from snell.competition import forget
from snell.initial import draw
from snell.spec import Spec
from snell.update import Activations, Gradients, Update

__all__ = ["Gradients", "Update", "draw", "forget"]


def backend(update: Update) -> Backend:
    """What runs the update's block operations."""
    return backends.of(update.A)


def block_lengths(tokens: int, m: int, n: int, element_size: int, device: str) -> tuple[int, int]:
    """Rows of the longest block of forward, columns of backward's."""
    place = tokens, m, n, element_size, torch.device(device)
    return blocks.longest(blocks.row_lengths(*place)), blocks.longest(blocks.column_lengths(*place))


def of_layer(layer: SnellLinear) -> Update:
    """The layer's update, detached."""
    A, B, theta = (t.detach() for t in (layer.snell_A, layer.snell_B, layer.snell_theta))
    return functional.update(A, B, theta, layer.spec)


def new_update(m: int, n: int, rank: int, device: str, sparsity: float = 0.9) -> Update:
    """What a SNELL layer of ``m x n`` starts with."""
    spec = Spec(rank, sparsity)
    parameters = [torch.empty(size, device=device) for size in ((n, rank), (m, rank), spec.num_theta)]
    draw(*parameters, spec, spec.default_scale)
    return functional.update(*parameters, spec)


def select(update: Update) -> Tensor:
    """tau; remembered while the factors stay as they are."""
    A, B, theta, _, spec, *_ = update
    return functional.update(A, B, theta, spec).tau


def select_together(updates: Sequence[Update]) -> Tensor:
    """tau of every update, in one sequence of launches; all have one kernel function, and none but one a softmax."""
    from snell.kernels import selection

    return selection.select_thresholds([(*update[:3], update.spec) for update in updates], updates[0].smooth_max)[0]


# How backward takes the survivors' G alone, which the CPU's backend does where that pays.


def takes_survivors(device: str) -> bool:
    """Whether the device's backend can."""
    return isinstance(backends.serving(device), cpu.CpuBackend)


def worth_taking_survivors(tokens: int, entries: int, survivors: float) -> bool:
    """Whether the CPU's backend does, in float32. It estimates the survivors from a sample; here they are given."""
    return tokens * entries >= cpu.WORTH_ASKING and survivors <= cpu.FEW_SURVIVORS * entries


num_slabs = cpu.num_slabs


#: ``grad_y [T, m]`` and ``x [T, n]`` transposed, as :func:`survivors_grad` takes them.
activations = native.activations


def survivors_grad(of: Activations, update: Update, grads: Gradients, weight: Tensor, merged: Tensor) -> None:
    """The gradients from one slab of tokens, and weight + dW in the same pass."""
    native.factor_grad(update, grads, of, weight, merged)


def kernel_calls(update: Update, dtype: torch.dtype, columns: int | None = None) -> dict[str, Callable[[], Any]]:
    """One call of every GPU kernel's host function, by its name in the launch table.

    Args:
        update: on the device that the call is for.
        dtype: of weights and activations.
        columns: of a block of G; all unless given.
    """
    from snell.backends.triton import TritonBackend
    from snell.kernels.fingerprint import verify

    triton = TritonBackend()
    update, (m, n) = triton.prepare(update), update.shape
    block = min(columns or n, n)
    weight, G, base = (torch.randn(m, width, device=update.A.device).to(dtype) for width in (n, block, block))
    x, bias, part = torch.randn(4, n, device=update.A.device).to(dtype), weight[:, 0], update.columns(slice(block))
    vector = torch.randn(n, device=update.A.device)
    grads, fingerprint = Gradients.zeros(part), torch.zeros((), dtype=torch.int64, device=update.A.device)

    def select_anew() -> Tensor:
        forget()
        return select_together([update])

    return {
        "select": select_anew,
        "verify": lambda: verify(*update[:4], fingerprint),
        "merge": lambda: triton.merge(update, weight, weight),
        "factor_grad": lambda: triton.factor_grad(G, part, grads, base, G),
        "few_tokens": lambda: triton.few_tokens(x, weight, bias, update),
        "edit": lambda: triton.edit(x, vector, vector),
        "edit_grad": lambda: triton.edit_backward(x, x, vector, (True, True, True)),
    }
