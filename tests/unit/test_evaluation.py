"""eval_batch_size: the rows of an evaluation's forward pass."""

import numpy as np
import pytest
import torch

from nanogpt.data.rows import EvalWindows
from nanogpt.distributed import World
from nanogpt.evaluation import eval_batch_size


@pytest.mark.parametrize(
    ("device", "block_size", "vocab_size", "micro_batch", "expected"),
    [
        ("cpu", 64, 65, 24, 64),  # 4,096 tokens
        ("cpu", 64, 65, 100, 100),  # never less than in training
        ("cpu", 16, 65_536, 2, 8),  # 2**23 logits
        ("cpu", 512, 65_536, 2, 2),  # not even one row
        ("cpu", 256, 65, 2, 15),  # of the 31 windows, shared by two ranks
        ("cuda", 64, 65, 24, 24),
    ],
)
def test_small_passes_become_larger_on_a_cpu(
    device: str, block_size: int, vocab_size: int, micro_batch: int, expected: int
):
    windows = EvalWindows(np.zeros(8000, np.uint16), block_size, 0, 1, vocab_size)
    world = World(0, 2 if block_size == 256 else 1, torch.device(device), torch.float32)
    assert eval_batch_size(windows, micro_batch, world) == expected
