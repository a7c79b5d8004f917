"""Write text with a trained GPT: python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"

Weights come from a run of train.py, or with --init_from from GPT-2, a Hugging Face folder or nanoGPT's ckpt.pt.
The texts go to standard output, everything else to standard error.
"""

import contextlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import key, parse
from model import GPT
from nanogpt import checkpoint, distributed
from nanogpt.data.dataset import resolve
from nanogpt.device import free_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError, run_script
from nanogpt.files import read_json
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.low_precision import can_pack, replace_linears, rounded_linear
from nanogpt.generate.sampling import Sampling, Token
from nanogpt.generate.stream import TextStream
from nanogpt.interop.huggingface import read_weights
from nanogpt.memory import decoder_rows_that_fit
from nanogpt.text.chat import Chat
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

SEPARATOR = "\n---------------\n"  # between samples


@dataclass
class SampleConfig:
    """What to sample from, and how."""

    init_from: str = key(
        "resume", "resume: out_dir's run; or gpt2*, a hub id, a folder, nanoGPT's ckpt.pt", group="Model"
    )
    out_dir: str = key("out", "folder of the run")
    checkpoint: str = key("best", "of the run: best, latest, step-NNNNNN or its folder")

    start: str = key("\n", "the prompt; FILE:prompt.txt reads it from a file", group="Text")
    num_samples: int = key(10, "texts to write, as many at once as fit into memory", ge=1)
    max_new_tokens: int = key(500, "tokens in each of them", ge=1)
    temperature: float = key(0.8, "1 = the model's own odds, less = safer, 0 = always the likeliest token", ge=0)
    top_k: int | None = key(200, "draw from this many likeliest tokens only; None: from all", ge=1)
    top_p: float = key(1.0, "draw from the likeliest tokens that together have this probability", gt=0, le=1)
    min_p: float = key(0.0, "leave out tokens less than this share as likely as the likeliest", ge=0, lt=1)
    stop: str | None = key(None, "end a text before this string")
    seed: int = key(1337, "seed of the draws", ge=0)
    chat: bool = key(False, "the prompt is a question to a model tuned on conversations; its answer alone is written")
    interactive: bool = key(False, "type a prompt, it goes on; Ctrl-C stops the text")
    logprobs: bool = key(False, "show how sure it was of each token: colors in a terminal, else a line each")

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of the weights")
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")


def main() -> None:
    config, given = parse(SampleConfig, description="Write text with a trained GPT.")
    if config.interactive and (useless := [name for name in ("start", "num_samples") if name in given]):
        raise InputError(f"{useless[0]}: an interactive text begins with what you type, one at a time: leave it out")
    if config.chat and not config.interactive and not config.start.strip():
        raise InputError("chat=True: there is no question: ask one by --start=TEXT, or several by --interactive=True")
    world = distributed.start(config.device, config.dtype)
    prompt = "" if config.interactive else read_prompt(config.start)
    compiled = config.compile is True or (config.compile == "auto" and world.device.type == "cuda")
    model, tokenizer = load(config)
    chat = Chat(tokenizer) if config.chat else None
    with prepare(model, world, config.dtype, compiled):
        if config.interactive:
            converse(config, make_decoder(model, 1, None, compiled), tokenizer, chat)
        else:
            write_all(config, model, world, tokenizer, chat, prompt, compiled)


def prepare(model: GPT, world: World, dtype: str, compiled: bool) -> contextlib.AbstractContextManager:
    """Bring the model to its device, its matrices in the number format that decodes fastest there, or in `dtype` if
    that is not "auto". Returns the context in which it works. On a CPU float16 is a way to keep matrices; the
    arithmetic is float32. Raises InputError where that cannot be had."""
    model.to(world.device).eval()
    if world.device.type == "cpu" and world.dtype != torch.bfloat16 and dtype != "float32":
        if can_pack() and not compiled:
            replace_linears(model)
        elif dtype == "float16":
            raise InputError("dtype=float16: on a CPU only where torch has FBGEMM (x86), not compiled: use float32")
        return contextlib.nullcontext()
    if world.dtype != torch.float32:
        replace_linears(model, partial(rounded_linear, dtype=world.dtype))
    return world.autocast()


def make_decoder(model: GPT, rows: int, length: int | None, compiled: bool) -> Decoder:
    decoder = Decoder(model, rows, length, compiled)
    if compiled:
        print("compiling …", end=" ", file=sys.stderr, flush=True)
        decoder.start([[0]] * rows)
        for _ in range(3):  # the first should_compile, the others record the graph
            decoder.step(torch.zeros(rows, dtype=torch.long))
        print("done", file=sys.stderr)
    return decoder


def prompt_ids(prompt: str, model: GPT, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids. Raises InputError where there are none, too many, or others than the model has."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("start is empty: give a prompt with --start=TEXT or --start=FILE:prompt.txt")
    return checked(ids, model)


def checked(ids: list[int], model: GPT) -> list[int]:
    """`ids`. Raises InputError where they are too many, or others than the model has."""
    if max(ids) >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer's ids go beyond the model's {model.config.vocab_size}: it belongs to another model"
        )
    if len(ids) > model.config.block_size:
        raise InputError(
            f"start has {len(ids):,} tokens, but the model's context ends at {model.config.block_size:,}: shorten it"
        )
    return ids


class Sample:
    """One text as it is written. `text` is what can be shown of it so far: a piece at a time, as the tokens of a
    character come and it is known that no stop begins, with the probability of all tokens that made the piece."""

    def __init__(self, stream: TextStream, show: Callable[[str, float], str]):
        self.stream, self.show = stream, show
        self.text, self.tokens, self.logprob = "", 0, 0.0

    def put(self, token: Token) -> None:
        if not self.stream.stopped:
            self.tokens += 1
            self.logprob += token.logprob or 0.0
            self._add(self.stream.put(token.id))

    def close(self) -> None:
        self._add(self.stream.close())

    def _add(self, piece: str) -> None:
        if piece:
            self.text += self.show(piece, math.exp(self.logprob))
            self.logprob = 0.0


class Printer:
    """Prints samples one after the other: the first as it comes, the next from when that has ended."""

    def __init__(self, samples: list[Sample], prompt: str, end: str):
        self.samples, self.prompt, self.end = samples, prompt, end
        self.current, self.shown = 0, 0  # which sample, and how many of its characters
        print(prompt, end="", flush=True)

    def update(self, closed: bool = False) -> None:
        while self.current < len(self.samples):
            sample = self.samples[self.current]
            print(sample.text[self.shown :], end="")
            self.shown = len(sample.text)
            if not (closed or sample.stream.stopped):
                break
            print(self.end, end="")
            self.current, self.shown = self.current + 1, 0
            if self.current < len(self.samples):
                print(self.prompt, end="")
        sys.stdout.flush()


def chat_ids(messages: list[dict[str, str]], model: GPT, chat: Chat) -> list[int]:
    """The ids of a conversation up to where the answer begins; of one that fills more than half of the context the
    oldest questions and answers are left out, in place. Raises InputError where the last question alone is too long."""
    try:
        while len(ids := chat.prompt(messages)) > model.config.block_size // 2 and len(messages) > 2:
            del messages[:2]
    except ValueError as error:
        raise InputError(f"{error}: use the template that the model was tuned with") from error
    return checked(ids, model)


def write_all(
    config: SampleConfig,
    model: GPT,
    world: World,
    tokenizer: Tokenizer,
    chat: Chat | None,
    prompt: str,
    compiled: bool,
) -> None:
    """Print num_samples texts that begin with the prompt, or answers to it, and the speed."""
    if chat:
        ids, prompt = chat_ids([{"role": "user", "content": prompt}], model, chat), ""
    else:
        ids = prompt_ids(prompt, model, tokenizer)
    length, count = len(ids) + config.max_new_tokens, config.num_samples
    rows = min(count, decoder_rows_that_fit(model, length, free_memory(world.device)))
    if rows < count:
        print(f"{rows} of {count} samples at a time, for memory", file=sys.stderr)
    made, seconds, decoder = 0, 0.0, None
    for first in range(0, count, rows):
        if decoder is None or decoder.rows != min(rows, count - first):
            decoder = make_decoder(model, min(rows, count - first), length, compiled)
        _, tokens, took = write(config, decoder, tokenizer, chat, ids, prompt, first, end=SEPARATOR)
        made, seconds = made + tokens, seconds + took
    print_speed(made, seconds)


def write(
    config: SampleConfig,
    decoder: Decoder,
    tokenizer: Tokenizer,
    chat: Chat | None,
    ids: list[int],
    prompt: str,
    first: int,
    end: str,
) -> tuple[list[int], int, float]:
    """Print a text for each of the decoder's rows, sample `first` and those after it, that begins with `ids`, shown as
    `prompt`. Returns the first text's ids, the tokens of all, and the seconds. A Ctrl-C ends an interactive one; from
    others it is passed on, when all that they have is printed."""
    show, stops = shading(config.logprobs), [config.stop] if config.stop else []
    before, ends = ((), chat.ends) if chat else (ids[-16:], ())
    samples = [Sample(TextStream(tokenizer, stops, before, ends), show) for _ in range(decoder.rows)]
    how = Sampling(
        config.temperature, config.top_k, config.top_p, config.min_p, config.seed, vocab_size=tokenizer.vocab_size
    )
    printer, text = Printer(samples, prompt, end), list(ids)
    began, interrupted = time.perf_counter(), False
    try:
        numbers, rivals = range(first, first + decoder.rows), 0 if config.logprobs else -1
        for tokens in decoder.generate(
            [ids] * decoder.rows, config.max_new_tokens, how, samples=numbers, rivals=rivals
        ):
            for sample, token in zip(samples, tokens, strict=True):
                sample.put(token)
            text.append(tokens[0].id)
            printer.update()
            if all(sample.stream.stopped for sample in samples):
                break
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - began
    for sample in samples:
        sample.close()
    printer.update(closed=True)
    if interrupted and not config.interactive:
        raise KeyboardInterrupt
    return text, sum(sample.tokens for sample in samples), seconds


def print_speed(tokens: int, seconds: float) -> None:
    print(f"{tokens / seconds:.1f} tok/s ({tokens:,} tokens in {seconds:.1f} s)", file=sys.stderr)


def converse(config: SampleConfig, decoder: Decoder, tokenizer: Tokenizer, chat: Chat | None) -> None:
    """Continue what the user types, text after text, until the input ends."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (the typed line can be edited, and former ones come back)
    text: list[int] = []  # what an empty line lets go on
    messages: list[dict[str, str]] = []  # of a chat
    if chat:
        print("ask; an empty line begins a new conversation; Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    else:
        print(
            "type how a text begins; an empty line lets the last one go on; Ctrl-C stops it, Ctrl-D ends",
            file=sys.stderr,
        )
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    for turn in itertools.count():
        try:
            typed = input(mark)
            if chat:
                messages = [*messages, {"role": "user", "content": typed}] if typed else []
                if not typed:
                    continue
                ids, shown = chat_ids(messages, decoder.model, chat), ""
            elif typed or text:
                ids, shown = prompt_ids(typed, decoder.model, tokenizer) if typed else text, typed
            else:
                raise InputError("there is no text yet that could go on: type how one begins")
            text, tokens, seconds = write(config, decoder, tokenizer, chat, ids, shown, turn, end="\n")
            if chat:
                answer = itertools.takewhile(lambda token: token not in chat.ends, text[len(ids) :])
                messages.append({"role": "assistant", "content": tokenizer.decode([*answer])})
            print_speed(tokens, seconds)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # at the prompt
            print(file=sys.stderr)
        except EOFError:
            return


def shading(logprobs: bool) -> Callable[[str, float], str]:
    """How a piece of text is shown: as it is, or with the probability that the model gave it."""
    if not logprobs:
        return lambda piece, probability: piece
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return lambda piece, probability: f"\n{100 * probability:6.1f}%  {piece!r}"
    colors = (196, 208, 220, 154, 46)  # of the 256 that terminals have, from red to green
    return lambda piece, probability: f"\033[38;5;{colors[min(4, int(5 * probability))]}m{piece}\033[0m"


def read_prompt(start: str) -> str:
    """The prompt, from its file if `start` is FILE:path. Raises InputError where that cannot be read."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"start={start}: cannot be read as UTF-8 text ({error}); give another file") from error


def load(config: Any, doing: str = "sampling from") -> tuple[GPT, Tokenizer]:
    """What `opened` gives, without where it comes from."""
    return opened(config, doing)[:2]


def opened(config: Any, doing: str) -> tuple[GPT, Tokenizer, str, dict[str, Any]]:
    """The model and its tokenizer that `config` names by its init_from, out_dir and checkpoint, where it lies, and the
    settings of the run that made it, as far as they are known; says which one, and what had to be assumed. Raises
    InputError where a part is missing."""
    from_run = config.init_from == "resume"
    source = named = Path(config.out_dir if from_run else config.init_from)
    folder: Path | None
    if checkpoint.is_checkpoint(source) or (from_run and not (source / "ckpt.pt").exists()):
        # By its path from here on, because a run that goes on may have a better one in a moment.
        source = folder = checkpoint.find(source, config.checkpoint)
        print(f"{doing} {source}", file=sys.stderr)
        model = GPT.from_checkpoint(folder)  # which checks all files
        run = read_json(folder / "state.json")["config"]
    else:
        print(f"{doing} {source}", file=sys.stderr)
        weights = read_weights(source if from_run else config.init_from)
        for note in weights.notes:
            print(note, file=sys.stderr)
        model, run = GPT.from_pretrained(weights, dropout=0.0), weights.train_config
        folder = weights.tokenizer_folder
        if folder is None and not weights.gpt2_encoding and run.get("dataset"):
            folder = resolve(run["dataset"])  # nanoGPT keeps characters beside the data
    tokenizer = Tokenizer.load(folder) if folder else None
    if tokenizer is None and model.config.vocab_size != GPT2_VOCAB:
        raise InputError(
            f"{named} has no tokenizer, and {model.config.vocab_size} ids are not GPT-2's: put the tokenizer.json of "
            "its data beside it"
        )
    return model, tokenizer or Tokenizer.gpt2(), str(source), run


if __name__ == "__main__":
    run_script(main)
