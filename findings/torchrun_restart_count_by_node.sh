#!/usr/bin/env bash
# torch 2.13: TORCHELASTIC_RESTART_COUNT differs between the nodes of one start of a job.
#
# torchrun gives each process the number of restarts of its worker group. One expects it to be equal on all nodes, and fit
# to separate the keys of one start from those of the start before in the store that torchrun keeps across restarts. But
# each agent counts only the failures of its own processes: the others restart theirs because a node joins again, which
# does not count. After a process of the second of two nodes has failed once, the same start is 0 on one node and 1 on
# the other. A prefix of it makes the ranks wait for each other under different keys.
#
# Seen with torch 2.13.0 on Python 3.11, Linux x86_64 (which node has which rank depends on the order of their names):
#   first start:  the failing node 0, the other node 0
#   second start: the failing node 1, the other node 0
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > worker.py <<'PY'
import os
import sys
import time
from pathlib import Path

node = os.environ["NODE"]
count = os.environ["TORCHELASTIC_RESTART_COUNT"]
starts = Path(f"starts-{node}")
with starts.open("a") as file:
    file.write(f"{count}\n")
time.sleep(3)
if node == "failing" and len(starts.read_text().split()) == 1:
    sys.exit(1)
time.sleep(10)  # until the other agent has noticed
PY
launch() {
  NODE=$1 "$folder/venv/bin/python" -m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=2 \
    --rdzv_backend=c10d --rdzv_id=job --rdzv_endpoint=127.0.0.1:29871 --local_addr=127.0.0.1 worker.py
}
launch other 2> other.log &
sleep 2
launch failing 2> failing.log
wait
"$folder/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import torch

print("torch", torch.__version__)
failing, other = (Path(f"starts-{node}").read_text().split() for node in ("failing", "other"))
for name, a, b in zip(("first", "second"), failing, other):
    print(f"{name} start: the failing node {a}, the other node {b}")
sys.exit(0 if (failing, other) == (["0", "1"], ["0", "0"]) else 1)
PY
