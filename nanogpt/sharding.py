"""Sharded training by torch's FSDP2: each rank keeps a part of every tensor's rows.

A block's weights are gathered when it runs and dropped afterwards; its gradients are summed and scattered. Embeddings,
final norm and output layer form one unit, which stays gathered from forward to backward. Of a tensor with n rows, rank
r of a group of S keeps rows r c to (r + 1) c, where c = ⌈n / S⌉.
"""

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.errors import RunStopped, first_line

SHARDS = "shards"  # the dimension of the mesh whose ranks share one copy of the model


def make_mesh(device_type: str, size: int, shards: int, timeout: timedelta | None = None) -> Any:
    """The device mesh of `size` ranks: copies × shards. timeout: of collectives among some of them."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    names = ("copies", SHARDS)
    if shards == size:  # the group of all ranks, which exists
        return init_device_mesh(device_type, (1, size), mesh_dim_names=names)
    ranks = torch.arange(size).view(-1, shards)
    groups = [dist.new_subgroups_by_enumeration(part.tolist(), timeout)[0] for part in (ranks.mT, ranks)]
    return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)


def shard_model(model: Any, mesh: Any, dtype: torch.dtype) -> None:
    """Shard a GPT over the mesh, in place. dtype: of the blocks' gathered weights; gradients are summed in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = mesh if mesh.size(0) > 1 else mesh[SHARDS]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # what is left, in float32: so is the residual stream
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # logits; never changed


def check_shards(shards: int, size: int, dtype: str, lora_rank: int, minutes: float | None) -> list[str]:
    """Return the problems of `shards` with other keys and `size` processes, a line each."""
    if (shards or size) == 1:
        return []
    problems = []
    if size % (shards or size):
        problems.append(f"shards={shards}: does not divide {size} process(es); set 0 for all, 1 for none, or a divisor")
    if dtype == "float16":
        problems.append("dtype=float16: its loss scaler sees the gradients of one rank alone; set bfloat16 or shards=1")
    if lora_rank:
        problems.append("lora_rank: its frozen base cannot be sharded; set shards=1")
    if minutes is not None:
        problems.append("minutes: chooses small models, which need no shards; set shards=1")
    return problems


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather_rows(copy: Tensor, group: Any) -> None:
    """Send a rank's rows of a tensor to the main process, which receives them behind its own.

    copy: in host memory; the whole tensor on the main process, whose rows are the first, and the own rows on the
    others. group: gloo, of the ranks that share the main process's copy of the model; each calls this. Raises
    RunStopped for a lost rank, after which the group is of no use.
    """
    peer = 0  # the rank that this one waits for
    try:
        if dist.get_rank() != 0:
            if len(copy):
                dist.send(copy, peer, group)
            return
        shards = dist.get_world_size(group)
        for peer in range(1, shards):
            rows = copy[own_rows(len(copy), peer, shards)]
            if len(rows):
                dist.recv(rows, peer, group)
    except RuntimeError as error:
        task = "send its part of a checkpoint" if peer else "receive a part of a checkpoint"
        raise RunStopped(
            f"rank {peer} did not {task} ({first_line(error)}): see its output, then resume with --resume=auto"
        ) from error


def norm_over_ranks(norm: Tensor, sharded: Tensor) -> Tensor:
    """Combine norms of the ranks' shards (any shape) into those of the whole tensors.

    sharded: one of the tensors, perhaps whole. The sum is over all ranks, so that all copies get the same bits.
    """
    if not is_sharded(sharded):
        return norm
    square = norm.square()
    dist.all_reduce(square)
    copies = dist.get_world_size() // sharded.device_mesh[SHARDS].size()  # type: ignore[attr-defined]
    return (square / copies).sqrt()


def own_rows(num_rows: int, rank: int, shards: int) -> slice:
    """The rows that a rank of the group keeps."""
    share = -(-num_rows // shards)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


@torch.no_grad()
def copy_rows(target: Tensor, source: Tensor | Callable[[slice], Tensor]) -> None:
    """Copy a whole tensor, or what this rank keeps of it, into a parameter or a state.

    source: the tensor or, if sharded, what reads rows of it. Rows that it lacks become zero: the vocabulary's padding.
    """
    if not is_sharded(target):
        target.copy_(source)  # type: ignore[arg-type]
        return
    mesh: Any = target.device_mesh[SHARDS]  # type: ignore[attr-defined]
    own = local(target)
    rows = own_rows(len(target), mesh.get_local_rank(), mesh.size())
    part = source[rows] if isinstance(source, Tensor) else source(rows)
    if part.shape[1:] != own.shape[1:]:
        raise RuntimeError(f"rows of {tuple(part.shape[1:])} do not fit into {tuple(target.shape)}")
    own[len(part) :].zero_()
    own[: len(part)].copy_(part)


def equalize_copies(model: Any, mesh: Any) -> None:
    """Give all copies of a sharded model the weights of the first, as DistributedDataParallel does."""
    if mesh and mesh.size(0) > 1:  # random weights may differ between kinds of CPUs
        for parameter in model.parameters():
            dist.broadcast(local(parameter.detach()), group=mesh.get_group("copies"), group_src=0)


class Map(NamedTuple):
    """One linear map, which Muon orthogonalizes separately: some of the rows of the matrix `name`."""

    name: str
    rows: int
    columns: int
    parts: list[slice]  # the rows that each rank keeps, counted in that rank's part of the matrix

    def work(self) -> int:
        """Multiplications of the map with its own transpose."""
        return self.rows * self.columns * min(self.rows, self.columns)

    def numel(self, rank: int) -> int:
        return (self.parts[rank].stop - self.parts[rank].start) * self.columns


class MapExchange:
    """Sends the rows of each of Muon's maps to one rank, its owner, and the results back.

    Gathering would send every row to every rank. Owners are chosen so that all have about the same work. row_splits:
    the rows of the maps in each matrix. mesh: None for matrices that are not sharded.
    """

    def __init__(self, matrices: Mapping[str, Tensor], row_splits: Mapping[str, Sequence[int]], mesh: Any = None):
        self.group = mesh and mesh.get_group(SHARDS)
        self.rank = mesh.get_local_rank(SHARDS) if mesh else 0
        shards = mesh.size(1) if mesh else 1
        maps = []
        for name, splits in row_splits.items():
            num_rows, columns = matrices[name].shape
            own = [own_rows(num_rows, rank, shards) for rank in range(shards)]
            for last, rows in zip(itertools.accumulate(splits), splits, strict=True):
                maps.append(Map(name, rows, columns, [_overlap(part, last - rows, last) for part in own]))

        # The largest first, to the rank with the least work so far.
        self.owned: list[list[Map]] = [[] for _ in range(shards)]
        work = [0] * shards
        for one in sorted(maps, key=Map.work, reverse=True):
            owner = work.index(min(work))
            self.owned[owner].append(one)
            work[owner] += one.work()
        self.order = list(itertools.chain.from_iterable(self.owned))  # of the rows that a rank sends

    def views(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """This rank's rows of each map, in `order`. parts: its parts of the matrices."""
        return [parts[one.name][one.parts[self.rank]] for one in self.order]

    def apply(self, function: Callable[[list[Tensor]], list[Tensor]], rows: Tensor) -> Tensor:
        """Apply a function of whole maps (rows, columns), each on its owner; return the results laid out as `rows`.

        rows: `views`, flattened into one tensor, which is overwritten.
        """
        mine = self.owned[self.rank]
        sent = [sum(one.numel(self.rank) for one in owned) for owned in self.owned]
        sizes = [[one.numel(rank) for one in mine] for rank in range(len(self.owned))]
        received = [sum(numels) for numels in sizes]
        whole = self._all_to_all(rows, sent, received)
        pieces = whole.split(list(itertools.chain.from_iterable(sizes)))
        by_map = [pieces[i :: len(mine)] for i in range(len(mine))]  # a piece from each rank
        maps = [
            (torch.cat(parts) if len(parts) > 1 else parts[0]).view(one.rows, one.columns)
            for one, parts in zip(mine, by_map, strict=True)
        ]
        for parts, result in zip(by_map, function(maps), strict=True):
            torch._foreach_copy_(parts, result.reshape(-1).split([len(part) for part in parts]))
        return self._all_to_all(whole, received, sent)

    def _all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send a part of `rows` to each rank; return what they sent. The lists: numbers of elements."""
        if len(self.owned) == 1:
            return rows
        result = rows.new_empty(sum(received))
        dist.all_to_all_single(result, rows, received, sent, group=self.group)
        return result


def _overlap(part: slice, first: int, last: int) -> slice:
    """The rows from `first` to `last` of a matrix that lie in a part of it, counted in the part."""
    return slice(*(min(max(row, part.start), part.stop) - part.start for row in (first, last)))
