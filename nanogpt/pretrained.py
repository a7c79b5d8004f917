"""Weights trained by other programs, under our names: Hugging Face's GPT-2 (hub or folder), nanoGPT's `ckpt.pt`.

Both call the layers as OpenAI's release did. Hugging Face stores the four matrices of a block as (in, out), nanoGPT as
(out, in), which is also ours. Nothing is executed: safetensors holds no code, a `ckpt.pt` is read as plain data.
"""

import json
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import InputError

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB, NANOGPT_PADDED_VOCAB = 50257, 50304
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Their part of a block -> ours, its outputs and inputs in multiples of n_embd (0: a norm, which has no matrix).
BLOCK = {
    "ln_1": ("norm1", 1, 0),
    "attn.c_attn": ("attention.qkv", 3, 1),
    "attn.c_proj": ("attention.out", 1, 1),
    "ln_2": ("norm2", 1, 0),
    "mlp.c_fc": ("mlp.up", 4, 1),
    "mlp.c_proj": ("mlp.down", 1, 4),
}
WRAPPERS = re.compile(r"((module|_orig_mod)\.)*(transformer\.)?")  # of DDP, of torch.compile, of the headed model
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # buffers, not parameters

# Keys of config.json and what this network can compute; the first is what transformers takes for a missing key.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "erf"}
ALLOWED: dict[str, tuple] = {
    "activation_function": tuple(GELU),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
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
    is_folder_of_nanogpt = (path / "ckpt.pt").exists() and not (path / "config.json").exists()
    if str(source) not in OPENAI_MODELS and (path.is_file() or path.suffix == ".pt" or is_folder_of_nanogpt):
        return read_nanogpt(path)
    return read_huggingface(str(source))


def read_huggingface(source: str) -> Weights:
    """GPT-2 of any size from a local folder or, by its id, from the Hugging Face hub (downloaded once, then cached).

    Raises InputError where it cannot be had, is damaged or pickled, or computes another function than GPT-2's.
    """
    is_local = source not in OPENAI_MODELS and Path(source).is_dir()
    folder = Path(source) if is_local else _download(source)
    config = _huggingface_config(source, _read_json(folder / "config.json"))
    stored = _plain_names(source, _read_safetensors(folder))
    config["bias"] = any(name.endswith(".bias") for name in stored)
    weights = Weights(source, config, _translate(source, stored, config, transposed=True))
    if (folder / "tokenizer.json").exists():
        weights.tokenizer_folder = folder
    elif (folder / "vocab.json").exists():
        weights.notes.append(
            f"{source}: its vocab.json is not read; for text instead of ids put a tokenizer.json beside it "
            "(transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        )
    elif config["vocab_size"] == GPT2_VOCAB:
        weights.gpt2_encoding = True
        weights.notes.append(f"{source}: has no tokenizer files; its {GPT2_VOCAB} ids are taken for GPT-2's encoding")
    return weights


def read_nanogpt(path: str | Path) -> Weights:
    """A checkpoint of nanoGPT: `ckpt.pt` or the folder that holds it. Its GELU is the exact one ("erf").

    Raises InputError where the file is missing, damaged, asks to run code, or is no checkpoint of nanoGPT.
    """
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    remedy = "give a ckpt.pt that nanoGPT's train.py wrote"
    try:
        # Memory-mapped (which the oldest format cannot be), so that the optimizer's state inside costs nothing.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # broken pickles raise whatever their bytes happen to mean
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks to run {code[1]}" if code else _brief(error)
        raise InputError(f"{path} was not read ({reason}): {remedy}") from error
    model, args = (checkpoint.get(key) if isinstance(checkpoint, dict) else None for key in ("model", "model_args"))
    if not (isinstance(model, dict) and isinstance(args, dict) and all(map(torch.is_tensor, model.values()))):
        raise InputError(f"{path} has no weights under 'model', or no 'model_args': {remedy}")

    sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    config = _checked(str(path), {name: args.get(name) for name in sizes})
    config |= {"dropout": args.get("dropout", 0.0), "bias": args.get("bias", True), "gelu": "erf"}
    tensors = _translate(str(path), _plain_names(str(path), model), config, transposed=False)
    weights = Weights(
        source=str(path),
        config=config,
        tensors=tensors,
        notes=[f"{path}: nanoGPT's optimizer state is not taken over; the optimizer starts afresh"],
        train_config=checkpoint.get("config") or {},
    )
    if config["vocab_size"] == NANOGPT_PADDED_VOCAB:
        config["vocab_size"] = GPT2_VOCAB
        tensors["tokens.weight"] = tensors["tokens.weight"][:GPT2_VOCAB].clone()
        weights.notes.append(
            f"{path}: {NANOGPT_PADDED_VOCAB} rows are GPT-2's {GPT2_VOCAB} and padding, which is dropped"
        )
    weights.gpt2_encoding = config["vocab_size"] == GPT2_VOCAB
    return weights


def _download(source: str) -> Path:
    """The local snapshot of a model on the hub. Raises InputError where there is none to be had."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    files = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "vocab.json"]
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=files, ignore_patterns=["*/*"]))
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
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
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
    if theirs.get("model_type") != "gpt2":
        raise InputError(f"{source} is of model_type {theirs.get('model_type')!r}: only 'gpt2' can be used")
    defaults = {"vocab_size": GPT2_VOCAB, "n_layer": 12, "n_head": 12, "n_embd": 768}
    config = {name: theirs.get(name, default) for name, default in defaults.items()}
    config["block_size"] = theirs.get("n_positions", theirs.get("n_ctx", 1024))
    _checked(source, config)
    for name, allowed in (ALLOWED | {"n_inner": (None, 4 * config["n_embd"])}).items():
        if theirs.get(name, allowed[0]) not in allowed:
            raise InputError(f"{source}: {name}={theirs[name]!r}, but only {allowed} can be used: take another model")
    return config | {"gelu": GELU[theirs.get("activation_function", "gelu_new")]}


def _checked(source: str, sizes: dict[str, Any]) -> dict[str, Any]:
    wrong = [f"{name}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
    if wrong or sizes["n_embd"] % sizes["n_head"]:
        wrong = wrong or [f"n_embd={sizes['n_embd']} is not divisible by n_head={sizes['n_head']}"]
        raise InputError(f"{source} has impossible sizes ({', '.join(wrong)}): restore it or use another")
    return sizes


def _plain_names(source: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names they have in OpenAI's release, without wrappers' prefixes and without mask buffers."""
    plain = {WRAPPERS.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"{source} holds tensors of the same name under different prefixes: save the model again")
    return {name: tensor for name, tensor in plain.items() if not CAUSAL_MASK.fullmatch(name)}


def _translate(source: str, stored: dict[str, Tensor], config: dict[str, Any], transposed: bool) -> dict[str, Tensor]:
    """Float32 copies under our names, matrices as (out, in); `transposed` says that they are stored as (in, out).

    Raises InputError with the names of tensors that are missing, left over, or of a wrong shape or dtype.
    """
    C = config["n_embd"]
    parts = [("ln_f", "norm", 1, 0)]
    for i in range(config["n_layer"]):
        parts += [(f"h.{i}.{theirs}", f"blocks.{i}.{ours}", out, in_) for theirs, (ours, out, in_) in BLOCK.items()]
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "wte.weight": ("tokens.weight", (config["vocab_size"], C)),
        "wpe.weight": ("positions.weight", (config["block_size"], C)),
    }
    for theirs, ours, out, in_ in parts:
        expected[f"{theirs}.weight"] = (f"{ours}.weight", (out * C, in_ * C) if in_ else (out * C,))
        if config["bias"]:
            expected[f"{theirs}.bias"] = (f"{ours}.bias", (out * C,))

    head = stored.pop("lm_head.weight", None)  # the embedding once more, where a program stores tied weights twice
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    misshapen = []
    tensors: dict[str, Tensor] = {}
    for theirs in [name for name in expected if name in stored]:
        (ours, shape), tensor = expected[theirs], stored[theirs]
        is_flipped = transposed and ".c_" in theirs
        there = shape[::-1] if is_flipped else shape
        if tensor.shape != there or tensor.dtype not in FLOATS:
            misshapen.append(f"{theirs} ({tensor.dtype} {tuple(tensor.shape)} instead of float {there})")
        else:
            tensors[ours] = torch.empty(shape, dtype=torch.float32).copy_(tensor.t() if is_flipped else tensor)
    faults = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{fault}: {_few(names)}" for fault, names in faults.items() if names)
        raise InputError(f"{source} is no GPT-2 of the sizes it states ({told}): save the model again or use another")
    if head is not None and not torch.equal(head.float(), stored["wte.weight"].float()):
        raise InputError(
            f"{source} has an lm_head.weight of its own, which GPT-2 ties to wte.weight: use another model"
        )
    return tensors


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _brief(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
