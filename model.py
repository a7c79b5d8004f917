"""A GPT in one file: the network, its initialization, and how many parameters and FLOPs it costs.

Two architectures share all code that is the same. `gpt2` is the function of Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", as OpenAI released it. `modern` is that of Qwen3 (Yang et al. 2025): RMS norms, rotary
positions, normed queries and keys, a gated MLP, key heads shared by query heads, no biases.
Needs nothing but torch: copy this file into another project and it runs.

Letters in shapes: B rows, T positions, C = n_embd channels, V = vocab_size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from nanogpt.interop.names import Weights

# What takes the place of attention to all of a row up to here. One continues a text: it keeps the keys and values, and
# attends to all that it has kept (nanogpt/generate/decoder.py). Another is `document_causal_attention`.
# q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim) -> (B, n_head, T, head_dim).
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

# Up to this many positions a CPU attends by three plain operations: level with torch's fused kernel, which computes the
# same function, in float32 and several times faster in bfloat16 (runs/cpu_step, docs/decisions.md).
PLAIN_ATTENTION_UP_TO = 128
# Where documents do not see one another, compiled FlexAttention (Dong et al. 2024) skips what is hidden.
FLEX_ATTENTION_ON = "cuda"


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the network's function; a 0 becomes the size it stands for. Raises ValueError where the
    sizes contradict each other."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257  # the true size; the network pads its own rows
    block_size: int = 1024  # the longest context, in tokens
    bias: bool = True  # in the linear layers and the norms; gpt2 alone has them
    dropout: float = 0.0
    gelu: str = "tanh"  # "tanh" as GPT-2 was trained; "erf" for weights trained with nanoGPT
    arch: str = "gpt2"  # or "modern"
    n_kv_head: int = 0  # heads of keys and values, each read by n_head / n_kv_head query heads; 0: n_head
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd, or as many weights in the gated MLP: 8/3 n_embd, to the next 64
    rope_theta: float = 10000.0  # the longest wavelength of the rotary positions, over 2π
    norm_eps: float = 0.0  # 0: 1e-5 in gpt2, 1e-6 in modern
    tied: bool = True  # whether the token embedding is the output layer too

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        modern = self.arch == "modern"
        if self.arch not in ("gpt2", "modern"):
            raise ValueError(f"arch={self.arch!r}: must be 'gpt2' or 'modern'")
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"gelu={self.gelu!r}: must be 'tanh' or 'erf'")
        if self.n_embd % self.n_head and not (modern and self.head_dim):
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them")
        defaults = {
            "n_kv_head": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "n_inner": -(-8 * self.n_embd // (3 * 64)) * 64 if modern else 4 * self.n_embd,
            "norm_eps": 1e-6 if modern else 1e-5,
        }
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)  # the way past frozen=True
        for name in (*defaults, "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if modern and self.bias:
            raise ValueError("bias=True: arch=modern has no biases; set bias=False")
        for name, only in (("n_kv_head", self.n_head), ("head_dim", self.n_embd // self.n_head), ("tied", True)):
            if not modern and getattr(self, name) != only:
                raise ValueError(f"{name}={getattr(self, name)}: arch=gpt2 has {only}; leave it out or set arch=modern")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}: change one of them")
        if modern and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions cos_sin pairs of channels; make it even")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix products are fastest at multiples of 64. The surplus rows stay zero."""
        return -(-self.vocab_size // 64) * 64


class RMSNorm(nn.RMSNorm):
    """x over its root mean square along the last dimension, times a learned gain (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        return scaled_rms_norm(x, self.weight, self.eps or 0.0)


def scaled_rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`gain`, of any shape that broadcasts to x, times x over its root mean square along the last dimension."""
    if x.device.type == "cpu":
        return CPUNorm.apply(x, gain, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps) * gain


class CPUNorm(torch.autograd.Function):
    """RMS norm whose backward is five passes over memory; torch's own on a CPU takes twice the time (runs/cpu_step)."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        kept = torch.promote_types(x.dtype, gain.dtype)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, gain)
        return (normed * gain).to(kept)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, inverse, gain = ctx.saved_tensors
        along = grad * normed
        radial = (along * gain).mean(-1, keepdim=True)  # what the norm takes out of a change of x
        return (grad * gain).addcmul_(normed, radial, value=-1).mul_(inverse), along.sum_to_size(gain.shape), None


def norm(config: GPTConfig, channels: int) -> nn.Module:
    """The architecture's normalization of the last dimension."""
    if config.arch == "modern":
        return RMSNorm(channels, eps=config.norm_eps)
    return nn.LayerNorm(channels, eps=config.norm_eps, bias=config.bias)


def rotary_cos_sin(positions: Tensor, config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (..., head_dim) for positions (...), by which rotary positions (Su et al. 2021) cos_sin the
    pairs of channels (i, i + head_dim/2); of the sine the first half is negated."""
    channels = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = 1 / config.rope_theta ** (channels / config.head_dim)
    angles = positions[..., None] * frequencies  # radians
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class Attention(nn.Module):
    """Causal self-attention: each position gathers from itself and those before it, n_head times in parallel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.dropout, self.eps = config.dropout, config.norm_eps
        heads = config.n_head + 2 * config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.bias)
        if config.arch == "modern":
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, eps=config.norm_eps) for _ in range(2))
        self.out = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention: AttentionFn | None = None) -> Tensor:
        B, T, _ = x.shape
        plain = x.device.type == "cpu" and T <= PLAIN_ATTENTION_UP_TO and attention is None
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).permute(2, 0, 1, 3)  # (heads, B, T, head_dim)
        if plain:
            qkv = qkv.contiguous()  # one copy here, instead of several in what follows and in its backward
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head))
        if cos_sin is not None:  # arch=modern
            gains = self.q_norm.weight.expand(self.n_head, -1), self.k_norm.weight.expand(self.n_kv_head, -1)
            qk = rotate(scaled_rms_norm(qk, torch.cat(gains)[:, None, None], self.eps), *cos_sin)
        q, k = qk.split((self.n_head, self.n_kv_head))
        dropout = self.dropout if self.training else 0.0
        if plain:
            return self.out(plain_attention(q, k, v, dropout))
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (B, heads, T, head_dim)
        if attention is not None:
            return self.out(attention(q, k, v).transpose(1, 2).reshape(B, T, -1))
        shared = self.n_kv_head < self.n_head
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shared)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def document_causal_attention(idx: Tensor, end_of_text: int, dropout: float) -> tuple[Tensor, AttentionFn]:
    """For rows idx (B, T) of documents that each end with the id end_of_text: the ids' positions (B, T) in their own
    documents, and causal attention that does not leave these."""
    (B, T), at = idx.shape, torch.arange(idx.shape[1], device=idx.device)
    begins = F.pad(idx[:, :-1] == end_of_text, (1, 0), value=True)
    first = torch.where(begins, at, 0).cummax(1).values  # (B, T): where each one's document begins
    if idx.device.type == FLEX_ATTENTION_ON and torch.compiler.is_compiling() and not dropout:
        from torch.nn.attention import flex_attention as flex

        blocks = flex.create_block_mask(lambda b, h, q, k: (k >= first[b, q]) & (k <= q), B, None, T, T, idx.device)
        return at - first, lambda q, k, v: flex.flex_attention(q.type_as(v), k.type_as(v), v, None, blocks, None, True)
    visible = ((at >= first[..., None]) & (at <= at[:, None]))[:, None]  # (B, 1, T, T): query, key
    return at - first, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, visible, dropout, enable_gqa=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, head_dim), turned by what `rotary_cos_sin` has made for its positions."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / √head_dim) v under the causal mask. q: (n_head, B, T, head_dim); k and v: (n_kv_head, B, T,
    head_dim). Returns (B, T, n_head · head_dim)."""
    (n_head, B, T, head_dim), n_kv_head = q.shape, len(k)
    group = n_head // n_kv_head  # query heads of one key head: to it they are so many more positions
    q = q.view(n_kv_head, group, B, T, head_dim).transpose(1, 2).reshape(-1, group * T, head_dim)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (n_kv_head · B, T, head_dim)
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
    weights = torch.baddbmm(future, q, k.mT, alpha=head_dim**-0.5).softmax(-1)  # (n_kv_head · B, group · T, T)
    y = (F.dropout(weights, dropout) @ v).view(n_kv_head, B, group, T, head_dim)
    return y.permute(1, 3, 0, 2, 4).reshape(B, T, n_head * head_dim)


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
    """SwiGLU (Shazeer 2020): one wide layer decides how much of the other passes."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each read from a normalized copy and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = norm(config, config.n_embd)
        self.attention = Attention(config)
        self.norm2 = norm(config, config.n_embd)
        self.mlp = GatedMLP(config) if config.arch == "modern" else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, attention: AttentionFn | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cos_sin, attention))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Token embedding (gpt2: and position embedding), `n_layer` blocks, a last norm, and the output layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.arch == "gpt2":
            self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = norm(config, config.n_embd)
        self.activation_checkpointing = False  # keep only the blocks' inputs for backward, and compute the rest again
        self.end_of_text: int | None = None  # given, documents that end with it do not see one another
        self.loss_chunk = 0  # tokens whose logits exist at a time where there are targets; 0: all
        self.head = None if config.tied else nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """GPT-2's start: normal weights of deviation 0.02, zero biases, and the two layers of each block that write to
        the residual stream scaled by 1/√(2 n_layer), so that its variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer) if writes_residual else 0.02)
        # Zero rows get zero gradients, so padding stays zero for ever.
        self.tokens.weight[self.config.vocab_size :].zero_()
        self.lm_head_weight[self.config.vocab_size :].zero_()

    def muon_params(self) -> dict[str, list[int]]:
        """Names of the blocks' matrices, which Muon can train, each with the rows of the maps that it is made of."""
        c = self.config
        heads = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        matrices = {name: p for name, p in self.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
        return {name: heads if name.endswith("qkv.weight") else [len(p)] for name, p in matrices.items()}

    @property
    def lm_head_weight(self) -> Tensor:
        """The matrix that makes logits of channels, (padded V, C)."""
        return self.tokens.weight if self.head is None else self.head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Predict each next token.

        idx: (B, T) token ids, T ≤ block_size. targets: (B, T) ids, −1 where the loss shall not look.
        Returns logits (B, T, V; None where the loss is made in chunks) and the mean cross-entropy in nats (0 of none);
        without targets only the last position's logits (B, 1, V), which is all that sampling reads, and None.
        """
        x = self.hidden_states(idx)
        x = self.norm(x if targets is not None else x[:, -1:])
        if targets is None:
            return self.logits(x), None
        x, targets, count = x.flatten(0, 1), targets.flatten(), (targets >= 0).sum().clamp(min=1)
        if self.loss_chunk:
            return None, self.chunked_loss(x, targets) / count
        logits = self.logits(x)
        loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        return logits.view(*idx.shape, -1), loss / count

    def hidden_states(
        self, idx: Tensor, positions: Tensor | None = None, attention: Sequence[AttentionFn] | None = None
    ) -> Tensor:
        """What the last block gives for the ids idx (B, T), of shape (B, T, C).

        positions: (B, T) of the ids in their rows; None: from 0 on. attention: one for each block (see `AttentionFn`).
        """
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into a context of block_size={self.config.block_size}")
        if self.end_of_text is not None and attention is None:
            positions, inside = document_causal_attention(idx, self.end_of_text, self.config.dropout * self.training)
            attention = [inside] * self.config.n_layer
        x, cos_sin = self.tokens(idx), None  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + (self.positions.weight[:T] if positions is None else self.positions(positions))
        else:
            cos_sin = rotary_cos_sin(
                torch.arange(T, device=idx.device) if positions is None else positions, self.config
            )
        x = self.dropout(x)
        attends: Sequence[AttentionFn | None] = attention or [None] * self.config.n_layer
        for block, attend in zip(self.blocks, attends, strict=True):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, cos_sin, attend, use_reentrant=False)
            else:
                x = block(x, cos_sin, attend)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """(..., V) of the last norm's (..., C)."""
        made = F.linear(x, self.tokens.weight) if self.head is None else self.head(x)
        return made[..., : self.config.vocab_size]

    def chunked_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The summed cross-entropy of x (tokens, C), `loss_chunk` tokens at a time; backward remakes their logits."""

        def loss(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(x), targets, ignore_index=-1, reduction="sum")

        chunks = zip(x.split(self.loss_chunk), targets.split(self.loss_chunk), strict=True)
        return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    @classmethod
    def from_tensors(cls, config: GPTConfig, tensors: dict[str, Tensor]) -> "GPT":
        """A model whose parameters are these very tensors, by our names; the vocabulary's rows with or without padding.

        Raises RuntimeError where a name or a shape does not fit `config`.
        """
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(config)
        for name in ("tokens.weight", "head.weight"):
            padding = config.padded_vocab_size - config.vocab_size
            if padding and name in tensors and len(tensors[name]) == config.vocab_size:
                tensors = tensors | {name: F.pad(tensors[name], (0, 0, 0, padding))}
        model.load_state_dict(tensors, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls, source: "str | Path | Weights", *, dropout: float | None = None, block_size: int | None = None
    ) -> "GPT":
        """GPT-2 or Qwen3 as published or fine-tuned ("gpt2-xl", a Hugging Face id or folder), or nanoGPT's ckpt.pt.

        source: its name, or the `Weights` that nanogpt/interop has read. dropout: default as stored.
        block_size: a shorter context. Raises InputError where the weights cannot be had or used, ValueError for a
        block_size beyond theirs.
        """
        from nanogpt.interop.huggingface import read_weights
        from nanogpt.interop.names import Weights

        weights = source if isinstance(source, Weights) else read_weights(source)
        changes = {} if dropout is None else {"dropout": dropout}
        model = cls.from_tensors(GPTConfig(**weights.config | changes), weights.tensors)
        if block_size is not None:
            model.crop_block_size(block_size)
        return model

    @classmethod
    def from_checkpoint(
        cls, path: "str | Path", which: str = "best", *, dropout: float | None = None, block_size: int | None = None
    ) -> "GPT":
        """A model that train.py saved. path: a run's out_dir or one of its ckpt/step-* folders. which: "best", "latest"
        or "step-NNNNNN". dropout and block_size as in `from_pretrained`. Raises InputError where there is none, or it
        is damaged."""
        from nanogpt import checkpoint

        found = checkpoint.load(checkpoint.find(path, which), with_optimizer=False)
        changes = {} if dropout is None else {"dropout": dropout}
        model = cls.from_tensors(GPTConfig(**found.state["model"] | changes), found.model)
        if block_size is not None:
            model.crop_block_size(block_size)
        return model

    def count_parameters(self) -> int:
        """Parameters by formula: true rows only, a tied output layer counted once."""
        c = self.config
        modern, norms = c.arch == "modern", (2 * c.n_layer + 1) * c.n_embd
        embeddings = c.vocab_size * c.n_embd * (1 if c.tied else 2) + (0 if modern else c.block_size * c.n_embd)
        head_norms = 2 * c.n_layer * c.head_dim if modern else 0
        biases = norms + c.n_layer * (5 * c.n_embd + c.n_inner) if c.bias else 0
        return embeddings + c.n_layer * self.block_weights() + norms + head_norms + biases

    def block_weights(self) -> int:
        """Numbers in a block's matrices."""
        c = self.config
        heads, wide = 2 * c.n_head + 2 * c.n_kv_head, 3 if c.arch == "modern" else 2
        return c.n_embd * (heads * c.head_dim + wide * c.n_inner)

    def flops_per_token(self, T: int | None = None) -> int:
        """FLOPs of forward and backward for one token in a row of T (default block_size): two per multiply-add, the
        backward pass twice the forward, attention counted as the full square (as published figures are)."""
        c, T = self.config, T or self.config.block_size
        layer = 2 * self.block_weights() + 2 * 2 * T * c.n_head * c.head_dim
        return 3 * (c.n_layer * layer + 2 * c.vocab_size * c.n_embd)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, as when GPT-2 is fine-tuned on shorter rows."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size}: this model's context ends at {self.config.block_size}")
        self.config = replace(self.config, block_size=block_size)
        if self.config.arch == "modern":
            return
        self.positions = nn.Embedding.from_pretrained(self.positions.weight[:block_size].detach().clone(), freeze=False)
