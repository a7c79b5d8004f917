"""All memory estimates, in bytes: training, the optimizer step, decoding."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from nanogpt.console import format_bytes, print0
from nanogpt.cpu_kernels import MAX_PLAIN_BACKWARD, MIN_WIDE_LAYER
from nanogpt.device import free_memory, is_out_of_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.sharding import local

USABLE_SHARE = 0.7  # of free memory: what an estimate may fill
MAX_TOKENS_PER_PASS = 2**14  # of a forward pass without backward: bounds the activations of many long texts
MAX_LOGITS = 2**28  # numbers of a forward pass without backward: a gigabyte


# --- Training


def trained_numel(model: Any) -> int:
    """Numbers that train: all parameters, or the adapters of LoRA."""
    if all(p.requires_grad for p in model.parameters()):
        return model.count_parameters()
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def optimizer_state_numel(model: Any, optimizer: str) -> int:
    """Numbers that the optimizer keeps: two for each parameter of AdamW, one for each of Muon."""
    muon_params = model.muon_params() if optimizer == "muon" else {}
    muon_numel = sum(p.numel() for name, p in model.named_parameters() if name in muon_params)
    return 2 * trained_numel(model) - muon_numel


def optimizer_step_bytes(model: Any, optimizer: str, dtype: torch.dtype) -> int:
    """Peak of the temporary memory of Muon's step; dtype: of training, float32 in its products for float16.

    In the dtype of the products there are all gradients, the updates of the shapes that are done, and of each map of
    the present shape three iterates and two Gram matrices; at the end, while results are converted, three times all.
    """
    if optimizer != "muon":
        return 0
    shapes = Counter[tuple[int, int]]()
    for name, rows in model.muon_params().items():
        columns = model.get_parameter(name).shape[1]
        for num_rows in rows:
            shapes[min(num_rows, columns), max(num_rows, columns)] += 1
    total = sum(count * r * s for (r, s), count in shapes.items())
    itemsize = 2 if dtype == torch.bfloat16 else 4
    peak = 3 * itemsize * total
    done = 0
    for (r, s), count in sorted(shapes.items(), key=lambda item: item[0][0] ** 2 * item[0][1], reverse=True):
        peak = max(peak, itemsize * (total + done + count * (3 * r * s + 2 * r * r)))
        done += count * r * s
    return peak


def estimate_training_memory(model: Any, optimizer: str, B: int, T: int, dtype: torch.dtype, shards: int = 1) -> float:
    """Peak memory of a training step on micro-batches of B rows of T tokens.

    Weights, gradients and optimizer state in float32; beside them the larger of the activations that backward reads
    and the optimizer step's temporaries. dtype: of the matrix products. shards: ranks that share a copy of the model.
    """
    c = model.config
    itemsize = dtype.itemsize
    # Bytes a token: 4/3 of the activations that a block saves for backward, a third more for temporaries.
    device = model.token_embedding.weight.device.type
    is_plain = type(model.blocks[0].mlp.down) is torch.nn.Linear  # without adapters
    recomputes = device == "cpu" and is_plain and c.n_embd * c.n_inner >= MIN_WIDE_LAYER
    wide = (1 if recomputes else 2) * itemsize * c.n_inner
    if c.arch == "gpt2":
        block = 4 / 3 * ((8 + 6 * itemsize) * c.n_embd + wide)
    else:
        head_channels = (c.n_head + c.n_kv_head) * c.head_dim
        norms = 2 + 4 * (itemsize if device == "cpu" else 4)  # a copy of the input, and the output, of each of two
        block = 4 / 3 * (norms * c.n_embd + (8 + 2 * itemsize) * head_channels + 2 * wide)
    if c.dropout:  # masks; and off CUDA attention is not fused then: 12 bytes for each of T × T probabilities
        block += 10 * c.n_embd
        block += 16 * c.n_head * T if device != "cuda" else 0
    blocks = c.n_layer * 4 * c.n_embd + block if model.activation_checkpointing else c.n_layer * block
    if device == "cpu" and dtype == torch.bfloat16 and T <= MAX_PLAIN_BACKWARD:
        blocks += 6 * c.n_head * T  # while one block's attention is differentiated: T × T probabilities, two gradients
    logits = 12 * c.vocab_size * min(B * T, model.loss_chunk or B * T)  # log-probabilities and two of their gradients
    if model.loss_chunk:
        copy = itemsize if itemsize < 4 else 0  # of the output layer's weights, beside its gradient
        logits += (4 + copy) * c.vocab_size * c.n_embd
    state = 4 * (model.count_parameters() + trained_numel(model) + optimizer_state_numel(model, optimizer))
    step = 1.1 * optimizer_step_bytes(model, optimizer, dtype)
    if shards > 1:
        state = state / shards + gathered_bytes(model, itemsize)
    return state + max(B * T * blocks + logits, step / shards)


def gathered_bytes(model: Any, itemsize: int) -> float:
    """Memory of what FSDP2 gathers: two blocks, and all the rest from forward to backward.

    Of each there are the weights, their gradients, and float32 copies of the gradients to be scattered.
    """
    block = sum(p.numel() for p in model.blocks[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - len(model.blocks) * block
    return 2 * block * (2 * itemsize + 4) + rest * (4 + 4 + 4)


def checkpoint_bytes(model: Any, optimizer: str) -> int:
    """Weights and moments in a checkpoint; the main process copies them in host memory while it is written."""
    return 4 * (trained_numel(model) + optimizer_state_numel(model, optimizer))


def fits_in_memory(needed: float, device: torch.device) -> bool:
    """True if an estimate for each process on this machine fits into the usable share of its free memory."""
    free = free_memory(device)
    processes = local_processes() if device.type == "cpu" else 1
    return free is None or needed * processes < USABLE_SHARE * free


def local_processes() -> int:
    """The run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def raise_if_memory_is_short(
    model: Any, optimizer: str, B: int, T: int, world: World, hint: str, has_checkpoints: bool = True
) -> None:
    """Raise InputError with `hint` where a CPU lacks the memory of training on micro-batches of B rows.

    That is what its processes are estimated to need, beyond the weights, which they have; and the copy of a checkpoint
    by the main process, with shards those of their parts by the others. A GPU's machine needs only the copies.
    """
    free = free_memory(torch.device("cpu"))
    if free is None:
        return
    copies = 0.0
    if has_checkpoints and world.is_main:
        others = min(local_processes(), world.shards) - 1
        copies = checkpoint_bytes(model, optimizer) * (1 + others / world.shards)
    if copies > free:
        raise InputError(
            f"not enough memory of the host to save: the copy of a checkpoint takes {format_bytes(copies)}, "
            f"{format_bytes(free)} are free; use a machine with more"
        )
    if world.device.type == "cpu":
        loaded = sum(local(p).nbytes for p in model.parameters())
        needed = estimate_training_memory(model, optimizer, B, T, world.dtype, world.shards) - loaded
        needed = needed * local_processes() + copies
        if needed > free:
            suffix = f", {format_bytes(copies)} of it for the copy of a checkpoint" if copies else ""
            raise InputError(f"{hint}; about {format_bytes(needed)} are needed{suffix}")


def pick_micro_batch(model: Any, optimizer: str, sizes: Sequence[int], world: World) -> int:
    """The largest of `sizes` (rows, descending) that fits into memory on every rank; the last one if none does.

    A GPU tries forward and backward beside an optimizer state. A CPU, whose system kills a process that takes too
    much, and sharded models rely on the estimate.
    """
    T = model.config.block_size
    for size in sizes:
        if world.device.type == "cpu" or world.mesh:  # a trial that fails on one rank would leave the others waiting
            needed = estimate_training_memory(model, optimizer, size, T, world.dtype, world.shards)
            fits = fits_in_memory(needed, world.device)
        else:
            fits = _try_step(model, world, torch.zeros(size, T, dtype=torch.int64, device=world.device))
        if world.all_reduce_sum(torch.tensor(float(fits), device=world.device)).item() == world.size:
            break
    print0(f"micro_batch_size=auto: {size} rows")
    return size


def _try_step(model: Any, world: World, x: torch.Tensor) -> bool:
    """Run forward and backward on x (B, T) beside an optimizer state; False if memory runs out."""
    try:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer_state = [torch.empty_like(p) for p in (*trained, *trained)]
        with world.autocast():
            loss = model(x, x)[1]
        loss.backward()
        del optimizer_state, loss
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # does nothing without a GPU


def memory_hint(micro_batch: int, rows_per_process: int, block_size: int, free: int | None) -> str:
    """The message for running out of memory, with a flag that needs less.

    rows_per_process: of a step. free: bytes before the run began, None where unknown.
    """
    problem = f"not enough memory for micro-batches of {micro_batch} rows of {block_size} tokens"
    if free:
        problem += f" ({format_bytes(free)} free)"
    for smaller in range(micro_batch // 2, 0, -1):
        if rows_per_process % smaller == 0:
            return f"{problem}: try --micro_batch_size={smaller}, which leaves the steps as they are"
    return f"{problem}: try --activation_checkpointing=True and --loss_chunk=1024, or a smaller --block_size or model"


# --- Evaluation and decoding


def rows_to_score(model: Any, length: int) -> int:
    """Rows of `length` tokens to score in one forward pass."""
    return max(1, min(MAX_TOKENS_PER_PASS, MAX_LOGITS // model.config.vocab_size) // length)


def decoder_rows_that_fit(model: Any, length: int, free: int | None) -> int:
    """Texts of up to `length` tokens to decode at once with `free` bytes; None: unknown, no limit."""
    if free is None:
        return 2**31
    return max(1, int(USABLE_SHARE * free) // _decoder_row_bytes(model, length))


def crop_to_memory(model: Any, free: int | None) -> None:
    """Shorten the context in place, and print that, until `free` bytes hold the KV cache of one text."""
    length = model.config.block_size
    while free is not None and length > 1 and _decoder_row_bytes(model, length) > USABLE_SHARE * free:
        length //= 2
    if length < model.config.block_size:
        print(f"a context of {length:,} tokens, not {model.config.block_size:,}, for lack of memory", file=sys.stderr)
        model.crop_block_size(length)


def _decoder_row_bytes(model: Any, length: int) -> int:
    c = model.config
    kv_cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * min(length, c.block_size)
    logits = 16 * c.vocab_size  # sampling makes a few copies, some of 8 bytes a number
    return 4 * (kv_cache + logits)
