"""A playground of a tiny random model behind a real server, for the tests of its API and of its page."""

import contextlib
import http.client
import json
import os
import socket
import string
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from model import GPT, GPTConfig
from nanogpt.playground.server import Playground, create_app, create_server
from nanogpt.text.chat import CHATML_TEMPLATE, Chat
from nanogpt.text.tokenizer import CHATML_TOKENS, END_OF_TEXT, Tokenizer

BLOCK_SIZE = 32


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, and <|endoftext|>."""
    return byte_level(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), [END_OF_TEXT])


def chat_tokenizer() -> Tokenizer:
    """A token for each printable character of ASCII, and ChatML's special tokens and template."""
    letters = [{" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in string.printable[:95] + "\n"]
    tokenizer = byte_level(letters, [END_OF_TEXT, *CHATML_TOKENS])
    tokenizer.template = CHATML_TEMPLATE
    return tokenizer


def byte_level(letters: Sequence[str], special_tokens: Sequence[str]) -> Tokenizer:
    vocab = {letter: i for i, letter in enumerate([*letters, *special_tokens])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([*special_tokens])
    return Tokenizer(inner)


def make_playground(
    tokenizer: Tokenizer, extra_ids: int = 7, block_size: int = BLOCK_SIZE, end_ids: Sequence[int] = ()
) -> Playground:
    """Random weights, so large that each token matters. extra_ids: the model's ids that the tokenizer does not have."""
    torch.manual_seed(0)
    vocab_size = tokenizer.vocab_size + extra_ids
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(9)
    chat = Chat(tokenizer, end_ids) if tokenizer.template else None
    return Playground(model, tokenizer, contextlib.nullcontext(), chat=chat, end_ids=end_ids)


class Server:
    """A running server, and requests to it."""

    def __init__(self, playground: Playground, metrics: Path, port: int):
        self.playground = playground
        self.metrics = metrics
        self.port = port

    def exchange(
        self, method: str, path: str, body: Any = b"", **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """A whole response and its content, whatever that is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
            response = connection.getresponse()
            return response, response.read()

    def request(self, method: str, path: str, body: Any = b"") -> tuple[int, Any]:
        """The status and the JSON of a response that does not stream."""
        response, content = self.exchange(method, path, body)
        return response.status, json.loads(content)

    def connect(self, **request: Any) -> http.client.HTTPConnection:
        """A connection on which a text has been requested."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("POST", "/api/generate", json.dumps(request))
        return connection

    def stream(self, **request: Any) -> Iterator[dict[str, Any]]:
        """The events of a text as they come; the request is sent at once."""
        return read_events(self.connect(**request))

    def generate(self, **request: Any) -> list[dict[str, Any]]:
        """The token events of a text."""
        first, *tokens, last = (event for event in self.stream(**request) if "queued" not in event)
        assert "prompt_ids" in first
        assert last["done"] is True
        return tokens


def read_events(connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
    with contextlib.closing(connection):
        response = connection.getresponse()
        assert response.status == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        while line := response.readline():
            yield json.loads(line)


@contextlib.contextmanager
def serve(playground: Playground, metrics: Path, listener: socket.socket | None = None) -> Iterator[Server]:
    listener = listener or socket.create_server(("127.0.0.1", 0))
    # The name is that of a folder, which need not be UTF-8.
    heading = {"name": os.fsdecode(b"tiny\xff"), "parameters": 12_345, "device": "cpu"}
    server = create_server(create_app(playground, heading, metrics))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Server(playground, metrics, listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


class Gate:
    """Makes each token of a playground's texts wait for a permit. texts: those begun; steps: tokens generated."""

    def __init__(self, playground: Playground):
        self.permits = threading.Semaphore(0)
        self.texts: list[list[int]] = []
        self.steps = 0
        self._generate = playground.decoder.generate
        playground.decoder.generate = self._wait_and_generate  # type: ignore[method-assign]

    def _wait_and_generate(self, texts: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self.texts.append(texts[0])
        for tokens in self._generate(texts, *args, **kwargs):
            self.permits.acquire(timeout=10)
            self.steps += 1
            yield tokens

    def open(self) -> None:
        self.permits.release(10_000)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
