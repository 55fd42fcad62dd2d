"""Whether an operation may be called without torch's dispatcher, which takes as long as a small layer's work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["nothing_listens"]


def nothing_listens(lead: Tensor) -> bool:
    """Whether the dispatcher may be skipped: plain tensors, no dispatch mode, no compiling or tracing.

    Raises:
        NotImplementedError: inside a transform of torch.func.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("snell does not work under torch.func (vmap, grad, jvp ...); use torch.autograd")
    return (
        type(lead) in (Tensor, Parameter)
        and not lead.is_meta
        and not is_in_torch_dispatch_mode()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )
