#!/usr/bin/env bash
# torch 2.13: FlopCounterMode counts addmm and addmm with out=, but nothing for addmm_, which computes the same product.
#
# The counter sees the operations that torch dispatches, so one expects all forms of a matrix product to count alike. Its
# formulas belong to the names addmm, baddbmm, mm and bmm; a call with out= has the same name and counts, one in place has
# another name (addmm_, baddbmm_) and no formula. The documentation says that unsupported operations count as zero; that
# these are among them shows nowhere, and no warning is given. A backward pass through addmm_ counts, since it is made of mm. So
# code that saves memory by adding in place, as a LoRA update may, seems to save FLOPs as well.
#
# Seen with torch 2.13.0 on Python 3.11, Linux x86_64:
#   addmm 384, addmm with out= 384, addmm_ 0, its backward 768
#   baddbmm 768, baddbmm_ 0
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


print("torch", torch.__version__)
y, a, b = torch.zeros(8, 6), torch.zeros(8, 4, requires_grad=True), torch.zeros(4, 6, requires_grad=True)
A, B = a.detach(), b.detach()
result = torch.zeros(8, 6).addmm_(a, b)
single = [
    count(lambda: torch.addmm(y, A, B)),
    count(lambda: torch.addmm(y, A, B, out=y)),
    count(lambda: y.addmm_(A, B)),
    count(lambda: result.sum().backward()),
]
Y, A, B = torch.zeros(2, 8, 6), torch.zeros(2, 8, 4), torch.zeros(2, 4, 6)
batch = [count(lambda: torch.baddbmm(Y, A, B)), count(lambda: Y.baddbmm_(A, B))]
print("addmm {}, addmm with out= {}, addmm_ {}, its backward {}".format(*single))
print("baddbmm {}, baddbmm_ {}".format(*batch))
sys.exit(0 if single == [384, 384, 0, 768] and batch == [768, 0] else 1)
PY
