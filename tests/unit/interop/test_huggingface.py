"""What is refused of a Hugging Face folder, with which message, and what is downloaded."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from random_models import LLAMA3_ROPE, build_gpt2, build_llama, build_qwen3
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from nanogpt.errors import InputError
from nanogpt.interop.huggingface import TOKENIZER_FILES, read_tokenizer, read_weights
from nanogpt.interop.names import LazyTensors
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

BUILD = {"gpt2": build_gpt2, "qwen3": build_qwen3, "llama": build_llama}
BUILD |= {"mistral": partial(build_llama, "Mistral"), "qwen2": partial(build_llama, "Qwen2")}
YARN = {"rope_theta": 1e6, "factor": 4.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_gpt2().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"model_type": "phi3"}, "model_type 'phi3'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"n_head": 5}, "n_embd=32 is not divisible by n_head=5"),
        ("gpt2", {"n_layer": 0, "n_embd": "32"}, "n_layer=0, n_embd='32'"),
        ("gpt2", {"n_layer": 10_001}, "n_layer=10001"),
        ("gpt2", {"n_layer": 1}, r"unexpected: h\.1\.attn\.c_attn\.bias, .* and 8 more"),
        ("gpt2", {"n_layer": 3}, r"missing: h\.2\.ln_1\.weight, .* and 8 more"),
        ("gpt2", {"n_inner": 100}, r"h\.0\.mlp\.c_fc\.weight \(torch\.float32 \(32, 128\) .* float \(32, 100\)\),"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        ("qwen3", {"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4}"),
        ("qwen3", {"rope_parameters": YARN | {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ("qwen3", {"rope_scaling": YARN | {"type": "yarn"}}, "rope_type='yarn'"),
        ("qwen3", {"rope_scaling": "yarn", "rope_theta": 1e6}, "rope_type='yarn'"),
        ("qwen3", {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_theta=None"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            r"rope_type=.unstated, with {'full_attention'",
        ),
        ("llama", {"rope_scaling": {"factor": 8.0}}, r"rope_type=.unstated, with {'factor': 8\.0}"),
        ("llama", {"rope_parameters": YARN | {"rope_type": "yarn"}, "rope_scaling": {"type": "default"}}, "'yarn'"),
        ("qwen3", {"rms_norm_eps": 0.0, "vocab_size": 100.0}, r"vocab_size=100\.0, norm_eps=0\.0"),
        ("qwen3", {"head_dim": 15}, r"impossible sizes \(head_dim=15\)"),
        ("llama", {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "low_freq_factor < high_freq_factor"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type llama3 needs"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("mistral", {"sliding_window": 8}, "sliding_window=8"),
    ],
)
def test_read_weights_refuses_a_config(tmp_path: Path, model_type: str, changes: dict, message: str):
    BUILD[model_type]().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"lm_head.weight": torch.zeros(100, 32)}, r"lm_head\.weight is not the token embedding"),
        (lambda t: t | {"wte.weight": torch.zeros(100, 32)}, "same tensor name under two prefixes"),
        (lambda t: {name: tensor.int() for name, tensor in t.items()}, r"torch\.int32.* and 24 more"),
    ],
)
def test_read_weights_refuses_tensors(folder: Path, change: Callable[[dict], dict], message: str):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    assert_refused(folder, message)


def test_read_weights_takes_sizes_of_gpt2_124m_as_defaults(folder: Path):
    save_file({"wpe.weight": torch.zeros(16, 32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_ctx": 16, "n_embd": 32, "n_head": 2}))
    assert_refused(folder, r"states \(missing: wte\.weight, .* and 70 more\)")  # of 12 layers


def test_read_weights_refuses_damaged_and_missing_files(folder: Path):
    weights, index, config = (
        folder / name for name in ("model.safetensors", "model.safetensors.index.json", "config.json")
    )
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(folder, r"model\.safetensors: cannot be read .*download it again")
    weights.rename(folder / "pytorch_model.bin")
    assert_refused(folder, r"no model\.safetensors; .*convert them with transformers")
    for weight_map in ({"wte.weight": "../other/model.safetensors"}, {"wte.weight": "/etc/passwd"}, {}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_refused(folder, "lists no shards, or files in other folders")
    index.write_text(json.dumps({"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}))
    assert_refused(folder, r"no model-00001-of-00002\.safetensors; download the model again")
    config.write_text("{")
    assert_refused(folder, r"config\.json: cannot be read")
    config.unlink()
    assert_refused(folder, r"config\.json: cannot be read .*nanoGPT's ckpt\.pt")


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_rows_are_those_of_the_whole_tensors(tmp_path: Path, name: str):
    """Also across the matrices that one of ours joins, and where theirs is transposed."""
    BUILD[name]().save_pretrained(tmp_path)
    tensors = read_weights(tmp_path).tensors
    assert isinstance(tensors, LazyTensors)
    for key in tensors:
        whole = tensors[key]
        for first, last in ((0, 1), (0, len(whole)), (len(whole) // 3, len(whole) - 1), (len(whole), len(whole) + 4)):
            assert torch.equal(tensors.rows(key, slice(first, last)), whole[first:last]), key


def test_read_weights_finds_the_tokenizer(folder: Path):
    weights = read_weights(folder)
    assert (weights.tokenizer, weights.gpt2_encoding, weights.notes) == (None, False, [])
    (folder / "vocab.json").write_text("{}")
    assert "no tokenizer.json" in read_weights(folder).notes[0]
    with pytest.raises(InputError, match=r"no tokenizer\.json; give a folder or hub id that has one"):
        read_tokenizer(str(folder))
    Tokenizer.characters("abc").save(folder)
    weights = read_weights(folder)
    assert weights.tokenizer is not None
    assert weights.notes == []
    assert read_tokenizer(str(folder)).vocab_size == 3


def test_read_weights_keeps_the_end_tokens_that_the_vocabulary_has(folder: Path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 7, 100]}))
    weights = read_weights(folder)
    assert weights.end_ids == [7]
    assert weights.notes == [f"{folder}: ids [-1, 100] that end a text are not in the vocabulary: ignored"]


def test_read_weights_names_a_token_that_begins_texts(folder: Path):
    """As Llama's tokenizers put <s> before each text."""
    tokenizer = Tokenizer.characters("abc")
    tokenizer._inner.add_special_tokens(["<s>"])
    tokenizer._inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    Tokenizer(tokenizer._inner).save(folder)
    (note,) = read_weights(folder).notes
    assert note.endswith("its texts begin with <s>; begin a prompt with it, too")


def test_read_weights_takes_the_ids_of_gpt2_for_its_encoding(tmp_path: Path):
    build_gpt2(vocab_size=GPT2_VOCAB).save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.gpt2_encoding
    assert "assuming GPT-2's encoding" in weights.notes[0]


def test_hub_downloads_no_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch):
    downloads = []

    def snapshot(source: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        downloads.append(source)
        assert allow_patterns == [*TOKENIZER_FILES] or {"config.json", *TOKENIZER_FILES} <= set(allow_patterns)
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (folder / "gpt2").mkdir()  # the four names mean OpenAI's models, even beside such a folder
    monkeypatch.chdir(folder)
    for source in ("gpt2", "gpt2-xl", "openai-community/gpt2-medium"):
        assert read_weights(source).config["n_embd"] == 32
    Tokenizer.characters("abc").save(folder)
    assert read_tokenizer("gpt2").vocab_size == 3
    assert downloads == ["gpt2", "gpt2-xl", "openai-community/gpt2-medium", "gpt2"]


@pytest.mark.parametrize("read", [read_weights, read_tokenizer])
def test_hub_out_of_reach_is_a_line(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], Any]):
    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"^'Qwen/Qwen3-0\.6B' .* was not downloaded \(no connection\): check .*$"):
        read("Qwen/Qwen3-0.6B")
