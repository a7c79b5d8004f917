"""Text from tokens that cut characters, spaces and stop strings apart, against decoding all at once."""

import math
from collections.abc import Callable

import pytest
import tokenizers
import torch

from nanogpt.generate.sampling import Token
from nanogpt.generate.stream import SampleText, TextStream, print_in_order
from nanogpt.text.tokenizer import Tokenizer

HARD = "naïve 🤷🏽‍♀️ 日本語 \u0301 \ufffd x\r\n\t  \u200b𝒳 é\u0000 ﷽"


def byte_level() -> Tokenizer:
    """Tokens of one byte to a few, which cut characters apart."""
    return Tokenizer.train_bpe([HARD] * 3, 273)


def byte_fallback() -> Tokenizer:
    """Bytes for what has no token; while they are no characters, each decodes to U+FFFD."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return Tokenizer(inner)


def word_pieces() -> Tokenizer:
    """The first token of a text decodes without its space."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁to": 0, "▁be": 1, "▁or": 2, "ing": 3}))
    inner.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(inner)


def stream_text(tokenizer: Tokenizer, ids: list[int], *stop_strings: str) -> list[str]:
    """The text of each token, and what comes at the end."""
    stream = TextStream(tokenizer, stop_strings)
    return [*(stream.put(token) for token in ids), stream.close()]


def test_stream_joins_the_bytes_of_characters():
    tokenizer = byte_level()
    ids = tokenizer.encode(HARD)
    pieces = stream_text(tokenizer, ids)
    assert "".join(pieces) == HARD
    assert len(ids) > len(HARD)
    assert pieces[-1] == ""
    assert sum("\ufffd" in piece for piece in pieces) == 1  # the one of the text itself
    assert stream_text(tokenizer, tokenizer.encode("a🤷")[:-1])[-1] == "\ufffd"  # an incomplete character
    for seed in range(200):
        ids = torch.randint(tokenizer.vocab_size, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_stream_returns_bytes_that_never_become_a_character(make: Callable[[], Tokenizer]):
    tokenizer = make()
    lone = next(i for i in range(tokenizer.vocab_size) if "0x80" in tokenizer.label(i))
    pieces = stream_text(tokenizer, [lone] * 100)
    assert "".join(pieces) == "\ufffd" * 100
    assert len("".join(pieces[:50])) > 40


def test_stream_returns_each_character_with_its_last_byte():
    ids = [256, *"日🤷é".encode(), 256]
    assert stream_text(byte_fallback(), ids) == ["a", "", "", "日", "", "", "", "🤷", "", "é", "a", ""]


def test_stream_keeps_the_space_before_a_word():
    assert stream_text(word_pieces(), [0, 1, 3, 2, 0]) == ["to", " be", "ing", " or", " to", ""]
    assert TextStream(word_pieces(), prompt=[0]).put(1) == " be"
    first, second = byte_level().encode("é")
    assert TextStream(byte_level(), prompt=[first]).put(second) == "é"


@pytest.mark.parametrize(
    ("stop_strings", "text", "tokens"),
    [
        (["\n\n"], "ab", 4),
        (["cc", "\n\n"], "ab", 4),
        (["c"], "ab\n\n", 5),
        (["d\n"], "ab\n\ncd", 99),
        (["b\n\nc"], "a", 5),
        (["d", "cd"], "ab\n\n", 6),
        (["", "zz"], "ab\n\ncd", 99),
    ],
)
def test_stream_stops_before_a_stop_string(stop_strings: list[str], text: str, tokens: int):
    """What may begin a stop string waits until that is known. tokens: how many it takes to stop; 99: never."""
    tokenizer = Tokenizer.characters("abcdz\n")
    stream = TextStream(tokenizer, stop_strings)
    written = ""
    for n, token in enumerate(tokenizer.encode("ab\n\ncd"), 1):
        written += stream.put(token)
        assert text.startswith(written)
        assert stream.is_stopped == (n >= tokens)
    assert written + stream.close() == text
    assert stream.is_stopped


def test_stream_stops_at_a_stop_id():
    stream = TextStream(Tokenizer.characters("abcd"), ["bcd"], stop_ids=[3])
    assert [stream.put(token) for token in (0, 1, 2, 3, 0)] == ["a", "", "", "bc", ""]
    assert stream.is_stopped


def test_sample_text_shows_the_joint_probability_of_a_piece():
    """Of what was held back as the beginning of a stop string, here "bc"."""
    sample = SampleText(TextStream(Tokenizer.characters("abcd"), ["bca"]), "?", show_probs=True)
    for id, p in enumerate([0.5, 0.25, 0.5, 0.5]):
        sample.put(Token(id, math.log(p)))
    assert sample.text == "?\n  50.0%  'a'\n   6.2%  'bcd'"
    assert sample.ids == [0, 1, 2, 3]


def test_samples_are_printed_one_after_another(capsys: pytest.CaptureFixture[str]):
    """The next one as soon as the one before it ended."""
    samples = [SampleText(TextStream(Tokenizer.characters("abcd"), ["d"]), "> ") for _ in range(3)]
    unprinted = list(samples)
    outputs = []
    for row in ("aba", "bdc", "dac", "aad"):
        for sample, letter in zip(samples, row, strict=True):
            sample.put(Token("abcd".index(letter)))
        print_in_order(unprinted, "|")
        outputs.append(capsys.readouterr().out)
    assert outputs == ["> a", "b", "|> b|> acc", "|"]
    assert unprinted == []
