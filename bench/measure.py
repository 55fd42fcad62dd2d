"""Time, peak memory and saved bytes of a step, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]

#: See :func:`is_slow`.
SLOW = 3

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
    return take_turns(steps, device, [repetitions] * len(steps), tick)


def take_turns(
    steps: Sequence[Step], device: str, repetitions: Sequence[int], tick: Callable[[], object]
) -> list[list[float]]:
    """Seconds of each step's repetitions, in rounds; one with fewer repetitions than others sits the last rounds out.

    Every step has run before.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(max(repetitions)):
        for step, taken, count in zip(steps, seconds, repetitions, strict=True):
            if turn < count:
                taken.append(seconds_of(step, device))
        tick()
    return seconds


def is_slow(seconds: Sequence[float]) -> list[bool]:
    """Which steps take so much longer than the middle one that equal turns would be spent on them alone."""
    return [taken > SLOW * statistics.median(seconds) for taken in seconds]


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median ratio within a round, over the rounds of :func:`take_turns` that both were in: both sides saw the
    same machine."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=False))


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
        return None
    # Free memory that the C library holds back would be used again without showing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resident = status_kib("VmRSS")
    step()
    return (status_kib("VmHWM") - resident) * 1024


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within, the C library returns what is freed to the system at once, so that the resident set shows what is in
    use and not what blocks of earlier sizes left between them. Slow: not where time is measured."""
    if not _STATUS.exists():
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 2**16)
    try:
        yield
    finally:
        # Where glibc's own adjustment ends in a process that frees large blocks; a call of mallopt switches it off.
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


def saved_bytes(forward: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, those of ``held`` left out."""
    left_out = {t.untyped_storage().data_ptr() for t in held}
    # Holding the tensors keeps an address from being given out twice.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # A sparse tensor has no storage of its own.
        saved.extend([tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor.detach()])
        # Detached, since an output kept by its own node would keep that node, and so all that the pass has saved.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del out
    return sum(size for address, size in sizes.items() if address not in left_out)
