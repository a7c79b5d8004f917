"""A trained model against the lowest loss that its source allows, which is computed exactly."""

import math
from pathlib import Path

import numpy as np
import torch
from conftest import Run, metrics
from small_data import LETTERS, Source, write_letters

from model import GPT
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import EvalWindows


def test_trained_model_reaches_the_loss_of_its_source_and_no_less(run: Run, source: Source):
    write_letters(Path("text"), source, train=200_000, val=40_001)
    keys = {"n_embd": 32, "batch_size": 32, "beta2": 0.99, "max_iters": 700, "lr_decay_iters": 700, "warmup_iters": 20}
    run(dataset="text", out_dir="out", eval_interval=700, eval_iters=0, log_interval=100, **keys)
    ((val_loss,),) = metrics("out", "val_loss")[-1:]

    x, y = EvalWindows(open_dataset("text", block_size=16).val, 16, 0, 1, len(LETTERS))[0:10_000]
    assert x.numel() == 40_000
    best = source.loss(x.numpy(), y.numpy())
    with torch.no_grad():
        logits = GPT.from_checkpoint("out").eval()(x, y)[0]
    losses = -torch.gather(logits.log_softmax(-1), 2, y[..., None]).squeeze(-1).double().numpy()
    assert abs(val_loss - losses.mean()) < 1e-5  # evaluation is the mean over every token of the split

    print(f"loss over the source's own: {val_loss / best.mean():.4f}")  # which runs/oracles/run.py reads
    excess = losses - best
    error = excess.std() / math.sqrt(excess.size)
    assert error < 0.002 * best.mean()
    assert -4 * error < val_loss - best.mean() < 0.01 * best.mean()
    # The task is not trivial: knowing only the last letter costs far more.
    assert -np.log(source.first_order()[x, y]).mean() > 1.2 * best.mean()
