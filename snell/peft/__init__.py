"""SNELL as a PEFT tuner: ``get_peft_model(model, SnellConfig(r=32, sparsity=0.9, target_modules="all-linear"))``.

Importing this module makes the tuner known to PEFT, as type ``SNELL``; import it before loading a saved
adapter. Needs ``pip install 'snell[peft]'``.
"""

from __future__ import annotations

try:
    from peft.utils import register_peft_method
except ImportError as error:
    raise ImportError("snell.peft needs peft and transformers: pip install 'snell[peft]'") from error

from snell.peft.config import SnellConfig
from snell.peft.layer import AdaptedLinear
from snell.peft.model import SnellModel
from snell.peft.saving import last_checkpoint, save_adapter

__all__ = ["AdaptedLinear", "SnellConfig", "SnellModel", "last_checkpoint", "save_adapter"]

register_peft_method(name="snell", config_cls=SnellConfig, model_cls=SnellModel)
