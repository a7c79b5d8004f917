"""Token ids against the libraries that define them: tiktoken, gigatoken and tokenizers."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from conftest import ROOT, needs_gpt2
from texts import HARD_TEXTS, random_text

from nanogpt.text.fast_bpe import (
    BYTE_DECODER,
    SAME_WORDS,
    TIKTOKEN_GPT2_PATTERN,
    make_byte_level_bpe,
    unicode_17_table,
)
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

sys.path.insert(0, str(ROOT / "runs/tokenizers"))
import fuzz

SOURCE = Path(__file__).read_text(encoding="utf-8")  # a text to learn pairs from
TEXTS = [*HARD_TEXTS, *map(random_text, range(4))]


@pytest.fixture(scope="module", params=["tiny", pytest.param("gpt2", marks=needs_gpt2)])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    if request.param == "gpt2":
        return tiktoken.get_encoding("gpt2")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [*BYTE_DECODER]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([SOURCE * 2 + "日本語 日本 " * 9], trainer)
    ranks = {bytes(map(BYTE_DECODER.__getitem__, token)): rank for token, rank in trained.get_vocab().items()}
    return tiktoken.Encoding(
        "tiny", pat_str=TIKTOKEN_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


@pytest.fixture(scope="module")
def converted(encoding: tiktoken.Encoding) -> Tokenizer:
    return Tokenizer.from_tiktoken(encoding)


@pytest.fixture(scope="module")
def loaded(converted: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("saved")
    converted.save(folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(("pattern", "published"), SAME_WORDS.items())
def test_exports_spell_a_pattern_as_published_files_do(pattern: str, published: str, tmp_path: Path):
    tokenizer = Tokenizer(make_byte_level_bpe(BYTE_DECODER, [], [pattern], []))
    tokenizer.save_pretrained(tmp_path, context=16)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert json.loads(exported.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": published}
    characters = [f"a {chr(code)}1 {chr(code)}'s {chr(code)}'LL'Re{chr(code)}'ſ" for code in range(0x3000)]
    for text in [*TEXTS, "".join(characters)]:
        assert exported.pre_tokenizer.pre_tokenize_str(text) == tokenizer._inner.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_bpe_gives_tiktokens_ids(encoding: tiktoken.Encoding, converted: Tokenizer, loaded: Tokenizer, text: str):
    special = encoding.encode(text, allowed_special="all")
    ordinary = encoding.encode_ordinary(text)
    for tokenizer in (converted, loaded):
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (encoding.n_vocab, encoding.eot_token)
        assert tokenizer.encode(text) == special
        assert tokenizer.encode_ordinary(text).tolist() == ordinary
        assert tokenizer.decode(special) == tokenizer.decode(ordinary) == text

    sent = pickle.loads(pickle.dumps(converted))
    assert "_gigatoken" not in sent.__dict__
    sent._gigatoken = None
    assert sent.encode_ordinary(text).tolist() == ordinary


def test_bpe_treats_broken_utf8_as_tiktoken_does(encoding: tiktoken.Encoding, converted: Tokenizer):
    ids = encoding.encode_ordinary("日")[:1] + encoding.encode_ordinary(" 😀")[:-1]
    assert converted.decode(ids) == encoding.decode(ids)
    text = "a\ud800b"
    assert converted.encode(text) == converted.encode_ordinary(text).tolist() == encoding.encode(text)


def around(point: int) -> str:
    """A code point between letters, digits, spaces and punctuation."""
    x = chr(point)
    return f"a{x}b {x}'s 1{x}2 {x}{x} !{x}? \n{x}  {x}\n\n{x}\t{x}'ll{x} é{x}é 中{x}中A{x}"


@pytest.mark.parametrize(
    "points", [range(0x600), pytest.param(range(0x110000), marks=pytest.mark.slow)], ids=["latin", "all"]
)
def test_gigatoken_agrees_with_tiktoken_but_for_unicode_17(points: range, encoding, converted):
    is_new = unicode_17_table()
    for point in points:
        if not is_new[point] and not 0xD800 <= point < 0xE000:
            text = around(point)
            assert converted._gigatoken(text).tolist() == encoding.encode_ordinary(text), hex(point)
    for text in map(around, range(0x323B0, 0x323BA)):
        assert converted.encode_ordinary(text).tolist() == encoding.encode_ordinary(text)


# --- Published tokenizers, downloaded by runs/tokenizers/download.sh

FOLDER = Path(os.environ.get("NANOGPT_TOKENIZERS", "/nonexistent"))
FOUND = fuzz.find_tokenizers(FOLDER, SOURCE) if FOLDER.exists() else {}


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in FOUND.items()])
def test_published_tokenizers_have_the_same_ids_everywhere(path: Path):
    result = fuzz.compare(path, 4000, SOURCE)
    assert (result["data"], result["prompts"], result["data_and_prompts"]) == (0, 0, 0), result["examples"]
    assert result["by_gigatoken"] > 3000 or path.name == "trained_words"


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in FOUND.items()])
def test_published_tokenizers_agree_on_every_character(path: Path):
    ours, encode_data, _ = fuzz.load(path)
    points = [*range(0x33600), *range(0xE0000, 0xE0200), *range(0x40000, 0x110000, 997)]  # the assigned ones, and some
    for start in range(0, len(points), 4096):
        texts = [around(point) for point in points[start : start + 4096] if not 0xD800 <= point < 0xE000]
        assert [ours.encode_ordinary(text).tolist() for text in texts] == encode_data(texts), hex(points[start])


@pytest.mark.parametrize("pattern", ["gpt2", "words"])
def test_trained_bpe_gives_the_librarys_ids(pattern: str, tmp_path: Path):
    trained = Tokenizer.train_bpe([SOURCE, *HARD_TEXTS], 700, pattern)
    assert pattern != "gpt2" or trained._gigatoken is not None  # else it would be compared with itself
    trained.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*TEXTS, SOURCE]:
        assert trained.encode_ordinary(text).tolist() == theirs.encode(text).ids


def test_train_bpe_learns_the_librarys_merges():
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([SOURCE] * 2, vocab_size=500, min_frequency=2, show_progress=False)
    ours = Tokenizer.train_bpe([SOURCE] * 2, 503)
    for text in HARD_TEXTS[1:]:
        learned = [theirs.id_to_token(id) for id in theirs.encode(text).ids]
        assert [ours._inner.id_to_token(id) for id in ours.encode_ordinary(text).tolist()] == learned
