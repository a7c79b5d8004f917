"""The playground's API over real connections."""

import asyncio
import contextlib
import json
import math
import re
import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from playground_server import (
    BLOCK_SIZE,
    Gate,
    Server,
    bytes_tokenizer,
    chat_tokenizer,
    make_playground,
    serve,
    wait_until,
)

from nanogpt.errors import InputError
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.sampling import Sampling
from nanogpt.playground import server as server_module
from nanogpt.playground.server import EventResponse, Playground
from nanogpt.text.chat import Chat
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

PLAIN: dict[str, Any] = {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests that leave it as it is."""
    with serve(make_playground(bytes_tokenizer()), tmp_path_factory.mktemp("run") / "metrics.jsonl") as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    with serve(make_playground(bytes_tokenizer()), tmp_path / "metrics.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model with a chat template; as a model's files may say, "~" ends a text too."""
    playground = make_playground(chat_tokenizer(), block_size=256, end_ids=chat_tokenizer().encode("~"))
    with serve(playground, tmp_path_factory.mktemp("run") / "metrics.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def characters() -> Playground:
    return make_playground(Tokenizer.characters("abc\n"))


def decode(playground: Playground, ids: list[int], count: int, **sampling: Any) -> list[tuple[int, float]]:
    """The ids that the decoder alone gives, with their probabilities."""
    plain = Sampling(**PLAIN | sampling, vocab_size=playground.vocab_size)
    tokens = Decoder(playground.model).generate([ids], count, plain, top_logprobs=0)
    return [(token.id, math.exp(token.logprob or 0)) for (token,) in tokens]


# --- Texts


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2, "seed": 8}])
def test_generate_matches_decoder(server: Server, settings: dict[str, Any]):
    ids = server.playground.tokenizer.encode("To be")
    request = PLAIN | settings | {"prompt": "To be", "max_new_tokens": 2 * BLOCK_SIZE}
    first, *tokens, last = server.stream(**request)
    assert first == {"prompt_ids": ids, "prompt_texts": ["T", "o", " ", "b", "e"]}
    expected = decode(server.playground, ids, 2 * BLOCK_SIZE, **settings)
    assert [token["id"] for token in tokens] == [id for id, _ in expected]
    assert [token["p"] for token in tokens] == pytest.approx([p for _, p in expected], rel=1e-5)
    assert last["reason"] == "length"
    assert last["tokens_per_s"] > 0


@pytest.mark.parametrize("extra_ids", [0, 100])
@pytest.mark.parametrize("temperature", [0, 3])  # the most probable token itself, and others
def test_generate_alternatives_are_the_five_most_probable(extra_ids: int, temperature: float):
    """Of the six most probable ids, less the token itself and those that the tokenizer does not have."""
    tokenizer = bytes_tokenizer()
    playground = make_playground(tokenizer, extra_ids)
    request = {"prompt": "To be", "max_new_tokens": 9, "temperature": temperature}
    start = playground.parse_request(json.dumps(request).encode())
    _, *tokens, _ = [event for batch in playground.event_batches(start) for event in batch]
    ids = tokenizer.encode("To be")
    for token in tokens:
        probs = playground.model(torch.tensor([ids]))[0][0, -1].softmax(-1).tolist()
        six = sorted(range(len(probs)), key=lambda id: -probs[id])[:6]
        best = [id for id in six if id < tokenizer.vocab_size and id != token["id"]][:5]
        assert [other["id"] for other in token["alternatives"]] == best
        assert [other["text"] for other in token["alternatives"]] == [tokenizer.label(id) for id in best]
        assert [other["p"] for other in token["alternatives"]] == pytest.approx([probs[id] for id in best], rel=1e-4)
        ids.append(token["id"])


def test_generate_continues_from_ids(server: Server):
    first, *tokens, _ = server.stream(prompt="ab", max_new_tokens=50, **PLAIN)
    ids = first["prompt_ids"] + [token["id"] for token in tokens[:40]]
    assert len(ids) > BLOCK_SIZE  # a text to continue may be longer than a prompt
    same = server.generate(ids=ids, max_new_tokens=10, **PLAIN)
    assert [token["id"] for token in same] == [token["id"] for token in tokens[40:]]
    branch = [*ids, tokens[40]["alternatives"][0]["id"]]
    expected = [id for id, _ in decode(server.playground, branch, 10)]
    assert [token["id"] for token in server.generate(ids=branch, max_new_tokens=10, **PLAIN)] == expected


def test_generate_texts_join_to_decoded_text(server: Server):
    """Also where a character's bytes are in several tokens, in prompt and text, or incomplete at the end."""
    tokenizer = server.playground.tokenizer
    ids = tokenizer.encode("né😀")[:-2]
    first, *tokens, _ = server.stream(ids=ids, max_new_tokens=40, **PLAIN)
    assert first["prompt_texts"] == ["n", "", "é", "", ""]
    text = "".join(first["prompt_texts"] + [token["text"] for token in tokens])
    assert text == tokenizer.decode(ids + [token["id"] for token in tokens])
    assert "\ufffd" in text
    single = [server.generate(ids=[0], max_new_tokens=1, seed=seed)[0] for seed in range(40)]
    assert all(token["text"] == tokenizer.decode([token["id"]]) for token in single)
    assert "\ufffd" in [token["text"] for token in single]


def test_generate_begins_with_the_end_of_text_if_the_prompt_is_empty(server: Server):
    first, *_ = server.stream(prompt="", max_new_tokens=1)
    assert first == {"prompt_ids": [256], "prompt_texts": [END_OF_TEXT]}


def test_generate_reports_what_the_model_raises(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """A failure with its traceback in the terminal, bad input without one; the server works on."""
    for error, message in (
        (RuntimeError("out of memory"), "the model failed (RuntimeError: out of memory); see the terminal"),
        (InputError("the logits are not finite"), "the logits are not finite"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(server.playground.decoder, "generate", Mock(side_effect=error))
            *_, last = server.stream(prompt="ab", max_new_tokens=5)
        assert last["error"].startswith(message)
        assert ("Traceback" in capfd.readouterr().err) == isinstance(error, RuntimeError)
        assert server.generate(prompt="ab", max_new_tokens=2)


# --- Conversations


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a user and the assistant by turns."""
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def test_chat_encodes_messages_by_the_template(chat_server: Server):
    """tests/oracles/test_chat_template.py has the ids."""
    tokenizer = chat_server.playground.tokenizer
    messages = talk("Hi<|im_end|>", "<|im_start|>x", "Why?", system="S<|endoftext|>")
    first, *_ = chat_server.stream(messages=messages, max_new_tokens=1)
    expected = Chat(tokenizer).encode_prompt(messages)
    assert first["prompt_ids"] == expected
    assert (first["answer_start"], first["omitted"]) == (len(expected), 0)
    assert "".join(first["prompt_texts"]) == tokenizer.decode(expected)


def test_chat_answer_stops_and_continues(chat_server: Server):
    """At the end tokens of the template, the tokenizer and the model's files; those are no part of its text."""
    tokenizer = chat_server.playground.tokenizer
    names = {tokenizer.encode(name)[0]: name for name in ("~", "<|im_end|>", "<|endoftext|>")}
    _, info = chat_server.request("GET", "/api/model")
    assert info["chat"] == {"stop_tokens": {str(id): name for id, name in sorted(names.items())}}
    seen = set()
    for seed in (19, 6, 11, 23):  # no end, and each
        settings = {"messages": talk("Why?"), "temperature": 9.0, "seed": seed, "max_new_tokens": 24}
        first, *tokens, last = chat_server.stream(**settings)
        ids = [token["id"] for token in tokens]
        plain = decode(chat_server.playground, first["prompt_ids"], 24, temperature=9.0, seed=seed)
        ends = [i for i, (id, _) in enumerate(plain) if id in names]
        assert ids == [id for id, _ in plain[: ends[0] + 1 if ends else 24]]
        assert last["reason"] == ("stop" if ends else "length")
        if ends:
            seen.add(names[ids[-1]])
            assert "".join(token["text"] for token in tokens) == tokenizer.decode(ids[:-1])
    assert seen == set(names.values())

    again, *rest, _ = chat_server.stream(**settings | {"ids": ids[:1]})
    assert again["prompt_ids"] == first["prompt_ids"] + ids[:1]
    assert again["answer_start"] == first["answer_start"]
    assert [token["id"] for token in rest] == ids[1:] != []


def test_text_stops_at_the_end_ids_of_the_model(chat_server: Server):
    ends = set()
    for seed in (3, 4, 6):  # no end, and each
        *tokens, last = chat_server.stream(prompt="abc", max_new_tokens=60, temperature=9, seed=seed)
        texts = [token["text"] for token in tokens[1:]]
        assert not {"~", END_OF_TEXT}.intersection(texts[:-1])
        assert (last["reason"] == "stop") == (texts[-1] in ("~", END_OF_TEXT))
        ends.add(texts[-1])
    assert {"~", END_OF_TEXT} <= ends


def test_chat_continues_what_the_assistant_began(chat_server: Server):
    tokenizer = chat_server.playground.tokenizer
    messages = talk("Why?", "So <|im_end|>b")
    first, *_ = chat_server.stream(messages=messages, max_new_tokens=1, ids=tokenizer.encode("c"))
    begun = tokenizer.encode_ordinary("So <|im_end|>bc").tolist()
    assert first["prompt_ids"][first["answer_start"] :] == begun
    assert "".join(first["prompt_texts"]).endswith("<|im_start|>assistant\nSo <|im_end|>bc")


def test_chat_leaves_out_the_oldest_messages(chat_server: Server):
    """Down to half of the context, 128 of 256 tokens; the system prompt and the last question are kept."""
    contents = [f"{i}{'x' * 19}" for i in range(9)]
    first, *_ = chat_server.stream(messages=talk(*contents, system="Sy"), max_new_tokens=1)
    text = "".join(first["prompt_texts"])
    assert text.startswith("<|im_start|>system\nSy<|im_end|>")
    assert [content for content in contents if content in text] == contents[6:]
    assert (len(first["prompt_ids"]), first["omitted"]) == (112, 6)  # with two messages more 173


# --- Bad requests


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": talk("x" * 250)}, r"the question.* 269 tokens, more than the context of 256; shorten it"),
        ({"messages": []}, r"messages: there is no question"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"messages: there is no question"),
        ({"messages": [{"role": "user", "content": "\ufdd0"}]}, r"noncharacters"),
        ({"messages": talk("?"), "prompt": "x"}, r"needs a prompt, messages or ids"),
        ({"messages": talk("?"), "ids": [1, 98]}, r"ids: one of them ends the answer"),
        ({"messages": talk("?"), "ids": [99]}, r"ids\.0: must be below 99"),
        ({"prompt": "a" * 257}, r"the prompt has 257 tokens, more than the context of 256"),
        ({"prompt": None}, r"prompt: expected text"),
        ({"prompt": "a", "ids": [1]}, r"needs a prompt, messages or ids"),
        ([], r"needs a prompt, messages or ids"),
        ({"ids": []}, r"ids: the list is empty"),
        ({"ids": [-1]}, r"ids\.0: must be at least 0"),
        (b'{"prompt": "a", "temperature": NaN}', r"temperature: expected a finite number"),
        ({"prompt": "a", "\ud800": 1}, r"no such key"),
        (b"\xff\xfe\xfa", r"not valid JSON"),
        (b"[" * 100_000, r"not valid JSON"),
        (b'{"prompt": "a", "seed": ' + b"[" * 975 + b"]" * 975 + b"}", r"not valid JSON|expected a whole number"),
    ],
)
def test_generate_refuses_bad_request(chat_server: Server, body: Any, problem: str):
    status, response = chat_server.request("POST", "/api/generate", body)
    assert status == 400
    assert re.search(problem, response["error"])
    assert "\n" not in response["error"]


def test_generate_names_every_setting_beyond_its_limits(server: Server):
    beyond = {"temperature": -1, "top_k": 0, "top_p": 0, "min_p": 1, "max_new_tokens": 10_001, "seed": -1}
    status, response = server.request("POST", "/api/generate", {"prompt": "a"} | beyond)
    assert status == 400
    assert re.findall(r"^request: (\w+): must be", response["error"], re.MULTILINE) == [*beyond]
    unknown = {f"key{n}": 1 for n in range(99)}
    _, response = server.request("POST", "/api/generate", {"prompt": "a"} | unknown)
    assert len(response["error"]) == 500  # a line of each would be longer


def test_parse_request_refuses_what_the_model_lacks(characters: Playground):
    without_row = make_playground(bytes_tokenizer(), extra_ids=-1)
    for playground, request, problem in (
        (characters, {"prompt": "abX\ud800"}, r"no id for 'X' '\\ud800'"),
        (characters, {"prompt": ""}, "prompt: is empty"),
        (characters, {"messages": talk("Why?")}, "messages: the model has no chat template"),
        (without_row, {"prompt": f"a{END_OF_TEXT}"}, r"the model has no row for <\|endoftext\|>; leave it out"),
    ):
        with pytest.raises(InputError, match=problem):
            playground.parse_request(json.dumps(request).encode())


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/api/generate", 405),
        ("POST", "/", 405),
        ("GET", "/../play.py", 404),
        ("GET", "/api/metrics?after=99999999999999999999", 400),
    ],
)
def test_app_reports_errors_as_json(server: Server, method: str, path: str, expected: int):
    status, response = server.request(method, path)
    assert (status, list(response)) == (expected, ["error"])


@pytest.mark.parametrize("is_chunked", [False, True])
def test_generate_does_not_read_large_body(server: Server, is_chunked: bool):
    size, sent, chunk = 100 * 2**20, 0, b" " * 2**16
    header = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {size}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
        with contextlib.suppress(OSError):  # the server closes the connection
            while sent < size:
                raw.sendall(b"10000\r\n" + chunk + b"\r\n" if is_chunked else chunk)
                sent += len(chunk)
        response = raw.recv(2**16)
    assert response.startswith(b"HTTP/1.1 413")
    assert sent < size / 2  # the buffers of the system
    assert server.generate(prompt="ab", max_new_tokens=2)


def test_generate_survives_incomplete_body(server: Server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        assert server.generate(prompt="ab", max_new_tokens=2)
    assert server.generate(prompt="ab", max_new_tokens=2)


# --- Other sites


@pytest.mark.parametrize(
    ("header", "value", "expected"),
    [
        ("Origin", "http://127.0.0.1:{port}", 200),
        ("Origin", "http://evil.example", 403),
        ("Origin", "http://127.0.0.1:1", 403),
        ("Origin", "http://127.0.0.1:{port}.evil.example", 403),
        ("Origin", "null", 403),
        ("Origin", "https://127.0.0.1:{port}", 403),
        # DNS rebinding: a name of another site that resolves to this machine.
        ("Host", "evil.example:{port}", 400),
        ("Host", "127.0.0.1.evil.example", 400),
        ("Host", "", 400),
    ],
)
def test_generate_refuses_other_sites(server: Server, header: str, value: str, expected: int):
    headers = {header: value.format(port=server.port)}
    response, content = server.exchange("POST", "/api/generate", {"prompt": "a", "max_new_tokens": 1}, **headers)
    assert response.status == expected
    assert (b"prompt_ids" in content) == (expected == 200)


def test_page_has_content_security_policy(server: Server):
    response, content = server.exchange("GET", "/", Host=f"localhost:{server.port}")
    assert b"<!doctype html>" in content
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


# --- The queue


def test_queue_reports_place(own_server: Server):
    gate = Gate(own_server.playground)
    first = own_server.stream(prompt="a", max_new_tokens=30)
    assert next(first)["prompt_ids"]
    second = own_server.stream(prompt="b", max_new_tokens=5)
    assert next(second) == {"queued": 1}
    third = own_server.stream(prompt="c", max_new_tokens=5)
    assert next(third) == {"queued": 2}
    gate.open()
    assert len(list(first)) == 31
    assert next(third) == {"queued": 1}
    for text in (second, third):
        assert len(list(text)) == 7
    encode = own_server.playground.tokenizer.encode
    assert gate.texts == [encode("a"), encode("b"), encode("c")]


def test_queue_drops_clients_that_leave(own_server: Server, monkeypatch: pytest.MonkeyPatch):
    """While they wait, and while the model generates: it stops after the step in progress."""
    monkeypatch.setattr(server_module, "FRAME_S", 0.0)  # each token is sent alone
    gate = Gate(own_server.playground)
    leaving = own_server.connect(prompt="a", max_new_tokens=10_000)
    wait_until(lambda: len(gate.texts) == 1)
    waiting = own_server.connect(prompt="b", max_new_tokens=10_000)
    wait_until(lambda: len(own_server.playground.queue) == 2)
    last = own_server.stream(prompt="c", max_new_tokens=5)
    assert next(last) == {"queued": 2}
    waiting.close()
    assert next(last) == {"queued": 1}
    leaving.close()
    wait_until(lambda: len(own_server.playground.queue) == 1)
    gate.open()
    assert len(list(last)) == 7
    assert gate.texts == [own_server.playground.tokenizer.encode(letter) for letter in "ac"]
    assert gate.steps == 1 + 5
    wait_until(lambda: own_server.playground.queue == [])


def test_queue_drops_clients_that_do_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, characters: Playground):
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 0.3)
    tokens = [next(characters.decoder.generate([[1]], 1, Sampling(), top_logprobs=4))] * 10_000
    monkeypatch.setattr(characters.decoder, "generate", lambda texts, count, *args, **kwargs: iter(tokens[:count]))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
    with serve(characters, tmp_path, listener) as server, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "a", "max_new_tokens": 10000}'
        head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        wait_until(lambda: len(characters.queue) == 1)
        *_, last = server.stream(prompt="b", max_new_tokens=3)
        assert last["done"] is True
        assert characters.queue == []


def test_event_response_limits_total_time_of_sending(monkeypatch: pytest.MonkeyPatch):
    """A client that reads a little at a time is dropped too, and the generator is closed at once."""
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 0.3)
    sent: list[Any] = []
    is_closed = False

    async def lines() -> AsyncGenerator[str, None]:
        nonlocal is_closed
        try:
            while True:
                yield "{}\n"
        finally:
            is_closed = True

    async def send(message: Any) -> None:
        sent.append(message)
        await asyncio.sleep(0.1)

    async def respond() -> None:
        await EventResponse(lines())({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert is_closed

    asyncio.run(asyncio.wait_for(respond(), timeout=30))
    assert 1 <= len(sent) <= 4


# --- The run's curves


def test_model_file_has_a_name_but_no_curves_and_no_chat(tmp_path: Path, characters: Playground):
    """A file as init_from, such as ckpt.pt, is no directory of a run."""
    (tmp_path / "ckpt.pt").write_bytes(b"weights")
    with serve(characters, tmp_path / "ckpt.pt" / "metrics.jsonl") as server:
        info = server.request("GET", "/api/model")[1]
        assert (info["name"], info["run"], info["chat"]) == ("tiny\ufffd", False, None)
        assert server.request("GET", "/api/metrics")[1]["points"] == []


def test_metrics_follow_file(own_server: Server):
    def fetch(offset: int = 0, file: str = "") -> Any:
        status, update = own_server.request("GET", f"/api/metrics?after={offset}&file={file}")
        assert status == 200
        return update

    assert fetch() == {"file": "", "after": 0, "next": 0, "points": []}
    own_server.metrics.write_text(
        '{"step": 0, "train_loss": 4.2, "val_loss": 4.25, "time_s": 0}\n{"step": 1, "loss": 4'
    )
    first = fetch()
    assert first["points"] == [{"step": 0, "train_loss": 4.2, "val_loss": 4.25}]
    with own_server.metrics.open("a") as file:
        file.write('.1}\n{"step": 2, "loss": null}\nrubbish\n[1]\n{"step": "x"}\n')
        file.write('{"step": 3, "loss": NaN, "val_loss": 3}\n')
    second = fetch(first["next"], first["file"])
    assert second["points"] == [{"step": 1, "loss": 4.1}, {"step": 2}, {"step": 3, "val_loss": 3}]
    assert second["after"] == first["next"]
    assert fetch(second["next"], second["file"])["points"] == []

    # A resume writes another file of this name, which may soon be longer than the old one.
    other = own_server.metrics.with_name("other")
    other.write_text('{"step": 0, "loss": 5}\n' * 50)
    other.replace(own_server.metrics)
    third = fetch(second["next"], second["file"])
    assert (third["after"], len(third["points"])) == (0, 50)
    own_server.metrics.write_text('{"step": 7, "loss": 5}\n')  # truncated
    assert fetch(third["next"], third["file"])["points"] == [{"step": 7, "loss": 5}]


def test_failures_of_the_server_are_reported(own_server: Server, capfd: pytest.CaptureFixture[str]):
    own_server.playground.parse_request = Mock(side_effect=ZeroDivisionError)  # type: ignore[method-assign]
    status, response = own_server.request("POST", "/api/generate", {"prompt": "a"})
    assert status == 500
    assert response["error"].startswith("the server failed (ZeroDivisionError); see the terminal")
    assert "Traceback" in capfd.readouterr().err


def test_a_text_may_fill_a_long_context(monkeypatch: pytest.MonkeyPatch, characters: Playground):
    monkeypatch.setattr(server_module, "MAX_IDS", 20)
    body = json.dumps({"prompt": "a" * BLOCK_SIZE}).encode()
    assert len(characters.parse_request(body).ids) == BLOCK_SIZE
    with pytest.raises(InputError, match=r"the text has 33 tokens, more than 32; shorten it"):
        characters.parse_request(json.dumps({"ids": [0] * (BLOCK_SIZE + 1)}).encode())
