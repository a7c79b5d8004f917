"""model.py: sizes, counts, initialization, document masks, generation; oracles/ has it against transformers."""

import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from model import GPT, GPTConfig

TOLERANCE = 1e-5  # float32 in another order of operations
GPT2: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 70, "block_size": 320}
MODERN = GPT2 | {"arch": "modern", "bias": False, "n_kv_head": 2, "head_dim": 16}
architectures = pytest.mark.parametrize("sizes", [GPT2, MODERN], ids=["gpt2", "modern"])


def make_model(sizes: dict[str, Any], **more: Any) -> GPT:
    """A seeded model whose ids all matter: the embedding is 20 times as large as at initialization."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes | more))
    with torch.no_grad():
        model.token_embedding.weight.mul_(20)
    return model


def make_ids(*shape: int) -> torch.Tensor:
    return torch.randint(70, shape, generator=torch.Generator().manual_seed(1))


def gradients(loss: torch.Tensor, model: GPT) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * max(b.abs().max(), 1)


# --- Sizes and counts


WRONG_GPT2 = {"n_head": 5, "n_layer": 0, "vocab_size": -1, "gelu": "fast", "arch": "gpt3", "norm_eps": -1.0}
WRONG_GPT2 |= {"dropout": -1.0, "rope_theta": 0.0, "n_kv_head": 2, "head_dim": 16, "tied": False}
WRONG_MODERN = {"bias": True, "n_kv_head": 3, "head_dim": 7}


@pytest.mark.parametrize(
    ("sizes", "name", "value"),
    [*((GPT2, *item) for item in WRONG_GPT2.items()), *((MODERN, *item) for item in WRONG_MODERN.items())],
)
def test_config_refuses_contradicting_sizes(sizes: dict[str, Any], name: str, value: Any):
    with pytest.raises(ValueError, match=name):
        GPTConfig(**sizes | {name: value})


@pytest.mark.parametrize(
    "more",
    [
        {"bias": True},
        {"bias": False, "n_inner": 100},
        {"arch": "modern", "bias": False, "n_kv_head": 1, "head_dim": 32, "n_inner": 40, "tied": False},
    ],
)
def test_counts_equal_the_tensors_and_torchs_flop_counter(more: dict[str, Any]):
    config = GPTConfig(n_layer=3, n_head=2, n_embd=48, vocab_size=130, block_size=40, **more)
    model = GPT(config)
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert padding == 62 * 48
    stored = sum(p.numel() for p in model.parameters())
    assert model.count_parameters() == stored - padding * (1 if config.tied else 2)
    idx = make_ids(2, 40)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == idx.numel() * (model.flops_per_token() + 6 * padding)


def test_count_parameters_gives_the_published_sizes():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(bias=False))
        xl = GPT(GPTConfig(n_layer=48, n_head=25, n_embd=1600))
    assert gpt2.count_parameters() == 124_337_664
    assert xl.count_parameters() == 1_557_611_200
    assert 1024 * gpt2.flops_per_token(1024) == 874_944_921_600


def test_initialization_has_gpt2s_deviations():
    config = GPTConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=5000, block_size=128)
    torch.manual_seed(0)
    model = GPT(config)
    idx = torch.randint(5000, (4, 128))
    assert model(idx, torch.randint(5000, (4, 128)))[1].item() == pytest.approx(math.log(5000), abs=0.1)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            rows = p[: config.vocab_size]
            expected = 0.02 / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert rows.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(rows.mean().item()) < 0.03 * expected, name
            assert not p[5000:].any(), name


# --- Load and change


def test_from_tensors_refuses_other_names_and_shapes():
    tensors = GPT(GPTConfig(**GPT2)).state_dict()
    for name, tensor in (
        ("token_embedding.weight", torch.zeros(69, 32)),
        ("token_embedding.weight", torch.zeros(192, 32)),
        ("extra", torch.zeros(1)),
    ):
        with pytest.raises(RuntimeError, match=name):
            GPT.from_tensors(GPTConfig(**GPT2), tensors | {name: tensor})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        GPT.from_tensors(GPTConfig(**GPT2 | {"bias": False}), tensors)


def test_runs_copied_into_another_project(tmp_path: Path):
    """With only torch, away from this repository: a training step, and generation."""
    shutil.copy(model_file.__file__, tmp_path)
    code = """
import sys, torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4))
idx = torch.zeros(1, 4, dtype=torch.long)
model(idx, idx)[1].backward()
assert model.eval().generate(idx, 3, top_k=2).shape == (1, 7)
assert not any(name.partition(".")[0] == "nanogpt" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# --- Forward


@architectures
def test_memory_options_keep_loss_and_gradients(sizes: dict[str, Any]):
    model = make_model(sizes)
    idx = make_ids(2, 40)
    idx[0, 3] = 0  # a target like any other
    targets = torch.where((idx > 0) & (idx < 7), -1, idx)
    logits, expected = model(idx, targets)
    assert logits is not None
    model.activation_checkpointing = True
    model.loss_chunk = 17  # does not divide the 80 targets
    no_logits, loss = model(idx, targets)
    assert no_logits is None
    torch.testing.assert_close(loss, expected)
    assert_close(gradients(loss, model), gradients(expected, model))


def test_soft_targets_are_a_cross_entropy_with_probabilities():
    model = make_model(GPT2)
    idx = make_ids(2, 20)
    idx[0, 3] = 0  # a target like any other
    targets = torch.where((idx > 0) & (idx < 7), -1, idx)
    is_target = targets >= 0
    ids = torch.randint(model.config.vocab_size, (2, 20, 5))  # some of them equal
    probs = torch.rand(2, 20, 5)
    dense = torch.zeros(2, 20, model.config.vocab_size).scatter_add(-1, ids, probs)
    expected = F.cross_entropy(model(idx, targets)[0][is_target], dense[is_target])
    expected_gradients = gradients(expected, model)
    certain = (idx[..., None], torch.ones(2, 20, 1))
    for model.loss_chunk in (0, 7):
        loss = model(idx, targets, (ids, probs))[1]
        torch.testing.assert_close(loss, expected)
        assert_close(gradients(loss, model), expected_gradients)
        torch.testing.assert_close(model(idx, idx, certain)[1], model(idx, idx)[1])


def test_rows_without_targets_have_zero_loss_and_gradient():
    model = GPT(GPTConfig(**GPT2))
    idx = make_ids(2, 8)
    for model.loss_chunk in (0, 5):
        loss = model(idx, torch.full_like(idx, -1))[1]
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# --- Document masks


SEPARATOR = 69


def make_documents() -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Rows of documents (3, 96), and each document's (row, begin, end). The last of a row is cut off by its end."""
    idx = torch.randint(SEPARATOR, (3, 96), generator=torch.Generator().manual_seed(2))
    ends = [[1, 41, 48, 93], [32, 96], []]  # documents of a single token, one that ends with the row, none
    documents = []
    for row, row_ends in enumerate(ends):
        idx[row, torch.tensor(row_ends, dtype=torch.long) - 1] = SEPARATOR
        bounds = sorted({0, *row_ends, 96})
        documents += [(row, begin, end) for begin, end in itertools.pairwise(bounds)]
    return idx, documents


@architectures
def test_document_mask_equals_documents_apart(sizes: dict[str, Any]):
    """Logits, loss and gradients; with activation checkpointing too."""
    model = make_model(sizes)
    idx, documents = make_documents()
    targets = idx.roll(-1, 1)
    targets[:, 10:20] = -1
    unmasked = model(idx, targets)[0]
    pieces = []
    loss_sum = torch.zeros(())
    for row, begin, end in documents:
        target = targets[row, begin:end]
        logits = model(idx[row, begin:end][None], target[None])[0][0]
        loss_sum = loss_sum + F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        pieces.append(logits)
    expected = loss_sum / (targets >= 0).sum()
    expected_gradients = gradients(expected, model)

    model.document_separator_id = SEPARATOR
    for model.activation_checkpointing in (False, True):
        logits, loss = model(idx, targets)
        assert (logits.flatten(0, 1) - torch.cat(pieces)).abs().max() <= TOLERANCE * logits.abs().max()
        assert abs(loss - expected) <= TOLERANCE * expected
        assert_close(gradients(loss, model), expected_gradients)
    assert (unmasked - logits).abs().max() > 0.1


# --- Generation


@architectures
def test_generate_greedy_takes_each_most_likely_token(sizes: dict[str, Any]):
    model = make_model(sizes, block_size=12).eval()
    idx = make_ids(2, 5)
    expected = idx
    for _ in range(15):  # beyond the context: the window moves on
        logits = model(expected[:, -12:])[0]
        expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 15, temperature=0), expected)
    assert torch.equal(model.generate(idx, 15, top_k=1), expected)
    with pytest.raises(ValueError, match="block_size=12"):
        model(make_ids(1, 13))


def test_generate_draws_from_the_softmax_of_the_top_k():
    model = make_model(GPT2).eval()
    start = make_ids(1, 4)
    logits = model(start)[0][0, -1]
    for top_k in (3, 100):
        torch.manual_seed(3)
        drawn = model.generate(start.expand(4000, -1), 1, temperature=2.0, top_k=top_k)[:, -1]
        kept = logits.topk(min(top_k, 70))
        probs = torch.zeros(70).index_copy(0, kept.indices, (kept.values / 2).softmax(-1))
        assert (drawn.bincount(minlength=70) / 4000 - probs).abs().max() < 0.03
