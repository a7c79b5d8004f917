#!/usr/bin/env bash
# torch 2.13: _foreach_add_ of a list and one scalar tensor reads that tensor on the host; _foreach_mul_ and _foreach_div_ do not.
#
# All three have an overload for a tensor, so one expects the same of them: a kernel that takes the value from the device.
# The call to _foreach_add_ resolves to the overload for a Python number instead, which calls item(). On a GPU that makes
# the host wait, for example in each update of step counters. A list of tensors as the second argument avoids it. The
# meta device shows it on a CPU, because nothing can be read there; the profiler shows aten::item.
#
# Seen with torch 2.13.0 on Python 3.11, Linux x86_64:
#   _foreach_add_ with a tensor: RuntimeError: Tensor.item() cannot be called on meta tensors
#   _foreach_add_ with a list: reads nothing
#   _foreach_mul_ with a tensor: reads nothing
#   _foreach_div_ with a tensor: reads nothing
#   in the profile of _foreach_add_ with a tensor: aten::_local_scalar_dense, aten::item
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
from torch.profiler import profile


def reads(what, function, second) -> bool:
    """Try the function on meta tensors; say whether it wanted a value."""
    try:
        function([torch.zeros((), device="meta")], second)
    except RuntimeError as error:
        print(f"{what}: RuntimeError: {str(error).splitlines()[0]}")
        return True
    print(f"{what}: reads nothing")
    return False


print("torch", torch.__version__)
one = torch.ones((), device="meta")
seen = [
    reads("_foreach_add_ with a tensor", torch._foreach_add_, one),
    reads("_foreach_add_ with a list", torch._foreach_add_, [one]),
    reads("_foreach_mul_ with a tensor", torch._foreach_mul_, one),
    reads("_foreach_div_ with a tensor", torch._foreach_div_, one),
]
with profile() as profiler:
    torch._foreach_add_([torch.zeros(())], torch.ones(()))
names = sorted(event.key for event in profiler.key_averages() if "item" in event.key or "local_scalar" in event.key)
print("in the profile of _foreach_add_ with a tensor:", ", ".join(names))
sys.exit(0 if seen == [True, False, False, False] and "aten::item" in names else 1)
PY
