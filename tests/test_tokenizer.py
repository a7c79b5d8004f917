"""Tokenizers against the libraries that define them: tiktoken, Hugging Face tokenizers and transformers."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from nanogpt import InputError
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer, _byte_letters, aside

CACHE = Path(__file__).parent.parent.parent / "shared/data/tiktoken"
HARD = [
    "",
    "\n",
    " ",
    "Hello  world \n\n  it's 2024's\t\tend   ",
    "naïve café Ünïcödé ß ﬁ ½ Ⅷ ² ١٢٣ ൪",
    "日本語 ภาษาไทย हिन्दी العربية עברית e\u0301 \u200d\u200b\u00a0\u0085\u2028\u3000x",
    "👩‍👩‍👧‍👦🏳️‍🌈 🤦🏽‍♂️ \U0001f600\U00020000\U0010ffff",
    "\x00\x01\x1c\x1f\x7f \r\n \x0b\x0c don't DON'T we'll 'tis",
    "a" * 999 + " " * 999 + "=" * 999,
    f"before {END_OF_TEXT}after <|endoftext| >",
]


def noise(seed: int, length: int = 4000) -> str:
    """Code points from all over the planes, with white space, letters and digits often between."""
    rng = random.Random(seed)
    points = [
        rng.choice((rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(length)
    ]
    return "".join(rng.choice(("", " ", "\n", "'s")) + chr(point) for point in points)


@pytest.fixture(scope="module", params=["tiny", "gpt2"])
def encoding(request: pytest.FixtureRequest) -> tiktoken.Encoding:
    if request.param == "gpt2":
        if not CACHE.exists():
            pytest.skip(f"{CACHE} is absent: GPT-2's encoding needs the network")
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))
        return tiktoken.get_encoding("gpt2")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = _byte_letters()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator([Path(__file__).read_text(encoding="utf-8") + "日本語 日本 " * 9], trainer)
    ranks = {bytes(map(letters.index, token)): rank for token, rank in trained.get_vocab().items()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("tiny", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 600})


@pytest.fixture(scope="module")
def converted(
    encoding: tiktoken.Encoding, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer, Path]:
    """Made of the encoding, loaded from what that one saved, and the folder."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer.from_tiktoken(encoding)
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    assert loaded is not None
    return tokenizer, loaded, folder


def test_byte_letters_are_the_librarys():
    letters, byte_level = _byte_letters(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert sorted(letters) == sorted(byte_level.alphabet())
    text = "".join(map(chr, range(0x800))) + "日本😀"
    assert "".join(word for word, _ in byte_level.pre_tokenize_str(text)) == "".join(letters[b] for b in text.encode())


@pytest.mark.parametrize("text", [*HARD, noise(1), noise(2)], ids=range(len(HARD) + 2))
def test_bpe_gives_tiktokens_ids(encoding: tiktoken.Encoding, converted: tuple[Tokenizer, Tokenizer, Path], text: str):
    tokenizer, loaded, _ = converted
    assert loaded.vocab_size == tokenizer.vocab_size == encoding.n_vocab
    assert loaded.end_of_text == tokenizer.end_of_text == encoding.eot_token
    special, plain = encoding.encode(text, allowed_special="all"), encoding.encode_ordinary(text)
    for one in (tokenizer, loaded):
        assert one.encode(text) == special
        assert one.encode_ordinary(text).tolist() == plain
        assert one.decode(special) == one.decode(plain) == text


def test_bpe_decodes_broken_utf8_and_half_surrogates_as_tiktoken(encoding, converted):
    tokenizer, _, _ = converted
    ids = encoding.encode_ordinary("日")[:1] + encoding.encode_ordinary(" 😀")[:-1]
    assert tokenizer.decode(ids) == encoding.decode(ids)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode_ordinary("a\ud800b").tolist() == encoding.encode("a\ud800b")
    with pytest.raises(InputError, match=f"id {encoding.n_vocab} is not"):
        tokenizer.decode([encoding.n_vocab])


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_transformers_loads_what_we_save(kind: str, converted: tuple[Tokenizer, Tokenizer, Path], tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    text = "Wait -- what ?  He 's\tgone, isn 't he .\n\n日本 \r\n!"
    tokenizer, _, folder = converted
    if kind == "char":
        tokenizer, folder = Tokenizer.characters(text), tmp_path
        tokenizer.save(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_characters(tmp_path: Path):
    text = "hello\nworld 😀\x00\r日e\u0301"
    tokenizer = Tokenizer.characters(text)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("char", len(set(text)), None)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    expected = [sorted(set(text)).index(character) for character in text]
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode(text).ids == expected
    for one in (tokenizer, loaded):
        assert one.encode(text) == one.encode_ordinary(text).tolist() == expected
        assert one.decode(expected) == text
        assert one.name == "char"
        assert one.encode("") == []
        assert one.decode([]) == ""
    with pytest.raises(InputError, match="the text is empty"):
        Tokenizer.characters("")


def test_same_as(converted: tuple[Tokenizer, Tokenizer, Path]):
    tokenizer, loaded, _ = converted
    assert tokenizer.same_as(loaded)
    assert loaded.same_as(tokenizer)
    assert not tokenizer.same_as(Tokenizer.characters("abc"))
    assert Tokenizer.characters("abc").same_as(Tokenizer.characters("cabba"))
    assert not Tokenizer.characters("abc").same_as(Tokenizer.characters("abd"))
    assert not Tokenizer.characters("abc").same_as(Tokenizer._from_characters({"a": 0, "b": 2, "c": 1}))


def test_unknown_characters_are_named():
    tokenizer = Tokenizer.characters("abc\uffff")
    with pytest.raises(InputError, match=r"no id for 'd' '日' '\\ud800':"):
        tokenizer.encode("ad日ab\ud800d")
    with pytest.raises(InputError, match="'9' …:"):
        tokenizer.encode_ordinary("0123456789xyz")


def test_meta_pkl_is_read_without_running_it(tmp_path: Path):
    assert Tokenizer.load(tmp_path) is None
    path, sentinel = tmp_path / "meta.pkl", tmp_path / "it ran"
    vocab = {character: i for i, character in enumerate("zyx\n")}
    path.write_bytes(pickle.dumps({"vocab_size": 4, "stoi": vocab, "itos": {i: c for c, i in vocab.items()}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("xyz\n") == [2, 1, 0, 3]  # their ids, not sorted ones

    class Evil:
        def __reduce__(self):
            return sentinel.write_text, ("",)

    class EvilCall:
        def __reduce__(self):
            return os.system, (f"touch '{sentinel}'",)

    good = pickle.dumps({"stoi": vocab})
    bad = [pickle.dumps({"stoi": vocab, "x": evil}) for evil in (Evil(), EvilCall(), np.arange(3))]
    bad += [
        good[:-9],
        b"",
        b"junk",
        pickle.dumps([1]),
        pickle.dumps({"stoi": {"a": 7}}),
        pickle.dumps({"stoi": {"ab": 0}}),
    ]
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"meta\.pkl was not read \("):
            Tokenizer.load(tmp_path)
    assert not sentinel.exists()


@pytest.mark.parametrize("content", ["", "{}", "[1", '{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'])
def test_damaged_tokenizer_json(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)


def test_gpt2_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def no_network(name: str) -> None:
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(InputError, match=r"^GPT-2's .*TIKTOKEN_CACHE_DIR.*$") as caught:
        Tokenizer.gpt2()
    assert "\n" not in str(caught.value)


def test_aside_leaves_the_old_file_when_it_breaks(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), aside(path) as partial, partial.open("w") as file:
        file.writelines(["half", None])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
