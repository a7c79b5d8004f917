"""Cases of weights: folders in Hugging Face's format as other programs write them, and our exports."""

import json
import os
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file, save_file

from cases.command import Case, Result, run

ROWS, CHANNELS, CONTEXT = 259, 16, 32


def write_tokenizer(folder: Path, rstrip: bool = False) -> tokenizers.Tokenizer:
    """A tokenizer.json of 256 bytes and three special tokens, in a new folder.

    rstrip: the special tokens take the white space after them along.
    """
    folder.mkdir()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, rstrip=rstrip) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def write_gpt2(folder: Path) -> dict[str, torch.Tensor]:
    """A GPT-2 of one layer with random weights in a new folder; its tensors."""
    write_tokenizer(folder)
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": CHANNELS, "n_positions": CONTEXT}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS}))
    C = CHANNELS
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (ROWS, C), "wpe.weight": (CONTEXT, C)}
    for name, shape in (("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)), ("mlp.c_fc", (C, 4 * C))):
        shapes |= {f"h.0.{name}.weight": shape, f"h.0.{name}.bias": shape[1:]}
    shapes |= {"h.0.mlp.c_proj.weight": (4 * C, C), "h.0.mlp.c_proj.bias": (C,)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (C,), f"{name}.bias": (C,)}
    return write_tensors(folder, "transformer.", shapes)


def write_qwen3(folder: Path) -> dict[str, torch.Tensor]:
    """A Qwen3 of one layer with random weights in a new folder; its tensors."""
    write_tokenizer(folder)
    config = {"model_type": "qwen3", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"head_dim": 8, "hidden_size": CHANNELS, "intermediate_size": 24, "vocab_size": ROWS}
    config |= {"max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    C = CHANNELS
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (ROWS, C), "norm.weight": (C,)}
    layer = {"self_attn.q_proj": (16, C), "self_attn.k_proj": (8, C), "self_attn.v_proj": (8, C)}
    layer |= {"self_attn.o_proj": (C, 16), "mlp.gate_proj": (24, C), "mlp.up_proj": (24, C), "mlp.down_proj": (C, 24)}
    for name, shape in layer.items():
        shapes[f"layers.0.{name}.weight"] = shape
    for name, width in (("input_layernorm", C), ("post_attention_layernorm", C)):
        shapes[f"layers.0.{name}.weight"] = (width,)
    for name in ("q_norm", "k_norm"):
        shapes[f"layers.0.self_attn.{name}.weight"] = (8,)
    return write_tensors(folder, "model.", shapes)


def write_tensors(folder: Path, prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tensors = {prefix + name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def export(checkout: Path, model: Path, to: Path) -> Result:
    return run(checkout, "export.py", f"--init_from={model}", f"--to={to}")


def store_head_alone(checkout: Path, folder: Path, shards: bool) -> tuple[bool, str]:
    """Export a folder in which the tied embedding has the head's name."""
    model = folder / "model"
    tensors = write_gpt2(model)
    embedding = tensors.pop("transformer.wte.weight")
    if shards:
        (model / "model.safetensors").unlink()
        files = {"model-00001-of-00002.safetensors": tensors}
        files["model-00002-of-00002.safetensors"] = {"lm_head.weight": embedding}
        for file, part in files.items():
            save_file(part, model / file)
        weight_map = {name: file for file, part in files.items() for name in part}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file({**tensors, "lm_head.weight": embedding}, model / "model.safetensors")
    result = export(checkout, model, folder / "again")
    if result.status:
        return False, result.last_line
    again = load_file(folder / "again/model.safetensors")
    return torch.equal(again["transformer.wte.weight"], embedding), "loaded"


def train(checkout: Path, folder: Path, model: Path) -> Result:
    """Prepare a text with a model's tokenizer and train the model on it for a step, into `folder`/out."""
    (folder / "text.txt").write_text("To be, or not to be. " * 100)
    data = [f"--input={folder / 'text.txt'}", f"--out={folder / 'data'}", f"--tokenizer={model}", "--workers=1"]
    prepared = run(checkout, "data/prepare.py", *data)
    if prepared.status:
        return prepared
    flags = ["--max_iters=1", "--device=cpu", "--compile=False", "--gradient_accumulation_steps=1", "--batch_size=4"]
    flags += [f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}", f"--init_from={model}", "--eval_iters=1"]
    return run(checkout, "train.py", *flags)


def add_a_token(checkout: Path, folder: Path) -> tuple[bool, str]:
    """Train and export a model whose tokenizer has a [PAD] that the model has no row for."""
    model = folder / "model"
    write_gpt2(model)
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(model / "tokenizer.json"))
    trained = train(checkout, folder, model)
    if trained.status:
        return trained.is_clear_error, f"training: {trained.last_line}"
    exported = run(checkout, "export.py", f"--out_dir={folder / 'out'}", f"--to={folder / 'theirs'}")
    is_named = "[PAD]" in trained.output and "[PAD]" in exported.output
    return exported.status == 0 and is_named, f"trains; export: {exported.last_line}"


def spoil(checkout: Path, folder: Path, value: float, script: str) -> tuple[bool, str]:
    """Use a folder in which one weight is not finite."""
    model = folder / "model"
    tensors = write_gpt2(model)
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors")
    if script == "export.py":
        result = export(checkout, model, folder / "again")
    elif script == "train.py":
        result = train(checkout, folder, model)
    else:
        flags = ["--start=To be", "--num_samples=1", "--max_new_tokens=5", "--device=cpu", "--compile=False"]
        result = run(checkout, script, f"--init_from={model}", *flags)
    return result.is_clear_error and "mlp" in result.output, f"status {result.status}: {result.last_line}"


def read_modes(checkout: Path, folder: Path) -> tuple[bool, str]:
    """The modes of a checkpoint's and an export's files, with a umask that lets all read."""
    model = folder / "model"
    write_gpt2(model)
    before = os.umask(0o022)
    try:
        train(checkout, folder, model)
        export(checkout, model, folder / "again")
    finally:
        os.umask(before)
    files = [*(folder / "again").iterdir(), *(folder / "out/ckpt").glob("step-*/*")]
    modes = {path.name: path.stat().st_mode & 0o777 for path in files}
    seen = ", ".join(f"{name} {mode:o}" for name, mode in sorted(modes.items()) if name.endswith("safetensors"))
    return len(modes) > 5 and set(modes.values()) == {0o644}, seen


CASES: dict[str, Case] = {
    "W1": Case(
        "tied weights stored as `lm_head.weight` alone (`safetensors.torch.save_model`)",
        lambda checkout, folder: store_head_alone(checkout, folder, shards=False),
    ),
    "W1 shards": Case("the same in shards", lambda checkout, folder: store_head_alone(checkout, folder, shards=True)),
    "W2": Case("a tokenizer with one `[PAD]` more than the model has rows: train, export", add_a_token),
    "W3": Case("export of an infinite weight", lambda c, f: spoil(c, f, float("inf"), "export.py")),
    "W3 NaN": Case("export of a NaN", lambda c, f: spoil(c, f, float("nan"), "export.py")),
    "W3 sample": Case("sampling from an infinite weight", lambda c, f: spoil(c, f, float("inf"), "sample.py")),
    "W3 train": Case("training from an infinite weight", lambda c, f: spoil(c, f, float("-inf"), "train.py")),
    "W4": Case("the modes of weights' files, umask 022", read_modes),
}
