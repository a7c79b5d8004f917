"""Run tasks of lm-evaluation-harness (Gao et al. 2024) by its own Hugging Face backend (the extra `eval`)."""

import os
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from nanogpt.device import is_out_of_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError, first_line, suggest
from nanogpt.generate.sampling import check_finite
from nanogpt.interop.huggingface import write_huggingface
from nanogpt.memory import rows_to_score
from nanogpt.text.tokenizer import Tokenizer

MAX_ROWS = 32  # texts in a batch: all wait for the longest


def run_tasks(
    names: str,
    model: Any,
    tokenizer: Tokenizer,
    world: World,
    *,
    limit: int | None,
    num_fewshot: int | None,
    chat: bool,
    include_path: str | None,
    unsafe_code: bool,
) -> dict[str, Any]:
    """Run tasks on a temporary export of a model, whose own memory is freed; print the tables, return the results.

    names: separated by commas; * matches anything. The options are those of evaluate.py. Raises InputError for an
    unknown task and for a task that fails.
    """
    if unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # else the metric that runs the code refuses to
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import make_table

        task_manager, tasks = _find_tasks([name.strip() for name in names.split(",") if name.strip()], include_path)
        results = simple_evaluate(
            _load_backend(model, tokenizer, world),
            tasks=tasks,
            task_manager=task_manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            confirm_run_unsafe_code=unsafe_code,
            bootstrap_iters=1000,
        )
    except Exception as error:  # a task is a program with data of its own: it can raise anything
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        reason = reason.replace("confirm_run_unsafe_code", "--unsafe_code")
        raise InputError(
            f"--tasks={names}: a task failed ({reason}, {Path(place.filename).name}:{place.lineno}); check its data, "
            "its code and the network, or leave it out"
        ) from error
    assert results is not None
    for column in ("results", "groups"):
        if results.get(column):
            print(make_table(results, column))
    return {name: results.get(name) for name in ("results", "groups", "versions", "n-shot", "n-samples")}


def _find_tasks(names: list[str], folder: str | None) -> tuple[Any, list[str]]:
    """Return the harness's task manager, with the tasks of a folder too, and the names that match."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # the harness's own take seconds to list
        manager = TaskManager(include_path=folder)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        hint = suggest(unknown[0], manager.all_tasks, "`lm_eval ls tasks` lists them")
        raise InputError(f"--tasks={','.join(unknown)}: unknown; {hint}")
    return manager, manager.match_tasks(names)


def _load_backend(model: Any, tokenizer: Tokenizer, world: World) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            write_huggingface(Path(folder), asdict(model.config), model.state_dict(), tokenizer)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"--tasks: cannot export the model to {folder} ({first_line(error)}); set TMPDIR to a larger disk"
            ) from error
        model.to("meta")
        stored_tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.end_of_text is None:  # as of characters; the backend needs one, and a token to pad with
            stored_tokenizer.pad_token_id = 0
            stored_tokenizer.add_special_tokens({"eos_token": "<|never generated|>"})  # an id beyond the model's
        backend = HFLM(
            pretrained=folder,
            tokenizer=stored_tokenizer,
            prefix_token_id=tokenizer.end_of_text or 0,  # stands before an empty context
            device=str(world.device),
            dtype="float32",
            mixed_precision_dtype=None if world.dtype == torch.float32 else world.dtype,
            softmax_dtype="float32",
            batch_size=min(MAX_ROWS, rows_to_score(model, min(model.config.block_size, 1024))),
            logits_cache=False,  # its scores can be wrong: findings/lm_eval_logits_cache.sh
        )
    backend.model.register_forward_hook(lambda module, inputs, output: check_finite(output.logits))
    return backend
