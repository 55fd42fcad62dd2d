"""What acts on adapters while they train: selective freezing (SAFE), and budgets of kept entries (SNELLA).

:class:`SafeCallback` and :class:`BudgetCallback` are for transformers' Trainer, :class:`SelectiveFreezing` and
:class:`SparsityBudget` for other loops. Needs peft and
transformers.
"""

from __future__ import annotations

from snell.training.allocation import BudgetSchedule, water_fill
from snell.training.budget import SparsityBudget
from snell.training.budget_callback import BudgetCallback
from snell.training.callback import SafeCallback
from snell.training.cka import cka_importance, linear_cka
from snell.training.freezing import SelectiveFreezing
from snell.training.schedule import Schedule

__all__ = [
    "BudgetCallback",
    "BudgetSchedule",
    "SafeCallback",
    "Schedule",
    "SelectiveFreezing",
    "SparsityBudget",
    "cka_importance",
    "linear_cka",
    "water_fill",
]
