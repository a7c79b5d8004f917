"""Kernels for training on a CPU, swapped into a GPT: they compute the functions of model.py.

Attention and RMSNorm are faster (runs/cpu_step), LayerNorm takes sharded gains, and a wide MLP keeps half as much for
backward (docs/optimizations.md).
"""

import math
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_WIDE_LAYER = 3 * 2**18  # weights; narrower layers have small activations, but computing them again takes long
MAX_PLAIN_ATTENTION = 128  # positions; for longer rows torch's fused kernel is faster
MAX_PLAIN_BACKWARD = 512  # positions; up to here, in bfloat16, the fused kernel's backward is slower than a plain one


def use_cpu_kernels(model: Any) -> None:
    """Replace the attention, the norms and wide MLPs of a GPT, in place."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = MethodType(rms_norm_forward, module)  # type: ignore[method-assign]
        if isinstance(module, nn.LayerNorm):
            module.forward = MethodType(layer_norm_forward, module)  # type: ignore[method-assign]
    for block in model.blocks:
        block.attention.causal_attention = MethodType(causal_attention, block.attention)
        block.attention.forward = MethodType(attention_forward, block.attention)
        if block.mlp.down.weight.numel() >= MIN_WIDE_LAYER:
            block.mlp.forward = MethodType(mlp_forward, block.mlp)


def rms_norm_forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm. Under autocast the norm of the residual stream, which is float32, has the next linear layer's dtype."""
    is_autocast = x.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else torch.promote_types(x.dtype, norm.weight.dtype)
    if torch.is_grad_enabled():
        return RMSNormFunction.apply(x, norm.weight, norm.eps, dtype)
    return normalize(x, norm.eps)[0].mul_(norm.weight).to(dtype)


def normalize(x: Tensor, eps: Any) -> tuple[Tensor, Tensor]:
    """x over its root mean square along the last dimension, at least in float32, and one over that root."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * inverse_rms, inverse_rms


def layer_norm_forward(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """LayerNorm whose gains may be bfloat16, as sharded ones are; autocast on a CPU does not convert them."""
    bias = None if norm.bias is None else norm.bias.to(x.dtype)
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), bias, norm.eps)


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm over the last dimension, with a gain of any shape that broadcasts to x; returns and keeps `dtype`.

    Its backward pass makes five sweeps over memory; torch's own takes twice the time on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        normed, inverse_rms = normalize(x, eps)
        ctx.save_for_backward(normed.to(dtype), inverse_rms, gain)
        return (normed * gain).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        normed, inverse_rms, gain = ctx.saved_tensors
        normed, grad = normed.to(inverse_rms.dtype), grad.to(inverse_rms.dtype)
        product = grad * normed
        radial = (product * gain).mean(-1, keepdim=True)  # the part of the gradient along x, which the norm removes
        grad_x = (grad * gain).addcmul_(normed, radial, value=-1).mul_(inverse_rms)
        return grad_x, product.sum_to_size(gain.shape) if ctx.needs_input_grad[1] else None, None, None


def mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    is_plain = type(mlp.down) is nn.Linear  # not LoRA's, nor one that packs its weights
    if not is_plain or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return type(mlp).forward(mlp, x)
    if hasattr(mlp, "gate"):
        return ActivatedLinear.apply(silu_product, mlp.down.weight, None, mlp.gate(x), mlp.up(x))
    gelu = partial(F.gelu, approximate=mlp.approximate)
    return ActivatedLinear.apply(gelu, mlp.down.weight, mlp.down.bias, mlp.up(x))


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class ActivatedLinear(torch.autograd.Function):
    """activate(*inputs) Wᵀ + b, each input (..., inner); backward activates again instead of keeping the result."""

    @staticmethod
    def forward(ctx, activate: Any, weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.activate = activate
        ctx.save_for_backward(weight, *inputs)
        return F.linear(activate(*inputs), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *inputs = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            activated = ctx.activate(*inputs)
        grads = torch.autograd.grad(activated, inputs, grad @ weight.to(grad.dtype))  # the dtype is autocast's
        rows = grad.flatten(0, -2)
        grad_weight = rows.mT @ activated.detach().flatten(0, -2) if ctx.needs_input_grad[1] else None
        return None, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, *grads


def causal_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v under the causal mask, q (B, n_head, T, D), k and v (B, n_kv_head, T, D)."""
    T = q.shape[2]
    dropout = attention.dropout if attention.training else 0.0
    if torch.is_grad_enabled():  # without backward torch's fused kernel is always faster
        if T <= MAX_PLAIN_ATTENTION:
            return plain_attention(q, k, v, dropout)
        is_eager_bfloat16 = v.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        if is_eager_bfloat16 and T <= MAX_PLAIN_BACKWARD and not dropout:
            return FusedForwardAttention.apply(q.type_as(v), k.type_as(v), v)
    return type(attention).causal_attention(attention, q, k, v)


def attention_forward(attention: Any, x: Tensor, cos_sin: Any, attention_fn: Any = None) -> Tensor:
    """Short rows without RoPE take one copy, not three, to the order that `short_attention` reads."""
    B, T, _ = x.shape
    is_short = T <= MAX_PLAIN_ATTENTION and torch.is_grad_enabled()
    if cos_sin is not None or attention_fn is not None or not is_short:
        return type(attention).forward(attention, x, cos_sin, attention_fn)
    qkv = attention.qkv(x).view(B, T, 3, attention.n_head, -1).permute(2, 3, 0, 1, 4)
    q, k, v = qkv.reshape(3, attention.n_head * B, T, -1).unbind()
    y = short_attention(q, k, v, attention.dropout if attention.training else 0.0)
    return attention.out(y.view(attention.n_head, B, T, -1).permute(1, 2, 0, 3).reshape(B, T, -1))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention in four batched operations: for short rows in bfloat16 several times as fast as torch's."""
    B, n_head, T, head_dim = q.shape
    n_kv_head = k.shape[1]
    group = n_head // n_kv_head  # query heads that share a key head: more rows of the same product
    # Heads come first, as in version 0.1: the order decides which probabilities dropout drops.
    q = q.unflatten(1, (n_kv_head, group)).transpose(0, 1).reshape(n_kv_head * B, group * T, head_dim)
    k = k.transpose(0, 1).reshape(n_kv_head * B, T, head_dim)
    v = v.transpose(0, 1).reshape(n_kv_head * B, T, head_dim)
    y = short_attention(q, k, v, dropout).view(n_kv_head, B, group, T, head_dim)
    # In memory the heads of a position come together, as the output layer reads them.
    return y.permute(1, 3, 0, 2, 4).reshape(B, T, n_head, head_dim).transpose(1, 2)


def short_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention of k, v (N, T, D) and the queries of a group of heads (N, group · T, D) that share them."""
    T, head_dim = k.shape[1:]
    mask = torch.full((q.shape[1] // T, T, T), -math.inf, dtype=v.dtype, device=v.device).triu(1).view(-1, T)
    # With beta=0 baddbmm does not read its first argument. To add the mask by it would take longer.
    scores = torch.baddbmm(mask, q, k.mT, beta=0, alpha=head_dim**-0.5).add_(mask)
    probs = scores.softmax(-1)  # (N, group · T, T)
    return F.dropout(probs, dropout) @ v


class FusedForwardAttention(torch.autograd.Function):
    """torch's fused causal attention, with the backward pass of `plain_attention`, whose forward is computed again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            y = plain_attention(*inputs)
        return torch.autograd.grad(y, inputs, grad)
