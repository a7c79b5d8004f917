"""Decode tokens to text as they are generated."""

import math
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

from nanogpt.generate.decoder import Decoder
from nanogpt.generate.sampling import Sampling, Token
from nanogpt.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet one
COLORS = (196, 208, 220, 154, 46)  # terminal colors of probabilities, from red to green


class TextStream:
    """Turns the tokens of one sample into text, as soon as no later token can change it.

    stop_strings: the text ends before the first of them. stop_ids: ids that end the text and are not part of it.
    prompt: the ids before the text, or the last few of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        stop_ids: Collection[int] = (),
        prompt: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.stop_strings = [stop for stop in stop_strings if stop]
        self.stop_ids = stop_ids
        self.is_stopped = False
        # Some tokenizers decode the first token of a text differently: decode the pending ids behind the one before.
        self._previous: list[int] = []
        self._pending: list[int] = []  # ids whose text is not complete
        self._num_returned = 0  # characters of the pending text that `put` has returned
        self._maybe_stop = ""  # the end of the text, if a stop string begins with it
        for token in prompt:
            self._append(token)

    def put(self, token: int) -> str:
        """Add a token. Returns the text that became certain."""
        if self.is_stopped:
            return ""
        if token in self.stop_ids:
            return self.close()
        return self._cut_at_stop(self._append(token))

    def close(self) -> str:
        """End the text. Returns its rest: incomplete characters, and what might have become a stop string."""
        if self.is_stopped:
            return ""
        text = self._cut_at_stop(self._decode(self._pending)[self._num_returned :])
        if not self.is_stopped:
            text += self._maybe_stop
            self.is_stopped = True
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        """Decode ids that follow the previous token."""
        return self.tokenizer.decode([*self._previous, *ids])[len(self.tokenizer.decode(self._previous)) :]

    def _append(self, token: int) -> str:
        """Add a token to the pending ones. Returns the new text that is complete."""
        self._pending.append(token)
        text = self._decode(self._pending)
        complete = text.rstrip(REPLACEMENT)
        # A character has at most four bytes, so at most three wait for their last.
        end = max(len(complete), len(text) - 3)
        new = text[self._num_returned : end]
        self._num_returned += len(new)

        if complete == text:
            if REPLACEMENT not in self.tokenizer.decode([token]):
                self._previous = [token]
            self._pending = []
            self._num_returned = 0
        return new

    def _cut_at_stop(self, new: str) -> str:
        """Add new text. Returns what is certain to precede any stop string."""
        text = self._maybe_stop + new
        stops = [text.index(stop) for stop in self.stop_strings if stop in text]
        if stops:
            self.is_stopped = True
            return text[: min(stops)]

        lengths = [n for stop in self.stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])]
        end = len(text) - max(lengths, default=0)
        self._maybe_stop = text[end:]
        return text[:end]


class SampleText:
    """One sample while it is generated; `text` is what remains to be printed.

    With show_probs each piece of text that the stream returns shows the joint probability of its tokens.
    """

    def __init__(self, stream: TextStream, prompt: str, show_probs: bool = False):
        self.stream = stream
        self.text = prompt
        self.show_probs = show_probs
        self.ids: list[int] = []
        self.logprob = 0.0  # of the tokens since the last piece

    def put(self, token: Token) -> None:
        if not self.stream.is_stopped:
            self.ids.append(token.id)
            self.logprob += token.logprob or 0.0
            self._add(self.stream.put(token.id))

    def close(self) -> None:
        self._add(self.stream.close())

    def _add(self, piece: str) -> None:
        if piece:
            self.text += with_probability(piece, math.exp(self.logprob)) if self.show_probs else piece
            self.logprob = 0.0


def with_probability(piece: str, probability: float) -> str:
    """Color text by its probability in a terminal, elsewhere give it a line of its own."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return f"\n{100 * probability:6.1f}%  {piece!r}"
    return f"\033[38;5;{COLORS[min(4, int(5 * probability))]}m{piece}\033[0m"


def print_in_order(samples: list[SampleText], separator: str) -> None:
    """Print samples one after another as far as they go, and remove those that ended from the list."""
    while samples:
        sample = samples[0]
        print(sample.text, end="")
        sample.text = ""
        if not sample.stream.is_stopped:
            break
        print(separator, end="")
        del samples[0]
    sys.stdout.flush()


def sample_text(model: Any, tokenizer: Tokenizer, characters: int, seed: int) -> str:
    """Sample `characters` characters of text without a prompt; the same weights and seed give the same text."""
    # Character tokenizers have no end of text. The first of their sorted characters is a newline in most datasets.
    end = tokenizer.end_of_text
    start = end if end is not None and end < model.config.vocab_size else 0
    sampling = Sampling(seed=seed, vocab_size=tokenizer.vocab_size)
    stream = TextStream(tokenizer)
    text = ""
    for (token,) in Decoder(model, length=characters + 1).generate([[start]], characters, sampling):
        text += stream.put(token.id)
        if len(text) >= characters:
            break
    model.train()
    return (text + stream.close())[:characters]
