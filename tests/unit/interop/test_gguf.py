"""GGUF files: what the package writes is read as it is, what we write too, and what is refused with which message."""

import itertools
import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from random_models import CHARACTERS, MODERN, SMALL, randomize
from texts import HARD_PIECES, HARD_TEXTS, fuzz_text
from tokenizers import decoders, models, normalizers, pre_tokenizers

from load import load_weights
from model import GPT, GPTConfig, rotary_frequencies
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.interop import gguf as our_gguf
from nanogpt.interop.gguf import read_gguf, rope_divisors, write_gguf
from nanogpt.interop.gguf_tokenizer import ADDED_END, BYTE, CONTROL, NORMAL, UNKNOWN, to_settings, to_tokenizer
from nanogpt.interop.huggingface import read_tokenizer
from nanogpt.text.chat import CHATML_TEMPLATE
from nanogpt.text.fast_bpe import LLAMA_3_PATTERN
from nanogpt.text.tokenizer import Tokenizer
from train import TrainConfig

gguf = pytest.importorskip("gguf")

WORDS = Tokenizer.train_bpe(HARD_TEXTS, 300)
SIZES = {
    "llama.block_count": 1,
    "llama.context_length": 16,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
SHAPES = {
    "token_embd": (300, 32),
    "blk.0.attn_norm": (32,),
    "blk.0.attn_q": (32, 32),
    "blk.0.attn_k": (16, 32),
    "blk.0.attn_v": (16, 32),
    "blk.0.attn_output": (32, 32),
    "blk.0.ffn_norm": (32,),
    "blk.0.ffn_gate": (64, 32),
    "blk.0.ffn_up": (64, 32),
    "blk.0.ffn_down": (32, 64),
    "output_norm": (32,),
}


def write_file(
    path: Path, changes: dict[str, Any] | None = None, shapes: dict[str, Any] | None = None, kind: str = "F32"
) -> dict[str, np.ndarray]:
    """Write a small Llama as llama.cpp's converter does; return its tensors, dequantized. changes: of its settings."""
    tokenizer = {f"tokenizer.ggml.{key}": value for key, value in to_settings(WORDS, 300, [297]).items()}
    settings = {"general.architecture": "llama"} | SIZES | tokenizer | (changes or {})
    writer = gguf.GGUFWriter(path, settings.pop("general.architecture"))
    for key, value in settings.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    rng = np.random.default_rng(0)
    quantization = gguf.GGMLQuantizationType[kind]
    tensors = {}
    for name, shape in (SHAPES | (shapes or {})).items():
        data, its_kind = rng.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType.F32
        if len(shape) == 2 and name != "token_embd" and kind != "F32":
            its_kind = quantization
            byte_shape = gguf.quant_shape_to_byte_shape(shape, quantization)
            data = rng.integers(0, 60, byte_shape, dtype=np.uint8)  # all scales are finite
        writer.add_tensor(f"{name}.weight", data, raw_dtype=its_kind)
        tensors[name] = gguf.dequantize(data, its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


# --- Read


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_1", "Q8_0", "MXFP4"])
def test_read_gguf_has_the_values_of_the_package(tmp_path: Path, kind: str):
    stored = write_file(tmp_path / "m.gguf", kind=kind)
    weights = read_gguf(tmp_path / "m.gguf")
    assert weights.config["tied"]
    assert (weights.config["head_dim"], weights.config["rope_theta"], weights.config["norm_eps"]) == (16, 1e4, 1e-5)
    assert weights.end_ids == [WORDS.end_of_text]
    read = {name: tensor.numpy() for name, tensor in weights.tensors.items()}
    np.testing.assert_array_equal(read["blocks.0.mlp.down.weight"], stored["blk.0.ffn_down"])
    qkv = read["blocks.0.attention.qkv.weight"]
    # Channels i and 8 + i of a head, which rotate together, are neighbors in the file.
    np.testing.assert_array_equal(qkv[:32].reshape(2, 2, 8, 32)[1, 1, 5], stored["blk.0.attn_q"][16 + 2 * 5 + 1])
    np.testing.assert_array_equal(qkv[32:48].reshape(2, 8, 32)[0, 3], stored["blk.0.attn_k"][2 * 3])
    np.testing.assert_array_equal(qkv[48:], stored["blk.0.attn_v"])


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_read_gguf_has_the_values_of_the_package_in_blocks_of_256(tmp_path: Path, kind: str):
    wide = {name: (*shape[:-1], 256) if len(shape) == 2 else shape for name, shape in SHAPES.items()}
    wide |= {"blk.0.ffn_gate": (256, 256), "blk.0.ffn_up": (256, 256), "blk.0.ffn_down": (256, 256)}
    wide |= {"blk.0.attn_q": (256, 256), "blk.0.attn_output": (256, 256), "blk.0.attn_k": (128, 256)}
    wide |= {name: (256,) for name in wide if "norm" in name} | {"blk.0.attn_v": (128, 256)}
    changes = {"llama.embedding_length": 256, "llama.feed_forward_length": 256}
    stored = write_file(tmp_path / "m.gguf", changes, wide, kind=kind)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    np.testing.assert_array_equal(tensors["blocks.0.attention.qkv.weight"][384:].numpy(), stored["blk.0.attn_v"])
    np.testing.assert_array_equal(tensors["blocks.0.mlp.gate.weight"].numpy(), stored["blk.0.ffn_gate"])


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({"general.architecture": "phi3"}, {}, "architecture 'phi3' is not supported"),
        ({"llama.attention.head_count_kv": 3}, {}, "n_head=2 is not divisible by n_kv_head=3"),
        ({"llama.block_count": 2}, {}, r"missing: layers\.1\.input_layernorm\.weight, .* and 5 more"),
        ({"llama.block_count": 10**6}, {}, r"impossible sizes \(n_layer=1000000\)"),
        ({"llama.rope.freq_base": math.inf}, {}, r"impossible sizes \(rope_theta=inf\)"),
        ({"llama.attention.head_count": [2, 2]}, {}, r"impossible sizes \(n_head=\[2, 2\]"),
        ({"llama.vocab_size": 299}, {}, r"llama\.vocab_size=299 is not supported"),
        ({}, {"token_embd": (301, 32)}, r"embed_tokens\.weight \(torch\.float32 \(301, 32\) instead of float"),
        ({}, {"blk.0.attn_sinks": (2,)}, r"unexpected: blk\.0\.attn_sinks\.weight"),
        ({"llama.rope.scaling.type": "yarn"}, {}, r"llama\.rope\.scaling\.type='yarn' is not supported"),
        ({"llama.rope.scaling.factor": 4.0}, {}, r"llama\.rope\.scaling\.factor=4\.0 is not supported"),
        ({}, {"rope_freqs": (8,)}, r"rope_freqs\.weight is not Llama 3's scaling"),
        ({}, {"rope_freqs": (7,)}, r"rope_freqs\.weight is not Llama 3's scaling"),
        ({"llama.rope.dimension_count": 8}, {}, r"llama\.rope\.dimension_count=8"),
        ({"llama.expert_count": 8}, {}, r"llama\.expert_count=8"),
        ({"llama.attention.sliding_window": 8}, {}, r"llama\.attention\.sliding_window=8"),
        ({"split.count": 3}, {}, "one of several parts"),
        ({"tokenizer.ggml.model": "t5"}, {}, "tokenizer is of kind 't5'"),
        ({"tokenizer.ggml.pre": "chameleon"}, {}, "pre-tokenizer 'chameleon' is not supported, only gpt-2, smollm,"),
        ({"tokenizer.ggml.tokens": ["a"] * 300}, {}, r"tokenizer is damaged \(a token twice\)"),
        ({"tokenizer.ggml.merges": ["ab"]}, {}, r"tokenizer is damaged \(not enough values to unpack"),
    ],
)
def test_read_gguf_refuses(tmp_path: Path, changes: dict[str, Any], shapes: dict[str, Any], message: str):
    write_file(tmp_path / "m.gguf", changes, shapes)
    assert_refused(tmp_path / "m.gguf", message)


def test_read_gguf_refuses_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Cut anywhere, or with a count in its header that the file has not the bytes for."""
    path = tmp_path / "m.gguf"
    assert_refused(path, "No such file")
    write_file(path)
    content = path.read_bytes()
    rng = random.Random(0)
    for size in [0, 3, 4, 20, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))]:
        path.write_bytes(content[:size])
        assert_refused(path, r"m\.gguf: cannot be read \(.+\); download")
    path.write_bytes(b"PK" + content)
    assert_refused(path, "GGUF magic invalid")

    for key, place in ((b"tokenizer.ggml.merges", 8), (b"token_embd.weight", 4), (b"tokenizer.ggml.model", 4)):
        start = content.index(key) + len(key) + place
        path.write_bytes(content[:start] + (2**62).to_bytes(8, "little") + content[start + 8 :])
        assert_refused(path, "cannot be read")
    path.write_bytes(content[:8] + (2**40).to_bytes(8, "little") + content[16:])  # tensors
    assert_refused(path, "cannot be read")
    start = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    path.write_bytes(content[:start] + (999).to_bytes(4, "little") + content[start + 4 :])
    assert_refused(path, r"999\)? is not a valid GGMLQuantizationType")

    path.write_bytes(content)
    monkeypatch.setattr(our_gguf, "MAX_HEADER_PARTS", 100)
    assert_refused(path, "its header has more than 100 parts")


def test_read_gguf_refuses_tensors_in_the_same_place(tmp_path: Path):
    """A small file could state a model of any size."""
    path = tmp_path / "m.gguf"
    write_file(path)
    reader = gguf.GGUFReader(path, "r+")
    for tensor in reader.tensors:
        tensor.field.parts[-1][0] = 0  # its offset
    reader.data.flush()
    os.truncate(path, reader.data_offset + max(tensor.n_bytes for tensor in reader.tensors))
    assert_refused(path, "states tensors larger than the file")


def test_the_package_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(our_gguf, "find_spec", lambda name: None)
    assert_refused(tmp_path / "m.gguf", r"needs the package gguf; pip install -e")


# --- Rotary scaling


@pytest.mark.parametrize(
    ("scaling", "theta", "head_dim"),
    [
        ([8.0, 1.0, 4.0, 8192.0], 5e5, 128),
        ([8.0, 1.0, 4.0, 64.0], 1e4, 16),
        ([2.5, 1.0, 5.5, 300.0], 1e4, 64),
    ],
)
def test_llama_3s_scaling_is_read_back_from_its_divisors(scaling: list[float], theta: float, head_dim: int):
    config = GPTConfig(**MODERN | {"qk_norm": False, "n_embd": 4 * head_dim}, rope_theta=theta)
    scaled = GPTConfig(**asdict(config) | {"rope_scaling": scaling})
    ours = [rotary_frequencies(c, torch.device("cpu")) for c in (config, scaled)]
    divisors = rope_divisors(scaling, theta, head_dim).astype(np.float32)
    np.testing.assert_allclose(divisors, (ours[0] / ours[1]).numpy(), rtol=1e-5)
    assert our_gguf._to_rope_scaling("m", divisors, None, asdict(config)) == scaling
    half = [scaling[0], *(2 * number for number in scaling[1:])]  # the same function
    again = rope_divisors(half, theta, head_dim).astype(np.float32)
    assert our_gguf._to_rope_scaling("m", again, None, asdict(config)) == scaling


# --- Tokenizers


def pipelines() -> dict[str, tokenizers.Tokenizer]:
    """Published pipelines, with the vocabulary of `WORDS`."""
    content = WORDS.to_json()["model"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    patterns = {"llama-bpe": LLAMA_3_PATTERN, "qwen2": LLAMA_3_PATTERN.replace("{1,3}", "")}
    splits = {name: pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for name, p in patterns.items()}
    steps = {"gpt-2": gpt2, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])}
    steps |= {name: pre_tokenizers.Sequence([split, byte_level]) for name, split in splits.items()}
    made = {}
    for name, step in steps.items():
        merges = [(left, right) for left, right in content["merges"]]
        inner = tokenizers.Tokenizer(models.BPE(content["vocab"], merges, ignore_merges=name == "llama-bpe"))
        inner.normalizer = normalizers.NFC() if name == "qwen2" else None
        inner.pre_tokenizer = step
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
        inner.add_tokens(["<|im_start|>"])
        made[name] = inner
    return made


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_published_pipelines_are_written_by_name_and_read_with_equal_ids(pre: str):
    original = Tokenizer(pipelines()[pre])
    settings = to_settings(original, 302, [297])
    assert (settings["model"], settings["pre"]) == ("gpt2", pre)
    assert settings["tokens"][300:] == ["[PAD300]", "[PAD301]"]
    read = to_tokenizer("m", settings)
    assert read.vocab == original.vocab
    assert read.special_tokens == original.special_tokens
    rng = random.Random(0)
    for text in HARD_TEXTS + HARD_PIECES + [fuzz_text(rng, HARD_TEXTS[3], ["<|im_start|>"]) for _ in range(300)]:
        assert read.encode(text) == original.encode(text)
        assert read.encode_ordinary(text).tolist() == original.encode_ordinary(text).tolist()


def merge_by_scores(text: str, vocab: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: the two neighbors whose union has the highest score, the left ones of several."""
    parts = list(text.replace(" ", "▁"))
    while True:
        pairs = [(vocab[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in vocab]
        if not pairs:
            return parts
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_bpe_has_the_ids_of_its_scores(prefix: bool):
    rng = random.Random(1)
    pieces = {"▁", *"abc"}
    while len(pieces) < 80:
        pieces.add(rng.choice(sorted(pieces)) + rng.choice(sorted(pieces)))
    scores = {piece: -float(rank) for rank, piece in enumerate(sorted(pieces, key=lambda p: (len(p), p)))}
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *scores]
    settings = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 258 + [*scores.values()],
        "token_type": [UNKNOWN, CONTROL] + [BYTE] * 256 + [NORMAL] * 80,
        "add_space_prefix": prefix,
    }
    tokenizer = to_tokenizer("m", settings)
    for length in range(60):
        text = "".join(rng.choices("aabc ", k=length))
        parts = merge_by_scores(" " * (prefix and length > 0) + text, scores)
        assert tokenizer.encode(text) == [tokens.index(part) for part in parts]
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<s>é") == [*tokenizer.encode("a"), 1, *tokenizer.encode("é")]
    assert tokenizer.encode("é")[-2:] == [2 + byte for byte in "é".encode()]

    written = to_settings(tokenizer, len(tokens), [1])
    assert {key: written[key] for key in settings if key != "scores"} == {
        key: value for key, value in settings.items() if key != "scores"
    }
    again = to_tokenizer("m", written)
    assert again.to_json() == tokenizer.to_json()


def refused_tokenizers() -> dict[str, tuple[Tokenizer, str]]:
    inner = pipelines()
    inner["qwen2"].normalizer = normalizers.Lowercase()
    inner["gpt-2"].add_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    unigram = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("<unk>", 0.0)], 1))
    bare = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    return {
        "words": (Tokenizer.train_bpe(HARD_TEXTS, 300, "words"), r"splits text .* \(one trained with --pattern=gpt2"),
        "lowercase": (Tokenizer(inner["qwen2"]), "changes text by Lowercase"),
        "lstrip": (Tokenizer(inner["gpt-2"]), "has tokens that take the spaces beside them"),
        "unigram": (Tokenizer(unigram), r"is of a kind \(Unigram\)"),
        "no split": (Tokenizer(bare), "is no byte-level one"),
    }


@pytest.mark.parametrize("name", ["words", "lowercase", "lstrip", "unigram", "no split"])
def test_tokenizers_without_an_equal_are_refused(name: str):
    tokenizer, message = refused_tokenizers()[name]
    with pytest.raises(InputError, match=f"^--to: llama.cpp has no equal of this tokenizer, which {message}.*; export"):
        to_settings(tokenizer, tokenizer.vocab_size, [])


# --- Write


def write_model(path: Path, tokenizer: Tokenizer, dtype: str = "float32", **sizes: Any) -> GPT:
    torch.manual_seed(0)
    model = randomize(GPT(GPTConfig(**SMALL | sizes, vocab_size=tokenizer.vocab_size)), 0.3)
    model.token_embedding.weight.data[tokenizer.vocab_size :] = 0
    write_gguf(path, asdict(model.config), model.state_dict(), tokenizer, dtype=dtype)
    return model


def test_of_a_tied_embedding_in_two_types_the_better_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Quantizers keep GPT-2's output layer, a copy of the embedding, with more bits."""
    outputs = iter([lambda embedding: embedding, torch.randn_like])
    write_header = gguf.GGUFWriter.write_header_to_file

    def add_output(writer: Any, *args: Any) -> None:
        torch.manual_seed(0)
        embedding = randomize(GPT(config), 0.3).token_embedding.weight.detach()[: WORDS.vocab_size]
        writer.add_tensor("output.weight", next(outputs)(embedding).numpy())
        write_header(writer, *args)

    config = GPTConfig(**SMALL, vocab_size=WORDS.vocab_size)
    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", add_output)
    model = write_model(tmp_path / "m.gguf", WORDS, dtype="q8_0")
    read = read_gguf(tmp_path / "m.gguf").tensors
    rows = model.token_embedding.weight[: WORDS.vocab_size]
    assert torch.equal(read["token_embedding.weight"], rows)
    assert not torch.equal(read["blocks.0.mlp.up.weight"], model.blocks[0].mlp.up.weight)  # which is quantized
    write_model(tmp_path / "m.gguf", WORDS, dtype="q8_0")
    assert_refused(tmp_path / "m.gguf", r"lm_head\.weight is not the token embedding, although tied")


def test_characters_get_an_end_token_that_is_never_the_most_likely(tmp_path: Path):
    """llama.cpp takes id 11 for the end of text if no token is stated."""
    write_model(tmp_path / "m.gguf", CHARACTERS)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    V = CHARACTERS.vocab_size
    fields = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in reader.fields.items()}
    assert fields["tokens"] == [*sorted(CHARACTERS.vocab), ADDED_END]
    assert (fields["eos_token_id"], fields["suppress_tokens"], fields["add_bos_token"]) == (V, [V], False)
    rows = next(torch.from_numpy(t.data.copy()) for t in reader.tensors if t.name == "token_embd.weight")
    assert len(rows) == V + 1
    logits = torch.randn(1000, 32) @ rows.t()
    assert (logits[:, V] < logits[:, :V].amax(1)).all()

    weights = read_gguf(tmp_path / "m.gguf")
    assert weights.tokenizer is not None
    assert (weights.tokenizer.name, weights.tokenizer.vocab, weights.end_ids) == ("char", CHARACTERS.vocab, [])
    assert len(weights.tensors["token_embedding.weight"]) == weights.config["vocab_size"] == V


def test_end_tokens_and_template_come_back(tmp_path: Path):
    words = Tokenizer.train_bpe(HARD_TEXTS, 300)
    words.template = CHATML_TEMPLATE
    write_model(tmp_path / "m.gguf", words)
    weights = read_gguf(tmp_path / "m.gguf")
    assert weights.end_ids == [words.end_of_text, words.special_tokens["<|im_end|>"]]
    tokenizer = read_tokenizer(str(tmp_path / "m.gguf"))  # as data/prepare.py does
    assert tokenizer.named_tokens == words.named_tokens
    assert (tokenizer.template, tokenizer.end_of_text) == (words.template, words.end_of_text)
    config = TrainConfig(init_from=str(tmp_path / "m.gguf"), dropout=0.1, block_size=8)
    model, tuned = load_weights(config, {"block_size": 8}, World(0, 1, torch.device("cpu"), torch.float32))
    assert (model.config.dropout, model.config.block_size) == (0.1, 8)
    assert tuned is not None
    assert tuned.vocab == words.vocab


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": lambda tensor: tensor.half().float(),
    "bfloat16": lambda tensor: tensor.bfloat16().float(),
    "q8_0": lambda tensor: torch.from_numpy(
        gguf.dequantize(gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    ),
}


@pytest.mark.parametrize("dtype", ROUNDED)
def test_matrices_are_rounded_and_vectors_are_not(tmp_path: Path, dtype: str):
    model = write_model(tmp_path / "m.gguf", Tokenizer.bytes(), dtype, **MODERN, qk_norm=False, n_inner=40)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    for name, tensor in model.state_dict().items():
        expected = tensor[:257] if name == "token_embedding.weight" else tensor
        if expected.dim() == 2:  # of the last matrix the rows are no multiple of 32
            is_odd = dtype == "q8_0" and name.endswith("down.weight")
            expected = ROUNDED["float16" if is_odd else dtype](expected)
        assert torch.equal(tensors[name], expected)


def test_write_gguf_refuses_a_scaling_that_llama_cpp_ignores(tmp_path: Path):
    with pytest.raises(InputError, match=r"Llama 3's rope_scaling only for Llama, not for qwen3"):
        write_model(tmp_path / "m.gguf", WORDS, **MODERN, rope_scaling=[8.0, 1.0, 4.0, 8.0])
    assert not os.listdir(tmp_path)
