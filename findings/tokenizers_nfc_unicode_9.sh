#!/usr/bin/env bash
# tokenizers 0.23.3: its NFC normalizer has the combining classes of Unicode 9 (2016), its split patterns Unicode 16.
#
# NFC sorts the marks after a letter by their combining class. Marks that were added since Unicode 10, such as U+0D3B
# (Malayalam), are starters for this normalizer: they stay where they are, and nothing is sorted across them. So a model
# whose tokenizer normalizes (Qwen's) has other ids for such text than a tokenizer that follows the standard of today, or
# than the same tokenizer for text that Python has normalized before. Words with these marks are split by their
# category, which the library does know.
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3

cat >demo.py <<'PYTHON'
import sys
import unicodedata
from importlib.metadata import version

from tokenizers import Regex, normalizers, pre_tokenizers

print("tokenizers", version("tokenizers"), "Python's Unicode", unicodedata.unidata_version)
nfc = normalizers.NFC()
differ = []
for mark in map(chr, range(0x300, 0x11000)):
    if unicodedata.combining(mark):
        text = f"a{mark}\u0334\u0301"  # U+0334 has class 1 and U+0301 class 230
        if nfc.normalize_str(text) != unicodedata.normalize("NFC", text):
            differ.append(f"U+{ord(mark):04X}")
print(len(differ), "marks:", *differ[:12], "…")
split = pre_tokenizers.Split(Regex(r"\p{M}+"), behavior="isolated").pre_tokenize_str("a\u0d3bb")
print("split at marks:", ascii([word for word, _ in split]))
sys.exit("U+0D3B" not in differ or "U+0859" in differ or len(split) != 3)
PYTHON
venv/bin/python demo.py
