"""Texts on which tokenizers differ, and the texts that a loss mask selects."""

import random

import numpy as np

from nanogpt.text.tokenizer import Tokenizer

HARD_TEXTS = [
    "",
    "\n",
    " ",
    "Hello  world \n\n  it's 2024's\t\tend   ",
    "naïve café Ünïcödé ß ﬁ ½ Ⅷ ² ١٢٣ ൪",
    "日本語 ภาษาไทย हिन्दी العربية עברית e\u0301 \u200d\u200b\u00a0\u0085\u2028\u3000x",
    "👩‍👩‍👧‍👦🏳️‍🌈 🤦🏽‍♂️ \U0001f600\U00020000\U0010ffff",
    "\x00\x01\x1c\x1f\x7f \r\n \x0b\x0c don't DON'T we'll 'tis",
    "a" * 999 + " " * 999 + "=" * 999,
    "before <|endoftext|>after <|endoftext| >",
]


def random_text(seed: int, length: int = 4000) -> str:
    """Code points of all planes, with spaces, newlines, letters and digits between many of them."""
    rng = random.Random(seed)
    ranges = (range(0x80), range(0xD800), range(0xE000, 0x110000))
    points = [rng.choice(rng.choice(ranges)) for _ in range(length)]
    return "".join(rng.choice(("", " ", "\n", "'s")) + chr(point) for point in points)


def answer_texts(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """The texts that a loss mask selects, one for each run of ones."""
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    return [tokenizer.decode(run.tolist()) for run in runs[1 - int(mask[0]) :: 2]]


# What split patterns, normalizers and added tokens treat in their own ways.
HARD_PIECES = [
    *("don't", "DON'T", "I'Ll", "'ſ", "'S ", " ", "  ", "\n\n", "\r\n", " \n ", "\t", "123456", "١٢٣٤", "½Ⅷ²", "é"),
    *("e\u0301", "a\u0300b", "q\u0307\u0323", "\u212b", "ﬁ", "각", "\u1100\u1161", "日本語", "ภาษา", "हिन्दी", "한국어"),
    *("👩‍👩‍👧", "🏳️‍🌈", "\u00a0", "\u2028", "\u3000", "\u200b", "\u0085", "\ufeff", "\x00", "\x1c", "_x_", "a/b//\n/"),
    *("...!!", "=>", "<|", "|>", "ǅ", "ʰ", "İ", "ß", "-", "'", "x", "▁", "▁▁", "<0x41>", "Ġ", "Ċ", "##s", "\ufffd"),
]
BLOCKS = [(0, 0x80), (0x80, 0x300), (0x300, 0x2000), (0x2000, 0xD800), (0xE000, 0x110000), (0x1F000, 0x1FB00)]


def fuzz_text(rng: random.Random, prose: str, names: list[str]) -> str:
    """A short text of all that tokenizers can stumble over, with bits of `prose` and, in half of them, `names`."""
    parts = []
    has_names = bool(names) and rng.random() < 0.5
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if has_names and rng.random() < 0.2:
            parts.append(rng.choice(names))
        if kind < 0.3:
            parts.append(rng.choice(HARD_PIECES))
        elif kind < 0.5:
            start = rng.randrange(len(prose))
            parts.append(prose[start : start + rng.randint(1, 60)])
        elif kind < 0.75:
            parts.append(chr(rng.randrange(*rng.choice(BLOCKS))))
        elif kind < 0.9:
            parts.append(rng.choice(" \n\t\r'.,0a") * rng.randint(1, 9))
        else:
            parts.append("".join(rng.choices("abcdeABC 01'\n", k=rng.randint(1, 20))))
    return "".join(parts)
