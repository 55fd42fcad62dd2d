"""SNELL as a PEFT tuner: ``get_peft_model(model, SnellConfig(r=32, sparsity=0.9, target_modules="all-linear"))``.

Importing this module makes the tuner known to PEFT, as type ``SNELL``; import it before loading a saved
adapter. Needs peft and transformers.
"""

from __future__ import annotations

from snell.extras import hint

try:
    from peft.utils import register_peft_method
except ImportError as error:
    raise ImportError(f"snell.peft needs peft and transformers: {hint('peft')}") from error

from snell.peft.common.kind import kind
from snell.peft.common.saving import last_checkpoint, save_adapter
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.layer import AdaptedLinear
from snell.peft.snell.model import SnellModel

__all__ = ["AdaptedLinear", "SnellConfig", "SnellModel", "last_checkpoint", "save_adapter"]

kind("SNELL")
register_peft_method(name="snell", config_cls=SnellConfig, model_cls=SnellModel)
