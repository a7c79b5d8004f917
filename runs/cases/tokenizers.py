"""Cases of tokenizers."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cases.command import Case, Result, run

TEXT = "In 1984, 21 days;  7 nights!\n\tWhat?\n" * 40
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
ENDS = ["</s>", "<s>"]


def byte_level(alphabet: list[str], pattern: str | None = None) -> tokenizers.Tokenizer:
    """A tokenizer of single bytes; pattern: a split before them that keeps what stands between its matches."""
    tokenizer = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ENDS)
    return tokenizer


def prepare(
    checkout: Path, folder: Path, tokenizer: tokenizers.Tokenizer, text: str = TEXT
) -> tuple[Result, list[int]]:
    """Prepare a text with a tokenizer; the ids of both splits."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "input.txt").write_text(text)
    arguments = (
        f"--input={folder / 'input.txt'}",
        f"--tokenizer={folder / 'tokenizer.json'}",
        f"--out={folder / 'out'}",
    )
    result = run(checkout, "data/prepare.py", *arguments, "--workers=1")
    if result.status:
        return result, []
    meta = json.loads((folder / "out/meta.json").read_text())
    splits = [np.fromfile(folder / f"out/{split}.bin", dtype=meta["dtype"]) for split in ("train", "val")]
    return result, np.concatenate(splits).tolist()


def encode_as_the_library(tokenizer: tokenizers.Tokenizer, checkout: Path, folder: Path) -> tuple[bool, str]:
    result, ids = prepare(checkout, folder, tokenizer)
    ends = {tokenizer.token_to_id(end) for end in (*ENDS, "<|endoftext|>")}
    tokenizer.encode_special_tokens = True
    expected = tokenizer.encode(TEXT, add_special_tokens=False).ids
    ids = [token_id for token_id in ids if token_id not in ends]
    return ids == expected, f"{len(ids):,} ids; the library's are {len(expected):,}. {result.last_line}"


def split_case(pattern: str) -> Case:
    return Case(
        f"prepare data with a byte-level tokenizer that splits at {pattern}",
        lambda checkout, folder: encode_as_the_library(byte_level(BYTES, pattern), checkout, folder),
    )


def is_counted(lost: int, result: Result) -> tuple[bool, str]:
    lines = [line for line in result.output.splitlines() if f"does not have them: {lost:,};" in line]
    return bool(lines), lines[0] if lines else result.last_line


def lose_digits(checkout: Path, folder: Path) -> tuple[bool, str]:
    result, _ = prepare(checkout, folder, byte_level([byte for byte in BYTES if not byte.isdigit()]))
    return is_counted(sum(map(str.isdigit, TEXT)), result)


def lose_words(checkout: Path, folder: Path) -> tuple[bool, str]:
    tokenizer = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "What": 1, "?": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result, _ = prepare(checkout, folder, tokenizer)
    return is_counted(len(TEXT) - 5 * TEXT.count("What?"), result)


def separate_documents(file: str, settings: dict, checkout: Path, folder: Path) -> tuple[bool, str]:
    tokenizer = byte_level(BYTES)
    (folder / file).write_text(json.dumps(settings))
    rows = [json.dumps({"text": f"Story {i}."}) for i in range(50)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    tokenizer.save(str(folder / "tokenizer.json"))
    out = folder / "out"
    arguments = (f"--input={folder / 'rows.jsonl'}", f"--tokenizer={folder}", f"--out={out}", "--val_share=0.2")
    result = run(checkout, "data/prepare.py", *arguments, "--workers=1")
    end = json.loads((out / "meta.json").read_text())["end_of_text"] if not result.status else None
    ids = np.concatenate([np.fromfile(out / f"{split}.bin", dtype="<u2") for split in ("train", "val")])
    return int((ids == tokenizer.token_to_id("</s>")).sum()) == 50, f"end_of_text: {end}"


def letters(normalizer: normalizers.Normalizer | None, unknown: str) -> tokenizers.Tokenizer:
    """Single letters, but not as our own character tokenizer encodes them."""
    vocab = {character: i for i, character in enumerate(sorted({*TEXT.lower(), "~"} - {";"}))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.normalizer = normalizer
    return tokenizer


def prefixed_bytes() -> tokenizers.Tokenizer:
    """The vocabulary of our own byte tokenizer, with a space before each text."""
    spelled = {chr(byte): byte for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
    others = [byte for byte in range(0x100) if byte not in spelled.values()]
    vocab = spelled | {chr(0x100 + number): byte for number, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


CASES: dict[str, Case] = {
    "T5 words": split_case(r"\w+|[^\w\s]+"),
    "T5 digits": split_case(r"\d"),
    "T5 lines": split_case(r".+"),
    "T5 end": split_case(r"\s+$|\S+"),
    "T6 digits": Case("prepare data with a byte-level tokenizer without digits", lose_digits),
    "T6 words": Case("prepare data with word pieces that do not have most words", lose_words),
    "T7 config": Case(
        "prepare documents with a tokenizer whose tokenizer_config.json states its eos_token",
        lambda *places: separate_documents("tokenizer_config.json", {"eos_token": "</s>"}, *places),
    ),
    "T7 map": Case(
        "the same with special_tokens_map.json, the token as an object",
        lambda *places: separate_documents("special_tokens_map.json", {"eos_token": {"content": "</s>"}}, *places),
    ),
    "T7 model": Case(
        "the same with the eos_token_id in generation_config.json",
        lambda *places: separate_documents("generation_config.json", {"eos_token_id": [256]}, *places),
    ),
    "T9 lowercase": Case(
        "prepare data with a tokenizer of letters that makes text lower case",
        lambda *places: encode_as_the_library(letters(normalizers.Lowercase(), "~"), *places),
    ),
    "T9 unknown": Case(
        "prepare data with a tokenizer of letters, one of which stands for unknown characters",
        lambda *places: encode_as_the_library(letters(None, "~"), *places),
    ),
    "T9 bytes": Case(
        "prepare data with a tokenizer of bytes that puts a space before each text",
        lambda *places: encode_as_the_library(prefixed_bytes(), *places),
    ),
}
