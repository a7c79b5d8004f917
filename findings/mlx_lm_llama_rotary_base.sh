#!/usr/bin/env bash
# mlx-lm 0.32.2: a Llama model that transformers 5 saved is computed with the rotary base 10,000, whatever it states.
#
# transformers 5 writes the rotary settings into `rope_parameters` alone. mlx-lm's Qwen3 reads them there, and refuses a
# config.json that states no base. Its Llama reads `rope_theta` and `rope_scaling` at the top level alone, where
# transformers 4 had them, and takes 10,000 without a warning. Llama 3's base is 500,000: fine-tuned and saved with
# transformers 5, it is another network in mlx-lm. With `rope_theta` at the top level too, both compute the same.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2

cat >demo.py <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

print(*(f"{name} {version(name)}" for name in ("transformers", "mlx-lm", "mlx")))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 16}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
ROPE = {"rope_theta": 500_000.0, "rope_type": "default"}


def difference(model, folder):
    """The largest difference of a logit between transformers and mlx-lm."""
    with torch.no_grad():
        expected = model(torch.arange(40)[None]).logits.numpy()
    loaded, _ = load_model(Path(folder))
    return float(np.abs(np.array(loaded(mx.arange(40)[None])) - expected).max())


differences = {}
for config_class, model_class in ((Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)):
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, rope_parameters=ROPE)).eval()
    name = model.config.model_type
    model.save_pretrained(name)
    differences[name] = difference(model, name)
path = Path("llama/config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500_000.0}))
differences["llama, rope_theta at the top level too"] = difference(model, "llama")
for name, value in differences.items():
    print(f"{name}: largest difference of a logit {value:.1e}")
qwen3, llama, both = differences.values()
sys.exit(not (qwen3 < 1e-3 and both < 1e-3 and llama > 0.1))
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output:
# transformers 5.23.0 mlx-lm 0.32.2 mlx 0.32.4
# qwen3: largest difference of a logit 9.4e-06
# llama: largest difference of a logit 7.1e+00
# llama, rope_theta at the top level too: largest difference of a logit 8.5e-06
