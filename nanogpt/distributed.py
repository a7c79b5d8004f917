"""Distributed training: rank, world size, collectives."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt import sharding
from nanogpt.device import disable_malloc_trim, pick_device, pick_dtype
from nanogpt.errors import InputError
from nanogpt.rendezvous import Ranks, join


@dataclass(frozen=True)
class World:
    """Distributed context: rank, world size, device, autocast dtype."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    bfloat16_speedup: float | None = None  # over float32, where it decided the dtype
    mesh: Any = None  # copies × shards, where several ranks share a copy of the model (nanogpt/sharding.py)
    save_group: Any = None  # of the ranks that share the first copy, for their host memory
    ranks: Ranks = field(default_factory=Ranks, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> int:
        return self.mesh.size(1) if self.mesh else 1

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        """Mixed precision: weights stay float32, matrix products run in `dtype`."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` (any shape) over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_over_ranks(self, numbers: Sequence[float]) -> Sequence[float]:
        """Sum a few host numbers over the ranks; with more than one rank this waits for the device."""
        if self.size == 1:
            return numbers
        return self.all_reduce_sum(torch.tensor(numbers, dtype=torch.float32, device=self.device)).tolist()

    def all_gather(self, values: Tensor) -> Tensor:
        """The `values` of all ranks, equal in shape, concatenated along the first dimension."""
        if self.size == 1:
            return values
        gathered = values.new_empty(self.size * len(values), *values.shape[1:])
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(gathered, values.contiguous())  # 2.13's name
        return gathered

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Host tensors on this process's device; a copy to a GPU does not wait."""
        is_cuda = self.device.type == "cuda"
        return [(t.pin_memory() if is_cuda else t).to(self.device, non_blocking=is_cuda) for t in tensors]

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """`model` if alone or sharded, else DistributedDataParallel, which averages its gradients."""
        if self.size == 1 or self.mesh:
            return model
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def set_gradient_sync(self, model: Any, is_last: bool) -> None:
        """Average gradients over the copies of the model in the step's last backward pass alone."""
        if self.mesh:
            model.set_requires_all_reduce(is_last)
            model.set_is_last_backward(is_last)
        elif self.size > 1:
            model.require_backward_grad_sync = is_last

    def close(self) -> None:
        self.ranks.leave()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(
    device: str = "auto", dtype: str = "auto", backend: str = "auto", ranks: Ranks | None = None, shards: int = 1
) -> World:
    """Form the process group of the ranks that torchrun started, or run alone; pick device and dtype.

    device: auto, cpu, cuda, cuda:N or mps. dtype: auto (see `trials.try_dtypes`) or torch's. backend: auto, nccl, gloo.
    shards: ranks that share a copy of the model, 0 for all. Raises InputError for what a machine lacks.
    """
    ranks = ranks or join()
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if ranks.size > 1 else None
    torch_device = ranks.run_on_all(lambda: pick_device(device, local_rank))
    torch_dtype = ranks.run_on_all(lambda: pick_dtype(dtype, torch_device))
    ranks.raise_unless_equal({"device": torch_device.type, "dtype": str(torch_dtype)}, hint="set --device and --dtype")
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where a product stays in float32
    elif torch_device.type == "cpu":
        disable_malloc_trim()

    mesh = save_group = None
    if ranks.size > 1:
        if backend == "auto":
            backend = "nccl" if torch_device.type == "cuda" else "gloo"
        if backend == "nccl" and torch_device.type != "cuda":
            raise InputError(f"backend=nccl: needs CUDA, this process has {torch_device.type}; use --backend=gloo")
        if shards != 1 and torch_dtype == torch.float16:
            raise InputError("shards: this GPU would use float16, which shards do not support; set --dtype=float32")
        device_id = torch_device if backend == "nccl" else None
        timeout = timedelta(seconds=ranks.timeout_s)
        dist.init_process_group(backend, None, timeout, ranks.size, ranks.rank, ranks.store, device_id=device_id)
        if shards != 1:
            shards = shards or ranks.size
            # Only its members form it: on all ranks, new_group would split NCCL's communicator, which all must join.
            if ranks.rank < shards:
                save_group = dist.new_group([*range(shards)], timeout, backend="gloo", use_local_synchronization=True)
            mesh = sharding.make_mesh(torch_device.type, ranks.size, shards, timeout)
    return World(ranks.rank, ranks.size, torch_device, torch_dtype, mesh=mesh, save_group=save_group, ranks=ranks)
