"""Several processes that train one model: rank, world size, collectives."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt.device import PEAK_FLOPS, disable_malloc_trim, is_out_of_memory, pick_device, pick_dtype
from nanogpt.errors import InputError, RunStopped

PATIENCE_S = 600.0  # that a process waits for the others before it gives up


@dataclass(frozen=True)
class World:
    """This process among its fellows: rank of size, the device it computes on and the dtype of its matrix products."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision: weights stay float32, matrix products run in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` (any shape) over all ranks; every rank gets it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """The `values` of all ranks, equal in shape, one after the other along the first dimension."""
        if self.size == 1:
            return values
        everything = values.new_empty(self.size * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(everything, values.contiguous())
        return everything

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Host tensors on this process's device; to a GPU they are copied in its own time, the host goes on."""
        if self.device.type != "cuda":
            return [t.to(self.device) for t in tensors]
        return [t.pin_memory().to(self.device, non_blocking=True) for t in tensors]

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model`, its gradients averaged over the ranks when there are several."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_flops(self) -> float | None:
        """The device's dense bfloat16/float16 peak in FLOP/s; None where it is unknown or the dtype is float32."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        known = [peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name) and "Laptop" not in name]
        return known[0] if known else None

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def processes() -> int:
    """How many processes train together, by torchrun's word."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str = "auto", dtype: str = "auto", backend: str = "auto") -> World:
    """Join the processes that torchrun started (or be alone) and settle device and dtype.

    device: auto, cpu, cuda, cuda:N or mps; dtype: auto or a key of `DTYPES`; backend: auto, nccl or gloo.
    Raises InputError for a device, dtype or backend that this machine lacks.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    chosen = pick_device(device, local_rank if size > 1 else None)
    chosen_dtype = pick_dtype(dtype, chosen)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where a product stays in float32
    elif chosen.type == "cpu":
        disable_malloc_trim()
    if size > 1:
        if backend == "auto":
            backend = "nccl" if chosen.type == "cuda" else "gloo"
        elif backend == "nccl" and chosen.type != "cuda":
            raise InputError(
                f"backend=nccl: joins CUDA devices, and this process has {chosen.type}; use --backend=gloo"
            )
        patience = timedelta(seconds=PATIENCE_S)
        dist.init_process_group(backend, timeout=patience, device_id=chosen if backend == "nccl" else None)
    return World(rank, size, chosen, chosen_dtype)


def is_lost_process(error: BaseException) -> bool:
    """Whether `error` says that another process did not take part in a collective."""
    if isinstance(error, InputError) or not dist.is_available():
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


@contextlib.contextmanager
def explain_errors(remedy: str, before_update: bool = True) -> Iterator[None]:
    """Running out of memory becomes an InputError that says `remedy`; after the first update any InputError becomes a
    RunStopped. So does a process that does not answer."""
    try:
        yield
    except (RuntimeError, MemoryError, InputError) as error:
        if is_lost_process(error):
            why, rank = str(error).strip().splitlines()[0][:200], os.environ.get("RANK", "0")
            raise RunStopped(
                f"rank {rank} waited in vain for the others ({why}): one has died or hangs; see what each printed, "
                "then go on with --resume=auto"
            ) from error
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        told = str(error) if isinstance(error, InputError) else remedy
        raise (InputError if before_update else RunStopped)(told) from error
