"""LoRA (Hu et al. 2021, arXiv:2106.09685): train small adapters on a frozen model, in the form of Hugging Face's PEFT.

The matrix W of a linear layer becomes W + alpha / rank · B A. Only A (rank, in) and B (out, rank) train. B starts at
zero, so a run starts at its base. PEFT adapts the layers of Hugging Face's models. Our qkv holds three layers of Llama,
Qwen and Mistral, one below the other, and each has an A and a B of its own.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.errors import InputError, raise_problems, suggest
from nanogpt.interop.names import ARCHITECTURES, Architecture, find_architecture, tensor_layout

# Tensors of a base that a run may have with fewer rows: without padding, or for a shorter context.
CROPPED = {
    "token_embedding.weight": "vocab_size",
    "head.weight": "vocab_size",
    "position_embedding.weight": "block_size",
}


class Part(NamedTuple):
    """A layer of Hugging Face's model: rows first to last of a linear layer of ours."""

    theirs: str  # such as layers.0.self_attn.q_proj
    ours: str  # such as blocks.0.attention.qkv
    first: int
    last: int

    @property
    def name(self) -> str:
        return self.theirs.split(".")[-1]

    def parameter(self, matrix: str) -> str:
        """The name of our parameter, for matrix "A" or "B"."""
        return f"{self.ours}.lora_{matrix}.{self.name}"


def list_parts(model_config: dict[str, Any]) -> list[Part]:
    """All layers that can have an adapter: the blocks' matrices. model_config: all fields of GPTConfig."""
    parts: list[Part] = []
    next_row: dict[str, int] = {}
    for name, place in tensor_layout(model_config).items():
        if place.name.startswith("blocks.") and len(place.shape) == 2:
            ours = place.name.removesuffix(".weight")
            first = next_row.get(ours, 0)
            last = next_row[ours] = first + place.shape[0]
            parts.append(Part(name.removesuffix(".weight"), ours, first, last))
    return parts


class LoraLinear(nn.Module):
    """A frozen linear layer, plus the adapters of those of its parts that `targets` names."""

    def __init__(self, linear: nn.Linear, parts: Sequence[Part], targets: set[str], rank: int, alpha: float):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.rows = {part.name: part.last - part.first for part in parts}
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for part in parts:
            if targets & path_words(part.theirs, part.ours):
                A = self.weight.new_empty(rank, linear.in_features)
                self.lora_A[part.name] = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))  # as PEFT
                self.lora_B[part.name] = nn.Parameter(self.weight.new_zeros(self.rows[part.name], rank))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        B = [self.lora_B[name] if name in self.lora_B else x.new_zeros(n, 0) for name, n in self.rows.items()]
        flat = x.flatten(0, -2)  # (tokens, in)
        down = F.linear(flat, torch.cat(list(self.lora_A.values()))) * self.scale  # (tokens, adapters · rank)
        y = F.linear(flat, self.weight, self.bias)
        y.addmm_(down, torch.block_diag(*B).mT.to(y.dtype))  # in place: another tensor this wide would cost memory
        return y.unflatten(0, x.shape[:-1])


def path_words(theirs: str, ours: str) -> set[str]:
    """The names of a layer and of the module around it, as in "layers.0.mlp.up_proj" and "blocks.0.mlp.up"."""
    return {*theirs.split(".")[2:], *ours.split(".")[2:]}


def read_targets(text: str, architectures: Sequence[Architecture] = ARCHITECTURES) -> set[str]:
    """The names in lora_targets. Raises InputError for one that these architectures do not have."""
    known: set[str] = set()
    for architecture in architectures:
        for theirs, spec in architecture.tensors.items():
            if spec.columns and spec.name.startswith("blocks."):
                known |= path_words(theirs, spec.name)
    targets = {word.strip() for word in text.split(",")}
    all_names = f"choose from {', '.join(sorted(known))}"
    raise_problems(
        f"lora_targets={text}: no layer is called {word!r}; {suggest(word, sorted(known), all_names)}"
        for word in sorted(targets - known)
    )
    return targets


def check_lora(rank: int, init_from: str, out_dir: str, optimizer: str, targets: str) -> list[str]:
    """Return the problems of the keys of a run, a line each; none without LoRA (rank 0)."""
    problems: list[str] = []
    if not rank:
        return problems
    if init_from == "scratch":
        problems.append("lora_rank: init_from=scratch has no weights to adapt; give --init_from")
    if os.path.exists(init_from) and Path(init_from).resolve().is_relative_to(Path(out_dir).resolve()):
        problems.append(f"lora_rank: init_from={init_from} is in out_dir, but stays needed; give another --out_dir")
    if optimizer != "adamw":
        problems.append(f"lora_rank: optimizer={optimizer} is not for adapters; set optimizer=adamw")
    try:
        read_targets(targets)
    except InputError as error:
        problems.append(str(error))
    return problems


def add_lora(model: Any, init_from: str, rank: int, alpha: float, targets: str, resumed: Any = None) -> None:
    """Freeze a GPT and put adapters on the layers that targets names, or those of a checkpoint; in place.

    resumed: a Checkpoint. Raises InputError for a name in targets that this architecture does not have.
    """
    model_config = asdict(model.config)
    words = read_targets(targets, [find_architecture(model_config)])
    if resumed:
        model.lora = resumed.state["lora"]
    else:
        base = os.path.abspath(init_from) if os.path.exists(init_from) else init_from
        sha256 = base_sha256(model.state_dict(), model_config)
        model.lora = {"alpha": alpha, "base": base, "base_sha256": sha256}
    model.requires_grad_(False)
    by_layer: dict[str, list[Part]] = {}
    for part in list_parts(model_config):
        by_layer.setdefault(part.ours, []).append(part)
    for name, parts in by_layer.items():
        layer = LoraLinear(model.get_submodule(name), parts, words, rank, alpha)
        if layer.lora_A:
            model.set_submodule(name, layer)
    if resumed:
        model.load_state_dict(resumed.adapters, strict=False)


def crop(tensors: dict[str, Tensor], model_config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a base, with the rows that a model of these sizes needs."""
    return {name: t[: model_config[CROPPED[name]]] if name in CROPPED else t for name, t in tensors.items()}


def base_sha256(tensors: dict[str, Tensor], model_config: dict[str, Any]) -> str:
    """The SHA-256 of a base's names and weights, in float32, without padding."""
    return tensors_sha256(crop(tensors, model_config))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names and values of float32 tensors, in the order of the names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode())
        sha256.update(tensor.contiguous().numpy().data)
    return sha256.hexdigest()


def merge(tensors: dict[str, Tensor], adapters: dict[str, Tensor], alpha: float, model_config: dict[str, Any]) -> None:
    """Add the adapters to their base, in place. Raises KeyError or RuntimeError where they do not fit."""
    for part in list_parts(model_config):
        names = [part.parameter(matrix) for matrix in "AB"]
        if not adapters.keys().isdisjoint(names):
            A, B = (adapters[name] for name in names)
            tensors[f"{part.ours}.weight"][part.first : part.last].addmm_(B, A, alpha=alpha / len(A))
