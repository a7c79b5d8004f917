"""The playground over real connections, and in a real browser."""

import contextlib
import http.client
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from conftest import ROOT, Run, environment

import play
from model import GPT, GPTConfig
from nanogpt.errors import InputError
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.sampling import Sampling
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

BLOCK = 32
PLAIN = {"temperature": 1.0, "seed": 3}  # what `by_decoder` asks for


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, and <|endoftext|>."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, END_OF_TEXT])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return Tokenizer(inner)


def playground(tokenizer: Tokenizer, spare: int = 7) -> play.Playground:
    """Of random weights, so large that each token matters. spare: ids that the tokenizer does not have."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK}
    model = GPT(GPTConfig(**sizes, vocab_size=tokenizer.vocab_size + spare)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(9)
    return play.Playground(model, tokenizer, contextlib.nullcontext())


class Server:
    """A running one, its requests by hand."""

    def __init__(self, game: play.Playground, metrics: Path, port: int):
        self.game, self.metrics, self.port = game, metrics, port

    def ask(self, body: Any, method: str = "POST", path: str = "/api/generate", **headers: str) -> Any:
        """(status, JSON) of a request that does not stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def open(self, **request: Any) -> http.client.HTTPConnection:
        """A connection that has asked for a text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("POST", "/api/generate", json.dumps(request))
        return connection

    def events(self, **request: Any) -> list[dict[str, Any]]:
        return list(told(self.open(**request)))

    def generate(self, **request: Any) -> list[dict[str, Any]]:
        """The tokens of a text."""
        events = self.events(**PLAIN | request)
        assert "prompt_ids" in events[0]
        assert events[-1]["done"] is True
        return events[1:-1]


def told(connection: http.client.HTTPConnection) -> Iterator[dict[str, Any]]:
    with contextlib.closing(connection):
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/x-ndjson"
        while line := answer.readline():
            yield json.loads(line)


@contextlib.contextmanager
def serving(game: play.Playground, metrics: Path, door: socket.socket | None = None) -> Iterator[Server]:
    door = door or socket.create_server(("127.0.0.1", 0))
    port = door.getsockname()[1]
    server = play.server(play.application(game, game.about("tiny", "cpu"), metrics, port))
    thread = threading.Thread(target=server.run, args=([door],))
    thread.start()
    try:
        yield Server(game, metrics, port)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(playground(bytes_tokenizer()), tmp_path / "metrics.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for many requests: none of them may do it harm."""
    with serving(playground(bytes_tokenizer()), tmp_path_factory.mktemp("steady") / "metrics.jsonl") as running:
        yield running


def by_decoder(game: play.Playground, ids: list[int], count: int, **how: Any) -> list[tuple[int, float]]:
    """The ids of a text, and how likely the model found each."""
    sampling = Sampling(**PLAIN | how, vocab_size=game.vocab_size)
    tokens = Decoder(game.model).generate([ids], count, sampling, rivals=0)
    return [(token.id, math.exp(token.logprob or 0)) for (token,) in tokens]


def slowly(game: play.Playground, pause_s: float) -> list[list[int]]:
    """From now on each token takes a while. Returns the texts begun, as they begin."""
    write, begun = game.decoder.generate, []

    def slow(texts: Any, *args: Any, **keys: Any) -> Iterator[Any]:
        begun.append(texts[0])
        for tokens in write(texts, *args, **keys):
            time.sleep(pause_s)
            yield tokens

    game.decoder.generate = slow  # type: ignore[method-assign]
    return begun


def eventually(holds: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- texts


def test_a_text_is_the_decoder_s(server: Server):
    game = server.game
    ids = game.tokenizer.encode("To be")
    for how in (
        {},
        {"temperature": 0},
        {"temperature": 1e-300},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2, "seed": 8},
    ):
        tokens = server.generate(prompt="To be", max_new_tokens=2 * BLOCK, **how)
        expected = by_decoder(game, ids, 2 * BLOCK, **how | ({"temperature": 0} if how.get("temperature") else {}))
        assert [token["id"] for token in tokens] == [id for id, _ in expected]
        assert [token["p"] for token in tokens] == pytest.approx([p for _, p in expected], rel=1e-3)
    first, *_, last = server.events(prompt="To be", max_new_tokens=4)
    assert first == {"prompt_ids": ids, "prompt_texts": ["T", "o", " ", "b", "e"]}
    assert last["reason"] == "length"
    assert last["tokens_per_s"] > 0


def test_rivals_are_the_five_likeliest_others(server: Server):
    logits = server.game.model(torch.tensor([server.game.tokenizer.encode("To be")]))[0][0, -1]
    (token,) = server.generate(prompt="To be", max_new_tokens=1)
    real = [(i, p) for i, p in enumerate(logits.softmax(-1).tolist()) if i not in (token["id"], *range(257, 264))]
    best = sorted(real, key=lambda pair: -pair[1])[: len(token["rivals"])]
    assert len(best) >= 3  # five, but for the ids that the tokenizer does not have
    assert [(rival["id"], rival["p"]) for rival in token["rivals"]] == [
        (i, pytest.approx(p, rel=1e-3)) for i, p in best
    ]
    assert all(rival["text"] == server.game.tokenizer.label(rival["id"]) for rival in token["rivals"])
    with serving(playground(server.game.tokenizer, spare=0), server.metrics) as other:
        for temperature in (0, 3):  # the likeliest token itself, and others
            tokens = other.generate(prompt="To be", max_new_tokens=9, temperature=temperature)
            assert [len(token["rivals"]) for token in tokens] == [5] * 9


def test_a_branch_goes_on_from_ids(server: Server):
    text = server.events(prompt="ab", max_new_tokens=50, **PLAIN)
    prompt, tokens = text[0]["prompt_ids"], text[1:-1]
    ids = prompt + [token["id"] for token in tokens[:40]]
    assert len(ids) > BLOCK  # a branch may be further on than a prompt may be long
    assert [token["id"] for token in server.generate(ids=ids, max_new_tokens=10)] == [
        token["id"] for token in tokens[40:]
    ]
    other = [*ids, tokens[40]["rivals"][0]["id"]]
    expected = by_decoder(server.game, other, 10)
    assert [token["id"] for token in server.generate(ids=other, max_new_tokens=10)] == [id for id, _ in expected]


def test_texts_of_tokens_join_to_the_whole(server: Server):
    """Also where characters have bytes in several tokens, or in the prompt and the first tokens, or never get all."""
    tokenizer = server.game.tokenizer
    ids = tokenizer.encode("né😀")
    events = server.events(ids=ids[:-2], max_new_tokens=40, **PLAIN)
    assert events[0]["prompt_texts"] == ["n", "", "é", "", ""]
    written = [token["id"] for token in events[1:-1]]
    whole = "".join(events[0]["prompt_texts"] + [token["text"] for token in events[1:-1]])
    assert whole == tokenizer.decode(ids[:-2] + written)
    assert "\ufffd" in whole
    ends = [server.generate(ids=[0], max_new_tokens=1, seed=seed)[0] for seed in range(40)]
    assert all(token["text"] == tokenizer.decode([token["id"]]) for token in ends)
    assert any(token["text"] == "\ufffd" for token in ends)


def test_the_end_of_the_text_ends_it(server: Server):
    tokenizer = server.game.tokenizer
    assert server.events(prompt="", max_new_tokens=1)[0] == {"prompt_ids": [256], "prompt_texts": [END_OF_TEXT]}
    third = server.generate(prompt="a", max_new_tokens=9)[2]["id"]
    tokenizer.end_of_text = third
    *_, token, last = server.events(prompt="a", max_new_tokens=9, **PLAIN)
    assert (token["id"], last["reason"]) == (third, "stop")


# ---- what cannot be answered


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "a" * (BLOCK + 1)}, r"the prompt has 33 tokens, but the context ends at 32: shorten it"),
        ({"prompt": 5}, r"prompt: expected text, got int"),
        ({"prompt": None}, r"prompt: expected text"),
        ({"prompt": "a", "ids": [1]}, r"either a prompt, which is text, or ids"),
        ({}, r"either a prompt"),
        ([], r"either a prompt"),
        ("a", r"either a prompt"),
        ({"ids": []}, r"ids: expected a list of 1 to"),
        ({"ids": [1.0]}, r"ids: expected a list"),
        ({"ids": [True]}, r"ids: expected a list"),
        ({"ids": [-1]}, r"ids: expected a list"),
        ({"ids": "abc"}, r"ids: expected a list"),
        ({"ids": [0] * 50_001}, r"ids: expected a list of 1 to 50,000"),
        ({"ids": [257]}, r"id 257 is not one of the model's 257: send ids that you were sent"),
        ({"ids": [10**30]}, r"ids: expected a list"),
        ({"prompt": "a", "temperature": -1}, r"temperature: must be at least 0, is -1"),
        ({"prompt": "a", "temperature": "hot"}, r"temperature: expected a finite number, got 'hot'"),
        ({"prompt": "a", "temperature": None}, r"temperature: expected a finite number"),
        ({"prompt": "a", "temperature": True}, r"temperature: expected a finite number"),
        ({"prompt": "a", "temperature": [[1]]}, r"temperature: expected a finite number"),
        (b'{"prompt": "a", "temperature": NaN}', r"temperature: expected a finite number"),
        (b'{"prompt": "a", "temperature": Infinity}', r"temperature: expected a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', r"temperature: expected a finite number"),
        ({"prompt": "a", "top_k": 0}, r"top_k: must be at least 1, is 0"),
        ({"prompt": "a", "top_k": 1.5}, r"top_k: expected a whole number or None"),
        ({"prompt": "a", "top_p": 0}, r"top_p: must be above 0"),
        ({"prompt": "a", "top_p": 1.1}, r"top_p: must be at most 1"),
        ({"prompt": "a", "min_p": 1}, r"min_p: must be below 1"),
        ({"prompt": "a", "max_new_tokens": 0}, r"max_new_tokens: must be at least 1"),
        ({"prompt": "a", "max_new_tokens": 10**9}, r"max_new_tokens: must be at most 10000"),
        ({"prompt": "a", "seed": -1}, r"seed: must be at least 0"),
        ({"prompt": "a", "seed": 2**70}, r"seed: expected a whole number"),
        ({"prompt": "a", "temprature": 1}, r"'temprature' cannot be set: beside prompt or ids there are temperature, "),
        ({"prompt": "a", "\ud800": 1}, r"cannot be set"),
        (b"", r"the request is not JSON .*: send an object such as"),
        (b"{", r"the request is not JSON"),
        (b"\xff\xfe\xfa", r"the request is not JSON"),
        (b"[" * 100_000, r"nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"[" * 975 + b"]" * 975 + b"}", r"nested too deeply|expected a whole number"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", r"not JSON"),
    ],
)
def test_bad_requests(steady: Server, body: Any, message: str):
    status, answer = steady.ask(body)
    assert status == 400
    assert re.search(message, answer["error"])
    assert len(answer["error"]) <= 500
    assert steady.generate(prompt="ab", max_new_tokens=2)


def test_a_model_of_characters(tmp_path: Path):
    with serving(playground(Tokenizer.characters("abc\n")), tmp_path / "none") as server:
        status, answer = server.ask({"prompt": "abX\ud800"})
        assert (status, answer["error"][:45]) == (400, "the character tokenizer has no id for 'X' '\\u")
        status, answer = server.ask({"prompt": ""})
        assert (status, answer["error"]) == (
            400,
            "the prompt is empty, and this model knows no start of a text: type how it begins",
        )
        assert len(server.generate(prompt="ab", max_new_tokens=5, top_k=10**6)) == 5


def test_other_ways_to_ask(server: Server):
    for method, path, status in [
        ("GET", "/api/generate", 405),
        ("POST", "/", 405),
        ("DELETE", "/api/model", 405),
        ("GET", "/nothing", 404),
        ("GET", "/../play.py", 404),
        ("GET", "/api/metrics?after=-1", 400),
        ("GET", "/api/metrics?after=99999999999999999999", 400),
    ]:
        got, answer = server.ask(b"", method, path)
        assert (got, list(answer)) == (status, ["error"])


def test_only_its_own_page_is_answered(server: Server):
    here = f"127.0.0.1:{server.port}"
    good = {"prompt": "a", "max_new_tokens": 1}
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", "127.0.0.1:1", f"{here}.evil.example", ""):
        status, answer = server.ask(good, Host=host)
        assert (status, answer["error"]) == (421, f"this page has another address: open http://{here}")
    for origin in (
        "http://evil.example",
        "null",
        f"https://{here}",
        "http://127.0.0.1:1",
        f"http://{here}.evil.example",
    ):
        assert server.ask(good, Origin=origin)[0] == 403
    assert server.game.line == []
    for host in (here, f"localhost:{server.port}"):
        assert server.ask(b"", "GET", "/api/model", Host=host, Origin=f"http://{host}")[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert b"<!doctype html>" in answer.read()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    connection.close()


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_megabytes_is_not_read(server: Server, chunked: bool):
    piece = b" " * 2**16
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {100 * 2**20}"
        raw.sendall(f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{size}\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(OSError):  # the server hangs up
            while sent < 100 * 2**20:
                raw.sendall(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
                sent += len(piece)
        answer = raw.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the request is larger than 1,048,576 bytes: send less" in answer
    assert sent < 30 * 2**20  # what the system's buffers took
    assert server.generate(prompt="ab", max_new_tokens=2)


def test_a_body_that_does_not_come(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(play, "PATIENCE_S", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        start = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 50\r\n\r\n{{"
        raw.sendall(start.encode())
        assert server.generate(prompt="ab", max_new_tokens=2)
        assert raw.recv(2**16).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(start.encode())  # and goes away
    assert server.generate(prompt="ab", max_new_tokens=2)


def test_a_model_that_fails_and_one_that_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write = server.game.decoder.generate

    def broken(*args: Any, **keys: Any) -> Iterator[Any]:
        yield from list(write(*args, **keys))[:1]
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(server.game.decoder, "generate", broken)
        *_, last = server.events(prompt="ab", max_new_tokens=5)
    assert last == {
        "error": "the model failed (RuntimeError: out of luck); the terminal where play.py runs has the details"
    }
    assert "Traceback" in capsys.readouterr().err
    assert server.generate(prompt="ab", max_new_tokens=2)


# ---- the line


def test_requests_wait_in_the_open(server: Server):
    begun = slowly(server.game, 0.01)
    first = told(server.open(prompt="a", max_new_tokens=30))
    assert next(first)["prompt_ids"]
    second = told(server.open(prompt="b", max_new_tokens=5))
    assert next(second) == {"queued": 1}
    third = told(server.open(prompt="c", max_new_tokens=5))
    assert next(third) == {"queued": 2}
    assert len(list(first)) == 31
    assert next(third) == {"queued": 1}
    for text in (second, third):
        assert len(list(text)) == 7
    encode = server.game.tokenizer.encode
    assert begun == [encode("a"), encode("b"), encode("c")]


def test_who_leaves_is_dropped(server: Server):
    """While its text is written, while it waits, and before a word was read."""
    begun = slowly(server.game, 0.01)
    open_connection = server.open(prompt="a", max_new_tokens=10_000)
    eventually(lambda: len(begun) == 1)
    waiting = server.open(prompt="b", max_new_tokens=10_000)
    eventually(lambda: len(server.game.line) == 2)
    third = told(server.open(prompt="c", max_new_tokens=5))
    assert next(third) == {"queued": 2}
    waiting.close()
    assert next(third) == {"queued": 1}
    open_connection.close()
    assert len(list(third)) == 7
    assert begun == [server.game.tokenizer.encode(letter) for letter in "ac"]
    eventually(lambda: server.game.line == [])


def test_who_does_not_read_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(play, "PATIENCE_S", 0.5)
    game = playground(bytes_tokenizer())
    tokens = [next(game.decoder.generate([[1]], 1, rivals=6))] * 10_000
    monkeypatch.setattr(game.decoder, "generate", lambda texts, count, *a, **k: iter(tokens[:count]))
    door = socket.create_server(("127.0.0.1", 0))
    door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
    with serving(game, tmp_path / "none", door) as server, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "a", "max_new_tokens": 10000}'
        head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        eventually(lambda: len(game.line) == 1)
        began = time.monotonic()
        *_, last = server.events(prompt="b", max_new_tokens=3)
        assert last["done"] is True
        assert 0.2 < time.monotonic() - began < 4
        assert game.line == []


# ---- the run's curves


def test_curves_follow_the_file(server: Server):
    def ask(after: int = 0, file: str = "") -> Any:
        status, answer = server.ask(b"", "GET", f"/api/metrics?after={after}&file={file}")
        assert status == 200
        return answer

    assert ask() == {"file": "", "after": 0, "next": 0, "more": False, "points": []}
    server.metrics.write_text('{"step": 0, "train_loss": 4.2, "val_loss": 4.25, "time_s": 0}\n{"step": 1, "loss": 4')
    first = ask()
    assert first["points"] == [{"step": 0, "train_loss": 4.2, "val_loss": 4.25}]
    assert server.ask(b"", "GET", "/api/model")[1]["run"] is True
    with server.metrics.open("a") as file:
        file.write(
            '.1}\n{"step": 2, "loss": null}\nrubbish\n[1]\n{"step": "x"}\n{"step": 3, "loss": NaN, "val_loss": 3}\n'
        )
    second = ask(first["next"], first["file"])
    assert second["points"] == [{"step": 1, "loss": 4.1}, {"step": 2}, {"step": 3, "val_loss": 3}]
    assert second["after"] == first["next"]
    assert ask(second["next"], second["file"])["points"] == []
    # A resume drops lines: another file takes the name, and may soon be longer than the old one.
    other = server.metrics.with_name("other")
    other.write_text('{"step": 0, "loss": 5}\n' * 50)
    other.replace(server.metrics)
    third = ask(second["next"], second["file"])
    assert (third["after"], len(third["points"])) == (0, 50)
    server.metrics.write_text('{"step": 7, "loss": 5}\n')  # cut in place
    assert ask(third["next"], third["file"])["points"] == [{"step": 7, "loss": 5}]


def test_long_curves_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(play, "PIECE", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": {i}}}\n' for i in range(20)) + "x" * 250 + '\n{"step": 20}\n')
    points, at, file, more = [], 0, "", True
    while more:
        found = play.read_metrics(path, at, file)
        at, file, more = found["next"], found["file"], found["more"]
        points += found["points"]
    assert [point["step"] for point in points] == list(range(21))
    assert at == path.stat().st_size
    assert play.read_metrics(tmp_path, 0, "")["points"] == []


# ---- the program


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["play.py", "--out_dir=nowhere", "--port=0"])
    with pytest.raises(InputError, match=r"nowhere holds no checkpoint"):
        play.main()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(sys, "argv", ["play.py", f"--port={taken.getsockname()[1]}"])
        with pytest.raises(InputError, match=r"port=\d+: address already in use: give another, such as --port=8081"):
            play.main()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r'needs starlette and uvicorn: install them with pip install -e "\.\[play\]"'):
        play.main()


def test_ctrl_c_ends_it_quietly(run: Run):
    run(out_dir="out", max_iters=2, eval_interval=2)
    command = [sys.executable, ROOT / "play.py", "--out_dir=out", "--port=0", "--device=cpu"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    address = process.stdout.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+) is open; Ctrl-C closes it\n", address)
    assert found
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
    connection.request("POST", "/api/generate", json.dumps({"prompt": "ab", "max_new_tokens": 10_000}))
    assert connection.getresponse().readline() == b'{"prompt_ids": [0, 1], "prompt_texts": ["a", "b"]}\n'
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stderr.read() == "sampling from out/ckpt/step-000002\ninterrupted\n"
    assert process.stdout.read() == ""
    connection.close()


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as tools:
        yield tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Page:
    """A browser's page, its complaints, and what it asked the server for."""

    def __init__(self, page: Any, server: Server):
        self.page, self.server = page, server
        self.complaints: list[str] = []
        self.asked: list[dict[str, Any]] = []
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: request.method == "POST" and self.asked.append(request.post_data_json))
        page.goto(f"http://127.0.0.1:{server.port}/")
        self.write("<b>", 12)

    def write(self, prompt: str, count: int) -> None:
        """Type a prompt and have it continued by `count` tokens."""
        self.page.fill("#prompt", prompt)
        for field in self.page.locator("[name=max_new_tokens]:visible").all():
            field.fill(str(count))
        self.page.keyboard.press("Control+Enter")

    def text(self, column: int = 0) -> str:
        return self.page.locator(".text").nth(column).text_content()

    def says(self, what: str, column: int = 0) -> None:
        eventually(lambda: bool(re.fullmatch(what, self.page.locator(".state").nth(column).text_content())))


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    """A model whose texts are full of what HTML would be changed by."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "loss": {4 - i / 50}}}\n' for i in range(50)))
    with serving(playground(Tokenizer.characters("<b>/&; \n\tx"), spare=0), metrics) as server:
        opened = browser.new_page()
        yield (page := Page(opened, server))
        opened.close()
        assert page.complaints == []


@pytest.mark.slow
def test_a_text_in_the_browser(page: Page):
    page.says(r"12 tokens, [\d,.]+ tok/s")
    page.page.locator("[name=temperature]").first.fill("3")  # unlikely tokens too
    page.write("<b>", 30)
    page.says(r"30 tokens.*")
    tokens = page.server.generate(prompt="<b>", max_new_tokens=30, temperature=3, seed=1337)
    assert page.text() == "<b>" + "".join(token["text"] for token in tokens)
    spans = page.page.locator(".token").all()
    assert [span.text_content() for span in spans] == [token["text"] for token in tokens]
    shades = [float(span.evaluate("node => node.style.getPropertyValue('--doubt')")) for span in spans]
    assert shades == [pytest.approx(min(1, -math.log2(token["p"]) / 7), abs=1e-3) for token in tokens]
    newlines = [span.get_attribute("data-mark") for span in spans if "\n" in span.text_content()]
    assert newlines == ["↵"] * len(newlines)


@pytest.mark.slow
def test_a_branch_in_the_browser(page: Page):
    page.says(r"12 tokens.*")
    before, card = page.text(), page.page.locator("#rivals")
    tokens = page.server.generate(prompt="<b>", max_new_tokens=12, temperature=0.8, seed=1337)
    page.page.locator(".token").nth(4).hover()
    assert card.is_visible()
    rows = card.locator("button:enabled").all_text_contents()
    assert len(rows) == 5
    assert all(re.search(r"\d%$", row) for row in rows)
    assert card.locator("button:disabled").count() == 1
    rival = next(r for r in tokens[4]["rivals"] if r["text"] not in " \n\t")
    card.get_by_text(rival["text"], exact=True).click()
    page.says(r"12 tokens.*")
    prefix = page.server.game.tokenizer.encode("<b>") + [token["id"] for token in tokens[:4]]
    assert page.asked[-1]["ids"] == [*prefix, rival["id"]]
    assert page.text()[:8] == before[:7] + rival["text"]
    assert page.page.locator(".token").count() == 4 + 1 + 12  # those before the branch are still shaded
    page.page.get_by_role("button", name="Continue").first.click()
    eventually(lambda: page.page.locator(".token").count() == 4 + 1 + 24)
    page.says(r"12 tokens.*")
    for _ in range(2):
        page.page.get_by_role("button", name="Back").first.click()
    assert page.text() == before

    # The same by keys alone.
    page.page.locator(".text [tabindex='0']").first.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.page.keyboard.press(key)
    assert card.locator("button:focus").count() == 1
    page.page.keyboard.press("Enter")
    page.says(r"12 tokens.*")
    assert page.asked[-1]["ids"] == [*prefix[:4], tokens[1]["rivals"][0]["id"]]
    assert page.page.locator(".token:focus").get_attribute("data-at") == "4"
    page.page.keyboard.press("ArrowDown")
    assert card.is_visible()
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("Escape")
    assert card.is_hidden()


@pytest.mark.slow
def test_comparing_waiting_and_stopping_in_the_browser(page: Page):
    page.says(r"12 tokens.*")
    slowly(page.server.game, 0.02)
    page.page.check("#compare")
    page.page.locator("[name=temperature]").nth(1).fill("1.5")
    page.write("<b>", 30)
    page.says(r"writing, \d+ tok/s")
    page.says(r"waiting, 1 before it", column=1)
    for column in (0, 1):
        page.says(r"30 tokens.*", column)
    assert [asked["temperature"] for asked in page.asked[-2:]] == [0.8, 1.5]
    assert page.text(0) != page.text(1)
    page.write("<b>", 5000)
    eventually(lambda: len(page.server.game.line) == 2)
    page.page.keyboard.press("Escape")
    for column in (0, 1):
        page.says(r"stopped", column)
    eventually(lambda: page.server.game.line == [])
    page.write("<b>", 5000)
    eventually(lambda: len(page.server.game.line) == 2)
    page.page.goto("about:blank")
    eventually(lambda: page.server.game.line == [])


@pytest.mark.slow
def test_curves_and_faults_in_the_browser(page: Page):
    losses = page.page.locator("#losses")
    eventually(lambda: losses.text_content() == "train loss 3.020")
    drawn = page.page.locator("#plot path.train").get_attribute("d")
    with page.server.metrics.open("a") as file:
        file.write('{"step": 50, "loss": 2.5}\n{"step": 50, "val_loss": 2.625}\n{"step"')
    eventually(lambda: losses.text_content() == "train loss 2.500val loss 2.625")
    assert page.page.locator("#plot path.train").get_attribute("d") != drawn
    page.write("Q", 5)
    page.says(r"the character tokenizer has no id for 'Q': .*")
    assert len(page.complaints) == 1  # of the browser, that the status was 400
    page.complaints.clear()


@pytest.mark.slow
def test_dark_and_narrow_in_the_browser(page: Page):
    def background() -> str:
        return page.page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    light = background()
    page.page.emulate_media(color_scheme="dark")
    assert background() != light
    page.page.check("#compare")
    page.page.set_viewport_size({"width": 360, "height": 700})
    page.write("<b>", 300)
    page.says(r"300 tokens.*", column=1)
    assert page.page.evaluate("() => document.documentElement.scrollWidth") == 360
