"""Logits, loss and the gradient of every parameter against transformers' GPT-2 and Qwen3."""

from typing import Any

import pytest
import torch
from random_models import build_gpt2, build_qwen3
from torch.nn import functional as F

from model import GPT, GPTConfig
from nanogpt.interop.names import strip_wrappers, translate

TOLERANCE = 1e-5  # float32 in another order of operations
GPT2 = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=70, block_size=160)
MODERN = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=70, block_size=160, bias=False, arch="modern")


def build_oracle(config: GPTConfig) -> Any:
    """transformers' model of the same sizes, with plain ("eager") attention."""
    if config.arch == "gpt2":
        oracle = build_gpt2(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            activation_function={"tanh": "gelu_new", "erf": "gelu"}[config.gelu],
        )
    else:
        oracle = build_qwen3(
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim,
            hidden_size=config.n_embd,
            intermediate_size=config.n_inner,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.block_size,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
        )
    oracle.set_attn_implementation("eager")
    return oracle


def to_our_names(tensors: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    return translate("oracle", strip_wrappers("oracle", tensors), vars(config), transposed=config.arch == "gpt2")


def assert_equals_transformers(config: GPTConfig, T: int) -> None:
    """Compare on random rows of T tokens. −1 leaves out the last target, as transformers does."""
    oracle = build_oracle(config)
    model = GPT.from_tensors(config, to_our_names(oracle.state_dict(), config))
    if config.arch == "gpt2":  # transformers computes Qwen3's norms in float32 anyway
        oracle.double()
        model.double()
    idx = torch.randint(config.vocab_size, (2, T))
    expected = oracle(input_ids=idx, labels=idx)
    expected.loss.backward()
    logits, loss = model(idx, F.pad(idx[:, 1:], (0, 1), value=-1))
    loss.backward()
    assert logits.shape == (2, T, config.vocab_size)
    scale = expected.logits.abs().max()
    assert (logits - expected.logits).abs().max() <= TOLERANCE * scale
    assert abs(loss - expected.loss) <= TOLERANCE * expected.loss
    last, no_loss = model(idx)
    assert no_loss is None
    assert (last - expected.logits[:, -1:]).abs().max() <= TOLERANCE * scale

    gradients = to_our_names({name: p.grad.float() for name, p in oracle.named_parameters()}, config)
    for name, p in model.named_parameters():
        rows = len(gradients[name])
        assert (p.grad[:rows] - gradients[name]).abs().max() <= TOLERANCE * gradients[name].abs().max(), name
        assert not p.grad[rows:].any(), name  # the padding of the vocabulary


@pytest.mark.parametrize(("n_embd", "n_head"), [(768, 12), (1600, 25)])
def test_gpt2_equals_transformers_at_published_widths(n_embd: int, n_head: int):
    assert_equals_transformers(GPTConfig(1, n_head, n_embd, vocab_size=500, block_size=48), T=32)


@pytest.mark.parametrize(("gelu", "T"), [("tanh", 128), ("erf", 96)])
def test_gpt2_equals_transformers_with_either_gelu(gelu: str, T: int):
    assert_equals_transformers(GPTConfig(**vars(GPT2) | {"gelu": gelu}), T)


@pytest.mark.parametrize(
    "sizes",
    [
        {"norm_eps": 1e-3},
        {"n_kv_head": 2, "head_dim": 16, "tied": False, "rope_theta": 1e6, "n_inner": 40},
        {"n_kv_head": 1, "head_dim": 6, "rope_theta": 100.0},
        {"n_layer": 1, "n_head": 16, "n_kv_head": 8, "head_dim": 128, "n_embd": 1024, "n_inner": 3072},
    ],
    ids=["plain", "grouped, untied", "one key head", "as Qwen3-0.6B"],
)
def test_modern_equals_transformers_qwen3(sizes: dict[str, Any]):
    assert_equals_transformers(GPTConfig(**vars(MODERN) | sizes), 64)
