"""Serve an exported folder by `transformers serve` and query it by the `openai` client; results in serve.json.

    pip install "transformers[serving]"
    python runs/export/serve.py

Makes a small model of each architecture with random weights and a character tokenizer, exports it by export.py, starts
the server on a free port, and requests greedy text at /v1/completions, whole and streamed. The text must be that of our
own network, decoded without a cache. Two more requests may be refused: a character that the model does not have, and
a chat, for which the model has no template.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, GPTConfig  # noqa: E402
from nanogpt import checkpoint  # noqa: E402
from nanogpt.text.tokenizer import Tokenizer  # noqa: E402

TEXT = "To be, or not to be: that is the question.\n"
PROMPT, NEW = "To be", 40
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128, "bias": False}
MODELS = {"gpt2": {}, "modern": {"arch": "modern", "n_kv_head": 2, "head_dim": 32, "tied": False}}
PACKAGES = ("torch", "transformers", "tokenizers", "openai", "fastapi", "uvicorn")


def make_run(out_dir: Path, tokenizer: Tokenizer, **changes: Any) -> GPT:
    """A checkpoint as train.py writes it, with weights large enough that the greedy text varies."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **SIZES | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(25)
    state: dict[str, Any] = {"step": 1, "samples": 1, "time_s": 0.0, "val_loss": None, "best_val_loss": None}
    state |= {"scaler": {}, "guard": {}, "processes": 1, "wandb_id": None, "model": asdict(model.config), "config": {}}
    checkpoint.save(out_dir, model.state_dict(), {}, state, tokenizer)
    return model.eval()


@torch.no_grad()
def greedy(model: GPT, tokenizer: Tokenizer) -> str:
    ids = tokenizer.encode(PROMPT)
    for _ in range(NEW):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return tokenizer.decode(ids)[len(PROMPT) :]


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[tuple[openai.OpenAI, str]]:
    """A client of a server that answers, and the server's command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers", "serve", str(folder), "--host=127.0.0.1", f"--port={port}", "--device=cpu"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path}
    with log.open("w") as out, subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            for _ in range(240):
                with contextlib.suppress(httpx.ConnectError):
                    httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                    break
                time.sleep(0.5)
            base_url = f"http://127.0.0.1:{port}/v1"
            yield openai.OpenAI(base_url=base_url, api_key="none", timeout=60), " ".join(command)
        finally:
            server.terminate()


def describe(request: Any) -> str:
    """Return the text of a response, or the status with the first line of its reason."""
    try:
        return repr(request())
    except openai.APIStatusError as error:
        return f"{error.status_code}: {str(error).splitlines()[0][:200]}"


def query(work: Path, name: str) -> dict[str, Any]:
    tokenizer = Tokenizer.characters(TEXT)
    model = make_run(work / "run", tokenizer, **MODELS[name])
    folder = work / name
    export = [sys.executable, ROOT / "export.py", f"--out_dir={work / 'run'}", f"--to={folder}"]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    with serving(folder, work / "log.txt") as (client, command):
        request: dict[str, Any] = {"model": str(folder), "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
        whole = client.completions.create(**request)
        streamed = "".join(part.choices[0].text for part in client.completions.create(**request, stream=True))
        message: Any = [{"role": "user", "content": PROMPT}]
        chat = describe(lambda: client.chat.completions.create(model=str(folder), messages=message, max_tokens=5))
        lacking = describe(lambda: client.completions.create(**request | {"prompt": "Zzz"}).choices[0].text)
        after = client.completions.create(**request).choices[0].text
    ours = greedy(model, tokenizer)
    return {
        "command": command.replace(str(work) + os.sep, ""),
        "prompt": PROMPT,
        "text": whole.choices[0].text,
        "finish_reason": whole.choices[0].finish_reason,
        "tokens": whole.usage and [whole.usage.prompt_tokens, whole.usage.completion_tokens],
        "equal to our greedy text": whole.choices[0].text == ours,
        "streamed text equal": streamed == ours,
        "a chat": chat,
        "a character that the model lacks": lacking,
        "the first request once more, equal": after == ours,
    }


def main() -> None:
    results: dict[str, Any] = {"command": "python runs/export/serve.py", "python": platform.python_version()}
    results["packages"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as work:
            results[name] = query(Path(work), name)
    text = json.dumps(results, indent=1)
    (HERE / "serve.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
