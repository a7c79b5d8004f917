"""Read GPT-2, Llama and Qwen in Hugging Face's format, and write our models in it.

`names.py` holds the table of architectures. Nothing in a folder is executed: safetensors holds no code, and
pickled weights are refused.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.errors import InputError, first_line
from nanogpt.files import read_json, utf8_path
from nanogpt.interop import peft
from nanogpt.interop.gguf import read_gguf, read_gguf_tokenizer
from nanogpt.interop.names import (
    ARCHITECTURES,
    GELU,
    ROPE_SCALING,
    Weights,
    fill_in_heads,
    find_architecture,
    split_tensors,
    strip_wrappers,
    translate,
    validate_sizes,
)
from nanogpt.interop.nanogpt_ckpt import read_nanogpt
from nanogpt.schema import matches
from nanogpt.text.chat import end_ids
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

OPENAI_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SETTINGS_FILES = ("config.json", "generation_config.json", "vocab.json", peft.CONFIG)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", peft.TENSORS)  # some have others beside them
TOKENIZER_HINT = "have transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) write one"


def read_weights(source: str | Path) -> Weights:
    """Read a model of OpenAI's (gpt2 … gpt2-xl), a folder or hub id of Hugging Face, a GGUF file, or nanoGPT's ckpt.pt.

    Raises InputError as `read_huggingface`, `read_gguf` and `read_nanogpt` do.
    """
    path = Path(source)
    if path.suffix.lower() == ".gguf":
        return read_gguf(path)
    is_nanogpt_folder = os.path.exists(path / "ckpt.pt") and not os.path.exists(path / "config.json")
    if str(source) not in OPENAI_MODELS and (os.path.isfile(path) or path.suffix == ".pt" or is_nanogpt_folder):
        return read_nanogpt(path)
    return read_huggingface(str(source))


def read_huggingface(source: str) -> Weights:
    """Read a model from a folder or, by its id, from the Hugging Face hub (downloaded once, then cached).

    PEFT's adapters are merged into the base that they name. Raises InputError if it is missing, damaged, pickled, or
    computes a function that model.py does not.
    """
    folder = _local_folder(source, *SETTINGS_FILES, *WEIGHT_FILES, *TOKENIZER_FILES)
    if (folder / peft.CONFIG).exists():
        return _read_adapters(source, folder)
    settings = _read_json(folder / "config.json")
    config = _read_config(source, settings)
    stored = strip_wrappers(source, _read_safetensors(folder))
    can_have_biases = find_architecture(config).has_biases
    config["bias"] = can_have_biases and any(name.endswith(".bias") for name in stored)
    weights = Weights(source, config, translate(source, stored, config, transposed=True))
    if (folder / "generation_config.json").exists():
        settings |= _read_json(folder / "generation_config.json")
    ends: Any = settings.get("eos_token_id")
    if matches(ends, int | list[int]):
        weights.set_end_ids(ends if isinstance(ends, list) else [ends])

    if (folder / "tokenizer.json").exists():
        weights.tokenizer = Tokenizer.load(folder)
        if weights.tokenizer and (start := weights.tokenizer.start_of_text):
            weights.notes.append(f"{source}: its texts begin with {start}; begin a prompt with it, too")
    elif (folder / "vocab.json").exists():
        weights.notes.append(f"{source}: no tokenizer.json, so no text, only ids; {TOKENIZER_HINT}")
    elif config["vocab_size"] == GPT2_VOCAB:
        weights.gpt2_encoding = True
        weights.notes.append(f"{source}: no tokenizer files; assuming GPT-2's encoding for its {GPT2_VOCAB} ids")
    return weights


def _read_adapters(source: str, folder: Path) -> Weights:
    """Read a folder of PEFT, and the base that it names; merged."""
    settings = _read_json(folder / peft.CONFIG)
    base: Any = settings.get("base_model_name_or_path")
    if not matches(base, str) or os.path.abspath(base) == os.path.abspath(folder):
        raise InputError(f"{source}: {peft.CONFIG} does not name the model that its adapters belong to; add its path")
    is_local = base not in OPENAI_MODELS  # which are never read from a folder
    if is_local and os.path.exists(os.path.join(base, peft.CONFIG)):  # two folders could name each other
        raise InputError(f"{source}: its base {base} has adapters itself; export that one, which merges them")
    if is_local and os.path.exists(os.path.join(base, "ckpt")):
        raise InputError(f"{source}: its base {base} is a run; export that, and put its folder into {peft.CONFIG}")
    weights = read_weights(base)
    weights.tensors = dict(weights.tensors)  # to be changed in place
    stored = _read_safetensors(folder, peft.TENSORS)
    peft.raise_for_other_base(source, folder, weights.tensors, weights.config)
    peft.merge_peft(source, weights.tensors, weights.config, settings, stored)
    return replace(weights, source=source, tokenizer=Tokenizer.load(folder) or weights.tokenizer)


def read_tokenizer(source: str) -> Tokenizer:
    """Read the tokenizer of a local folder, a GGUF file or a model on the hub. Raises InputError if there is none."""
    if source.lower().endswith(".gguf"):
        return read_gguf_tokenizer(Path(source))
    tokenizer = Tokenizer.load(_local_folder(source, *TOKENIZER_FILES))
    if tokenizer is None:
        raise InputError(f"{source}: no tokenizer.json; give a folder or hub id that has one, or {TOKENIZER_HINT}")
    return tokenizer


def find_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a preparation is given: as `Tokenizer.from_name_or_path`, a GGUF file, or a hub id.

    Raises InputError if there is none.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not os.path.exists(spec)
    return read_tokenizer(spec) if is_hub_id or spec.lower().endswith(".gguf") else Tokenizer.from_name_or_path(spec)


def _local_folder(source: str, *files: str) -> Path:
    """Return `source` if it is a folder, else download these files of a model on the hub."""
    if source not in OPENAI_MODELS and os.path.isdir(source):
        return Path(source)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[*files], ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        raise InputError(
            f"{source!r} is not a file or folder here, and was not downloaded ({first_line(error)}): check the "
            "spelling and the network, log in with `hf auth login`, or give a folder that holds the files"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); give a folder with config.json and model.safetensors, as "
            "transformers' save_pretrained writes it, or one with nanoGPT's ckpt.pt"
        ) from error


def _read_safetensors(folder: Path, file: str = "model.safetensors") -> dict[str, Tensor]:
    """Read all tensors of a file, or of the shards in its index."""
    from safetensors.torch import load_file

    index = folder / f"{file}.index.json"
    files = [file]
    if not (folder / files[0]).exists() and index.exists():
        weight_map = _read_json(index).get("weight_map")
        files = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
        # A path could lead anywhere on this machine; a shard lies beside its index.
        if not files or any(Path(file).name != file for file in files):
            raise InputError(f"{index}: lists no shards, or files in other folders; download the model again")

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with utf8_path(folder / file) as name:
                tensors |= load_file(name)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder}: no {file}; download the model again. Pickled weights (pytorch_model.bin) can run code and "
                "are not read: convert them with transformers' from_pretrained(...).save_pretrained(...)"
            ) from error
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{folder / file}: cannot be read ({first_line(error)}); download it again") from error
    return tensors


def _read_config(source: str, stored: dict[str, Any]) -> dict[str, Any]:
    """Translate config.json to arguments of GPTConfig, without `bias`, which it does not state.

    Raises InputError for an architecture or a setting that model.py does not compute.
    """
    model_type = stored.get("model_type")
    architecture = next((known for known in ARCHITECTURES if known.model_type == model_type), None)
    if architecture is None:
        known_types = ", ".join(repr(known.model_type) for known in ARCHITECTURES)
        raise InputError(f"{source}: model_type {model_type!r} is not supported; use a model of {known_types}")
    settings = architecture.defaults | _flatten_rope(stored)
    if model_type == "gpt2":
        settings = {"n_positions": stored.get("n_ctx", 1024)} | settings

    config = {ours: settings.get(theirs) for ours, theirs in architecture.sizes.items()}
    if model_type == "gpt2" and config["n_inner"] is None:
        del config["n_inner"]  # 4 n_embd, as GPTConfig's default
    # What transformers does with sizes that are missing or null.
    implied = {"llama": ("n_kv_head", "head_dim"), "mistral": ("head_dim",), "qwen2": ("head_dim",)}
    fill_in_heads(config, *implied.get(architecture.model_type, ()))
    validate_sizes(source, config)
    # A window as long as the context hides nothing.
    if matches(settings.get("sliding_window"), int) and settings["sliding_window"] >= config["block_size"]:
        settings["sliding_window"] = None

    for name, values in (architecture.supported | {"quantization_config": (None,)}).items():
        value = settings.setdefault(name, values[0])
        if value not in values:
            raise InputError(f"{source}: {name}={value!r} is not supported, only {values}; use another model")
    config |= architecture.fields
    config["tied"] = settings["tie_word_embeddings"]
    if model_type == "gpt2":
        config["gelu"] = GELU[settings["activation_function"]]
    if settings.get("rope_type") == "llama3":
        scaling: list[Any] = [settings.get(name) for name in ROPE_SCALING]
        if not all(matches(number, float) and number > 0 for number in scaling) or scaling[1] >= scaling[2]:
            raise InputError(
                f"{source}: rope_scaling of type llama3 needs {' < '.join(ROPE_SCALING[1:3])} and "
                f"{ROPE_SCALING[0]}, {ROPE_SCALING[3]} above 0; restore it"
            )
        config["rope_scaling"] = scaling
    return config


def _flatten_rope(stored: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with its rotary settings at the top level, and one layer type for all layers."""
    rope: dict[str, Any] = {}
    rope_types = []
    for key in ("rope_parameters", "rope_scaling"):  # since transformers 5, and before
        value = stored.get(key) or {}
        value = value if isinstance(value, dict) else {"type": value}
        rope |= value
        scales = "factor" in value or any(isinstance(item, dict) for item in value.values())
        unnamed = f"unstated, with {value}" if scales else "default"
        rope_types.append(value.get("rope_type", value.get("type", unnamed)))
    scaling = [rope_type for rope_type in rope_types if rope_type != "default"]
    settings = stored | rope | {"rope_type": scaling[0] if scaling else "default"}

    layer_types = settings.get("layer_types")
    if isinstance(layer_types, list):
        other = [layer_type for layer_type in layer_types if layer_type != "full_attention"]
        settings["layer_types"] = other[0] if other else "full_attention"
    return settings


def write_huggingface(
    folder: Path,
    model_config: dict[str, Any],
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    *,
    extra_end_ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model and its tokenizer for transformers, as GPT2LMHeadModel, Qwen3ForCausalLM and so on.

    folder: an existing one. model_config: all fields of GPTConfig. tensors: under our names, on the CPU, the
    vocabulary's rows with or without padding. extra_end_ids: those that end a text, beside the tokenizer's.
    shard_bytes: larger weights are split into several files. Raises OSError or SafetensorError if the disk is full.
    """
    from huggingface_hub import save_torch_state_dict

    # None is written too: transformers replaces a missing id by GPT-2's own.
    ids: dict[str, Any] = {f"{name}_id": tokenizer.named_id(name) for name in ("bos_token", "eos_token")}
    _write_json(folder / "config.json", _to_their_config(model_config, dtype) | ids)
    ends = sorted({*extra_end_ids, *end_ids(tokenizer)})
    ids["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    _write_json(folder / "generation_config.json", ids)
    save_torch_state_dict(_to_their_names(model_config, tensors, dtype), folder, max_shard_size=shard_bytes)
    # OpenAI's files of GPT-2 name an unk_token, and CTranslate2's converter of GPT-2 needs one.
    tokenizer.save_pretrained(folder, model_config["block_size"], names_unk=model_config["arch"] == "gpt2")


def _to_their_names(model_config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy our tensors, split and transposed as Hugging Face stores them."""
    prefix = find_architecture(model_config).prefix
    stored: dict[str, Tensor] = {}
    for name, tensor in split_tensors(tensors, model_config, transposed=True).items():
        their_name = name if name.startswith("lm_head.") else prefix + name
        # A copy, because save_torch_state_dict refuses views of a larger tensor.
        stored[their_name] = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return stored


def _to_their_config(model_config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Translate GPTConfig's fields to config.json, with the keys that published models have there."""
    architecture = find_architecture(model_config)
    config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": model_config["tied"],
    }
    config |= {theirs: model_config[ours] for ours, theirs in architecture.sizes.items()}
    config |= architecture.written
    if architecture.model_type == "gpt2":
        config["activation_function"] = next(name for name, ours in GELU.items() if ours == model_config["gelu"])
        config["n_ctx"] = model_config["block_size"]
        config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model_config["dropout"])
    else:
        # transformers 5 reads the rotary base only here, transformers 4 only at the top level.
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": model_config["rope_theta"]}
        if model_config["rope_scaling"]:
            scaling = dict(zip(ROPE_SCALING, model_config["rope_scaling"], strict=True))
            context = scaling[ROPE_SCALING[-1]]
            scaling[ROPE_SCALING[-1]] = int(context) if context == int(context) else context  # 4.x warns of a float
            config["rope_scaling"] = {"rope_type": "llama3"} | scaling
            config["rope_parameters"] |= config["rope_scaling"]
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
