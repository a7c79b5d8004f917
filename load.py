"""What a run starts from: a dataset, a model that fits it, and how much of a step fits into memory at a time."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from configurator import Config, build
from model import GPT, GPTConfig
from nanogpt import checkpoint, optim
from nanogpt.checkpoint import Checkpoint
from nanogpt.compile import compile_model
from nanogpt.console import print0
from nanogpt.data.dataset import Dataset, Tokens, open_dataset
from nanogpt.data.rows import Rows
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.guard import UpdateGuard
from nanogpt.hashing import derive_seed
from nanogpt.interop.huggingface import read_weights
from nanogpt.memory import pick_micro_batch
from nanogpt.metrics import DeferredRead, Stopwatch
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

MODEL_KEYS = (
    *("arch", "n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_inner"),
    *("rope_theta", "norm_eps", "tied", "bias", "block_size"),
)
Steps = Iterator[list[float]]  # next() makes one training step, and gives the losses that were read during it


def check_shape(given: dict[str, Any], there: dict[str, Any], where: str) -> None:
    """Raises InputError for each given size that is not the one of weights that are there already."""
    asked = {name for name in given.keys() & set(MODEL_KEYS) if given[name] or isinstance(given[name], bool)}
    faults = [name for name in MODEL_KEYS if name in asked and given[name] != there[name]]  # a 0 leaves a size open
    if faults:
        told = (f"{k}={given[k]}: {where} has {k}={there[k]}, which cannot change; leave it out" for k in faults)
        raise InputError("\n".join(told))


def resume_settings(config: Config, given: dict[str, Any], resumed: Checkpoint) -> Config:
    """The run's own settings, and over them what files and flags give again; prints the differences. Raises InputError
    where those saved are not this program's, or the sizes not those of the weights."""
    source = str(resumed.path / "state.json")
    try:
        shape = build(GPTConfig, resumed.state["model"], source)
        if shape.n_layer > len(resumed.model):
            raise ValueError(f"n_layer={shape.n_layer}, but there are {len(resumed.model)} tensors")
        GPT.from_tensors(shape, resumed.model)  # which takes neither memory nor time
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{source}: no model of these sizes ({' '.join(str(error).split())[:200]})") from error
    resumed.state["model"] = asdict(shape)
    about_this_start = ("out_dir", "resume", "eval_only", "dry_run", "verify_data")
    saved = resumed.state["config"] | {name: getattr(config, name) for name in about_this_start}
    changed = {name: value for name, value in given.items() if saved.get(name) != value and name != "init_from"}
    check_shape(changed, asdict(shape), f"the run in {resumed.path.parent.parent}")
    print0(f"resuming {resumed.path}", *(f"  {name}: {saved.get(name)} -> {value}" for name, value in changed.items()))
    return build(type(config), saved | changed, source)


def open_data_and_model(
    config: Any, given: dict[str, Any], resumed: Checkpoint | None
) -> tuple[Dataset, GPT, Tokenizer | None]:
    """The dataset and the model, checked against each other, and the data's tokenizer where it can be had."""
    known = None  # the tokenizer that the weights were trained with
    if resumed:
        model = GPT.from_tensors(replace(GPTConfig(**resumed.state["model"]), dropout=config.dropout), resumed.model)
        known = Tokenizer.load(resumed.path)
    elif config.init_from != "scratch":
        model, known = load_weights(config, given)
    else:
        vocab_size = open_dataset(config.dataset, block_size=config.block_size).vocab_size or GPT2_VOCAB
        sizes = {name: getattr(config, name) for name in MODEL_KEYS}
        model = GPT(GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **sizes))
    shape = model.config
    dataset = open_dataset(
        config.dataset, block_size=shape.block_size, vocab_size=shape.vocab_size, verify=config.verify_data
    )
    tokenizer = dataset.tokenizer
    if known and tokenizer and not tokenizer.same_as(known):
        if resumed:
            raise InputError(
                f"dataset={config.dataset}: its tokenizer is not that of {resumed.path}; use the run's own data"
            )
        print0(f"warning: {dataset.name} has another tokenizer than {config.init_from}: its ids stand for other tokens")
    elif not known and dataset.vocab_size not in (None, shape.vocab_size):
        print0(f"warning: {dataset.name} has {dataset.vocab_size} ids, the model {shape.vocab_size}: other tokenizers?")
    if tokenizer is None and dataset.vocab_size is None and shape.vocab_size == GPT2_VOCAB:
        print0(f"{dataset.name} has neither meta.json nor a tokenizer: its ids are taken for GPT-2's encoding")
        try:
            tokenizer = Tokenizer.gpt2() if config.sample_chars else None
        except InputError as error:
            print0(f"no samples will be printed: {error}")
    return dataset, model, tokenizer


def document_separator_id(config: Any, dataset: Dataset) -> int | None:
    """The token that ends a document, if documents are to be kept apart. Raises InputError where there is none."""
    if config.mask_documents and dataset.end_of_text is None:
        raise InputError(f"mask_documents=True: {dataset.name} has no token that ends a document; leave it out")
    return dataset.end_of_text if config.mask_documents else None


def load_weights(config: Any, given: dict[str, Any]) -> tuple[GPT, Tokenizer | None]:
    """The model that `init_from` names, its context cut to a given block_size, and its tokenizer where it has one."""
    block_size = config.block_size if "block_size" in given else None
    try:
        if checkpoint.is_checkpoint(Path(config.init_from)):
            folder: Path | None = checkpoint.find(Path(config.init_from))
            model = GPT.from_checkpoint(str(folder), dropout=config.dropout, block_size=block_size)
        else:
            weights = read_weights(config.init_from)
            print0(*weights.notes)
            model = GPT.from_pretrained(weights, dropout=config.dropout, block_size=block_size)
            folder = weights.tokenizer_folder
    except ValueError as error:
        raise InputError(f"init_from={config.init_from}: {error}; leave --block_size out or give less") from error
    check_shape(given, asdict(model.config), config.init_from)
    return model, Tokenizer.load(folder) if folder else None


def training_steps(config: Any, raw_model: GPT, tokens: Tokens, world: World) -> Steps:
    """train.py's steps in one process, without its log; bench.py times them, the dial tries sizes by them;
    tests/test_bench.py holds the two together."""
    rows = Rows(tokens, config.block_size, raw_model.config.vocab_size, config.seed, config.row_order)
    raw_model.to(world.device)
    raw_model.activation_checkpointing, raw_model.loss_chunk = config.activation_checkpointing, config.loss_chunk
    micro_batch = pick_micro_batch(config, raw_model, world)
    micro_steps = config.rows_per_step // micro_batch
    model = compile_model(config, raw_model, world, rows, micro_batch)
    optimizer = optim.Optimizer(raw_model, config, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    guard, late = UpdateGuard(world.device, max_bad_steps=1 << 30), DeferredRead(Stopwatch())
    for step in itertools.count():
        loss_sum = torch.zeros((), device=world.device)
        if rows.masked:
            counted = max(rows.num_targets(slice(step * config.rows_per_step, (step + 1) * config.rows_per_step)), 1)
        for micro_step in range(micro_steps):
            first_row = step * config.rows_per_step + micro_step * micro_batch
            x, y = world.to_device(*rows[first_row : first_row + micro_batch])  # (micro_batch, block_size) each
            if config.dropout:
                torch.manual_seed(derive_seed(config.seed, step, micro_step, world.rank))
            with world.autocast():
                loss = model(x, y)[1]
            share = (y >= 0).sum() / counted if rows.masked else 1 / micro_steps
            scaler.scale(loss * share).backward()
            loss_sum += loss.detach() * share
        scaler.unscale_(optimizer)  # type: ignore[arg-type]
        grad_norm = optim.gradient_norm(raw_model.parameters())
        skip = guard.check(loss_sum, grad_norm)
        factor = config.learning_rate_at(step) / config.learning_rate
        optimizer.step(factor, optim.clip_divisor(config.grad_clip, grad_norm), skip)
        scaler.update()
        raw_model.zero_grad(set_to_none=True)
        late.put(step, torch.stack([loss_sum, grad_norm, guard.bad_in_a_row]))
        yield [values[0] for _, values, _ in late.take()]
