"""SNELL, RED and X-PEFT as PEFT tuners: ``get_peft_model(model, SnellConfig(r=32, target_modules="all-linear"))``.

Importing this module makes the tuners known to PEFT, as types ``SNELL``, ``RED`` and ``XPEFT``; import it before
loading a saved adapter. Needs peft and transformers.
"""

from __future__ import annotations

from snell.extras import hint

try:
    from peft.utils import register_peft_method
except ImportError as error:
    raise ImportError(f"snell.peft needs peft and transformers: {hint('peft')}") from error

from snell.peft.common.kind import kind
from snell.peft.common.mixed import allow_mixing
from snell.peft.common.saving import last_checkpoint, save_adapter
from snell.peft.red.config import RedConfig
from snell.peft.red.layer import EditedLinear
from snell.peft.red.model import RedModel
from snell.peft.snell.config import SnellConfig
from snell.peft.snell.conversion import LoraError, lora_error
from snell.peft.snell.export import export_sparse
from snell.peft.snell.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from snell.peft.snell.layer import AdaptedLinear
from snell.peft.snell.model import SnellModel
from snell.peft.snell.scaling import rescale_adapter_scale
from snell.peft.xpeft.config import XpeftConfig
from snell.peft.xpeft.layer import MaskedLinear, use_profiles
from snell.peft.xpeft.model import XpeftModel
from snell.peft.xpeft.profile import Profile

__all__ = [
    "AdaptedLinear",
    "EditedLinear",
    "LoraError",
    "MaskedLinear",
    "Profile",
    "RedConfig",
    "RedModel",
    "SnellConfig",
    "SnellModel",
    "XpeftConfig",
    "XpeftModel",
    "export_sparse",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "last_checkpoint",
    "lora_error",
    "rescale_adapter_scale",
    "save_adapter",
    "use_profiles",
]

for _name in ("SNELL", "RED", "XPEFT"):
    kind(_name)
register_peft_method(name="snell", config_cls=SnellConfig, model_cls=SnellModel, is_mixed_compatible=True)
register_peft_method(
    name="red", config_cls=RedConfig, model_cls=RedModel, prefix=RedModel.prefix, is_mixed_compatible=True
)
register_peft_method(name="xpeft", config_cls=XpeftConfig, model_cls=XpeftModel, prefix=XpeftModel.prefix)
allow_mixing("SNELL", SnellConfig, SnellModel)
allow_mixing("RED", RedConfig, RedModel)
