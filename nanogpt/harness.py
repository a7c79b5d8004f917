"""A model as EleutherAI's lm-evaluation-harness asks it (Gao et al. 2024; the extra `eval`): how likely a text is, and
how it goes on. Tasks, prompts and metrics are the harness's; scores and texts are ours.
"""

import difflib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from nanogpt.device import free_memory, is_out_of_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.evaluation import score
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.sampling import Sampling
from nanogpt.generate.stream import TextStream
from nanogpt.memory import decoder_rows_that_fit, rows_to_score
from nanogpt.text.tokenizer import Tokenizer

MOST_ROWS = 32  # texts that are written at once: all wait for the longest


class NanoGPTLM(TemplateLM):
    """The harness's view of a model that lies on its device. Its base class encodes pairs of context and continuation;
    texts that are longer than the model's context lose their beginning, as in the harness's own backend `hf`. What
    ends a text, and stands before an empty one, is <|endoftext|> alone: other names for it in a folder's
    tokenizer_config.json, such as instruct models have, are not read; chat templates are not applied."""

    def __init__(self, model: Any, tokenizer: Tokenizer, world: World):
        super().__init__()
        self.model, self.words, self.world, self.block_size = model, tokenizer, world, model.config.block_size

    @property
    def eot_token_id(self) -> int:
        """What stands before an empty context; of a tokenizer without an end of text the first id: of characters a
        newline, in most texts."""
        return self.words.end_of_text or 0

    @property
    def prefix_token_id(self) -> int:
        """The same for the base class, which asks nothing of a first token that is equal to it; -1: none can be."""
        return -1 if self.words.end_of_text is None else self.words.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return self.words.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in nats, window by window."""
        asked = [(("", text), [self.eot_token_id], self.tok_encode(text)) for (text,) in (r.args for r in requests)]
        return [found for found, _ in self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        """For each request (its texts, ids of the context, ids of the continuation) the continuation's log-probability
        in nats, and whether each of its ids is the likeliest."""
        found, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
        windows = [(i, *window) for i, (_, *pair) in enumerate(requests) for window in self._windows(*pair)]
        windows = [window for window in windows if window[2]]  # of an empty text nothing is asked
        windows.sort(key=lambda window: -len(window[1]))  # of like lengths, and the most memory first
        with tqdm(total=len(windows), desc="scoring", unit="text", disable=disable_tqdm or None) as bar:
            while windows:
                rows = rows_to_score(self.model, len(windows[0][1]))
                batch, windows = windows[:rows], windows[rows:]
                x = torch.zeros(len(batch), len(batch[0][1]), dtype=torch.int64)
                y = torch.full_like(x, -1)
                for row, (_, read, asked) in enumerate(batch):  # what is read ends one before what is asked for
                    x[row, : len(read)] = torch.tensor(read)
                    y[row, len(read) - len(asked) : len(read)] = torch.tensor(asked)
                with self.world.autocast():
                    logprobs, best = (told.cpu() for told in score(self.model, *self.world.to_device(x, y)))
                sizes = [len(asked) for _, _, asked in batch]
                for (i, *_), each, likeliest in zip(batch, logprobs.split(sizes), best.split(sizes), strict=True):
                    found[i] += float(each.sum())
                    greedy[i] &= bool(likeliest.all())
                bar.update(len(batch))
        return [*zip(found.tolist(), greedy.tolist(), strict=True)]

    def _windows(self, context: list[int], continuation: list[int]) -> Iterable[tuple[list[int], list[int]]]:
        """What is read, and what of the continuation is asked for at its end: mostly all; of more ids than the model
        reads at once a window after the other, each of them asked for once."""
        if context in ([], [-1]):  # of white space alone, which the base class moves on; of a text's beginning
            context = [self.eot_token_id]
        if len(continuation) > self.block_size:
            return get_rolling_token_windows(continuation, context[-1], self.block_size, context_len=1)
        return [((context + continuation)[-self.block_size - 1 : -1], continuation)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """How each context goes on, up to its stops, the end of text, or so many tokens."""
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="writing", unit="text", disable=disable_tqdm or None) as bar:
            for settings in {repr(request.args[1]): request.args[1] for request in requests}.values():
                alike = [i for i, request in enumerate(requests) if request.args[1] == settings]
                for i, text in self._written({i: requests[i].args[0] for i in alike}, settings):
                    texts[i] = text
                    bar.update()
        return texts

    def _written(self, contexts: dict[int, str], settings: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """The numbers of contexts that share their settings, and how these go on."""
        wanted = normalize_gen_kwargs(settings)
        stops, most = handle_stop_sequences(wanted["until"], eos=None), wanted["max_gen_toks"]
        filters = {name: wanted[name] for name in ("top_k", "top_p", "min_p") if (wanted.get(name) or 0) > 0}
        temperature = wanted.get("temperature", 1.0) if wanted["do_sample"] else 0.0
        how = Sampling(temperature, **filters, vocab_size=self.words.vocab_size)
        special = self.words.special_tokens
        ends = {i for name, i in special.items() if name in stops or i == self.words.end_of_text}
        silent = {*special.values()} - ends  # other special tokens are no text
        # Room for what is to come; where that alone exceeds the model's context, the decoder's windows move on.
        kept = self.block_size - most if most < self.block_size else self.block_size
        ids = {i: (self.tok_encode(text) or [self.eot_token_id])[-kept:] for i, text in contexts.items()}
        waiting = sorted(ids, key=lambda i: -len(ids[i]))
        while waiting:
            length = len(ids[waiting[0]]) + most
            rows = min(MOST_ROWS, decoder_rows_that_fit(self.model, length, free_memory(self.world.device)))
            batch, waiting = waiting[:rows], waiting[rows:]
            streams = [TextStream(self.words, stops, ends=ends) for _ in batch]
            texts = [""] * len(batch)
            with self.world.autocast():
                decoder = Decoder(self.model, len(batch), length)
                for tokens in decoder.generate([ids[i] for i in batch], most, how, samples=batch):
                    for row, token in enumerate(tokens):
                        if token.id not in silent:
                            texts[row] += streams[row].put(token.id)
                    if all(stream.stopped for stream in streams):
                        break
            for i, text, stream in zip(batch, texts, streams, strict=True):
                yield i, text + stream.close()


def run_tasks(asked: TemplateLM, names: Sequence[str], folder: str | None, **options: Any) -> dict[str, Any]:
    """The harness's results of its tasks, and of those that a folder holds as YAML files; * in a name stands for
    anything. options are those of its `simple_evaluate`. Raises InputError for a name without a task, and for a task
    that fails."""
    try:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not set(names) <= {*manager.all_subtasks}:  # to read all that the harness brings along takes it seconds
            manager = TaskManager(include_path=folder)
        faults = []
        for name in (name for name in names if not manager.match_tasks([name])):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them"
            faults.append(f"tasks={name}: there is no such task; {hint}")
        if faults:
            raise InputError("\n".join(faults))
        tasks = manager.match_tasks([*names])
        found = evaluator.simple_evaluate(asked, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **options)
    except Exception as error:  # a task is a program with data of its own: it may raise anything
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(f"tasks={','.join(names)}: {_explained(error)}") from error
    assert found is not None  # as it is in all processes but the first
    return found


def _explained(error: Exception) -> str:
    """What went wrong in a task, where, and what to do."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    told = f"{type(error).__name__}: {error}"[:200].strip()
    told = " ".join(f"{told}, {Path(place.filename).name}:{place.lineno}".split())
    if "confirm_run_unsafe_code" in str(error):
        return "runs the code that the model writes: allow it by --unsafe_code=True, or leave it out"
    if type(error) is FileNotFoundError:  # the class itself, of which what the network lacks are subclasses
        return f"a file is missing ({told}): put it there, or mend the task"
    if isinstance(error, OSError):
        return f"their data cannot be had ({told}): connect to the network"
    return f"cannot be evaluated ({told}): mend the task, ask it with other flags, or leave it out"
