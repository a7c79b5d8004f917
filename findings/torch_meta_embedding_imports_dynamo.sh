#!/usr/bin/env bash
# torch 2.13: creating an nn.Embedding on the meta device imports torch's compiler, which takes about a second.
#
# Building a model under torch.device("meta") is the usual way to load weights without allocating or initializing
# anything, so one expects it to cost nothing. nn.Linear does: its uniform_ has no such effect. nn.Embedding calls
# normal_, which on a meta tensor goes through a Python decomposition that imports torch._dynamo. Wrapping an
# uninitialized tensor with nn.Embedding.from_pretrained avoids it.
#
# Seen with torch 2.13.0 on Python 3.11, Linux x86_64:
#   linear: torch._dynamo imported: False
#   embedding from_pretrained: torch._dynamo imported: False
#   embedding: torch._dynamo imported: True
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys
import time

import torch
from torch import nn


def report(what: str) -> bool:
    is_imported = "torch._dynamo" in sys.modules
    print(f"{what}: torch._dynamo imported: {is_imported}")
    return is_imported


print("torch", torch.__version__)
with torch.device("meta"):
    nn.Linear(8, 8)
    after_linear = report("linear")
    nn.Embedding.from_pretrained(torch.empty(8, 8), freeze=False)
    after_wrapped = report("embedding from_pretrained")
    start = time.perf_counter()
    nn.Embedding(8, 8)
    seconds = time.perf_counter() - start
    after_embedding = report("embedding")
print(f"nn.Embedding(8, 8) on meta took {seconds:.2f} s")
sys.exit(0 if (after_linear, after_wrapped, after_embedding) == (False, False, True) else 1)
PY
