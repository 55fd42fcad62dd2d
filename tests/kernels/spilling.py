"""Prints what merge takes on sm_90 with a tile of 128 entries a thread, which no register file holds; as JSON."""

import json
from unittest import mock

import torch

from snell.bench.resources import launches, update_of
from snell.kernels import merge
from snell.kernels.table import TABLE, Row

with mock.patch.dict(TABLE[90], merge=Row(128, 128, 4)):
    A, B, theta, tau = update_of(32, 2)
    out = torch.zeros(B.shape[0], A.shape[0])
    (found,) = launches(merge.merge_out, A, B, theta, tau, None, out, "piecewise_linear", 2, "soft", arch=90)
print(json.dumps(found))
