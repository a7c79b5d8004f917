"""Byte-level BPE: split patterns, the byte alphabet, and a fast encoder where its ids are proven equal.

GPT-2's scheme (Radford et al. 2019): a pattern splits text into words, each byte of a word is written as one printable
character, and neighbors are merged, the pairs learned first before others.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

# "gpt2" is GPT-2's pattern. In "words", a word includes its accents and any one character before it ("'s", "(no" and
# "\tx" are words), and numbers are split into groups of at most three digits. They are spelled as in GPT-2's code
# and Qwen3.5's files, because ONNX Runtime GenAI finds other words for other spellings of the same.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "words": r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Other spellings, which find the same words: those of earlier versions of this program, and tiktoken's after
# `to_oniguruma`. `SAME_WORDS` maps them to those of published files, for gigatoken, GGUF files and exports.
EARLIER_GPT2_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EARLIER_WORDS_PATTERN = PATTERNS["words"].replace(r"[^\r\n\p{L}\p{N}]?", r"[^\r\n\p{L}\p{M}\p{N}]?")
TIKTOKEN_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
TIKTOKEN_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|(?>\p{N}{1,3})| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SAME_WORDS = {
    EARLIER_GPT2_PATTERN: PATTERNS["gpt2"],
    EARLIER_WORDS_PATTERN: PATTERNS["words"],
    TIKTOKEN_GPT2_PATTERN: PATTERNS["gpt2"],
    TIKTOKEN_CL100K_PATTERN: LLAMA_3_PATTERN,
}
CACHED_CHARACTERS = 2**26  # gigatoken remembers all words that it has seen, at five to nine bytes a byte
# Pre-tokenizers that can leave out text between the words, as white space.
REMOVING_SPLIT = re.compile(r'"(Removed|Whitespace|WhitespaceSplit|BertPreTokenizer|CharDelimiterSplit)"')
# Pipelines, by `fingerprint`, for which gigatoken 0.10 gives the ids of tokenizers 0.23: see runs/tokenizers/fuzz.json.
PROVEN = {
    "3becc92c3476fb9e": "GPT-2",
    "d499d04a4ad06d09": "cl100k_base",
    "3e098a419ff378ec": "o200k_base",
    "7ebcc4cb28727249": "Llama 3",
    "651d16132809d918": "Qwen",
    "4d5898a68270c35a": "Qwen 2 and 3",
    "353f1e51bddf1f8e": "GPT-4o",
    "e95100f19b246a37": "gpt-oss",
    "9a2f9ee5fba1a3f1": "Mistral (Tekken)",
    "d0de3af6d08b2834": "DeepSeek V3 and R1",
    "78cf547cbae72cf0": "Llama 2",
    "56babee90c25a749": "Gemma 3",
}
# Characters of Unicode 17, which gigatoken 0.10 knows and tokenizers 0.23 does not.
UNICODE_17 = (
    "88F C5C CDC 1ACF-1ADD 1AE0-1AEB 20C1 2B96 A7CE-A7CF A7D2 A7D4 A7F1 FBC3-FBD2 FD90-FD91 FDC8-FDCE 10940-10959 "
    "10EC5-10EC7 10ED0-10ED8 10EFA-10EFB 113C2 11B60-11B67 11DB0-11DDB 11DE0-11DE9 1611E 16D67 16EA0-16EB8 "
    "16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1CCFA-1CCFC 1CEBA-1CED0 1CEE0-1CEF0 1E6C0-1E6DE "
    "1E6E0-1E6F5 1E6FE-1E6FF 1F6D8 1F777-1F77A 1F8D0-1F8D8 1FA54-1FA57 1FA8A 1FA8E 1FAC8 1FACD 1FAEA 1FAEF 1FBFA "
    "2B73A-2B73F 2CEA2-2CEAD 323B0-33479"
)
# GPT-2's byte alphabet: a byte that Latin-1 prints is written as itself, any other as the next character from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
BYTE_DECODER = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}
BYTE_ENCODER = {byte: character for character, byte in BYTE_DECODER.items()}


def make_byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], patterns: Sequence[str], special_tokens: Sequence[str]
) -> "tokenizers.Tokenizer":
    """A byte-level tokenizer with these ids and merges, which splits text by each pattern in turn."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.BPE({**vocab}, [*merges]))
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*special_tokens])
    return inner


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


def is_lossless(content: Mapping[str, Any]) -> bool:
    """True if a tokenizer's ids hold everything that its normalizer leaves of any text.

    content: its tokenizer.json. Only byte pairs can, with an id for each byte and a split that removes nothing.
    """
    model, split = content["model"], json.dumps(content["pre_tokenizer"])
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    if REMOVING_SPLIT.search(split) and fingerprint(content) not in PROVEN:
        return False
    if '"ByteLevel"' in split:
        return BYTE_DECODER.keys() <= model["vocab"].keys()
    return model["byte_fallback"] and {f"<0x{byte:02X}>" for byte in range(256)} <= model["vocab"].keys()


def fingerprint(content: Mapping[str, Any]) -> str:
    """A hash of all in a tokenizer.json that decides how a lossless tokenizer of any vocabulary finds the ids."""
    irrelevant = ("vocab", "merges", "unk_token", "fuse_unk")
    model = {name: value for name, value in content["model"].items() if value and name not in irrelevant}
    steps = json.dumps([content["normalizer"], content["pre_tokenizer"], model], sort_keys=True)
    steps = re.sub(r'"trim_offsets": \w+, ', "", steps)
    return hashlib.sha256(steps.encode()).hexdigest()[:16]


def load_gigatoken(content: dict[str, Any]) -> Callable[[str], np.ndarray | None] | None:
    """A fast encoder of a tokenizer.json with the names of special tokens as text; None for texts it may not know.

    Returns None where gigatoken's ids are not proven to be those of tokenizers.
    """
    import gigatoken

    match content["pre_tokenizer"]:
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} as split,
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} as byte_level,
            ]
        }:
            pattern = SAME_WORDS.get(pattern, pattern)
            if pattern == PATTERNS["gpt2"]:
                content = content | {"pre_tokenizer": byte_level | {"use_regex": True}}
            else:
                steps = [split | {"pattern": {"Regex": pattern}}, byte_level]
                content = content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    added = [token for token in content["added_tokens"] if not token["special"]]
    takes_more = any(token[name] for token in added for name in ("lstrip", "rstrip", "single_word"))
    if takes_more or fingerprint(content) not in PROVEN or not is_lossless(content):
        return None
    changes_text = '"NFC"' in json.dumps(content["normalizer"])  # by other versions of Unicode in the two libraries
    if changes_text:
        content = content | {"normalizer": None}
    content = content | {"added_tokens": added, "post_processor": None}
    load = partial(gigatoken.Tokenizer.from_json, json.dumps(content))
    fast = load()
    characters = 0

    def encode(text: str) -> np.ndarray | None:
        nonlocal fast, characters
        if not text.isascii():
            is_new = unicode_17_table()[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
            if is_new.any() or (changes_text and not unicodedata.is_normalized("NFC", text)):
                return None
        characters += len(text)
        if characters > CACHED_CHARACTERS:
            fast = load()
            characters = len(text)
        return fast.encode(text)

    return encode


@cache
def unicode_17_table() -> np.ndarray:
    """A boolean for each code point: in UNICODE_17."""
    table = np.zeros(0x110000, dtype=bool)
    for span in UNICODE_17.split():
        first, _, last = span.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table
