"""Sampling against transformers' filters, and its independence of batches and rounding."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.generate.sampling import Sampling, filtered_probs, sample_tokens, to_tokens, window_start

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0])
CHI_SQUARED_999 = {5: 18.47, 4: 16.27, 3: 13.82, 2: 10.83, 1: 1e-6}  # exceeded once in a thousand, by ids left


def transformers_probs(sampling: Sampling) -> Tensor:
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
    return transformers.LogitsProcessorList(warpers)(torch.zeros(1, 1), LOGITS[None]).softmax(-1)[0]


def all_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """`filtered_probs` of every id, normalized."""
    probs, ids = filtered_probs(logits, sampling)
    if ids is not None:
        probs = torch.zeros_like(logits).scatter(-1, ids, probs)
    return probs / probs.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=2.0, top_k=5),
        Sampling(top_k=3),
        Sampling(top_p=0.8),
        Sampling(min_p=0.3),
        Sampling(temperature=1.5, top_k=4, top_p=0.9, min_p=0.2),
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(top_k=100, top_p=0.9),
    ],
    ids=str,
)
def test_sampling_has_the_frequencies_of_transformers_filters(sampling: Sampling):
    expected = transformers_probs(sampling)
    both = all_probs(torch.stack([LOGITS, LOGITS.flip(0)]), sampling)
    assert (both[0] - expected).abs().max() < 1e-6
    assert (both[1] - both[0].flip(0)).abs().max() < 1e-6

    count = 20_000
    samples, positions = zip(*((i // 100, i % 100) for i in range(count)), strict=True)
    ids = sample_tokens(LOGITS.expand(count, -1), sampling, samples, positions)
    counts, expected = torch.bincount(ids, minlength=5), count * expected
    assert counts[expected == 0].sum() == 0
    chi_squared = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_squared < CHI_SQUARED_999[int((expected > 0).sum())]


def test_sampling_depends_on_seed_sample_and_position_alone():
    sampling = Sampling(seed=7)
    samples = [sample for sample in range(5) for _ in range(40)]
    positions = [*range(40)] * 5
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    ids = sample_tokens(logits, sampling, samples, positions)
    assert torch.equal(sample_tokens(logits.flip(0), sampling, samples[::-1], positions[::-1]), ids.flip(0))
    for i in range(0, 200, 7):
        assert sample_tokens(logits[i : i + 1], sampling, [samples[i]], [positions[i]]) == ids[i]

    alike = logits[:1].expand(200, -1)
    ids = sample_tokens(alike, sampling, samples, positions)
    next_samples, next_positions = [n + 5 for n in samples], [n + 40 for n in positions]
    for args in (
        (Sampling(seed=8), samples, positions),
        (sampling, next_samples, positions),
        (sampling, samples, next_positions),
    ):
        assert (sample_tokens(alike, *args) == ids).float().mean() < 0.3


def test_sampling_is_greedy_at_temperature_0():
    rows = torch.tensor([[1.0, 3.0, 2.0], [9e4, 0.0, -9e4]])
    for sampling in (
        Sampling(temperature=0),
        Sampling(temperature=1e-3),
        Sampling(temperature=1e-45),  # 1 / 1e-45 overflows
        Sampling(temperature=0, top_k=2, top_p=0.5),
    ):
        assert sample_tokens(rows, sampling, [0, 1], [0, 0]).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_sampling_stays_below_vocab_size(temperature: float):
    rows = torch.tensor([[2.0, 3.0, 1.0], [-9e4, 0.0, 9e4]]).repeat(100, 1)
    ids = sample_tokens(rows, Sampling(temperature, vocab_size=2), range(200), [0] * 200)
    assert set(ids.tolist()) <= {0, 1}


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_k=2, top_p=0.99), Sampling(top_k=2, min_p=0.5)])
def test_top_k_keeps_no_more_of_equal_logits(sampling: Sampling):
    assert (all_probs(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), sampling) > 0).sum() == 2


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=4), Sampling(top_p=0.9), Sampling(top_k=4, min_p=0.1)])
def test_sampling_is_stable_under_rounding(sampling: Sampling):
    """Rounding may change which of two tokens is more probable, as between cached and uncached logits."""
    one = torch.tensor([[1.0, 1.00001, 1.0, 0.5, -2.0]]).expand(500, -1)
    other = torch.tensor([[1.00001, 1.0, 1.00001, 0.5, -2.0]]).expand(500, -1)
    ids, other_ids = (sample_tokens(logits, sampling, range(500), [0] * 500) for logits in (one, other))
    assert (ids != other_ids).sum() <= 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=2, top_p=0.9)])
def test_sampling_refuses_logits_that_are_not_finite(sampling: Sampling, bad: float):
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    with pytest.raises(InputError, match="--dtype=float32"):
        sample_tokens(logits, sampling, [0, 1, 2], [0, 0, 0])


def test_tokens_have_logprobs_of_the_unscaled_logits():
    logprobs = LOGITS.log_softmax(-1).tolist()
    bare, token, all_five = (to_tokens(torch.tensor([3]), LOGITS[None], n)[0] for n in (None, 2, 9))
    assert bare == (3, None, ())
    assert (token.id, token.logprob) == (3, pytest.approx(logprobs[3]))
    assert dict(token.top_logprobs) == pytest.approx({0: logprobs[0], 3: logprobs[3]})
    assert [id for id, _ in all_five.top_logprobs] == [0, 3, 2, 1, 4]


def test_window_keeps_the_last_half_when_the_context_is_full():
    """A context of 8: full at 8 tokens; with the ninth the last four are kept."""
    assert [window_start(n, 8) for n in range(1, 15)] == [0] * 8 + [5] * 5 + [10]
    for block_size in (1, 2, 3, 7, 64):
        length = 0
        for n in range(1, 300):
            length = length + 1 if length < block_size else max(1, block_size // 2)
            assert n - window_start(n, block_size) == length
