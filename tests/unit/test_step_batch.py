"""StepBatch: however a step's rows are split over ranks and micro-batches, its loss and gradients are the same."""

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.data.dataset import Shard, Tokens
from nanogpt.data.rows import Rows, StepBatch
from nanogpt.distributed import World

VOCAB = 50
T = 16


def make_rows(is_masked: bool) -> Rows:
    random = np.random.default_rng(0)
    ids = random.integers(VOCAB, size=1000)
    mask = (random.random(1000) < np.repeat([0.9, 0.0, 0.1, 0.5], 250)).astype(np.uint8)
    return Rows(Tokens([Shard("memory", 1000, lambda: ids, (lambda: mask) if is_masked else None)]), T, VOCAB, seed=1)


def make_batch(rows: Rows, rank: int, size: int, micro_batch: int, dropout: float = 0.0) -> StepBatch:
    """The rank's rows of the step that begins at row 24 and has 12 rows."""
    world = World(rank, size, torch.device("cpu"), torch.float32)
    return StepBatch(rows, 24, 12, micro_batch, world, seed=3, step=2, dropout=dropout)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("size", "micro_batch"), [(1, 12), (1, 3), (2, 6), (2, 2), (4, 1)])
def test_every_target_weighs_the_same(size: int, micro_batch: int, is_masked: bool):
    rows = make_rows(is_masked)
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=VOCAB, block_size=T))
    expected = model(*rows[24:36])[1]
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = 0.0
    for rank in range(size):
        batch = make_batch(rows, rank, size, micro_batch)
        batches = list(batch.micro_batches())
        assert batch.last == len(batches) - 1
        assert {len(x) for x, *_ in batches} == {micro_batch}
        for x, y, _, weight in batches:
            micro_loss = model(x, y)[1] * weight / size  # DistributedDataParallel averages over the ranks
            micro_loss.backward()
            loss += micro_loss.item()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_soft_targets_are_made_of_the_inputs_and_targets():
    rows = make_rows(True)
    rows.soft_targets = lambda x, y: (x[..., None], y[..., None].float())
    for x, y, soft_targets, _ in make_batch(rows, 1, 2, 3).micro_batches():
        assert soft_targets is not None
        assert torch.equal(soft_targets[0][..., 0], x)
        assert torch.equal(soft_targets[1][..., 0], y.float())


def test_a_step_without_targets_has_weight_zero():
    mask = np.zeros(1000, np.uint8)
    rows = Rows(Tokens([Shard("memory", 1000, lambda: np.zeros(1000, np.uint16), lambda: mask)]), T, VOCAB, seed=1)
    assert [weight for *_, weight in make_batch(rows, 0, 1, 6).micro_batches()] == [0, 0]


def test_dropout_noise_depends_on_seed_step_micro_batch_and_rank():
    def draw(rank: int, i: int) -> float:
        make_batch(make_rows(False), rank, 2, 3, dropout=0.1).seed_dropout(i)
        return torch.rand(()).item()

    noise = [draw(rank, i) for rank in (0, 1) for i in (0, 1)]
    assert len(set(noise)) == 4
    torch.manual_seed(99)
    assert [draw(rank, i) for rank in (0, 1) for i in (0, 1)] == noise
    before = torch.random.get_rng_state()
    make_batch(make_rows(False), 0, 1, 3).seed_dropout(0)  # without dropout nothing is seeded, which takes time
    assert torch.equal(torch.random.get_rng_state(), before)
