#!/usr/bin/env bash
# torch 2.13, FSDP2: a forward pass without gradients leaves the root's weights gathered, and named_parameters() lists them.
#
# fully_shard drops a block's gathered weights after its forward pass, but keeps those of the root module, because
# backward needs them at once. After a pass under no_grad, such as an evaluation or a warmup, no backward comes, so they
# stay. One expects model.parameters() to be the sharded parameters at any time between steps. An optimizer that is made
# then gets the gathered tensors: their gradients stay None after the next backward, so it trains all but the
# embeddings and the last norm, without an error, and the loss still falls. model.reshard() before making it helps.
#
# Seen with torch 2.13.0 on Python 3.11, Linux x86_64, gloo:
#   new: DTensor DTensor; after a forward pass without gradients: Parameter DTensor; after reshard(): DTensor DTensor
#   gradients of the parameters listed in between, after a step: None DTensor
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat > "$folder/root.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.root = nn.Parameter(torch.ones(4, 4))
        self.block = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.block(x @ self.root)


def kinds(tensors):
    return " ".join(type(t).__name__ if t is not None else "None" for t in tensors)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = Net()
mesh = init_device_mesh("cpu", (1,))
fully_shard(net.block, mesh=mesh)
fully_shard(net, mesh=mesh)
x = torch.ones(2, 4)
new = kinds(net.parameters())
with torch.no_grad():
    net(x)
listed = list(net.parameters())
between = kinds(listed)
net.reshard()
resharded = kinds(net.parameters())
with torch.no_grad():
    net(x)
net(x).sum().backward()
gradients = kinds(p.grad for p in listed)
dist.destroy_process_group()
print("torch", torch.__version__)
print(f"new: {new}; after a forward pass without gradients: {between}; after reshard(): {resharded}")
print(f"gradients of the parameters listed in between, after a step: {gradients}")
expected = ("DTensor DTensor", "Parameter DTensor", "DTensor DTensor", "None DTensor")
sys.exit(0 if (new, between, resharded, gradients) == expected else 1)
PY
"$folder/venv/bin/python" "$folder/root.py"
