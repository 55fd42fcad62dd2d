"""Layers for the tests of the module, and what the tests ask of them."""

from __future__ import annotations

import torch

from snell import SnellLinear

GATES = ("soft", "magnitude", "hard")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def draw(n=14, m=9, dtype=torch.float32, **options):
    """A layer whose update is large enough to be seen in any dtype."""
    layer = SnellLinear(n, m, dtype=dtype, **{"rank": 6, "sparsity": 0.8, "scale": 0.3, **options})
    with torch.no_grad():
        for factor in (layer.snell_A, layer.snell_B):
            factor.normal_()
    return layer


def settings(layer):
    spec = layer.spec
    return {"sparsity": spec.sparsity, "kernel": spec.kernel, "groups": spec.groups, "gate": spec.gate}


def factors(layer):
    return layer.snell_A, layer.snell_B, layer.snell_theta


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
