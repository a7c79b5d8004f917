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
