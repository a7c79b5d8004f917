"""Tokenizers as GGUF states them, read into ours and written from ours.

A file holds tokens with types, and merges or scores, but of the expression that splits text into words only its name,
`tokenizer.ggml.pre`. `SPLITS` has what llama.cpp does by each name; a tokenizer that is none of these is refused.

llama.cpp knows two kinds that we need. "gpt2" is byte-level BPE. "llama" is SentencePiece's BPE, which merges the two
neighbors whose union has the highest score, and spells what has no token in bytes. Our characters are of kind "gpt2"
without merges, as tokens that are found before anything else.

Where no token ends a text, llama.cpp takes id 11 (kind "gpt2") or 2 for one. So the file gets one extra token at the
end. Its row of the output layer is the mean of the others: its logit is their mean, and so never the largest.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nanogpt.errors import InputError, first_line
from nanogpt.schema import Count, matches
from nanogpt.text.fast_bpe import LLAMA_3_PATTERN, PATTERNS, SAME_WORDS, make_byte_level_bpe
from nanogpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
ADDED_END = "<|endoftext|>\ufdd4"  # a noncharacter, so that no text has it
NO_MERGES = ["a Ġ"]  # llama.cpp wants one at least; no word of "gpt-2" has a space after a letter
NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
NEVER_MERGED = -1e9  # the score of tokens that no merge makes, as SentencePiece has it
SPACE = "\u2581"  # SentencePiece's spelling of a space

GPT2_SPLIT = PATTERNS["gpt2"]
QWEN2_SPLIT = LLAMA_3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """A pre-tokenizer of llama.cpp."""

    patterns: list[str]  # applied one after the other
    ignore_merges: bool = False  # a word that is a token becomes it, whatever its merges would make
    nfc: bool = False  # the models of this name were trained on text in NFC, which llama.cpp leaves as it is
    is_exact: bool = True  # False: llama.cpp splits some text otherwise; then it is read, but never written


SPLITS = {
    "gpt-2": Split([GPT2_SPLIT]),
    "smollm": Split([r"\p{N}", GPT2_SPLIT]),
    "starcoder": Split([r"\p{N}", GPT2_SPLIT]),
    "llama-bpe": Split([LLAMA_3_PATTERN], ignore_merges=True),
    "smaug-bpe": Split([LLAMA_3_PATTERN]),
    "qwen2": Split([QWEN2_SPLIT], nfc=True),
    "deepseek-r1-qwen": Split([QWEN2_SPLIT], nfc=True),
    "stablelm2": Split([QWEN2_SPLIT]),
    "gpt-4o": Split([GPT4O_SPLIT], is_exact=False),
    "default": Split([r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"]),
}


def has_added_end(settings: dict[str, Any]) -> bool:
    """True if the last token is one that `to_settings` added to a tokenizer without an end token."""
    last = len(settings.get("tokens") or []) - 1
    return last >= 0 and settings.get("suppress_tokens") == [last] and settings["tokens"][last] == ADDED_END


def to_tokenizer(source: str, settings: dict[str, Any]) -> Tokenizer:
    """A tokenizer from a file's settings under `tokenizer.ggml.`, without the token of `has_added_end`.

    Raises InputError for one of an unknown kind, and for one whose settings do not fit each other.
    """
    kind = settings.get("model")
    split = str(settings.get("pre") or "default")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{source}: its tokenizer is of kind {kind!r}, which is not supported; use another model")
    if kind == "gpt2" and split not in SPLITS:
        raise InputError(f"{source}: pre-tokenizer {split!r} is not supported, only {', '.join(SPLITS)}")
    try:
        tokens: list[str] = settings["tokens"]
        if len(set(tokens)) < len(tokens):
            raise ValueError("a token twice")
        types = settings.get("token_type") or [NORMAL] * len(tokens)
        if has_added_end(settings):
            tokens, types = tokens[:-1], types[:-1]
        vocab = {
            token: i for i, (token, token_type) in enumerate(zip(tokens, types, strict=True)) if token_type != UNUSED
        }
        if all(len(token) == 1 and types[i] == USER_DEFINED for token, i in vocab.items()):
            return Tokenizer.from_characters(vocab)
        if kind == "gpt2":
            inner = _byte_level(vocab, settings.get("merges") or [], SPLITS[split])
        else:
            inner = _sentencepiece(vocab, types, settings)
        tokenizer = Tokenizer(_add_tokens(inner, tokens, types))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{source}: its tokenizer is damaged ({first_line(error)}); use another file") from error

    ids: dict[str, Any] = {name: settings.get(f"{key}_token_id") for name, key in NAMED_TOKENS.items()}
    named = {name: tokens[i] for name, i in ids.items() if matches(i, Count) and i < len(tokens)}
    for name in ("unk_token", "pad_token"):  # for which some files name an ordinary token, such as "!"
        if name in named and types[ids[name]] == NORMAL:
            del named[name]
    if named:
        tokenizer.name_tokens(named)
    return tokenizer


def _byte_level(vocab: dict[str, int], merges: list[str], split: Split) -> "tokenizers.Tokenizer":
    from tokenizers import normalizers

    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges) if left + right in vocab]
    inner = make_byte_level_bpe(vocab, pairs, split.patterns if pairs else [], [])  # else single bytes, however split
    inner.model.ignore_merges = split.ignore_merges
    if split.nfc:
        inner.normalizer = normalizers.NFC()
    return inner


def _sentencepiece(vocab: dict[str, int], types: list[int], settings: dict[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = recover_merges({token: settings["scores"][i] for token, i in vocab.items() if types[i] == NORMAL})
    unknown = next((token for token, i in vocab.items() if types[i] == UNKNOWN), None)
    inner = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.get("add_space_prefix", True):
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        inner.normalizer = normalizers.Replace(" ", SPACE)
    inner.decoder = decoders.Sequence(steps)
    return inner


def recover_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, those of the highest score first."""
    merges = []
    for token, score in scores.items():
        cuts = range(len(token) - 1, 0, -1)
        merges += [(-score, token[:cut], token[cut:]) for cut in cuts if {token[:cut], token[cut:]} <= scores.keys()]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add_tokens(inner: "tokenizers.Tokenizer", tokens: list[str], types: list[int]) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken

    by_type: dict[int, list[AddedToken]] = {CONTROL: [], UNKNOWN: [], USER_DEFINED: []}
    for token, kind in zip(tokens, types, strict=True):
        if kind in by_type:
            by_type[kind].append(AddedToken(token, normalized=False))
    inner.add_special_tokens(by_type[CONTROL] + by_type[UNKNOWN])
    inner.add_tokens(by_type[USER_DEFINED])
    return inner


def to_settings(tokenizer: Tokenizer, num_rows: int, end_ids: Sequence[int]) -> dict[str, Any]:
    """A tokenizer as settings under `tokenizer.ggml.`, with a token for each row of the model.

    end_ids: those that end a text, first the eos_token; without any, one more token ends it. Raises InputError for a
    tokenizer of which llama.cpp has no equal.
    """
    content = tokenizer.to_json()
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    tokens = [f"[PAD{i}]" for i in range(num_rows)]
    types = [UNUSED] * num_rows
    for token, i in tokenizer.vocab.items():
        if i < num_rows:  # special tokens may lack a row
            tokens[i] = token
            types[i] = NORMAL
            if i in added:
                types[i] = CONTROL if added[i]["special"] else USER_DEFINED
    if any(token[option] for token in added.values() for option in ("lstrip", "rstrip", "single_word")):
        raise _refusal("has tokens that take the spaces beside them, too")
    if "\0" in tokens:
        raise _refusal("has the character NUL, with which strings end there")

    if tokenizer.name == "char":
        types = [USER_DEFINED if kind == NORMAL else kind for kind in types]
        settings: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "merges": NO_MERGES}
    elif model["type"] == "BPE" and not model["byte_fallback"]:
        merges = [" ".join(merge) for merge in model["merges"]]
        settings = {"model": "gpt2", "pre": _find_split(content), "merges": merges or NO_MERGES}
    else:
        settings = _sentencepiece_settings(content, tokens, types)

    named = {f"{key}_token_id": tokenizer.named_id(name) for name, key in NAMED_TOKENS.items()}
    settings |= {key: i for key, i in named.items() if i is not None and i < num_rows}
    if not end_ids:
        tokens.append(ADDED_END)
        types.append(CONTROL)
        settings["suppress_tokens"] = [num_rows]
        settings["bos_token_id"] = num_rows
        end_ids = [num_rows]
    settings |= {f"{end}_token_id": token_id for end, token_id in zip(("eos", "eot", "eom"), end_ids, strict=False)}
    return settings | {"tokens": tokens, "token_type": types, "add_bos_token": False}


def _find_split(content: dict[str, Any]) -> str:
    """The name of the pre-tokenizer that a byte-level tokenizer.json has. Raises InputError if there is none."""
    model, normalizer = content["model"], content["normalizer"]
    patterns: list[str] = []
    pre_tokenizer = content["pre_tokenizer"] or {"type": None}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if steps[-1]["type"] != "ByteLevel" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise _refusal("is no byte-level one")
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(SAME_WORDS.get(pattern, pattern))
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                patterns += [GPT2_SPLIT] * use_regex
            case _:
                raise _refusal(f"splits text in a way of its own ({step['type']})")
    if normalizer not in (None, {"type": "NFC"}):
        raise _refusal(f"changes text by {normalizer['type']}")
    if not patterns and not model["merges"]:
        return "gpt-2"  # single bytes, however text is split

    wanted = Split(patterns, bool(model.get("ignore_merges")), normalizer is not None)
    name = next((name for name, split in SPLITS.items() if split == wanted), None)
    if name is None:
        raise _refusal("splits text in a way of its own (one trained with --pattern=gpt2 does not)")
    return name


def _sentencepiece_settings(content: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Settings of a tokenizer.json that was made of SentencePiece's BPE; sets the types of bytes, in place.

    Raises InputError if it was not, or if scores cannot state the order of its merges.
    """
    model, normalizer = content["model"], content["normalizer"]
    normalizers = (normalizer or {}).get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if model["type"] != "BPE" or content["pre_tokenizer"] or normalizers not in ([replace], [prepend, replace]):
        raise _refusal(f"is of a kind ({model['type']}) that llama.cpp reads otherwise")

    for i, token in enumerate(tokens):
        if types[i] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = BYTE
        if token == model["unk_token"]:
            types[i] = UNKNOWN
    merges = [(left, right) for left, right in model["merges"]]
    scores = {token: NEVER_MERGED for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    scores |= {left + right: -float(rank) for rank, (left, right) in reversed([*enumerate(merges)])}
    # A score ranks all merges that make one token; which of these comes first hardly ever matters.
    is_sorted = merges == sorted(merges, key=lambda merge: -scores[merge[0] + merge[1]])
    if not is_sorted or {*recover_merges(scores)} != {*merges}:
        raise _refusal("has merges in an order that no scores give")
    return {
        "model": "llama",
        "scores": [scores.get(token, 0.0) for token in tokens],
        "add_space_prefix": prepend in normalizers,
    }


def _refusal(reason: str) -> InputError:
    return InputError(f"--to: llama.cpp has no equal of this tokenizer, which {reason}; export a folder instead")
