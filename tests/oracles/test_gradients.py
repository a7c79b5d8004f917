"""Logits, loss and the gradient of every parameter against transformers' GPT-2, Qwen3, Llama, Mistral and Qwen2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import LLAMA3_ROPE, build_gpt2, build_llama, build_qwen3
from torch.nn import functional as F

from model import GPT
from nanogpt.interop.names import strip_wrappers, translate

TOLERANCE = 1e-5  # float32 in another order of operations


def assert_equals_transformers(oracle: Any, folder: Path, T: int) -> None:
    """Compare on random rows of T tokens. −1 leaves out the last target, as transformers does."""
    oracle.save_pretrained(folder)
    oracle.set_attn_implementation("eager")
    model = GPT.from_pretrained(folder)
    config = model.config
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

    theirs = strip_wrappers("oracle", {name: p.grad.float() for name, p in oracle.named_parameters()})
    gradients = translate("oracle", theirs, vars(config), transposed=config.arch == "gpt2")
    for name, p in model.named_parameters():
        rows = len(gradients[name])
        assert (p.grad[:rows] - gradients[name]).abs().max() <= TOLERANCE * gradients[name].abs().max(), name
        assert not p.grad[rows:].any(), name  # the padding of the vocabulary


@pytest.mark.parametrize(
    ("sizes", "T"),
    [
        ({"n_embd": 768, "n_head": 12}, 32),  # GPT-2
        pytest.param({"n_embd": 1600, "n_head": 25, "n_layer": 1}, 32, marks=pytest.mark.slow),  # GPT-2 XL
        ({"activation_function": "gelu"}, 96),
        ({"activation_function": "gelu_new", "layer_norm_epsilon": 1e-2}, 129),
    ],
)
def test_gpt2_equals_transformers(sizes: dict[str, Any], T: int, tmp_path: Path):
    assert_equals_transformers(build_gpt2(**{"n_positions": 160} | sizes), tmp_path, T)


AS_QWEN3 = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 1024}
AS_QWEN3 |= {"num_hidden_layers": 1, "intermediate_size": 3072}


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        AS_QWEN3,
    ],
    ids=["grouped, untied", "a key head each", "one key head", "as Qwen3-0.6B"],
)
def test_modern_equals_transformers_qwen3(sizes: dict[str, Any], tmp_path: Path):
    assert_equals_transformers(build_qwen3(**{"max_position_embeddings": 160} | sizes), tmp_path, T=129)


AS_SMOLLM2 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536}
AS_SMOLLM2 |= {"num_hidden_layers": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
AS_TINYLLAMA = {"num_attention_heads": 32, "num_key_value_heads": 4, "hidden_size": 2048, "intermediate_size": 5632}
AS_TINYLLAMA |= {"num_hidden_layers": 1, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("Llama", AS_SMOLLM2),
        pytest.param("Llama", AS_TINYLLAMA, marks=pytest.mark.slow),
        ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 160, "head_dim": 12}),
        ("Qwen2", {"tie_word_embeddings": True}),
    ],
    ids=["as SmolLM2-135M", "as TinyLlama", "Llama 3's rope", "Mistral", "Mistral, a window as long", "Qwen2"],
)
def test_llama_family_equals_transformers(kind: str, sizes: dict[str, Any], tmp_path: Path):
    assert_equals_transformers(build_llama(kind, **{"max_position_embeddings": 160} | sizes), tmp_path, T=129)
