"""NgramTargets: against counting in dictionaries, one context at a time."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from nanogpt.data import ngrams
from nanogpt.data.dataset import Shard, Tokens
from nanogpt.data.ngrams import MIN_COUNT, NgramTargets
from nanogpt.errors import InputError

VOCAB = 12
TEXT = np.random.default_rng(0).zipf(1.5, 3000).clip(max=VOCAB).astype(np.uint16) - 1


def count(ids: list[int], order: int) -> dict[tuple[int, ...], Counter[int]]:
    """The successors of each context of up to order - 1 ids, and how often each was seen."""
    successors: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for length in range(order):
        for first in range(len(ids) - length):
            successors[tuple(ids[first : first + length])][ids[first + length]] += 1
    return successors


def distribution(successors: dict[tuple[int, ...], Counter[int]], context: tuple[int, ...]) -> np.ndarray:
    """The rule of Witten and Bell for one context, from its longest end that was seen often enough."""
    if not context:
        counts = np.array([successors[()][id] for id in range(VOCAB)])
        return counts / counts.sum()
    shorter = distribution(successors, context[1:])
    followers = successors.get(context, Counter())
    if followers.total() < MIN_COUNT:
        return shorter
    counts = np.array([followers[id] for id in range(VOCAB)])
    return (counts + len(followers) * shorter) / (counts.sum() + len(followers))


def dense(targets: NgramTargets, x: torch.Tensor) -> torch.Tensor:
    ids, probs = targets.look_up(x)
    return torch.zeros(*x.shape, targets.vocab_size).scatter_add(-1, ids, probs)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_are_those_of_counting(monkeypatch: pytest.MonkeyPatch, order: int):
    monkeypatch.setattr(ngrams, "NUM_CANDIDATES", 4 * VOCAB)  # so that none is dropped
    targets = NgramTargets(Tokens.of(TEXT), order, VOCAB)
    successors = count(TEXT.tolist(), order)
    torch.manual_seed(0)
    x = torch.cat((torch.from_numpy(TEXT[:600].astype(np.int64)).view(20, 30), torch.randint(VOCAB, (20, 30))))
    actual = dense(targets, x)
    for row, ids in enumerate(x.tolist()):
        for t in range(len(ids)):
            context = tuple(ids[max(t + 2 - order, 0) : t + 1])
            np.testing.assert_allclose(actual[row, t], distribution(successors, context), atol=1e-5)


def test_what_is_not_stored_goes_to_the_token_that_follows(monkeypatch: pytest.MonkeyPatch):
    whole = dense(NgramTargets(Tokens.of(TEXT), 2, VOCAB), torch.arange(VOCAB)[None])
    monkeypatch.setattr(ngrams, "NUM_CANDIDATES", 3)
    short = NgramTargets(Tokens.of(TEXT), 2, VOCAB)
    x = torch.arange(VOCAB)[None]
    y = torch.arange(VOCAB)[None].roll(1)
    y[0, 0] = -1  # no target
    ids, probs = short(x, y)
    assert ids.shape == (1, VOCAB, 4)
    assert (ids >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, VOCAB))
    stored = dense(short, x)
    assert (stored <= whole + 1e-6).all()
    top = whole.argmax(-1, keepdim=True)
    assert (stored.gather(-1, top) > 0.5 * whole.gather(-1, top)).all()
    assert (ids[0, 1:, 3] == y[0, 1:]).all()
    torch.testing.assert_close(probs[..., 3], 1 - stored.sum(-1))


def test_large_vocabularies_and_texts_are_bounded(monkeypatch: pytest.MonkeyPatch):
    ids = np.array([50_000, 7, 50_000, 7, 50_000, 9, 3], dtype=np.uint16)
    targets = NgramTargets(Tokens.of(ids), 4, 50_257)
    top, _ = targets.look_up(torch.tensor([[9, 50_000, 7]]))
    assert top[0, 2, 0] == 50_000
    with pytest.raises(InputError, match="at most 4"):
        NgramTargets(Tokens.of(ids), 5, 50_257)
    monkeypatch.setattr(ngrams, "MAX_TOKENS", 400)
    mixture = Tokens.mix([Tokens.of(TEXT), Tokens.of(TEXT[:1000])], [1, 1])
    assert [len(ids) for ids, _ in ngrams._read_pieces(mixture, VOCAB)] == [200, 200]
    mixture = Tokens.mix([Tokens.of(TEXT), Tokens.of(TEXT[:100])], [3, 1])
    assert [len(ids) for ids, _ in ngrams._read_pieces(mixture, VOCAB)] == [300, 100]


def test_a_part_of_a_mixture_does_not_continue_in_the_next():
    mixture = Tokens.mix([Tokens.of(np.zeros(50, np.uint16)), Tokens.of(np.ones(50, np.uint16))], [1, 1])
    probs = dense(NgramTargets(mixture, 3, 2), torch.tensor([[0, 0], [1, 1]]))
    assert probs[0, 1, 0] > 0.8
    assert probs[1, 1, 1] > 0.8
    assert NgramTargets(mixture, 3, 2).contexts[2].tolist() == [0, 3]


def test_tokens_that_are_no_targets_are_not_counted():
    ids = np.array([5, 1, 5, 1, 5, 2] * 20, dtype=np.uint16)
    mask = (ids != 1).astype(np.uint8)
    masked = Tokens([Shard("memory", len(ids), lambda: ids, lambda: mask)])
    probs = dense(NgramTargets(masked, 3, VOCAB), torch.tensor([[1, 5]]))[0, 1]
    assert probs[1] == 0
    assert probs[2] > 0.9
    nothing = Tokens([Shard("memory", len(ids), lambda: ids, lambda: 0 * mask)])
    with pytest.raises(InputError, match="no token to count"):
        NgramTargets(nothing, 3, VOCAB)


def test_contexts_longer_than_the_row_are_not_used():
    targets = NgramTargets(Tokens.of(TEXT), 8, VOCAB)
    short = NgramTargets(Tokens.of(TEXT), 4, VOCAB)
    x = torch.from_numpy(TEXT[:600].astype(np.int64)).view(200, 3)
    torch.testing.assert_close(dense(targets, x), dense(short, x))


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(InputError, match="holds id 11"):
        NgramTargets(Tokens.of(TEXT), 3, VOCAB - 1)


def test_the_loss_of_the_counts_is_their_cross_entropy():
    targets = NgramTargets(Tokens.of(TEXT), 3, VOCAB)
    x = torch.from_numpy(TEXT[:600].astype(np.int64)).view(20, 30)
    y = x.roll(-1, 1)
    y[:, -1] = -1
    counted = 0.97 * dense(targets, x)[:, :-1]
    smoothed = counted + (1 - counted.sum(-1, keepdim=True)) / VOCAB
    expected = torch.nn.functional.nll_loss(smoothed.log().flatten(0, 1), y[:, :-1].flatten())
    assert targets.loss(x, y) == pytest.approx(expected.item(), rel=1e-5)
