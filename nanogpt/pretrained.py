"""Weights trained by other programs, under our names: Hugging Face's GPT-2 and Qwen3, nanoGPT's `ckpt.pt`; and ours
under Hugging Face's.

GPT-2's layers are called as in OpenAI's release; of its blocks Hugging Face stores the four matrices as (in, out).
Qwen3 and nanoGPT store theirs as (out, in), which is also ours. Nothing is executed: safetensors holds no code, a
`ckpt.pt` is read as plain data.
"""

import errno
import json
import math
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import InputError
from nanogpt.distributed import format_bytes
from nanogpt.files import matches_schema, read_json, regular_file_size
from nanogpt.tokenizer import Tokenizer

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB, NANOGPT_PADDED_VOCAB = 50257, 50304
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WRITE_TOKENIZER = "have transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) write one"

WRAPPERS = re.compile(r"((module|_orig_mod)\.)*((transformer|model)\.)?")  # of DDP, torch.compile, the headed model
# What torch.save calls for dicts, numbers and tensors. torch.load allows more, such as a bytearray of any size.
PLAIN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (?!\w*Tensor)\w+")
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers, not parameters
FLIPPED = ".c_"  # in the names of those that Hugging Face stores as (in, out)

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


def read_weights(source: str | Path) -> Weights:
    """Whatever `source` is: a size of OpenAI's (gpt2 … gpt2-xl), a folder or hub id in Hugging Face's format, nanoGPT's
    checkpoint (the file, or a folder with ckpt.pt). Raises InputError as the two readers below."""
    path = Path(source)
    is_folder_of_nanogpt = os.path.exists(path / "ckpt.pt") and not os.path.exists(path / "config.json")
    if str(source) not in OPENAI_MODELS and (os.path.isfile(path) or path.suffix == ".pt" or is_folder_of_nanogpt):
        return read_nanogpt(path)
    return read_huggingface(str(source))


def read_huggingface(source: str) -> Weights:
    """GPT-2 or Qwen3 of any size from a folder or, by its id, from the Hugging Face hub (downloaded once, then cached).

    Raises InputError where it cannot be had, is damaged or pickled, or computes another function than ours.
    """
    folder = _folder(source, "config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER, "vocab.json")
    config = _huggingface_config(source, _read_json(folder / "config.json"))
    stored = _plain_names(source, _read_safetensors(folder))
    config["bias"] = config["arch"] == "gpt2" and any(name.endswith(".bias") for name in stored)
    weights = Weights(source, config, _translate(source, stored, config, transposed=config["arch"] == "gpt2"))
    if (folder / "tokenizer.json").exists():
        weights.tokenizer_folder = folder
    elif (folder / "vocab.json").exists():
        weights.notes.append(
            f"{source}: its vocab.json is not read; for text instead of ids put a tokenizer.json beside it "
            f"({WRITE_TOKENIZER})"
        )
    elif config["vocab_size"] == GPT2_VOCAB:
        weights.gpt2_encoding = True
        weights.notes.append(f"{source}: has no tokenizer files; its {GPT2_VOCAB} ids are taken for GPT-2's encoding")
    return weights


def read_nanogpt(path: str | Path) -> Weights:
    """A checkpoint of nanoGPT: `ckpt.pt` or the folder that holds it. Its GELU is the exact one ("erf").

    Raises InputError where the file is missing, damaged, asks to run code, or is no checkpoint of nanoGPT.
    """
    path = Path(path) / "ckpt.pt" if os.path.isdir(path) else Path(path)
    remedy = "give a ckpt.pt that nanoGPT's train.py wrote"
    try:
        size = regular_file_size(path)
        _refuse_code(path, size)
        # Memory-mapped (which the oldest format cannot be), so that the optimizer's state inside costs nothing.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # broken pickles raise whatever their bytes happen to mean
        raise InputError(f"{path} was not read ({_brief(error)}): {remedy}") from error
    content: Any = checkpoint if isinstance(checkpoint, dict) else {}
    model, args, settings = content.get("model"), content.get("model_args"), content.get("config")
    named = isinstance(model, dict) and all(isinstance(n, str) and torch.is_tensor(t) for n, t in model.items())
    if not named or not isinstance(args, dict):
        raise InputError(f"{path} has no weights under 'model', or no 'model_args': {remedy}")
    # A view of a single number can be of any shape; but tied weights are stored once.
    if sum(tensor.nbytes for tensor in model.values()) > 2 * size:
        raise InputError(f"{path} states tensors larger than itself: {remedy}")

    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    config = _checked(str(path), {name: args.get(name) for name in sizes})
    config |= {"dropout": args.get("dropout", 0.0), "bias": args.get("bias", True), "gelu": "erf"}
    if not matches_schema(config, {"dropout": float, "bias": bool}):
        raise InputError(f"{path}: dropout or bias in 'model_args' is neither number nor switch: {remedy}")
    tensors = _translate(str(path), _plain_names(str(path), model), config, transposed=False)
    weights = Weights(
        source=str(path),
        config=config,
        tensors=tensors,
        notes=[f"{path}: nanoGPT's optimizer state is not taken over; the optimizer starts afresh"],
        train_config=settings if matches_schema(settings, {"dataset": str}) else {},
    )
    if config["vocab_size"] == NANOGPT_PADDED_VOCAB:
        config["vocab_size"] = GPT2_VOCAB
        tensors["tokens.weight"] = tensors["tokens.weight"][:GPT2_VOCAB].clone()
        weights.notes.append(
            f"{path}: {NANOGPT_PADDED_VOCAB} rows are GPT-2's {GPT2_VOCAB} and padding, which is dropped"
        )
    weights.gpt2_encoding = config["vocab_size"] == GPT2_VOCAB
    return weights


def _refuse_code(path: Path, size: int) -> None:
    """Raises ValueError where reading a ckpt.pt of `size` bytes would call something else than what makes tensors, or
    take more memory than the file has: torch.load lets both through."""
    with path.open("rb") as file:
        pickles: list[Any] = [file] * 5  # the oldest format: three of numbers, the content, the names of the storages
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            if any(entry.compress_type or entry.file_size > size for entry in archive.infolist()):
                raise ValueError("it is packed as torch.save never does")
            pickles = [archive.open(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
        else:
            file.seek(0)
        for content in pickles:
            for code, name, _ in pickletools.genops(content):
                if "GLOBAL" in code.name and not PLAIN.fullmatch(str(name)):
                    raise ValueError(f"it asks to run {str(name).replace(' ', '.')}")


def read_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a local folder or, by its id, of a model on the hub. Raises InputError where there is none."""
    if tokenizer := Tokenizer.load(_folder(source, *TOKENIZER)):
        return tokenizer
    raise InputError(f"{source} has no tokenizer.json: give a folder or hub id that has one, or {WRITE_TOKENIZER}")


def _folder(source: str, *files: str) -> Path:
    """`source` if it is a folder, else the local copy of a model's `files` on the hub. Raises InputError for none."""
    if source not in OPENAI_MODELS and os.path.isdir(source):
        return Path(source)
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[*files], ignore_patterns=["*/*"]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(
            f"{source!r} is neither a file or folder here nor a public model on the Hugging Face hub: "
            "check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub's client also lets errors of its HTTP library through
        raise InputError(
            f"{source!r} is not a file or folder here and was not downloaded ({_brief(error)}): check the path, "
            "connect to the network, or give a folder filled elsewhere by `hf download ID --local-dir FOLDER`"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{path.parent} has no {path.name}: give a folder with config.json and model.safetensors, as transformers' "
            "save_pretrained writes it, or one with nanoGPT's ckpt.pt"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} was not read ({_brief(error)}): restore it or download it again") from error


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names, by their names in the file."""
    from safetensors.torch import load_file

    index, files = folder / "model.safetensors.index.json", ["model.safetensors"]
    if not (folder / files[0]).exists() and index.exists():
        shards = _read_json(index).get("weight_map")
        files = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
        # A path could lead anywhere on this machine; a shard lies beside its index.
        if not files or any(Path(file).name != file for file in files):
            raise InputError(f"{index} names no shards, or files in other folders: download the model again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(folder / file)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} has no {file}: download the model again; pickled weights (pytorch_model.bin) can run code "
                "and are not read, so convert them with transformers' from_pretrained(...).save_pretrained(...)"
            ) from error
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{folder / file} was not read ({_brief(error)}): download it again") from error
    return tensors


def _huggingface_config(source: str, theirs: dict[str, Any]) -> dict[str, Any]:
    """GPTConfig's arguments from config.json, except bias, which it does not tell.

    Raises InputError for an architecture or a setting under which the network computes something else.
    """
    kind = theirs.get("model_type")
    if kind not in tuple(SIZES):
        raise InputError(f"{source} is of model_type {kind!r}: only {' and '.join(map(repr, SIZES))} can be used")
    if kind == "gpt2":
        sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": GPT2_VOCAB, "layer_norm_epsilon": 1e-5}
        theirs = sizes | {"n_positions": theirs.get("n_ctx", 1024)} | theirs  # 124M's, which may be left out
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}  # the latter since transformers 5
    rope = rope if isinstance(rope, dict) else {"type": rope}
    theirs = {"rope_type": rope.get("type", "default")} | theirs | rope
    if isinstance(layers := theirs.get("layer_types"), list):
        theirs["layer_types"] = next((layer for layer in layers if layer != "full_attention"), "full_attention")
    given = {ours: theirs.get(name) for ours, name in SIZES[kind].items()}
    if kind == "gpt2" and given["n_inner"] is None:
        del given["n_inner"]  # 4 n_embd, to them as to GPTConfig
    config = _checked(source, given)
    allowed = ALLOWED[kind] | {"quantization_config": (None,)}
    settings = {name: theirs.get(name, values[0]) for name, values in allowed.items()}
    for name, value in settings.items():
        if value not in allowed[name]:
            raise InputError(f"{source}: {name}={value!r}, but only {allowed[name]} can be used: take another model")
    if kind == "gpt2":
        return config | {"arch": "gpt2", "gelu": GELU[settings["activation_function"]]}
    return config | {"arch": "modern", "tied": settings["tie_word_embeddings"]}


def _checked(source: str, sizes: dict[str, Any]) -> dict[str, Any]:
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


def _plain_names(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that TENSORS has, without wrappers' prefixes and without mask buffers."""
    plain = {WRAPPERS.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"{source} holds tensors of the same name under different prefixes: save the model again")
    return {name: tensor for name, tensor in plain.items() if not CAUSAL_MASK.fullmatch(name)}


def _translate(source: str, stored: dict[str, Tensor], config: dict[str, Any], transposed: bool) -> dict[str, Tensor]:
    """Float32 copies under our names, matrices as (out, in); `transposed`: a block of GPT-2's has them as (in, out).

    Raises InputError with the names of tensors that are missing, left over, or of a wrong shape or dtype.
    """
    expected = _layout(config)
    tied = config.get("tied", True)
    head = stored.pop("lm_head.weight", None) if tied else None  # the embedding, stored twice by some programs
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    misshapen = []
    parts: dict[str, list[Tensor]] = {}
    for theirs in [name for name in expected if name in stored]:
        (ours, shape), tensor = expected[theirs], stored[theirs]
        is_flipped = transposed and FLIPPED in theirs
        there = shape[::-1] if is_flipped else shape
        if tensor.shape != there or tensor.dtype not in FLOATS:
            misshapen.append(f"{theirs} ({tensor.dtype} {tuple(tensor.shape)} instead of float {there})")
        else:
            parts.setdefault(ours, []).append(tensor.t() if is_flipped else tensor)
    faults = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{fault}: {_few(names)}" for fault, names in faults.items() if names)
        raise InputError(f"{source} is no model of the sizes it states ({told}): save the model again or use another")
    tensors = {ours: torch.cat(rows).float() for ours, rows in parts.items()}
    if head is not None and not torch.equal(head.float(), tensors["tokens.weight"]):
        raise InputError(
            f"{source} has an lm_head.weight of its own, which should be the token embedding: use another model"
        )
    return tensors


def _layout(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
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


def write_huggingface(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: float = 5e9,
    end_of_text: int | None = None,
) -> list[str]:
    """Write config.json, generation_config.json and the weights of a model as GPT2LMHeadModel or Qwen3ForCausalLM into
    `folder`, which must exist. Returns the names of the weights' files.

    config: all fields of GPTConfig. tensors: by our names, on the CPU, the vocabulary's rows with or without padding.
    shard_bytes: more weights than these are split into files of at most so many (a single tensor is never split).
    end_of_text: the id that ends a text. Raises OSError where the disk does not take it.
    """
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    total = filled = 0  # bytes: of all, of the last shard
    for name, tensor in _in_their_names(config, tensors):
        count = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + count > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        total, filled = total + count, filled + count
    if (free := shutil.disk_usage(folder).free) < total:
        raise OSError(errno.ENOSPC, f"{format_bytes(total)} are needed, {format_bytes(free)} are free")

    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}  # None too: left out, it would be GPT-2's own
    _write_json(folder / "config.json", _their_config(config, dtype) | ends)
    _write_json(folder / "generation_config.json", ends)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        ready = {name: tensor.to(dtype).contiguous() for name, tensor in shard.items()}
        save_file(ready, folder / file, metadata={"format": "pt"})  # transformers asks for this word
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return files


def _in_their_names(config: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, in parts and turned as they store them, without copies; zeros where they have a bias and we none."""
    gpt2 = config["arch"] == "gpt2"
    rows: dict[str, int] = {}  # of ours that are given away
    for theirs, (ours, shape) in _layout(config | {"bias": gpt2}).items():
        first = rows.get(ours, 0)
        rows[ours] = first + shape[0]
        is_new = theirs.endswith(".bias") and not config["bias"]
        tensor = torch.zeros(shape) if is_new else tensors[ours][first : first + shape[0]]
        headed = theirs if theirs == "lm_head.weight" else ("transformer." if gpt2 else "model.") + theirs
        yield headed, tensor.t() if gpt2 and FLIPPED in theirs else tensor


def _their_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json, as far as it tells the network: what their published models have there, so that programs which read
    it by themselves find it too."""
    kind = "gpt2" if config["arch"] == "gpt2" else "qwen3"
    told = {"model_type": kind, "dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": config["tied"]}
    told |= {theirs: config[ours] for ours, theirs in SIZES[kind].items()}
    if kind == "qwen3":
        fixed = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
        return told | fixed | {"architectures": ["Qwen3ForCausalLM"]}
    told["activation_function"] = next(theirs for theirs, ours in GELU.items() if ours == config["gelu"])
    told |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"])
    return told | {"n_ctx": config["block_size"], "architectures": ["GPT2LMHeadModel"]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
