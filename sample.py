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
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import key, parse
from model import GPT
from nanogpt import InputError, checkpoint, data, distributed, run_script
from nanogpt.distributed import World
from nanogpt.inference import Decoder, Sampling, TextStream, Token, can_pack, pack
from nanogpt.pretrained import GPT2_VOCAB, read_weights
from nanogpt.tokenizer import Tokenizer


@dataclass
class SampleConfig:
    """What to sample from, and how."""

    init_from: str = key(
        "resume", "resume: out_dir's run; or gpt2*, a hub id, a folder, nanoGPT's ckpt.pt", group="Model"
    )
    out_dir: str = key("out", "folder of the run")
    checkpoint: str = key("best", "of the run: best, latest, step-NNNNNN or its folder")

    start: str = key("\n", "the prompt; FILE:prompt.txt reads it from a file", group="Text")
    num_samples: int = key(10, "texts to write, all at once", least=1)
    max_new_tokens: int = key(500, "tokens in each of them", least=1)
    temperature: float = key(0.8, "1 = the model's own odds, less = safer, 0 = always the likeliest token", least=0)
    top_k: int | None = key(200, "draw from this many likeliest tokens only; None: from all", least=1)
    top_p: float = key(1.0, "draw from the likeliest tokens that together have this probability", above=0, most=1)
    min_p: float = key(0.0, "leave out tokens less than this share as likely as the likeliest", least=0, below=1)
    stop: str | None = key(None, "end a text before this string")
    seed: int = key(1337, "seed of the draws", least=0)
    interactive: bool = key(False, "type a prompt, it goes on; Ctrl-C stops the text")
    logprobs: bool = key(False, "show how sure it was of each token: colours in a terminal, else a line each")

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of the weights")
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")


def main() -> None:
    config, _ = parse(SampleConfig, description="Write text with a trained GPT.")
    world = distributed.start(config.device, config.dtype)
    prompt = "" if config.interactive else read_prompt(config.start)
    model, tokenizer = load(config)
    compiled = config.compile is True or (config.compile == "auto" and world.device.type == "cuda")
    with prepare(model, world, config.dtype):
        if config.interactive:
            converse(config, Decoder(model, compiled=compiled), tokenizer)
        else:
            ids = prompt_ids(prompt, model, tokenizer)
            length = len(ids) + config.max_new_tokens
            write(config, Decoder(model, config.num_samples, length, compiled), tokenizer, ids, prompt)


def prepare(model: GPT, world: World, dtype: str) -> contextlib.AbstractContextManager:
    """Bring the model to its device, its weights in the number format that decodes fastest there, or in `dtype` if that
    is not "auto". Returns the context in which it works. On a CPU float16 is a way to keep weights; the arithmetic is
    float32."""
    model.to(world.device).eval()
    wanted = dtype == "float16" or (dtype == "auto" and world.dtype == torch.float32)
    if wanted and world.device.type == "cpu" and can_pack():
        pack(model)
        return contextlib.nullcontext()
    model.to(world.dtype)
    return world.autocast()


def prompt_ids(prompt: str, model: GPT, tokenizer: Tokenizer) -> list[int]:
    """The prompt's ids. Raises InputError where there are none, too many, or others than the model has."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise InputError("start is empty: give a prompt with --start=TEXT or --start=FILE:prompt.txt")
    if max(ids) >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer's ids go beyond the model's {model.config.vocab_size}: it belongs to another model"
        )
    if len(ids) > model.config.block_size:
        raise InputError(
            f"start has {len(ids):,} tokens, but the model's context ends at {model.config.block_size:,}: shorten it"
        )
    return ids


def write(
    config: SampleConfig, decoder: Decoder, tokenizer: Tokenizer, ids: list[int], shown: str, turn: int = 0
) -> list[int]:
    """Print as many texts that begin with `ids` as the decoder has rows, the first as it comes, and the speed. Returns
    the first one's ids. shown: the ids' text. turn: another one, other draws."""
    rows = decoder.rows
    how = Sampling(
        config.temperature, config.top_k, config.top_p, config.min_p, config.seed, vocab_size=tokenizer.vocab_size
    )
    streams = [TextStream(tokenizer, [config.stop] if config.stop else []) for _ in range(rows)]
    texts, made = [[shown] for _ in range(rows)], 0
    first, show = list(ids), shading(config.logprobs)
    print(*texts[0], end="", flush=True)
    began = time.perf_counter()
    try:
        samples, rivals = range(turn, turn + rows), 0 if config.logprobs else -1
        for tokens in decoder.write([ids] * rows, config.max_new_tokens, how, samples=samples, rivals=rivals):
            for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
                if not stream.stopped:
                    made += 1
                    texts[row].append(show(stream.put(token.id), token))
            first.append(tokens[0].id)
            print(texts[0][-1] if not streams[0].stopped else "", end="", flush=True)
            if all(stream.stopped for stream in streams):
                break
    except KeyboardInterrupt:
        if not config.interactive:
            raise
    seconds = time.perf_counter() - began
    ends = [stream.close() for stream in streams]
    print(ends[0])
    if not config.interactive:
        print("---------------")
        for text, end in zip(texts[1:], ends[1:], strict=True):
            print("".join(text) + end, "---------------", sep="\n")
    sys.stdout.flush()
    print(f"{made / seconds:.1f} tok/s ({made:,} tokens in {seconds:.1f} s)", file=sys.stderr)
    return first


def converse(config: SampleConfig, decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Continue what the user types, text after text, until the input ends."""
    text: list[int] = []
    print(
        "type how a text begins; an empty line lets the last one go on; Ctrl-C stops it, Ctrl-D ends", file=sys.stderr
    )
    for turn in itertools.count():
        try:
            typed = input("> ")
            ids = prompt_ids(typed, decoder.model, tokenizer) if typed else text
            if ids:
                text = write(config, decoder, tokenizer, ids, typed, turn)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # at the prompt
            print(file=sys.stderr)
        except EOFError:
            return


def shading(logprobs: bool) -> Callable[[str, Token], str]:
    """How a token's text is shown: as it is, or with the probability that the model gave it."""
    if not logprobs:
        return lambda text, token: text
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return lambda text, token: f"\n{percent(token):6.1f}%  {text!r}"
    colours = (196, 208, 220, 154, 46)  # of the 256 that terminals have, from red to green
    return lambda text, token: f"\033[38;5;{colours[min(4, int(percent(token) / 20))]}m{text}\033[0m"


def percent(token: Token) -> float:
    assert token.logprob is not None
    return 100 * math.exp(token.logprob)


def read_prompt(start: str) -> str:
    """The prompt, from its file if `start` is FILE:path. Raises InputError where that cannot be read."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start[5:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"start={start}: cannot be read as UTF-8 text ({error}); give another file") from error


def load(config: Any) -> tuple[GPT, Tokenizer]:
    """The model and its tokenizer that `config` names by its init_from, out_dir and checkpoint; says what had to be
    assumed. Raises InputError where either is missing."""
    from_run = config.init_from == "resume"
    folder: Path | None
    source = Path(config.out_dir if from_run else config.init_from)
    if checkpoint.is_ours(source) or (from_run and not (source / "ckpt.pt").exists()):
        folder = checkpoint.find(source, config.checkpoint)
        print(f"sampling from {folder}", file=sys.stderr)
        model = GPT.from_checkpoint(folder)
    else:
        weights = read_weights(source if from_run else config.init_from)
        print(*weights.notes, sep="\n", file=sys.stderr)
        model = GPT.from_pretrained(weights, dropout=0.0)
        folder = weights.tokenizer_folder
        if folder is None and not weights.gpt2_encoding and weights.train_config.get("dataset"):
            folder = data.resolve(weights.train_config["dataset"])  # nanoGPT keeps characters beside the data
    tokenizer = Tokenizer.load(folder) if folder else None
    if tokenizer is None and model.config.vocab_size != GPT2_VOCAB:
        raise InputError(
            f"{source} has no tokenizer, and {model.config.vocab_size} ids are not GPT-2's: put the tokenizer.json of "
            "its data beside it"
        )
    return model, tokenizer or Tokenizer.gpt2()


if __name__ == "__main__":
    run_script(main)
