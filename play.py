"""A page to play with a trained GPT: python play.py --out_dir=out-shakespeare-char

The page is play.html, served to this machine alone. The model writes one text at a time: requests that come meanwhile
stand in line and are told their place, and one whose reader has left is dropped.
"""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from configurator import build, key, parse
from model import GPT
from nanogpt import distributed
from nanogpt.device import describe_device
from nanogpt.errors import InputError, run_script
from nanogpt.files import matches_schema, regular_file_size
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.sampling import Sampling
from nanogpt.generate.stream import TextStream
from nanogpt.text.tokenizer import Tokenizer
from sample import load, prepare

RIVALS = 5  # shown beside each token
MOST_BYTES = 2**20  # of a request
MOST_IDS = 50_000  # of a text that goes on
PATIENCE_S = 10.0  # that a client may take to send its request, and in all to take its text
FRAME_S = 1 / 30  # tokens that come within a frame of the screen travel together
PIECE = 4 * 2**20  # bytes of metrics.jsonl that are read at a time
EXAMPLE = '{"prompt": "ROMEO:", "temperature": 0.8}'
Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class PlayConfig:
    """Which model to play with, and where."""

    init_from: str = key(
        "resume", "resume: out_dir's run; or gpt2*, a hub id, a folder, nanoGPT's ckpt.pt", group="Model"
    )
    out_dir: str = key("out", "folder of the run, whose curves the page shows")
    checkpoint: str = key("best", "of the run: best, latest, step-NNNNNN or its folder")

    port: int = key(8080, "of the page on 127.0.0.1; 0: any that is free", group="Machine", ge=0, le=65535)
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of the weights")
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")


@dataclass
class Settings:
    """What a request may set. Requests are checked by this table, and the page takes its controls' limits from it."""

    temperature: float = key(0.8, "1 = the model's own odds, less = safer, 0 = always the likeliest", ge=0, le=100)
    top_k: int | None = key(None, "draw from this many likeliest tokens only; empty: from all", ge=1)
    top_p: float = key(1.0, "draw from the likeliest that together have this probability", gt=0, le=1)
    min_p: float = key(0.0, "leave out what is less than this share as likely as the likeliest", ge=0, lt=1)
    max_new_tokens: int = key(300, "tokens to write", ge=1, le=10_000)
    seed: int = key(1337, "of the draws: the same seed, the same text", ge=0)


class Playground:
    """A model and the line of those who want it to write. context: in which the model works."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, context: contextlib.AbstractContextManager, compiled: bool = False
    ):
        self.model, self.tokenizer = model, tokenizer
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.line: list[asyncio.Event] = []  # the first is served; set: the line has moved
        # All that the model does happens in this one thread, so a step of a text just dropped harms nobody.
        self.thread = ThreadPoolExecutor(1, initializer=context.__enter__)
        self.decoder = self.thread.submit(Decoder, model, compiled=compiled).result()
        self.label = functools.lru_cache(2**16)(tokenizer.label)

    def about(self, name: str, device: str) -> Message:
        """What the page tells of the model, and the table of settings."""
        fields = {f.name: {"default": f.default, **f.metadata} for f in dataclasses.fields(Settings)}
        return {
            "name": name,
            "parameters": self.model.count_parameters(),
            "context": self.model.config.block_size,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer.name,
            "device": device,
            "settings": fields,
        }

    def read(self, body: bytes) -> tuple[list[int], Settings]:
        """The ids that a text begins with, and how it goes on. Raises InputError for any other body than such a one."""
        try:
            request = json.loads(body)
        except ValueError as error:
            raise InputError(f"the request is not JSON ({error}): send an object such as {EXAMPLE}") from None
        if not isinstance(request, dict) or len(request.keys() & {"prompt", "ids"}) != 1:
            raise InputError(f"a request has either a prompt, which is text, or ids: send one such as {EXAMPLE}")
        names = [field.name for field in dataclasses.fields(Settings)]
        if unknown := [name for name in request if name not in ("prompt", "ids", *names)]:
            raise InputError(f"{unknown[0]!r} cannot be set: beside prompt or ids there are {', '.join(names)}")
        settings = build(Settings, {name: request[name] for name in names if name in request}, "request")
        return self._encode(request["prompt"]) if "prompt" in request else self._check(request["ids"]), settings

    def _encode(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, got {type(prompt).__name__}: put it in quotes")
        if not prompt and self.tokenizer.end_of_text is None:
            raise InputError("the prompt is empty, and this model knows no start of a text: type how it begins")
        ids = self.tokenizer.encode(prompt) if prompt else [self.tokenizer.end_of_text]
        if len(ids) > (longest := self.model.config.block_size):
            raise InputError(f"the prompt has {len(ids):,} tokens, but the context ends at {longest:,}: shorten it")
        return self._check(ids)

    def _check(self, ids: Any) -> list[int]:
        if not matches_schema(ids, [int]) or not 1 <= len(ids) <= MOST_IDS:
            raise InputError(f"ids: expected a list of 1 to {MOST_IDS:,} whole numbers: send those that you were sent")
        if max(ids) >= self.vocab_size:
            raise InputError(f"id {max(ids)} is not one of the model's {self.vocab_size}: send ids that you were sent")
        return ids

    def frames(self, ids: list[int], settings: Settings) -> Iterator[list[Message]]:
        """What is told about a text as it is written: its beginning, each token, its end; some events at a time."""
        stream = TextStream(self.tokenizer)
        yield [{"prompt_ids": ids, "prompt_texts": [stream.put(token) for token in ids]}]
        s = settings
        how = Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.seed, vocab_size=self.vocab_size)
        frame: list[Message] = []
        began = sent = time.perf_counter()
        # One rival more than is shown: the token itself may be among them.
        for made, (token,) in enumerate(self.decoder.generate([ids], s.max_new_tokens, how, rivals=RIVALS + 1), 1):
            stopped = token.id == self.tokenizer.end_of_text
            last = stopped or made == s.max_new_tokens
            rivals = [rival for rival in token.rivals if rival[0] != token.id and rival[0] < self.vocab_size][:RIVALS]
            text = stream.put(token.id) + (stream.close() if last else "")
            told = [{"id": each, "text": self.label(each), "p": _odds(logprob)} for each, logprob in rivals]
            frame.append({"id": token.id, "text": text, "p": _odds(token.logprob), "rivals": told})
            if last:
                break
            if (now := time.perf_counter()) - sent > FRAME_S:
                yield frame
                frame, sent = [], now
        speed = round(made / (time.perf_counter() - began), 1)
        yield [*frame, {"done": True, "tokens_per_s": speed, "reason": "stop" if stopped else "length"}]

    @contextlib.asynccontextmanager
    async def turn(self, tell: Callable[[list[Message]], Awaitable[None]]) -> AsyncIterator[None]:
        """Wait in line, told of each place in it, until the model is free; first come, first served."""
        moved = asyncio.Event()
        self.line.append(moved)
        try:
            while place := self.line.index(moved):
                await tell([{"queued": place}])
                await moved.wait()
                moved.clear()
            yield
        finally:
            self.line.remove(moved)
            for other in self.line:
                other.set()

    async def answer(self, ids: list[int], settings: Settings, scope: Any, receive: Any, send: Send) -> None:
        """An ASGI answer: the events of a text, a line of JSON each, until it ends or its reader leaves."""
        kind = (b"content-type", b"application/x-ndjson")
        await send({"type": "http.response.start", "status": 200, "headers": [kind]})
        tasks = [asyncio.create_task(self._tell(ids, settings, send)), asyncio.create_task(_left(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, ids: list[int], settings: Settings, send: Send) -> None:
        patience, loop = PATIENCE_S, asyncio.get_running_loop()

        async def tell(events: list[Message], more: bool = True) -> None:
            nonlocal patience
            began = loop.time()
            body = "".join(json.dumps(event) + "\n" for event in events).encode()
            async with asyncio.timeout(patience):  # one who does not read must not keep the others waiting
                await send({"type": "http.response.body", "body": body, "more_body": more})
            patience -= loop.time() - began

        try:
            async with self.turn(tell):
                frames = self.frames(ids, settings)
                while frame := await loop.run_in_executor(self.thread, next, frames, None):
                    await tell(frame)
            await tell([], more=False)
        except OSError:  # too slow, or gone: the server closes what is left unfinished
            pass
        except Exception as error:
            traceback.print_exc()
            why = f"the model failed ({type(error).__name__}: {error}); the terminal where play.py runs has the details"
            await tell([{"error": why}], more=False)


def _odds(logprob: float | None) -> float:
    assert logprob is not None
    return float(f"{math.exp(logprob):.4g}")


async def _left(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def read_metrics(path: Path, after: int, file: str) -> Message:
    """The losses in metrics.jsonl from byte `after` on; from the beginning if that is no longer the `file` which was
    read so far, as after a resume. `next`: the byte to go on from; half a line at the end waits until it is whole."""
    try:
        regular_file_size(path)
        with open(path, "rb") as lines:
            found = os.fstat(lines.fileno())
            name = str(found.st_ino)
            after = after if name == file and after <= found.st_size else 0
            lines.seek(after)
            data = lines.read(PIECE)
    except OSError:  # not yet there, or never
        return {"file": "", "after": 0, "next": 0, "more": False, "points": []}
    whole = len(data) if len(data) == PIECE and b"\n" not in data else data.rfind(b"\n") + 1
    points = []
    for line in data[:whole].splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if matches_schema(record, {"step": int}):
                names = ("step", "loss", "train_loss", "val_loss")
                points.append({name: record[name] for name in names if matches_schema(record.get(name), float)})
    return {"file": name, "after": after, "next": after + whole, "more": len(data) == PIECE, "points": points}


def application(playground: Playground, about: Message, metrics: Path, port: int) -> Any:
    """The ASGI application: the page and what it asks for. about: what it tells of the model. metrics: the run's."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route

    page = Path(__file__).with_name("play.html").read_bytes()

    def reply(content: Message, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        return Response(json.dumps(content), status, headers, "application/json")

    async def index(request: Request) -> Response:
        return Response(page, media_type="text/html")

    async def model(request: Request) -> Response:
        return reply(about | {"run": metrics.parent.is_dir()})  # whose curves may come

    async def curves(request: Request) -> Response:
        after, file = (request.query_params.get(name, default) for name, default in (("after", "0"), ("file", "")))
        if not re.fullmatch("[0-9]{1,18}", after):
            raise InputError("after: expected a whole number: send the `next` of the last answer")
        return reply(await asyncio.to_thread(read_metrics, metrics, int(after), file))

    async def generate(request: Request) -> Any:
        body, declared = bytearray(), int(request.headers.get("content-length", "0"))
        closing = {"connection": "close"}  # or the server would wait for the rest, to throw it away
        try:
            async with asyncio.timeout(PATIENCE_S):
                async for piece in request.stream():
                    body += piece
                    if max(declared, len(body)) > MOST_BYTES:
                        raise HTTPException(413, f"the request is larger than {MOST_BYTES:,} bytes: send less", closing)
        except TimeoutError:
            why = f"the request took over {PATIENCE_S:.0f} s to come: send it at once"
            raise HTTPException(408, why, closing) from None
        try:
            ids, settings = await asyncio.to_thread(playground.read, bytes(body))
        except RecursionError:
            raise InputError(f"the request is nested too deeply: send an object such as {EXAMPLE}") from None
        return functools.partial(playground.answer, ids, settings)

    async def refuse(request: Request, error: Any) -> Response:
        if not isinstance(error, HTTPException):
            return reply({"error": str(error)[:500]}, 400)
        known = f"{request.method} {request.url.path}: {error.detail}; the page is at /, and play.py names the rest"
        told = known if error.status_code in (404, 405) else error.detail
        return reply({"error": told}, error.status_code, error.headers)

    routes = [Route("/", index), Route("/api/model", model), Route("/api/metrics", curves)]
    routes.append(Route("/api/generate", generate, methods=["POST"]))
    handlers: Any = {HTTPException: refuse, InputError: refuse, ClientDisconnect: refuse}
    return guarded(Starlette(routes=routes, exception_handlers=handlers), reply, port, policy(page))


def policy(page: bytes) -> str:
    """What a browser lets the page do: run its own script and style, known by their hashes, and talk to this server."""
    found = {tag: re.search(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL) for tag in ("script", "style")}
    own = {t: base64.b64encode(hashlib.sha256(m[1]).digest()).decode() for t, m in found.items() if m}
    return (
        f"default-src 'none'; script-src 'sha256-{own['script']}'; style-src 'sha256-{own['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def guarded(app: Any, reply: Callable[..., Any], port: int, policy: str) -> Any:
    """`app` for pages of its own alone. Another site may send requests here from the user's browser, or give itself a
    name that leads here (DNS rebinding): its Origin, or its Host, tells."""
    hosts = {f"{name}{colon}" for name in ("127.0.0.1", "localhost") for colon in (f":{port}", *[""] * (port == 80))}
    allowed = {b"host": {host.encode() for host in hosts}, b"origin": {f"http://{host}".encode() for host in hosts}}
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "cache-control": "no-store"}
    headers |= {"referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin"}
    extra = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def guard(scope: Any, receive: Any, send: Send) -> None:
        given = {kind: {value.lower() for name, value in scope["headers"] if name == kind} for kind in allowed}
        answer = app
        if len(given[b"host"]) != 1 or not given[b"host"] <= allowed[b"host"]:
            answer = reply({"error": f"this page has another address: open http://127.0.0.1:{port}"}, 421)
        elif not given[b"origin"] <= allowed[b"origin"]:
            answer = reply({"error": "other sites' pages are not answered: use this one's own"}, 403)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await answer(scope, receive, send_with_headers)

    return guard


def server(app: Any) -> Any:
    """uvicorn's server of an application: it says nothing, and does not wait for open streams when it ends."""
    import uvicorn

    settings: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "proxy_headers": False}
    settings |= {"log_level": "critical", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 0}
    return uvicorn.Server(uvicorn.Config(app, **settings))


def main() -> None:
    config, _ = parse(PlayConfig, description="Serve a page to play with a trained GPT.")
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise InputError('the page needs starlette and uvicorn: install them with pip install -e ".[play]"')
    try:
        door = socket.create_server(("127.0.0.1", config.port))
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise InputError(f"port={config.port}: {why}: give another, such as --port=8081") from None
    port = door.getsockname()[1]
    world = distributed.start(config.device, config.dtype)
    model, tokenizer = load(config)
    compiled = config.compile is True or (config.compile == "auto" and world.device.type == "cuda")
    playground = Playground(model, tokenizer, prepare(model, world, config.dtype, compiled), compiled)
    source = Path(config.out_dir if config.init_from == "resume" else config.init_from)
    about = playground.about(source.resolve().name, describe_device(world.device))
    app = application(playground, about, source / "metrics.jsonl", port)
    print(f"http://127.0.0.1:{port} is open; Ctrl-C closes it", flush=True)
    server(app).run(sockets=[door])


if __name__ == "__main__":
    run_script(main)
