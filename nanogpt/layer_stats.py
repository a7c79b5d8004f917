"""Gradients and updates of each layer, for the log."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nanogpt.sharding import local, norm_over_ranks

# Layers whose names in metrics.jsonl are older than their names in model.py.
LOGGED_NAMES = {"token_embedding": "tokens", "position_embedding": "positions"}


class LayerStats:
    """Norms of each layer's gradient and update, and whether the update was clipped; kept on the device.

    `layers`: the parameters of each layer by its name in metrics.jsonl, "tokens", "blocks.0" and so on, "norm".
    """

    def __init__(self, parameters: Mapping[str, Tensor], grad_clip: float):
        self.layers: dict[str, list[Tensor]] = {}
        for name, parameter in parameters.items():
            depth = 2 if name.startswith("blocks.") else 1
            layer = ".".join(name.split(".")[:depth])
            self.layers.setdefault(LOGGED_NAMES.get(layer, layer), []).append(parameter)
        self.grad_clip = grad_clip or math.inf
        self.is_due = False  # measure the next update's layers, which takes a copy of the weights

    @torch.no_grad()
    def before_update(self, grad_norm: Tensor) -> None:
        self.is_clipped = ((grad_norm > self.grad_clip) & grad_norm.isfinite()).float()
        if self.is_due:
            grads = [[local(p.grad) for p in layer if p.grad is not None] for layer in self.layers.values()]
            self.grad_norms = self._norms(grads)
            self.old_weights = [[local(p).clone() for p in layer] for layer in self.layers.values()]

    @torch.no_grad()
    def after_update(self) -> list[Tensor]:
        """Scalars: whether the update was clipped; then, if due, each layer's gradient norm and each update's norm."""
        if not self.is_due:
            return [self.is_clipped]
        updates = [
            torch._foreach_sub([local(p) for p in layer], old)
            for layer, old in zip(self.layers.values(), self.old_weights, strict=True)
        ]
        self.old_weights = []
        return [self.is_clipped, *self.grad_norms, *self._norms(updates)]

    def _norms(self, layers: Sequence[Sequence[Tensor]]) -> Tensor:
        """The norm of each layer's tensors together (layers,); each rank gives its parts of them."""
        norms = torch.stack([nn.utils.get_total_norm(tensors) for tensors in layers])
        return norm_over_ranks(norms, next(iter(self.layers.values()))[0])
