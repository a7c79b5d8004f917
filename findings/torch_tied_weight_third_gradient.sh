#!/usr/bin/env bash
# torch 2.13.0, CPU: backward through tied embeddings holds three matrices of the weight's size in float32, two in autocast.
#
# The gradients of a tied matrix's two uses are added before they reach .grad. One would expect that in place. But with
# F.linear in float32 the sum is a third matrix: 154 MB more for GPT-2 (124M), 622 MB for Qwen3-0.6B, at the very end of
# backward. Under autocast, where the layer's gradient passes through a cast, the sum is made in place. So a plan of memory
# that fits float32 is a whole matrix too high for bfloat16. Written as (weight @ x.T).T, float32 takes two as well.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.3.5

cat >demo.py <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile


def held(logits, autocast):
    """The most that backward holds beside the weight and its .grad, in sizes of the weight."""
    weight = torch.nn.Parameter(torch.randn(20_000, 64))
    weight.grad = torch.zeros_like(weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = logits(F.embedding(torch.arange(8), weight), weight).sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss.backward()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / weight.nbytes


print("torch", torch.__version__)
found = []
for name, logits in (("F.linear(x, weight)", F.linear), ("(weight @ x.T).T", lambda x, weight: (weight @ x.T).T)):
    for autocast in (False, True):
        found.append(held(logits, autocast))
        print(f"{name}, {'bfloat16 autocast' if autocast else 'float32'}: {found[-1]:.2f} matrices")
sys.exit([round(each, 1) for each in found] != [3.0, 2.0, 2.0, 2.0])
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output:
# torch 2.13.0+cpu
# F.linear(x, weight), float32: 3.00 matrices
# F.linear(x, weight), bfloat16 autocast: 2.00 matrices
# (weight @ x.T).T, float32: 2.00 matrices
# (weight @ x.T).T, bfloat16 autocast: 2.00 matrices
