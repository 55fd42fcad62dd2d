"""What a base layer offers an adapter: its sizes, and its weight where that is a float matrix.

Anything else is opaque: it is called, and the update's share is added to its output. Opaque bases merge by
PEFT's own quantisation backends, where those know how.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from snell.distributed import Split

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = tuple(layer.forward for layer in (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def features(layer: nn.Module) -> tuple[int, int]:
    """in_features and out_features: n and m of the weight as a matrix."""
    layer = innermost(layer)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, CONVOLUTIONS):
        return layer.weight[0].numel(), layer.out_channels
    if isinstance(layer, Conv1D):
        n, m = layer.weight.shape
        return n, m
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def device_and_dtype(layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where an adapter of this layer lives, and the dtype of the layer's weight, if it is a float one."""
    layer = innermost(layer)
    tensor = next((t for t in (*layer.parameters(), *layer.buffers())), torch.empty(0))
    weight = getattr(layer, "weight", tensor)
    return tensor.device, weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None


def float_weight(layer: nn.Module, fan_in_fan_out: bool) -> Tensor | None:
    """The layer's own weight as [m, n], a view, or this process's piece of it; None where it is no float matrix.

    A convolution's keeps its shape, [m, ...]: in some memory formats no view of it is a matrix.
    """
    weight: Any = getattr(layer, "weight", None)
    if split(layer, fan_in_fan_out) is not None:
        weight = nn.Parameter(weight.to_local(), requires_grad=False)
    # Quantised weights are subclasses of Parameter or of Tensor, and may call themselves float.
    if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in _DTYPES:
        return None
    if weight.dim() != 2 and not isinstance(layer, CONVOLUTIONS):
        return None
    return weight.T if fan_in_fan_out else weight


def fusable_weight(layer: nn.Module, fan_in_fan_out: bool) -> Tensor | None:
    """:func:`float_weight`, where calling the layer would do no more than its class in PyTorch does with it."""
    plain = type(layer).forward in _PLAIN and "forward" not in vars(layer)
    if not plain or any(getattr(layer, hooks) for hooks in _HOOKS) or split(layer, fan_in_fan_out) is not None:
        return None
    return float_weight(layer, fan_in_fan_out)


def split(layer: nn.Module, fan_in_fan_out: bool) -> Split | None:
    """How the layer's weight [m, n] is split over processes, if it is."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) is nn.Parameter:
        return None
    from snell.distributed import Split

    found = Split.of(weight)
    return found.T if found is not None and fan_in_fan_out else found


def refuse_split(layer: nn.Module) -> None:
    """Raise ValueError if the layer's weight is split over processes."""
    if split(innermost(layer), False) is not None:
        raise ValueError(
            f"{type(innermost(layer)).__name__} cannot be adapted: its weight is split over processes; of split "
            "layers SNELL adapts linear ones"
        )


def local(tensor: Tensor) -> Tensor:
    """The tensor, or this process's piece of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bias(layer: nn.Module) -> Tensor | None:
    """The layer's bias, if it has one."""
    return getattr(layer, "bias", None)


class Quantised(NamedTuple):
    """A quantised layer's parameters and state, as they were before an adapter was merged into it."""

    layer: nn.Module
    parameters: dict[str, Any]
    state: Any

    @classmethod
    def of(cls, tuner_layer: Any) -> Quantised:
        """The record of a layer that nothing is merged into yet."""
        layer = tuner_layer.get_base_layer()
        return cls(layer, dict(layer._parameters), copy.copy(getattr(layer, "state", None)))

    def put_back(self, tuner_layer: Any) -> None:
        """Undo :func:`requantise`."""
        _owner(tuner_layer).base_layer = self.layer
        self.layer._parameters.update(self.parameters)
        if self.state is not None:
            self.layer.state = self.state


def dequantise(tuner_layer: Any) -> Tensor:
    """A float copy of an opaque base layer's weight, as [m, n].

    Raises:
        TypeError: PEFT has no way to dequantise and quantise such a layer.
    """
    layer = tuner_layer.get_base_layer()
    backend = resolve_quantization_backend(layer, **tuner_layer.quantisation)
    if backend is None or not backend.supports_merge:
        raise TypeError(
            f"an adapter cannot be merged into a {type(layer).__name__}: its weight is not a float matrix, and PEFT "
            "cannot quantise it anew. Keep the adapter unmerged"
        )
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes has packed 4 bits for a CPU's vector units, in an order PEFT does not know: ask the layer.
        unit = torch.eye(layer.in_features, device=layer.weight.device)
        return (layer(unit) - (0 if layer.bias is None else layer.bias)).T.contiguous()
    weight = backend.get_base_weight(layer).detach().clone()
    return weight.T if tuner_layer.fan_in_fan_out else weight


def requantise(tuner_layer: Any, weight: Tensor) -> None:
    """Quantise ``weight [m, n]`` into the base layer."""
    backend: Any = resolve_quantization_backend(tuner_layer.get_base_layer(), **tuner_layer.quantisation)
    backend.set_base_weight(_owner(tuner_layer), weight.T if tuner_layer.fan_in_fan_out else weight)


def innermost(layer: nn.Module) -> nn.Module:
    """The layer below all tuners' layers."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _owner(tuner_layer: Any) -> Any:
    """The innermost tuner layer, whose ``base_layer`` is the layer itself."""
    while isinstance(tuner_layer.base_layer, BaseTunerLayer):
        tuner_layer = tuner_layer.base_layer
    return tuner_layer
