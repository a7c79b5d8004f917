"""Tokenizers: round trips, files, fast paths, and the errors of each."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import pytest
import tiktoken
import tokenizers
from texts import HARD_TEXTS, random_text

from nanogpt.errors import InputError
from nanogpt.text import fast_bpe
from nanogpt.text.fast_bpe import BYTE_DECODER, PATTERNS, make_byte_level_bpe
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

SOURCE = Path(__file__).read_text(encoding="utf-8")  # a text to learn pairs from


def test_characters_are_sorted_and_survive_a_save(tmp_path: Path):
    text = "hello\nworld 😀\x00\r日e\u0301"
    tokenizer = Tokenizer.characters(text)
    tokenizer.save(tmp_path)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    expected = [sorted(set(text)).index(character) for character in text]
    for one in (tokenizer, Tokenizer.load(tmp_path)):
        assert one is not None
        assert (one.name, one.vocab_size, one.end_of_text) == ("char", len(set(text)), None)
        assert one.encode(text) == one.encode_ordinary(text).tolist() == expected
        assert one.decode(expected) == text
        assert (one.encode(""), one.decode([])) == ([], "")
    with pytest.raises(InputError, match="the text is empty"):
        Tokenizer.characters("")


def test_characters_names_unknown_ones():
    for tokenizer in (Tokenizer.characters("abc"), Tokenizer.characters("abc\uffff")):
        with pytest.raises(InputError, match=r"no id for 'd' '日' '\\ud800':"):
            tokenizer.encode("ad日ab\ud800d")
        with pytest.raises(InputError, match="'9' …:"):
            tokenizer.encode_ordinary("0123456789xyz")


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    all_bytes = "".join(map(chr, range(0x800))) + "日本😀"  # of UTF-8, almost
    for text in [*HARD_TEXTS, random_text(3), all_bytes]:
        assert tokenizer.encode_ordinary(text).tolist() == [*text.encode()]
        assert tokenizer.decode([*text.encode()]) == text
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("byte", 257, 256)
    assert tokenizer.encode(f"a{END_OF_TEXT}") == [97, 256]
    with pytest.raises(InputError, match="id 257 is not in the tokenizer's vocabulary"):
        tokenizer.decode([257])


def test_train_bpe_depends_on_its_texts_alone():
    texts = [SOURCE, "", "日本"]
    assert Tokenizer.train_bpe(texts, 400)._inner.to_str() == Tokenizer.train_bpe(iter(texts), 400)._inner.to_str()
    assert Tokenizer.train_bpe(["abab"], 400).vocab_size == 256 + 1 + 3  # only "ab" occurs twice


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([""], 300, "the texts are empty"),
        (["x"], 258, "--tokenizer=bpe:258: the vocabulary must have 259"),
        (["x"], 2**24 + 1, "--tokenizer=bpe:16777217"),
    ],
)
def test_train_bpe_refuses_bad_input(texts: list[str], size: int, message: str):
    with pytest.raises(InputError, match=message):
        Tokenizer.train_bpe(texts, size)


def test_label_shows_the_bytes_of_a_part_of_a_character():
    tokenizer = Tokenizer.bytes()
    assert [tokenizer.label(id) for id in (97, 10, 0xE6, 256)] == ["a", "\n", "<0xE6>", END_OF_TEXT]


# --- One encoder


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` by tokenizers alone."""
    plain = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    plain.encode_special_tokens = True
    return plain.encode(text, add_special_tokens=False).ids


SPLITS = {
    "words": r"\w+|[^\w\s]+",  # each leaves text between the matches
    "digits": r"\d",
    "lines": r".+",
    "start": r"^.",  # these mean other things in other regex engines
    "end": r"\s+$",
    "possessive": r"\p{N}{1,3}+|\p{L}+",
}


@pytest.mark.parametrize("pattern", SPLITS.values(), ids=SPLITS)
def test_data_and_prompts_have_the_librarys_ids_for_any_split(pattern: str):
    trained = Tokenizer.train_bpe([SOURCE, *HARD_TEXTS], 500)
    trained._inner.pre_tokenizer = make_byte_level_bpe({}, [], [pattern], []).pre_tokenizer
    tokenizer = Tokenizer(trained._inner)
    for text in ["a b\n\nc 12345\n", *HARD_TEXTS[:-1]]:
        assert tokenizer.encode_ordinary(text).tolist() == tokenizer.encode(text) == library_ids(tokenizer, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("tokens", "merges", "ids"),
    [
        ({"ab": 256, "abc": 257}, ["a b", "ab c"], [257]),
        ({"bc": 256, "ab": 257, "abc": 258}, ["b c", "a b", "ab c"], [97, 256]),  # abc is out of reach
        ({"bc": 256, "ab": 257}, ["a b", "b c"], [257, 99]),  # by the order of merges, not of ids
        ({"ab": 256, "bc": 257, "abc": 258}, ["a b", "b c", "ab c", "a bc"], [258]),  # two ways to make abc
        ({"ab": 256, "abc": 257}, ["a b"], [256, 99]),  # no merge makes abc
    ],
)
def test_gigatoken_merges_as_the_library_does(tokens: dict, merges: list[str], ids: list[int]):
    pairs = [tuple(merge.split()) for merge in merges]
    tokenizer = Tokenizer(make_byte_level_bpe(BYTE_DECODER | tokens, pairs, [PATTERNS["gpt2"]], []))
    assert tokenizer._gigatoken("abc").tolist() == library_ids(tokenizer, "abc") == ids


def change_alphabet(inner: Any) -> None:
    model = json.loads(inner.to_str())["model"]
    del model["vocab"]["7"]
    inner.model = tokenizers.models.BPE(model["vocab"], [])


WORDS = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS["gpt2"]), behavior="removed")
BYTES = make_byte_level_bpe({}, [], [], []).pre_tokenizer
CHANGES: dict[str, Callable[[Any], Any]] = {
    "normalizer": lambda inner: setattr(inner, "normalizer", tokenizers.normalizers.Lowercase()),
    "split": lambda inner: setattr(inner, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "behavior": lambda inner: setattr(inner, "pre_tokenizer", tokenizers.pre_tokenizers.Sequence([WORDS, BYTES])),
    "alphabet": change_alphabet,
    "added token": lambda inner: inner.add_tokens([tokenizers.AddedToken("<think>", lstrip=True)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_gigatoken_is_used_for_proven_pipelines_alone(change: Callable[[Any], Any]):
    inner = Tokenizer.train_bpe(["abab"], 300)._inner
    assert Tokenizer(inner)._gigatoken is not None
    change(inner)
    tokenizer = Tokenizer(inner)
    assert tokenizer._gigatoken is None
    text = "AB  ab 0789 <think> x"
    assert tokenizer.encode_ordinary(text).tolist() == tokenizer.encode(text) == library_ids(tokenizer, text)


@pytest.mark.parametrize("normalizer", [None, tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()])
def test_encode_with_spans_gives_the_librarys_ids_and_offsets(normalizer: Any):
    inner = Tokenizer.train_bpe([SOURCE, *HARD_TEXTS], 600)._inner
    inner.normalizer = normalizer
    inner.add_tokens(["<think>", "<think>\n", "Ünï"])
    inner.add_special_tokens([tokenizers.AddedToken("<s>", normalized=False)])
    tokenizer = Tokenizer(inner)
    for text in (*HARD_TEXTS, "<s>", "a<think>\nb<s><think>c Ünïx<|im_start|><|im_end|>日"):
        ids, spans = tokenizer.encode_with_spans(text)
        expected = tokenizer._encode_plainly(text)
        assert (ids.tolist(), [*map(tuple, spans.tolist())]) == (expected.ids, expected.offsets)
    assert (tokenizer._byte_level is None) == (normalizer is not None)  # "<think>" is looked for after normalization


def test_encode_continuation_adds_no_space_at_the_start():
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "a": 257, "b": 258}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    inner.normalizer = tokenizers.normalizers.Sequence(steps)
    for tokenizer in (Tokenizer(inner), Tokenizer.train_bpe([SOURCE], 400), Tokenizer.characters("ab\n ")):
        parts = [*tokenizer.encode_ordinary("a b\n"), *tokenizer.encode_continuation("b a")]
        assert parts == tokenizer.encode("a b\nb a")
    assert Tokenizer.characters("ab").encode_ordinary("ab").tolist() == [0, 1]


def test_encode_ordinary_drops_gigatoken_if_it_differs_on_a_sample(capsys: pytest.CaptureFixture[str]):
    tokenizer = Tokenizer.train_bpe([SOURCE], 300)
    tokenizer._gigatoken = lambda text: np.frombuffer(text.encode(), dtype=np.uint8)  # knows no merges
    for text in ("123", SOURCE, SOURCE):
        assert tokenizer.encode_ordinary(text).tolist() == library_ids(tokenizer, text)
    assert capsys.readouterr().err.count("\n") == 1


def test_gigatoken_starts_anew_before_it_remembers_too_many_words(monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.train_bpe([SOURCE], 300)
    loads = []
    from_json = gigatoken.Tokenizer.from_json
    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", lambda content: loads.append(1) or from_json(content))
    monkeypatch.setattr(fast_bpe, "CACHED_CHARACTERS", 1000)
    ids = [tokenizer.encode_ordinary(SOURCE[:400]).tolist() for _ in range(7)]
    assert ids == [library_ids(tokenizer, SOURCE[:400])] * 7
    assert len(loads) == 7  # the sample counts, too


def test_encode_ordinary_finds_added_tokens_that_are_not_special():
    inner = Tokenizer.train_bpe(["abab"], 300)._inner
    inner.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    inner.model.dropout = 0.9  # a tokenizer.json may have this; ids must not be random
    tokenizer = Tokenizer(inner)
    assert "<think>" not in tokenizer.special_tokens
    assert tokenizer.encode_ordinary("ab<think>b").tolist() == [*tokenizer.encode("ab"), 260, *tokenizer.encode("b")]
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.end_of_text]  # special tokens are on again


def letters(normalizer: Any = None, unknown: str = "<unk>") -> tokenizers.Tokenizer:
    """A tokenizer of the letters a to z, with another pipeline than ours."""
    vocab = {chr(97 + i): i for i in range(26)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=unknown))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    inner.normalizer = normalizer
    return inner


def test_char_and_byte_are_our_own_pipelines_alone():
    assert Tokenizer(letters()).name == "char"
    lower = Tokenizer(letters(tokenizers.normalizers.Lowercase()))
    unknown = Tokenizer(letters(unknown="x"))
    dropping = letters()
    dropping.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("b"), behavior="removed")
    merging = make_byte_level_bpe(BYTE_DECODER, [], [], [END_OF_TEXT])
    merging.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    cases = [(lower, "AbC"), (unknown, "a1b"), (Tokenizer(dropping), "abc"), (Tokenizer(merging), "abc")]
    for tokenizer, text in cases:
        assert tokenizer.name in ("wordlevel", "bpe")
        assert tokenizer.encode_ordinary(text).tolist() == tokenizer.encode(text) == library_ids(tokenizer, text)
    assert lower.changes == ["Lowercase"]


# --- What is lost


def test_count_lost_characters_is_exact():
    known = {character: byte for character, byte in BYTE_DECODER.items() if byte not in (*b"0123456789", 0xC3)}
    byte_level = make_byte_level_bpe(known, [], [PATTERNS["gpt2"]], [])
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2}, unk_token="[UNK]"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pieces.normalizer = tokenizers.normalizers.Lowercase()
    dropping = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    unknown = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True))
    for inner, text, lost in (
        (byte_level, "1 day, 22 é 日", 4),
        (byte_level, "éa", 1),
        (pieces, "AB abc xyz", 2 + 3),
        (dropping, "abcdab", 2),
        (unknown, "axyza", 3),
        (letters(unknown="z"), "a1z", 2),
    ):
        tokenizer = Tokenizer(inner)
        assert tokenizer.count_lost_characters(text) == lost
    for tokenizer in (Tokenizer.bytes(), Tokenizer.characters("ab"), Tokenizer.train_bpe(["ab"], 259, "words")):
        assert tokenizer._lossy is None


# --- The end of a text

ENDS = ["<|im_end|>", "</s>", "<stop>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("tokens", "files", "end"),
    [
        (ENDS[:3], {"tokenizer_config.json": {"eos_token": "</s>"}}, "</s>"),
        (ENDS[:3], {"tokenizer_config.json": {"eos_token": {"content": "<stop>"}}}, "<stop>"),
        (ENDS[:3], {"special_tokens_map.json": {"eos_token": "<stop>"}}, "<stop>"),
        (ENDS[:3], {"generation_config.json": {"eos_token_id": [258, 257]}}, "<stop>"),
        (ENDS[:3], {"tokenizer_config.json": {"bos_token": "</s>"}, "config.json": {"eos_token_id": 258}}, "<stop>"),
        (ENDS[:3], {}, "</s>"),
        (ENDS, {"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, "<|endoftext|>"),  # as Qwen's
        (ENDS[:1], {}, None),
        (ENDS[:1], {"tokenizer_config.json": {"eos_token": "absent"}}, None),
        (ENDS[:1], {"tokenizer_config.json": {"eos_token": "a"}}, "a"),  # made a special token, as by transformers
    ],
)
def test_end_of_text_is_what_the_tokenizers_files_state(
    tmp_path: Path, tokens: list[str], files: dict, end: str | None
):
    inner = make_byte_level_bpe(BYTE_DECODER, [], [PATTERNS["gpt2"]], tokens)
    inner.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "saved").mkdir()
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    tokenizer.save(tmp_path / "saved")
    for loaded in (tokenizer, Tokenizer.load(tmp_path / "saved")):
        assert loaded is not None
        assert loaded.end_of_text == (None if end is None else inner.token_to_id(end))
        assert loaded.encode(f"x{end}") == [120, loaded.end_of_text] if end else True


# --- Files


@pytest.mark.parametrize("content", ["", "{}", "[1", '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'])
def test_load_refuses_a_damaged_tokenizer_json(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)


VOCAB = {character: i for i, character in enumerate("zyx\n")}


def test_load_takes_the_ids_of_meta_pkl(tmp_path: Path):
    assert Tokenizer.load(tmp_path) is None
    meta = {"vocab_size": 4, "stoi": VOCAB, "itos": {i: character for character, i in VOCAB.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("xyz\n") == [2, 1, 0, 3]  # not sorted


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        pickle.dumps({"stoi": VOCAB})[:-9],
        pickle.dumps([1]),
        pickle.dumps({"stoi": {"a": 7}}),
        pickle.dumps({"stoi": {"ab": 0}}),
        *(pickle.dumps({"stoi": VOCAB, "x": RunsCode()}, protocol) for protocol in (0, 2, 4)),
        pickle.dumps({"stoi": VOCAB, "x": np.arange(3)}),
    ],
)
def test_load_refuses_a_damaged_or_executable_meta_pkl(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"meta\.pkl was not read \("):
        Tokenizer.load(tmp_path)
    assert not Path("it-ran").exists()


def test_from_name_or_path_reads_files_and_folders(tmp_path: Path):
    trained = Tokenizer.train_bpe([SOURCE], 300)
    (tmp_path / "folder").mkdir()
    trained.save(tmp_path, "mine.json")
    trained.save(tmp_path / "folder")
    for path in ("mine.json", "folder", "folder/tokenizer.json"):
        assert Tokenizer.from_name_or_path(str(tmp_path / path)).vocab == trained.vocab
    for name in ("cl100k_bas", str(tmp_path), str(tmp_path / "nothing.json")):
        with pytest.raises(InputError, match=r"there is no tokenizer .*give a tokenizer\.json, .*cl100k_base"):
            Tokenizer.from_name_or_path(name)


def test_gpt2_without_a_network_names_the_cache_variable(monkeypatch: pytest.MonkeyPatch):
    def get_encoding(name: str) -> None:
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(InputError, match=r"^tiktoken's encoding gpt2 .*TIKTOKEN_CACHE_DIR.*$") as caught:
        Tokenizer.from_name_or_path("gpt2")
    assert "\n" not in str(caught.value)
