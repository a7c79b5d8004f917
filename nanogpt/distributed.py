"""Distributed training: rank, world size, collectives, and errors of other processes."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt import sharding
from nanogpt.device import PEAK_FLOPS, disable_malloc_trim, is_out_of_memory, pick_device, pick_dtype
from nanogpt.errors import InputError, RunStopped
from nanogpt.trials import MIN_BFLOAT16_SPEED, bfloat16_speed

TIMEOUT_S = 600.0  # that a collective waits for the other processes


@dataclass(frozen=True)
class World:
    """Distributed context: rank, world size, device, autocast dtype."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    bfloat16_speed: float | None = None  # over float32's, where the dtype was chosen by it
    mesh: Any = None  # copies × shards, where several ranks share a copy of the model (nanogpt/sharding.py)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        """The number of ranks that share one copy of the model."""
        return self.mesh.size(1) if self.mesh else 1

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision: weights stay float32, matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` (any shape) over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """The `values` of all ranks, equal in shape, concatenated along the first dimension."""
        if self.size == 1:
            return values
        gathered = values.new_empty(self.size * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(gathered, values.contiguous())
        return gathered

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Host tensors on this process's device; a copy to a GPU does not wait."""
        if self.device.type != "cuda":
            return [t.to(self.device) for t in tensors]
        return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model` if alone or sharded, else DistributedDataParallel, which averages its gradients."""
        if self.size == 1 or self.mesh:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def average_gradients(self, model: Any, is_last: bool) -> None:
        """Make the next backward pass average the gradients over the copies of the model only if it is the last one."""
        if self.mesh:
            model.set_requires_all_reduce(is_last)
            model.set_is_last_backward(is_last)
        elif self.size > 1:
            model.require_backward_grad_sync = is_last

    def synchronize(self) -> None:
        """Wait until the device has finished its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_flops(self) -> float | None:
        """The device's dense bfloat16/float16 peak in FLOP/s; None where unknown or the dtype is float32."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        if "Laptop" in name:
            return None
        return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def world_size() -> int:
    """The number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str = "auto", dtype: str = "auto", backend: str = "auto", shards: int = 1) -> World:
    """Join the processes that torchrun started, or run alone; pick device and dtype.

    device: auto, cpu, cuda, cuda:N or mps. dtype: auto (see `try_dtypes`) or a key of `DTYPES`. backend: auto, nccl or
    gloo. shards: ranks that share a copy of the model, 0 for all. Raises InputError for a device, dtype or backend that
    this machine lacks.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = world_size()
    torch_device = pick_device(device, local_rank if size > 1 else None)
    torch_dtype = pick_dtype(dtype, torch_device)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where a product stays in float32
    elif torch_device.type == "cpu":
        disable_malloc_trim()

    if size > 1:
        if backend == "auto":
            backend = "nccl" if torch_device.type == "cuda" else "gloo"
        if backend == "nccl" and torch_device.type != "cuda":
            raise InputError(
                f"backend=nccl: needs CUDA devices, this process has {torch_device.type}; use --backend=gloo"
            )
        device_id = torch_device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S), device_id=device_id)
    mesh = sharding.make_mesh(torch_device.type, size, shards or size) if size > 1 and shards != 1 else None
    return World(rank, size, torch_device, torch_dtype, mesh=mesh)


def try_dtypes(world: World, dtype: str, rows: int, n_embd: int, n_inner: int) -> World:
    """`world` with the dtype of the key `dtype`; auto on a CPU: the faster one, by a trial with products of this shape.

    rows: tokens of a forward pass. All ranks take the main one's outcome. A sharded model has its dtype already.
    """
    if dtype != "auto" or world.device.type != "cpu" or world.mesh:
        return replace(world, dtype=pick_dtype(dtype, world.device))
    outcome = bfloat16_speed(rows, n_embd, n_inner) if world.is_main else 0.0
    speed = world.all_reduce_sum(torch.tensor(outcome, dtype=torch.float64)).item()
    faster = torch.bfloat16 if speed >= MIN_BFLOAT16_SPEED else torch.float32
    return replace(world, dtype=faster, bfloat16_speed=speed)


@contextlib.contextmanager
def explain_errors(hint: str, before_update: bool = True) -> Iterator[None]:
    """Turn running out of memory into an InputError with `hint`, and a lost process into RunStopped.

    After the first update (before_update=False) every InputError becomes RunStopped.
    """
    try:
        yield
    except (RuntimeError, MemoryError, InputError) as error:
        if is_lost_process(error):
            reason = str(error).strip().splitlines()[0][:200]
            rank = os.environ.get("RANK", "0")
            raise RunStopped(
                f"rank {rank}: a collective failed or timed out ({reason}): another process crashed or hangs; see its "
                "output, then resume with --resume=auto"
            ) from error
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        message = str(error) if isinstance(error, InputError) else hint
        raise (InputError if before_update else RunStopped)(message) from error


def is_lost_process(error: BaseException) -> bool:
    """True if `error` means that another process did not take part in a collective."""
    if isinstance(error, InputError) or not dist.is_available():
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
