"""Byte-level BPE: split patterns, the byte alphabet, and fast engines where they give equal ids."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# How text is cut into words, inside of which byte pairs are merged. "gpt2" is that of GPT-2; in "words" a word takes
# any one character before it along (so "'s", "(no" and "\tx" are words) and its accents, and numbers are cut in threes.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "words": r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# GPT-2's pattern as tiktoken writes it, for the same words.
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Letters and digits that Unicode 17 added: gigatoken 0.10 knows them, tiktoken 0.14 and tokenizers 0.23 do not.
UNICODE_17 = (
    *((0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED)),
    *((0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)


def portable_pattern(pattern: str) -> str:
    """A pattern of tiktoken's for Oniguruma, in whose syntax x{1,3}+ does not mean the possessive (?>x{1,3})."""
    return re.sub(r"(\\p\{\w+\}|\[(?:\\.|[^\]])*\]|\\?.)(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)


def to_tiktoken(inner: "tokenizers.Tokenizer") -> "tiktoken.Encoding | None":
    """tiktoken's form of a byte-level BPE tokenizer whose ids it is sure to give, else None.

    Both merge neighbors, the earliest-learned pair first, but tiktoken merges any two whose union is a token, the
    library only the pairs that it lists. These are the same where each token is listed once, in the order of the ids,
    and is made of its own bytes: had tiktoken merged another pair into it first, the library would be stuck there.
    """
    import tiktoken
    import tokenizers

    told = json.loads(inner.to_str())
    model, pattern = told["model"], split_pattern(told["pre_tokenizer"] or {})
    plain = {"dropout": (None, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
    if model["type"] != "BPE" or pattern is None or told["normalizer"] is not None or model.get("byte_fallback"):
        return None
    if any(model.get(name) not in values for name, values in plain.items()):
        return None
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    added = {token["content"] for token in told["added_tokens"]}
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in added}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    made = ["".join(pair) for pair in pairs]
    spelled = all(letter in byte_of for letter in set("".join(vocab)))
    listed = byte_of.keys() <= vocab.keys() and len(vocab) == 256 + len(made) and set(made) == vocab.keys() - byte_of
    if not spelled or not listed or made != sorted(made, key=vocab.__getitem__):
        return None
    bpe = tokenizers.models.BPE(vocab, [(left, right) for left, right in pairs])
    if any(len(bpe.tokenize(token)) != 1 for token in made):
        return None
    ranks = {bytes([byte_of[letter] for letter in token]): rank for token, rank in vocab.items()}
    fast = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return fast


def split_pattern(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """The pattern of a `pre_tokenizer` that `_cut_by` could have made, or the library's own of GPT-2; else None."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return PATTERNS["gpt2"]
    if len(steps) != 2 or last.get("use_regex", True) or steps[0].get("type") != "Split":
        return None
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        return None
    return split["pattern"]["Regex"]


def has_new_code_points(text: str) -> bool:
    """Whether gigatoken may take other words for a text than tiktoken does."""
    if text.isascii():
        return False
    return bool(new_code_points()[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].any())


@cache
def new_code_points() -> np.ndarray:
    """For each code point, whether it is of UNICODE_17."""
    found = np.zeros(0x110000, dtype=bool)
    for first, last in UNICODE_17:
        found[first : last + 1] = True
    return found


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2, 2019): itself where Latin-1
    prints it, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(0x100)]


def merges_of_ranks(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token, in order of rank: merging a token's bytes with only the ranks below its own
    leaves exactly the two parts that were merged last."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
