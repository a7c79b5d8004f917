"""GPT-2 in one file: the network, its initialisation, and how many parameters and FLOPs it costs.

The function of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", as OpenAI released it.
Needs nothing but torch: copy this file into another project and it runs.

Letters in shapes: B rows, T positions, C = n_embd channels, V = vocab_size.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from nanogpt.pretrained import Weights

# Up to this many positions a CPU attends by three plain operations: level with torch's fused kernel, which computes the
# same function, in float32 and several times faster in bfloat16 (runs/cpu_step, docs/decisions.md).
PLAIN_ATTENTION_UP_TO = 128


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the network's function. Raises ValueError where the sizes contradict each other."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    vocab_size: int = 50257  # the true size; the network pads its own rows
    block_size: int = 1024  # the longest context, in tokens
    bias: bool = True  # in the linear layers and the norms
    dropout: float = 0.0
    gelu: str = "tanh"  # "tanh" as GPT-2 was trained; "erf" for weights trained with nanoGPT

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them")
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"gelu={self.gelu!r}: must be 'tanh' or 'erf'")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix products are fastest at multiples of 64. The surplus rows stay zero."""
        return -(-self.vocab_size // 64) * 64


class Attention(nn.Module):
    """Causal self-attention: each position gathers from itself and those before it, n_head times in parallel."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head_dim)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and T <= PLAIN_ATTENTION_UP_TO:
            y = plain_attention(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """softmax(q kᵀ / √head_dim) v under the causal mask, all (B, n_head, T, head_dim)."""
    T, head_dim = q.shape[-2:]
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q_heads, k_heads, v_heads = (t.flatten(0, 1) for t in (q, k, v))  # (B · n_head, T, head_dim)
    scores = torch.baddbmm(future, q_heads, k_heads.transpose(1, 2), alpha=head_dim**-0.5)
    return (F.dropout(scores.softmax(-1), dropout) @ v_heads).view_as(q)


class MLP(nn.Module):
    """Two linear layers, four times wider in between."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """One layer: attention, then the MLP, each read from a normalised copy and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Token and position embeddings, `n_layer` blocks, a last norm, and the token embedding again as output layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
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

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Predict each next token.

        idx: (B, T) token ids, T ≤ block_size. targets: (B, T) ids, −1 where the loss shall not look.
        Returns logits (B, T, V) and the mean cross-entropy in nats; without targets only the last position's logits
        (B, 1, V), which is all that sampling reads, and None.
        """
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit into a context of block_size={self.config.block_size}")
        x = self.dropout(self.tokens(idx) + self.positions.weight[:T])  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x if targets is not None else x[:, -1:])
        logits = F.linear(x, self.tokens.weight)[..., : self.config.vocab_size]
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @classmethod
    def from_tensors(cls, config: GPTConfig, tensors: dict[str, Tensor]) -> "GPT":
        """A model whose parameters are these very tensors, by our names; `tokens.weight` with or without padding.

        Raises RuntimeError where a name or a shape does not fit `config`.
        """
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = cls(config)
        rows = tensors.get("tokens.weight")
        if rows is not None and len(rows) == config.vocab_size:
            padding = config.padded_vocab_size - config.vocab_size
            tensors = tensors | {"tokens.weight": F.pad(rows, (0, 0, 0, padding))}
        model.load_state_dict(tensors, assign=True)
        return model

    @classmethod
    def from_pretrained(
        cls, source: "str | Path | Weights", *, dropout: float | None = None, block_size: int | None = None
    ) -> "GPT":
        """GPT-2 as published or fine-tuned (a size like "gpt2-xl", a Hugging Face id or folder), or nanoGPT's ckpt.pt.

        source: its name, or what `read_weights` of nanogpt/pretrained.py has made of it. dropout: default as stored.
        block_size: a shorter context. Raises InputError where the weights cannot be had or used, ValueError for a
        block_size beyond theirs.
        """
        from nanogpt.pretrained import Weights, read_weights

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
        """Parameters by formula: true rows only, the tied output layer counted once."""
        c = self.config
        C, norms = c.n_embd, 2 * c.n_layer + 1
        weights = (c.vocab_size + c.block_size) * C + c.n_layer * 12 * C * C + norms * C
        return weights + (9 * c.n_layer * C + norms * C if c.bias else 0)

    def flops_per_token(self, T: int | None = None) -> int:
        """FLOPs of forward and backward for one token in a row of T (default block_size): two per multiply-add, the
        backward pass twice the forward, attention counted as the full square (as published figures are)."""
        c, T = self.config, T or self.config.block_size
        layer = 2 * 12 * c.n_embd**2 + 2 * 2 * T * c.n_embd
        return 3 * (c.n_layer * layer + 2 * c.vocab_size * c.n_embd)

    def training_bytes(self, B: int, T: int, activation_bytes: int) -> int:
        """Memory of a training step in bytes, estimated: weights, gradients, AdamW's two moments, and what backward
        reads of B rows of T positions, at `activation_bytes` per number (4 in float32, 2 in mixed precision)."""
        c, a = self.config, activation_bytes
        layer = c.n_embd * (25 * a + 2 * 4)  # per position, as measured; the residual stream is float32 throughout
        logits = c.vocab_size * (a + 4 + 4)
        return 16 * self.count_parameters() + B * T * (c.n_layer * layer + logits)

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, as when GPT-2 is fine-tuned on shorter rows."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size}: this model's context ends at {self.config.block_size}")
        self.config = replace(self.config, block_size=block_size)
        self.positions = nn.Embedding.from_pretrained(self.positions.weight[:block_size].detach().clone(), freeze=False)
