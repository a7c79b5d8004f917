"""Text to ids and back: characters, bytes, byte pairs (GPT-2's or one's own), or whatever a `tokenizer.json` describes.

Every tokenizer is a Hugging Face `tokenizers.Tokenizer` inside, so that other programs load what `save` writes.
Fast paths for preparing data stand beside it: lookup tables for characters and bytes, and tiktoken and gigatoken (where
it is installed) wherever they are shown to give the same ids.
"""

import difflib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.errors import InputError
from nanogpt.files import read_json, read_small
from nanogpt.interop.safe_pickle import PlainUnpickler
from nanogpt.text.fast_bpe import (
    PATTERNS,
    TIKTOKEN_GPT2_PATTERN,
    byte_letters,
    has_new_code_points,
    merges_of_ranks,
    portable_pattern,
    split_pattern,
    to_tiktoken,
)

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
TURNS = ("<|im_start|>", "<|im_end|>")  # around each turn of a conversation, as Qwen's models have them
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
        letters = byte_letters()
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
        return cls._byte_level({letter: byte for byte, letter in enumerate(byte_letters())}, [], None, [END_OF_TEXT])

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
            initial_alphabet=byte_letters(),
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
        letters = byte_letters()
        spell = {token: "".join(letters[byte] for byte in token) for token in encoding._mergeable_ranks}
        vocab = {spell[token]: rank for token, rank in encoding._mergeable_ranks.items()} | encoding._special_tokens
        merges = [(spell[left], spell[right]) for left, right in merges_of_ranks(encoding._mergeable_ranks)]
        made = cls._byte_level(
            vocab, merges, portable_pattern(encoding._pat_str), [*encoding._special_tokens], encoding.name
        )
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
            if self._fastest is not None and not has_new_code_points(text):
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
        return to_tiktoken(self._inner)

    @cached_property
    def _fastest(self) -> Any:
        """gigatoken's encoder, forty times as fast as tiktoken's, where it is installed and the words are GPT-2's."""
        told = json.loads(self._inner.to_str())
        if self._fast is None or split_pattern(told["pre_tokenizer"] or {}) not in (
            PATTERNS["gpt2"],
            TIKTOKEN_GPT2_PATTERN,
        ):
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
        text, letters = self.decode([token_id]), byte_letters()
        spelled = self._inner.id_to_token(token_id) or ""
        if "\ufffd" not in text:
            return text
        if spelled.startswith("<0x") or not set(spelled) <= set(letters):  # written so by its own tokenizer
            return spelled
        return "".join(f"<0x{letters.index(letter):02X}>" for letter in spelled)


def _cut_by(pattern: str | None) -> "tokenizers.pre_tokenizers.PreTokenizer":
    """Words by a pattern (None: all of the text is one), their bytes as letters."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])


def _without_surrogates(text: str) -> str:
    """Half surrogates (from "\\ud800" in JSON, or bytes that a shell could not decode) as U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
        vocab = PlainUnpickler(io.BytesIO(read_small(path))).load()["stoi"]
        if sorted(vocab.values()) != list(range(len(vocab))) or not all(len(character) == 1 for character in vocab):
            raise ValueError("stoi is not a table of characters with ids from 0 on")
        return Tokenizer._from_characters(dict(vocab))
    except Exception as error:  # broken pickles raise whatever their bytes happen to mean
        told = repr(error)[:200]
        raise InputError(f"{path} was not read ({told}): prepare the dataset again, or delete meta.pkl") from error


GPT2_VOCAB = 50257
