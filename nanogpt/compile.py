"""torch.compile, tried before it is relied on."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.console import print0
from nanogpt.data.rows import Rows
from nanogpt.device import is_out_of_memory
from nanogpt.distributed import World


def try_compile(
    model: nn.Module, world: World, x: Tensor, y: Tensor, graphs: bool = False
) -> tuple[nn.Module, str | None]:
    """`model` compiled, and tried forward and backward on one batch x, y (B, T); where that fails, `model` itself and
    the reason in a line. Leaves no gradients.

    graphs: a GPU replays each pass as one CUDA graph instead of being handed its kernels one by one. A gradient then
    lies where the next pass puts its own, so each pass must be a whole step's. What was compiled is kept for later runs
    in ~/.cache/nanogpt, unless TORCHINDUCTOR_CACHE_DIR says where: torch's own choice is /tmp, which a restart empties.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written to
        kept = Path.home() / ".cache" / "nanogpt" / "compiled"
        kept.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
    fast, reason = model, None
    try:
        fast = torch.compile(model, mode="reduce-overhead" if graphs else None)  # type: ignore[assignment]
        for _ in range(3 if graphs else 1):  # a graph is recorded in the second pass and replayed in the third
            with world.autocast():
                fast(x, y)[1].backward()
                with torch.no_grad():  # evaluation is another function to the compiler
                    model.eval()
                    fast(x, y)
            model.train()
            model.zero_grad(set_to_none=True)
    except Exception as error:  # the compiler and its backends raise whatever they like
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    model.train()
    model.zero_grad(set_to_none=True)
    return (model if reason else fast), reason


# FLOPs of a micro-batch below which a GPU's step is replayed as a CUDA graph: 10 ms at half of an H100's speed, about
# what the host needs to hand over the kernels one by one. A guess: not measured yet.
GRAPHS_BELOW = 5e12


def should_compile(config: Any, world: World) -> bool:
    """Whether torch.compile is asked for."""
    return config.compile is True or (config.compile == "auto" and world.device.type == "cuda")


def compile_model(config: Any, model: Any, world: World, rows: Rows, micro_batch: int) -> torch.nn.Module:
    """The model compiled, where that is asked for and works on a micro-batch, the first of the rows."""
    if not should_compile(config, world):
        return model
    whole_step = micro_batch == config.rows_per_step  # in one pass of one process
    short = model.flops_per_token() * micro_batch * model.config.block_size < GRAPHS_BELOW
    graphs = world.device.type == "cuda" and whole_step and short
    x, y = world.to_device(*rows[0:micro_batch])
    fast, failure = try_compile(model, world, x, y, graphs)
    if failure:
        print0(f"warning: torch.compile failed, going on without it ({failure})")
    return fast
