"""Prints what merge takes on sm_90 with a tile of 128 entries a thread, which no register file holds; as JSON."""

import json
from unittest import mock

import torch

from snell.bench import core
from snell.bench.experiments.resources import launches, update_of
from snell.kernels.table import TABLE, Row

with mock.patch.dict(TABLE[90], merge=Row(128, 128, 4)):
    merge = core.kernel_calls(update_of("piecewise_linear", 32, 2), torch.float32)["merge"]
    (found,) = launches(merge, 90, set())
print(json.dumps(found))
