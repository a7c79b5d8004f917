"""Byte-level BPE: split patterns, the byte alphabet, and fast encoders that give equal ids.

GPT-2's scheme (Radford et al. 2019): a pattern splits text into words, each byte of a word is written as one printable
character, and neighbors are merged, the pairs learned first before others.
"""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

# "gpt2" is GPT-2's pattern. In "words", a word includes its accents and any one character before it ("'s", "(no" and
# "\tx" are words), and numbers are split into groups of at most three digits.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "words": r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# GPT-2's pattern as tiktoken writes it; it finds the same words.
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Letters and digits added in Unicode 17: gigatoken 0.10 knows them, tiktoken 0.14 and tokenizers 0.23 do not.
UNICODE_17 = (
    "88F C5C CDC A7CE-A7CF A7D2 A7D4 A7F1 10940-10959 10EC5-10EC7 11DB0-11DDB 11DE0-11DE9 16EA0-16EB8 16EBB-16ED3 "
    "16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE 1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED 1E6F0-1E6F4 "
    "1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479"
)
# GPT-2's byte alphabet: a byte that Latin-1 prints is written as itself, any other as the next character from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
BYTE_DECODER = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}
BYTE_ENCODER = {byte: character for character, byte in BYTE_DECODER.items()}


def make_pre_tokenizer(pattern: str | None) -> "tokenizers.pre_tokenizers.PreTokenizer":
    """Split text by `pattern` (None: not at all) and write its bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])


def find_split_pattern(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The pattern of a pre-tokenizer (as JSON) like `make_pre_tokenizer`'s or GPT-2's; None for any other."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return PATTERNS["gpt2"]
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    return None


def to_oniguruma(pattern: str) -> str:
    """A pattern of tiktoken's for Oniguruma, in which x{1,3}+ does not mean the possessive (?>x{1,3})."""
    return re.sub(r"(\\p\{\w+\}|\[(?:\\.|[^\]])*\]|\\?.)(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)


def recover_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token, in order of rank.

    Merging a token's bytes with only the ranks below its own leaves exactly the two parts that were merged last.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def to_tiktoken(tokenizer: "tokenizers.Tokenizer") -> "tiktoken.Encoding | None":
    """The tiktoken encoding of a byte-level BPE tokenizer, if it surely gives the same ids; else None.

    Both merge the earliest-learned pair first, but tiktoken merges any two neighbors whose union is a token, tokenizers
    only the pairs in its list. They agree if each token has one merge, listed in the order of the ids, and is what the
    merges make of its own bytes: had tiktoken built it from another pair, tokenizers could not build it at all.
    """
    import tiktoken
    import tokenizers

    content = json.loads(tokenizer.to_str())
    model = content["model"]
    pattern = find_split_pattern(content["pre_tokenizer"])
    if model["type"] != "BPE" or pattern is None or content["normalizer"] is not None:
        return None
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if any(model.get(option) for option in options):
        return None

    vocab = _without_added_tokens(content)
    if not set("".join(vocab)) <= BYTE_DECODER.keys() <= vocab.keys():
        return None

    merges = [(left, right) for left, right in model["merges"]]
    merged = [left + right for left, right in merges]
    if len(merged) != len(vocab) - 256 or set(merged) != vocab.keys() - BYTE_DECODER.keys():
        return None
    if merged != sorted(merged, key=vocab.__getitem__):
        return None
    bpe = tokenizers.models.BPE(vocab, merges)
    if any(len(bpe.tokenize(token)) != 1 for token in merged):
        return None

    ranks = {bytes(BYTE_DECODER[character] for character in token): rank for token, rank in vocab.items()}
    return tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def to_gigatoken(tokenizer: "tokenizers.Tokenizer") -> Any:
    """gigatoken's encoder of a tokenizer that `to_tiktoken` accepts: same ids, 40 times as fast.

    None if it is not installed or the pattern is not GPT-2's. Not for texts that `has_unicode_17`.
    """
    content = json.loads(tokenizer.to_str())
    if find_split_pattern(content["pre_tokenizer"]) not in (PATTERNS["gpt2"], TIKTOKEN_GPT2_PATTERN):
        return None
    try:
        import gigatoken
    except ImportError:
        return None

    content["model"]["vocab"] = _without_added_tokens(content)
    content["added_tokens"] = []
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["pre_tokenizer"] = byte_level
    return gigatoken.Tokenizer.from_json(json.dumps(content))


def _without_added_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    added = {token["content"] for token in content["added_tokens"]}
    return {token: rank for token, rank in content["model"]["vocab"].items() if token not in added}


def has_unicode_17(text: str) -> bool:
    """True if `text` has characters that gigatoken and tiktoken classify differently."""
    if text.isascii():
        return False
    return bool(unicode_17_table()[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].any())


@cache
def unicode_17_table() -> np.ndarray:
    """A boolean for each code point: in UNICODE_17."""
    table = np.zeros(0x110000, dtype=bool)
    for span in UNICODE_17.split():
        first, _, last = span.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table
