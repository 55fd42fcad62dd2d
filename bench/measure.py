"""Time, peak memory and saved bytes of a step, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]

_STATUS = Path("/proc/self/status")


def seconds_of(step: Step, device: str) -> float:
    """One call's seconds: events on a GPU, the clock on a CPU."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def interleaved(steps: Sequence[Step], device: str, repetitions: int, tick: Callable[[], object]) -> list[list[float]]:
    """Seconds of each step's repetitions. The steps take turns, so that the machine's moods hit all alike."""
    for step in steps:
        step()
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repetitions):
        for step, taken in zip(steps, seconds, strict=True):
            taken.append(seconds_of(step, device))
        tick()
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over repetitions of the ratio within a repetition: both sides saw the same machine."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def _status_kib(field: str) -> int:
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
        return None
    # Free memory that the C library holds back would be used again without showing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - resident) * 1024


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, those of ``held`` left out."""
    left_out = {t.untyped_storage().data_ptr() for t in held}
    # Holding the tensors keeps an address from being given out twice.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del out
    return sum(size for address, size in sizes.items() if address not in left_out)
