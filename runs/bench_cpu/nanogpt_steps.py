"""Train with the code of a nanoGPT checkout, doing what its train.py does: what `bench.py --reference` measures."""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import GPTConfig
from nanogpt.compile import should_compile
from nanogpt.data.dataset import Tokens
from nanogpt.device import pick_device, pick_dtype
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.text.tokenizer import GPT2_VOCAB

SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")  # of its GPTConfig


def start_world(device: str, dtype: str) -> World:
    """Pick device and dtype like `distributed.start`, but leave the C library's settings as nanoGPT has them."""
    torch_device = pick_device(device)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32
    return World(0, 1, torch_device, pick_dtype(dtype, torch_device))


def training_steps(config: Any, model_config: GPTConfig, tokens: Tokens, world: World) -> Iterator[list[float]]:
    """Do what nanoGPT's train.py does: no autocast on a CPU, and each step waits for its loss.

    config: a BenchConfig.
    """
    is_cuda = world.device.type == "cuda"
    B, T = config.batch_size, model_config.block_size
    sizes = {name: getattr(model_config, name) for name in SIZES}
    if sizes["vocab_size"] == GPT2_VOCAB:
        sizes["vocab_size"] = 50304  # as its train.py rounds it up
    module = load_model_file(config.reference)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the sizes
        model = module.GPT(module.GPTConfig(**sizes)).to(world.device)
        betas = (config.beta1, config.beta2)
        optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, betas, world.device.type)
    if should_compile(config.compile, world.device):
        model = torch.compile(model)
    scaler = torch.amp.GradScaler(world.device.type, enabled=is_cuda and world.dtype == torch.float16)

    x, y = random_batch(tokens, B, T, world)
    while True:
        for _ in range(config.gradient_accumulation_steps):
            with world.autocast() if is_cuda else contextlib.nullcontext():
                loss = model(x, y)[1] / config.gradient_accumulation_steps
            # The next batch comes before backward: the host reads it while a GPU computes.
            x, y = random_batch(tokens, B, T, world)
            scaler.scale(loss).backward()
        if config.grad_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield [loss.item() * config.gradient_accumulation_steps]


def random_batch(tokens: Tokens, B: int, T: int, world: World) -> list[Tensor]:
    """Inputs and targets (B, T) from random positions. A file is mapped anew for each batch."""
    ids = tokens.shards[0].ids() if len(tokens.shards) == 1 else tokens
    starts = torch.randint(len(ids) - T, (B,)).tolist()
    x = torch.stack([torch.from_numpy(ids[start : start + T].astype(np.int64)) for start in starts])
    y = torch.stack([torch.from_numpy(ids[start + 1 : start + 1 + T].astype(np.int64)) for start in starts])
    return world.to_device(x, y)


def load_model_file(checkout: str) -> Any:
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
