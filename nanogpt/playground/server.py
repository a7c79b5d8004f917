"""The playground's server: one page, one model, one text at a time.

GET  /              the page
GET  /api/model     the model's name and sizes, and the settings that a request may have
GET  /api/metrics   the run's losses, from a byte of metrics.jsonl on
POST /api/generate  a text, or an answer to messages: events as lines of JSON, streamed while the model generates
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from nanogpt.errors import InputError
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.prompt import check_ids, encode_prompt
from nanogpt.generate.sampling import Sampling, Token
from nanogpt.generate.stream import TextStream
from nanogpt.schema import Count, Limits, build, check, key, matches
from nanogpt.text.chat import Chat, check_messages
from nanogpt.text.tokenizer import Tokenizer, replace_surrogates

NUM_ALTERNATIVES = 5  # probable tokens that come with each generated one
MAX_REQUEST_BYTES = 2**20
MAX_IDS = 50_000  # limit of a text to continue, or as many as the context holds
SEND_TIMEOUT_S = 10.0  # how long the model waits, over a whole text, for a client to read
FRAME_S = 1 / 30  # tokens generated within one frame of the screen are sent together
EXAMPLE = '{"prompt": "ROMEO:", "temperature": 0.8}'

Event = dict[str, Any]


@dataclasses.dataclass
class RequestSettings:
    """The settings of a request, with their limits; the page makes a control for each."""

    temperature: float = key(0.8, "1.0 = unscaled, lower = less random, 0 = greedy", ge=0, le=100)
    top_k: int | None = key(None, "sample from this many most probable tokens; empty: from all", ge=1)
    top_p: float = key(1.0, "sample from the most probable tokens with this total probability", gt=0, le=1)
    min_p: float = key(0.0, "drop tokens with p < min_p · max p", ge=0, lt=1)
    max_new_tokens: int = key(300, "number of tokens to generate", ge=1, le=10_000)
    seed: int = key(1337, "random seed: the same seed gives the same text", ge=0)


@dataclasses.dataclass
class Start:
    """Where a text begins: the ids to continue, and how.

    answer_start: where in them the answer of a conversation begins; None: the text is no conversation.
    num_omitted: the conversation's oldest messages that the context has no place for.
    """

    ids: list[int]
    settings: RequestSettings
    answer_start: int | None = None
    num_omitted: int = 0


class Playground:
    """A model that generates one text at a time, and the queue of requests for it.

    context: the context manager in which the model runs. chat: encodes conversations; None: the model has no chat
    template. end_ids: ids that end a text, beside the tokenizer's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        context: contextlib.AbstractContextManager,
        compiled: bool = False,
        chat: Chat | None = None,
        end_ids: Collection[int] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.end_ids = end_ids
        self.vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
        self.encode_lock = threading.Lock()  # requests are parsed in threads, and share the tokenizer's switches
        self.queue: list[asyncio.Event] = []  # the first is served; an event is set when its place may have changed

        # The model runs only in this thread: the last step of an abandoned text ends before the next text begins.
        self.thread = ThreadPoolExecutor(1, initializer=context.__enter__)
        self.decoder = self.thread.submit(Decoder, model, compiled=compiled).result()

    def parse_request(self, body: bytes) -> Start:
        """Read and check a request. Raises InputError.

        It has a prompt, ids or messages. A last message of the assistant is the beginning of the answer, and so are
        ids beside messages.
        """
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the request is not valid JSON ({error}); send an object such as {EXAMPLE}") from None
        names = request.keys() & {"prompt", "messages", "ids"} if isinstance(request, dict) else set()
        if len(names) != 1 and names != {"messages", "ids"}:
            raise InputError(f"the request needs a prompt, messages or ids; send an object such as {EXAMPLE}")

        ids: list[int] = []
        answer_start = None
        num_omitted = 0
        with self.encode_lock:
            if "prompt" in names:
                ids = self._encode_prompt(request.pop("prompt"))
            elif "messages" in names:
                ids, answer_start, num_omitted = self._encode_conversation(request.pop("messages"))

        more_ids = request.pop("ids", [])
        more_ids, problems = check(more_ids, list[Annotated[int, Limits(ge=0, lt=self.vocab_size)]], "ids")
        if not problems and not ids + more_ids:
            problems = ["ids: the list is empty"]
        if problems:
            raise InputError(f"{problems[0]}; send ids from earlier events")
        num_ids = len(ids) + len(more_ids)
        limit = max(MAX_IDS, self.model.config.block_size)
        if num_ids > limit:
            raise InputError(f"the text has {num_ids:,} tokens, more than {limit:,}; shorten it")
        if self.chat and answer_start is not None and not self.chat.stop_ids.isdisjoint(more_ids):
            raise InputError("ids: one of them ends the answer; send those before it")
        return Start([*ids, *more_ids], build(RequestSettings, request, "request"), answer_start, num_omitted)

    def _encode_prompt(self, prompt: Any) -> list[int]:
        if not isinstance(prompt, str):
            raise InputError(f"prompt: expected text, got {type(prompt).__name__}; put it in quotes")
        if prompt:
            return encode_prompt(prompt, self.model, self.tokenizer)
        end_of_text = self.tokenizer.end_of_text
        if end_of_text is None or end_of_text >= self.vocab_size:
            raise InputError("prompt: is empty, and the model has no token that starts a text; enter a prompt")
        return [end_of_text]

    def _encode_conversation(self, entries: Any) -> tuple[list[int], int, int]:
        """Return the ids up to the answer's next token, where it begins in them, and how many messages are left out."""
        if self.chat is None:
            raise InputError("messages: the model has no chat template; send a prompt")
        try:
            messages = check_messages(entries)
            answer = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
            if not messages:
                raise InputError('messages: there is no question; send one such as {"role": "user", "content": "Why?"}')
            ids, num_omitted = self.chat.encode_recent(messages, self.model.config.block_size)
            answer_ids = self.chat.encode_answer(answer)
            check_ids([*ids, *answer_ids], self.model, self.tokenizer)
            return ids + answer_ids, len(ids), num_omitted
        except ValueError as error:
            raise InputError(f"messages: {error}; send a list of objects with role and content") from error

    async def generate(self, start: Start) -> AsyncGenerator[str, None]:
        """Wait in the queue, then generate a text. Yields events as lines of JSON; closing it frees the model."""
        place_changed = asyncio.Event()
        self.queue.append(place_changed)
        try:
            while place := self.queue.index(place_changed):
                yield to_lines([{"queued": place}])
                await place_changed.wait()
                place_changed.clear()

            batches = self.event_batches(start)
            loop = asyncio.get_running_loop()
            while batch := await loop.run_in_executor(self.thread, next, batches, None):
                yield to_lines(batch)
        except InputError as error:
            yield to_lines([{"error": str(error)}])
        except Exception as error:
            traceback.print_exc()
            problem = f"the model failed ({type(error).__name__}: {error}); see the terminal where play.py runs"
            yield to_lines([{"error": problem}])
        finally:
            self.queue.remove(place_changed)
            for other in self.queue:
                other.set()

    def event_batches(self, start: Start) -> Iterator[list[Event]]:
        """Generate a text. Yields its events in batches: the prompt, the tokens, the end."""
        ids = start.ids
        stop_ids = frozenset(end for end in (*self.end_ids, self.tokenizer.end_of_text) if end is not None)
        stream = TextStream(self.tokenizer)
        texts = [stream.put(id) for id in ids[: start.answer_start]]
        event: Event = {"prompt_ids": ids, "prompt_texts": texts}
        if start.answer_start is not None:
            assert self.chat is not None
            stop_ids = self.chat.stop_ids
            stream = TextStream(self.tokenizer, stop_ids=stop_ids)
            texts += [stream.put(id) for id in ids[start.answer_start :]]
            event |= {"answer_start": start.answer_start, "omitted": start.num_omitted}
        yield [event]

        values = dataclasses.asdict(start.settings)
        max_new_tokens = values.pop("max_new_tokens")
        sampling = Sampling(**values, vocab_size=self.vocab_size)
        # One more than are shown, because the generated token may be among them.
        tokens = self.decoder.generate([ids], max_new_tokens, sampling, top_logprobs=NUM_ALTERNATIVES + 1)
        batch: list[Event] = []
        start_time = batch_start = time.perf_counter()
        for count, (token,) in enumerate(tokens, 1):
            is_stop = token.id in stop_ids
            is_last = is_stop or count == max_new_tokens
            text = stream.put(token.id)
            if is_last:
                text += stream.close()
            batch.append({"text": text} | self._describe(token))
            if is_last:
                break
            if time.perf_counter() - batch_start > FRAME_S:
                yield batch
                batch = []
                batch_start = time.perf_counter()

        tokens_per_s = round(count / (time.perf_counter() - start_time), 1)
        reason = "stop" if is_stop else "length"
        yield [*batch, {"done": True, "tokens_per_s": tokens_per_s, "reason": reason}]

    def _describe(self, token: Token) -> Event:
        """A token's id and probability, and the most probable other tokens."""
        assert token.logprob is not None
        alternatives = [
            {"id": id, "text": self.tokenizer.label(id), "p": math.exp(logprob)}
            for id, logprob in token.top_logprobs
            if id != token.id and id < self.vocab_size
        ]
        return {"id": token.id, "p": math.exp(token.logprob), "alternatives": alternatives[:NUM_ALTERNATIVES]}


def to_lines(events: list[Event]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


class EventResponse(StreamingResponse):
    """A stream of events that holds the model only while its client reads.

    Starlette cancels the stream when the client leaves. But it waits for a slow client without end, and leaves the
    generator to the garbage collector: here sending has a timeout, and the generator is closed at once.
    """

    media_type = "application/x-ndjson"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        remaining_s = SEND_TIMEOUT_S

        async def send_in_time(message: Message) -> None:
            nonlocal remaining_s
            start = time.monotonic()
            with anyio.fail_after(remaining_s):
                await send(message)
            remaining_s -= time.monotonic() - start

        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            try:
                await super().__call__(scope, receive, send_in_time)
            except* (TimeoutError, ClientDisconnect):  # uvicorn closes the connection
                pass


def read_metrics(path: Path, offset: int, file: str) -> Event:
    """Read the losses in metrics.jsonl from byte `offset` on; an incomplete last line is left for the next call.

    `file` identifies the file that earlier calls have read. Where another one has taken its name (after a resume), or
    it has become shorter, reading starts again at byte 0. `next` is the offset of the next call.
    """
    try:
        with open(path, "rb") as lines:
            status = os.fstat(lines.fileno())
            inode = str(status.st_ino)
            if inode != file or offset > status.st_size:
                offset = 0
            lines.seek(offset)
            data = lines.read()
    except OSError:  # there is no such file yet
        return {"file": "", "after": 0, "next": 0, "points": []}

    size = data.rfind(b"\n") + 1
    points = []
    for line in data[:size].splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and matches(record.get("step"), Count):
                fields = ("step", "loss", "train_loss", "val_loss")
                points.append({name: record[name] for name in fields if matches(record.get(name), float)})
    return {"file": inode, "after": offset, "next": offset + size, "points": points}


def create_app(playground: Playground, heading: dict[str, Any], metrics: Path) -> Starlette:
    """Create the web application. heading: name, parameters and device. metrics: the run's metrics.jsonl."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page_headers = {"content-security-policy": content_security_policy(page)}
    settings = dataclasses.fields(RequestSettings)
    chat = None  # else the tokens that end an answer, by id
    if playground.chat:
        ids = sorted(id for id in playground.chat.stop_ids if id < playground.vocab_size)
        chat = {"stop_tokens": {id: playground.tokenizer.label(id) for id in ids}}
    model_info = {
        **heading,
        "name": replace_surrogates(heading["name"]),
        "context": playground.model.config.block_size,
        "vocab_size": playground.vocab_size,
        "tokenizer": playground.tokenizer.name,
        "chat": chat,
        "settings": {key.name: {"default": key.default, "help": key.metadata["help"]} for key in settings},
    }

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def model(request: Request) -> Response:
        return JSONResponse(model_info | {"run": metrics.parent.is_dir()})

    async def losses(request: Request) -> Response:
        after = request.query_params.get("after", "0")
        if not re.fullmatch("[0-9]{1,18}", after):
            raise InputError(f"after={after}: expected a byte offset; send `next` of the last response")
        file = request.query_params.get("file", "")
        return JSONResponse(await asyncio.to_thread(read_metrics, metrics, int(after), file))

    async def generate(request: Request) -> Response:
        # Other sites' pages must not use the model (CSRF): with a POST a browser sends the page's origin.
        if request.headers.getlist("origin") not in ([], [f"http://{request.headers['host']}"]):
            raise HTTPException(403, "requests from other sites are refused; use the page of this server")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST_BYTES:
                problem = f"the request is larger than {MAX_REQUEST_BYTES:,} bytes; send a shorter text"
                raise HTTPException(413, problem, {"connection": "close"})  # the rest is not read
        start = await asyncio.to_thread(playground.parse_request, bytes(body))
        return EventResponse(playground.generate(start))

    async def error_response(request: Request, error: Any) -> Response:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        return JSONResponse({"error": replace_surrogates(str(error)[:500])}, 400)

    async def failure_response(request: Request, error: Exception) -> Response:
        traceback.print_exception(error)
        problem = f"the server failed ({type(error).__name__}); see the terminal where play.py runs"
        return JSONResponse({"error": problem}, 500)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/api/model", model),
            Route("/api/metrics", losses),
            Route("/api/generate", generate, methods=["POST"]),
        ],
        # Against DNS rebinding: a site can let its name resolve to 127.0.0.1, but browsers send that name as Host.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={InputError: error_response, HTTPException: error_response, Exception: failure_response},
    )


def content_security_policy(page: str) -> str:
    """Allow the page its own script and style, identified by their hashes, and requests to this server."""
    contents = re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    hashes = {tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for tag, text in contents}
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def create_server(app: Starlette) -> uvicorn.Server:
    """Create a silent server that does not wait for open streams when it stops."""
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
