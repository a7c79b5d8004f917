"""Other programs' checkpoints: as transformers writes them, as nanoGPT names them, and as nobody should."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from model import GPT
from nanogpt.errors import InputError
from nanogpt.interop.huggingface import TOKENIZER, read_tokenizer, read_weights
from nanogpt.interop.nanogpt_ckpt import NANOGPT_PADDED_VOCAB
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32}
IDX = torch.arange(16).view(1, 16) * 6 % 90


def build_oracle(vocab_size: int = 100, activation: str = "gelu_new", **changes: Any) -> Any:
    config = transformers.GPT2Config(
        **SIZES,
        vocab_size=vocab_size,
        n_positions=16,
        activation_function=activation,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    oracle = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return oracle


def build_qwen3(**changes: Any) -> Any:
    """Every gain of a norm is away from one, so that none goes missing unnoticed."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    settings = {"rope_parameters": rope, "rms_norm_eps": 1e-3, "tie_word_embeddings": False, "initializer_range": 0.1}
    torch.manual_seed(0)
    oracle = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | settings | changes)).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return oracle


def difference(model: GPT, oracle: Any) -> float:
    """The largest difference of a logit, over our vocabulary."""
    with torch.no_grad():
        ours, theirs = model.eval()(IDX, IDX)[0], oracle(IDX).logits
    return (ours - theirs[..., : ours.shape[-1]]).abs().max().item()


@pytest.fixture(scope="module")
def oracle() -> Any:
    return build_oracle()


@pytest.fixture
def folder(tmp_path: Path, oracle: Any) -> Path:
    oracle.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def with_masks(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    masks = {f"{prefix}h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(2)}
    return tensors | masks | {f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}


# ---- Hugging Face


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_folder_of_transformers(tmp_path: Path, activation: str) -> None:
    oracle = build_oracle(activation=activation)
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert difference(model, oracle) < 1e-5
    assert model.config.gelu == ("erf" if activation == "gelu" else "tanh")
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())


def test_another_width_and_epsilon(tmp_path: Path) -> None:
    oracle = build_oracle(n_inner=40, layer_norm_epsilon=0.1)
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert (model.config.n_inner, model.config.norm_eps) == (40, 0.1)
    assert difference(model, oracle) < 1e-5


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_both_layouts_with_mask_buffers(folder: Path, oracle: Any, prefix: str) -> None:
    edit_tensors(
        folder, lambda old: with_masks({prefix + name.removeprefix("transformer."): old[name] for name in old}, prefix)
    )
    assert difference(GPT.from_pretrained(str(folder)), oracle) < 1e-5


def test_stored_head(folder: Path, oracle: Any) -> None:
    edit_tensors(folder, lambda old: old | {"lm_head.weight": old["transformer.wte.weight"].clone()})
    assert difference(GPT.from_pretrained(str(folder)), oracle) < 1e-5


def test_shards(tmp_path: Path, oracle: Any) -> None:
    oracle.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert difference(GPT.from_pretrained(str(tmp_path)), oracle) < 1e-5
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(InputError, match=r"model-00002-of.*download the model again"):
        read_weights(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    oracle = build_oracle().to(dtype)
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert difference(model, oracle.float()) < 1e-5


def test_without_any_bias(folder: Path) -> None:
    edit_tensors(folder, lambda old: {name: old[name] for name in old if not name.endswith(".bias")})
    model = GPT.from_pretrained(str(folder))
    assert not model.config.bias
    oracle = build_oracle()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    assert difference(model, oracle) < 1e-5


def test_config_of_gpt2_that_leaves_sizes_out(folder: Path) -> None:
    """12 layers, and the positions by their older name."""
    edit_tensors(folder, lambda old: {"wpe.weight": old["transformer.wpe.weight"]})
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_ctx": 16, "n_embd": 32, "n_head": 2}))
    with pytest.raises(InputError, match=r"states \(missing: wte\.weight, .* and 70 more\)"):
        read_weights(folder)


def test_changes(folder: Path, oracle: Any) -> None:
    weights = read_weights(folder)
    model = GPT.from_pretrained(weights, dropout=0.25, block_size=8)
    assert (model.config.dropout, model.config.block_size, model.config.vocab_size) == (0.25, 8, 100)
    with torch.no_grad():
        assert (model.eval()(IDX[:, :8])[0] - oracle(IDX).logits[:, 7:8]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="block_size=17"):
        GPT.from_pretrained(weights, block_size=17)


def test_tokenizers(folder: Path) -> None:
    weights = read_weights(folder)
    assert (weights.tokenizer_folder, weights.gpt2_encoding, weights.notes) == (None, False, [])
    (folder / "vocab.json").write_text("{}")
    (note,) = read_weights(folder).notes
    assert "put a tokenizer.json beside it" in note
    Tokenizer.characters("abc").save(folder)
    weights = read_weights(folder)
    assert (weights.tokenizer_folder, weights.notes) == (folder, [])
    assert read_tokenizer(str(folder)).vocab_size == 3
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json: give a folder or hub id that has one"):
        read_tokenizer(str(folder))


def test_vocabulary_of_gpt2_needs_no_tokenizer_files(tmp_path: Path) -> None:
    build_oracle(GPT2_VOCAB).save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.gpt2_encoding
    assert "50257 ids are taken for GPT-2's encoding" in weights.notes[0]


def test_hub(folder: Path, oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(source: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(source)
        assert allow_patterns == [*TOKENIZER] or {"config.json", *TOKENIZER} <= set(allow_patterns)
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (folder / "gpt2").mkdir()  # the four sizes mean OpenAI's, whatever lies here
    monkeypatch.chdir(folder)
    for source in ("gpt2", "gpt2-xl", "openai-community/gpt2-medium"):
        assert difference(GPT.from_pretrained(source), oracle) < 1e-5
    Tokenizer.characters("abc").save(folder)
    assert read_tokenizer("gpt2").vocab_size == 3
    assert asked == ["gpt2", "gpt2-xl", "openai-community/gpt2-medium", "gpt2"]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="neither a file or folder here nor a public model"):
        read_weights("no/such/folder")

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        InputError, match=r"'gpt2' .*\(no connection\): check the path, connect to the network"
    ) as caught:
        read_weights("gpt2")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"'Qwen/Qwen3-0\.6B' .* was not downloaded"):
        read_tokenizer("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"activation_function": ["gelu"]}, "activation_function="),
        (
            {"n_inner": 100},
            r"dtype: h\.0\.mlp\.c_fc\.weight \(torch\.float32 \(32, 128\) instead of float \(32, 100\)\),",
        ),
        ({"n_inner": 0, "layer_norm_epsilon": 0}, r"impossible sizes \(n_inner=0, norm_eps=0\)"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_head": 5}, "n_embd=32 is not divisible by n_head=5"),
        ({"n_layer": 0, "n_embd": "32"}, "n_layer=0, n_embd='32'"),
        ({"n_layer": 1}, r"unexpected: h\.1\.attn\.c_attn\.bias, .* and 8 more"),
        ({"n_layer": 3}, r"missing: h\.2\.ln_1\.weight, .* and 8 more"),
        ({"vocab_size": 101}, r"wte\.weight \(torch\.float32 \(100, 32\) instead of float \(101, 32\)\)"),
        ({"n_positions": 17}, r"wpe\.weight"),
    ],
)
def test_configurations_that_do_not_fit(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.attn.c_attn.bias") * 0, r"missing: h\.1\.attn\.c_attn\.bias\)"),
        (lambda t: t | {"score.weight": torch.zeros(2, 32)}, r"unexpected: score\.weight\)"),
        (lambda t: t | {"lm_head.weight": torch.zeros(100, 32)}, r"lm_head\.weight of its own"),
        (lambda t: t | {"wte.weight": torch.zeros(100, 32)}, "same name under different prefixes"),
        (
            lambda t: t | {"transformer.h.0.mlp.c_fc.weight": torch.zeros(128, 32)},
            r"dtype: h\.0\.mlp\.c_fc\.weight \(torch\.float32 \(128, 32\) instead of float \(32, 128\)\)",
        ),
        (lambda t: {name: tensor.int() for name, tensor in t.items()}, r"torch\.int32.* and 24 more"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable, message: str) -> None:
    def changed(tensors: dict) -> Any:
        result = change(tensors)
        return result if isinstance(result, dict) else tensors

    edit_tensors(folder, changed)
    with pytest.raises(InputError, match=message):
        read_weights(folder)


def test_damaged_and_missing_files(folder: Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model\.safetensors was not read .*download it again"):
        read_weights(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors: .*convert them with transformers"):
        read_weights(folder)
    index = folder / "model.safetensors.index.json"
    for weight_map in ({"wte.weight": "../other/model.safetensors"}, {"wte.weight": "/etc/passwd"}, {}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match="names no shards, or files in other folders"):
            read_weights(folder)
    config.write_text("{")
    with pytest.raises(InputError, match=r"config\.json was not read"):
        read_weights(folder)
    config.unlink()
    with pytest.raises(InputError, match=r"has no config\.json: .*nanoGPT's ckpt\.pt"):
        read_weights(folder)


# ---- Hugging Face's Qwen3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 8},
        {"num_key_value_heads": 1, "hidden_size": 36, "head_dim": 6, "rms_norm_eps": 1e-6},
    ],
    ids=["untied", "tied", "one key head"],
)
def test_qwen3(tmp_path: Path, changes: dict[str, Any]) -> None:
    oracle = build_qwen3(**changes)
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert difference(model, oracle) < 1e-5
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())


def test_qwen3_in_shards(tmp_path: Path) -> None:
    oracle = build_qwen3()
    oracle.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert difference(GPT.from_pretrained(str(tmp_path)), oracle) < 1e-5


def test_qwen3_of_06b_as_it_was_released(tmp_path: Path) -> None:
    """A layer of its shape, in bfloat16, tied and yet with a stored head, the rotation where transformers 4 had it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1, "head_dim": 128}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960}
    oracle = build_qwen3(**sizes, rms_norm_eps=1e-6, tie_word_embeddings=True, initializer_range=0.02)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.bfloat16())
    oracle.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda old: old | {"lm_head.weight": old["model.embed_tokens.weight"].clone()})
    edit_tensors(tmp_path, lambda old: {name: tensor.bfloat16() for name, tensor in old.items()})
    edit_config(tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=1000000)
    weights = read_weights(tmp_path)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {torch.float32}
    assert difference(GPT.from_pretrained(weights), oracle) < 1e-5


def test_qwen3_with_a_shorter_context(tmp_path: Path) -> None:
    oracle = build_qwen3()
    oracle.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), block_size=8, dropout=0.25)
    assert (model.config.dropout, model.config.block_size, model.config.arch) == (0.25, 8, "modern")
    with torch.no_grad():
        assert (model.eval()(IDX[:, :8])[0] - oracle(IDX).logits[:, 7:8]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        model(IDX[:, :9])


YARN = {"rope_theta": 1e6, "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention'"),
        ({"layer_types": "full"}, "layer_types='full'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4}"),
        ({"rope_parameters": YARN | {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_scaling": YARN | {"type": "yarn"}}, "rope_type='yarn'"),
        ({"rope_scaling": "yarn", "rope_theta": 1e6}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_theta=None"),
        ({"rms_norm_eps": 0.0, "vocab_size": 100.0}, r"vocab_size=100\.0, norm_eps=0\.0"),
        ({"head_dim": 15}, r"impossible sizes \(head_dim=15\)"),
        ({"num_key_value_heads": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"num_hidden_layers": 1}, r"unexpected: layers\.1\.input_layernorm\.weight, .* and 7 more"),
        ({"num_hidden_layers": 3}, r"missing: layers\.2\.input_layernorm\.weight, .* and 7 more"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight of its own"),
        (
            {"num_key_value_heads": 4},
            r"dtype: layers\.0\.self_attn\.k_proj\.weight \(torch\.float32 \(32, 32\) instead of float \(64, 32\)\),",
        ),
    ],
)
def test_configurations_of_qwen3_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    build_qwen3().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.k_norm.weight"])
def test_qwen3_with_a_tensor_too_few_or_too_many(tmp_path: Path, name: str) -> None:
    build_qwen3().save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda old: {n: t for n, t in old.items() if n != name} | {"x.bias": torch.zeros(64)})
    with pytest.raises(InputError, match=rf"missing: {name.removeprefix('model.')}; unexpected: x\.bias\)"):
        read_weights(tmp_path)


# ---- nanoGPT


def nanogpt_checkpoint(oracle: Any, prefix: str = "", bias: bool = True, **changes: Any) -> dict[str, Any]:
    """What nanoGPT's train.py saves, made from transformers' weights: nn.Linear's layout, the head stored once more."""
    model = {}
    for name, tensor in with_masks(dict(oracle.state_dict()), "transformer.").items():
        if bias or not name.endswith(".bias"):
            model[prefix + name] = tensor.t().contiguous() if ".c_" in name and tensor.dim() == 2 else tensor
    c = oracle.config
    args = {**SIZES, "block_size": 16, "bias": bias, "vocab_size": c.vocab_size, "dropout": 0.1}
    return {
        "model": model,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(8)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4, "compile": True},
    } | changes


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_checkpoint_of_nanogpt(tmp_path: Path, prefix: str) -> None:
    oracle = build_oracle(activation="gelu")
    torch.save(nanogpt_checkpoint(oracle, prefix), tmp_path / "ckpt.pt")
    weights = read_weights(tmp_path)
    assert weights.train_config["dataset"] == "openwebtext"
    assert "optimizer state is not taken over" in weights.notes[0]
    model = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    assert (model.config.gelu, model.config.dropout, model.config.bias) == ("erf", 0.1, True)
    assert difference(model, oracle) < 1e-5


def test_checkpoint_of_nanogpt_with_padded_vocabulary_in_the_old_format(tmp_path: Path) -> None:
    oracle = build_oracle(NANOGPT_PADDED_VOCAB, activation="gelu")
    checkpoint = nanogpt_checkpoint(oracle, config=None, best_val_loss=1e9)
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    weights = read_weights(tmp_path)
    assert len(weights.tensors["tokens.weight"]) == weights.config["vocab_size"] == GPT2_VOCAB
    assert weights.gpt2_encoding
    assert "padding, which is dropped" in weights.notes[1]
    assert weights.train_config == {}
    assert difference(GPT.from_pretrained(weights), oracle) < 1e-5


def test_checkpoint_of_nanogpt_without_bias(tmp_path: Path) -> None:
    oracle = build_oracle(activation="gelu")
    torch.save(nanogpt_checkpoint(oracle, bias=False), tmp_path / "ckpt.pt")
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    assert difference(GPT.from_pretrained(str(tmp_path)), oracle) < 1e-5


class Evil:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(tmp_path: Path, oracle: Any, zipped: bool) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "ckpt.pt"
    checkpoint = nanogpt_checkpoint(oracle, config=Evil(sentinel))
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"it asks to run posix\.mkdir"):
        read_weights(path)
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert sentinel.exists()


def test_files_that_are_no_checkpoint_of_nanogpt(tmp_path: Path, oracle: Any) -> None:
    path, good = tmp_path / "ckpt.pt", nanogpt_checkpoint(oracle)
    with pytest.raises(InputError, match="No such file"):
        read_weights(path)
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"was not read .*give a ckpt\.pt that nanoGPT's"):
        read_weights(path)
    cases: list[tuple[dict, str]] = [
        ({"model": torch.zeros(1)}, "has no weights under 'model'"),
        ({"model": {"iter": 3}}, "has no weights under 'model'"),
        ({"model_args": {}}, "n_layer=None"),
        ({"model_args": good["model_args"] | {"n_layer": 3}}, r"missing: h\.2\.ln_1\.weight, .* and 8 more"),
    ]
    for wrong, message in cases:
        torch.save(good | wrong, path)
        with pytest.raises(InputError, match=message):
            read_weights(path)
    torch.save(good["model"], path)
    with pytest.raises(InputError, match="no 'model_args'"):
        read_weights(path)
