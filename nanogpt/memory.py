"""Memory estimates, in bytes: training, the optimizer step, decoding."""

import os
from collections import Counter
from typing import Any

import torch

from nanogpt.console import format_bytes, print0
from nanogpt.device import free_memory, is_out_of_memory
from nanogpt.distributed import World


def memory_hint(micro_batch: int, rows_per_process: int, block_size: int, free: int | None) -> str:
    """What to do where memory runs out: the flag for smaller micro-batches of the same steps."""
    told = f"too little memory for {micro_batch} rows of {block_size} tokens at a time"
    told += f" ({format_bytes(free)} were free)" if free else ""
    smaller = max((n for n in range(1, micro_batch // 2 + 1) if rows_per_process % n == 0), default=0)
    if not smaller:
        return f"{told}: try --activation_checkpointing=True and --loss_chunk=1024, or a smaller --block_size or model"
    return f"{told}: --micro_batch_size={smaller} takes fewer, and the steps stay as they are"


def optimizer_state_numel(model: Any, config: Any) -> int:
    """Numbers that the optimizer keeps: two for each parameter, one for each that Muon trains."""
    hidden = model.muon_params() if config.optimizer == "muon" else {}
    by_muon = sum(p.numel() for name, p in model.named_parameters() if name in hidden)
    return 2 * model.count_parameters() - by_muon


def optimizer_step_bytes(model: Any, config: Any, a: int) -> int:
    """Bytes that an update takes while it lasts, `a` of them for a number in Muon's products: each shape's gradients
    and averages, and beside them first two copies more of the gradients, shrunk and guarded, then Newton–Schulz's two
    with their squares; the shape before leaves its last update behind meanwhile."""
    maps = Counter[tuple[int, int]]()
    for name, rows in (model.muon_params() if config.optimizer == "muon" else {}).items():
        columns = model.get_parameter(name).shape[1]
        maps.update((min(r, columns), max(r, columns)) for r in rows)
    most = before = 0
    for (r, s), count in maps.items():
        most = max(most, before + count * (8 * r * s + max(8 * r * s, 2 * a * (r * s + r * r))))
        before = 4 * count * r * s
    return most


MAX_TOKENS_PER_PASS = 2**14  # read in one pass, so that the memory of many long texts' activations stays small


def rows_to_score(model: Any, length: int) -> int:
    """How many rows of `length` ids `score` takes in one pass, its logits being a gigabyte or less."""
    return max(1, min(MAX_TOKENS_PER_PASS, 2**28 // model.config.vocab_size) // length)


def decoder_rows_that_fit(model: Any, length: int, free: int | None) -> int:
    """How many texts of up to `length` tokens a decoder can write at once in half of `free` bytes; None: any number."""
    c = model.config
    kept = 2 * c.n_layer * c.n_kv_head * c.head_dim * min(length, c.block_size)
    each = 4 * (kept + 16 * c.vocab_size)  # drawing makes a few copies of the logits, some of 8 bytes a number
    return 2**31 if free is None else max(1, free // 2 // each)


def estimate_training_memory(model: Any, config: Any, B: int, T: int, world: World) -> float:
    """Memory of a training step in bytes, estimated: weights, gradients, the optimizer's state, and what backward
    reads of B rows of T positions or, where that is more, the room of the update."""
    c, a = model.config, 4 if world.dtype == torch.float32 else 2  # bytes of a number that a matrix product reads
    # A third more than a block keeps of a position for backward, for what comes and goes.
    if c.arch == "gpt2":
        block = 4 / 3 * ((8 + 6 * a) * c.n_embd + 2 * a * c.n_inner)
    else:
        heads = (c.n_head + c.n_kv_head) * c.head_dim
        block = 4 / 3 * (18 * c.n_embd + (8 + 2 * a) * heads + 4 * a * c.n_inner)
    blocks = c.n_layer * block if not model.activation_checkpointing else c.n_layer * 4 * c.n_embd + block
    logits = 12 * c.vocab_size * min(B * T, model.loss_chunk or B * T)  # log-probabilities and two gradients of them
    stays = 4 * (2 * model.count_parameters() + optimizer_state_numel(model, config))
    return stays + max(B * T * blocks + logits, 1.1 * optimizer_step_bytes(model, config, a))


def pick_micro_batch(config: Any, model: Any, world: World) -> int:
    """Rows that a process takes at a time. micro_batch_size=auto tries forward and backward with room left for the
    optimizer's state, the most rows first; on a CPU, whose system kills what takes too much, it goes by the estimate.
    """
    sizes = config.micro_batches(world.size)
    if config.micro_batch_size != "auto" or config.eval_only:
        return sizes[0]
    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share this machine's memory
    T, fits = model.config.block_size, sizes[-1]
    for size in sizes:
        if world.device.type == "cpu":
            free = free_memory(world.device)
            works = free is None or estimate_training_memory(model, config, size, T, world) * neighbors < 0.8 * free
        else:
            works = _fits_on_gpu(model, world, torch.zeros(size, T, dtype=torch.int64, device=world.device))
        if world.all_reduce_sum(torch.tensor(float(works), device=world.device)).item() == world.size:
            fits = size
            break
    print0(f"micro_batch_size=auto: {fits} rows at a time")
    return fits


def _fits_on_gpu(model: Any, world: World, x: torch.Tensor) -> bool:
    """Whether forward and backward on rows x (B, T) fit beside the optimizer's state. Leaves no gradients."""
    try:
        state = [torch.empty_like(p) for p in (*model.parameters(), *model.parameters())]
        with world.autocast():
            loss = model(x, x)[1]
        loss.backward()
        del state, loss
        works = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        works = False
    model.zero_grad(set_to_none=True)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return works
