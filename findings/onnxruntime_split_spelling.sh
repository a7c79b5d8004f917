#!/usr/bin/env bash
# onnxruntime-extensions 0.15.2: words depend on how a Split's regular expression is spelled, not on what it matches.
#
# A Split pattern of tokenizer.json is a regular expression. Three spellings of GPT-2's are compared here, which match
# the same text: that of OpenAI's code; the same with two of the contractions in another order, which cannot matter,
# since they begin with different letters; and the group in which tiktoken writes them. tokenizers finds "'s" in
# "it's" by each. onnxruntime-extensions finds it by the first alone. By the other two it takes "'" and "s" apart,
# without an error, so the model gets other ids. onnxruntime-genai encodes prompts with this library.
#
# Seen for "it's": tokenizers ['it', "'s"] three times; the other ['it', "'s"], then ['it', "'", 's'] twice.
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
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

print(*(f"{name} {version(name)}" for name in ("onnxruntime-extensions", "tokenizers")))
symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["it", "'s", "<end>"]
vocab = {symbol: i for i, symbol in enumerate(symbols)}
REST = r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "OpenAI's": r"'s|'t|'re|'ve|'m|'ll|'d" + REST,
    "reordered": r"'s|'t|'re|'ve|'m|'d|'ll" + REST,
    "grouped": r"'(?:[sdmt]|ll|ve|re)" + REST,
}
TEXT = "it's"
seen = []
for name, pattern in PATTERNS.items():
    inner = Tokenizer(models.BPE(vocab, [("i", "t"), ("'", "s")]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    os.mkdir(name)
    inner.save(f"{name}/tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {f"{kind}_token": "<end>" for kind in ("eos", "bos", "unk")}
    with open(f"{name}/tokenizer_config.json", "w") as file:
        json.dump(settings, file)
    seen.append((inner.encode(TEXT).tokens, [symbols[i] for i in pp_api.Tokenizer(name).tokenize(TEXT)]))
    print(f"{name:10}", *seen[-1])
whole, apart = ["it", "'s"], ["it", "'", "s"]
sys.exit(seen != [(whole, whole), (whole, apart), (whole, apart)])
PYTHON
venv/bin/python demo.py
