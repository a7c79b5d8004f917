"""Train with the code of a nanoGPT checkout, doing what its train.py does, to measure it beside ours."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.data.dataset import Tokens
from nanogpt.device import pick_device, pick_dtype
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.text.tokenizer import GPT2_VOCAB
from nanogpt.timing import Steps

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")  # of its GPTConfig


def load_model_module(checkout: str) -> Any:
    """Import model.py of a nanoGPT checkout. Raises InputError if it is missing or unlike nanoGPT's."""
    path = Path(checkout) / "model.py"
    spec: Any = importlib.util.spec_from_file_location("nanogpt_checkout_model", path)
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and torch.compile look it up
    try:
        spec.loader.exec_module(module)
        _ = module.GPTConfig, module.GPT.configure_optimizers
    except Exception as error:  # foreign code may raise anything
        raise InputError(
            f"--reference={checkout}: {path} cannot be used ({error!r}); give the path of a nanoGPT checkout"
        ) from error
    return module


def start_world(device: str, dtype: str) -> World:
    """Pick device and dtype like `distributed.start`, but set up torch as nanoGPT does."""
    torch_device = pick_device(device)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return World(0, 1, torch_device, pick_dtype(dtype, torch_device))


def training_steps(
    checkout: str,
    sizes: dict[str, Any],  # of SIZES
    tokens: Tokens,
    world: World,
    *,
    batch_size: int,
    micro_steps: int,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    grad_clip: float,
    compiled: bool,
) -> Steps:
    """nanoGPT's training steps: no autocast on a CPU, and each step waits for its loss."""
    is_cuda = world.device.type == "cuda"
    module = load_model_module(checkout)
    if sizes["vocab_size"] == GPT2_VOCAB:
        sizes = {**sizes, "vocab_size": 50304}  # as its train.py rounds it up
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes
        model = module.GPT(module.GPTConfig(**sizes)).to(world.device)
        optimizer = model.configure_optimizers(weight_decay, learning_rate, betas, world.device.type)
    if compiled:
        model = torch.compile(model)
    scaler = torch.amp.GradScaler(world.device.type, enabled=is_cuda and world.dtype == torch.float16)

    x, y = _random_batch(tokens, batch_size, sizes["block_size"], world)
    while True:
        for _ in range(micro_steps):
            with world.autocast() if is_cuda else contextlib.nullcontext():
                loss = model(x, y)[1] / micro_steps
            # The next batch comes before backward: the host reads it while a GPU computes.
            x, y = _random_batch(tokens, batch_size, sizes["block_size"], world)
            scaler.scale(loss).backward()
        if grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield [loss.item() * micro_steps]


def _random_batch(tokens: Tokens, B: int, T: int, world: World) -> list[Tensor]:
    """Inputs and targets (B, T) from random positions. A file is mapped anew for each batch."""
    ids = tokens.shards[0].ids() if len(tokens.shards) == 1 else tokens
    starts = torch.randint(len(ids) - T, (B,)).tolist()
    x = torch.stack([torch.from_numpy(ids[start : start + T].astype(np.int64)) for start in starts])
    y = torch.stack([torch.from_numpy(ids[start + 1 : start + 1 + T].astype(np.int64)) for start in starts])
    return world.to_device(x, y)
