"""Parse chunks of files into documents."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nanogpt.errors import InputError
from nanogpt.text.chat import CONTENT_KEYS, Messages, parse_messages
from nanogpt.text.omissions import Omissions
from nanogpt.text.reading import Chunk, ReadOptions

REPLACEMENT = "\ufffd".encode()
TEXT_IN_CHAT = "is a text, but conversations are rows of .jsonl or .parquet"


class Document(NamedTuple):
    """A document, or a piece of a long one."""

    place: str  # for messages
    text: bytes  # valid UTF-8; of a conversation: JSON, for its hash
    messages: Messages | None = None
    is_start: bool = True
    is_end: bool = True
    in_val: bool | None = None  # None: its hash decides

    @property
    def texts(self) -> list[str]:
        if self.messages is None:
            return [self.text.decode()]
        return [message[key] for message in self.messages for key in CONTENT_KEYS if key in message]

    @property
    def text_bytes(self) -> int:
        if self.messages is None:
            return len(self.text)
        return sum(len(text.encode("utf-8", "replace")) for text in self.texts)


class DocumentParser:
    """Parses chunks into documents with text; `omissions` counts everything else."""

    def __init__(self, options: ReadOptions):
        self.options = options
        self.omissions = Omissions()

    def parse(self, chunks: Iterable[Chunk]) -> Iterator[Document]:
        """Raises InputError for a bad row or file, unless options.skip_bad."""
        for chunk in chunks:
            if chunk.kind in ("lines", "rows"):
                yield from self._parse_rows(chunk)
            elif chunk.kind == "omitted":
                self.omissions.merge(chunk.data)
            elif chunk.kind == "bad":
                self.leave_out(chunk.name, chunk.data)
            elif not self.options.chat:
                text = self._replace_invalid(chunk.data, chunk.name, chunk.first)
                if text or not chunk.is_start:
                    yield Document(chunk.name, text, None, chunk.is_start, chunk.is_end, chunk.in_val)
                else:
                    self.omissions.add("empty", chunk.name)
            elif chunk.is_start:
                self.leave_out(chunk.name, TEXT_IN_CHAT)

    def leave_out(self, place: str, problem: object) -> None:
        """Count a bad row or file. Raises InputError unless options.skip_bad."""
        if not self.options.skip_bad:
            raise InputError(f"{place}: {problem}; correct it, or leave out what is bad with --skip_bad=True")
        self.omissions.add("bad", f"{place}: {problem}")

    def _parse_rows(self, chunk: Chunk) -> Iterator[Document]:
        for number, row in enumerate(chunk.data, chunk.first):
            place = f"{chunk.name}, {'line' if chunk.kind == 'lines' else 'row'} {number:,}"
            if chunk.kind == "lines" and not row.strip():
                self.omissions.add("blank", place)
                continue
            try:
                if chunk.kind == "lines":
                    row = json.loads(self._replace_invalid(row, place))
                if self.options.chat:
                    messages = parse_messages(row)
                    yield Document(place, json.dumps(messages, sort_keys=True).encode(), messages)
                    continue
                text = row if isinstance(row, bytes) else self._text_of(row).encode("utf-8", "surrogatepass")
            except (ValueError, RecursionError) as error:
                self.leave_out(place, error)
                continue
            if text:
                yield Document(place, self._replace_invalid(text, place))
            else:
                self.omissions.add("empty", place)

    def _text_of(self, row: Any) -> str:
        """The text of a row, "" if that is null. Raises ValueError if there is none."""
        key = self.options.text_key
        if isinstance(row, dict):
            if key not in row:
                hint = ", or use --chat=True" if row.keys() & {"messages", "prompt"} else ""
                keys = ", ".join(map(str, row)) or "nothing"
                raise ValueError(f'has no "{key}", but {keys}: name the column with --text_key{hint}')
            row = row[key]
        if row is not None and not isinstance(row, str):
            raise ValueError(f"{str(row)[:40]!r} is not a string")
        return row or ""

    def _replace_invalid(self, raw: bytes, place: str, offset: int = 0) -> bytes:
        """Replace bytes that are not UTF-8 by U+FFFD, as bytes.decode does, and count them."""
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            valid = raw.decode(errors="replace").encode()
            number = valid.count(REPLACEMENT) - raw.count(REPLACEMENT)
            self.omissions.add("replaced", f"{place}, byte {offset + error.start:,}", number)
            return valid
        return raw
