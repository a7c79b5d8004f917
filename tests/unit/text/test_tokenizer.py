"""Tokenizers against the libraries that define them: tiktoken, Hugging Face tokenizers and transformers."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from nanogpt.errors import InputError
from nanogpt.files import atomic_write
from nanogpt.text.fast_bpe import byte_letters, new_code_points
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

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
    letters = byte_letters()
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
    letters, byte_level = byte_letters(), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert sorted(letters) == sorted(byte_level.alphabet())
    text = "".join(map(chr, range(0x800))) + "日本😀"
    assert "".join(word for word, _ in byte_level.pre_tokenize_str(text)) == "".join(letters[b] for b in text.encode())


@pytest.mark.parametrize("text", [*HARD, *map(noise, range(4))], ids=range(len(HARD) + 4))
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
    with pytest.raises(TypeError), atomic_write(path) as partial, partial.open("w") as file:
        file.writelines(["half", None])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def around(points: range) -> list[str]:
    """Each code point between letters, digits, spaces and signs."""
    points = [chr(point) for point in points if not 0xD800 <= point < 0xE000]
    return [f"a{x}b {x}'s 1{x}2 {x}{x} !{x}? \n{x}  {x}\n\n{x}\t{x}'ll{x} é{x}é 中{x}中" for x in points]


@pytest.mark.parametrize(
    "points", [range(0x600), pytest.param(range(0x110000), marks=pytest.mark.slow)], ids=["latin", "all"]
)
def test_gigatoken_is_tiktoken_for_every_character(points: range, encoding, converted):
    pytest.importorskip("gigatoken")
    tokenizer, loaded, _ = converted
    assert tokenizer._fastest is not None
    assert loaded._fastest is not None
    new = new_code_points()
    for point, text in zip([p for p in points if not 0xD800 <= p < 0xE000], around(points), strict=True):
        assert new[point] or tokenizer._fastest.encode(text).tolist() == encoding.encode_ordinary(text), hex(point)
    for text in around(range(0x323B0, 0x323BA)):  # of those that they do not agree upon
        assert tokenizer.encode_ordinary(text).tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", [*HARD, *map(noise, range(4))], ids=range(len(HARD) + 4))
def test_without_gigatoken_the_ids_are_the_same(text: str, encoding, converted):
    tokenizer, _, _ = converted
    plain = pickle.loads(pickle.dumps(tokenizer))
    assert "_fastest" not in plain.__dict__
    plain._fastest = None
    assert plain.encode_ordinary(text).tolist() == encoding.encode_ordinary(text)


# ---- bytes, and pairs of one's own


@pytest.fixture(scope="module", params=["gpt2", "words"])
def own(request: pytest.FixtureRequest) -> Tokenizer:
    here = Path(__file__)
    texts = [path.read_text(encoding="utf-8") for path in (here, here.parent / "test_prepare_any.py")]
    return Tokenizer.train_bpe([*texts, *HARD], 900, request.param)


def test_own_pairs_give_any_text_back(own: Tokenizer, tmp_path: Path):
    """And the same ids by all ways: tiktoken's, the library's, after a save, after a pickle."""
    own.save(tmp_path)
    loaded, sent = Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(own))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert own.vocab_size == 900
    assert (own._inner.token_to_id(END_OF_TEXT), own.end_of_text) == (897, 897)
    for text in [*HARD, noise(1), noise(2), Path(__file__).read_text(encoding="utf-8")]:
        ids = own.encode_ordinary(text)
        assert own.decode(ids.tolist()) == text
        assert ids.max(initial=0) < 897  # names of special tokens are text here
        assert own._fast is not None  # else the next lines would compare it with itself
        plain.encode_special_tokens = True
        for other in (
            plain.encode(text).ids,
            loaded.encode_ordinary(text).tolist(),
            sent.encode_ordinary(text).tolist(),
        ):
            assert ids.tolist() == other
    marked = f"x{END_OF_TEXT}<|im_start|>y<|im_end|>"
    assert [i for i in own.encode(marked) if i > 896] == [897, 898, 899]
    assert own.decode(own.encode(marked)) == marked


def test_own_pairs_are_the_librarys_and_the_texts_alone():
    """The same texts give the same tokenizer, and it is the one that Hugging Face's own class learns."""
    texts = [Path(__file__).read_text(encoding="utf-8")] * 2
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(texts, vocab_size=500, min_frequency=2, show_progress=False)
    ours, again = Tokenizer.train_bpe(texts, 503), Tokenizer.train_bpe(iter(texts), 503)
    assert ours._inner.to_str() == again._inner.to_str()
    for text in HARD[1:]:
        learned = [theirs.id_to_token(i) for i in theirs.encode(text).ids]
        assert [ours._inner.id_to_token(i) for i in ours.encode_ordinary(text).tolist()] == learned
    few = Tokenizer.train_bpe(["abab"], 400)
    assert few.vocab_size == 256 + 1 + 3  # "ab" is the only pair that comes twice
    for texts, size, message in (
        ([""], 300, "the texts are empty"),
        (["x"], 258, "258 byte pairs cannot be: give 259"),
    ):
        with pytest.raises(InputError, match=message):
            Tokenizer.train_bpe(texts, size)


def test_bytes():
    tokenizer = Tokenizer.bytes()
    for text in [*HARD, noise(3)]:
        assert tokenizer.encode_ordinary(text).tolist() == [*text.encode()]
        assert tokenizer.decode([*text.encode()]) == text
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("byte", 257, 256)
    assert tokenizer.encode(f"a{END_OF_TEXT}") == [97, 256]


def test_only_what_is_surely_equal_takes_the_fast_path():
    """A merge that tiktoken would make and the library cannot; tokens that are found in any text; normalizers."""
    letters = byte_letters()
    base = {letter: i for i, letter in enumerate(letters)}
    bad = Tokenizer._byte_level(
        base | {"bc": 256, "ab": 257, "abc": 258}, [("b", "c"), ("a", "b"), ("ab", "c")], None, []
    )
    assert bad._fast is None
    assert bad.encode_ordinary("abc").tolist() == [97, 256]  # as the library has it; tiktoken would say 258
    good = Tokenizer._byte_level(base | {"ab": 256, "abc": 257}, [("a", "b"), ("ab", "c")], None, [])
    assert good.encode_ordinary("abcab").tolist() == [257, 256]
    lower = Tokenizer.train_bpe(["abab"], 300)
    lower._inner.normalizer = tokenizers.normalizers.Lowercase()
    assert Tokenizer(lower._inner)._fast is None
    found = Tokenizer.train_bpe(["abab"], 300)
    found._inner.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    found = Tokenizer(found._inner)
    assert found._fast is not None
    (a,), (b,) = found.encode("a"), found.encode("b")
    assert found.encode_ordinary("a<think>b").tolist() == [a, 260, b]
    for text in HARD:
        assert found.decode(found.encode_ordinary(text).tolist()) == text


def test_named(tmp_path: Path, own: Tokenizer):
    own.save(tmp_path, "mine.json")
    (tmp_path / "folder").mkdir()
    own.save(tmp_path / "folder")
    for spec in (tmp_path / "mine.json", str(tmp_path / "folder"), tmp_path / "folder/tokenizer.json"):
        assert Tokenizer.named(spec).same_as(own)
    for wrong, message in (
        ("cl100k_bas", "did you mean cl100k_base"),
        (tmp_path, "has no tokenizer.json: give a folder that has one"),
        (tmp_path / "nothing.json", "there is no tokenizer '.*nothing.json'"),
    ):
        with pytest.raises(InputError, match=message):
            Tokenizer.named(wrong)
