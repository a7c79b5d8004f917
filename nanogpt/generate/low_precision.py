"""Weights in low precision for decoding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer for a CPU: float16 weights in the order in which FBGEMM reads them, float32 arithmetic.

    Decoding waits for weights to come from memory, and these are half of float32's bytes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def can_pack() -> bool:
    """Whether this machine's torch has FBGEMM (x86 alone has)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def rounded_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A linear layer that keeps its weights in `dtype`: what autocast to it would make of them at each use."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


@torch.no_grad()
def replace_linears(model: Any, layer: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear) -> None:
    """Replace all matrices of `model`, in place, by `layer` of weight and bias. Embeddings and norms stay."""
    head = layer(model.lm_head_weight, None)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))
    model.head = head
