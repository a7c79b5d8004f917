"""Text to ids and back: characters, bytes, byte pairs (GPT-2's or one's own), or whatever a `tokenizer.json` describes.

Every tokenizer is a Hugging Face `tokenizers.Tokenizer` inside, so that other programs load what `save` writes.
Fast paths for preparing data stand beside it: lookup tables for characters and bytes, and tiktoken and gigatoken (where
it is installed) wherever they are shown to give the same ids.
"""

import contextlib
import difflib
import io
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nanogpt import InputError
from nanogpt.files import read_json, read_small

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TURNS = ("<|im_start|>", "<|im_end|>")  # around each turn of a conversation, as Qwen's models have them
# How text is cut into words, inside of which byte pairs are merged. "gpt2" is that of GPT-2; in "words" a word takes
# any one character before it along (so "'s", "(no" and "\tx" are words) and its accents, and numbers are cut in threes.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "words": r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# GPT-2's pattern as tiktoken writes it, for the same words.
TIKTOKENS_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Letters and digits that Unicode 17 added: gigatoken 0.10 knows them, tiktoken 0.14 and tokenizers 0.23 do not.
UNICODE_17 = (
    *((0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED)),
    *((0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
TEMPLATE = "chat_template.jinja"
MOST_BYTES = 64 * 2**20  # of a tokenizer.json; the largest published ones have half of that
_UNKNOWN = 2**32 - 1  # marks code points without an id in a lookup table


class Tokenizer:
    """Encodes and decodes text.

    Attributes: `name` ("char", "byte", tiktoken's, such as "gpt2", or the kind of model in tokenizer.json, such as
    "bpe"), `vocab_size` (the largest id + 1), `end_of_text` (the id of <|endoftext|>, or None), `template` (Jinja, for
    nanogpt/chat.py, or None).
    """

    def __init__(self, inner: "tokenizers.Tokenizer", name: str | None = None):
        vocab = inner.get_vocab()
        kind = type(inner.model).__name__
        is_char = kind == "WordLevel" and all(len(token) == 1 for token in vocab)
        letters = _byte_letters()
        is_byte = kind == "BPE" and len(vocab) == 257 and all(vocab.get(letters[byte]) == byte for byte in range(256))
        self.name = "char" if is_char else "byte" if is_byte else name or kind.lower()
        self.vocab_size = max(vocab.values()) + 1
        self.end_of_text: int | None = vocab.get(END_OF_TEXT)
        self.template: str | None = None
        inner.no_truncation()  # which a model's own tokenizer.json may ask for
        inner.no_padding()
        self._inner = inner
        self._table: np.ndarray | None = None  # code point -> id
        if is_char:
            self._table = np.full(max(map(ord, vocab)) + 1, _UNKNOWN, dtype=np.uint32)
            for character, token_id in vocab.items():
                self._table[ord(character)] = token_id

    @classmethod
    def characters(cls, text: str) -> "Tokenizer":
        """The distinct characters of `text`, sorted; ids from 0 on, as nanoGPT's. Raises InputError for no text."""
        if not text:
            raise InputError("the text is empty, so there are no characters to make a vocabulary of: give another text")
        return cls._from_characters({character: i for i, character in enumerate(sorted(set(text)))})

    @classmethod
    def _from_characters(cls, vocab: dict[str, int]) -> "Tokenizer":
        import tokenizers

        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
        any_character = tokenizers.Regex(r"[\s\S]")  # a plain dot would leave newlines out
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(any_character, behavior="isolated")
        inner.decoder = tokenizers.decoders.Fuse()
        return cls(inner)

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Each byte of UTF-8 by its own value, and <|endoftext|>: 257 ids."""
        return cls._byte_level({letter: byte for byte, letter in enumerate(_byte_letters())}, [], None, [END_OF_TEXT])

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, pattern: str = "gpt2") -> "Tokenizer":
        """Byte pairs learned from `texts`: the 256 bytes, merges of what is most frequent inside the words that a
        pattern of PATTERNS cuts, and at the end <|endoftext|>, <|im_start|> and <|im_end|>.

        vocab_size counts all of them; texts with too few pairs that occur twice give less. The same texts give the
        same tokenizer. Raises InputError for an impossible vocab_size and for texts without any character.
        """
        import tokenizers

        specials = [END_OF_TEXT, *TURNS]
        least = 256 + len(specials)
        if not least <= vocab_size <= 2**24:
            raise InputError(
                f"a vocabulary of {vocab_size:,} byte pairs cannot be: give {least} (256 bytes and {len(specials)} "
                f"special tokens) or more, such as bpe:8192, and no more than {2**24:,}"
            )
        seen = False

        def cleaned() -> Iterator[str]:
            nonlocal seen
            for text in texts:
                seen = seen or bool(text)
                yield _without_surrogates(text)

        learning = tokenizers.Tokenizer(tokenizers.models.BPE())
        learning.pre_tokenizer = _cut_by(PATTERNS[pattern])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            min_frequency=2,
            initial_alphabet=_byte_letters(),
            show_progress=False,
        )
        learning.train_from_iterator(cleaned(), trainer)
        if not seen:
            raise InputError("the texts are empty, so there are no byte pairs to learn: give other texts")
        model = json.loads(learning.to_str())["model"]
        merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
        return cls._byte_level(model["vocab"], merges, PATTERNS[pattern], specials)

    @classmethod
    def _byte_level(
        cls,
        vocab: dict[str, int],
        merges: Sequence[tuple[str, ...]],
        pattern: str | None,
        specials: Sequence[str],
        name: str | None = None,
    ) -> "Tokenizer":
        import tokenizers

        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [(left, right) for left, right in merges]))
        inner.pre_tokenizer = _cut_by(pattern)
        inner.decoder = tokenizers.decoders.ByteLevel()
        inner.add_special_tokens([*specials])
        return cls(inner, name)

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's byte pair encoding, 50,257 ids. Raises InputError where its files can not be had."""
        return cls._from_tiktokens("gpt2")

    @classmethod
    def named(cls, spec: str | Path) -> "Tokenizer":
        """A tiktoken encoding by its name (gpt2, cl100k_base …), else a tokenizer.json or a folder that holds one.

        Raises InputError where it is none of them, is damaged, or cannot be downloaded.
        """
        import tiktoken

        names = tiktoken.list_encoding_names()
        if spec in names:
            return cls._from_tiktokens(str(spec))
        is_other = os.path.isfile(spec) and Path(spec).name != "tokenizer.json"
        found = cls.read(Path(spec)) if is_other else cls.load(Path(spec).parent if os.path.isfile(spec) else spec)
        if found:
            return found
        close = difflib.get_close_matches(str(spec), names, n=1)
        if os.path.isdir(spec):
            raise InputError(f"{spec} has no tokenizer.json: give a folder that has one, or the file itself")
        hint = f"did you mean {close[0]}?" if close else f"give one's path, or of tiktoken's {', '.join(names)}"
        raise InputError(f"there is no tokenizer {str(spec)!r} (a tokenizer.json, or a folder that holds one): {hint}")

    @classmethod
    def _from_tiktokens(cls, name: str) -> "Tokenizer":
        import tiktoken

        try:
            return cls.from_tiktoken(tiktoken.get_encoding(name))
        except (OSError, ValueError) as error:  # no network; a file whose hash is wrong
            told = "GPT-2's encoding" if name == "gpt2" else f"the encoding {name}"
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{told} could not be downloaded ({reason}): connect to the network, or set "
                "TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it"
            ) from error

    @classmethod
    def from_tiktoken(cls, encoding: "tiktoken.Encoding") -> "Tokenizer":
        """The same encoding as tiktoken's, id for id."""
        letters = _byte_letters()
        spell = {token: "".join(letters[byte] for byte in token) for token in encoding._mergeable_ranks}
        vocab = {spell[token]: rank for token, rank in encoding._mergeable_ranks.items()} | encoding._special_tokens
        merges = [(spell[left], spell[right]) for left, right in _merges(encoding._mergeable_ranks)]
        made = cls._byte_level(vocab, merges, _portable(encoding._pat_str), [*encoding._special_tokens], encoding.name)
        made._fast = encoding
        return made

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer | None":
        """What `folder` holds: `tokenizer.json` and a chat template, else nanoGPT's `meta.pkl`, else None.

        Nothing in a pickle is executed. Raises InputError for a damaged file.
        """
        path, old = Path(folder) / "tokenizer.json", Path(folder) / "meta.pkl"
        if os.path.exists(path):
            found = cls.read(path)
            found.template = _read_template(Path(folder))
            return found
        return _read_meta_pkl(old) if os.path.exists(old) else None

    @classmethod
    def read(cls, path: Path) -> "Tokenizer":
        """A tokenizer.json of whatever name. Raises InputError for a damaged one."""
        import tokenizers

        try:
            return cls(tokenizers.Tokenizer.from_buffer(read_small(path, MOST_BYTES)))
        except BaseException as error:  # the library raises nothing narrower, and its panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            told = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is damaged ({told}): prepare the dataset again, or restore it") from error

    def save(self, folder: str | Path, name: str = "tokenizer.json") -> None:
        """Write what `load` and other programs read. Raises OSError where the disk does not take it."""
        Path(folder, name).write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        self._save_template(folder)

    def _save_template(self, folder: str | Path) -> None:
        if self.template is None:
            Path(folder, TEMPLATE).unlink(missing_ok=True)
        else:
            Path(folder, TEMPLATE).write_text(self.template, encoding="utf-8", newline="")

    def save_pretrained(self, folder: str | Path, context: int) -> None:
        """Write it as transformers' AutoTokenizer wants it: that one's ids are `encode`'s, and its texts `decode`'s.

        context: tokens of the longest text that the model reads. Raises OSError where the disk does not take it.
        """
        import tokenizers

        plain = tokenizers.Tokenizer.from_str(self._inner.to_str())
        plain.post_processor = None  # which could put tokens before and after a text that `encode` does not put there
        Path(folder, "tokenizer.json").write_text(plain.to_str(pretty=True), encoding="utf-8")
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context}
        settings["clean_up_tokenization_spaces"] = False
        if self.end_of_text is not None:
            settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self._save_template(folder)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both have the same id for every token."""
        return self._inner.get_vocab() == other._inner.get_vocab()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, those of <|endoftext|> and its like included. Raises InputError as `encode_ordinary` does."""
        if self._table is not None:
            return self.encode_ordinary(text).tolist()
        return self._ids(_without_surrogates(text))

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 of shape (tokens,), the names of special tokens taken as plain text; fast.

        Raises InputError for characters that the tokenizer does not have.
        """
        if self._table is not None:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            ids = self._table.take(points, mode="clip")
            ids[points >= len(self._table)] = _UNKNOWN
            if (ids == _UNKNOWN).any():
                unknown = [chr(point) for point in np.unique(points[ids == _UNKNOWN])]
                names = " ".join(map(repr, unknown[:10])) + (" …" if len(unknown) > 10 else "")
                raise InputError(
                    f"the character tokenizer has no id for {names}: leave such characters out, or use a dataset "
                    f"whose text holds them ({self.vocab_size} characters are known)"
                )
            return ids
        text = _without_surrogates(text)
        if self.name == "byte":
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        if self._fast is not None and not any(name in text for name in self._always_found):
            if self._fastest is not None and not _is_too_new(text):
                return self._fastest.encode(text)
            try:
                return self._fast.encode_to_numpy(text, disallowed_special=())
            except BaseException as error:  # a panic, no Exception, where a run of white space is too long for it
                if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                    raise
        self._inner.encode_special_tokens = True  # the library's name for "special tokens are plain text"
        try:
            return np.array(self._ids(text), dtype=np.uint32)
        finally:
            self._inner.encode_special_tokens = False

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of special tokens by their names."""
        added = self._inner.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added if token.special}

    @cached_property
    def _always_found(self) -> list[str]:
        """Added tokens that are not special ones, and so are found in ordinary text, which tiktoken does not do."""
        added = self._inner.get_added_tokens_decoder().values()
        return [token.content for token in added if not token.special]

    @cached_property
    def _fast(self) -> "tiktoken.Encoding | None":
        """tiktoken's encoder, where it gives the same ids as the tokenizer.json."""
        return _tiktokens(self._inner)

    @cached_property
    def _fastest(self) -> Any:
        """gigatoken's encoder, forty times as fast as tiktoken's, where it is installed and the words are GPT-2's."""
        told = json.loads(self._inner.to_str())
        if self._fast is None or _pattern(told["pre_tokenizer"] or {}) not in (PATTERNS["gpt2"], TIKTOKENS_GPT2):
            return None
        try:
            import gigatoken
        except ImportError:
            return None
        added = {token["content"] for token in told["added_tokens"]}
        told["added_tokens"] = []
        told["model"]["vocab"] = {token: rank for token, rank in told["model"]["vocab"].items() if token not in added}
        told["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        return gigatoken.Tokenizer.from_json(json.dumps(told))

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be sent to another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_fastest"}

    def _ids(self, text: str) -> list[int]:
        try:
            return self._inner.encode(text, add_special_tokens=False).ids
        except Exception as error:  # such as a table of words without one for those unknown
            raise InputError(f"the tokenizer has no ids for this text ({error}): use another tokenizer.json") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens by their names; bytes that are not UTF-8 become U+FFFD.

        Raises InputError for an id outside of the vocabulary.
        """
        if wrong := [token_id for token_id in ids if not 0 <= token_id < self.vocab_size]:
            raise InputError(
                f"id {wrong[0]} is not in the tokenizer's vocabulary of {self.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        return self._inner.decode(ids, skip_special_tokens=False)

    def label(self, token_id: int) -> str:
        """A token's text, or its bytes as <0xE6><0x97> where it is a part of a character."""
        text, letters = self.decode([token_id]), _byte_letters()
        spelled = self._inner.id_to_token(token_id) or ""
        if "\ufffd" not in text:
            return text
        if spelled.startswith("<0x") or not set(spelled) <= set(letters):  # written so by its own tokenizer
            return spelled
        return "".join(f"<0x{letters.index(letter):02X}>" for letter in spelled)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, `<path>.partial`: synced and renamed to `path` at the end, deleted if the block raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _cut_by(pattern: str | None) -> "tokenizers.pre_tokenizers.PreTokenizer":
    """Words by a pattern (None: all of the text is one), their bytes as letters."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])


def _portable(pattern: str) -> str:
    """A pattern of tiktoken's for Oniguruma, in whose syntax x{1,3}+ does not mean the possessive (?>x{1,3})."""
    return re.sub(r"(\\p\{\w+\}|\[(?:\\.|[^\]])*\]|\\?.)(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)


def _tiktokens(inner: "tokenizers.Tokenizer") -> "tiktoken.Encoding | None":
    """tiktoken's form of a byte-level BPE tokenizer whose ids it is sure to give, else None.

    Both merge neighbors, the earliest-learned pair first, but tiktoken merges any two whose union is a token, the
    library only the pairs that it lists. These are the same where each token is listed once, in the order of the ids,
    and is made of its own bytes: had tiktoken merged another pair into it first, the library would be stuck there.
    """
    import tiktoken
    import tokenizers

    told = json.loads(inner.to_str())
    model, pattern = told["model"], _pattern(told["pre_tokenizer"] or {})
    plain = {"dropout": (None, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
    if model["type"] != "BPE" or pattern is None or told["normalizer"] is not None or model.get("byte_fallback"):
        return None
    if any(model.get(name) not in values for name, values in plain.items()):
        return None
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    added = {token["content"] for token in told["added_tokens"]}
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in added}
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    made = ["".join(pair) for pair in pairs]
    spelled = all(letter in byte_of for letter in set("".join(vocab)))
    listed = byte_of.keys() <= vocab.keys() and len(vocab) == 256 + len(made) and set(made) == vocab.keys() - byte_of
    if not spelled or not listed or made != sorted(made, key=vocab.__getitem__):
        return None
    bpe = tokenizers.models.BPE(vocab, [(left, right) for left, right in pairs])
    if any(len(bpe.tokenize(token)) != 1 for token in made):
        return None
    ranks = {bytes([byte_of[letter] for letter in token]): rank for token, rank in vocab.items()}
    fast = tiktoken.Encoding("fast", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return fast


def _pattern(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """The pattern of a `pre_tokenizer` that `_cut_by` could have made, or the library's own of GPT-2; else None."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return PATTERNS["gpt2"]
    if len(steps) != 2 or last.get("use_regex", True) or steps[0].get("type") != "Split":
        return None
    split = steps[0]
    if split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        return None
    return split["pattern"]["Regex"]


def _is_too_new(text: str) -> bool:
    """Whether gigatoken may take other words for a text than tiktoken does."""
    if text.isascii():
        return False
    return bool(_new_points()[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].any())


@cache
def _new_points() -> np.ndarray:
    """For each code point, whether it is of UNICODE_17."""
    found = np.zeros(0x110000, dtype=bool)
    for first, last in UNICODE_17:
        found[first : last + 1] = True
    return found


def _without_surrogates(text: str) -> str:
    """Half surrogates (from "\\ud800" in JSON, or bytes that a shell could not decode) as U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2, 2019): itself where Latin-1
    prints it, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(0x100)]


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token, in order of rank: merging a token's bytes with only the ranks below its own
    leaves exactly the two parts that were merged last."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


# The codes that pickles of dicts, lists, strings and numbers are made of.
PLAIN = (
    b"\x80\x95.("  # protocol, frame, end, mark
    b"\x94qrhj"  # what is named, to come again
    b"}su]ae)t\x85\x86\x87"  # dicts, lists, tuples
    b"X\x8cJKM\x8aGN\x88\x89"  # strings, numbers, None, True, False
    b"c\x93"  # a class or function, for find_class to refuse by its name
)


class _PlainUnpickler(pickle._Unpickler):
    """Reads dicts, strings and numbers; a pickle that names any class or function is refused before it can run.

    Built on the library's reader in Python: the one in C takes gigabytes where a pickle of ten bytes asks for them.
    """

    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in PLAIN}

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def _read_template(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder, with the values of the names of special tokens that it may use. Raises
    InputError for a damaged file."""
    config, file = folder / "tokenizer_config.json", folder / TEMPLATE
    settings: dict[str, Any] = {}
    try:
        if config.exists():
            settings = read_json(config)
        template = read_small(file).decode() if file.exists() else settings.get("chat_template")
    except (OSError, ValueError) as error:
        raise InputError(f"the chat template in {folder} is damaged ({error}): restore it") from error
    if isinstance(template, list):  # several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    for name in ("bos_token", "eos_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and name in template and f"set {name} =" not in template:
            template = f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}" + template
    return template


def _read_meta_pkl(path: Path) -> Tokenizer:
    """The characters and their ids in nanoGPT's `meta.pkl`. Raises InputError where it holds anything else."""
    try:
        vocab = _PlainUnpickler(io.BytesIO(read_small(path))).load()["stoi"]
        if sorted(vocab.values()) != list(range(len(vocab))) or not all(len(character) == 1 for character in vocab):
            raise ValueError("stoi is not a table of characters with ids from 0 on")
        return Tokenizer._from_characters(dict(vocab))
    except Exception as error:  # broken pickles raise whatever their bytes happen to mean
        told = repr(error)[:200]
        raise InputError(f"{path} was not read ({told}): prepare the dataset again, or delete meta.pkl") from error
