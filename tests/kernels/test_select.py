"""Select on the device: brackets that miss, buckets that run over, passes that do not suffice, groups, the memo."""

from __future__ import annotations

import threading

import pytest
import torch
from launching import exact, magnitudes, parameters, recorded

from snell.kernels import launch, selection
from snell.kernels.selection import select_thresholds

pytestmark = pytest.mark.usefixtures("on_triton")


def planned(monkeypatch, **changed):
    plan = selection._plan
    monkeypatch.setattr(selection, "_plan", lambda layer: plan(layer)._replace(**changed))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("bucket", [0, 1, 2048])
@pytest.mark.parametrize("low, high", [(900, 950), (50, 90), (-1, 10**6), (400, 600), (500, 500)])
def test_what_the_launched_passes_leave_open_is_settled(monkeypatch, low, high, bucket, passes):
    monkeypatch.setattr(selection, "PASSES", passes)
    planned(monkeypatch, samples=1000, low=low, high=high, bucket=bucket)
    layer = parameters(37, 53, sparsity=0.5)
    assert select_thresholds([layer])[0] == exact(layer)


def test_many_equal_keys_inside_the_bracket_are_settled(monkeypatch):
    planned(monkeypatch, samples=1000, low=100, high=900)
    A, B, theta, spec = parameters(64, 60, sparsity=0.5)
    layer = A[:6].repeat(10, 1), B[:4].repeat(16, 1), theta, spec
    assert select_thresholds([layer])[0] == exact(layer)


def test_one_pass_over_K_is_the_rule(monkeypatch):
    """The first choice settles tau: later passes, left out, change nothing and are not gone on with."""
    monkeypatch.setattr(selection, "PASSES", 1)
    run = launch.run

    def stop_there(kernel, grid, args, row=None, **meta):
        if kernel.fn.__name__ == "count_kernel":
            args = (*args[:-1], 0)
        run(kernel, grid, args, row, **meta)

    monkeypatch.setattr(launch, "run", stop_there)
    for _ in range(6):
        layer = parameters(60, 70, sparsity=0.8)
        assert select_thresholds([layer])[0] == exact(layer)


def test_a_selection_is_three_launches_known_or_not():
    layer = parameters(70, 90)
    for _ in range(2):
        with recorded() as launched:
            select_thresholds([layer])
        assert launched == ["bracket_kernel", "count_kernel", "count_kernel"]


def test_like_layers_share_launches_and_each_gets_its_own_tau():
    shapes = [(20, 30), (3, 700), (20, 30), (1, 1), (20, 30)]
    layers = [parameters(*shape, sparsity=0.9) for shape in shapes]
    layers.append(parameters(20, 30, sparsity=0.5))
    with recorded() as launched:
        taus, fingerprints = select_thresholds(layers)
    assert launched.count("bracket_kernel") == 4
    assert taus.tolist() == [float(exact(layer)) for layer in layers]
    alone = [select_thresholds([layer]) for layer in layers]
    assert taus.tolist() == [float(tau) for tau, _ in alone]
    assert fingerprints.tolist() == [int(fingerprint) for _, fingerprint in alone]


def test_a_group_beyond_the_workspace_goes_in_several_calls(monkeypatch):
    layers = [parameters(20, 30) for _ in range(3)]
    monkeypatch.setattr(selection, "WORKSPACE_BYTES", 1)
    with recorded() as launched:
        taus, _ = select_thresholds(layers)
    assert launched.count("bracket_kernel") == 3
    assert taus.tolist() == [float(exact(layer)) for layer in layers]


def test_not_a_number_sorts_largest():
    layer = parameters(20, 10, sparsity=0.5)
    B = layer[1]
    B[:3] = float("nan")
    assert select_thresholds([layer])[0] == magnitudes(layer)[99]
    B[:12] = float("nan")
    assert select_thresholds([layer])[0].isnan()


def poison(device: torch.device) -> None:
    """Every tau that is remembered becomes 7, its fingerprint left as it is."""
    held = selection._memos[device]._held
    held[:, 1] = held[:, 1] >> 32 << 32 | torch.tensor(7.0).view(torch.int32).long()


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["A", "B", "theta"])
def test_tau_is_remembered_for_the_same_bits_alone(changed):
    layer = parameters(30, 40, rank=10)
    assert select_thresholds([layer])[0] == exact(layer)
    poison(layer[0].device)
    assert select_thresholds([layer])[0] == 7.0, "selected anew what was known"
    # An edit that no version counter sees.
    layer[changed].data.view(-1)[-1] += 0.01
    assert select_thresholds([layer])[0] == exact(layer)


def test_swapped_rows_are_other_factors():
    """A hash of values without their places would take them for the same."""
    layer = parameters(30, 40)
    select_thresholds([layer])
    poison(layer[0].device)
    layer[0].data[[0, 1]] = layer[0].data[[1, 0]]
    assert select_thresholds([layer])[0] == exact(layer)


def test_what_is_forgotten_is_selected_anew():
    layer = parameters(30, 40)
    select_thresholds([layer])
    poison(layer[0].device)
    selection.forget()
    assert select_thresholds([layer])[0] == exact(layer)


def test_a_capture_makes_no_memory_that_outlives_it(monkeypatch):
    """Made while a graph is captured, it would hold what a replay leaves there, and belong to the graph's pool."""
    monkeypatch.setattr(selection, "_memos", {})
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    layer = parameters(30, 40)
    assert select_thresholds([layer])[0] == exact(layer)
    assert selection._memos == {}


def test_a_capture_uses_the_memory_made_before(monkeypatch):
    layer = parameters(30, 40)
    select_thresholds([layer])
    poison(layer[0].device)
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    assert select_thresholds([layer])[0] == 7.0


def test_the_memory_is_not_allocated_by_the_calling_thread(monkeypatch):
    """torch.compile's "reduce-overhead" diverts what the calling thread allocates to a graph's pool."""
    threads, zeros = [], torch.zeros

    def recording(*size, **options):
        if size[:1] == (selection.SLOTS,):
            threads.append(threading.get_ident())
        return zeros(*size, **options)

    monkeypatch.setattr(selection, "_memos", {})
    monkeypatch.setattr(torch, "zeros", recording)
    select_thresholds([parameters(10, 10)])
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_what_a_call_remembers_is_bounded(monkeypatch):
    monkeypatch.setattr(selection, "_memos", {})
    monkeypatch.setattr(selection, "SLOTS", 3)
    layers = [parameters(5, 6) for _ in range(8)]
    for layer in layers:
        assert select_thresholds([layer])[0] == exact(layer)
    (memo,) = selection._memos.values()
    assert len(memo._slots) == 3
    assert memo._held.shape == (3, 2)
