#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): where a GGUF file states no end token, token 11 ends every text.
#
# tokenizer.ggml.eos_token_id is optional, and a model may have no end token. For a tokenizer of kind "gpt2" llama.cpp
# then takes id 11, the end token of Falcon, whatever token that is (for kind "llama" it is id 2): the text stops right
# after it, finish reason "stop". No id means "none": one beyond the vocabulary is replaced by 11, too. Here the network
# is an identity whose output layer is shifted by one, so that each letter is followed by the next one: after "a" the
# text should go on to "z".
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6

cat >demo.py <<'PYTHON'
import string
import sys
from importlib.metadata import version

import gguf
import numpy as np
import xllamacpp

TOKENS = [*string.ascii_lowercase, "ab", "!"]
V, C = len(TOKENS), 32


def write(path: str, end_id: int | None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(C)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * V)
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(False)
    if end_id is not None:
        writer.add_eos_token_id(end_id)
    one_hot = np.eye(V, C, dtype=np.float32)
    writer.add_tensor("token_embd.weight", one_hot)
    writer.add_tensor("output.weight", np.roll(one_hot, -1, axis=1))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(C, dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((C, C), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def generate(path: str) -> tuple[str, str]:
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 64
    params.cpuparams.n_threads = 1
    params.warmup = False
    answer = xllamacpp.Server(params).handle_completions({"prompt": [0], "max_tokens": 25, "temperature": 0})
    return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]


print("xllamacpp", version("xllamacpp"), "gguf", version("gguf"))
seen = {}
for name, end_id in (("no end token", None), ("end token 27", 27), ("end token 1000", 1000)):
    write("model.gguf", end_id)
    seen[name] = generate("model.gguf")
    print(f"{name}: {seen[name]}")
alphabet = string.ascii_lowercase
stopped = (alphabet[1:12], "stop")
sys.exit(not (seen["no end token"] == seen["end token 1000"] == stopped and seen["end token 27"][0] == alphabet[1:]))
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output:
# xllamacpp 2026.10.11549 gguf 0.19.0
# no end token: ('bcdefghijkl', 'stop')
# end token 27: ('bcdefghijklmnopqrstuvwxyz', 'length')
# end token 1000: ('bcdefghijkl', 'stop')
