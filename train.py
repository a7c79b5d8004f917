"""Train a GPT: python train.py config/train_shakespeare_char.py --batch_size=32

Several GPUs: torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import contextlib
import gc
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import budget
from configurator import key, parse
from load import MODEL_KEYS, document_separator_id, open_data_and_model, resume_settings
from model import GPTConfig
from nanogpt import checkpoint, distributed, optim
from nanogpt.checkpoint import Checkpoint
from nanogpt.compile import compile_model
from nanogpt.console import is_main, print0
from nanogpt.control import catch_signals, ignore_signal_to_save
from nanogpt.data.rows import EvalWindows, Rows
from nanogpt.device import free_memory, seed_everything
from nanogpt.distributed import World, explain_errors, processes
from nanogpt.errors import InputError, RunStopped, run_script
from nanogpt.evaluation import evaluate
from nanogpt.generate.decoder import sample_text
from nanogpt.guard import LayerStats, UpdateGuard
from nanogpt.hashing import derive_seed
from nanogpt.memory import estimate_training_memory, memory_hint, pick_micro_batch
from nanogpt.metrics import MetricsWriter, Stopwatch, missing_extras, read_stop_reason
from nanogpt.run_dir import RunLock, archive_previous_run, quarantine_damaged
from nanogpt.schedule import learning_rate
from nanogpt.train_log import REMEDY, StepLogger, format_losses, print_run_summary

OVERFLOWS = 20  # float16 updates in a row that may overflow before the run counts as broken


@dataclass
class TrainConfig:
    """Every key of a run. Files and --key=value flags set them; --help lists them."""

    out_dir: str = key("out", "folder for checkpoints and metrics", group="Run")
    init_from: str = key("scratch", "weights of a new run: scratch, gpt2*, a hub id, a folder, nanoGPT's ckpt.pt")
    resume: Literal["auto", True, False] = key(False, "go on with the run in out_dir; auto: if it holds one")
    seed: int = key(1337, "seed of initialization, order of rows and dropout", ge=0)
    eval_only: bool = key(False, "evaluate once and end; nothing is written")
    dry_run: bool = key(False, "tell sizes and time, try ten steps, and end; nothing is written")

    dataset: str = key("openwebtext", "a folder, or its name under data/; a mixture: one:0.7,two:0.3", group="Data")
    verify_data: bool = key(False, "compare the data with the SHA-256 in its meta.json first")
    row_order: Literal["random", "epoch"] = key("random", "random windows, or each window once an epoch")
    mask_documents: bool = key(False, "documents do not see one another; each has positions of its own")
    batch_size: int = key(12, "rows per micro-batch and process", ge=1)
    gradient_accumulation_steps: int = key(40, "micro-batches per step, over all processes", ge=1)
    batch_growth_tokens: int = key(0, "tokens over which rows per step grow from batch_size; 0 = full at once", ge=0)
    block_size: int = key(1024, "tokens per row: the context length", ge=1)

    arch: Literal["gpt2", "modern"] = key("gpt2", "gpt2, or modern: Qwen3's architecture", group="Model")
    n_layer: int = key(12, "blocks", ge=1)
    n_head: int = key(12, "attention heads per block", ge=1)
    n_kv_head: int = key(0, "modern: heads of keys and values; 0: n_head", ge=0)
    head_dim: int = key(0, "modern: channels of a head; 0: n_embd / n_head", ge=0)
    n_embd: int = key(768, "channels", ge=1)
    n_inner: int = key(0, "width of the MLP; 0: 4 n_embd, modern 8/3 n_embd to the next 64", ge=0)
    rope_theta: float = key(1e4, "modern: base of the rotary positions", gt=0)
    norm_eps: float = key(0.0, "added to variances in norms; 0: 1e-5, modern 1e-6", ge=0)
    tied: bool = key(True, "the token embedding is the output layer too; modern may untie them")
    dropout: float = key(0.0, "share of activations dropped in training", ge=0, lt=1)
    bias: bool = key(False, "gpt2: biases in linear layers and norms")

    optimizer: Literal["adamw", "muon"] = key(
        "adamw", "muon: for the blocks' matrices, AdamW elsewhere", group="Optimizer"
    )
    learning_rate: float = key(6e-4, "the highest learning rate", gt=0)
    muon_lr: float | None = key(None, "Muon's highest learning rate; None: learning_rate", gt=0)
    muon_momentum: float = key(0.95, "Muon's memory of gradients", ge=0, lt=1)
    max_iters: int = key(600_000, "updates in all", ge=0)
    minutes: float | None = key(None, "the best model in so many minutes: sizes, rates and max_iters by law", gt=0)
    weight_decay: float = key(0.1, "of matrices and embeddings", ge=0)
    beta1: float = key(0.9, "AdamW's memory of gradients", ge=0, lt=1)
    beta2: float = key(0.95, "AdamW's memory of squared gradients", ge=0, lt=1)
    grad_clip: float = key(1.0, "highest norm of the gradient; 0 = no clipping", ge=0)
    skip_spikes: float = key(0.0, "skip updates whose norm is so many deviations above the median; 0 = none", ge=0)
    decay_lr: bool = key(True, "warm up, then follow schedule; False: learning_rate throughout")
    schedule: Literal["cosine", "trapezoid", "constant"] = key("cosine", "trapezoid: falls at the end alone")
    decay_iters: int | None = key(None, "trapezoid: updates of its fall; None: half of those after warmup", ge=0)
    warmup_iters: int = key(2000, "updates until learning_rate is reached", ge=0)
    lr_decay_iters: int | None = key(None, "update at which min_lr is reached; None: max_iters", ge=0)
    min_lr: float | None = key(None, "the last learning rate; None: learning_rate / 10", ge=0)

    eval_interval: int = key(2000, "updates between evaluations; 0 = at the end", group="Evaluation and logs", ge=0)
    eval_iters: int = key(200, "batches per evaluation and split, at most the split once; 0 = all of it", ge=0)
    eval_train: bool = key(True, "evaluate the train split too, not val alone")
    patience: int = key(0, "stop after so many evaluations in a row without a new best; 0 = never", ge=0)
    sample_chars: int = key(200, "characters of a sample printed at each evaluation; 0 = none", ge=0)
    log_interval: int = key(10, "updates between log lines", ge=1)
    log_layers: bool = key(False, "log norms of each layer's gradients and updates too, and clipped updates")
    tensorboard: bool = key(False, "log to out_dir/tensorboard too")
    wandb_log: bool = key(False, "log to wandb too")
    wandb_project: str = key("owt", "wandb's project")
    wandb_run_name: str = key("gpt2", "wandb's name of this run")

    always_save_checkpoint: bool = key(True, "save at each evaluation, not only at the best", group="Checkpoints")
    checkpoint_minutes: float = key(15.0, "save at least this often; 0 = only as above", ge=0)
    keep_every: int = key(0, "also keep each checkpoint whose step is a multiple of this", ge=0)

    device: str = key("auto", "auto, cpu, cuda, cuda:N or mps", group="Machine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of matrix products; weights stay float32")
    compile: Literal["auto", True, False] = key("auto", "torch.compile; auto: on CUDA")
    backend: Literal["auto", "nccl", "gloo"] = key("auto", "how processes talk")
    deterministic: bool = key(False, "equal bits for equal runs on CUDA too, slower")
    micro_batch_size: int | Literal["auto"] | None = key(
        None, "rows at a time, steps stay as they are; None: batch_size; auto: the most that fit", ge=1
    )
    activation_checkpointing: bool = key(False, "keep a block's input alone for backward: less memory, 1/3 more work")
    loss_chunk: int = key(0, "tokens whose logits exist at a time, for less memory; 0 = all", ge=0)

    def check(self) -> None:
        """Raises InputError for what the single values allow but their combination does not, a line each."""
        found = []
        if self.init_from == "scratch":
            try:
                GPTConfig(**{name: getattr(self, name) for name in MODEL_KEYS})
            except ValueError as error:
                found.append(str(error))
        if self.rows_per_step % processes():
            found.append(
                f"batch_size × gradient_accumulation_steps = {self.rows_per_step} rows per step do not divide by "
                f"{processes()} processes: change one of the three"
            )
        if self.batch_growth_tokens and self.batch_size % processes():
            found.append(
                f"batch_growth_tokens: the first steps have batch_size={self.batch_size} rows, which do not divide by "
                f"{processes()} processes: change batch_size"
            )
        if self.batch_growth_tokens and self.gradient_accumulation_steps == 1:
            found.append(
                "batch_growth_tokens: rows grow from batch_size to batch_size × gradient_accumulation_steps, the same "
                "here: give more gradient_accumulation_steps"
            )
        if self.patience and not self.eval_interval:
            found.append("patience: eval_interval=0 evaluates at the end alone, too late to stop: give --eval_interval")
        if self.decay_iters is not None and self.schedule != "trapezoid":
            found.append(f"decay_iters: schedule={self.schedule} has no such fall: give --decay_iters=None")
        if found:
            raise InputError("\n".join(found))

    @property
    def last_step(self) -> float:
        """The step at which the run ends: open until the fall of the learning rate begins, if minutes are given."""
        return math.inf if self.minutes and self.schedule == "constant" else self.max_iters

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def rows_at(self, samples: int) -> int:
        """Rows of the step that begins after so many: in a line up to rows_per_step, by multiples of batch_size."""
        if (tokens := samples * self.block_size) >= self.batch_growth_tokens:
            return self.rows_per_step
        grown = self.rows_per_step * tokens // self.batch_growth_tokens
        return max(grown // self.batch_size, 1) * self.batch_size

    def rows_in(self, steps: int) -> int:
        """Rows of so many steps from the first."""
        samples = 0
        while steps and samples * self.block_size < self.batch_growth_tokens:
            samples, steps = samples + self.rows_at(samples), steps - 1
        return samples + steps * self.rows_per_step

    def micro_batches(self, processes: int) -> list[int]:
        """Rows that one of so many can take at a time, the most first: numbers that divide its share of a step."""
        share = (self.batch_size if self.batch_growth_tokens else self.rows_per_step) // processes
        most = share if self.micro_batch_size == "auto" else self.micro_batch_size or self.batch_size
        return [n for n in range(min(most, share), 0, -1) if share % n == 0]

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates."""
        if not self.decay_lr:
            return self.learning_rate
        end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
        floor = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        bounds = {"max_lr": self.learning_rate, "min_lr": floor}
        return learning_rate(
            self.schedule, step, **bounds, warmup=self.warmup_iters, end=end, decay_steps=self.decay_iters
        )


def main() -> int:
    config, given = parse(TrainConfig, description="Train a GPT.")
    ignore_signal_to_save()  # until there is something to save
    with contextlib.ExitStack() as held:
        return run(config, given, held)


def run(config: TrainConfig, given: dict[str, Any], held: contextlib.ExitStack) -> int:
    """Settle what is to go on or to begin, and train; returns the exit status."""
    lock = RunLock(Path(config.out_dir))
    if is_main() and not (config.eval_only or config.dry_run):
        held.enter_context(lock)  # before anything of the folder is read
    if config.resume == "auto" and (why := read_stop_reason(Path(config.out_dir))):
        raise RunStopped(f"{why}: --resume=auto does not repeat it; {REMEDY}")
    resumed = checkpoint.load_latest(Path(config.out_dir), config.init_from == "resume" or config.resume)
    if resumed:
        given = budget.to_resume(given, resumed.state)
        config = resume_settings(config, given, resumed)
    by_clock = config.minutes is not None and not config.eval_only
    if resumed or not by_clock:  # what the dial chooses is checked below
        config.check()
    if missing := missing_extras(config):
        raise InputError("\n".join(missing))
    with explain_errors("too little memory for this model: use a smaller one"):
        world = distributed.start(config.device, config.dtype, config.backend)
        timer = None
        if by_clock:
            if resumed:
                told = resumed.state["dial"]
            else:
                given = budget.without_chosen(given)
                config, told = budget.choose(config, world)
                config.check()
            timer = budget.Timer(config, told)
        status = train(config, given, resumed, world, timer, lock, held)
    world.close()
    return status


def train(
    config: TrainConfig,
    given: dict[str, Any],
    resumed: Checkpoint | None,
    world: World,
    timer: budget.Timer | None,  # of a run that was given minutes
    lock: RunLock,  # of out_dir
    held: contextlib.ExitStack,  # what is to be closed at the end, whatever comes
) -> int:
    """The whole of a run; returns the exit status."""
    writes = not (config.eval_only or config.dry_run)
    seed_everything(config.seed, config.deterministic)
    dataset, raw_model, tokenizer = open_data_and_model(config, given, resumed)
    shape = raw_model.config
    config = replace(config, **{name: getattr(shape, name) for name in MODEL_KEYS})
    raw_model.to(world.device)
    raw_model.activation_checkpointing, raw_model.loss_chunk = config.activation_checkpointing, config.loss_chunk
    raw_model.end_of_text = document_separator_id(config, dataset)

    # --- What it will cost, and the folder it goes to
    micro_batch = pick_micro_batch(config, raw_model, world)
    if config.micro_batch_size == "auto":  # a resumed run keeps to it, whatever is free by then
        config = replace(config, micro_batch_size=micro_batch)
    most_rows, free = config.rows_per_step // world.size, free_memory(world.device)
    remedy = memory_hint(micro_batch, most_rows, shape.block_size, free)
    held.enter_context(explain_errors(remedy))
    memory = estimate_training_memory(raw_model, config, micro_batch, shape.block_size, world)
    print_run_summary(config, raw_model, micro_batch, memory, dataset.name, len(dataset.train), world, remedy)
    out_dir = Path(config.out_dir)
    # All ranks meet here: from now on the folder changes, which some may have read their weights from.
    step = resumed.state["step"] if resumed else 0
    if world.all_reduce_sum(torch.tensor(float(step), device=world.device)).item() != step * world.size:
        raise InputError(
            f"out_dir={out_dir} does not hold the same checkpoints for all ranks: share it between the nodes"
        )
    if writes and world.is_main:
        if resumed:
            quarantine_damaged(out_dir, resumed.path)
        elif moved := archive_previous_run(lock):
            print0(f"{out_dir} held a run already: moved to {moved}")

    # --- Rows, model, optimizer; then the state of the run so far
    rows = Rows(dataset.train, shape.block_size, shape.vocab_size, config.seed, config.row_order)
    windows = {
        split: EvalWindows(tokens, shape.block_size, config.eval_iters, config.batch_size, shape.vocab_size)
        for split, tokens in (("train", dataset.train), ("val", dataset.val))
        if split == "val" or config.eval_train
    }
    if config.eval_only:
        losses = {split: evaluate(raw_model, windows[split], config.batch_size, world) for split in windows}
        print0(f"step {step}: " + format_losses(losses, dataset.val.bits_per_byte(losses["val"])))
        return 0
    model = world.wrap_ddp(compile_model(config, raw_model, world, rows, micro_batch))
    optimizer = optim.Optimizer(raw_model, config, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    guard = UpdateGuard(world.device, OVERFLOWS if scaler.is_enabled() else 1, config.skip_spikes)
    layers = LayerStats(raw_model, config.grad_clip) if config.log_layers else None
    samples, best_val_loss, clock = 0, math.inf, Stopwatch()
    since_best = 0  # evaluations without a new best
    clipped = 0  # updates since the last line in the log
    evaluated = False  # whether the evaluation due at this step is behind us
    if resumed:
        state = resumed.state
        optimizer.load_state_tensors(resumed.optimizer)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        guard.load(state["guard"])
        if state["processes"] != world.size:
            print0(f"processes: {state['processes']} -> {world.size}; each step takes the same rows as before")
        samples, clock = state["samples"], Stopwatch(state["time_s"])
        best_val_loss = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
        since_best, evaluated = state.get("since_best", 0), state["val_loss"] is not None
        clipped = state.get("clipped", 0)
        resumed.model.clear()  # what the model and the optimizer have copied need not stay
        resumed.optimizer.clear()

    tracker = writer = None
    if writes and world.is_main:
        wandb_id = resumed.state["wandb_id"] if resumed else None
        tracker = MetricsWriter(out_dir, step, evaluated or not resumed, asdict(config), wandb_id)
        held.callback(tracker.close)
        writer = checkpoint.Writer(out_dir, config.keep_every, config.checkpoint_minutes, tokenizer)
        held.enter_context(writer)
    gc.freeze()  # what is here stays: the garbage collector need not look through it while a GPU waits
    held.callback(gc.unfreeze)
    signals = catch_signals()
    names, end = list(layers.parts) if layers else [], timer.end if timer and config.last_step == math.inf else None
    log = StepLogger(config, raw_model, world, tracker, clock, guard, step, samples, names, clipped, end)
    first_step = step
    val_loss = None
    if resumed and step >= config.last_step:
        more = "begin another --out_dir with more --minutes or text" if timer else "give a larger --max_iters"
        print0(f"step {step} of max_iters={config.max_iters}: nothing is left to do; to go on, {more}")

    while True:
        # --- Evaluate at step 0, at each eval_interval and at the end
        due = step == config.last_step or (config.eval_interval > 0 and step % config.eval_interval == 0)
        if due and writes and not evaluated and not log.stop:
            log.read(everything=True)  # which waits for the device, so the clock stops when training does
            clock.stop()
            losses = {split: evaluate(model, windows[split], micro_batch, world) for split in windows}
            val_loss = losses["val"]
            log.evaluation(step, losses, dataset.val.bits_per_byte(val_loss))
            if tracker and tokenizer and config.sample_chars:
                with world.autocast():
                    text = sample_text(raw_model, tokenizer, config.sample_chars, config.seed)
                print0("    " + text.replace("\n", "\n    ").strip())
            log.save_due |= step > 0 and (config.always_save_checkpoint or val_loss < best_val_loss)
            since_best = 0 if val_loss < best_val_loss else since_best + 1
            best_val_loss = min(best_val_loss, val_loss)
        in_vain = 0 < config.patience <= since_best
        at_end = step >= (first_step + 10 if config.dry_run else config.last_step) or log.stop != 0 or in_vain

        # --- Save what is worth keeping
        if writes and (log.save_due or at_end) and (step > first_step or not resumed or val_loss is not None):
            log.read(everything=True)  # raises for a broken step, which is never saved
            clock.stop()
            if tracker and writer:
                tracker.sync(lock)
                facts = {
                    "step": step,
                    "samples": samples,
                    "time_s": clock.seconds,
                    "val_loss": val_loss,  # None: not evaluated at this step
                    "best_val_loss": best_val_loss if math.isfinite(best_val_loss) else None,
                    "since_best": since_best,
                    "clipped": log.clipped,
                    "scaler": scaler.state_dict(),
                    "guard": guard.state(),
                    "processes": world.size,
                    "wandb_id": tracker.wandb_id,
                    "dial": timer.state() if timer else None,
                    "model": asdict(shape),
                    "config": asdict(config),
                }
                writer.save(raw_model.state_dict(), optimizer.state_tensors(), facts)
            log.save_due = False
        if at_end:
            break
        evaluated, val_loss = False, None

        # --- One step: forward and backward over the micro-batches, then one update
        clock.start()
        factor = config.learning_rate_at(step) / config.learning_rate
        loss_sum = torch.zeros((), device=world.device)
        step_rows = config.rows_at(samples)
        rows_per_rank = step_rows // world.size
        micro_steps, first_row = rows_per_rank // micro_batch, samples + world.rank * rows_per_rank
        with explain_errors(remedy, before_update=step == first_step):
            share: float | torch.Tensor = 1 / micro_steps  # of a micro-batch in this process's part of the mean loss
            if rows.masked:  # all tokens that count weigh the same, in whichever micro-batch they are
                counted = torch.tensor(float(rows.num_targets(slice(first_row, first_row + rows_per_rank))))
                one_token = world.size / world.all_reduce_sum(*world.to_device(counted)).clamp(min=1)
            for micro_step in range(micro_steps):
                x, y = world.to_device(*rows[first_row : first_row + micro_batch])  # (micro_batch, block_size) each
                first_row += micro_batch
                if rows.masked:
                    share = (y >= 0).sum() * one_token
                if config.dropout:
                    torch.manual_seed(derive_seed(config.seed, step, micro_step, world.rank))
                between = world.size > 1 and micro_step < micro_steps - 1  # gradients are averaged once, at the last
                with model.no_sync() if between else contextlib.nullcontext():  # type: ignore[operator]
                    with world.autocast():
                        loss = model(x, y)[1]  # the logits are let go at once
                    scaler.scale(loss * share).backward()
                loss_sum += loss.detach() * share
            # What the ranks must agree on: the loss, signals seen, time to save. All act on the sum, a step late.
            asked, signals["SIGUSR1"] = signals["SIGUSR1"], False
            save = asked or (writer is not None and writer.overdue())
            fall = timer.fall(config.eval_interval) if timer and config.last_step == math.inf and world.is_main else 0
            flags = torch.tensor([signals["SIGINT"], signals["SIGTERM"], save, fall], dtype=torch.float32)
            status = world.all_reduce_sum(torch.cat([loss_sum[None] / world.size, *world.to_device(flags)]))
            scaler.unscale_(optimizer)  # type: ignore[arg-type]
            grad_norm = optim.gradient_norm(raw_model.parameters())
            skip = guard.check(status[0], grad_norm)
            if layers:
                layers.before_update(grad_norm, whole=(step + 1) % config.log_interval == 0)
            optimizer.step(factor, optim.clip_divisor(config.grad_clip, grad_norm), skip)
            scaler.update()
            raw_model.zero_grad(set_to_none=True)
        step, samples = step + 1, samples + step_rows
        told = [status[0], grad_norm, guard.bad_in_a_row, guard.skipped, *status[1:]]
        log.put(step, samples, torch.stack(told + (layers.after_update() if layers else [])))
        log.read()
        if log.fall and config.last_step == math.inf:  # from here on the schedule is one of steps, exact on resume
            fall = max(log.fall - 1, 1)  # one has begun since
            config = replace(config, schedule="trapezoid", max_iters=step + fall, decay_iters=fall)
            log.config, log.save_due = config, True  # or a run that is killed would begin its fall elsewhere

    log.read(everything=True)
    if writer:
        writer.finish()
    if in_vain and not log.stop:
        print0(f"step {step}: no better for {since_best} evaluations (patience={config.patience}); the best is kept")
    if timer and val_loss is not None and not log.stop:
        print0(timer.report(best_val_loss))
    if log.stop and writes:
        print0(f"stopped at step {step} by a signal; saved: go on with --resume=True")
    return log.stop


if __name__ == "__main__":
    run_script(main)
