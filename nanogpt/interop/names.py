"""Tensor names, sizes and settings in other programs' checkpoints, beside ours.

To add an architecture of Hugging Face:

1. Make `GPTConfig` and the network in model.py compute it.
2. Describe it in `ARCHITECTURES`; reading, writing and the error messages follow from that table.
3. Add its sizes to tests/oracles/test_huggingface_models.py, which compares logits with transformers both ways.
"""

import math
import re
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.schema import Count, matches
from nanogpt.text.tokenizer import Tokenizer

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Prefixes by DDP, torch.compile, the headed model.
WRAPPERS = re.compile(r"((module|_orig_mod)\.)*((transformer|model)\.)?")
# Buffers, not parameters: the causal masks of old GPT-2 files, the rotary frequencies of old Llama files.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
MAX_LAYERS = 1000  # each layer takes memory for its tensors' names, before any file is looked at
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}  # transformers' name -> GPTConfig.gelu


class TensorSpec(NamedTuple):
    """A tensor of ours: its name and its shape, whose sizes are fields of GPTConfig or those that `_sizes` adds."""

    name: str
    rows: str
    columns: str | None = None  # None: a vector
    is_transposed: bool = False  # Hugging Face stores it as (in, out), we as (out, in)


@dataclass(frozen=True)
class Architecture:
    """An architecture as Hugging Face stores it. `*` in a tensor's name stands for the number of the layer."""

    fields: dict[str, Any]  # of GPTConfig, by which an export finds its architecture: the first in ARCHITECTURES
    model_type: str  # in config.json
    model_class: str  # transformers', in config.json
    prefix: str  # of all stored names but lm_head's
    has_biases: bool  # every layer but the embeddings has a bias, or none has one
    # Their name -> ours. Several with the same name of ours follow each other in its rows.
    tensors: dict[str, TensorSpec]
    sizes: dict[str, str]  # GPTConfig's field -> key in config.json
    supported: dict[str, tuple]  # key in config.json -> values that model.py computes; first transformers' default
    defaults: dict[str, Any] = field(default_factory=dict)  # transformers', for keys that some files leave out
    written: dict[str, Any] = field(default_factory=dict)  # further keys of an exported config.json


ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # Llama 3's keys

GPT2 = Architecture(
    fields={"arch": "gpt2"},
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    prefix="",  # as in OpenAI's own files; transformers takes both, mlx-lm only this
    has_biases=True,
    tensors={
        "wte": TensorSpec("token_embedding", "vocab_size", "n_embd"),
        "wpe": TensorSpec("position_embedding", "block_size", "n_embd"),
        "h.*.ln_1": TensorSpec("blocks.*.norm1", "n_embd"),
        "h.*.attn.c_attn": TensorSpec("blocks.*.attention.qkv", "qkv_size", "n_embd", is_transposed=True),
        "h.*.attn.c_proj": TensorSpec("blocks.*.attention.out", "n_embd", "q_size", is_transposed=True),
        "h.*.ln_2": TensorSpec("blocks.*.norm2", "n_embd"),
        "h.*.mlp.c_fc": TensorSpec("blocks.*.mlp.up", "n_inner", "n_embd", is_transposed=True),
        "h.*.mlp.c_proj": TensorSpec("blocks.*.mlp.down", "n_embd", "n_inner", is_transposed=True),
        "ln_f": TensorSpec("norm", "n_embd"),
    },
    sizes={
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "n_inner": "n_inner",
        "vocab_size": "vocab_size",
        "block_size": "n_positions",
        "norm_eps": "layer_norm_epsilon",
    },
    supported={
        "activation_function": tuple(GELU),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    defaults={"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "layer_norm_epsilon": 1e-5},
)

QWEN3 = Architecture(
    fields={"arch": "modern", "qk_norm": True, "qkv_bias": False},
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    prefix="model.",
    has_biases=False,
    tensors={
        "embed_tokens": TensorSpec("token_embedding", "vocab_size", "n_embd"),
        "layers.*.input_layernorm": TensorSpec("blocks.*.norm1", "n_embd"),
        "layers.*.self_attn.q_proj": TensorSpec("blocks.*.attention.qkv", "q_size", "n_embd"),
        "layers.*.self_attn.k_proj": TensorSpec("blocks.*.attention.qkv", "kv_size", "n_embd"),
        "layers.*.self_attn.v_proj": TensorSpec("blocks.*.attention.qkv", "kv_size", "n_embd"),
        "layers.*.self_attn.q_norm": TensorSpec("blocks.*.attention.q_norm", "head_dim"),
        "layers.*.self_attn.k_norm": TensorSpec("blocks.*.attention.k_norm", "head_dim"),
        "layers.*.self_attn.o_proj": TensorSpec("blocks.*.attention.out", "n_embd", "q_size"),
        "layers.*.post_attention_layernorm": TensorSpec("blocks.*.norm2", "n_embd"),
        "layers.*.mlp.gate_proj": TensorSpec("blocks.*.mlp.gate", "n_inner", "n_embd"),
        "layers.*.mlp.up_proj": TensorSpec("blocks.*.mlp.up", "n_inner", "n_embd"),
        "layers.*.mlp.down_proj": TensorSpec("blocks.*.mlp.down", "n_embd", "n_inner"),
        "norm": TensorSpec("norm", "n_embd"),
        "lm_head": TensorSpec("head", "vocab_size", "n_embd"),
    },
    sizes={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "head_dim": "head_dim",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "vocab_size": "vocab_size",
        "block_size": "max_position_embeddings",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
    },
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (False, True),
        "use_sliding_window": (False,),
        "layer_types": ("full_attention", None),
        "rope_type": ("default", "llama3"),
        "partial_rotary_factor": (1.0,),
    },
    written={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
)

QK_NORMS = ("blocks.*.attention.q_norm", "blocks.*.attention.k_norm")

LLAMA = replace(
    QWEN3,
    fields={"arch": "modern", "qk_norm": False, "qkv_bias": False},
    model_type="llama",
    model_class="LlamaForCausalLM",
    tensors={name: spec for name, spec in QWEN3.tensors.items() if spec.name not in QK_NORMS},
    supported=QWEN3.supported | {"mlp_bias": (False,)},
    written={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    defaults={"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
)

# Without its sliding window the same network as Llama, which comes first and is the class for export.
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    model_class="MistralForCausalLM",
    supported=QWEN3.supported | {"sliding_window": (None,)},
    defaults={"rope_theta": 1e4, "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
)

QWEN2 = replace(
    LLAMA,
    fields={"arch": "modern", "qk_norm": False, "qkv_bias": True},
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    supported=QWEN3.supported,
    written={"hidden_act": "silu", "use_sliding_window": False},
    defaults={"rope_theta": 1e4, "rms_norm_eps": 1e-6},
)

ARCHITECTURES = (GPT2, QWEN3, LLAMA, MISTRAL, QWEN2)


@dataclass
class Weights:
    """A model read from elsewhere.

    config: arguments of GPTConfig. tensors: float32 under our names, in their own memory, perhaps read when they are
    looked up; the token embedding has its true vocab_size rows. tokenizer: None if it has none. gpt2_encoding: it has
    no tokenizer files and its ids are GPT-2's. notes: lines for the user. train_config: nanoGPT's settings of the run
    (such as "dataset"). end_ids: the ids that end a generated text, as far as stated.
    """

    source: str
    config: dict[str, Any]
    tensors: "LazyTensors | dict[str, Tensor]"
    tokenizer: Tokenizer | None = None
    gpt2_encoding: bool = False
    notes: list[str] = field(default_factory=list)
    train_config: dict[str, Any] = field(default_factory=dict)
    end_ids: list[int] = field(default_factory=list)

    def set_end_ids(self, ids: Iterable[int]) -> None:
        """Keep the ids that the vocabulary has, and note the others."""
        stated = sorted({*ids})
        self.end_ids = [i for i in stated if 0 <= i < self.config["vocab_size"]]
        if others := [i for i in stated if i not in self.end_ids]:
            self.notes.append(f"{self.source}: ids {others} that end a text are not in the vocabulary: ignored")

    def cut_vocabulary(self, size: int) -> None:
        """Keep the first rows of the token embedding, and of an output layer of its own."""
        self.config["vocab_size"] = size
        for name in ("token_embedding.weight", "head.weight"):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name][:size].clone()


class LazyTensors(UserDict[str, Any]):
    """Tensors by name; a function in place of one reads the given rows of it, each time anew."""

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, slice(None))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor; of a mapped file in our layout no others are read."""
        value = self.data[name]
        return value(rows) if callable(value) else value[rows]


class Unread(NamedTuple):
    """A stored tensor whose values are read once its shape is known to be right."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32


class Placement(NamedTuple):
    """The place of one of their tensors in ours."""

    name: str  # ours
    shape: tuple[int, ...]  # as we store it: matrices as (out, in)
    is_transposed: bool


def find_architecture(model_config: dict[str, Any]) -> Architecture:
    """The first architecture that has these fields of GPTConfig; a missing one has GPTConfig's default."""
    actual = {"arch": "gpt2", "qk_norm": True, "qkv_bias": False} | model_config
    return next(known for known in ARCHITECTURES if known.fields.items() <= actual.items())


def tensor_layout(model_config: dict[str, Any], *, transposed: bool = True) -> dict[str, Placement]:
    """Their name of each tensor, without the prefix -> its place in ours.

    model_config: arguments of GPTConfig. transposed: the matrices that Hugging Face stores as (in, out) are so.
    """
    architecture = find_architecture(model_config)
    sizes = _sizes(model_config)
    layout: dict[str, Placement] = {}
    for stored_name, spec in architecture.tensors.items():
        if stored_name == "lm_head" and model_config.get("tied", True):
            continue
        shape = tuple(sizes[size] for size in (spec.rows, spec.columns) if size)
        has_bias = model_config["bias"] and not spec.name.endswith("_embedding")
        if model_config.get("qkv_bias"):
            has_bias = spec.name.endswith(".qkv")

        for layer in range(sizes["n_layer"] if "*" in stored_name else 1):
            theirs = stored_name.replace("*", str(layer))
            ours = spec.name.replace("*", str(layer))
            layout[f"{theirs}.weight"] = Placement(f"{ours}.weight", shape, transposed and spec.is_transposed)
            if has_bias:
                layout[f"{theirs}.bias"] = Placement(f"{ours}.bias", shape[:1], False)
    return layout


def _sizes(model_config: dict[str, Any]) -> dict[str, int]:
    """GPTConfig's sizes with their defaults, and the widths of queries, of keys or values, and of all three."""
    n_embd, n_head = model_config["n_embd"], model_config["n_head"]
    sizes = {"n_kv_head": n_head, "n_inner": 4 * n_embd, "head_dim": n_embd // n_head} | model_config
    sizes["q_size"] = n_head * sizes["head_dim"]
    sizes["kv_size"] = sizes["n_kv_head"] * sizes["head_dim"]
    sizes["qkv_size"] = sizes["q_size"] + 2 * sizes["kv_size"]
    return sizes


def fill_in_heads(sizes: dict[str, Any], *names: str) -> None:
    """Give "n_kv_head" and "head_dim", where they are None, what n_head and n_embd imply; in place."""
    implied = {"n_kv_head": sizes["n_head"]}
    if matches([sizes["n_head"], sizes["n_embd"]], list[Count]):
        implied["head_dim"] = sizes["n_embd"] // max(sizes["n_head"], 1)
    sizes.update({name: implied[name] for name in names if name in implied and sizes[name] is None})


def validate_sizes(source: str, sizes: dict[str, Any]) -> None:
    """Raise InputError for sizes that no network can have."""
    wrong = []
    for name, value in sizes.items():
        types = (int, float) if name in ("rope_theta", "norm_eps") else (int,)
        limit = MAX_LAYERS if name == "n_layer" else math.inf
        is_possible = type(value) in types and 0 < value <= limit and value < math.inf
        if not is_possible or (name == "head_dim" and value % 2):
            wrong.append(f"{name}={value!r}")

    whole, part = ("n_head", "n_kv_head") if "n_kv_head" in sizes else ("n_embd", "n_head")
    if not wrong and sizes[whole] % sizes[part]:
        wrong = [f"{whole}={sizes[whole]} is not divisible by {part}={sizes[part]}"]
    if wrong:
        raise InputError(f"{source}: impossible sizes ({', '.join(wrong)}); restore it or use another model")


def strip_wrappers(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers add to names, and buffers."""
    plain = {WRAPPERS.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"{source}: the same tensor name under two prefixes; save the model again")
    return {name: tensor for name, tensor in plain.items() if not BUFFERS.fullmatch(name)}


def translate(
    source: str, stored: Mapping[str, Tensor | Unread], model_config: dict[str, Any], transposed: bool
) -> LazyTensors:
    """Stored tensors in float32 under our names, matrices as (out, in), copied when they are looked up.

    stored: as `strip_wrappers` returns them. transposed: as in `tensor_layout`. Raises InputError with the names of
    tensors that are missing, unexpected, or of a wrong shape or dtype.
    """
    layout = tensor_layout(model_config, transposed=transposed)
    stored_head = None
    if model_config.get("tied", True):  # some programs store a tied embedding twice, or as the head alone
        stored = dict(stored)
        stored_head = stored.pop("lm_head.weight", None)
        embedding = next(name for name, place in layout.items() if place.name == "token_embedding.weight")
        if stored_head is not None:
            stored.setdefault(embedding, stored_head)
    _check_tensors(source, stored, layout)

    parts: dict[str, list[str]] = {}
    for their_name, place in layout.items():
        parts.setdefault(place.name, []).append(their_name)

    def read(their_names: list[str], rows: slice) -> Tensor:
        matrices = [_read(stored[their_name]) for their_name in their_names]
        if layout[their_names[0]].is_transposed:
            matrices = [matrix.t() for matrix in matrices]
        first, last, _ = rows.indices(sum(map(len, matrices)))
        pieces = []
        for matrix in matrices:
            pieces.append(matrix[max(first, 0) : max(last, 0)])
            first -= len(matrix)
            last -= len(matrix)
        return torch.cat(pieces).float()

    tensors = LazyTensors()
    tensors.data |= {name: partial(read, their_names) for name, their_names in parts.items()}
    if stored_head is not None and not torch.equal(_read(stored_head).float(), tensors["token_embedding.weight"]):
        raise InputError(f"{source}: lm_head.weight is not the token embedding, although tied; use another model")
    return tensors


def split_tensors(tensors: dict[str, Tensor], model_config: dict[str, Any], transposed: bool) -> dict[str, Tensor]:
    """Our tensors under their names without the prefix, as views; zeros for biases that we do not have.

    tensors: the vocabulary's rows with or without padding. transposed: as in `tensor_layout`.
    """
    architecture = find_architecture(model_config)
    stored: dict[str, Tensor] = {}
    next_row: dict[str, int] = {}
    for name, place in tensor_layout(model_config | {"bias": architecture.has_biases}, transposed=transposed).items():
        first = next_row.get(place.name, 0)
        last = next_row[place.name] = first + place.shape[0]
        is_added = architecture.has_biases and name.endswith(".bias") and not model_config["bias"]
        tensor = torch.zeros(place.shape) if is_added else tensors[place.name][first:last]
        stored[name] = tensor.t() if place.is_transposed else tensor
    return stored


def _read(tensor: Tensor | Unread) -> Tensor:
    return tensor.read() if isinstance(tensor, Unread) else tensor


def _check_tensors(source: str, stored: Mapping[str, Tensor | Unread], layout: dict[str, Placement]) -> None:
    misshapen = []
    for name, place in layout.items():
        tensor = stored.get(name)
        expected = place.shape[::-1] if place.is_transposed else place.shape
        if tensor is not None and (tensor.shape != expected or tensor.dtype not in FLOATS):
            misshapen.append(f"{name} ({tensor.dtype} {tuple(tensor.shape)} instead of float {expected})")

    problems = {
        "missing": [name for name in layout if name not in stored],
        "unexpected": [name for name in stored if name not in layout],
        "of another shape or dtype": misshapen,
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {shorten(names)}" for problem, names in problems.items() if names)
        raise InputError(
            f"{source}: tensors do not match the sizes it states ({listed}); save the model again or use another"
        )


def shorten(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
