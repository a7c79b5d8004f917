"""From tokens to text, as they come."""

from collections.abc import Collection, Sequence

from nanogpt.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoding puts in the place of bytes that are no character, or not yet one


class TextStream:
    """The text of a row as its tokens come: only what no later token can change, up to the first of the `stops`.

    before: the ids that the text goes on from, or the last of them. ends: ids that end the text, and are no part of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
        ends: Collection[int] = (),
    ):
        self.tokenizer, self.stops, self.ends = tokenizer, [stop for stop in stops if stop], ends
        self.stopped = False
        # Some tokenizers write a token differently at the beginning of a text: after whole characters one stays.
        self._anchor: list[int] = []
        self._open: list[int] = []  # the ids after it whose text is not all told
        self._told = 0  # characters of their text
        self._held = ""  # what might be the beginning of a stop
        for token in before:
            self._settled(token)

    def put(self, token: int) -> str:
        """What can be told now."""
        if self.stopped:
            return ""
        if token in self.ends:
            rest, self.stopped = self.close(), True
            return rest
        return self._up_to_stop(self._settled(token))

    def close(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        rest = self._up_to_stop(self._text(self._open)[self._told :])
        self._open, self._told = [], 0
        held, self._held = ("" if self.stopped else self._held), ""
        return rest + held

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([*self._anchor, *ids])[len(self.tokenizer.decode(self._anchor)) :]

    def _settled(self, token: int) -> str:
        """What is new in the text with one token more, and stays."""
        self._open.append(token)
        text = self._text(self._open)
        whole = text.rstrip(REPLACEMENT)
        # A character has four bytes at most: three may wait for the last.
        new = text[self._told : max(len(whole), len(text) - 3)]
        self._told += len(new)
        if whole == text:
            if REPLACEMENT not in self.tokenizer.decode([token]):
                self._anchor = [token]
            self._open, self._told = [], 0
        elif len(self._open) > 8:  # bytes that became no character: close those that nothing depends on
            for count in (4, 3, 2, 1):
                first = self._text(self._open[:count])
                if len(first) <= self._told and first + self._text(self._open[count:]) == text:
                    self._open, self._told = self._open[count:], self._told - len(first)
                    break
        return new

    def _up_to_stop(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        starts = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        held = max(starts, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
