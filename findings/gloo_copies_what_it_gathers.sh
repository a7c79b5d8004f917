#!/usr/bin/env bash
# torch 2.13.0, gloo: an all-gather and a reduce-scatter of one tensor each allocate the size of the whole tensor again.
#
# Both read and write memory that the caller has allocated and touched before, so in a plan of a sharded model's memory
# one would count neither. FSDP2 on CPU processes then holds the largest unit of parameters once more while it scatters.
#
# Exits with 0 while this is so, with 1 if it has changed. Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.3.5

cat >demo.py <<'PYTHON'
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def resident(field):
    """Bytes of this process in memory: anonymous ones now, or all at the peak, without files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


dist.init_process_group("gloo")
size = dist.get_world_size()
whole, part = torch.ones(24_000_000), torch.ones(24_000_000 // size)  # 96 MB and its parts, all of them touched
dist.reduce_scatter_tensor(torch.ones(64), torch.ones(64 * size))  # connects the processes
shares = {}
for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("RssAnon")
    if name == "all_gather_into_tensor":
        dist.all_gather_into_tensor(whole, part)
    else:
        dist.reduce_scatter_tensor(part, whole)
    shares[name] = (resident("VmHWM") - resident("RssFile") - before) / whole.nbytes
if dist.get_rank() == 0:
    print(f"torch {torch.__version__}, {size} processes")
    for name, share in shares.items():
        print(f"{name}: {share:.2f} of the whole tensor allocated beside it")
dist.destroy_process_group()
sys.exit(not all(0.9 < share < 1.2 for share in shares.values()))
PYTHON
for processes in 2 4; do
    MALLOC_MMAP_THRESHOLD_=100000 OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --standalone \
        --nproc_per_node="$processes" demo.py 2>/dev/null
done

# Output:
# torch 2.13.0+cpu, 2 processes
# all_gather_into_tensor: 1.00 of the whole tensor allocated beside it
# reduce_scatter_tensor: 1.02 of the whole tensor allocated beside it
# torch 2.13.0+cpu, 4 processes
# all_gather_into_tensor: 1.00 of the whole tensor allocated beside it
# reduce_scatter_tensor: 1.02 of the whole tensor allocated beside it
