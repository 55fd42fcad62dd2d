"""The host's part of select: sizes, workspace and launches. It reads nothing back from the device."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from snell import waves
from snell.kernels import count, cuda, launch, select, split
from snell.spec import Spec
from snell.update import Parameters

#: Keys of a bracket are sorted into this many bins: 2^31, 2^18, 2^5, 1 key a bin in three passes.
BINS = 8192
#: Passes over K that are launched; what they leave open, the second's last program settles alone.
PASSES = 2
#: Keys a bucket may keep: what one program sorts out in registers.
BUCKET = 2048
#: Entries sampled at most: 4 standard deviations are then 0.7 % of the ranks at s = 0.9.
SAMPLES = 32768
#: Samples, or rows of the factors, of one program of the bracket kernel: a thread's each. The last one then sorts all
#: samples with 32 a thread. It hashes this many rank columns.
BLOCK, COLUMNS = 1024, 8
#: Counting programs a layer gets for each multiprocessor: enough that layers of ragged sizes even out.
PROGRAMS = 8
#: Workspace of one call; a group of layers that needs more goes in several.
WORKSPACE_BYTES = 64 * 2**20
#: Thresholds remembered on a device; the least recently used goes first.
SLOTS = 4096


class _Plan(NamedTuple):
    """What sizes alone decide about a layer.

    Attributes:
        k: the rank of tau.
        samples: entries sampled; low, high: the order statistics of them that bracket tau (outside 1..samples: none).
        bucket: the keys a bucket holds.
    """

    m: int
    n: int
    k: int
    samples: int
    low: int
    high: int
    bucket: int


class _Memo:
    """Thresholds a device remembers: a layer's fingerprint, and half of that again above tau's bits.

    A captured graph keeps the address it saw, so it is never freed. Nothing else outlives a call.
    """

    def __init__(self, device: torch.device) -> None:
        self._slots: OrderedDict[tuple, int] = OrderedDict()
        #: Part of what fingerprints start from: another one, and nothing is remembered.
        self.generation = 0

        def allocate() -> None:
            self._held = torch.zeros(SLOTS, 2, dtype=torch.int64, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        # In a thread of its own: torch.compile's "reduce-overhead" diverts what the calling thread allocates to a
        # graph's pool, where nothing may live on.
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()

    def slot(self, key: tuple) -> Tensor:
        """The numbers remembered for ``key``; the fingerprint tells whether they are the caller's."""
        if key not in self._slots:
            free = len(self._slots) if len(self._slots) < SLOTS else self._slots.popitem(last=False)[1]
            self._slots[key] = free
        self._slots.move_to_end(key)
        return self._held[self._slots[key]]


_memos: dict[torch.device, _Memo] = {}


def _memo(device: torch.device) -> _Memo | None:
    """The device's memo; None while a graph is captured if there is none yet, as one made then would be the graph's."""
    if device not in _memos and not launch.is_capturing(device):
        _memos[device] = _Memo(device)
    return _memos.get(device)


def _plan(layer: Parameters) -> _Plan:
    A, B, _, spec = layer
    n, m = A.shape[0], B.shape[0]
    entries = m * n
    k = spec.num_zeroed(entries)
    samples = min(SAMPLES, max(256, entries // 64))
    rank = k / entries * samples
    spread = 4 * math.sqrt(rank * (1 - k / entries)) + 1
    low, high = math.floor(rank - spread), math.ceil(rank + spread)
    # Keys a bin expects, more where an octave ends in the bracket, and 8 standard deviations. A bucket that
    # would run over all the same is none.
    share = min(1.0, (high - low) / samples) * entries / BINS
    bucket = math.ceil(1.4 * share + 8 * math.sqrt(share)) + 16
    return _Plan(m, n, k, samples, low, high, bucket if bucket <= BUCKET else 0)


def _calls(plans: Sequence[_Plan], spec: Spec) -> Iterator[list[int]]:
    """Runs of layers that share launches: of one plan, and with a workspace that fits unless one alone needs more."""
    alike: dict[_Plan, list[int]] = {}
    for i, plan in enumerate(plans):
        alike.setdefault(plan, []).append(i)
    for plan, members in alike.items():
        size = 4 * ((plan.m + plan.n) * spec.rank + SAMPLES + BINS * plan.bucket) + 8 * (select.HEAD.value + BINS)
        count = max(1, WORKSPACE_BYTES // size)
        yield from (members[start : start + count] for start in range(0, len(members), count))


def select_thresholds(layers: Sequence[Parameters], smooth_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tau (float32) and fingerprint (int64) of every layer, ``[len(layers)]`` each, like layers in shared launches.

    Args:
        layers: float32 ``A [n, r]``, ``B [m, r]``, ``theta [t]`` and their make-up, of one device, rank, kernel
            function and number of groups; every sparsity lies in (0, 1).
        smooth_max: ``[n]`` of the only layer, if its kernel function has a softmax.
    """
    plans = [_plan(layer) for layer in layers]
    calls = list(_calls(plans, layers[0][3]))
    found = [_select([layers[i] for i in call], plans[call[0]], smooth_max) for call in calls]
    if len(found) == 1:
        return found[0]
    order = sorted(range(len(layers)), key=[i for call in calls for i in call].__getitem__)
    taus, fingerprints = ([one for part in parts for one in part.unbind()] for parts in zip(*found, strict=True))
    return torch.stack([taus[i] for i in order]), torch.stack([fingerprints[i] for i in order])


def _select(layers: Sequence[Parameters], plan: _Plan, smooth_max: Tensor | None) -> tuple[Tensor, Tensor]:
    """The taus of layers with one plan, and a view of their fingerprints."""
    (A, B, theta, spec), number = layers[0], len(layers)
    device, num_theta = A.device, theta.numel()
    # One layer alone may be called for again unchanged; together they are selected for once a step.
    memo = _memo(device) if number == 1 else None
    salt, slot = 0, A
    if memo is not None:
        make = (*plan, spec.rank, spec.kernel, spec.groups, split.enabled())
        salt = hash((*make, memo.generation))
        slot = memo.slot((A.data_ptr(), B.data_ptr(), theta.data_ptr(), *make))
    factors = torch.cat([t.t() for A, B, _, _ in layers for t in (A, B)], dim=1)
    theta = theta if number == 1 else torch.cat([layer[2] for layer in layers])
    taus = torch.empty(number, dtype=torch.float32, device=device)
    state = torch.zeros(number, select.HEAD.value + BINS, dtype=torch.int64, device=device)
    samples = torch.empty(number, SAMPLES, dtype=torch.int32, device=device)
    bucket = torch.empty(number * BINS * plan.bucket, dtype=torch.int32, device=device)
    halves = None
    if split.enabled():
        parts = [split.split(A, B, spec) for A, B, _, spec in layers]
        halves = torch.cat([t for of_A, of_B, _ in parts for t in (of_A, of_B)]), torch.cat([one[2] for one in parts])
    stride = factors.stride(0)
    if halves is None and cuda.serves(device, spec.kernel):
        cuda.select(
            device,
            **plan._asdict(),
            sample=samples,
            buckets=bucket,
            factors=factors,
            theta=theta,
            smooth_max=smooth_max,
            state=state,
            memo=None if memo is None else slot,
            tau=taus,
            stride=stride,
            salt=salt,
            layers=number,
            rank=spec.rank,
            groups=spec.groups,
            kernel=cuda.KERNELS.index(spec.kernel),
            num_theta=num_theta,
            room=SAMPLES,
            bins=BINS,
            programs=PROGRAMS * waves.num_processors(device),
            passes=PASSES,
        )
        return taus, state[:, select.HASH.value]
    setting = launch.meta(spec) | {"HAS_MEMO": memo is not None, "NUM_THETA": num_theta, "BINS": BINS}
    hashing = triton.cdiv(plan.m + plan.n, BLOCK) * triton.cdiv(spec.rank, COLUMNS)
    launch.run(
        select.bracket_kernel,
        (max(hashing, triton.cdiv(plan.samples, BLOCK)), number),
        (
            factors,
            theta,
            smooth_max,
            state,
            slot,
            samples,
            taus,
            stride,
            plan.m,
            plan.n,
            plan.samples,
            plan.low,
            plan.high,
            salt,
        ),
        SAMPLES=SAMPLES,
        BLOCK=BLOCK,
        COLUMNS=COLUMNS,
        num_warps=BLOCK // 32,
        **setting,
    )
    row = launch.row("select", taus, halves)
    programs = min(launch.tiles(plan.m, plan.n, row), PROGRAMS * waves.num_processors(device))
    sizes = stride, plan.m, plan.n, plan.k, plan.bucket, salt
    for count_pass in range(PASSES):
        launch.run(
            count.count_kernel,
            (programs, number),
            (factors, halves, theta, smooth_max, state, slot, bucket, taus, *sizes, int(count_pass == PASSES - 1)),
            row,
            BUCKET=BUCKET,
            BLOCK_M=row.block_m,
            BLOCK_N=row.block_n,
            **setting,
        )
    return taus, state[:, select.HASH.value]


def forget() -> None:
    """Let every device forget the thresholds it remembers, so that the next call selects anew."""
    for memo in _memos.values():
        memo.generation += 1
