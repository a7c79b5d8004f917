"""Names and shapes of tensors in other programs' checkpoints, and ours."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.errors import InputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WRAPPERS = re.compile(r"((module|_orig_mod)\.)*((transformer|model)\.)?")  # of DDP, torch.compile, the headed model
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers, not parameters
TRANSPOSED = ".c_"  # in the names of those that Hugging Face stores as (in, out)
# For each architecture of ours: their name of a tensor -> ours, its rows and columns (`_layout` tells the letters).
# Several of the same name of ours follow each other in its rows.
TENSORS: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "wte": ("tokens", "V", "C"),
        "wpe": ("positions", "T", "C"),
        "h.*.ln_1": ("blocks.*.norm1", "C"),
        "h.*.attn.c_attn": ("blocks.*.attention.qkv", "QKV", "C"),
        "h.*.attn.c_proj": ("blocks.*.attention.out", "C", "Q"),
        "h.*.ln_2": ("blocks.*.norm2", "C"),
        "h.*.mlp.c_fc": ("blocks.*.mlp.up", "I", "C"),
        "h.*.mlp.c_proj": ("blocks.*.mlp.down", "C", "I"),
        "ln_f": ("norm", "C"),
    },
    "modern": {
        "embed_tokens": ("tokens", "V", "C"),
        "layers.*.input_layernorm": ("blocks.*.norm1", "C"),
        "layers.*.self_attn.q_proj": ("blocks.*.attention.qkv", "Q", "C"),
        "layers.*.self_attn.k_proj": ("blocks.*.attention.qkv", "KV", "C"),
        "layers.*.self_attn.v_proj": ("blocks.*.attention.qkv", "KV", "C"),
        "layers.*.self_attn.q_norm": ("blocks.*.attention.q_norm", "D"),
        "layers.*.self_attn.k_norm": ("blocks.*.attention.k_norm", "D"),
        "layers.*.self_attn.o_proj": ("blocks.*.attention.out", "C", "Q"),
        "layers.*.post_attention_layernorm": ("blocks.*.norm2", "C"),
        "layers.*.mlp.gate_proj": ("blocks.*.mlp.gate", "I", "C"),
        "layers.*.mlp.up_proj": ("blocks.*.mlp.up", "I", "C"),
        "layers.*.mlp.down_proj": ("blocks.*.mlp.down", "C", "I"),
        "norm": ("norm", "C"),
        "lm_head": ("head", "V", "C"),
    },
}
# For each model_type: GPTConfig's sizes and their keys in config.json.
SIZES = {
    "gpt2": {name: name for name in ("n_layer", "n_head", "n_embd", "n_inner", "vocab_size")}
    | {"block_size": "n_positions", "norm_eps": "layer_norm_epsilon"},
    "qwen3": {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads"}
    | {"head_dim": "head_dim", "n_embd": "hidden_size", "n_inner": "intermediate_size", "vocab_size": "vocab_size"}
    | {"block_size": "max_position_embeddings", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"},
}
# What this network can compute of other settings; the first is what transformers takes for a missing key.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
ALLOWED: dict[str, dict[str, tuple]] = {
    "gpt2": {"activation_function": tuple(GELU), "tie_word_embeddings": (True,)}
    | {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,), "tie_word_embeddings": (False, True)}
    | {"use_sliding_window": (False,), "layer_types": ("full_attention", None)}
    | {"rope_type": ("default",), "partial_rotary_factor": (1.0,)},
}


@dataclass
class Weights:
    """A model read from elsewhere.

    config: arguments of GPTConfig. tensors: float32 in our names, in their own memory; the token embedding has its true
    vocab_size rows. tokenizer_folder: a folder with its tokenizer.json. gpt2_encoding: no tokenizer came along, and it
    is GPT-2's. notes: lines that the user should see. train_config: of nanoGPT's checkpoints, the run's settings (such
    as "dataset").
    """

    source: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tokenizer_folder: Path | None = None
    gpt2_encoding: bool = False
    notes: list[str] = field(default_factory=list)
    train_config: dict[str, Any] = field(default_factory=dict)


def checked_sizes(source: str, sizes: dict[str, Any]) -> dict[str, Any]:
    wrong = []
    for name, value in sizes.items():
        kinds = (int, float) if name in ("rope_theta", "norm_eps") else (int,)
        # A name for each tensor of each layer will be made: millions of layers would take the memory.
        most = 10_000 if name == "n_layer" else math.inf
        if type(value) not in kinds or not 0 < value <= most or (name == "head_dim" and value % 2):
            wrong.append(f"{name}={value!r}")
    whole, part = ("n_head", "n_kv_head") if "n_kv_head" in sizes else ("n_embd", "n_head")
    if wrong or sizes[whole] % sizes[part]:
        wrong = wrong or [f"{whole}={sizes[whole]} is not divisible by {part}={sizes[part]}"]
        raise InputError(f"{source} has impossible sizes ({', '.join(wrong)}): restore it or use another")
    return sizes


def strip_wrappers(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that TENSORS has, without wrappers' prefixes and without mask buffers."""
    plain = {WRAPPERS.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"{source} holds tensors of the same name under different prefixes: save the model again")
    return {name: tensor for name, tensor in plain.items() if not CAUSAL_MASK.fullmatch(name)}


def translate(source: str, stored: dict[str, Tensor], config: dict[str, Any], transposed: bool) -> dict[str, Tensor]:
    """Float32 copies under our names, matrices as (out, in); `transposed`: a block of GPT-2's has them as (in, out).

    Raises InputError with the names of tensors that are missing, left over, or of a wrong shape or dtype.
    """
    expected = tensor_layout(config)
    tied = config.get("tied", True)
    head = stored.pop("lm_head.weight", None) if tied else None  # the embedding, stored twice by some programs
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    misshapen = []
    parts: dict[str, list[Tensor]] = {}
    for theirs in [name for name in expected if name in stored]:
        (ours, shape), tensor = expected[theirs], stored[theirs]
        is_flipped = transposed and TRANSPOSED in theirs
        there = shape[::-1] if is_flipped else shape
        if tensor.shape != there or tensor.dtype not in FLOATS:
            misshapen.append(f"{theirs} ({tensor.dtype} {tuple(tensor.shape)} instead of float {there})")
        else:
            parts.setdefault(ours, []).append(tensor.t() if is_flipped else tensor)
    faults = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{fault}: {few(names)}" for fault, names in faults.items() if names)
        raise InputError(f"{source} is no model of the sizes it states ({told}): save the model again or use another")
    tensors = {ours: torch.cat(rows).float() for ours, rows in parts.items()}
    if head is not None and not torch.equal(head.float(), tensors["tokens.weight"]):
        raise InputError(
            f"{source} has an lm_head.weight of its own, which should be the token embedding: use another model"
        )
    return tensors


def tensor_layout(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Their name of each tensor -> ours and its shape, matrices as (out, in), for GPTConfig's arguments `config`."""
    c = {"arch": "gpt2", "tied": True, "n_kv_head": config["n_head"], "n_inner": 4 * config["n_embd"]} | config
    D = c.get("head_dim", c["n_embd"] // c["n_head"])
    sizes = {"V": c["vocab_size"], "T": c["block_size"], "C": c["n_embd"], "I": c["n_inner"], "D": D}
    sizes |= {"Q": c["n_head"] * D, "KV": c["n_kv_head"] * D, "QKV": (c["n_head"] + 2 * c["n_kv_head"]) * D}
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for theirs, (ours, *letters) in TENSORS[c["arch"]].items():
        shape = tuple(sizes[letter] for letter in letters)
        for i in map(str, range(c["n_layer"] if "*" in theirs else 1)):
            name, our_name = theirs.replace("*", i), ours.replace("*", i)
            names[f"{name}.weight"] = (f"{our_name}.weight", shape)
            if c["bias"] and ours not in ("tokens", "positions"):
                names[f"{name}.bias"] = (f"{our_name}.bias", shape[:1])
    if c["tied"]:
        names.pop("lm_head.weight", None)
    return names


def few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
