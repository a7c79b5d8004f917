"""Text to ids and back: characters, GPT-2's byte pairs, or whatever a `tokenizer.json` describes.

Every tokenizer is a Hugging Face `tokenizers.Tokenizer` inside, so that other programs load what `save` writes.
Two fast paths for preparing data stand beside it: a lookup table for characters, tiktoken for GPT-2.
"""

import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nanogpt import InputError
from nanogpt.files import read_small

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
MOST_BYTES = 64 * 2**20  # of a tokenizer.json; the largest published ones have half of that
_UNKNOWN = 2**32 - 1  # marks code points without an id in a lookup table


class Tokenizer:
    """Encodes and decodes text.

    Attributes: `name` ("char", "gpt2", or the kind of model in tokenizer.json, such as "bpe"), `vocab_size` (the
    largest id + 1), `end_of_text` (the id of <|endoftext|>, or None).
    """

    def __init__(self, inner: "tokenizers.Tokenizer", encoding: "tiktoken.Encoding | None" = None):
        vocab = inner.get_vocab()
        kind = type(inner.model).__name__
        is_char = kind == "WordLevel" and all(len(token) == 1 for token in vocab)
        self.name = "char" if is_char else encoding.name if encoding else kind.lower()
        self.vocab_size = max(vocab.values()) + 1
        self.end_of_text: int | None = vocab.get(END_OF_TEXT)
        inner.no_truncation()  # which a model's own tokenizer.json may ask for
        inner.no_padding()
        self._inner = inner
        self._encoding = encoding
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
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's byte pair encoding, 50,257 ids. Raises InputError where its files can not be had."""
        import tiktoken

        try:
            return cls.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # no network; a file whose hash is wrong
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"GPT-2's encoding could not be downloaded ({reason}): connect to the network, or set "
                "TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it"
            ) from error

    @classmethod
    def from_tiktoken(cls, encoding: "tiktoken.Encoding") -> "Tokenizer":
        """The same encoding as tiktoken's, id for id."""
        import tokenizers

        letters = _byte_letters()
        spell = {token: "".join(letters[byte] for byte in token) for token in encoding._mergeable_ranks}
        vocab = {spell[token]: rank for token, rank in encoding._mergeable_ranks.items()} | encoding._special_tokens
        merges = [(spell[left], spell[right]) for left, right in _merges(encoding._mergeable_ranks)]
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(encoding._pat_str), behavior="isolated"),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = tokenizers.decoders.ByteLevel()
        inner.add_special_tokens(list(encoding._special_tokens))
        return cls(inner, encoding)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer | None":
        """What `folder` holds: `tokenizer.json`, else nanoGPT's `meta.pkl`, else None.

        Nothing in a pickle is executed. Raises InputError for a damaged file.
        """
        path, old = Path(folder) / "tokenizer.json", Path(folder) / "meta.pkl"
        if os.path.exists(path):
            import tokenizers

            try:
                return cls(tokenizers.Tokenizer.from_buffer(read_small(path, MOST_BYTES)))
            except BaseException as error:  # the library raises nothing narrower, and its panics are no Exceptions
                if isinstance(error, KeyboardInterrupt):
                    raise
                told = " ".join(str(error).split())[:200]
                raise InputError(f"{path} is damaged ({told}): prepare the dataset again, or restore it") from error
        return _read_meta_pkl(old) if os.path.exists(old) else None

    def save(self, folder: str | Path, name: str = "tokenizer.json") -> None:
        """Write what `load` and other programs read. Raises OSError where the disk does not take it."""
        Path(folder, name).write_text(self._inner.to_str(pretty=True), encoding="utf-8")

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
        if self._encoding is not None:
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)
        self._inner.encode_special_tokens = True  # the library's name for "special tokens are plain text"
        try:
            return np.array(self._ids(text), dtype=np.uint32)
        finally:
            self._inner.encode_special_tokens = False

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
def aside(path: Path) -> Iterator[Path]:
    """A path to write to, `<path>.partial`: synced and renamed to `path` at the end, deleted if the block raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _without_surrogates(text: str) -> str:
    """Half surrogates (from "\\ud800" in JSON, or bytes that a shell could not decode) as U+FFFD, as tiktoken does."""
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
