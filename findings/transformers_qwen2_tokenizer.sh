#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer replaces the pre-tokenizer in a Qwen2 folder's tokenizer.json, without a warning.
#
# A folder holds tokenizer.json, whose every character is a token, and a config.json. tokenizer_config.json names
# PreTrainedTokenizerFast, the class that takes tokenizer.json as it is. With model_type "qwen3" AutoTokenizer does so.
# With "qwen2" it loads Qwen2Tokenizer instead, which keeps the vocabulary and splits by Qwen2's own expression:
# the spaces are gone from the ids. PreTrainedTokenizerFast.from_pretrained reads the same folder rightly.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 tokenizers==0.23.3

cat >demo.py <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "to be or not"
inner = Tokenizer(models.WordLevel({character: i for i, character in enumerate(sorted(set(TEXT)))}))
inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
inner.decoder = decoders.Fuse()

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
seen = {}
for model_type in ("qwen3", "qwen2"):
    folder = Path(model_type)
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = reader.from_pretrained(folder)
        seen[model_type, reader] = len(tokenizer(TEXT)["input_ids"])
        print(f"{model_type}, {reader.__name__}: {type(tokenizer).__name__}, {seen[model_type, reader]} ids")
right = [seen["qwen3", AutoTokenizer], seen["qwen3", PreTrainedTokenizerFast], seen["qwen2", PreTrainedTokenizerFast]]
sys.exit(not (right == [len(TEXT)] * 3 and seen["qwen2", AutoTokenizer] == len(TEXT.replace(" ", ""))))
PYTHON
venv/bin/python demo.py 2>/dev/null

# Output (PreTrainedTokenizerFast is another name of TokenizersBackend):
# transformers 5.23.0 tokenizers 0.23.3
# qwen3, AutoTokenizer: TokenizersBackend, 12 ids
# qwen3, TokenizersBackend: TokenizersBackend, 12 ids
# qwen2, AutoTokenizer: Qwen2Tokenizer, 9 ids
# qwen2, TokenizersBackend: TokenizersBackend, 12 ids
