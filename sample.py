"""Write text with a trained GPT: python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"

The weights come from a run of train.py or, with --init_from, from GPT-2, a Hugging Face folder or nanoGPT's ckpt.pt.
Samples go to standard output, everything else to standard error.
"""

import nanogpt.import_torch  # noqa: F401  # faster than `import torch`

# isort: split

import contextlib
import itertools
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from configurator import key, parse
from load import ModelKeys, find_two_sources, load_model
from model import GPT
from nanogpt import distributed
from nanogpt.compile import should_compile
from nanogpt.device import free_memory
from nanogpt.errors import InputError, raise_problems, run_script
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.low_precision import to_inference_precision
from nanogpt.generate.prompt import encode_conversation, encode_prompt
from nanogpt.generate.sampling import Sampling
from nanogpt.generate.stream import SampleText, TextStream, print_in_order
from nanogpt.memory import crop_to_memory, decoder_rows_that_fit
from nanogpt.rendezvous import explain_errors
from nanogpt.text.chat import Chat, Messages
from nanogpt.text.streams import read_text
from nanogpt.text.tokenizer import Tokenizer

SEPARATOR = "\n---------------\n"  # after each sample


@dataclass
class SampleConfig(ModelKeys):
    """Which model to sample from, and how."""

    start: str = key("\n", "the prompt; FILE:prompt.txt reads it from a file", group="Text")
    num_samples: int = key(10, "samples to write, as many at once as fit into memory", ge=1)
    max_new_tokens: int = key(500, "tokens of each sample", ge=1)
    temperature: float = key(0.8, "1.0 = unscaled, lower = less random, 0 = greedy", ge=0)
    top_k: int | None = key(200, "sample from this many most probable tokens; None: from all", ge=1)
    top_p: float = key(1.0, "sample from the most probable tokens that together have this probability", gt=0, le=1)
    min_p: float = key(0.0, "drop tokens with p < min_p * max p", ge=0, lt=1)
    stop: str | None = key(None, "end a sample before this string")
    seed: int = key(1337, "random seed", ge=0)
    chat: bool = key(False, "the prompt is a question to a model tuned on conversations; only its answer is written")
    interactive: bool = key(False, "type prompts one after another; Ctrl-C stops a sample")
    logprobs: bool = key(False, "show each token's probability: as color in a terminal, else a line each")

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "dtype of the weights")
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")


def main() -> None:
    config, explicit = parse(SampleConfig, description="Write text with a trained GPT.")
    check_flags(config, explicit)
    prompt = config.start
    if prompt.startswith("FILE:"):
        prompt = read_text(prompt.removeprefix("FILE:"), f"--start={prompt}")
    world = distributed.start(config.device, config.dtype)
    compiled = should_compile(config.compile, world.device)

    with explain_errors("not enough memory for this model: try --dtype=bfloat16, or fewer --max_new_tokens"):
        loaded = load_model(config, action="sampling from")
        model, tokenizer = loaded.model, loaded.tokenizer
        chat = Chat.for_answers(tokenizer, loaded.end_ids) if config.chat else None
        rows = 1 if config.interactive else config.num_samples
        with to_inference_precision(model, world, config.dtype, compiled, rows):
            if compiled:
                print("compiling the decode step", file=sys.stderr)
            if config.interactive:
                crop_to_memory(model, free_memory(world.device))
                converse(config, Decoder(model, compiled=compiled), tokenizer, chat)
            else:
                write_samples(config, model, tokenizer, chat, prompt, compiled)


def check_flags(config: SampleConfig, explicit: dict[str, Any]) -> None:
    raise_problems(find_two_sources(config, explicit))
    for name in ("start", "num_samples"):
        if config.interactive and name in explicit:
            raise InputError(f"--{name}: an interactive session takes its prompts from the keyboard; leave it out")
    if config.chat and not config.interactive and not config.start.strip():
        raise InputError("--chat=True: there is no question; give one by --start=TEXT, or use --interactive=True")


def write_samples(
    config: SampleConfig, model: GPT, tokenizer: Tokenizer, chat: Chat | None, prompt: str, compiled: bool
) -> None:
    """Print num_samples continuations of the prompt, or answers to it."""
    if chat:
        ids, _ = encode_conversation([{"role": "user", "content": prompt}], model, chat)
        prompt = ""  # only the answers are printed
    else:
        try:
            ids = encode_prompt(prompt, model, tokenizer)
        except InputError as error:
            raise InputError(f"--start: {error}; give another by --start=TEXT or --start=FILE:prompt.txt") from error

    length = len(ids) + config.max_new_tokens
    rows = decoder_rows_that_fit(model, length, free_memory(model.token_embedding.weight.device))
    rows = min(rows, config.num_samples)
    if rows < config.num_samples:
        print(f"{rows} of {config.num_samples} samples at a time, for lack of memory", file=sys.stderr)

    decoder = Decoder(model, rows, length, compiled)
    for first in range(0, config.num_samples, rows):
        remaining = config.num_samples - first
        if remaining < rows:
            del decoder  # its memory is needed
            decoder = Decoder(model, remaining, length, compiled)
        write(config, decoder, tokenizer, chat, ids, prompt, first)


def converse(config: SampleConfig, decoder: Decoder, tokenizer: Tokenizer, chat: Chat | None) -> None:
    """Continue or answer what the user types, line after line, until the input ends."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives `input` line editing and a history)
    usage = "ask; an empty line starts a new conversation" if chat else "type a prompt; an empty line continues it"
    print(f"{usage}; Ctrl-C stops the output, Ctrl-D exits", file=sys.stderr)
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""

    ids: list[int] = []  # of the text so far
    messages: Messages = []  # of the conversation so far
    for turn in itertools.count():
        try:
            line = input(mark)
            if chat and not line:
                messages = []
                continue
            if chat:
                ids, question = encode_conversation([*messages, {"role": "user", "content": line}], decoder.model, chat)
            elif line:
                ids = encode_prompt(line, decoder.model, tokenizer)
            elif not ids:
                raise InputError("there is no text to continue yet; type a prompt")

            (sample,) = write(config, decoder, tokenizer, chat, ids, "" if chat else line, first=turn)
            ids = ids + sample.ids
            if chat:
                answer = tokenizer.decode([id for id in sample.ids if id not in chat.stop_ids])
                messages = [*question, {"role": "assistant", "content": answer}]
        except (InputError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # at the prompt
            print(file=sys.stderr)
        except EOFError:
            return


def write(
    config: SampleConfig,
    decoder: Decoder,
    tokenizer: Tokenizer,
    chat: Chat | None,
    ids: list[int],
    prompt: str,
    first: int,
) -> list[SampleText]:
    """Print a sample for each row of the decoder, numbered from `first`, and the speed. Returns the samples.

    ids: the prompt's. prompt: printed before each sample. Ctrl-C prints what there is; an interactive session survives.
    """
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p, config.seed, tokenizer.vocab_size)
    stop_strings = [config.stop] if config.stop else []
    stop_ids = chat.stop_ids if chat else ()
    previous_ids = () if chat else ids[-16:]
    samples = []
    for _ in range(decoder.rows):
        stream = TextStream(tokenizer, stop_strings, stop_ids, previous_ids)
        samples.append(SampleText(stream, prompt, show_probs=config.logprobs))

    separator = "\n" if config.interactive else SEPARATOR
    unprinted = list(samples)
    start_time = time.perf_counter()
    try:
        print_in_order(unprinted, separator)
        for tokens in decoder.generate(
            [ids] * decoder.rows,
            config.max_new_tokens,
            sampling,
            sample_indices=range(first, first + decoder.rows),
            top_logprobs=0 if config.logprobs else None,
        ):
            for sample, token in zip(samples, tokens, strict=True):
                sample.put(token)
            print_in_order(unprinted, separator)
            if not unprinted:
                break
    except KeyboardInterrupt:
        if not config.interactive:
            raise
    finally:
        seconds = time.perf_counter() - start_time
        for sample in samples:
            sample.close()
        print_in_order(unprinted, separator)

    num_tokens = sum(len(sample.ids) for sample in samples)
    print(f"{num_tokens / seconds:.1f} tok/s ({num_tokens:,} tokens in {seconds:.1f} s)", file=sys.stderr)
    return samples


if __name__ == "__main__":
    run_script(main)
