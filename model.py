"""A GPT in one file: the network, its initialization, and its parameter and FLOP counts.

Two architectures share all the code they can. `gpt2` is the network of Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", as OpenAI released it. `modern` is Qwen3's (Yang et al. 2025): RMSNorm, rotary
position embeddings (RoPE), QK norm, a gated MLP, grouped-query attention, no biases. Without QK norm it is Llama's
(Touvron et al. 2023), and with biases on queries, keys and values Qwen2's.
Needs only torch: copy this file into another project and it runs.

Letters in shapes: B rows, T positions, C = n_embd channels, D = head_dim, V = vocab_size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Takes the place of plain causal attention. A KV cache is one (nanogpt/generate/decoder.py), a document mask another.
# q (B, n_head, T, D), k and v (B, n_kv_head, T, D) -> (B, n_head, T, D).
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

FLEX_ATTENTION_DEVICE = "cuda"  # where compiled FlexAttention (Dong et al. 2024) runs for document masks


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a network; a 0 stands for the default in the comment. Raises ValueError for contradictions."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257  # the true size; the network pads its own rows
    block_size: int = 1024  # context length in tokens
    bias: bool = True  # gpt2: in linear layers and norms
    dropout: float = 0.0
    gelu: str = "tanh"  # "tanh" as in GPT-2; "erf" as in nanoGPT
    arch: str = "gpt2"  # or "modern"
    n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head query heads; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd, modern: 8/3 n_embd rounded up to a multiple of 64
    qk_norm: bool = True  # modern: normalize queries and keys, as Qwen3 does and Llama does not
    qkv_bias: bool = False  # modern without QK norm: biases on queries, keys and values, as in Qwen2
    rope_theta: float = 10000.0  # base (theta) of RoPE
    rope_scaling: list[float] = field(default_factory=list)  # Llama 3's four numbers; see `rotary_frequencies`
    norm_eps: float = 0.0  # 0: 1e-5 in gpt2, 1e-6 in modern
    tied: bool = True  # the token embedding is the output layer too

    def __post_init__(self) -> None:
        if self.arch not in ("gpt2", "modern"):
            raise ValueError(f"arch={self.arch!r}: must be 'gpt2' or 'modern'")
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"gelu={self.gelu!r}: must be 'tanh' or 'erf'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta}: must be above 0")
        if self.rope_scaling and (len(self.rope_scaling) != 4 or min(self.rope_scaling) <= 0):
            raise ValueError(f"rope_scaling={self.rope_scaling}: must be four numbers above 0")
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

        modern = self.arch == "modern"
        if self.n_embd % self.n_head and not (modern and self.head_dim):
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them")
        defaults = {
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "n_inner": round_up(math.ceil(8 * self.n_embd / 3), 64) if modern else 4 * self.n_embd,
            "norm_eps": 1e-6 if modern else 1e-5,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value}: must be above 0, or 0 for the default")
            if not modern and name in ("n_kv_head", "head_dim") and value not in (0, default):
                raise ValueError(f"{name}={value}: arch=gpt2 has {default}; leave it out or set arch=modern")
            object.__setattr__(self, name, value or default)  # the dataclass is frozen

        if not modern and not self.tied:
            raise ValueError("tied=False: arch=gpt2 ties its output layer; leave it out or set arch=modern")
        if not modern and not self.qk_norm:
            raise ValueError("qk_norm=False: arch=gpt2 has no QK norm; leave it out or set arch=modern")
        if modern and self.bias:
            raise ValueError("bias=True: arch=modern has no biases; set bias=False")
        if self.qkv_bias and (not modern or self.qk_norm):
            raise ValueError("qkv_bias=True: needs arch=modern and qk_norm=False")
        if modern and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE rotates pairs of channels; make it even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: change one of them")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix products are fastest at multiples of 64. The padding stays zero."""
        return round_up(self.vocab_size, 64)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class RMSNorm(nn.RMSNorm):
    """x over its root mean square along the last dimension, times a learned gain (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


def make_norm(config: GPTConfig, channels: int) -> nn.Module:
    """The architecture's norm over the last dimension."""
    if config.arch == "modern":
        return RMSNorm(channels, eps=config.norm_eps)
    return nn.LayerNorm(channels, eps=config.norm_eps, bias=config.bias)


def rotary_frequencies(config: GPTConfig, device: torch.device) -> Tensor:
    """Radians per position (D/2,) of the pairs of channels (Su et al. 2021).

    rope_scaling: Llama 3.1 divides frequencies by `factor` if they make fewer than `low` turns in the original context,
    leaves those with more than `high` turns, and interpolates between the two (Grattafiori et al. 2024).
    """
    channels = torch.arange(0, config.head_dim, 2, device=device)
    frequencies = 1 / config.rope_theta ** (channels / config.head_dim)
    if not config.rope_scaling:
        return frequencies
    factor, low, high, original_context = config.rope_scaling
    turns = original_context * frequencies / (2 * math.pi)
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (fast + (1 - fast) / factor)


def rotary_cos_sin(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (..., D), of the rotary angles of positions (...).

    Channels i and i + D/2 form a pair. The first half of the sines is negated, as `rotate` needs it.
    """
    angles = positions[..., None] * rotary_frequencies(config, positions.device)  # radians
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of x (..., T, D) by the angles of `rotary_cos_sin`."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention, with grouped queries where n_kv_head < n_head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        num_heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, num_heads * config.head_dim, bias=config.bias or config.qkv_bias)
        has_norms = config.arch == "modern" and config.qk_norm
        self.q_norm = make_norm(config, config.head_dim) if has_norms else nn.Identity()
        self.k_norm = make_norm(config, config.head_dim) if has_norms else nn.Identity()
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention: AttentionFn | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). cos_sin: of RoPE (arch=modern). attention: None for causal."""
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if cos_sin is not None:
            q = rotate(self.q_norm(q), *cos_sin)
            k = rotate(self.k_norm(k), *cos_sin)
            v = v.contiguous()  # a copy: a view would keep all of `heads` for backward
        y = (attention or self.causal_attention)(q, k, v)  # (B, n_head, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def causal_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √D) v under the causal mask."""
        dropout = self.dropout if self.training else 0.0
        grouped = self.n_kv_head < self.n_head
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def document_causal_attention(idx: Tensor, separator_id: int, dropout: float) -> tuple[Tensor, AttentionFn]:
    """Causal attention within documents, for rows idx (B, T) of documents that each end with separator_id.

    Returns the tokens' positions (B, T) in their own documents, and the attention function.
    """
    B, T = idx.shape
    position = torch.arange(T, device=idx.device)
    is_start = F.pad(idx[:, :-1] == separator_id, (1, 0), value=True)
    start = torch.where(is_start, position, 0).cummax(1).values  # (B, T): where each token's document begins
    if idx.device.type == FLEX_ATTENTION_DEVICE and torch.compiler.is_compiling() and not dropout:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= start[b, query]) & (key <= query)

        blocks = create_block_mask(is_visible, B, None, T, T, idx.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # under autocast, QK norm leaves q and k in float32
            return flex_attention(q.type_as(v), k.type_as(v), v, block_mask=blocks, enable_gqa=True)

        return position - start, attend
    mask = ((position >= start[..., None]) & (position <= position[:, None]))[:, None]  # (B, 1, T, T): query, key
    return position - start, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=True)


class MLP(nn.Module):
    """GPT-2's two linear layers, wider in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020): the gate scales each channel of the wide layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each applied to a normalized copy and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = make_norm(config, config.n_embd)
        self.attention = Attention(config)
        self.norm2 = make_norm(config, config.n_embd)
        self.mlp = GatedMLP(config) if config.arch == "modern" else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention: AttentionFn | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cos_sin, attention))
        return x + self.dropout(self.mlp(self.norm2(x)))


def summed_cross_entropy(
    logits: Tensor, targets: Tensor, soft_ids: Tensor | None = None, soft_probs: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropies of logits (N, V) with hard or soft targets.

    targets: (N,) ids; −1 is ignored. soft_ids, soft_probs: (N, K), ids and their probabilities, to use instead; the
    probabilities of equal ids add up.
    """
    if soft_ids is None or soft_probs is None:
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    losses = -(logits.float().log_softmax(-1).gather(-1, soft_ids) * soft_probs).sum(-1)
    return losses.masked_fill(targets < 0, 0.0).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    """`summed_cross_entropy` of the logits of x (N, C) under a padded matrix (≥ V, C), `chunk` tokens at a time.

    Forward computes both gradients too, so that logits are neither kept nor computed twice (Hsu et al. 2024).
    """

    @staticmethod
    def forward(ctx, x, matrix, vocab_size, chunk, targets, soft_ids=None, soft_probs=None):  # type: ignore[no-untyped-def]
        if soft_ids is None or soft_probs is None:
            soft_ids = targets[:, None].clamp(min=0)
            soft_probs = torch.ones_like(soft_ids, dtype=torch.float32)
        soft_probs = soft_probs.masked_fill(targets[:, None] < 0, 0.0)
        loss = torch.zeros((), device=x.device)
        grad_x = torch.zeros_like(x) if any(ctx.needs_input_grad) else None
        grad_matrix = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        dtype = F.linear(x[:1], matrix[:1]).dtype  # autocast's dtype, or that of the weights
        x, weight = x.to(dtype), matrix[:vocab_size].to(dtype)  # as autocast would, but once
        for first in range(0, len(x), chunk):
            part = slice(first, first + chunk)
            ids, probs = soft_ids[part], soft_probs[part]
            log_probs = F.linear(x[part], weight).float().log_softmax(-1)
            loss -= (probs * log_probs.gather(-1, ids)).sum()
            if grad_x is not None:
                # d loss / d logits = softmax * sum(probs) - probs, in the memory of log_probs
                grad = log_probs.exp_().mul_(probs.sum(-1, keepdim=True))
                grad = grad.scatter_add_(-1, ids, -probs).to(dtype)
                grad_x[part] = grad @ weight
                if grad_matrix is not None:
                    add_product(grad_matrix[:vocab_size], grad.mT, x[part])
                del grad
            del log_probs  # or it would live until the next chunk's are made
        ctx.save_for_backward(grad_x, grad_matrix)
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x, grad_matrix = ctx.saved_tensors
        return grad_x * grad, None if grad_matrix is None else grad_matrix.mul_(grad), None, None, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place; in a lower precision in slices, because a CPU makes a float32 copy of what it adds."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    rows = 4096 if total.device.type == "cpu" and not torch.compiler.is_compiling() else len(total)
    for part, a_part in zip(total.split(rows), a.split(rows), strict=True):
        part += a_part @ b


def make_embedding(num_rows: int, channels: int) -> nn.Embedding:
    """An embedding; on the meta device without its random numbers, which would import torch's compiler (a second)."""
    weight = torch.empty(num_rows, channels)
    return nn.Embedding.from_pretrained(weight, freeze=False) if weight.is_meta else nn.Embedding(num_rows, channels)


class GPT(nn.Module):
    """Token embedding (gpt2: plus position embedding), `n_layer` blocks, a final norm, and the output layer.

    Training options, set from outside: `activation_checkpointing` recomputes a block's activations in the backward
    pass; `loss_chunk` computes the loss in chunks of this many tokens (0: at once); `document_separator_id` restricts
    attention to documents that end with this token; `lora` names the base of adapters (nanogpt/lora.py).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = make_embedding(config.padded_vocab_size, config.n_embd)
        if config.arch == "gpt2":
            self.position_embedding = make_embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.head = None if config.tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.activation_checkpointing = False
        self.loss_chunk = 0
        self.document_separator_id: int | None = None
        self.lora: dict[str, Any] | None = None
        self.first_rows_hash = ""  # SHA-256 of the first row of each loaded tensor, which ranks compare
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    parameter.copy_(self.initial_value(name, parameter.shape))

    def initial_value(self, name: str, shape: Sequence[int]) -> Tensor:
        """GPT-2's initial value of a parameter, a new tensor: normal with standard deviation 0.02, zero for biases.

        The two layers of each block that write to the residual stream are scaled by 1/√(2 n_layer), so that the
        variance of the stream does not grow with depth.
        """
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        std = 0.02 / math.sqrt(2 * self.config.n_layer) if writes_residual else 0.02
        value = torch.empty(*shape).normal_(std=std)
        if name in ("token_embedding.weight", "head.weight"):
            value[self.config.vocab_size :] = 0.0  # zero rows get zero gradients, so the padding stays zero
        return value

    def muon_params(self) -> dict[str, list[int]]:
        """The blocks' matrices by name, each with the rows of its linear maps.

        Muon orthogonalizes each map separately. qkv stacks three (queries, keys, values); every other matrix is one.
        """
        c = self.config
        qkv_rows = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
        matrices = [(name, p) for name, p in self.blocks.named_parameters("blocks") if p.dim() == 2]
        return {name: qkv_rows if name.endswith("qkv.weight") else [len(p)] for name, p in matrices}

    @property
    def lm_head_weight(self) -> Tensor:
        """The matrix of the output layer, (padded V, C)."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, soft_targets: Sequence[Tensor] | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict each next token.

        idx: (B, T) token ids, T ≤ block_size. targets: (B, T) ids, −1 where the loss ignores a position.
        soft_targets: ids and their probabilities, each (B, T, K), to learn instead of the one id in targets.
        Returns logits (B, T, V; None where the loss is chunked) and the mean cross-entropy in nats (0 without any
        target). Without targets: the last position's logits (B, 1, V), which is all that sampling needs, and None.
        """
        x = self.hidden_states(idx)
        if targets is None:
            return self.logits(self.norm(x[:, -1:])), None
        x = self.norm(x).flatten(0, 1)
        targets = targets.flatten()
        is_target = targets >= 0
        num_targets = is_target.sum().clamp(min=1)
        soft = [t.flatten(0, 1) for t in soft_targets or ()]
        if self.loss_chunk:
            # Drop ignored positions. On a GPU the boolean index would make the host wait.
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                x, targets, *soft = (t[is_target] for t in (x, targets, *soft))
            # Under no_grad too, needs_input_grad would be True for a parameter, and its gradient computed.
            weight = self.lm_head_weight if torch.is_grad_enabled() else self.lm_head_weight.detach()
            arguments = (x, weight, self.config.vocab_size, self.loss_chunk, targets, *soft)
            return None, ChunkedCrossEntropy.apply(*arguments) / num_targets
        logits = self.logits(x)
        return logits.view(*idx.shape, -1), summed_cross_entropy(logits, targets, *soft) / num_targets

    def hidden_states(
        self, idx: Tensor, positions: Tensor | None = None, attention: Sequence[AttentionFn] | None = None
    ) -> Tensor:
        """The last block's output (B, T, C) for ids idx (B, T), before the final norm.

        positions: (B, T); None: 0 to T - 1. attention: a function for each block; None: causal.
        """
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into a context of block_size={self.config.block_size}")
        if self.document_separator_id is not None and attention is None:
            dropout = self.config.dropout if self.training else 0.0
            positions, masked = document_causal_attention(idx, self.document_separator_id, dropout)
            attention = [masked] * self.config.n_layer

        x = self.token_embedding(idx)  # (B, T, C)
        cos_sin = None
        if self.config.arch == "gpt2":
            x = x + (self.position_embedding.weight[:T] if positions is None else self.position_embedding(positions))
        else:
            # (T,) or (B, 1, T): every head has the same.
            rotary_positions = torch.arange(T, device=idx.device) if positions is None else positions[:, None]
            cos_sin = rotary_cos_sin(rotary_positions, self.config)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            attention_fn = attention[i] if attention else None
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos_sin, attention_fn, use_reentrant=False)
            else:
                x = block(x, cos_sin, attention_fn)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) of normalized hidden states (..., C)."""
        padded = F.linear(x, self.token_embedding.weight) if self.head is None else self.head(x)
        return padded[..., : self.config.vocab_size]

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Append max_new_tokens sampled ids to each row of idx (B, T): the plain way, without a KV cache.

        Call `eval()` first. temperature 0 takes the most likely token. sample.py is much faster (nanogpt/generate).
        """
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1].float()  # (B, V)
            if temperature == 0:
                next_id = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth_largest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth_largest, -math.inf)
                next_id = torch.multinomial((logits / temperature).softmax(-1), 1)
            idx = torch.cat((idx, next_id), dim=1)
        return idx

    @classmethod
    def from_tensors(
        cls,
        config: GPTConfig,
        tensors: Mapping[str, Tensor],
        *,
        dropout: float | None = None,
        block_size: int | None = None,
    ) -> "GPT":
        """A model whose parameters are these very tensors; vocabulary rows with or without padding.

        dropout: None for the config's. block_size: a shorter context. Raises RuntimeError for a name or a shape that
        does not fit `config`, ValueError for a block_size beyond its own.
        """
        if dropout is not None:
            config = replace(config, dropout=dropout)
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced at once
            model = cls(config)
        tensors = dict(tensors)  # LazyTensors reads a tensor from disk at every lookup: do it once
        padding = config.padded_vocab_size - config.vocab_size
        for name in ("token_embedding.weight", "head.weight"):
            if padding and name in tensors and len(tensors[name]) == config.vocab_size:
                tensors[name] = F.pad(tensors[name], (0, 0, 0, padding))
        model.load_state_dict(tensors, assign=True)
        if block_size is not None:
            model.crop_block_size(block_size)
        return model

    @classmethod
    def from_pretrained(cls, source: "str | Path", **changes: Any) -> "GPT":
        """Load GPT-2, Llama or Qwen as published or fine-tuned, or nanoGPT's ckpt.pt.

        source: "gpt2-xl", a Hugging Face id or folder, a GGUF file, or a ckpt.pt. changes: dropout and block_size of
        `from_tensors`. Raises InputError for weights that cannot be read or used.
        """
        from nanogpt.interop.huggingface import read_weights

        weights = read_weights(source)
        return cls.from_tensors(GPTConfig(**weights.config), weights.tensors, **changes)

    @classmethod
    def from_checkpoint(cls, path: "str | Path", which: str = "best", **changes: Any) -> "GPT":
        """Load a model that train.py saved.

        path: a run's out_dir or one of its ckpt/step-* folders. which: "best", "latest" or "step-NNNNNN". changes:
        dropout and block_size of `from_tensors`. Raises InputError for a missing or damaged checkpoint.
        """
        from nanogpt import checkpoint

        loaded = checkpoint.load(checkpoint.find(path, which), with_optimizer=False)
        return loaded.build_model(cls, GPTConfig, **changes)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, as when GPT-2 is fine-tuned on shorter rows."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size}: this model's context ends at {self.config.block_size}")
        self.config = replace(self.config, block_size=block_size)
        if self.config.arch == "gpt2":
            rows = self.position_embedding.weight[:block_size].detach().clone()
            self.position_embedding = nn.Embedding.from_pretrained(rows, freeze=False)

    def count_parameters(self) -> int:
        """Parameters without the padding of the vocabulary; a tied output layer counts once."""
        vocab_matrices = 1 if self.head is None else 2
        padding = vocab_matrices * (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, T: int | None = None) -> int:
        """FLOPs of forward and backward for one token in a row of T tokens (default block_size).

        Two per multiply-add; backward twice the forward, for frozen matrices once; attention as the full square.
        """
        c = self.config
        attention = 3 * 2 * 2 * (T or c.block_size) * c.n_head * c.head_dim
        matrices = [(p.requires_grad, p.numel()) for p in self.blocks.parameters() if p.dim() == 2]
        matrices.append((self.lm_head_weight.requires_grad, c.vocab_size * c.n_embd))
        return c.n_layer * attention + sum((6 if trains else 4) * numel for trains, numel in matrices)
