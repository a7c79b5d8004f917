"""torch.compile, tried on a batch before a run relies on it."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nanogpt.console import print0
from nanogpt.device import is_out_of_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError, first_line
from nanogpt.files import cache_folder

# FLOPs of a micro-batch below which a GPU's step runs as a CUDA graph: 10 ms at half of an H100's peak, about what the
# host needs to launch the kernels one by one. A guess, not measured yet.
CUDA_GRAPH_FLOPS = 5e12


def should_compile(setting: bool | str, device: torch.device) -> bool:
    """The value of the key `compile`: True, False, or "auto" for on CUDA."""
    return setting is True or (setting == "auto" and device.type == "cuda")


def set_cache_folder() -> None:
    """Let the compiler keep its results in ~/.cache/nanogpt: torch's default is /tmp, which a reboot empties."""
    with contextlib.suppress(OSError, RuntimeError):  # no home, or a read-only one
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))


def compile_model(model: Any, world: World, inputs: Sequence[Any], *, is_whole_step: bool) -> nn.Module:
    """The GPT compiled; itself, after a printed warning, if compiling fails on the `inputs` of a micro-batch.

    inputs: idx and targets (B, T), soft targets or None, as for `GPT.forward`.

    is_whole_step: a step is this one micro-batch. On CUDA, if it is short too, each pass is replayed as one CUDA graph:
    a gradient then lives where the next pass writes its own.
    """
    idx, targets, _ = inputs
    blocks = model.blocks if world.mesh else []  # of a sharded model each alone, between what FSDP2 gathers and drops
    flops = model.flops_per_token() * idx.numel()
    use_graphs = world.device.type == "cuda" and is_whole_step and flops < CUDA_GRAPH_FLOPS and not blocks
    set_cache_folder()
    try:
        torch._dynamo.reset()  # an earlier model's versions count against a limit, and make other shapes variable
        for block in blocks:
            block.compile()
        compiled: Any = model if blocks else torch.compile(model, mode="reduce-overhead" if use_graphs else None)
        for _ in range(3 if use_graphs else 1):  # a graph is recorded in the second pass and replayed in the third
            with world.autocast():
                loss = compiled(*inputs)[1]
            loss.backward()
            model.zero_grad(set_to_none=True)
            model.eval()
            with world.autocast(), torch.no_grad():  # evaluation
                compiled(idx.clone(), targets.clone())
            model.train()
        if blocks:
            model.reshard()  # or the optimizer would see the gathered tensors that the evaluation left
        return compiled
    except Exception as error:
        if blocks and not is_out_of_memory(error):  # which FSDP2 may have left half gathered
            raise InputError(f"compile: failed on sharded blocks ({first_line(error)}); set --compile=False") from error
        warn_of_failure(error)
        model.train()
        model.zero_grad(set_to_none=True)
        return model


def warn_of_failure(error: Exception) -> None:
    """Print that compiling failed, by any error of the compiler and its backends. Raises one of memory that ran out."""
    if is_out_of_memory(error):
        raise error
    reason = f"{type(error).__name__}: {first_line(error)}"
    print0(f"warning: torch.compile failed, continuing without it ({reason})")
