"""A page to play with a trained GPT: python play.py --out_dir=out-shakespeare-char

The page is served only to this machine. The model generates one text at a time; further requests wait in a queue.
"""

import nanogpt.import_torch  # noqa: F401  # faster than `import torch`

# isort: split

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import key, parse
from load import ModelKeys, find_two_sources, load_model
from nanogpt import distributed
from nanogpt.compile import should_compile
from nanogpt.device import describe_device, free_memory
from nanogpt.errors import InputError, raise_problems, run_script
from nanogpt.generate.low_precision import to_inference_precision
from nanogpt.memory import crop_to_memory
from nanogpt.rendezvous import explain_errors
from nanogpt.text.chat import Chat
from nanogpt.text.tokenizer import Tokenizer


@dataclass
class PlayConfig(ModelKeys):
    """Which model to play with, and where."""

    port: int = key(8080, "port of the page on 127.0.0.1; 0: any free port", group="Machine", ge=0, le=65535)
    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "dtype of the weights")
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")


def main() -> None:
    config, explicit = parse(PlayConfig, description="Serve a page to play with a trained GPT.")
    raise_problems(find_two_sources(config, explicit))
    try:
        from nanogpt.playground.server import Playground, create_app, create_server
    except ModuleNotFoundError as error:
        raise InputError(f'the playground needs {error.name}; run pip install -e ".[play]"') from None
    try:
        listener = socket.create_server(("127.0.0.1", config.port))
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise InputError(f"--port={config.port}: {reason}; choose another, such as --port=8081") from None

    world = distributed.start(config.device, config.dtype)
    compiled = should_compile(config.compile, world.device)
    with explain_errors("not enough memory for this model: try --dtype=bfloat16, or a smaller one"):
        loaded = load_model(config, action="playing with")
        heading = {"parameters": loaded.model.count_parameters(), "device": describe_device(world.device)}
        context = to_inference_precision(loaded.model, world, config.dtype, compiled, rows=1)
        crop_to_memory(loaded.model, free_memory(world.device))
        chat = load_chat(loaded.tokenizer, loaded.end_ids)
        playground = Playground(loaded.model, loaded.tokenizer, context, compiled, chat, loaded.end_ids)

    source = Path(loaded.source)
    run_dir = source.parents[1] if source.parent.name == "ckpt" else source
    app = create_app(playground, {"name": run_dir.resolve().name, **heading}, run_dir / "metrics.jsonl")
    print(f"http://127.0.0.1:{listener.getsockname()[1]} is open; press Ctrl-C to stop", flush=True)
    create_server(app).run(sockets=[listener])


def load_chat(tokenizer: Tokenizer, end_ids: Sequence[int]) -> Chat | None:
    """The tokenizer's chat template, if it has one that works."""
    if tokenizer.template is None:
        return None
    try:
        return Chat.for_answers(tokenizer, end_ids)
    except InputError as error:
        print(f"no conversations, only texts: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    run_script(main)
