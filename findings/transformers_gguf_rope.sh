#!/usr/bin/env bash
# transformers 5.23.0: a Llama 3.1 read from a GGUF file loses its rotary scaling, without a warning.
#
# llama.cpp's converter writes Llama 3.1's rope_scaling (type llama3) as a tensor, rope_freqs.weight: a divisor of each
# rotary frequency. from_pretrained(folder, gguf_file=…) drops it as a tensor that no parameter has: the model rotates
# as Llama 3.0 does, near enough on short texts and wrong on long ones. Here a small model with random weights is written
# by the package gguf, tensor by tensor as the converter does, and read back. Its logits are those of the same weights
# without scaling, and far from those of the model that was written.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6

cat >demo.py <<'PYTHON'
import sys
from importlib.metadata import version

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 100, "max_position_embeddings": 512}

torch.manual_seed(0)
scaled = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=SCALED)).eval()
for parameter in scaled.parameters():
    parameter.data += torch.randn_like(parameter) * 0.1
plain = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=PLAIN)).eval()
plain.load_state_dict(scaled.state_dict())

writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_block_count(2)
writer.add_context_length(512)
writer.add_embedding_length(64)
writer.add_feed_forward_length(128)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(scaled.config.rms_norm_eps)
writer.add_rope_freq_base(1e4)
writer.add_rope_dimension_count(16)
writer.add_vocab_size(100)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
for name, tensor in scaled.state_dict().items():
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        tensor = tensor.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
divisors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
writer.add_tensor("rope_freqs.weight", divisors.numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
ids = torch.arange(512).view(1, 512) * 7 % 100
with torch.no_grad():
    logits = [model(ids).logits for model in (read, scaled, plain)]
from_written = (logits[0] - logits[1]).abs().max().item()
from_plain = (logits[0] - logits[2]).abs().max().item()
print("transformers", version("transformers"), "gguf", version("gguf"), "torch", version("torch"))
print("divisors in the file:", [round(divisor, 2) for divisor in divisors.tolist()])
print("rope_parameters as read:", read.config.rope_parameters)
print(f"largest difference of a logit from the model that was written: {from_written:.2f}")
print(f"largest difference of a logit from the same weights without scaling: {from_plain:.6f}")
sys.exit(not (from_written > 0.1 and from_plain < 1e-4))
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output:
# transformers 5.23.0 gguf 0.19.0 torch 2.13.0+cpu
# divisors in the file: [1.0, 1.29, 7.67, 8.0, 8.0, 8.0, 8.0, 8.0]
# rope_parameters as read: {'rope_theta': 10000.0, 'rope_type': 'default'}
# largest difference of a logit from the model that was written: 2.85
# largest difference of a logit from the same weights without scaling: 0.000000
