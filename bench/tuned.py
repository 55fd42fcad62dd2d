"""A model under training by one method, and what a step of it holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snell import memo
from snell.bench.footprint import held_tensors, num_trained, optimizer_bytes, start, storage_bytes, trained
from snell.bench.measure import saved_bytes
from snell.bench.methods import METHODS

Batch = dict[str, Tensor]


class Tuned:
    """``model``, changed in place to be tuned by ``method``, with AdamW and its state.

    Args:
        model: takes the batch as keywords and answers with a ``loss``.
        keep_gradients: whether gradients stay allocated between steps, and a step adds to zeros.

    Raises:
        ValueError, RuntimeError: the method cannot tune the model.
    """

    def __init__(self, method: str, model: nn.Module, batch: Batch, rank: int, *, keep_gradients: bool = False) -> None:
        self.batch, self.keep_gradients = batch, keep_gradients
        self.model = METHODS[method].adapt(model, rank).train()
        self.optimizer = start(torch.optim.AdamW(trained(self.model), lr=1e-4))
        self._drop_gradients()

    def forward(self) -> Tensor:
        """The loss, of new parameters: thresholds are selected anew."""
        memo.clear()
        return self.model(**self.batch).loss

    def step(self) -> None:
        """Forward, backward and AdamW's update."""
        self.forward().backward()
        self.optimizer.step()
        self._drop_gradients()

    def held(self) -> dict[str, int]:
        """Bytes: all tensors of the model, AdamW's state, what autograd saves in a forward; and numbers trained."""
        return {
            "model_bytes": storage_bytes(held_tensors(self.model)),
            "optimizer_bytes": optimizer_bytes(self.optimizer),
            "saved_bytes": saved_bytes(self.forward, held_tensors(self.model)),
            "trainable": num_trained(self.model),
        }

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
