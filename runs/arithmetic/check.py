"""Recompute the figures in docs/optimizations.md, "The mathematics": python runs/arithmetic/check.py

Bytes saved for backward are counted by torch's hooks on what autograd saves, each storage once, without parameters.
Writes results.json beside itself. Half a minute on one core.
"""

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from model import GPT, Block, GPTConfig, rotary_cos_sin, rotate  # noqa: E402
from nanogpt import cpu_kernels, optim  # noqa: E402
from nanogpt.generate.decoder import Decoder  # noqa: E402
from nanogpt.memory import optimizer_state_numel  # noqa: E402

GPT2 = GPTConfig(bias=False)  # 124M
A, B, C = optim.NEWTON_SCHULZ


def block_weights(config: GPTConfig) -> int:
    """Number of weights in a block's matrices."""
    return sum(p.numel() for p in Block(config).parameters() if p.dim() == 2)


def kept_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of `forward` until backward."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor  # stays alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in seen.items() if address not in own)


def attention() -> dict[str, Any]:
    """One layer of 124M on a row of 1,024: bytes kept with the square matrix and without it."""
    T, c = 1024, GPT2
    layer = Block(GPTConfig(n_layer=1, bias=False))
    layer.attention.causal_attention = MethodType(cpu_kernels.causal_attention, layer.attention)
    x = torch.randn(1, T, c.n_embd)
    kept = {}
    usual_limit = cpu_kernels.MAX_PLAIN_ATTENTION
    for name, limit in (("square", T), ("online", 0)):
        cpu_kernels.MAX_PLAIN_ATTENTION = limit
        kept[name] = kept_bytes(layer, lambda: layer(x, None))
    cpu_kernels.MAX_PLAIN_ATTENTION = usual_limit
    per_token = 3 * c.n_layer * 2 * 2 * T * c.n_head * c.head_dim
    whole = GPT(c).flops_per_token()
    return {
        "bytes_of_the_square": 4 * c.n_head * T * T,
        "bytes_kept": kept,
        "share_of_flops": per_token / whole,
        "recomputing_scores_adds": per_token / 6 / whole,
        "flops_per_row": T * whole,
    }


def loss_peak(dtype: torch.dtype) -> float:
    """Peak bytes of the loss, forward and backward, per token and vocabulary entry."""
    N, V, channels = 512, 4096, 4
    x, weight = torch.randn(N, channels, requires_grad=True), torch.randn(V, channels)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight), torch.zeros(N).long())
        loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events)) / N / V


def loss() -> dict[str, Any]:
    """The output layer of 124M: bytes of logits, and its share of the arithmetic."""
    c, tokens = GPT2, 64 * 1024
    small = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32, block_size=256, bias=False))
    x, y = torch.zeros(2, 256, dtype=torch.long), torch.zeros(2, 256, dtype=torch.long)
    kept = {}
    for small.loss_chunk in (0, 64):
        kept[small.loss_chunk] = kept_bytes(small, lambda: small(x, y)[1])
    flops = GPT(c).flops_per_token()
    return {
        "peak_bytes_bfloat16_a_token_and_id": loss_peak(torch.bfloat16),
        "bytes_64_rows": {"whole": 12 * c.vocab_size * tokens, "chunks_of_4096": 12 * c.vocab_size * 4096},
        "logits_alone_bfloat16": 2 * c.vocab_size * tokens,
        "kept_512_tokens": kept,
        "output_layer_share_of_flops": 6 * c.vocab_size * c.n_embd / flops,
        "loss_of_equal_odds": {n: math.log(n) for n in (50257, 50304)},
    }


def polynomial(x: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        x = A * x + B * x**3 + C * x**5
    return x


def muon() -> dict[str, Any]:
    """The effect of the polynomial on singular values, and the cost of five steps relative to a training step."""
    x = np.geomspace(1e-5, 1, 1_000_000)
    reached = {}
    for steps in (1, 3, 5, 7):
        y = polynomial(x, steps)
        reached[steps] = {
            "at_least_0.6_from": float(x[y < 0.6].max()),
            "range_from_0.0014": [float(y[x >= 0.0014].min()), float(y[x >= 0.0014].max())],
        }
    torch.manual_seed(0)
    spectrum = {}
    for shape in ((768, 768), (768, 3072)):
        g = torch.randn(1, *shape)
        values = torch.linalg.svdvals(optim.orthogonalize(g, torch.float32)[0])
        start = torch.linalg.svdvals(g[0] / g[0].norm())
        spectrum["x".join(map(str, shape))] = {
            "before": [start.min().item(), start.max().item()],
            "after": [values.min().item(), values.max().item()],
        }
    fast = {"arch": "modern", "bias": False, "n_layer": 4, "n_head": 3, "n_kv_head": 1, "n_embd": 96, "n_inner": 192}
    costs = {}
    for name, config, tokens in (
        ("124M, 491,520 tokens", GPT2, 491_520),
        ("fast recipe, 1,536 tokens", GPTConfig(vocab_size=65, block_size=64, **fast), 1536),  # type: ignore[arg-type]
    ):
        gpt = GPT(config)
        flops, parameters = 0, dict(gpt.named_parameters())
        for matrix, rows in gpt.muon_params().items():
            for height in rows:
                r, k = sorted((height, parameters[matrix].shape[1]))
                flops += 5 * (4 * r * r * k + 2 * r**3)
        costs[name] = flops / (tokens * gpt.flops_per_token())
    return {
        "slope_to_the_fifth": A**5,
        "sum_of_coefficients": A + B + C,
        "steps": reached,
        "normal_matrices": spectrum,
        "share_of_a_step": costs,
        "state_bytes_124M": {kind: 4 * optimizer_state_numel(GPT(GPT2), kind) for kind in ("adamw", "muon")},
    }


def positions() -> dict[str, Any]:
    """Rotary positions: scores depend only on the distance, lengths are preserved; and the wavelengths."""
    config = GPTConfig(arch="modern", bias=False, n_head=12)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, config.head_dim, dtype=torch.float64)

    def rotated(x: Tensor, at: int) -> Tensor:
        return rotate(x, *rotary_cos_sin(torch.tensor([at], dtype=torch.float64), config))[0]

    scores = [(rotated(q, at + 7) @ rotated(k, at)).item() for at in (0, 1, 100, 900)]
    longest = 2 * math.pi * config.rope_theta ** ((config.head_dim - 2) / config.head_dim)
    return {
        "scores_at_distance_7": scores,
        "length_before_and_after": [q.norm().item(), rotated(q, 500).norm().item()],
        "wavelengths_in_positions": [2 * math.pi, longest],
        "position_table": GPT2.block_size * GPT2.n_embd,
    }


def precision() -> dict[str, Any]:
    """Number formats, and the tensors that stay float32 under autocast."""
    kinds = {}
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        info = torch.finfo(kind)
        kinds[str(kind)] = {"half_a_step": info.eps / 2, "tiny": info.smallest_normal, "max": info.max}
    kinds["torch.float16"]["smallest"] = 2**-24
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=128, block_size=256))
    seen: dict[str, str] = {}
    for name in ("blocks.0", "blocks.0.norm1", "blocks.0.attention.qkv", "blocks.0.mlp.up"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: str(o.dtype)}))
    x = torch.zeros(1, 256, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x, x)
    loss.backward()
    gradient = model.token_embedding.weight.grad
    seen |= {"logits": str(logits.dtype), "loss": str(loss.dtype), "gradient": str(gradient.dtype)}
    one = torch.ones((), dtype=torch.bfloat16)
    return {"formats": kinds, "dtypes": seen, "one_plus_0.001_in_bfloat16": (one + 0.001).item()}


def memory() -> dict[str, Any]:
    """Activation checkpointing on two layers of 124M's width, a row of 1,024; and its arithmetic for 124M."""
    model = GPT(GPTConfig(n_layer=2, bias=False, vocab_size=64))
    x = torch.zeros(1, 1024, dtype=torch.long)
    kept = {}
    for model.activation_checkpointing in (False, True):
        kept[str(model.activation_checkpointing)] = kept_bytes(model, lambda: model.hidden_states(x))
    c, flops = GPT2, GPT(GPT2).flops_per_token()
    blocks = c.n_layer * (2 * block_weights(c) + 2 * 2 * 1024 * c.n_embd)
    per_position = {a: c.n_embd * (14 * a + 8) + 4 * c.n_head + 16 for a in (4, 2)}
    assert abs(kept["False"] / (2 * 1024 * per_position[4]) - 1) < 1e-3, "as counted"
    return {
        "kept_two_layers": kept,
        "per_layer_and_position": per_position,
        "124M_per_token": {a: [12 * n, 12 * 4 * c.n_embd + n] for a, n in per_position.items()},
        "blocks_forward_share": blocks / flops,
    }


def cache() -> dict[str, Any]:
    """Keys and values of 124M."""
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=64))
    decoder = Decoder(gpt)
    counted = decoder.cache.keys.nbytes + decoder.cache.values.nbytes
    c, weights = GPT2, 12 * block_weights(GPT2) + GPT2.vocab_size * GPT2.n_embd
    per_token = 2 * c.n_layer * c.n_kv_head * c.head_dim * 4
    assert counted == 2 * 2 * 2 * 16 * 64 * 4, "layers, keys and values, heads, channels of a head, positions, bytes"
    t = 1000
    return {
        "bytes_per_token": per_token,
        "bytes_1024": 1024 * per_token,
        "flops_of_a_token_at_1000": {
            "with": 2 * weights + 4 * t * c.n_layer * c.n_embd,
            "without": t * (2 * 12 * block_weights(c) + 4 * t * c.n_layer * c.n_embd) + 2 * c.vocab_size * 768,
        },
        "bytes_read_at_1000": {a: a * weights + t * per_token for a in (4, 2)},
    }


def padding() -> dict[str, Any]:
    extra = GPT2.padded_vocab_size - GPT2.vocab_size
    return {"rows": extra, "parameters": extra * GPT2.n_embd, "flops": 6 * extra * 768 / GPT(GPT2).flops_per_token()}


def main() -> None:
    parts = (attention, loss, muon, positions, precision, memory, cache, padding)
    results = {part.__name__: part() for part in parts}
    text = json.dumps(results, indent=1)
    (HERE / "results.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
