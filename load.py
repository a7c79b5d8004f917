"""Load what a script starts from: a model with its tokenizer, the data and the model of a training run."""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configurator import Config, ExplicitKeys, key
from model import GPT, GPTConfig
from nanogpt import checkpoint
from nanogpt.checkpoint import Checkpoint
from nanogpt.compile import compile_model, should_compile
from nanogpt.console import print0
from nanogpt.cpu_kernels import use_cpu_kernels
from nanogpt.data.dataset import Dataset, open_dataset, resolve
from nanogpt.data.rows import Rows, StepBatch
from nanogpt.distributed import World
from nanogpt.errors import InputError, raise_problems
from nanogpt.files import read_json
from nanogpt.guard import MAX_OVERFLOWS, UpdateGuard
from nanogpt.interop.huggingface import read_weights
from nanogpt.interop.names import LazyTensors
from nanogpt.look_back import look_back
from nanogpt.lora import add_lora, tensors_sha256
from nanogpt.memory import pick_micro_batch
from nanogpt.optim import Optimizer
from nanogpt.schedule import StepSchedule
from nanogpt.sharding import copy_rows, equalize_copies, local, shard_model
from nanogpt.state import TrainState
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer
from nanogpt.trials import try_dtypes

# Keys of TrainConfig that are sizes of GPTConfig; the others come from the data or from weights, and dropout may vary.
OTHER_SIZES = ("dropout", "vocab_size", "qkv_bias", "rope_scaling")
MODEL_KEYS = [f.name for f in fields(GPTConfig) if f.name not in OTHER_SIZES]
FIXED_KEYS = ("look_back", "lora_rank", "lora_alpha", "lora_targets")  # that also cannot change on resume
# Keys that are about one start of a run and are not taken from its checkpoint.
START_KEYS = ("out_dir", "resume", "eval_only", "dry_run", "verify_data", "new_data", "timeout_s")


# --- A trained model


@dataclass
class ModelKeys:
    """The keys that name a trained model, shared by the scripts that use one."""

    init_from: str = key("resume", "resume: out_dir's run; gpt2*, a hub id, a directory, .gguf, ckpt.pt", group="Model")
    out_dir: str = key("out", "directory of the run")
    checkpoint: str = key("best", "checkpoint of the run: best, latest, step-NNNNNN or its directory")


def find_two_sources(keys: ModelKeys, explicit: Mapping[str, Any]) -> list[str]:
    """The problems of keys that name a second model beside init_from, a line each."""
    if keys.init_from == "resume":
        return []
    unused = ["out_dir"] if checkpoint.is_checkpoint(Path(keys.init_from)) else ["out_dir", "checkpoint"]
    reason = f"--init_from={keys.init_from} takes its place; leave it out"
    return [f"--{name}: {reason}" for name in unused if name in explicit]


class LoadedModel(NamedTuple):
    """A model, its tokenizer and source; the run's settings and the ids that end a text, where known."""

    model: GPT
    tokenizer: Tokenizer
    source: str
    train_config: dict[str, Any]
    end_ids: Sequence[int]


def load_model(keys: ModelKeys, action: str) -> LoadedModel:
    """Load a trained model and its tokenizer, and print `action` ("sampling from") with the source.

    Raises InputError for whatever is missing.
    """
    from_run = keys.init_from == "resume"
    source = Path(keys.out_dir if from_run else keys.init_from)
    end_ids: list[int] = []
    may_be_gpt2 = True  # without a tokenizer the ids may be GPT-2's
    if checkpoint.is_checkpoint(source) or (from_run and not (source / "ckpt.pt").exists()):
        # From here on by the checkpoint's path: a run in progress may have a better one in a moment.
        source = checkpoint.find(source, keys.checkpoint)
        print(f"{action} {source}", file=sys.stderr)
        model = GPT.from_checkpoint(source)
        tokenizer = Tokenizer.load(source)
        train_config = read_json(source / "state.json")["config"]
    else:
        print(f"{action} {source}", file=sys.stderr)
        weights = read_weights(source if from_run else keys.init_from)
        for note in weights.notes:
            print(note, file=sys.stderr)
        model = GPT.from_tensors(GPTConfig(**weights.config), weights.tensors, dropout=0.0)
        train_config = weights.train_config
        end_ids = weights.end_ids
        tokenizer = weights.tokenizer
        may_be_gpt2 = weights.gpt2_encoding
        if tokenizer is None and not may_be_gpt2 and train_config.get("dataset"):
            tokenizer = Tokenizer.load(resolve(train_config["dataset"]))  # nanoGPT keeps the characters beside the data

    if tokenizer is None and not (may_be_gpt2 and model.config.vocab_size == GPT2_VOCAB):
        raise InputError(
            f"{source} has no tokenizer, and its {model.config.vocab_size} ids may not be GPT-2's: put its "
            "tokenizer.json beside it"
        )
    tokenizer = tokenizer or Tokenizer.from_name_or_path("gpt2")
    tokenizer.check_rows(model.config.vocab_size)
    check_weights(model, str(source))
    return LoadedModel(model, tokenizer, str(source), train_config, end_ids)


def check_weights(model: GPT, source: str) -> None:
    """Raise InputError for NaN or infinite weights in this rank's part."""
    for name, tensor in model.state_dict().items():
        part = local(tensor)
        if part.numel() and not all(map(torch.isfinite, part.aminmax())):
            raise InputError(f"{source}: {name} holds NaN or infinite weights; use another checkpoint")


# --- A training run


def resume_config(config: Config, explicit: ExplicitKeys, resumed: Checkpoint) -> Config:
    """The run's own settings, updated by the explicit keys; prints what changes.

    Sizes come from the checkpoint: a config file that says otherwise is overruled with a printed line. Raises
    InputError for a flag that contradicts them, and for a checkpoint whose sizes are not those of its tensors.
    """
    resumed.state["model"] = asdict(resumed.build_model(GPT, GPTConfig).config)
    actual = resumed.state["model"] | {name: resumed.state["config"][name] for name in FIXED_KEYS}
    sizes = {name: actual[name] for name in MODEL_KEYS}  # also those that were no keys when the run began
    saved = {**resumed.state["config"], **sizes, **{name: getattr(config, name) for name in START_KEYS}}
    relevant = {n: value for n, value in explicit.items() if n != "init_from" and not is_unset_size(n, value)}
    changed = {name: value for name, value in relevant.items() if saved.get(name) != value}
    conflicts = conflicting_sizes(changed, actual)
    flags = {name: changed[name] for name in conflicts if name in explicit.flags}
    raise_for_sizes(flags, actual, f"the run in {resumed.path.parent.parent}")

    print0(f"resuming {resumed.path}")
    for name in conflicts:
        print0(f"  {name}: {changed.pop(name)} in a config file is ignored; the run has {actual[name]}")
    for name, value in changed.items():
        print0(f"  {name}: {saved[name]} -> {value}")
    return type(config)(**{**saved, **changed})


def is_unset_size(name: str, value: Any) -> bool:
    """True for a model size of 0, which stands for the size that the weights have."""
    return name in MODEL_KEYS and value == 0 and value is not False  # False == 0, but tied=False is a choice


def conflicting_sizes(explicit: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Names of explicit model keys that differ from those in `actual`. A 0 leaves a size open."""
    keys = (*MODEL_KEYS, *FIXED_KEYS)
    sizes = {name: value for name, value in explicit.items() if name in keys and not is_unset_size(name, value)}
    return [name for name, value in sizes.items() if value != actual.get(name, value)]


def raise_for_sizes(explicit: Mapping[str, Any], actual: Mapping[str, Any], where: str) -> None:
    """Raise InputError for explicit model keys that contradict the sizes of existing weights."""
    raise_problems(
        f"{name}={explicit[name]}: {where} has {name}={actual[name]}, which cannot change; leave it out"
        for name in conflicting_sizes(explicit, actual)
    )


def load_data_and_model(
    config: Any, explicit: Mapping[str, Any], resumed: Checkpoint | None, world: World
) -> tuple[Dataset, GPT, Tokenizer | None]:
    """The dataset and the model of a training run, checked against each other, and the data's tokenizer if known."""
    model_tokenizer = None  # the tokenizer that the weights were trained with
    if resumed:
        model_config = GPTConfig(**resumed.state["model"])
        tensors = resumed.model if world.mesh else {name: tensor.clone() for name, tensor in resumed.model.items()}
        model = build_model(replace(model_config, dropout=config.dropout), tensors, world)
        model_tokenizer = Tokenizer.load(resumed.path)
    elif config.init_from != "scratch":
        model, model_tokenizer = load_weights(config, explicit, world)
    else:
        dataset = open_dataset(config.dataset, block_size=config.block_size, token_dtype=config.token_dtype)
        model = new_model(config, dataset.vocab_size or GPT2_VOCAB, world)  # whose sizes the dataset needs, below

    if config.lora_rank:
        if not resumed and checkpoint.has_adapters(Path(config.init_from)):
            raise InputError(
                f"init_from={config.init_from}: has adapters itself; merge them by export.py, or resume it"
            )
        add_lora(model, config.init_from, config.lora_rank, config.lora_alpha, config.lora_targets, resumed)

    T, vocab_size = model.config.block_size, model.config.vocab_size
    dataset = open_dataset(
        config.dataset, block_size=T, vocab_size=vocab_size, verify=config.verify_data, token_dtype=config.token_dtype
    )
    if resumed and not config.eval_only:
        compare_data(config, resumed, dataset)
    tokenizer = dataset.tokenizer
    if model_tokenizer and tokenizer and tokenizer.vocab != model_tokenizer.vocab:
        if resumed:
            raise InputError(
                f"dataset={config.dataset}: its tokenizer is not that of {resumed.path}; use the run's own data"
            )
        print0(f"warning: {dataset.name} and {config.init_from} have different tokenizers: ids mean different tokens")
    elif not model_tokenizer and dataset.vocab_size not in (None, vocab_size):
        print0(f"warning: {dataset.name} has {dataset.vocab_size} ids, the model {vocab_size}")
    if tokenizer is None and dataset.vocab_size is None and vocab_size == GPT2_VOCAB:
        print0(f"{dataset.name} has neither meta.json nor a tokenizer: assuming GPT-2's encoding")
        if config.sample_chars:
            try:
                tokenizer = Tokenizer.from_name_or_path("gpt2")
            except InputError as error:
                print0(f"no samples will be printed: {error}")
    return dataset, model, tokenizer


def compare_data(config: Any, resumed: Checkpoint, dataset: Dataset) -> None:
    """Raise InputError where a run's data is not what it was, unless new_data or another dataset is given.

    Losses on another val split are not compared with the new ones.
    """
    saved = resumed.state["data"] or dataset.fingerprints
    changed = [split for split in saved if saved[split] != dataset.fingerprints[split]]
    if changed and not config.new_data and config.dataset == resumed.state["config"]["dataset"]:
        raise InputError(
            f"dataset={config.dataset}: the {' and '.join(changed)} tokens are not those that the run began with; put "
            "them back, or give --new_data=True to continue with these"
        )
    if "val" in changed:
        print0("the val split has changed: earlier losses are no longer compared")
        resumed.state |= {"val_loss": None, "best_val_loss": None, "since_best": 0}


def new_model_config(config: Any, vocab_size: int) -> GPTConfig:
    """The GPTConfig of a new model by the keys of TrainConfig."""
    return GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **{n: getattr(config, n) for n in MODEL_KEYS})


def new_model(config: Any, vocab_size: int, world: World) -> GPT:
    """A new model by the keys of TrainConfig, with random weights."""
    adjust = look_back if config.look_back else None
    return build_model(new_model_config(config, vocab_size), None, world, adjust=adjust)


@torch.no_grad()
def build_model(
    config: GPTConfig,
    tensors: Mapping[str, Tensor] | None,
    world: World,
    block_size: int | None = None,
    adjust: Callable[[GPTConfig, str, Tensor], None] | None = None,
) -> GPT:
    """A GPT with these tensors, or with random weights for None; sharded if the world is.

    Sharded, a rank reads its rows of a tensor at a time. block_size: a shorter context, else ValueError.
    adjust: changes each random weight.
    """
    if tensors is not None and not world.mesh:
        model = GPT.from_tensors(config, dict(tensors), block_size=block_size)
        model.first_rows_hash = tensors_sha256({name: p[:1] for name, p in model.named_parameters()})
        return model
    with torch.device("meta"):
        model = GPT(config)
    if block_size is not None:
        model.crop_block_size(block_size)
    if world.mesh:
        shard_model(model, world.mesh, world.dtype)
    model.to_empty(device=world.device if world.mesh else "cpu")
    first_rows = {}
    for name, parameter in model.named_parameters():
        if tensors is None:
            whole = model.initial_value(name, parameter.shape)
            if adjust:
                adjust(config, name, whole)
            copy_rows(parameter, whole)
        else:
            read = partial(tensors.rows, name) if isinstance(tensors, LazyTensors) else tensors[name].__getitem__
            copy_rows(parameter, read)
            first_rows[name] = read(slice(1))
    model.first_rows_hash = tensors_sha256(first_rows)
    return model


def load_weights(config: Any, explicit: Mapping[str, Any], world: World) -> tuple[GPT, Tokenizer | None]:
    """The model that config.init_from names, and its tokenizer if it has one; an explicit block_size crops its context.

    Raises InputError if it cannot be loaded, and for explicit keys that contradict its sizes.
    """
    init_from = config.init_from
    block_size = config.block_size if "block_size" in explicit else None
    try:
        if checkpoint.is_checkpoint(Path(init_from)):
            folder = checkpoint.find(Path(init_from))
            is_verified = world.size > 1 and os.environ.get("LOCAL_RANK", "0") != "0"  # by the machine's first process
            loaded = checkpoint.load(folder, with_optimizer=False, is_verified=is_verified, is_mapped=bool(world.mesh))
            whole = loaded.build_model(GPT, GPTConfig)
            sizes, tensors = whole.config, whole.state_dict()
            tokenizer = Tokenizer.load(folder)
        else:
            weights = read_weights(init_from)
            print0(*weights.notes)
            tokenizer = weights.tokenizer
            sizes, tensors = GPTConfig(**weights.config), weights.tensors
        model = build_model(replace(sizes, dropout=config.dropout), tensors, world, block_size)
    except ValueError as error:
        hint = "use another model" if block_size is None else "leave --block_size out or give less"
        raise InputError(f"init_from={init_from}: {error}; {hint}") from error
    raise_for_sizes(explicit, asdict(model.config), init_from)
    check_weights(model, init_from)
    if tokenizer:
        tokenizer.check_rows(model.config.vocab_size)
    return model, tokenizer


def prepare_model(config: Any, model: GPT, world: World) -> None:
    """Move a model to its device and set the options of training; in place."""
    model.to(world.device)
    equalize_copies(model, world.mesh)
    model.activation_checkpointing = config.activation_checkpointing
    model.loss_chunk = config.loss_chunk
    if world.device.type == "cpu":
        use_cpu_kernels(model)


def make_state(config: Any, model: GPT, world: World) -> TrainState:
    """The state of a run before its first update; the model is on its device."""
    optimizer = Optimizer(
        model,
        world,
        kind=config.optimizer,
        learning_rate=config.learning_rate,
        muon_lr=config.muon_lr,
        muon_momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
    )
    uses_float16 = world.dtype == torch.float16
    scaler = torch.amp.GradScaler(world.device.type, enabled=uses_float16)
    guard = UpdateGuard(world.device, MAX_OVERFLOWS if uses_float16 else 1, config.skip_spikes)
    return TrainState(model, optimizer, scaler, guard)


def prepare_training(
    config: Any, model: GPT, rows: Rows, micro_batch: int, world: World
) -> tuple[torch.nn.Module, TrainState]:
    """The model compiled as configured, and the state of a run before its first update."""
    trained: torch.nn.Module = model
    if should_compile(config.compile, world.device):
        batch = StepBatch(rows, 0, micro_batch * world.size, micro_batch, world, config.seed, 0, dropout=0.0)
        *inputs, _ = next(batch.micro_batches())
        trained = compile_model(model, world, inputs, is_whole_step=micro_batch == config.rows_per_step)
    return trained, make_state(config, model, world)


def make_schedule(config: Any) -> StepSchedule:
    """The schedule of a run of max_iters updates."""
    min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
    return StepSchedule(
        config.schedule if config.decay_lr else "constant",
        max_iters=config.max_iters,
        max_lr=config.learning_rate,
        min_lr=min_lr if config.decay_lr else config.learning_rate,  # so that a constant rate is exact
        warmup_steps=config.warmup_iters if config.decay_lr else 0,
        end_step=config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters,
        decay_steps=config.decay_iters,
    )


def micro_batch_sizes(config: Any, world_size: int) -> list[int]:
    """Numbers of rows that can make up a forward pass, descending: they divide a rank's share of every step."""
    smallest_step = config.batch_size if config.batch_growth_tokens else config.rows_per_step
    share = smallest_step // world_size
    limit = share if config.micro_batch_size == "auto" else config.micro_batch_size or config.batch_size
    divisors = {size for n in range(1, math.isqrt(share) + 1) if share % n == 0 for size in (n, share // n)}
    return sorted((n for n in divisors if n <= limit), reverse=True)


def choose_micro_batch(config: Any, model: GPT, world: World) -> int:
    """Rows of a forward pass: as configured, or with "auto" the most that fit into memory."""
    sizes = micro_batch_sizes(config, world.size)
    if config.micro_batch_size == "auto":
        return pick_micro_batch(model, config.optimizer, sizes, world)
    return sizes[0]


def choose_dtype(config: Any, model_config: GPTConfig, world: World) -> tuple[Any, World]:
    """The world with the dtype that config.dtype names, or on a CPU with the faster one; the config then names it.

    So a resumed run keeps it, and nothing depends on another trial.
    """
    rows = micro_batch_sizes(config, world.size)[0] * model_config.block_size
    world = try_dtypes(world, config.dtype, rows, model_config.n_embd, model_config.n_inner)
    if world.bfloat16_speedup or (world.mesh and world.device.type == "cpu"):
        config = replace(config, dtype=world.dtype_name)
    return config, world
