"""Weights trained by other programs, under our names: Hugging Face's GPT-2 and Qwen3, nanoGPT's `ckpt.pt`; and ours
under Hugging Face's.

GPT-2's layers are called as in OpenAI's release; of its blocks Hugging Face stores the four matrices as (in, out).
Qwen3 and nanoGPT store theirs as (out, in), which is also ours. Nothing is executed: safetensors holds no code, a
`ckpt.pt` is read as plain data.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.console import format_bytes
from nanogpt.errors import InputError
from nanogpt.files import read_json
from nanogpt.interop.names import (
    ALLOWED,
    GELU,
    SIZES,
    TRANSPOSED,
    Weights,
    brief,
    checked_sizes,
    strip_wrappers,
    tensor_layout,
    translate,
)
from nanogpt.interop.nanogpt_ckpt import read_nanogpt
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WRITE_TOKENIZER = "have transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) write one"


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
    stored = strip_wrappers(source, _read_safetensors(folder))
    config["bias"] = config["arch"] == "gpt2" and any(name.endswith(".bias") for name in stored)
    weights = Weights(source, config, translate(source, stored, config, transposed=config["arch"] == "gpt2"))
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
            f"{source!r} is not a file or folder here and was not downloaded ({brief(error)}): check the path, "
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
        raise InputError(f"{path} was not read ({brief(error)}): restore it or download it again") from error


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
            raise InputError(f"{folder / file} was not read ({brief(error)}): download it again") from error
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
    config = checked_sizes(source, given)
    allowed = ALLOWED[kind] | {"quantization_config": (None,)}
    settings = {name: theirs.get(name, values[0]) for name, values in allowed.items()}
    for name, value in settings.items():
        if value not in allowed[name]:
            raise InputError(f"{source}: {name}={value!r}, but only {allowed[name]} can be used: take another model")
    if kind == "gpt2":
        return config | {"arch": "gpt2", "gelu": GELU[settings["activation_function"]]}
    return config | {"arch": "modern", "tied": settings["tie_word_embeddings"]}


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
    for theirs, (ours, shape) in tensor_layout(config | {"bias": gpt2}).items():
        first = rows.get(ours, 0)
        rows[ours] = first + shape[0]
        is_new = theirs.endswith(".bias") and not config["bias"]
        tensor = torch.zeros(shape) if is_new else tensors[ours][first : first + shape[0]]
        headed = theirs if theirs == "lm_head.weight" else ("transformer." if gpt2 else "model.") + theirs
        yield headed, tensor.t() if gpt2 and TRANSPOSED in theirs else tensor


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
