"""Read and write LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.interop.names import find_architecture, shorten
from nanogpt.lora import list_parts, merge

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Settings that are read, say which layers there are, or matter in PEFT's training alone. All others must be empty.
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


def write_peft(
    folder: Path, adapters: dict[str, Tensor], alpha: float, base: str, model_config: dict[str, Any]
) -> None:
    """Write adapters for transformers' class of these sizes. base: the place that PEFT will read it from."""
    from safetensors.torch import save_file

    names = tensor_names(model_config)
    stored = {names[name]: tensor for name, tensor in adapters.items()}
    # Each with the module around it: GPT-2 has two layers c_proj in a block.
    layers = {".".join(name.split(".")[-4:-2]) for name in stored}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(len(tensor) for name, tensor in stored.items() if ".lora_A." in name),
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "fan_in_fan_out": model_config["arch"] == "gpt2",  # its layers store their matrices as (in, out)
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(stored, folder / TENSORS, {"format": "pt"})


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
    try:
        alpha = settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings.get("use_rslora") else 1)
        merge(tensors, {ours[name]: tensor.float() for name, tensor in stored.items()}, alpha, model_config)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{source}: its adapters do not fit its base ({error!r}); use another") from error
