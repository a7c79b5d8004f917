#!/usr/bin/env bash
# onnxruntime-extensions 0.15.2: how text is split depends on the name of a Python class, not on tokenizer.json alone.
#
# It reads tokenizer.json, whose pre_tokenizer says how text is split, and tokenizer_config.json, whose tokenizer_class
# names a class of transformers. Here tokenizer.json has byte-level BPE with GPT-2's split, by ByteLevel and without
# a Split pattern. With GPT2Tokenizer as the class, the tokens are those of the library tokenizers, which reads
# tokenizer.json alone. With LlamaTokenizerFast and the same tokenizer.json, the number is cut into groups of three
# digits, as Llama 3 does. onnxruntime-genai encodes prompts with this library.
#
# Not part of this script: by the library's source, the class has no effect if tokenizer.json has a Split pattern, as
# that of DeepSeek-V3 has, whose class is LlamaTokenizerFast too (see onnxruntime_split_drops_text.sh).
#
# Seen for "1234": tokenizers ['1234'], GPT2Tokenizer ['1234'], LlamaTokenizerFast ['123', '4'].
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet onnxruntime-extensions==0.15.2 tokenizers==0.23.3 numpy==2.4.6

cat >demo.py <<'PYTHON'
import json
import os
import sys
from importlib.metadata import version

from onnxruntime_extensions import pp_api
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

print(*(f"{name} {version(name)}" for name in ("onnxruntime-extensions", "tokenizers")))
symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["12", "123", "1234", "<end>"]
vocab = {symbol: i for i, symbol in enumerate(symbols)}
inner = Tokenizer(models.BPE(vocab, [("1", "2"), ("12", "3"), ("123", "4")]))
inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
inner.decoder = decoders.ByteLevel()
inner.add_special_tokens(["<end>"])

TEXT = "1234"
seen = {"tokenizers": inner.encode(TEXT).tokens}
for name in ("GPT2Tokenizer", "LlamaTokenizerFast"):
    os.mkdir(name)
    inner.save(f"{name}/tokenizer.json")
    settings = {"tokenizer_class": name, "eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"}
    with open(f"{name}/tokenizer_config.json", "w") as file:
        json.dump(settings, file)
    seen[name] = [symbols[i] for i in pp_api.Tokenizer(name).tokenize(TEXT)]
for name, words in seen.items():
    print(f"{name:20}", words)
sys.exit([*seen.values()] != [["1234"], ["1234"], ["123", "4"]])
PYTHON
venv/bin/python demo.py
