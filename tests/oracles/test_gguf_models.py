"""GGUF against transformers, which reads such files too: the same logits and ids, and the same model back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Export
from random_models import CHARACTERS, LLAMA3_ROPE, MODERN, SMALL, build_llama, build_qwen3, save_random_run
from texts import HARD_PIECES, HARD_TEXTS

from model import GPT
from nanogpt.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")

IDX = torch.arange(16).view(1, 16) * 6 % 90
KINDS: dict[str, dict[str, Any]] = {
    # Of a GPT-2 transformers reads neither the width of the MLP nor the context, and of Qwen3 not the head's size.
    "gpt2": SMALL | {"block_size": 1024, "norm_eps": 1e-3},
    "gpt2, no bias": SMALL | {"block_size": 1024, "bias": False},
    "qwen3, untied": MODERN | {"tied": False, "n_kv_head": 2, "head_dim": 128, "rope_theta": 5e5, "norm_eps": 1e-3},
    "qwen3, tied": MODERN | {"n_kv_head": 1, "n_inner": 40, "head_dim": 128},
    "llama, untied": MODERN | {"qk_norm": False, "n_kv_head": 2, "tied": False},
    "llama, rope scaling": MODERN | {"qk_norm": False, "n_kv_head": 2, "rope_scaling": [8.0, 1.0, 4.0, 8.0]},
    "qwen2": MODERN | {"qk_norm": False, "qkv_bias": True, "n_kv_head": 1, "norm_eps": 1e-5},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_export_computes_the_same_in_transformers_and_back(run_export: Export, kind: str):
    words = CHARACTERS if "tied" in kind else Tokenizer.bytes()
    ours = save_random_run("out", words, **KINDS[kind])
    first = run_export("first.gguf", "--out_dir=out")
    back = GPT.from_pretrained(first)
    assert asdict(back.config) == asdict(ours.config) | {"bias": ours.config.arch == "gpt2"}
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert run_export("again.gguf", "--init_from=first.gguf").read_bytes() == first.read_bytes()

    # transformers leaves Llama 3's scaling out (findings/transformers_gguf_rope.sh).
    if not ours.config.rope_scaling:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(".", gguf_file=str(first), dtype=torch.float32)
        idx = torch.randint(words.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
        logits = theirs(idx).logits[..., : words.vocab_size]  # without the end token that characters get
        assert (logits - ours(idx, idx)[0]).abs().max() <= 1e-5


def test_export_has_the_ids_of_transformers(run_export: Export):
    words = Tokenizer.train_bpe(HARD_TEXTS, 300)
    save_random_run("out", words, **KINDS["llama, untied"])
    path = run_export("m.gguf", "--out_dir=out")
    theirs = transformers.AutoTokenizer.from_pretrained(".", gguf_file=str(path))
    for text in HARD_TEXTS + HARD_PIECES:
        assert theirs(text, verbose=False)["input_ids"] == words.encode(text)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (words.end_of_text, words.end_of_text)


def convert(path: Path, model: Any) -> None:
    """Write a model of transformers' by the rules of llama.cpp's converter, with the names of the package."""
    c = model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.model_type.upper()], c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if c.model_type == "llama" and heads:
            data = data.reshape(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data)
    if c.rope_parameters["rope_type"] == "llama3":
        scaled, plain = model.model.rotary_emb.inv_freq, type(model)(c.__class__(**without_scaling(c))).model.rotary_emb
        writer.add_tensor("rope_freqs.weight", (plain.inv_freq / scaled).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def without_scaling(config: Any) -> dict[str, Any]:
    return config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": None}


@pytest.mark.parametrize("kind", ["llama", "llama3", "qwen2", "qwen3"])
@torch.no_grad()
def test_a_converted_model_has_the_logits_of_the_original(tmp_path: Path, kind: str):
    if kind == "qwen3":
        oracle = build_qwen3()
    else:
        scaling = {"rope_parameters": LLAMA3_ROPE} if kind == "llama3" else {}
        oracle = build_llama("Qwen2" if kind == "qwen2" else "Llama", hidden_size=64, **scaling)
    convert(tmp_path / "m.gguf", oracle)
    model = GPT.from_pretrained(tmp_path / "m.gguf").eval()
    assert (model.config.rope_scaling == [8.0, 1.0, 4.0, 64.0]) == (kind == "llama3")
    assert (model(IDX, IDX)[0] - oracle(IDX).logits).abs().max() < 1e-5
