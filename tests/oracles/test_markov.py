"""Learning measured against what can be known: a source whose own loss on the same tokens is computed exactly."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from conftest import LETTERS, Run, Source

from model import GPT
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import EvalWindows
from nanogpt.data.write import write_dataset
from nanogpt.text.tokenizer import Tokenizer


def test_a_trained_model_knows_what_can_be_known_and_no_more(run: Run, source: Source):
    splits = {"train": [source.draw(200_000)], "val": [source.draw(40_001)]}
    write_dataset("text", splits, Tokenizer.characters(LETTERS))
    keys = {"n_embd": 32, "batch_size": 32, "beta2": 0.99, "max_iters": 700, "lr_decay_iters": 700, "warmup_iters": 20}
    run(dataset="text", out_dir="out", **keys, learning_rate=1e-2, eval_interval=700, eval_iters=0, log_interval=100)
    val_loss = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])["val_loss"]

    x, y = EvalWindows(open_dataset("text", block_size=16).val, 16, 0, 1, 4)[0:10_000]
    assert x.numel() == 40_000
    best = source.loss(x.numpy(), y.numpy())
    logits = GPT.from_checkpoint("out").eval()(x, y)[0].detach()
    ours = -torch.gather(logits.log_softmax(-1), 2, y[..., None]).squeeze(-1).double().numpy()
    assert abs(val_loss - ours.mean()) < 1e-5  # evaluation is the mean over every token of the split

    excess = ours - best
    error = excess.std() / math.sqrt(excess.size)
    print(f"loss over the source's own: {val_loss / best.mean():.5f}")
    assert val_loss < 1.01 * best.mean()
    assert val_loss > best.mean() - 4 * error
    assert error < 0.002 * best.mean()  # so the bound from below is one
    # The task is not trivial: who looks at one letter alone, or at none, is far off.
    one = -np.log((np.einsum("ab,abc->bc", source.pairs, source.odds) / source.pairs.sum(0)[:, None])[x, y])
    assert one.mean() > 1.2 * best.mean()
