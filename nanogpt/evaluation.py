"""Evaluate a model: its loss on fixed windows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from nanogpt.data.rows import EvalWindows
from nanogpt.distributed import World
from nanogpt.errors import InputError

# Limits of a forward pass on a CPU. A few large operations are faster than many small ones (runs/start).
CPU_TOKENS = 2**12
CPU_LOGITS = 2**23  # tokens × vocabulary: bounds the memory


def eval_batch_size(windows: EvalWindows, micro_batch: int, world: World) -> int:
    """Rows of a forward pass of a model that is not compiled: on a CPU more than a small micro-batch of training."""
    if world.device.type != "cpu" or world.mesh:  # a sharded model's blocks may be compiled
        return micro_batch
    rows = min(CPU_TOKENS, CPU_LOGITS // windows.vocab_size) // windows.block_size
    return max(micro_batch, min(rows, len(windows) // world.size))


@torch.no_grad()  # under inference_mode FSDP2 would keep tensors that no backward pass can use
def evaluate(
    model: nn.Module, windows: EvalWindows, batch_size: int, world: World, check: Callable[[], None] = lambda: None
) -> float:
    """Return the mean loss in nats over the valid targets of `windows`, whose batches the ranks share.

    check: called before each pass; may raise, on all ranks alike. Raises InputError if there are no valid targets.
    """
    model.eval()
    sums = torch.zeros(2, device=world.device)  # of the losses and of the targets
    try:
        # All ranks make the same number of passes, because each gathers sharded weights: the last batch may be empty.
        for start in range(0, len(windows), world.size * batch_size):
            check()
            first = start + world.rank * batch_size
            x, y = windows[first : first + batch_size]
            # Pad a short batch with rows without targets: a compiled model wants one shape.
            padding = (0, 0, 0, batch_size - len(x))
            x, y = world.to_device(F.pad(x, padding), F.pad(y, padding, value=-1))
            with world.autocast():
                loss = model(x, y)[1]
            num_targets = (y >= 0).sum().float()
            sums += torch.stack((loss.float() * num_targets, num_targets))
    finally:
        model.train()

    total_loss, total_targets = world.all_reduce_sum(sums).tolist()
    if not total_targets:
        raise InputError("the loss mask leaves no token to evaluate on; give a larger --eval_iters or more data")
    return total_loss / total_targets
