"""The scaling law against arithmetic, and its family of shapes against the model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from load import new_model_config
from model import GPT
from nanogpt import scaling
from nanogpt.scaling import Law
from nanogpt.schema import build
from runs.scaling.measure import fit_law
from train import TrainConfig

LAW = Law(E=1.2, A=40.0, B=90.0, alpha=0.45, beta=0.35)


def test_loss_by_hand():
    assert LAW.predict_loss(10_000, 1e6) == pytest.approx(1.2 + 40 / 10_000**0.45 + 90 / 1e6**0.35)
    repeated = replace(LAW, K=0.02, p=0.8, q=0.25)
    for epochs in (0.5, 1):
        assert repeated.predict_loss(10_000, epochs * 1e6, unique=1e6) == LAW.predict_loss(10_000, epochs * 1e6)
    penalty = 0.02 * 3 ** (0.8 * 0.01**0.25)
    assert repeated.predict_loss(10_000, 4e6, unique=1e6) == pytest.approx(LAW.predict_loss(10_000, 4e6) + penalty)
    assert repeated.predict_loss(10_000, 4e6) == LAW.predict_loss(10_000, 4e6)


@pytest.mark.parametrize("size", [3e4, 1e5, 1e6])
def test_length_stops_before_more_epochs_overfit(size: float):
    """A text of 100,000 tokens, with time for 30 million."""
    law = scaling.LAW
    unique = 1e5
    lengths = np.geomspace(1e4, 3e7, 3000)
    losses = np.array([law.predict_loss(size, length, unique) for length in lengths])
    best = law.pick_tokens(size, 3e7, unique)
    assert unique < best < 3e7
    assert law.predict_loss(size, best, unique) < 1.0021 * losses.min()
    assert lengths[losses < 1.0019 * losses.min()].max() < 1.03 * best
    assert law.pick_tokens(size, best / 2, unique) <= best / 2 * 1.0001
    assert law.pick_tokens(size, 9e4, unique) == 9e4
    assert law.pick_tokens(10 * size, 3e7, unique) < best  # a larger model overfits sooner


@pytest.mark.parametrize("flops", [1e12, 1e15, 1e18])
def test_best_is_the_lowest_point_of_a_compute_budget(flops: float):
    N, D = LAW.split_flops(flops)
    assert pytest.approx(flops) == 6 * N * D
    sizes = N * np.exp(np.linspace(-1, 1, 2001))
    assert sizes[np.argmin([LAW.predict_loss(n, flops / 6 / n) for n in sizes])] == pytest.approx(N, rel=2e-3)


def test_fit_recovers_the_law_of_its_points():
    points = [(n, d, LAW.predict_loss(n, d)) for n in np.logspace(4, 6, 5) for d in np.logspace(5, 7, 4)]
    fitted = fit_law(points)
    for n, d, _ in [*points, (5e6, 5e7, 0)]:  # one beyond them
        assert fitted.predict_loss(n, d) == pytest.approx(LAW.predict_loss(n, d), rel=1e-4)
    random = np.random.default_rng(0)
    noisy = [(n, d, loss * random.normal(1, 2e-3)) for n, d, loss in points]
    assert fit_law(noisy).predict_loss(4e6, 2e7) == pytest.approx(LAW.predict_loss(4e6, 2e7), rel=0.02)


@pytest.mark.parametrize("width", [16, 48, 96, 160, 512, 576, 768])
def test_every_recipe_is_a_model_of_the_counted_weights(width: int):
    config = build(TrainConfig, {**scaling.make_recipe(width, 1e6, 64), "block_size": 64}, "recipe")
    model_config = new_model_config(config, vocab_size=65)
    with torch.device("meta"):
        model = GPT(model_config)
    counted = sum(model.get_parameter(name).numel() for name in model.muon_params())
    assert counted == scaling.count_weights(width)
    assert model_config.head_dim * model_config.n_head == width
    if width == 768:
        assert (model_config.n_layer, model_config.n_head) == (12, 12)  # GPT-2's depth
    assert config.max_iters * config.rows_per_step * 64 == pytest.approx(1e6, rel=0.01)
    assert config.warmup_iters == 10
    short = scaling.make_recipe(width, 5000, 64)
    assert short["warmup_iters"] < short["max_iters"] / 4


@pytest.mark.parametrize("tokens", [250e3, 1e6, 4e6, 16e6, 1e9])
def test_difficulty_of_the_laws_own_losses_is_one(tokens: float):
    """At any length of the pilot; beyond its measured losses the law continues."""
    loss = scaling.LAW.predict_loss(scaling.count_weights(scaling.PILOT_WIDTH), tokens)
    assert scaling.estimate_difficulty(loss, tokens, 1e12, 128) == pytest.approx(1, abs=8e-3)
    assert scaling.estimate_difficulty(1.1 * loss, tokens, 1e12, 128) == pytest.approx(1.1, abs=0.03)


@pytest.mark.parametrize(("tokens", "loss"), scaling.PILOT_LOSSES.items())
def test_difficulty_of_the_reference_text_is_one(tokens: int, loss: float):
    assert scaling.estimate_difficulty(loss, tokens, 1e12, 128) == pytest.approx(1)
    assert scaling.estimate_difficulty(2.6 * loss, tokens, 1e12, 128) == pytest.approx(2.6, rel=0.051)
    penalty = scaling.LAW.predict_penalty(scaling.count_weights(64), tokens, tokens / 3)
    assert penalty > 0
    assert scaling.estimate_difficulty(loss + penalty, tokens, tokens / 3, 128) == pytest.approx(1)
    assert math.isnan(scaling.estimate_difficulty(loss, 10_000, 1e12, 128))  # too short a pilot
