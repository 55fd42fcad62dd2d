"""What a model under training holds, in bytes, and a count of what torch allocates during a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from snell.bench.measure import extra_peak_bytes, freed_memory_given_back


def size(count: float) -> str:
    """Bytes for a reader."""
    if count < 2**10:
        return f"{count:.0f} B"
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def num_trained(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in trained(model))


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what PEFT's layers keep in plain dictionaries, as SHiRA its indices; some twice."""
    # A module's parameters and buffers lie in dictionaries too.
    for module in model.modules():
        for kept in vars(module).values():
            if isinstance(kept, dict):
                yield from (value for value in kept.values() if isinstance(value, Tensor))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that an optimizer has gathered so far."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def start(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with its state allocated, as after a first step, by a step with gradients of zero."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def counted_peak_bytes(step: Callable[[], object]) -> int:
    """Peak over a call of what torch's CPU allocator has given out since its beginning: on a CPU what
    ``torch.cuda.max_memory_allocated`` is on a GPU. Neither libraries' own scratch is seen, nor that the call frees
    what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def step_peaks(step: Callable[[], object], device: str) -> dict[str, int | None]:
    """Peak memory of a call over what was held before it: as torch's allocator counts, and by the resident set.

    The resident set also shows the scratch of libraries; None on a GPU and where it cannot be read.
    """
    if device == "cuda":
        return {"extra_peak_bytes": extra_peak_bytes(step, device), "resident_extra_peak_bytes": None}
    counts: list[int] = []
    with freed_memory_given_back():
        resident = extra_peak_bytes(lambda: counts.append(counted_peak_bytes(step)), device)
    return {"extra_peak_bytes": counts[0], "resident_extra_peak_bytes": resident}
