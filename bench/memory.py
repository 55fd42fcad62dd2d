"""What a model under training holds, in bytes, and the peak of a step."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from snell.bench.clock import Step

#: Linux alone has it.
_STATUS = Path("/proc/self/status")

#: Parameters of mallopt, in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


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


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum(storages(tensors).values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that an optimizer has gathered so far."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def adamw(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW for what is trained, its state allocated as after a first step, by a step with gradients of zero."""
    optimizer = torch.optim.AdamW(trained(model), lr=rate)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, those of ``held`` left out."""
    left_out = storages(held)
    # Holding the tensors keeps an address from being given out twice.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # A sparse tensor has no storage of its own.
        saved.extend([tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor.detach()])
        # Detached, since an output kept by its own node would keep that node, and so all that the pass has saved.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    sizes = storages(saved)
    del out
    return sum(size for address, size in sizes.items() if address not in left_out)


def status_kib(field: str) -> int:
    """A field of this process's status in KiB, such as ``VmRSS``, the resident set; Linux alone has it."""
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field))


def extra_peak_bytes(step: Step, device: str) -> int | None:
    """Peak memory of one call over what was held before it, outputs and gradients included.

    On a GPU by the allocator's count. On a CPU by the resident set, whose high-water mark Linux lets a process
    reset; None elsewhere.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _STATUS.exists():
        step()
        return None
    # Free memory that the C library holds back would be used again without showing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = status_kib("VmRSS")
    step()
    return (status_kib("VmHWM") - resident) * 1024


def give_back_freed_memory() -> None:
    """From now on the C library returns freed blocks of 64 KiB and more to the system at once, so that the resident set
    shows what is in use and not what blocks of earlier sizes left between them. Slow: not where time is measured."""
    if _STATUS.exists():
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """:func:`give_back_freed_memory` within the context."""
    give_back_freed_memory()
    try:
        yield
    finally:
        if _STATUS.exists():
            # Where glibc's own adjustment ends in a process that frees large blocks; calling mallopt switched it off.
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**25)
            ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, 2**26)


def counted_peak_bytes(step: Step) -> int:
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


def step_peaks(step: Step, device: str) -> dict[str, int | None]:
    """Peak memory of a call over what was held before it: as torch's allocator counts, and by the resident set.

    The resident set also shows the scratch of libraries; None on a GPU and where it cannot be read.
    """
    if device == "cuda":
        return {"extra_peak_bytes": extra_peak_bytes(step, device), "resident_extra_peak_bytes": None}
    counts: list[int] = []
    with freed_memory_given_back():
        resident = extra_peak_bytes(lambda: counts.append(counted_peak_bytes(step)), device)
    return {"extra_peak_bytes": counts[0], "resident_extra_peak_bytes": resident}
