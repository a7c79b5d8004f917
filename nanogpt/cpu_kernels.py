"""Faster attention and RMSNorm for training on a CPU, swapped into a GPT from outside.

They compute the functions of model.py and keep its parameters and their names; runs/cpu_step has what each gains.
"""

import math
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PLAIN_ATTENTION = 128  # positions; for longer rows torch's fused kernel is faster


def use_cpu_kernels(model: Any) -> None:
    """Replace the forward functions of a GPT's attention modules and RMS norms, in place."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = MethodType(rms_norm_forward, module)  # type: ignore[method-assign]
    for block in model.blocks:
        block.attention.forward = MethodType(attention_forward, block.attention)


def rms_norm_forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return RMSNormFunction.apply(x, norm.weight, norm.eps)


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm over the last dimension, with a gain of any shape that broadcasts to x.

    Its backward pass makes five sweeps over memory; torch's own takes twice the time on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        dtype = torch.promote_types(x.dtype, gain.dtype)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * inverse_rms
        ctx.save_for_backward(normed, inverse_rms, gain)
        return (normed * gain).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, inverse_rms, gain = ctx.saved_tensors
        product = grad * normed
        radial = (product * gain).mean(-1, keepdim=True)  # the part of the gradient along x, which the norm removes
        grad_x = (grad * gain).addcmul_(normed, radial, value=-1).mul_(inverse_rms)
        return grad_x, product.sum_to_size(gain.shape), None


def attention_forward(
    attention: Any, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention_fn: Any = None
) -> Tensor:
    """Attention for rows of up to MAX_PLAIN_ATTENTION positions: three plain batched operations.

    In float32 they are level with torch's fused kernel, in bfloat16 several times faster. Heads come first in memory,
    so that one copy serves the norms, the rotation and both products. Other rows and attention functions take the
    module's own forward.
    """
    if attention_fn is not None or x.shape[1] > MAX_PLAIN_ATTENTION:
        return type(attention).forward(attention, x, cos_sin, attention_fn)
    B, T, _ = x.shape
    n_head, n_kv_head = attention.n_head, attention.n_kv_head
    qkv = attention.qkv(x).view(B, T, -1, attention.head_dim).permute(2, 0, 1, 3).contiguous()  # (heads, B, T, D)
    qk, v = qkv.split((n_head + n_kv_head, n_kv_head))
    if cos_sin is not None:
        cos, sin = cos_sin
        q_gain = attention.q_norm.weight.expand(n_head, -1)
        k_gain = attention.k_norm.weight.expand(n_kv_head, -1)
        gain = torch.cat((q_gain, k_gain))[:, None, None]  # (heads, 1, 1, D)
        qk = RMSNormFunction.apply(qk, gain, attention.q_norm.eps)
        qk = (qk * cos + qk.roll(qk.shape[-1] // 2, -1) * sin).to(qk.dtype)
    q, k = qk.split((n_head, n_kv_head))
    return attention.out(plain_attention(q, k, v, attention.dropout if attention.training else 0.0))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / √D) v under the causal mask.

    q: (n_head, B, T, D); k and v: (n_kv_head, B, T, D). Returns (B, T, n_head · D).
    """
    n_head, B, T, head_dim = q.shape
    n_kv_head = len(k)
    group = n_head // n_kv_head  # query heads that share a key head: more rows of the same product
    q = q.view(n_kv_head, group, B, T, head_dim).transpose(1, 2).reshape(-1, group * T, head_dim)
    k = k.flatten(0, 1)  # (n_kv_head · B, T, D)
    v = v.flatten(0, 1)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
    probs = torch.baddbmm(mask, q, k.mT, alpha=head_dim**-0.5).softmax(-1)  # (n_kv_head · B, group · T, T)
    y = (F.dropout(probs, dropout) @ v).view(n_kv_head, B, group, T, head_dim)
    return y.permute(1, 3, 0, 2, 4).reshape(B, T, n_head * head_dim)
