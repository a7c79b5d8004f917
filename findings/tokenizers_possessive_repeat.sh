#!/usr/bin/env bash
# tokenizers 0.23.3 and tiktoken 0.14.0: a count followed by +, as in the pattern of cl100k_base, means two things.
#
# cl100k_base's pattern has \p{N}{1,3}+ for "one to three digits, without backtracking", and tiktoken's engine reads it
# so. The engine of tokenizers, Oniguruma, takes + after {1,3} for a second quantifier, "once or more often": a number
# of any length is one word instead of groups of three digits. So a pattern copied from tiktoken into a tokenizer.json
# splits numbers of four digits and more differently, without an error, and can give them other ids.
# (?>\p{N}{1,3}) means the same in both.
#
# Seen for "1234567":
#   \p{N}{1,3}       tiktoken 123, 456, 7  tokenizers 123, 456, 7
#   \p{N}{1,3}+      tiktoken 123, 456, 7  tokenizers 1234567
#   (?>\p{N}{1,3})   tiktoken 123, 456, 7  tokenizers 123, 456, 7
#
# Exits with 0 while this is so, with 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3 tiktoken==0.14.0

cat >demo.py <<'PYTHON'
import sys
from importlib.metadata import version

import tiktoken
from tokenizers import Regex, pre_tokenizers

print(*(f"{name} {version(name)}" for name in ("tokenizers", "tiktoken")))
TEXT = "1234567"
RANKS = {bytes([byte]): byte for byte in range(256)}  # and every beginning of a group, so that a word is one token
for i in range(len(TEXT)):
    for j in range(i + 2, len(TEXT) + 1):
        RANKS.setdefault(TEXT[i:j].encode(), len(RANKS))


def words_of_both(pattern):
    encoding = tiktoken.Encoding("demo", pat_str=pattern, mergeable_ranks=RANKS, special_tokens={})
    theirs = [encoding.decode([token]) for token in encoding.encode(TEXT)]
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return theirs, [word for word, _ in split.pre_tokenize_str(TEXT)]


seen = {}
for pattern in (r"\p{N}{1,3}", r"\p{N}{1,3}+", r"(?>\p{N}{1,3})"):
    seen[pattern] = words_of_both(pattern)
    print(f"{pattern:16} tiktoken {seen[pattern][0]}  tokenizers {seen[pattern][1]}")
GROUPS = ["123", "456", "7"]
expected = [(GROUPS, GROUPS), (GROUPS, [TEXT]), (GROUPS, GROUPS)]
sys.exit([*seen.values()] != expected)
PYTHON
venv/bin/python demo.py
