"""Export a model for other programs: python export.py --out_dir=out-shakespeare-char --to=exports/shakespeare

A folder is in Hugging Face's format: transformers and what builds on it load it. A file, --to=shakespeare.gguf, is for
llama.cpp and what builds on it (Ollama, LM Studio). --init_from here takes both.
"""

import nanogpt.import_torch  # noqa: F401  # faster than `import torch`

# isort: split

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from configurator import key, parse
from load import LoadedModel, ModelKeys, find_two_sources, load_model
from model import GPTConfig
from nanogpt import checkpoint
from nanogpt.console import format_bytes
from nanogpt.errors import InputError, raise_problems, run_script
from nanogpt.files import atomic_directory, atomic_write, created_parents, read_json
from nanogpt.interop.gguf import check_installed, write_gguf
from nanogpt.interop.huggingface import write_huggingface
from nanogpt.interop.names import find_architecture
from nanogpt.interop.peft import write_peft
from nanogpt.text.tokenizer import Tokenizer


@dataclass
class ExportConfig(ModelKeys):
    """The model to export, and the folder or file to write."""

    to: str = key("", "folder to write, a new or an empty one; or a new NAME.gguf", group="Target")
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = key(
        "float32", "dtype of the written weights; q8_0 only for .gguf"
    )
    shard_gb: float = key(5.0, "largest file of a folder in gigabytes; larger weights are split", gt=0, le=10**6)
    adapters: bool = key(False, "write only a LoRA run's adapters, in PEFT's format; False: merge them")


def main() -> None:
    config, explicit = parse(ExportConfig, description="Write a trained GPT as a Hugging Face folder or a GGUF file.")
    raise_problems(find_two_sources(config, explicit))
    target = Path(os.path.abspath(config.to))
    is_gguf = target.suffix.lower() == ".gguf"
    if is_gguf:
        check_installed(config.to)
    if not config.to:
        raise InputError("--to is empty; give the folder to write, --to=FOLDER, or a file, --to=NAME.gguf")
    if target.suffix.lower() in (".safetensors", ".bin", ".pt", ".pth"):
        raise InputError(f"--to={config.to}: weights are written in a folder; give --to=FOLDER, or --to=NAME.gguf")
    if config.dtype == "q8_0" and not is_gguf:
        raise InputError(f"--dtype=q8_0: {config.to} is a folder, which has no such weights; give --to=NAME.gguf")
    if config.adapters and is_gguf:
        raise InputError(f"--adapters=True: {config.to} is a file, and adapters are a folder; give --to=FOLDER")
    if "shard_gb" in explicit and (is_gguf or config.adapters):
        raise InputError(f"--shard_gb={config.shard_gb:g}: a .gguf and adapters are a single file each; leave it out")
    is_empty = os.path.isdir(target) and not os.path.islink(target) and not os.listdir(target)
    if os.path.lexists(target) and (is_gguf or not is_empty):
        raise InputError(f"--to={config.to}: exists and is not overwritten; delete it, or give another name")
    try:
        if config.adapters:
            with atomic_directory(target) as folder:
                summary = write_adapters(folder, config)
        else:
            loaded, size = export_gguf(config, target) if is_gguf else export_folder(config, target)
            numel = loaded.model.count_parameters()
            summary = f"{numel:,} parameters in {config.dtype}, {format_bytes(size)}"
    except FileExistsError as error:
        raise InputError(
            f"--to={config.to}: {error.filename} exists; wait for the export that is writing it, or delete it"
        ) from error
    except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--to={config.to}: cannot be written ({reason}); free some disk space, or give another place"
        ) from error
    print(f"wrote {config.to}: {summary}")


def raise_if_infinite(tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Raise InputError for weights that float16 makes infinite."""
    for name, tensor in tensors.items():
        if dtype == "float16" and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise InputError(f"--dtype=float16: {name} has weights beyond 65,504; give --dtype=bfloat16 or float32")


def export_folder(config: ExportConfig, target: Path) -> tuple[LoadedModel, int]:
    """Write a folder for transformers; return the model and the number of bytes."""
    with atomic_directory(target) as folder:
        loaded = load_model(config, "exporting")
        raise_if_infinite(loaded.model.state_dict(), config.dtype)
        card = model_card(target.name, loaded, config.dtype)  # first: a run in progress may delete its checkpoint
        write_huggingface(
            folder,
            asdict(loaded.model.config),
            loaded.model.state_dict(),
            loaded.tokenizer,
            extra_end_ids=loaded.end_ids,
            dtype=getattr(torch, config.dtype),
            shard_bytes=int(config.shard_gb * 1e9),
        )
        (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        return loaded, sum(path.stat().st_size for path in folder.iterdir())


def export_gguf(config: ExportConfig, target: Path) -> tuple[LoadedModel, int]:
    """Write a file for llama.cpp; return the model and the number of bytes."""
    loaded = load_model(config, "exporting")
    with created_parents(target), atomic_write(target) as path:
        write_gguf(
            path,
            asdict(loaded.model.config),
            loaded.model.state_dict(),
            loaded.tokenizer,
            extra_end_ids=loaded.end_ids,
            dtype=config.dtype,
        )
    if loaded.model.config.arch == "gpt2" and loaded.model.config.gelu == "erf":
        print("note: llama.cpp computes GELU's tanh approximation, this model the exact GELU; outputs differ slightly")
    if loaded.tokenizer.changes:
        changes = ", ".join(loaded.tokenizer.changes)
        print(f"note: llama.cpp does not apply the tokenizer's {changes}; give it text in that form")
    return loaded, target.stat().st_size


def write_adapters(folder: Path, config: ExportConfig) -> str:
    """Write the adapters of a run as PEFT's folder; return a summary."""
    source = Path(config.out_dir if config.init_from == "resume" else config.init_from)
    no_run = InputError(f"--adapters=True: {source} is not a run with LoRA; leave it out")
    if source.is_file():
        raise no_run
    run = checkpoint.load(checkpoint.find(source, config.checkpoint), with_optimizer=False)
    if not run.state["lora"]:
        raise no_run
    raise_if_infinite(run.model, config.dtype)
    adapters = {name: tensor.to(getattr(torch, config.dtype)) for name, tensor in run.model.items()}
    base = run.state["lora"]["base"]
    sizes = asdict(run.build_config(GPTConfig, "model"))
    write_peft(folder, adapters, run.state["lora"], sizes)
    if tokenizer := Tokenizer.load(run.path):  # with the chat template, which the base may lack
        tokenizer.save_pretrained(folder, sizes["block_size"])
    facts = "\n".join(f"| {fact} | {value} |" for fact, value in run_facts(run.path).items())
    card = f"""---
library_name: peft
---

LoRA adapters from nanoGPT. `adapter_config.json` names their base; where that is not a folder or id that transformers
reads, export it (`python export.py --init_from=BASE --to=FOLDER`) and put its place there.

| | |
|---|---|
{facts}
"""
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    numel = sum(tensor.numel() for tensor in adapters.values())
    return f"adapters of {numel:,} parameters in {config.dtype}, for {base}"


def model_card(name: str, loaded: LoadedModel, dtype: str) -> str:
    """Return the README.md of an exported folder: the model's sizes and origin, and code that loads it."""
    c, tokenizer = loaded.model.config, loaded.tokenizer
    source = Path(loaded.source)
    facts = {
        "architecture": f"{find_architecture(asdict(c)).model_class}, {'tied' if c.tied else 'untied'} output layer",
        "parameters": f"{loaded.model.count_parameters():,}",
        "layers": c.n_layer,
        "heads": c.n_head if c.arch == "gpt2" else f"{c.n_head}, of {c.head_dim} channels; {c.n_kv_head} key heads",
        "channels": f"{c.n_embd}, {c.n_inner} in the MLP",
        "context": f"{c.block_size:,} tokens",
        "vocabulary": f"{c.vocab_size:,} ids, tokenizer {tokenizer.name}",
        "weights": dtype,
    }
    facts |= run_facts(source) if checkpoint.is_checkpoint(source) else {"converted from": source.name}
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())

    start, limits = "The", "It continues text." if tokenizer.template is None else "It answers in conversations."
    if tokenizer.name == "char":
        start = tokenizer.decode([tokenizer.vocab_size // 2])
        limits += f" Its tokenizer knows {tokenizer.vocab_size} characters and refuses text with any other."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT exported by nanoGPT. {limits}

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer({start!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

`transformers serve {name}` serves it to clients of OpenAI's API at `/v1/completions`; the prompt and `max_tokens`
together must fit into the context. `python sample.py --init_from={name}` samples from it, and
`python train.py --init_from={name}` fine-tunes it.
"""


def run_facts(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint states about its run."""
    state = read_json(folder / "state.json")
    facts: dict[str, Any] = {}
    if isinstance(dataset := state["config"].get("dataset"), str):
        facts["dataset"] = ", ".join(Path(part).name for part in dataset.split(","))
    if (init_from := state["config"].get("init_from", "scratch")) != "scratch":
        facts["fine-tuned from"] = Path(init_from).name if os.path.exists(init_from) else init_from
    facts["steps"] = f"{state['step']:,}"
    facts["tokens"] = f"{state['samples'] * state['model']['block_size']:,}"
    if state["val_loss"] is not None:
        facts["validation loss"] = f"{state['val_loss']:.4f} nats per token"
    return facts


if __name__ == "__main__":
    run_script(main)
