"""Train a GPT: python train.py config/train_shakespeare_char.py --batch_size=32

Several GPUs: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import nanogpt.import_torch  # noqa: F401  # faster than `import torch`

# isort: split

import contextlib
import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import budget
from configurator import key, parse
from load import (
    MODEL_KEYS,
    choose_dtype,
    choose_micro_batch,
    load_data_and_model,
    make_schedule,
    micro_batch_sizes,
    new_model_config,
    prepare_model,
    prepare_training,
    resume_config,
)
from nanogpt import checkpoint, distributed
from nanogpt.checkpoint import Checkpoint
from nanogpt.console import print0
from nanogpt.control import Control, EvaluationStopped, Requests, SignalCatcher, ignore_save_signal
from nanogpt.data.dataset import Dataset, document_separator_id
from nanogpt.data.ngrams import count_ngrams
from nanogpt.data.rows import EvalWindows, Rows, StepBatch
from nanogpt.data.token_shards import TokenDtype
from nanogpt.device import free_memory, seed_everything
from nanogpt.distributed import World
from nanogpt.errors import InputError, raise_problems, run_script
from nanogpt.evaluation import eval_batch_size, evaluate
from nanogpt.generate.stream import sample_text
from nanogpt.guard import UpdateGuard
from nanogpt.layer_stats import LayerStats
from nanogpt.lora import check_lora
from nanogpt.memory import memory_hint, raise_if_memory_is_short
from nanogpt.metrics import MetricsWriter, StepStats, check_trackers
from nanogpt.optim import Optimizer, clip_divisor, gradient_norm
from nanogpt.pace import Pace
from nanogpt.rendezvous import explain_errors, join, world_size
from nanogpt.run_dir import LOCKED_S, RunDir
from nanogpt.schedule import RowSchedule, StepSchedule
from nanogpt.sharding import check_shards
from nanogpt.state import TrainState
from nanogpt.text.tokenizer import Tokenizer
from nanogpt.train_log import (
    StepLogger,
    format_losses,
    print_end,
    print_model_summary,
    print_run_summary,
    warn_if_slow_on_cpu,
    warn_of_schedule,
)

OWN_KEYS = ("out_dir", "init_from", "dataset")  # paths, which may differ between machines
MAX_SIZE = 2**30  # limit of each model size: the product of two fits into 64 bits


@dataclass
class TrainConfig:
    """Every key of a run. Config files and --key=value flags set them; --help lists them."""

    out_dir: str = key("out", "directory for checkpoints and metrics", group="Run")
    init_from: str = key("scratch", "weights: scratch, resume, gpt2 to gpt2-xl, hub id, directory, .gguf, ckpt.pt")
    resume: Literal["auto", True, False] = key(False, "resume the run in out_dir; auto: resume if there is one")
    seed: int = key(1337, "seed of initialization, row order and dropout", ge=0)
    eval_only: bool = key(False, "evaluate once and exit; writes nothing")
    dry_run: bool = key(False, "print sizes, time ten steps, exit; writes nothing")

    dataset: str = key("openwebtext", "a directory, its name under data/, or a mixture: one:0.7,two:0.3", group="Data")
    token_dtype: TokenDtype | None = key(None, "dtype of ids in files that do not state it; None: uint16, as nanoGPT")
    verify_data: bool = key(False, "first check the data against the SHA-256 in its meta.json")
    new_data: bool = key(False, "resume on data that changed since the run began")
    row_order: Literal["random", "epoch"] = key("random", "random windows, or each window once an epoch")
    mask_documents: bool = key(False, "restrict attention and positions to each document")
    batch_size: int = key(12, "rows per micro-batch; a step has gradient_accumulation_steps of them", ge=1, le=2**20)
    gradient_accumulation_steps: int = key(40, "multiplies batch_size; counted over all processes", ge=1, le=2**20)
    batch_growth_tokens: int = key(0, "tokens over which the batch grows from batch_size to full size; 0: off", ge=0)
    block_size: int = key(1024, "context length: tokens per row", ge=1, le=MAX_SIZE)
    ngram_targets: int = key(0, "soft targets by n-grams of this order, counted in train; 0: off", ge=0, le=64)

    arch: Literal["gpt2", "modern"] = key("gpt2", "gpt2, or modern: that of Qwen3 and Llama", group="Model")
    n_layer: int = key(12, "number of blocks", ge=1, le=1000)
    n_head: int = key(12, "attention heads per block", ge=1, le=MAX_SIZE)
    n_kv_head: int = key(0, "modern: key and value heads (grouped-query attention); 0: n_head", ge=0, le=MAX_SIZE)
    head_dim: int = key(0, "modern: channels per head; 0: n_embd / n_head", ge=0, le=MAX_SIZE)
    n_embd: int = key(768, "channels (embedding size)", ge=1, le=MAX_SIZE)
    n_inner: int = key(0, "width of the MLP; 0: 4 n_embd, modern 8/3 n_embd rounded up to 64", ge=0, le=MAX_SIZE)
    gelu: Literal["tanh", "erf"] = key("tanh", "gpt2: tanh, GPT-2's; or erf, nanoGPT's, which is faster on a CPU")
    qk_norm: bool = key(True, "modern: normalize queries and keys, as Qwen3; False: as Llama")
    rope_theta: float = key(1e4, "modern: base (theta) of RoPE", gt=0)
    norm_eps: float = key(0.0, "epsilon of the norms; 0: 1e-5, modern 1e-6", ge=0)
    tied: bool = key(True, "tie token embedding and output layer; modern may untie them")
    look_back: bool = key(False, "modern: initialize the first layer's heads to attend to the preceding tokens")
    dropout: float = key(0.0, "dropout probability", ge=0, lt=1)
    bias: bool = key(False, "gpt2: biases in linear layers and norms")
    lora_rank: int = key(0, "LoRA: freeze the weights and train adapters of this rank; 0: train all", ge=0, le=MAX_SIZE)
    lora_alpha: float = key(32.0, "LoRA alpha: adapters are scaled by lora_alpha / lora_rank", gt=0)
    lora_targets: str = key("attention,mlp", "LoRA: the layers with adapters; also by name, as in q_proj,v_proj")

    optimizer: Literal["adamw", "muon"] = key("adamw", "muon: for blocks' matrices, AdamW elsewhere", group="Optimizer")
    learning_rate: float = key(6e-4, "maximum learning rate", gt=0)
    muon_lr: float | None = key(None, "maximum learning rate of Muon; None: learning_rate", gt=0)
    muon_momentum: float = key(0.95, "Muon momentum", ge=0, lt=1)
    max_iters: int = key(600_000, "total number of updates", ge=0, le=10**12)
    minutes: float | None = key(
        None, "time budget: choose model size, learning rate and max_iters for it", gt=0, le=10**6
    )
    weight_decay: float = key(0.1, "decoupled weight decay of matrices and embeddings", ge=0)
    beta1: float = key(0.9, "AdamW beta1: decay of the first moment", ge=0, lt=1)
    beta2: float = key(0.95, "AdamW beta2: decay of the second moment", ge=0, lt=1)
    grad_clip: float = key(1.0, "clip the gradient norm to this; 0: no clipping", ge=0)
    skip_spikes: float = key(
        0.0, "skip updates whose gradient norm is this many deviations above the median; 0: off", ge=0
    )
    decay_lr: bool = key(True, "warm up, then follow schedule; False: constant learning_rate")
    schedule: Literal["cosine", "trapezoid", "constant"] = key(
        "cosine", "trapezoid (WSD): constant, then linear decay at the end"
    )
    decay_iters: int | None = key(None, "trapezoid: updates of the decay; None: half of those after warmup", ge=0)
    warmup_iters: int = key(2000, "updates of linear warmup", ge=0)
    lr_decay_iters: int | None = key(None, "update at which min_lr is reached; None: max_iters", ge=0)
    min_lr: float | None = key(None, "final learning rate; None: learning_rate / 10", ge=0)

    eval_interval: int = key(2000, "updates between evaluations; 0: only at the end", group="Evaluation and logs", ge=0)
    eval_iters: int = key(200, "batches per evaluation and split; 0: the whole split", ge=0)
    eval_train: bool = key(True, "evaluate the train split too")
    patience: int = key(0, "early stopping: evaluations without a new best; 0: off", ge=0)
    sample_chars: int = key(200, "characters of the sample printed at each evaluation; 0: none", ge=0, le=10**6)
    log_interval: int = key(10, "updates between log lines", ge=1)
    log_layers: bool = key(False, "log gradient and update norms of each layer, and clipped updates")
    tensorboard: bool = key(False, "also log to out_dir/tensorboard")
    wandb_log: bool = key(False, "also log to wandb")
    wandb_project: str = key("owt", "wandb project")
    wandb_run_name: str = key("gpt2", "wandb run name")

    always_save_checkpoint: bool = key(True, "save at every evaluation, not only at a new best", group="Checkpoints")
    checkpoint_minutes: float = key(15.0, "minutes between saves beside those at evaluations; 0: none", ge=0)
    keep_every: int = key(0, "beside the newest two and the best, keep steps divisible by this; 0: none", ge=0)

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "autocast dtype; master weights stay float32; auto: on a CPU the faster one, by a trial"
    )
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")
    backend: Literal["auto", "nccl", "gloo"] = key("auto", "torch.distributed backend")
    shards: int = key(1, "processes that share a copy of the model (FSDP2), 0: all; 1: each has its own (DDP)", ge=0)
    timeout_s: float = key(600.0, "seconds that a process waits for the others", gt=0, le=86_400)
    deterministic: bool = key(False, "reproducible results on CUDA; slower")
    micro_batch_size: int | Literal["auto"] | None = key(None, "rows per pass; None: batch_size; auto: what fits", ge=1)
    activation_checkpointing: bool = key(False, "recompute activations in backward: less memory, +1/3 compute")
    loss_chunk: int = key(0, "compute the loss in chunks of this many tokens: less memory; 0: off", ge=0)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps


def train_step(
    model: torch.nn.Module,  # the GPT, perhaps compiled and wrapped in DDP
    batch: StepBatch,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    guard: UpdateGuard,
    world: World,
    *,
    lr_scale: float,  # share of the maximum learning rate
    grad_clip: float,
    read_control: Callable[[], Control] = Control,  # this rank's requests
    layer_stats: LayerStats | None = None,
) -> StepStats:
    """One update: forward and backward over the micro-batches, then the optimizer. Nothing waits for the device."""
    loss = torch.zeros((), device=world.device)
    # weight: this micro-batch's share of the step's targets, times the ranks, over which gradients are averaged
    for i, (x, y, soft_targets, weight) in enumerate(batch.micro_batches()):
        batch.seed_dropout(i)
        world.set_gradient_sync(model, is_last=i == batch.last)
        with world.autocast():
            micro_loss = model(x, y, soft_targets)[1] * weight
        scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()

    # One all-reduce for the loss, whose weights have the factor world.size, and for the ranks' requests.
    (requests,) = world.to_device(torch.tensor(read_control(), dtype=torch.float32))
    loss, *control = world.all_reduce_sum(torch.cat((loss[None] / world.size, requests)))
    scaler.unscale_(optimizer)  # type: ignore[arg-type]
    grad_norm = gradient_norm(optimizer.parameters.values())
    skip_update = guard.check(loss, grad_norm)  # a NaN makes this update a no-op; the log stops the run a step later
    if layer_stats:
        layer_stats.before_update(grad_norm)
    optimizer.step(lr_scale, clip_divisor(grad_clip, grad_norm), skip_update)
    scaler.update()
    optimizer.zero_grad()
    layers = layer_stats.after_update() if layer_stats else []
    return StepStats(loss, grad_norm, guard.bad_steps, guard.skipped, Control(*control), layers)


@dataclass
class Run:
    """The parts of a run, ready to train."""

    config: TrainConfig
    world: World
    schedule: StepSchedule
    state: TrainState
    model: torch.nn.Module  # state.model, compiled and wrapped in DDP as configured
    micro_batch: int
    row_schedule: RowSchedule
    rows: Rows
    windows: dict[str, EvalWindows]  # for evaluation, by split
    eval_batch_size: int  # rows of a forward pass of evaluation
    dataset: Dataset
    tokenizer: Tokenizer | None
    layer_stats: LayerStats | None
    run_dir: RunDir
    writer: MetricsWriter | None  # None: writes nothing, or not the main process
    checkpoints: checkpoint.Writer | None


def train(run: Run) -> int:
    """The training loop. Returns the exit status: 0, or 130 or 143 after a signal."""
    config = run.config
    schedule = run.schedule
    state = run.state
    total_rows = run.row_schedule.total_rows(config.max_iters - state.step, state.samples)
    log = StepLogger(state, run.world, run.writer, config.log_interval, total_rows, schedule.deadline, run.layer_stats)
    signals = SignalCatcher(can_save=not config.dry_run)
    pace = Pace(run.model, run.world.ranks, state.clock, is_sharded=run.world.shards > 1)
    requests = Requests()
    first_step = state.step
    is_saved = state.step > 0  # by the run that this one resumes

    def read_control() -> Control:
        save_due = run.checkpoints is not None and run.checkpoints.overdue()
        return signals.control(save_due, schedule.decay_due() if run.world.is_main else 0)

    def check_signals() -> None:
        requests.add([Control(*run.world.sum_over_ranks(signals.control()))])
        if requests.exit_status:
            raise EvaluationStopped

    while True:
        # Once in a while, and at the end: evaluate.
        is_last = schedule.is_done(state.step) and not config.dry_run
        is_due = is_last or (config.eval_interval > 0 and state.step % config.eval_interval == 0)
        if is_due and state.val_loss is None and not config.dry_run and not requests.exit_status:
            requests.add(log.read(everything=True))  # waits for the device, so the clock stops when training does
            state.clock.stop()
            with contextlib.suppress(EvaluationStopped):  # then the resumed run evaluates
                is_best = evaluate_splits(run, log, check_signals)
                requests.save |= state.step > 0 and (config.always_save_checkpoint or is_best)
                is_saved = False

        # Save what is worth keeping; stop if this was the last step.
        out_of_patience = 0 < config.patience <= state.evals_since_best
        dry_run_is_over = config.dry_run and state.step >= first_step + 10
        is_over = is_last or out_of_patience or dry_run_is_over or requests.exit_status != 0
        if (requests.save or is_over) and not is_saved and not config.dry_run:
            requests.add(log.read(everything=True))  # raises for a broken update, which is never saved
            state.clock.stop()
            save(run)
            requests.save = False
            is_saved = True
        if is_over:
            break

        # One update.
        state.clock.start()
        pace.start()
        first_row = state.samples
        num_rows = run.row_schedule.rows_at(first_row)
        batch = StepBatch(
            run.rows, first_row, num_rows, run.micro_batch, run.world, config.seed, state.step, config.dropout
        )
        if run.layer_stats:
            run.layer_stats.is_due = (state.step + 1) % config.log_interval == 0
        stats = train_step(
            run.model,
            batch,
            state.optimizer,
            state.scaler,
            state.guard,
            run.world,
            lr_scale=schedule.lr_scale(state.step),
            grad_clip=config.grad_clip,
            read_control=read_control,
            layer_stats=run.layer_stats,
        )
        state.record_update(num_rows)
        is_saved = False

        # Read, print and obey the previous update while this one runs.
        log.put(state.step, first_row, state.samples, schedule.lr(state.step - 1), stats)
        pace.report(state.step)
        requests.add(log.read())  # raises RunStopped for a loss or a gradient that is not finite
        if requests.decay_steps and schedule.begin_decay(state.step, requests.decay_steps):
            requests.save = True  # or a killed run would begin its decay at another step

    log.read(everything=True)
    # All ranks wait for the last save, because torchrun kills the others when one ends with a status other than 0.
    if run.checkpoints:
        run.checkpoints.wait()
    run.world.ranks.run_on_main(run.checkpoints.finish if run.checkpoints else lambda: None)
    if not config.dry_run:
        print_end(state, run.run_dir.path, requests.exit_status, out_of_patience)
    summary = schedule.summary(state.best_val_loss)
    if summary and state.val_loss is not None and state.step > first_step:
        print0(summary)
    return requests.exit_status


def evaluate_splits(run: Run, log: StepLogger, check_signals: Callable[[], None]) -> bool:
    """Evaluate, record the losses and print a sample. Returns True for a new best; check_signals() may raise."""
    losses = {}
    for split, windows in run.windows.items():
        losses[split] = evaluate(run.model, windows, run.eval_batch_size, run.world, check_signals)
    log.evaluation(losses, run.dataset.val.bits_per_byte(losses["val"]))
    is_best = run.state.record_evaluation(losses["val"])
    print_sample(run)
    return is_best


def save(run: Run) -> None:
    """Write a checkpoint in the background; returns when the state is copied."""
    if run.checkpoints is None:
        return
    if run.writer:
        run.writer.sync()
    state = {
        **run.state.state_dict(),
        "processes": run.world.size,
        "wandb_id": run.writer and run.writer.wandb_id,
        "dial": run.schedule.state_dict(),  # the name that version 0.1 gave the time budget
        "model": asdict(run.state.model.config),
        "data": run.dataset.fingerprints,
        "lora": run.state.model.lora,
        "config": {**asdict(run.config), **run.schedule.changed_keys()},
    }
    run.checkpoints.save(*run.state.tensors(), state)


def print_sample(run: Run) -> None:
    """Print a text that the model writes; not of a sharded one: a rank alone would wait for the others' shards."""
    if run.writer and run.tokenizer and run.config.sample_chars and not run.world.mesh:
        with run.world.autocast():
            text = sample_text(run.state.model, run.tokenizer, run.config.sample_chars, run.config.seed)
        print0("    " + text.replace("\n", "\n    ").strip())


# --- Before the loop


def main() -> int:
    """Resume or start a run, and train or evaluate it. Returns the exit status."""
    config, explicit = parse(TrainConfig, description="Train a GPT.")
    if not config.out_dir:
        raise InputError("out_dir: is empty; give a folder")
    ignore_save_signal()  # until there is something to save
    with contextlib.ExitStack() as stack:  # closes what the run opens
        ranks = join(config.timeout_s)
        run_dir = RunDir(Path(config.out_dir), wait_s=min(LOCKED_S, ranks.timeout_s) * (ranks.size > 1))
        writes = not (config.eval_only or config.dry_run)
        resume = config.init_from == "resume" or config.resume
        resumed = checkpoint.claim_and_load(run_dir, resume, writes, ranks, stack)
        if resumed:
            # Checked, and with defaults for keys that are newer than the checkpoint.
            resumed.state["config"] = asdict(resumed.build_config(TrainConfig, "config"))
            explicit = budget.check_resume(explicit, resumed.state)
            config = resume_config(config, explicit, resumed)
        has_budget = config.minutes is not None and not config.eval_only
        ranks.raise_unless_equal({name: getattr(config, name) for name in asdict(config) if name not in OWN_KEYS})
        # What a new time budget chooses is checked below.
        check = budget.check_new_run if has_budget and not resumed else check_config
        ranks.run_on_main(partial(check, config))
        if writes:
            ranks.run_on_main(partial(check_trackers, config.tensorboard, config.wandb_log))

        smaller = "a smaller --block_size, or --loss_chunk=1024" if has_budget else "a smaller one"
        with explain_errors(f"not enough memory for this model: use {smaller}", ranks):
            world = distributed.start(config.device, config.dtype, config.backend, ranks, config.shards)
            plan = resumed.state["dial"] if resumed and has_budget else None
            if has_budget and not resumed:
                explicit = budget.drop_budget_keys(explicit)
                config, world, plan = budget.choose(config, world, train_step)
                check_config(config)
            schedule = make_schedule(config)
            if plan and config.minutes:
                schedule = budget.ClockSchedule(schedule, plan, config.minutes, config.eval_interval)
            status = prepare_and_train(config, explicit, resumed, schedule, world, run_dir, stack)
        world.close()
        return status


def check_config(config: TrainConfig) -> None:
    """Raise InputError, a line each, for values that are valid one by one but not together."""
    problems = check_lora(config.lora_rank, config.init_from, config.out_dir, config.optimizer, config.lora_targets)
    problems += check_shards(config.shards, world_size(), config.dtype, config.lora_rank, config.minutes)
    for name in ("lora_alpha", "lora_targets"):
        if not config.lora_rank and getattr(config, name) != getattr(TrainConfig, name):
            problems.append(f"{name}: has no effect without lora_rank; give --lora_rank too, or leave it out")
    if config.init_from == "scratch":
        try:
            new_model_config(config, vocab_size=1)
        except ValueError as error:
            problems.append(str(error))
        if config.look_back and config.arch != "modern":
            problems.append(f"look_back=True: arch={config.arch} has no RoPE; leave it out")
    elif config.look_back:
        problems.append(f"look_back=True: init_from={config.init_from} loads trained weights; leave one of the two out")
    if config.rows_per_step % world_size():
        problems.append(
            f"batch_size × gradient_accumulation_steps = {config.rows_per_step} rows per step are not divisible by "
            f"{world_size()} processes: change one of the three"
        )
    if config.batch_growth_tokens and config.batch_size % world_size():
        problems.append(
            f"batch_growth_tokens: the first steps have batch_size={config.batch_size} rows, not divisible by "
            f"{world_size()} processes: change batch_size"
        )
    if config.batch_growth_tokens and config.gradient_accumulation_steps == 1:
        problems.append(
            "batch_growth_tokens: the batch grows from batch_size to batch_size × gradient_accumulation_steps, which "
            "are equal here: raise gradient_accumulation_steps"
        )
    if config.patience and not config.eval_interval:
        problems.append("patience: eval_interval=0 evaluates only at the end, too late to stop: set --eval_interval")
    if config.decay_iters is not None and config.schedule != "trapezoid":
        problems.append(f"decay_iters: schedule={config.schedule} has no final decay: leave it out")
    raise_problems(problems)


def prepare_and_train(
    config: TrainConfig,
    explicit: Mapping[str, Any],
    resumed: Checkpoint | None,
    schedule: StepSchedule,
    world: World,
    run_dir: RunDir,
    stack: contextlib.ExitStack,
) -> int:
    """Load data and model, check memory, set up out_dir, restore the state; then train. Returns the exit status."""
    seed_everything(config.seed, config.deterministic)
    dataset, gpt, tokenizer = world.ranks.run_on_all(lambda: load_data_and_model(config, explicit, resumed, world))
    world.ranks.raise_unless_equal({**dataset.fingerprints, "weights": gpt.first_rows_hash}, of="hash of ")
    config = replace(config, **{name: getattr(gpt.config, name) for name in MODEL_KEYS})
    config, world = choose_dtype(config, gpt.config, world)
    gpt.document_separator_id = document_separator_id(dataset, config.mask_documents)
    prepare_model(config, gpt, world)
    T, V = config.block_size, gpt.config.vocab_size
    splits = {"train": dataset.train, "val": dataset.val} if config.eval_train else {"val": dataset.val}
    windows = {name: EvalWindows(split, T, config.eval_iters, config.batch_size, V) for name, split in splits.items()}
    print_model_summary(gpt, world)
    free = free_memory(world.device)
    if config.eval_only:
        micro_batch = min(micro_batch_sizes(config, world.size)[0], config.batch_size)
        with explain_errors(memory_hint(micro_batch, config.rows_per_step // world.size, T, free), world.ranks):
            batch_size = eval_batch_size(windows["val"], micro_batch, world)
            losses = {split: evaluate(gpt, windows[split], batch_size, world) for split in windows}
        step = resumed.state["step"] if resumed else 0
        print0(f"step {step}: " + format_losses(losses, dataset.val.bits_per_byte(losses["val"])))
        return 0

    ngrams = count_ngrams(dataset, config.ngram_targets, T, V)
    rows = Rows(dataset.train, T, V, config.seed, config.row_order, ngrams)
    micro_batch = choose_micro_batch(config, gpt, world)
    if config.micro_batch_size == "auto":
        config = replace(config, micro_batch_size=micro_batch)  # a resumed run keeps it, however much is free then
    row_schedule = RowSchedule(config.batch_size, config.rows_per_step, config.batch_growth_tokens, T)
    print_run_summary(gpt, config.optimizer, row_schedule, micro_batch, config.max_iters, dataset, world)
    warn_of_schedule(schedule)
    hint = memory_hint(micro_batch, config.rows_per_step // world.size, T, free)
    check = partial(raise_if_memory_is_short, gpt, config.optimizer, micro_batch, T, world, hint, not config.dry_run)
    world.ranks.run_on_all(check)  # before any rank takes more
    with explain_errors(hint, world.ranks):  # compiling runs a micro-batch
        model, state = prepare_training(config, gpt, rows, micro_batch, world)
    if resumed:
        restore(state, resumed, schedule, config, world)
    if not config.minutes:
        rows_left = row_schedule.total_rows(config.max_iters - state.step, state.samples) - state.samples
        warn_if_slow_on_cpu(gpt, rows_left * T, world)
    writer = checkpoints = None

    def open_metrics() -> None:
        nonlocal writer
        writer = open_writer(config, run_dir, resumed, state, stack)

    if not config.dry_run:
        world.ranks.run_on_main(open_metrics)  # by now no rank reads weights from out_dir
    if world.rank < world.shards and not config.dry_run:  # the main process, and those that share its copy of the model
        checkpoints = checkpoint.Writer(
            run_dir, config.keep_every, config.checkpoint_minutes, tokenizer, world.save_group
        )
        stack.enter_context(checkpoints)
    gc.freeze()  # what exists now stays: the garbage collector need not scan it while a GPU waits
    stack.callback(gc.unfreeze)
    run = Run(
        config=config,
        world=world,
        schedule=schedule,
        state=state,
        model=world.wrap_ddp(model),
        micro_batch=micro_batch,
        row_schedule=row_schedule,
        rows=rows,
        windows=windows,
        eval_batch_size=eval_batch_size(windows["val"], micro_batch, world) if model is gpt else micro_batch,
        dataset=dataset,
        tokenizer=tokenizer,
        layer_stats=LayerStats(state.optimizer.parameters, config.grad_clip) if config.log_layers else None,
        run_dir=run_dir,
        writer=writer,
        checkpoints=checkpoints,
    )
    first_step = state.step
    with explain_errors(hint, world.ranks, before_update=lambda: state.step == first_step):
        return train(run)


def open_writer(
    config: TrainConfig, run_dir: RunDir, resumed: Checkpoint | None, state: TrainState, stack: contextlib.ExitStack
) -> MetricsWriter:
    """Clear out_dir of a previous run, or of damaged checkpoints, and open metrics.jsonl and the trackers."""
    if resumed:
        checkpoint.quarantine_damaged(resumed.path)
    elif archived := run_dir.archive_previous_run():
        print0(f"{run_dir.path} held a run already: moved to {archived}")
    writer = MetricsWriter(run_dir, state.step, is_evaluated=state.val_loss is not None or not resumed)
    stack.callback(writer.close)
    wandb_config = asdict(config) if config.wandb_log else None
    writer.open_trackers(wandb_config, resumed.state["wandb_id"] if resumed else None, config.tensorboard)
    return writer


def restore(state: TrainState, resumed: Checkpoint, schedule: StepSchedule, config: TrainConfig, world: World) -> None:
    """Restore optimizer, guard, counters and the position in the data; the model has its weights already."""
    state.load_state_dict(resumed.state, resumed.optimizer)
    resumed.model.clear()
    resumed.optimizer.clear()
    processes = resumed.state["processes"]
    if processes != world.size:
        print0(f"processes: {processes} -> {world.size}; each step takes the same rows as before")
    if schedule.is_done(state.step):
        how = "start another --out_dir with more --minutes or text" if config.minutes else "raise --max_iters"
        print0(f"step {state.step} of max_iters={config.max_iters}: nothing left to do; to continue, {how}")


if __name__ == "__main__":
    run_script(main, is_output_expendable=True)
