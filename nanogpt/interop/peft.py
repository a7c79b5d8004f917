"""Read and write LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from nanogpt.errors import InputError, first_line
from nanogpt.files import utf8_path
from nanogpt.interop.names import find_architecture, shorten
from nanogpt.lora import base_sha256, list_parts, merge
from nanogpt.schema import Limits, matches

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Settings that are read, say which layers there are, or matter only in PEFT's training. All others must be empty.
HARMLESS = (
    *("r", "lora_alpha", "use_rslora", "base_model_name_or_path", "fan_in_fan_out", "task_type", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "auto_mapping"),
    *("lora_dropout", "inference_mode", "ensure_weight_tying", "eva_config", "megatron_core", "qalora_group_size"),
)
VALUES = {  # of other settings
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # others subtract something from the base
    "revision": ("main",),
}


def tensor_names(model_config: dict[str, Any]) -> dict[str, str]:
    """PEFT's name of every adapter that a model can have, by ours."""
    # That of the modules in transformers' class; files of GPT-2 leave it out.
    prefix = find_architecture(model_config).prefix or "transformer."
    parts = list_parts(model_config)
    return {
        part.parameter(AB): f"base_model.model.{prefix}{part.theirs}.lora_{AB}.weight" for part in parts for AB in "AB"
    }


def write_peft(folder: Path, adapters: dict[str, Tensor], lora: Any, model_config: dict[str, Any]) -> None:
    """Write adapters for transformers' class of these sizes. lora: a run's alpha, base and the base's hash."""
    from safetensors.torch import save_file

    names = tensor_names(model_config)
    stored = {names[name]: tensor for name, tensor in adapters.items()}
    # Each with the module around it: GPT-2 has two layers c_proj in a block.
    layers = {".".join(name.split(".")[-4:-2]) for name in stored}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora["base"],
        "r": next(len(tensor) for name, tensor in stored.items() if ".lora_A." in name),
        "lora_alpha": lora["alpha"],
        "target_modules": sorted(layers),
        "fan_in_fan_out": model_config["arch"] == "gpt2",  # its layers store their matrices as (in, out)
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # PEFT does not check the base, and leaves other metadata alone.
    of_base = {"base_sha256": lora["base_sha256"], "block_size": str(model_config["block_size"])}
    save_file(stored, folder / TENSORS, {"format": "pt"} | of_base)


def raise_for_other_base(source: str, folder: Path, tensors: dict[str, Tensor], model_config: dict[str, Any]) -> None:
    """Raise InputError where adapters of ours state the hash of another base than these tensors."""
    from safetensors import safe_open

    if not (folder / TENSORS).exists():  # but its parts, which are PEFT's
        return
    with utf8_path(folder / TENSORS) as name, safe_open(name, "pt") as file:
        metadata = file.metadata() or {}
    block_size = metadata.get("block_size", "")
    if "base_sha256" not in metadata or not block_size.isdecimal() or len(block_size) > 18:
        return  # not of ours
    if base_sha256(tensors, model_config | {"block_size": int(block_size)}) != metadata["base_sha256"]:
        raise InputError(f"{source}: its adapters were trained on another base than it names; give that, in float32")


def merge_peft(
    source: str,
    tensors: dict[str, Tensor],
    model_config: dict[str, Any],
    settings: dict[str, Any],
    stored: dict[str, Tensor],
) -> None:
    """Add adapters as PEFT stores them to a base under our names, in place.

    Raises InputError for settings and layers that model.py does not compute.
    """
    others = {name: value for name, value in settings.items() if value and name not in HARMLESS}
    wrong = [f"{name}={value!r}" for name, value in others.items() if value not in VALUES.get(name, ())]
    if wrong:
        raise InputError(
            f"{source}: {', '.join(wrong)} is not supported; merge the adapters by PEFT and give the result"
        )
    ours = {theirs: name for name, theirs in tensor_names(model_config).items()}
    unknown = [name for name in stored if name not in ours]
    if unknown or not stored:
        raise InputError(f"{source}: adapters of other layers than the blocks': {shorten(unknown)}; use another")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if not matches(rank, Annotated[int, Limits(ge=1)]) or not matches(alpha, float):
        raise InputError(f"{source}: {CONFIG} has r={rank!r:.40} and lora_alpha={alpha!r:.40}; restore it")
    misfits = []
    for name, tensor in stored.items():
        is_matrix = tensor.dim() == 2 and tensor.is_floating_point()
        if not is_matrix or tensor.shape[1 if ".lora_B." in name else 0] != rank:
            misfits.append(name)
    if misfits:
        raise InputError(f"{source}: adapters that are not matrices of rank r={rank}: {shorten(misfits)}; use another")
    alpha = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    try:
        merge(tensors, {ours[name]: tensor.float() for name, tensor in stored.items()}, alpha, model_config)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{source}: its adapters do not fit its base ({first_line(error)}); use another") from error
