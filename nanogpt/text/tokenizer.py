"""Text to ids and back: characters, bytes, byte pairs (GPT-2's or trained), or any `tokenizer.json`.

Every tokenizer wraps a Hugging Face `tokenizers.Tokenizer`, so other programs can load what `save` writes. Preparing
data takes faster paths that are proven to give the same ids: lookup tables for our own characters and bytes, gigatoken
for published pipelines.
"""

import copy
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt.console import is_main
from nanogpt.errors import InputError
from nanogpt.files import read_json, read_small
from nanogpt.interop.safe_pickle import PlainUnpickler
from nanogpt.text.fast_bpe import (
    BYTE_DECODER,
    BYTE_ENCODER,
    PATTERNS,
    SAME_WORDS,
    is_lossless,
    load_gigatoken,
    make_byte_level_bpe,
    recover_merges,
    to_oniguruma,
)

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

GPT2_VOCAB = 50257
END_OF_TEXT = "<|endoftext|>"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")  # around each message of a conversation, as in Qwen's models
# Usual names of the token that ends a document, and of those that end a message. Tuned models name one of the latter as
# eos_token; pretraining has separated documents by the former.
ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
ENDS_OF_MESSAGE = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|return|>")
TEMPLATE_FILE = "chat_template.jinja"
SETTINGS_FILE = "tokenizer_config.json"
MAX_JSON_BYTES = 64 * 2**20  # limit of a tokenizer.json; the largest published ones have half of that
_UNKNOWN = 2**32 - 1  # marks code points without an id in a lookup table
_SAMPLE = 100_000  # characters that gigatoken and tokenizers both encode before gigatoken is trusted


class Tokenizer:
    """Encodes and decodes text.

    Attributes: `name` ("char", "byte", tiktoken's, such as "gpt2", or the type of model in tokenizer.json, such as
    "bpe"), `vocab_size` (the largest id + 1), `special_tokens` (their ids by name), `end_of_text` (the id that
    ends a document, or None), `template` (the Jinja chat template, or None), `named_tokens` (the special tokens that
    tokenizer_config.json names, such as "eos_token", which templates refer to).
    """

    def __init__(self, inner: "tokenizers.Tokenizer"):
        inner.no_truncation()  # a model's own tokenizer.json may set these, and dropout
        inner.no_padding()
        if getattr(inner.model, "dropout", None):
            inner.model.dropout = None
        self._inner = inner
        self._unproven = _SAMPLE

        vocab = inner.get_vocab()
        self.name = type(inner.model).__name__.lower()
        self.vocab_size = max(vocab.values()) + 1
        self.template: str | None = None
        self._id_table: np.ndarray | None = None  # the id of each code point
        if all(len(token) == 1 for token in vocab) and _has_same_pipeline(inner, _characters({})):
            self.name = "char"
            self._id_table = np.full(max(map(ord, vocab)) + 1, _UNKNOWN, dtype=np.uint32)
            self._id_table[[ord(character) for character in vocab]] = [*vocab.values()]
        elif vocab == BYTE_DECODER | {END_OF_TEXT: 256} and _has_same_pipeline(inner, _bytes()):
            self.name = "byte"

        self.name_tokens({})
        if self.end_of_text is not None:
            end = str(inner.id_to_token(self.end_of_text))
            self.named_tokens: dict[str, str] = {"bos_token": end, "eos_token": end}

    def name_tokens(self, named_tokens: dict[str, str]) -> None:
        """Set `named_tokens`, which become special tokens, and what depends on them."""
        vocab = self._inner.get_vocab()
        self.named_tokens = {key: token for key, token in named_tokens.items() if token in vocab}
        self._inner.add_special_tokens([*self.named_tokens.values()])  # as transformers does
        added = self._inner.get_added_tokens_decoder()
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}

        known = self.special_tokens.keys() | ({END_OF_TEXT} & vocab.keys())  # which need not be an added token
        ends = [token for token in ENDS_OF_TEXT if token in known]
        if (eos_token := self.named_tokens.get("eos_token")) is not None:
            ends.insert(len(ends) if eos_token in ENDS_OF_MESSAGE else 0, eos_token)
        self.end_of_text: int | None = vocab[ends[0]] if ends else None

    @classmethod
    def characters(cls, text: str) -> "Tokenizer":
        """The distinct characters of `text`, sorted, with ids from 0, as in nanoGPT. Raises InputError for no text."""
        if not text:
            raise InputError("the text is empty, so it has no characters for a vocabulary: give another text")
        return cls.from_characters({character: i for i, character in enumerate(sorted(set(text)))})

    @classmethod
    def from_characters(cls, vocab: dict[str, int]) -> "Tokenizer":
        """These characters with these ids."""
        return cls(_characters(vocab))

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The 256 bytes of UTF-8, by value, and <|endoftext|>: 257 ids."""
        return cls(_bytes())

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, pattern: str = "gpt2") -> "Tokenizer":
        """Byte-level BPE trained on `texts`: 256 bytes, merges, <|endoftext|>, <|im_start|> and <|im_end|>.

        vocab_size: ids, all of these included; fewer if too few pairs occur twice. pattern: a name in PATTERNS.
        The same texts give the same tokenizer. Raises InputError for an impossible vocab_size and for empty texts.
        """
        import tokenizers

        special_tokens = [END_OF_TEXT, *CHATML_TOKENS]
        smallest, largest = 256 + len(special_tokens), 2**24
        if not smallest <= vocab_size <= largest:
            raise InputError(
                f"--tokenizer=bpe:{vocab_size}: the vocabulary must have {smallest} (256 bytes and "
                f"{len(special_tokens)} special tokens) to {largest:,} ids; give such a size, for example bpe:8192"
            )
        nonempty = filter(None, texts)
        first = next(nonempty, None)
        if first is None:
            raise InputError("the texts are empty, so there are no byte pairs to learn: give other texts")

        trained = make_byte_level_bpe({}, [], [PATTERNS[pattern]], [])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(special_tokens),
            min_frequency=2,
            initial_alphabet=[*BYTE_DECODER],
            show_progress=False,
        )
        trained.train_from_iterator(map(replace_surrogates, itertools.chain([first], nonempty)), trainer)
        trained.add_special_tokens(special_tokens)
        return cls(trained)

    @classmethod
    def from_tiktoken(cls, encoding: "tiktoken.Encoding") -> "Tokenizer":
        """The same encoding as tiktoken's, id for id."""
        ranks, special_tokens = encoding._mergeable_ranks, encoding._special_tokens
        spellings = {token: "".join(BYTE_ENCODER[byte] for byte in token) for token in ranks}
        vocab = {spellings[token]: rank for token, rank in ranks.items()} | special_tokens
        merges = [(spellings[left], spellings[right]) for left, right in recover_merges(ranks)]
        tokenizer = cls(make_byte_level_bpe(vocab, merges, [to_oniguruma(encoding._pat_str)], [*special_tokens]))
        tokenizer.name = encoding.name
        return tokenizer

    @classmethod
    def from_name_or_path(cls, name: str) -> "Tokenizer":
        """A tiktoken encoding by its name (gpt2, cl100k_base …), byte, or a tokenizer.json, or a folder with one.

        Raises InputError if it is none of them, is damaged, or cannot be downloaded.
        """
        if name == "byte":
            return cls.bytes()
        import tiktoken

        encodings = tiktoken.list_encoding_names()
        if name in encodings:
            try:
                return cls.from_tiktoken(tiktoken.get_encoding(name))
            except (OSError, ValueError) as error:  # no network; a file with a wrong hash
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"tiktoken's encoding {name} could not be downloaded ({reason}): connect to the network, or set "
                    "TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it"
                ) from error

        path = Path(name)
        tokenizer = cls.load(path.parent, path.name) if os.path.isfile(name) else cls.load(path)
        if tokenizer is None:
            raise InputError(
                f"there is no tokenizer {name!r}: give a tokenizer.json, a folder that has one, byte, or an "
                f"encoding of tiktoken's ({', '.join(encodings)}); data/prepare.py also makes char and bpe:8192"
            )
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path, name: str = "tokenizer.json") -> "Tokenizer | None":
        """Load tokenizer.json and a chat template, else nanoGPT's meta.pkl; None if `folder` has neither.

        Nothing in a pickle is executed. Raises InputError for a damaged file.
        """
        import tokenizers

        path, old_path = Path(folder, name), Path(folder, "meta.pkl")
        if not os.path.exists(path):
            return _read_meta_pkl(old_path) if os.path.exists(old_path) else None
        try:
            tokenizer = cls(tokenizers.Tokenizer.from_buffer(read_small(path, MAX_JSON_BYTES)))
        except BaseException as error:  # the library raises nothing narrower, and its panics are not Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is damaged ({reason}): prepare the dataset again, or restore it") from error
        tokenizer._read_settings(Path(folder))
        return tokenizer

    def _read_settings(self, folder: Path) -> None:
        """Read the chat template, and the special tokens that the files beside tokenizer.json name."""
        settings: dict[str, Any] = {}
        try:
            for file in (SETTINGS_FILE, "special_tokens_map.json", "generation_config.json", "config.json"):
                if (folder / file).exists():
                    settings = read_json(folder / file) | settings
            if (folder / TEMPLATE_FILE).exists():
                settings["chat_template"] = read_small(folder / TEMPLATE_FILE).decode()
        except (OSError, ValueError) as error:
            raise InputError(f"the tokenizer or chat template in {folder} is damaged ({error}): restore it") from error

        template = settings.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = by_name.get("default")
        self.template = template if isinstance(template, str) else None

        contents = {key: entry.get("content") if isinstance(entry, dict) else entry for key, entry in settings.items()}
        named = {key: name for key, name in contents.items() if key.endswith("_token") and isinstance(name, str)}
        ids = settings.get("eos_token_id")  # of a model
        for token_id in ids if isinstance(ids, list) else [ids]:
            if "eos_token" not in named and isinstance(token_id, int) and (name := self._inner.id_to_token(token_id)):
                named["eos_token"] = name
        if named:
            self.name_tokens(named)

    def save(self, folder: str | Path, name: str = "tokenizer.json") -> None:
        """Write the files that `load` and other programs read. Raises OSError if the disk refuses."""
        Path(folder, name).write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        settings = json.dumps(self.named_tokens, indent=2) + "\n" if self.named_tokens else None
        for file, content in ((TEMPLATE_FILE, self.template), (SETTINGS_FILE, settings)):
            if content is None:
                Path(folder, file).unlink(missing_ok=True)
            else:
                Path(folder, file).write_text(content, encoding="utf-8", newline="")

    def save_pretrained(self, folder: str | Path, context: int, *, names_unk: bool = False) -> None:
        """Write the files of transformers' AutoTokenizer, which then encodes and decodes as this one does.

        context: tokens of the longest text that the model reads. names_unk: the end of text is the unk_token too, if
        there is no other and no text is unknown. Raises OSError if the disk refuses.
        """
        import tokenizers

        content = self.to_json()
        content["post_processor"] = None  # it could add tokens around a text, which `encode` does not
        split = json.dumps(content["pre_tokenizer"])
        for pattern, published in SAME_WORDS.items():  # the spellings that other programs know
            split = split.replace(json.dumps(pattern), json.dumps(published))
        content["pre_tokenizer"] = json.loads(split)
        plain = copy.copy(self)
        plain._inner = tokenizers.Tokenizer.from_str(json.dumps(content))
        plain.save(folder)

        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
        }
        if names_unk and self.end_of_text is not None and self._lossy is None:
            settings["unk_token"] = self._inner.id_to_token(self.end_of_text)
        settings |= self.named_tokens
        Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def check_rows(self, rows: int) -> None:
        """Print the special tokens that a model with this many ids lacks. Raises InputError if it lacks others."""
        without_row = [name for name, token_id in self.special_tokens.items() if token_id >= rows]
        if self.vocab_size - len(without_row) > rows:
            raise InputError(f"the tokenizer has {self.vocab_size} ids, the model {rows}: it belongs to another model")
        if without_row and is_main():
            print(
                f"the model has no embedding for {', '.join(without_row)}: text that contains it is refused",
                file=sys.stderr,
            )

    @property
    def start_of_text(self) -> str:
        """The token that other programs put before every text, as tokenizer.json says; `encode` does not."""
        first = "".join(self._inner.encode("").tokens[:1])
        return first if first in self.special_tokens else ""

    @property
    def vocab(self) -> dict[str, int]:
        """The id of each token."""
        return self._inner.get_vocab()

    def to_json(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        return json.loads(self._inner.to_str())

    def named_id(self, name: str) -> int | None:
        """The id of one of `named_tokens`, such as "eos_token"."""
        return self._inner.token_to_id(self.named_tokens.get(name, ""))

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process, without gigatoken's encoder, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_gigatoken"}

    @cached_property
    def _gigatoken(self) -> Any:
        return load_gigatoken(self.to_json())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with <|endoftext|> and the like as special tokens. Raises InputError as `encode_ordinary`."""
        if self._id_table is not None:
            return self.encode_ordinary(text).tolist()
        return self._encode_plainly(replace_surrogates(text)).ids

    def encode_with_spans(self, text: str, ordinary: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text`, uint32 (tokens,), and where each begins and ends in it, (tokens, 2), in characters.

        ordinary: the names of special tokens are plain text. Raises InputError as `encode_ordinary`.
        """
        if self._byte_level and not ordinary:  # many times as fast
            added_token, lengths = self._byte_level
            parts = added_token.split(text)  # text, added token, text …
            ids = [self.encode_ordinary(part) for part in parts]
            ids[1::2] = [np.array([self._inner.token_to_id(part)], dtype=np.uint32) for part in parts[1::2]]
            all_ids = np.concatenate(ids)
            ends = np.cumsum(lengths[all_ids])
            utf8 = np.frombuffer(text.encode(), dtype=np.uint8)
            if ends.max(initial=0) == len(utf8):  # otherwise the normalizer changes the text
                number = np.cumsum(utf8 & 0xC0 != 0x80)  # of the character that a byte is part of, from 1
                return all_ids, np.stack([number[ends - lengths[all_ids]] - 1, number[ends - 1]], axis=1)

        encoding = self._encode_plainly(text, ordinary)
        return np.array(encoding.ids, dtype=np.uint32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def _byte_level(self) -> tuple[re.Pattern[str], np.ndarray] | None:
        """The added tokens as a pattern, and the number of bytes in each token; None if they may be found otherwise."""
        content = self.to_json()
        added = {token["content"]: token for token in content["added_tokens"]}
        options = ["lstrip", "rstrip", "single_word"] + ["normalized"] * (content["normalizer"] is not None)
        takes_more = any(token[option] for token in added.values() for option in options)
        if takes_more or self._adds_space or '"ByteLevel"' not in json.dumps(content["pre_tokenizer"]):
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in content["model"]["vocab"].items():
            lengths[token_id] = len(token)
        for token, entry in added.items():
            lengths[entry["id"]] = len(token.encode())
        longest_first = sorted(added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})"), lengths

    @cached_property
    def _adds_space(self) -> bool:
        content = self.to_json()
        steps = json.dumps([content["normalizer"], content["pre_tokenizer"]])
        return re.search(r'"Prepend"|"Metaspace"|"add_prefix_space": true', steps) is not None

    def encode_continuation(self, text: str) -> np.ndarray:
        """Ids of a text that follows a newline, as `encode_ordinary`, but without a space added to its start."""
        if self._adds_space:
            newline, ids = self.encode_ordinary("\n"), self.encode_ordinary("\n" + text)
            if np.array_equal(ids[: len(newline)], newline):
                return ids[len(newline) :]
        return self.encode_ordinary(text)

    def encode_ordinary(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 of shape (tokens,), the names of special tokens taken as plain text; fast.

        Raises InputError for characters that the tokenizer does not have.
        """
        if self._id_table is not None:
            return self._encode_characters(text)
        text = replace_surrogates(text)
        if self.name == "byte":
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

        ids = self._gigatoken(text) if self._gigatoken else None
        sample = text[: self._unproven] if ids is not None else ""
        if sample:
            self._unproven -= len(sample)
            if self._gigatoken(sample).tolist() != self._encode_plainly(sample, ordinary=True).ids:
                print("gigatoken and tokenizers give different ids for this text; using tokenizers", file=sys.stderr)
                self._gigatoken = None
                ids = None
        return np.array(self._encode_plainly(text, ordinary=True).ids, dtype=np.uint32) if ids is None else ids

    def _encode_characters(self, text: str) -> np.ndarray:
        assert self._id_table is not None
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._id_table.take(points, mode="clip")
        ids[points >= len(self._id_table)] = _UNKNOWN
        is_unknown = ids == _UNKNOWN
        if is_unknown.any():
            unknown = [repr(chr(point)) for point in np.unique(points[is_unknown])]
            names = " ".join(unknown[:10]) + (" …" if len(unknown) > 10 else "")
            raise InputError(
                f"the character tokenizer has no id for {names}: leave such characters out, or use a dataset "
                f"whose text has them (its vocabulary has {self.vocab_size} characters)"
            )
        return ids

    def _encode_plainly(self, text: str, ordinary: bool = False) -> "tokenizers.Encoding":
        self._inner.encode_special_tokens = ordinary  # the library's name for "special tokens are plain text"
        try:
            return self._inner.encode(text, add_special_tokens=False)
        except Exception as error:  # such as a word-level model without a token for unknown words
            raise InputError(f"the tokenizer has no ids for this text ({error}): use another tokenizer.json") from error

    @property
    def changes(self) -> list[str]:
        """The normalizers that change text for good, such as Lowercase or NFC."""
        kinds = re.findall(r'"type": "(\w+)"', json.dumps(self.to_json()["normalizer"]))
        return [kind for kind in kinds if kind not in ("Sequence", "Prepend", "Replace")]

    def print_changes(self) -> None:
        """Name the normalizers that change the text of a dataset, if there are any."""
        changes = self.changes
        if changes:
            print(f"the tokenizer's normalizer changes some characters: {', '.join(changes)}")

    def count_lost_characters(self, text: str) -> int:
        """The number of characters that are not in the ids of `text`: dropped, or replaced by the unknown token.

        What the normalizer changes is not counted.
        """
        if self._lossy is None:
            return 0
        text = replace_surrogates(text)
        if self._inner.normalizer:
            text = self._inner.normalizer.normalize_str(text)
        plain, unknown, lost_bytes = self._lossy
        # Before encoding, because the library's spans are wrong after a byte that it drops.
        lost = [character for character in set(text) if not lost_bytes.isdisjoint(character.encode())]
        rest = text.translate(dict.fromkeys(map(ord, lost)))
        is_lost = np.ones(len(rest), dtype=bool)
        for token_id, (start, end) in zip(*plain.encode_with_spans(rest, ordinary=True), strict=True):
            if token_id != unknown:
                is_lost[start:end] = False
        return len(text) - len(rest) + int(np.count_nonzero(is_lost))

    @cached_property
    def _lossy(self) -> "tuple[Tokenizer, int | None, set[int]] | None":
        """This tokenizer without normalizer, the id for unknown text, the bytes without ids; None if lossless."""
        import tokenizers

        content = self.to_json()
        if self._id_table is not None or is_lossless(content):
            return None
        plain = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content | {"normalizer": None})))
        model = content["model"]
        unknown = model["unk_id"] if model["type"] == "Unigram" else plain._inner.token_to_id(model["unk_token"] or "")
        is_byte_level = '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
        lost_bytes = {byte for byte in range(256) if is_byte_level and BYTE_ENCODER[byte] not in model["vocab"]}
        return plain, unknown, lost_bytes

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens by name; bytes that are not UTF-8 become U+FFFD.

        Raises InputError for an id outside the vocabulary.
        """
        invalid = [token_id for token_id in ids if not 0 <= token_id < self.vocab_size]
        if invalid:
            raise InputError(
                f"id {invalid[0]} is not in the tokenizer's vocabulary of {self.vocab_size}: "
                "use the tokenizer that the model was trained with"
            )
        return self._inner.decode(ids, skip_special_tokens=False)

    def label(self, token_id: int) -> str:
        """A token's text, or its bytes as <0xE6><0x97> if they are part of a character."""
        text = self.decode([token_id])
        if "\ufffd" not in text:
            return text
        token = self._inner.id_to_token(token_id) or ""
        if token.startswith("<0x") or not set(token) <= BYTE_DECODER.keys():  # it spells bytes its own way
            return token
        return "".join(f"<0x{BYTE_DECODER[character]:02X}>" for character in token)


def _characters(vocab: dict[str, int]) -> "tokenizers.Tokenizer":
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    any_character = tokenizers.Regex(r"[\s\S]")  # a plain dot does not match newlines
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(any_character, behavior="isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return inner


def _bytes() -> "tokenizers.Tokenizer":
    return make_byte_level_bpe(BYTE_DECODER, [], [], [END_OF_TEXT])


def _has_same_pipeline(one: "tokenizers.Tokenizer", other: "tokenizers.Tokenizer") -> bool:
    """True if both differ in their vocabulary at most."""
    contents = [json.loads(tokenizer.to_str()) for tokenizer in (one, other)]
    for content in contents:
        del content["model"]["vocab"]
    return contents[0] == contents[1]


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates (from "\\ud800" in JSON, or undecodable bytes of a shell) by U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _read_meta_pkl(path: Path) -> Tokenizer:
    """The characters and ids in nanoGPT's `meta.pkl`. Raises InputError if it holds anything else."""
    try:
        vocab = PlainUnpickler(io.BytesIO(read_small(path))).load()["stoi"]
        if sorted(vocab.values()) != list(range(len(vocab))) or any(len(character) != 1 for character in vocab):
            raise ValueError("stoi does not map characters to ids from 0 up")
        return Tokenizer.from_characters(dict(vocab))
    except Exception as error:  # broken pickles raise whatever their bytes happen to mean
        reason = repr(error)[:200]
        raise InputError(f"{path} was not read ({reason}): prepare the dataset again, or delete meta.pkl") from error
