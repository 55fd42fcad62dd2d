"""Thresholds selected for many layers together: for whom they are held, and what ends that."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from snell import SnellLinear, backends, competition, refresh_thresholds
from snell.competition import held

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@pytest.fixture
def layer():
    with backends.use("triton"):
        layer = SnellLinear(20, 30, rank=4, sparsity=0.8)
        assert refresh_thresholds(nn.Sequential(layer)) == 1
        yield layer


@pytest.fixture
def selections(layer, monkeypatch) -> list[int]:
    """How often the backend selects for one layer alone."""
    count, select = [], type(backends.AVAILABLE["triton"]).select

    def counting(*args):
        count.append(1)
        return select(*args)

    monkeypatch.setattr(type(backends.AVAILABLE["triton"]), "select", counting)
    return count


def anew(layer: SnellLinear) -> torch.Tensor:
    competition.forget()
    return layer.threshold()


@pytest.mark.parametrize("name", ["snell_A", "snell_B", "snell_theta"])
def test_a_factor_moved_to_other_memory_is_selected_for_again(layer, selections, name) -> None:
    """``.data = other`` leaves the version as it was: an offloaded or gathered parameter."""
    parameter = getattr(layer, name)
    version, other = parameter._version, parameter.detach() * 1.5 + 0.01
    parameter.data = other
    assert parameter._version == version
    found = layer.threshold()
    assert selections == [1]
    assert found == anew(layer)


@pytest.mark.parametrize("name", ["snell_A", "snell_B", "snell_theta"])
def test_an_edit_that_a_version_counter_sees_is_selected_for_again(layer, selections, name) -> None:
    with torch.no_grad():
        getattr(layer, name).mul_(1.5)
    found = layer.threshold()
    assert selections == [1]
    assert found == anew(layer)


@pytest.mark.parametrize("change", [{"sparsity": 0.5}, {"kernel": "sigmoid"}, {"groups": 1}])
def test_every_setting_is_part_of_what_is_held(selections, change) -> None:
    layer = SnellLinear(20, 30, rank=4, sparsity=0.8, kernel="rbf")
    refresh_thresholds(nn.Sequential(layer))
    A, B, theta, spec = next(layer.snell_parameters())
    layer.threshold()
    assert selections == []
    competition.select(A, B, theta, replace(spec, **change))
    assert selections == [1]


def test_other_tensors_of_the_same_bits_are_not_the_held_ones(layer, selections) -> None:
    A, B, theta, spec = next(layer.snell_parameters())
    tau = layer.threshold()
    assert selections == []
    assert competition.select(A, B.clone(), theta, spec) == tau
    assert competition.select(A, B, theta.clone(), spec) == tau
    assert selections == [1, 1]


def test_a_tensor_at_the_place_of_one_that_is_gone_is_selected_for(layer, selections) -> None:
    """Python and the allocator use an identity and an address again; a rebuilt model has the same versions, too."""
    A, B, theta, spec = next(layer.snell_parameters())
    other = A.detach()
    held._held[id(other)] = held._held.pop(id(A))
    other.data.mul_(1.5)
    assert competition.select(other, B, theta, spec) == anew(layer)
    assert selections == [1, 1]


def test_layers_that_are_gone_are_not_held(layer) -> None:
    assert len(held._held) == 1
    gone = nn.Sequential(layer, SnellLinear(20, 30, rank=4, sparsity=0.8))
    assert refresh_thresholds(gone) == 2
    assert len(held._held) == 2
    del gone
    refresh_thresholds(nn.Sequential(layer))
    assert len(held._held) == 1
    competition.forget()
    assert not held._held
