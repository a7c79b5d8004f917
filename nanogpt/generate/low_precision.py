"""Low-precision weights for decoding, which waits for weights to come from memory."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.distributed import World
from nanogpt.errors import InputError


class PackedLinear(nn.Module):
    """A linear layer for x86 CPUs: float16 weights in FBGEMM's packed order, float32 arithmetic."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def can_pack() -> bool:
    """Return True where this build of torch has FBGEMM, that is on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def rounded_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Make a linear layer with weights in `dtype`, the same function as autocast to it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


@torch.no_grad()
def replace_linears(model: Any, layer: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear) -> None:
    """Replace all linear layers of a GPT in place by `layer(weight, bias)`; embeddings and norms stay.

    Tied weights are untied: the output layer becomes a `layer` of its own.
    """
    head = layer(model.lm_head_weight, None)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))
    model.head = head


def to_inference_precision(
    model: Any, world: World, dtype: str, compiled: bool
) -> contextlib.AbstractContextManager[None]:
    """Move a GPT to its device with linear layers in the dtype that decodes fastest there, or in `dtype`.

    Returns the context to run it in. On a CPU without bfloat16 units "auto" and "float16" mean packed float16 weights.
    Raises InputError if this machine cannot do that.
    """
    model.to(world.device).eval()
    if world.device.type == "cpu" and world.dtype != torch.bfloat16 and dtype != "float32":
        if can_pack() and not compiled:
            replace_linears(model)
        elif dtype == "float16":
            raise InputError("--dtype=float16: on a CPU needs x86 and --compile=False; use --dtype=float32")
        return contextlib.nullcontext()

    if world.dtype != torch.float32:
        replace_linears(model, partial(rounded_linear, dtype=world.dtype))
    return world.autocast()
