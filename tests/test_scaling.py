"""The law of losses against arithmetic, and the family of shapes against the model."""

import math
from dataclasses import replace

import numpy as np
import pytest

from configurator import build
from model import GPT, GPTConfig
from nanogpt import scaling
from nanogpt.scaling import Law, effective, fit
from train import TrainConfig

LAW = Law(E=1.2, A=40.0, B=90.0, alpha=0.45, beta=0.35)


def test_the_law_by_hand():
    assert LAW.loss(10_000, 1e6) == pytest.approx(1.2 + 40 / 10_000**0.45 + 90 / 1e6**0.35)
    assert LAW.loss(10_000, 1e6, unique=1e6) == LAW.loss(10_000, 1e6)
    again = LAW.loss(10_000, 4e6, unique=1e6)
    assert LAW.loss(10_000, 4e6) < again < LAW.loss(10_000, 1e6)
    by_heart = replace(LAW, K=0.01)
    assert by_heart.loss(10_000, 4e6, unique=1e6) == pytest.approx(again + 0.01 * (0.01 * 3) ** 1.5)
    assert by_heart.loss(10_000, 1e6, unique=1e6) == LAW.loss(10_000, 1e6)


def test_tokens_seen_again_are_worth_less():
    U, R = 1e6, 15.0
    worth = [effective(epochs * U, U, R) for epochs in (0.5, 1, 2, 4, 16, 1e6)]
    assert worth[:2] == [0.5 * U, U]
    assert worth[2] == pytest.approx(U * (1 + R * (1 - math.exp(-1 / R))))
    assert np.all(np.diff(worth) > 0)
    assert worth[2] - U < U  # the second epoch gives less than the first …
    assert worth[-1] == pytest.approx(U * (1 + R))  # … and all of them together no more than this


@pytest.mark.parametrize("flops", [1e12, 1e15, 1e18])
def test_the_best_size_is_the_lowest_point_of_the_budget(flops: float):
    N, D = LAW.best(flops)
    assert pytest.approx(flops) == 6 * N * D
    around = N * np.exp(np.linspace(-1, 1, 2001))
    assert around[np.argmin([LAW.loss(n, flops / 6 / n) for n in around])] == pytest.approx(N, rel=2e-3)


def test_a_fit_finds_the_law_that_made_the_points():
    sizes, tokens = np.logspace(4, 6, 5), np.logspace(5, 7, 4)
    points = [(n, d, LAW.loss(n, d)) for n in sizes for d in tokens]
    found = fit(points)
    for n, d, _ in [*points, (5e6, 5e7, 0)]:  # beyond them too
        assert found.loss(n, d) == pytest.approx(LAW.loss(n, d), rel=1e-4)
    random = np.random.default_rng(0)
    noisy = [(n, d, loss * random.normal(1, 2e-3)) for n, d, loss in points]
    assert fit(noisy).loss(4e6, 2e7) == pytest.approx(LAW.loss(4e6, 2e7), rel=0.02)


@pytest.mark.parametrize("width", [16, 48, 96, 160, 512, 576, 768])
def test_every_width_is_a_model(width: int):
    """Whose blocks' weights are what the law counts; at GPT-2's width it has GPT-2's depth."""
    config = build(TrainConfig, scaling.recipe(width, 1e6, 64), "recipe")
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_inner", "arch")}
    shape = GPTConfig(vocab_size=65, block_size=64, bias=False, **sizes)
    if width <= 160:
        model = GPT(shape)
        counted = sum(p.numel() for name, p in model.named_parameters() if name in model.hidden_matrices())
        assert counted == scaling.weights(scaling.shape(width))
    assert shape.head_dim * shape.n_head == width
    if width == 768:
        assert (shape.n_layer, shape.n_head) == (12, 12)
    assert config.max_iters * config.rows_per_step * 64 == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize("tokens", [1e6, 4e6, 16e6, 1e9])
def test_the_books_are_as_hard_as_the_law_says(tokens: float):
    """However long the pilot: beyond the runs the law goes on."""
    law = scaling.LAW.loss(scaling.weights(scaling.shape(scaling.PILOT_WIDTH)), tokens)
    assert scaling.hardness(law, tokens, 128) == pytest.approx(1, abs=3e-3)
    assert scaling.hardness(1.1 * law, tokens, 128) == pytest.approx(1.1, abs=0.02)
