#!/usr/bin/env bash
# mlx 0.32.4 on a CPU: logsumexp and softmax add float32 numbers one after the other, and lose a large vocabulary's tail.
#
# A model of 151,669 ids (Qwen's vocabulary) that is sure of its next token: one logit is 0, all others are -17.5. Each of
# them has a probability of 2.5e-8, less than half the distance from 1 to the next float32, so that adding it to 1 changes
# nothing; together they have 0.0038. logsumexp gives 0 where the sum is 0.0038, the probabilities of softmax add up to
# 1.0038, also with precise=True, and log-probabilities, as in mlx-lm, are too large by the same amount. With the large
# logit at the end, the same function gives 0.0038. NumPy's float32 sum, which adds in pairs, is right in both orders.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet "mlx[cpu]==0.32.4" numpy==2.4.6

cat >demo.py <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"), mx.default_device(), "numpy", version("numpy"))
logits = np.full(151_669, -17.5, np.float32)
logits[0] = 0
true = np.log(np.exp(logits.astype(np.float64)).sum())
seen = {
    "float64": true,
    "numpy, float32": np.log(np.exp(logits).sum()),
    "mx.logsumexp, the large logit first": mx.logsumexp(mx.array(logits)).item(),
    "mx.logsumexp, the large logit last": mx.logsumexp(mx.array(logits[::-1].copy())).item(),
}
for precise in (False, True):
    probs = np.array(mx.softmax(mx.array(logits), precise=precise), np.float64)
    seen[f"log of the sum of mx.softmax, precise={precise}"] = np.log(probs.sum())
for name, value in seen.items():
    print(f"{name}: {value:.5f}")
_, pairs, first, last, plain, precise = seen.values()
sys.exit(not (abs(pairs - true) < 1e-5 and first == 0 and abs(last - true) < 1e-4 and min(plain, precise) > 0.003))
PYTHON
venv/bin/python demo.py

# Output:
# mlx 0.32.4 Device(cpu, 0) numpy 2.4.6
# float64: 0.00380
# numpy, float32: 0.00380
# mx.logsumexp, the large logit first: 0.00000
# mx.logsumexp, the large logit last: 0.00380
# log of the sum of mx.softmax, precise=False: 0.00380
# log of the sum of mx.softmax, precise=True: 0.00380
