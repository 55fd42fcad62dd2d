"""The host's part of select: sizes, workspace and launches. It reads nothing back from the device."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from snell.kernels import launch, select
from snell.update import Parameters

#: Keys of a bracket are sorted into this many bins: 2^31, 2^18, 2^5, 1 key a bin in three passes.
BINS = 8192
#: Passes over K a call may need: one with a bracket that missed, three that narrow all keys to one.
PASSES = 4
#: Keys a bucket may keep: what one program sorts out in registers.
BUCKET = 2048
#: Entries sampled at most: 4 standard deviations are then 0.7 % of the ranks at s = 0.9.
SAMPLES = 32768
#: Counting programs a layer gets for each multiprocessor: enough that layers of ragged sizes even out.
PROGRAMS = 8
#: Workspace of one call; a group of layers that needs more goes in several.
WORKSPACE_BYTES = 64 * 2**20
#: Thresholds remembered on a device; the least recently used goes first.
SLOTS = 4096


class _Plan(NamedTuple):
    """What sizes alone decide about a layer, in the order of ``select.FIELDS`` from ``m`` to ``bucket``."""

    m: int
    n: int
    k: int
    samples: int
    low: int
    high: int
    bucket: int


class _Device:
    """What outlives a call on a device: remembered thresholds and the tables of calls seen.

    A captured graph keeps the addresses it saw, so neither is ever freed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memo = torch.zeros(SLOTS, 2, dtype=torch.int64, device=device)
        self._slots: OrderedDict[tuple, int] = OrderedDict()
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def slot(self, key: tuple) -> int:
        """The slot of ``key``; the fingerprint tells whether what it holds is the caller's."""
        if key not in self._slots:
            free = len(self._slots) if len(self._slots) < SLOTS else self._slots.popitem(last=False)[1]
            self._slots[key] = free
        self._slots.move_to_end(key)
        return self._slots[key]

    def table(self, rows: tuple[tuple[int, ...], ...]) -> Tensor:
        if rows not in self._tables:
            host = torch.tensor(rows, dtype=torch.int64, device="cpu")
            if self.device.type == "cuda":
                host = host.pin_memory()  # so that the copy does not wait for the device
            self._tables[rows] = host, host.to(self.device, non_blocking=True)
        return self._tables[rows][1]


_devices: dict[torch.device, _Device] = {}


def _on(device: torch.device) -> _Device:
    if device not in _devices:
        _devices[device] = _Device(device)
    return _devices[device]


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


def _bytes(plan: _Plan, rank: int) -> int:
    return 4 * ((plan.m + plan.n) * rank + SAMPLES + BINS * plan.bucket) + 8 * (select.HEAD + BINS)


def _calls(plans: Sequence[_Plan], rank: int) -> Iterator[slice]:
    """Runs of layers whose workspace fits; a layer that fits nowhere goes alone."""
    start, used = 0, 0
    for i, plan in enumerate(plans):
        size = _bytes(plan, rank)
        if i > start and used + size > WORKSPACE_BYTES:
            yield slice(start, i)
            start, used = i, 0
        used += size
    yield slice(start, len(plans))


def select_thresholds(layers: Sequence[Parameters]) -> tuple[Tensor, Tensor]:
    """tau (float32) and fingerprint (int64) of every layer, ``[len(layers)]`` each, all layers in the same launches.

    Args:
        layers: float32 ``A [n, r]``, ``B [m, r]``, ``theta [t]`` and their make-up, of one device, rank, kernel
            function and number of groups; every sparsity lies in (0, 1).
    """
    plans = [_plan(layer) for layer in layers]
    taus = layers[0][0].new_empty(len(layers))
    calls = _calls(plans, layers[0][3].rank)
    fingerprints = [_select(layers[call], plans[call], taus[call]) for call in calls]
    return taus, fingerprints[0] if len(fingerprints) == 1 else torch.cat(fingerprints)


def _select(layers: Sequence[Parameters], plans: Sequence[_Plan], taus: Tensor) -> Tensor:
    """Write the layers' taus, and return a view of their fingerprints."""
    device, count, spec = taus.device, len(layers), layers[0][3]
    known = _on(device)
    rows, column, thetas, buckets = [], 0, 0, 0
    for (A, B, theta, _), plan in zip(layers, plans, strict=True):
        setting = (*plan, spec.rank, spec.kernel, spec.groups)
        slot = known.slot((A.data_ptr(), B.data_ptr(), theta.data_ptr(), *setting))
        salt = hash(setting)
        rows.append((column, column + plan.n, thetas, *plan, buckets, slot, salt))
        column, thetas, buckets = column + plan.n + plan.m, thetas + theta.numel(), buckets + BINS * plan.bucket
    factors = torch.cat([t.t() for A, B, _, _ in layers for t in (A, B)], dim=1)
    theta = layers[0][2] if count == 1 else torch.cat([layer[2] for layer in layers])
    table, memo = known.table(tuple(rows)), known.memo
    state = torch.zeros(count, select.HEAD + BINS, dtype=torch.int64, device=device)
    samples = torch.empty(count, SAMPLES, dtype=torch.int32, device=device)
    bucket = torch.empty(buckets, dtype=torch.int32, device=device)

    stride = factors.stride(0)
    setting = launch.meta(spec) | {"BINS": BINS}
    launch.run(
        select.fingerprint_kernel,
        (triton.cdiv(max(p.m + p.n for p in plans), 256), count),
        (factors, theta, table, state, memo, stride),
        NUM_THETA=layers[0][2].numel(),
        RANK=spec.rank,
        BINS=BINS,
        BLOCK=256,
    )
    launch.run(
        select.sample_kernel,
        (triton.cdiv(max(p.samples for p in plans), 256), count),
        (factors, theta, table, state, memo, samples, stride),
        SAMPLES=SAMPLES,
        BLOCK=256,
        **setting,
    )
    launch.run(
        select.bracket_kernel,
        count,
        (table, state, memo, samples, taus),
        SAMPLES=SAMPLES,
        BINS=BINS,
        num_warps=32,
    )
    row = launch.row("select", taus)
    tiles = max(launch.tiles(p.m, p.n, row) for p in plans)
    programs = min(tiles, PROGRAMS * launch.num_processors(device))
    for _ in range(PASSES):
        launch.run(
            select.count_kernel,
            (programs, count),
            (factors, theta, table, state, memo, bucket, stride),
            row,
            BLOCK_M=row.block_m,
            BLOCK_N=row.block_n,
            **setting,
        )
        launch.run(
            select.choose_kernel,
            count,
            (table, state, memo, bucket, taus),
            BINS=BINS,
            BUCKET=BUCKET,
            num_warps=8,
        )
    return state[:, select.HASH]


def forget() -> None:
    """Let every device forget the thresholds it remembers, so that the next call selects anew."""
    for device in _devices.values():
        device.memo.zero_()
