"""Parse chunks of files into documents, and count everything that is left out or changed on the way."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanogpt.errors import InputError
from nanogpt.text.chat import CONTENT_KEYS, Messages, parse_messages
from nanogpt.text.sources import Chunk, ReadOptions

REPLACEMENT = "\ufffd".encode()


@dataclass
class Omissions:
    """Counts everything that does not reach the dataset as it is in the input, with the first place of each kind.

    Kinds: "replaced" (invalid bytes that become U+FFFD), "bad" (rows and files left out by --skip_bad), "empty"
    (documents without text), "ignored" (members of archives that are hidden or of an unknown kind).
    """

    counts: dict[str, list[Any]] = field(default_factory=dict)  # kind -> [number, first place]

    def add(self, kind: str, place: str, number: int = 1) -> None:
        before, first = self.get(kind)
        self.counts[kind] = [before + number, first or place]

    def get(self, kind: str) -> tuple[int, str]:
        number, first = self.counts.get(kind, (0, ""))
        return number, first

    def merge(self, later: "Omissions") -> None:
        for kind, (number, first) in later.counts.items():
            self.add(kind, first, number)


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
            elif chunk.kind == "bad":
                self.leave_out(chunk.name, chunk.data)
            elif chunk.kind == "ignored":
                self.omissions.add("ignored", f"{chunk.name}: {chunk.data}")
            elif not self.options.chat:
                text = self._replace_invalid(chunk.data, chunk.name, chunk.first)
                if text or not chunk.is_start:
                    yield Document(chunk.name, text, None, chunk.is_start, chunk.is_end, chunk.in_val)
                else:
                    self.omissions.add("empty", chunk.name)
            elif chunk.is_start:
                self.leave_out(chunk.name, "is a text, but conversations are rows of .jsonl or .parquet")

    def leave_out(self, place: str, problem: object) -> None:
        """Count a bad row or file. Raises InputError unless options.skip_bad."""
        if not self.options.skip_bad:
            raise InputError(f"{place}: {problem}; correct it, or leave out what is bad with --skip_bad=True")
        self.omissions.add("bad", f"{place}: {problem}")

    def _parse_rows(self, chunk: Chunk) -> Iterator[Document]:
        rows = chunk.data.split(b"\n") if chunk.kind == "lines" else chunk.data
        unit = "line" if chunk.kind == "lines" else "row"
        for number, row in enumerate(rows, chunk.first):
            place = f"{chunk.name}, {unit} {number:,}"
            if chunk.kind == "lines" and not row.strip():
                continue  # a blank line is not a row
            try:
                if chunk.kind == "lines":
                    row = json.loads(self._replace_invalid(row, place))
                if self.options.chat:
                    messages = parse_messages(row)
                    yield Document(place, json.dumps(messages, sort_keys=True).encode(), messages)
                    continue
                text = self._text_of(row)
            except (ValueError, RecursionError) as error:
                self.leave_out(place, error)
                continue
            if text:
                yield Document(place, self._replace_invalid(text.encode("utf-8", "surrogatepass"), place))
            else:
                self.omissions.add("empty", place)

    def _text_of(self, row: Any) -> str | None:
        """The text of a row. Raises ValueError if it has none."""
        key = self.options.text_key
        if isinstance(row, dict):
            if key not in row:
                hint = ", or use --chat=True" if row.keys() & {"messages", "prompt"} else ""
                keys = ", ".join(map(str, row)) or "nothing"
                raise ValueError(f'has no "{key}", but {keys}: name the column with --text_key{hint}')
            row = row[key]
        if row is not None and not isinstance(row, str):
            raise ValueError(f"{str(row)[:40]!r} is not a string")
        return row

    def _replace_invalid(self, raw: bytes, place: str, offset: int = 0) -> bytes:
        """Replace bytes that are not UTF-8 by U+FFFD, as bytes.decode does, and count them."""
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            valid = raw.decode(errors="replace").encode()
            number = valid.count(REPLACEMENT) - raw.count(REPLACEMENT)
            self.omissions.add("replaced", f"{place}, byte {offset + error.start:,}", number)
            return valid
        if not self.options.is_utf8 and REPLACEMENT in raw:  # the reader has replaced them
            self.omissions.add("replaced", place, raw.count(REPLACEMENT))
        return raw
