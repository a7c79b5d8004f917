"""Weights in both directions against transformers: the same logits, the same text, quietly, and the same bytes back."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from conftest import Export, call_main
from random_models import (
    CHARACTERS,
    MODERN,
    SMALL,
    build_gpt2,
    build_llama,
    build_qwen3,
    generate_greedy,
    save_as_nanogpt,
    save_random_run,
)
from safetensors.torch import load_file, save_file

import evaluate
from model import GPT, GPTConfig
from nanogpt.interop.huggingface import read_weights
from nanogpt.interop.nanogpt_ckpt import NANOGPT_PADDED_VOCAB
from nanogpt.text.chat import CHATML_TEMPLATE
from nanogpt.text.tokenizer import END_OF_TEXT, GPT2_VOCAB, Tokenizer

IDX = torch.arange(16).view(1, 16) * 6 % 90
TEXTS = ["To be", "Wait -- what ?  He 's gone , isn 't he .", "é\r\n\t 😀\u200d  x", f"a{'  ' * 40}b", "e\u0301\x00"]
EXPORTED: dict[str, dict[str, Any]] = {
    "gpt2": SMALL | {"dropout": 0.1},
    "gpt2, erf, no bias": SMALL | {"gelu": "erf", "bias": False, "n_inner": 72, "norm_eps": 1e-3},
    "modern, untied": MODERN | {"tied": False, "n_kv_head": 2, "head_dim": 12, "rope_theta": 5e5, "norm_eps": 1e-3},
    "modern, tied": MODERN | {"n_kv_head": 1, "n_inner": 40},
    "llama, rope scaling": MODERN | {"qk_norm": False, "n_kv_head": 2, "rope_scaling": [8.0, 1.0, 4.0, 8.0]},
    "qwen2, untied": MODERN | {"qk_norm": False, "qkv_bias": True, "tied": False, "norm_eps": 1e-5},
}
CLASSES = {"gpt2": "GPT2", "modern": "Qwen3", "llama": "Llama", "qwen2": "Qwen2"}  # in transformers, by the ids above


def difference(model: GPT, oracle: Any) -> float:
    """The largest difference of a logit, over our vocabulary."""
    with torch.no_grad():
        ours, theirs = model.eval()(IDX, IDX)[0], oracle(IDX).logits
    return (ours - theirs[..., : ours.shape[-1]]).abs().max().item()


def edit_tensors(folder: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Replace each stored tensor by those that `change(name, tensor)` returns."""
    tensors = load_file(folder / "model.safetensors")
    edited = {name: new for old, tensor in tensors.items() for name, new in change(old, tensor).items()}
    save_file(edited, folder / "model.safetensors")


# --- Read


def with_causal_masks(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    name = name.removeprefix("transformer.")
    if not name.endswith("attn.c_attn.bias"):
        return {name: tensor}
    prefix = name.removesuffix("c_attn.bias")
    return {name: tensor, f"{prefix}bias": torch.ones(1, 1, 16, 16).tril(), f"{prefix}masked_bias": torch.tensor(-1e4)}


def with_stored_head(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    is_embedding = name.endswith(("wte.weight", "tokens.weight"))
    return {name: tensor} | ({"lm_head.weight": tensor.clone()} if is_embedding else {})


def with_head_alone(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"lm_head.weight" if name.endswith(("wte.weight", "tokens.weight")) else name: tensor}


def with_rotary_buffers(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith("q_proj.weight"):
        return {name: tensor}
    return {name: tensor, name.replace("q_proj.weight", "rotary_emb.inv_freq"): torch.ones(4)}


READ: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "gpt2, gelu_pytorch_tanh": (build_gpt2, {"activation_function": "gelu_pytorch_tanh"}, None),
    "gpt2, width and epsilon": (build_gpt2, {"n_inner": 40, "layer_norm_epsilon": 0.1}, None),
    "gpt2, OpenAI's names and masks": (build_gpt2, {}, with_causal_masks),
    "gpt2, stored head": (build_gpt2, {}, with_stored_head),
    "gpt2, head alone": (build_gpt2, {}, with_head_alone),
    "qwen3, tied, head alone": (build_qwen3, {"tie_word_embeddings": True}, with_head_alone),
    "qwen3, tied, stored head": (build_qwen3, {"tie_word_embeddings": True}, with_stored_head),
    "llama, rotary buffers of old files": (build_llama, {}, with_rotary_buffers),
}


@pytest.mark.parametrize(("build", "changes", "edit"), READ.values(), ids=READ)
def test_from_pretrained_computes_the_logits_of_transformers(
    tmp_path: Path, build: Callable[..., Any], changes: dict[str, Any], edit: Any
):
    oracle = build(**changes)
    oracle.save_pretrained(tmp_path)
    if edit:
        edit_tensors(tmp_path, edit)
    model = GPT.from_pretrained(tmp_path)
    assert difference(model, oracle) < 1e-5
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())

    short = GPT.from_pretrained(tmp_path, dropout=0.25, block_size=8).eval()
    assert (short.config.dropout, short.config.block_size) == (0.25, 8)
    with torch.no_grad():
        assert (short(IDX[:, :8])[0] - oracle(IDX).logits[:, 7:8]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="block_size=17"):
        GPT.from_pretrained(tmp_path, block_size=17)


@pytest.mark.parametrize(("build", "dtype"), [(build_gpt2, torch.bfloat16), (build_qwen3, torch.float16)])
def test_from_pretrained_widens_half_precision_in_shards(tmp_path: Path, build: Any, dtype: torch.dtype):
    build().to(dtype).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    oracle = build()
    with torch.no_grad():  # the parameters alone: the rotary frequencies stay float32
        for parameter in oracle.parameters():
            parameter.copy_(parameter.to(dtype))
    model = GPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert difference(model, oracle) < 1e-5


def test_from_pretrained_reads_rope_as_qwen3_was_released(tmp_path: Path):
    """With the rotary settings where transformers 4 had them."""
    oracle = build_qwen3()
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config | {"rope_scaling": None, "rope_theta": 1000000}))
    assert difference(GPT.from_pretrained(tmp_path), oracle) < 1e-5


@pytest.mark.parametrize(("prefix", "bias"), [("", True), ("_orig_mod.", False), ("module._orig_mod.", True)])
def test_from_pretrained_reads_nanogpts_checkpoint(tmp_path: Path, prefix: str, bias: bool):
    optimizer = {"state": {0: {"exp_avg": torch.zeros(8)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    oracle = save_as_nanogpt(
        build_gpt2(), tmp_path / "ckpt.pt", prefix=prefix, bias=bias, optimizer=optimizer, config={"dataset": "poems"}
    )
    assert read_weights(tmp_path).train_config["dataset"] == "poems"
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert (model.config.gelu, model.config.bias) == ("erf", bias)
    assert difference(model, oracle) < 1e-5


def test_from_pretrained_drops_nanogpts_padding_in_the_old_format(tmp_path: Path):
    oracle = save_as_nanogpt(build_gpt2(vocab_size=NANOGPT_PADDED_VOCAB), tmp_path / "ckpt.pt", zipped=False)
    weights = read_weights(tmp_path)
    assert weights.gpt2_encoding
    assert len(weights.tensors["token_embedding.weight"]) == weights.config["vocab_size"] == GPT2_VOCAB
    assert difference(GPT.from_tensors(GPTConfig(**weights.config), weights.tensors), oracle) < 1e-5


# --- Write


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test if transformers logs a warning."""
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    yield
    log.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def weight_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", EXPORTED)
@torch.no_grad()
def test_export_computes_the_same_in_transformers_and_back(run_export: Export, kind: str):
    ours = save_random_run("out", **EXPORTED[kind])
    folder = run_export("theirs", "--out_dir=out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__.startswith(CLASSES[kind.split(",")[0]])
    assert getattr(theirs.config, "resid_pdrop", 0.0) == ours.config.dropout
    assert getattr(theirs.config, "n_ctx", 24) == 24  # GPT-2's older key, which other programs read
    assert len(theirs.get_output_embeddings().weight) == CHARACTERS.vocab_size  # without padding
    idx = torch.randint(CHARACTERS.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    assert (theirs(idx).logits - ours(idx, idx)[0]).abs().max() <= 1e-5
    # AutoTokenizer gives every Qwen2 model Qwen2's own pre-tokenizer (findings/transformers_qwen2_tokenizer.sh).
    words = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    new = theirs.generate(**words("To be", return_tensors="pt"), max_new_tokens=19, do_sample=False)
    expected = generate_greedy(ours, CHARACTERS.encode("To be"), 19)
    assert len(set(expected)) > 3
    assert words.decode(new[0]) == CHARACTERS.decode(expected)

    back = GPT.from_pretrained(folder, dropout=ours.config.dropout)
    assert asdict(back.config) == asdict(ours.config) | {"bias": ours.config.arch == "gpt2"}
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flags", [[], ["--dtype=bfloat16"], ["--shard_gb=2e-5"]], ids=["whole", "bfloat16", "shards"])
@pytest.mark.parametrize("sizes", [EXPORTED["gpt2"], EXPORTED["modern, untied"]], ids=["gpt2", "modern"])
def test_export_of_an_export_has_the_same_bytes(run_export: Export, sizes: dict[str, Any], flags: list[str]):
    save_random_run("out", **sizes)
    first = run_export("first", "--out_dir=out", *flags)
    assert weight_files(first) == weight_files(run_export("again", "--init_from=first", *flags))
    stored = [load_file(path) for path in sorted(first.glob("*.safetensors"))]
    dtype = torch.bfloat16 if "--dtype=bfloat16" in flags else torch.float32
    assert {tensor.dtype for tensors in stored for tensor in tensors.values()} == {dtype}
    assert transformers.AutoModelForCausalLM.from_pretrained(first).dtype == dtype
    if "--shard_gb=2e-5" in flags:
        sizes_of_files = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in stored]
        assert len(sizes_of_files) > 2
        assert max(sizes_of_files) <= 20_000
        index = json.loads((first / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes_of_files)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["char", "chat"])
def test_export_writes_the_same_tokenizer_and_its_end_tokens(run_export: Export, kind: str):
    ours = Tokenizer.characters("".join(TEXTS)) if kind == "char" else Tokenizer.train_bpe(TEXTS, 300)
    end = ours.end_of_text
    if kind == "chat":
        ours.template = CHATML_TEMPLATE
        around = {"single": f"{END_OF_TEXT} $A", "special_tokens": [(END_OF_TEXT, end)]}
        ours._inner.post_processor = tokenizers.processors.TemplateProcessing(**around)  # which `encode` does not apply
    save_random_run("out", ours, n_embd=8, n_layer=1)
    folder = run_export("theirs", "--out_dir=out")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = theirs(text, verbose=False)["input_ids"]  # verbose: warns of a text longer than the context
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text
    assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 24)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (end, end)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == end
    ends = None if kind == "char" else [end, ours.special_tokens["<|im_end|>"]]
    assert model.generation_config.eos_token_id == ends
    model.generate(**theirs("e", return_tensors="pt"), max_new_tokens=2)
    if kind == "char":
        with pytest.raises(Exception, match=r"Missing .* from the vocabulary"):
            theirs("\ue000")  # no other character replaces one that the model does not have


def test_export_keeps_the_end_tokens_and_template_of_a_folder(run_export: Export, tmp_path: Path):
    """As of Qwen3's, which states two end tokens, names one of them, and has no bos token."""
    folder = tmp_path / "theirs"
    words = Tokenizer.train_bpe(TEXTS, 300)
    build_qwen3(vocab_size=words.vocab_size + 5).save_pretrained(folder)
    words.template = CHATML_TEMPLATE
    words.save(folder)
    settings = {"eos_token": "<|im_end|>", "pad_token": END_OF_TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    stop, end = words.special_tokens["<|im_end|>"], words.special_tokens[END_OF_TEXT]
    ends = [stop, words.vocab_size, end]
    transformers.GenerationConfig(eos_token_id=ends).save_pretrained(folder)

    again = run_export("again", f"--init_from={folder}")
    assert transformers.GenerationConfig.from_pretrained(again).eos_token_id == sorted(ends)
    tokenizer = transformers.AutoTokenizer.from_pretrained(again)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token) == (stop, end, None)
    assert tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(folder).chat_template
    assert transformers.AutoConfig.from_pretrained(again).eos_token_id == stop


# --- Evaluate


@pytest.mark.parametrize("sizes", [SMALL, EXPORTED["modern, untied"]], ids=["gpt2", "modern"])
@torch.no_grad()
def test_evaluate_prints_the_loss_of_transformers(run_export: Export, sizes: dict[str, Any]):
    words = Tokenizer.train_bpe(TEXTS, 300)
    save_random_run("out", words, **sizes)
    folder, text = run_export("theirs", "--out_dir=out"), "".join(TEXTS).replace("\0", "") * 5 + f"¿{END_OF_TEXT}?\r\n"
    Path("text.txt").write_bytes(text.encode())
    text = text.replace("\r\n", "\n")  # as everything that reads text takes it
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [words.end_of_text, *encode(text, split_special_tokens=True, verbose=False)["input_ids"]]
    nats = 0.0
    for start in range(0, len(ids) - 1, 24):
        row = torch.tensor([ids[start : start + 25]])
        logprobs = theirs(row[:, :-1]).logits.double().log_softmax(-1)
        nats -= float(logprobs.gather(-1, row[:, 1:, None]).sum())

    for source in ("--init_from=theirs", "--out_dir=out"):
        flags = ["--text=text.txt", "--device=cpu", "--dtype=float32", "--json=results.json"]
        call_main(evaluate.main, source, *flags)
        results = json.loads(Path("results.json").read_text())
        assert results["tokens"] == len(ids) - 1
        assert results["loss"] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
        assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-5)
        assert results["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
