"""SAFE, selective freezing: adapters that change little stop training early, and stop costing.

:class:`SafeCallback` is for transformers' Trainer, :class:`SelectiveFreezing` for other loops. Needs peft and
transformers.
"""

from __future__ import annotations

from snell.training.callback import SafeCallback
from snell.training.cka import cka_importance, linear_cka
from snell.training.freezing import SelectiveFreezing
from snell.training.schedule import Schedule

__all__ = ["SafeCallback", "Schedule", "SelectiveFreezing", "cka_importance", "linear_cka"]
