"""The count of everything in the input that does not reach the dataset as it is."""

from dataclasses import dataclass, field
from typing import Any

KINDS = {  # each with its name in the line that is printed
    "bad": "bad rows or files left out",
    "hidden": "hidden files left out",
    "unknown": "files of other kinds left out",
    "linked": "links in archives left out",
    "duplicate": "files or folders that came a second time, read once",
    "empty": "documents without text left out",
    "blank": "blank lines left out",
    "separators": "document separators that became ends of documents",
    "replaced": "invalid bytes replaced by U+FFFD (--encoding names another encoding, such as cp1252)",
    "unread": "inputs not read to their end, because of --docs",
    "changed": "contents of messages changed or left out by the chat template",
    "normalized": "byte order marks left out, line ends (CRLF, CR) made newlines",
    "unencodable": "characters lost or replaced, because the tokenizer does not have them",
    "end_tokens": "end tokens that became ordinary tokens and ended no document (--document_separator splits there)",
}


@dataclass
class Omissions:
    """Counts by kind, with the first place of each. Files of other kinds have their suffix: "unknown.csv".

    Whatever leaves something out or changes it adds to one of these: they end in what prepare.py prints and in
    meta.json.
    """

    counts: dict[str, list[Any]] = field(default_factory=dict)  # kind -> [number, first place]

    def add(self, kind: str, place: str, number: int = 1) -> None:
        assert kind.partition(".")[0] in KINDS, kind
        if number:
            before, first = self.get(kind)
            readable = place.encode("utf-8", "backslashreplace").decode()  # a file's name may be no UTF-8
            self.counts[kind] = [before + number, first or readable]

    def get(self, kind: str) -> tuple[int, str]:
        number, first = self.counts.get(kind, (0, ""))
        return number, first

    def merge(self, later: "Omissions") -> None:
        for kind, (number, first) in later.counts.items():
            self.add(kind, first, number)

    def take(self) -> "Omissions":
        """Move the counts to a new object."""
        counts, self.counts = self.counts, {}
        return Omissions(counts)

    @property
    def lines(self) -> list[str]:
        """A line for each kind."""
        lines = []
        for kind, (number, first) in self.counts.items():
            kind, dot, suffix = kind.partition(".")
            name = f"{dot}{suffix} files left out" if suffix else KINDS[kind]
            lines.append(f"{name}: {number:,}; the first: {first}")
        return lines

    def print_lines(self) -> None:
        for line in self.lines:
            print(line)
