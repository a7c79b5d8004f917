"""train_step: on a device whose values the host cannot read, so that nothing in a step can wait for a GPU."""

from typing import Any

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.data.dataset import Shard, Tokens
from nanogpt.data.ngrams import NgramTargets
from nanogpt.data.rows import Rows, StepBatch
from nanogpt.distributed import World
from nanogpt.guard import UpdateGuard
from nanogpt.layer_stats import LayerStats
from nanogpt.optim import Optimizer
from train import train_step

META = torch.device("meta")
VOCAB = 9
T = 16


def make_rows(ngram_targets: int, is_masked: bool) -> Rows:
    ids = np.random.default_rng(0).integers(VOCAB, size=1000)
    mask = (ids > 2).astype(np.uint8)
    tokens = Tokens([Shard("memory", 1000, lambda: ids, (lambda: mask) if is_masked else None)])
    ngrams = NgramTargets(tokens, ngram_targets, VOCAB) if ngram_targets else None
    return Rows(tokens, T, VOCAB, seed=1, soft_targets=ngrams)


@pytest.mark.parametrize(
    ("arch", "optimizer", "ngram_targets", "options"),
    [
        ("gpt2", "adamw", 0, {}),
        ("modern", "muon", 3, {"document_separator_id": 3, "activation_checkpointing": True, "loss_chunk": T}),
    ],
)
def test_step_reads_no_value_from_the_device(arch: str, optimizer: str, ngram_targets: int, options: dict[str, Any]):
    world = World(0, 1, META, torch.float32)
    with META:
        sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": VOCAB, "block_size": T}
        model = GPT(GPTConfig(arch=arch, bias=False, dropout=0.1, **sizes))
    for name, value in options.items():
        setattr(model, name, value)
    guard = UpdateGuard(META, max_bad_steps=1, spike_threshold=5.0)
    layer_stats = LayerStats(dict(model.named_parameters()), grad_clip=1.0)
    layer_stats.is_due = True
    stats = train_step(
        model,
        StepBatch(make_rows(ngram_targets, is_masked=bool(options)), 0, 8, 4, world, seed=1, step=0, dropout=0.1),
        Optimizer(model, world, kind=optimizer, learning_rate=1e-3),
        torch.amp.GradScaler("cuda", enabled=False),
        guard,
        world,
        lr_scale=1.0,
        grad_clip=1.0,
        layer_stats=layer_stats,
    )
    assert stats.to_tensor().device == META
    with pytest.raises(RuntimeError, match="meta"):  # as any read within the step would have
        stats.loss.item()
