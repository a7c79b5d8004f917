"""What a model is asked once it stands: its loss on fixed windows, text, and how likely a text is.

Text comes in two ways: `generate` reads the whole context anew for each token, and is the oracle; `Decoder` keeps the
keys and values of what it has read. Both draw the same tokens.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt import InputError
from nanogpt.data import EvalWindows, mix
from nanogpt.distributed import World
from nanogpt.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoding puts in the place of bytes that are no character, or not yet one


@torch.inference_mode()
def evaluate(model: nn.Module, windows: EvalWindows, batch_size: int, world: World) -> float:
    """Mean loss in nats over the tokens of `windows` that count; the ranks take its batches in turn and share the sum.
    Raises InputError where none counts."""
    model.eval()
    loss_sum, counted = torch.zeros(1, device=world.device), 0
    for first in range(world.rank * batch_size, len(windows), world.size * batch_size):
        x, y = windows[first : first + batch_size]
        count, missing = int((y >= 0).sum()), batch_size - len(x)
        # The last batch is filled up with rows that do not count: a compiled model wants one shape.
        x, y = world.put(F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1))
        with world.autocast():
            loss = model(x, y)[1]
        loss_sum += loss.float() * count
        counted += count
    model.train()
    total, number = world.sum(torch.cat([loss_sum, *world.put(torch.tensor([float(counted)]))])).tolist()
    if not number:
        raise InputError("the loss mask leaves no token to evaluate on: give a larger --eval_iters or more data")
    return total / number


# ---- drawing a token


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters work in the order in which they stand here, each on what the last one left.

    temperature: 1 is the model's own odds, 0 (and below 1e-6) always the likeliest token. top_k: that many of the
    likeliest. top_p: the likeliest that together have this probability (Holtzman et al. 2019). min_p: those at least
    this share as likely as the likeliest (Nguyen et al. 2024). vocab_size: ids from there on are never drawn (a
    tokenizer may know fewer than the model).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1337
    vocab_size: int | None = None


PLAIN = Sampling()  # from the model's own odds


def odds(logits: Tensor, how: Sampling) -> Tensor:
    """The probabilities (B, V) with which ids are drawn from logits (B, V); temperature must be above 0."""
    logits = logits.float() / how.temperature
    if how.top_k is not None and how.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[:, -1:], -torch.inf)
    if how.top_p < 1:
        ordered, ids = logits.topk(min(how.top_k or logits.shape[-1], logits.shape[-1]))  # the likeliest first
        share = ordered.softmax(-1)
        ordered[share.cumsum(-1) - share >= how.top_p] = -torch.inf  # those before it are enough
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ids, ordered)
    if how.min_p > 0:
        least = logits.max(-1, keepdim=True).values + math.log(how.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits.softmax(-1)


def draw(logits: Tensor, how: Sampling, places: Sequence[tuple[int, int]]) -> Tensor:
    """One id (B,) for each row of logits (B, V).

    places: for each row the number of its sample and the position of the id in its text. They and the seed alone
    decide the draw, so that a sample is the same in any batch.
    """
    logits = logits[:, : how.vocab_size]
    if how.temperature < 1e-6:  # which would overflow
        return logits.argmax(-1)
    chances = odds(logits, how)
    chances = (chances.cpu() if chances.device.type == "mps" else chances).double()  # which MPS lacks
    below = chances.cumsum(-1)
    noise = [mix(how.seed, *place) / 2**63 for place in places]
    # Less than 1, and by so much that no rounding makes the product the sum itself, above which there is no id.
    uniform = torch.tensor(noise, dtype=torch.float64, device=below.device).clamp(max=1 - 1e-12)
    return torch.searchsorted(below, uniform[:, None] * below[:, -1:], right=True)[:, 0].to(logits.device)


class Token(NamedTuple):
    """A token that was drawn. logprob: the log of the probability (in nats) that the model itself gave it, whatever the
    temperature and the filters; None where it was not asked for. rivals: the likeliest ids with theirs, best first."""

    id: int
    logprob: float | None = None
    rivals: Sequence[tuple[int, float]] = ()


def _tokens(ids: Tensor, logits: Tensor, rivals: int) -> list[Token]:
    """What was drawn, with so many rivals; -1: without the log-probability too."""
    if rivals < 0:
        return [Token(each) for each in ids.tolist()]
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(rivals, logprobs.shape[-1]))
    drawn = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
    pairs = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [Token(*fields) for fields in zip(ids.tolist(), drawn, pairs, strict=True)]


# ---- reading the context


def window_start(length: int, block_size: int) -> int:
    """Where the window begins in which the id after `length` others is predicted.

    When the context is full, its last half is kept. (nanoGPT slides by one token, with which all that a cache keeps
    would be void at each step: every position changes.)
    """
    stride = block_size + 1 - max(1, block_size // 2)
    return stride * max(0, -(-(length - block_size) // stride))


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    if not model.training:  # to walk through all modules would take its time at each token
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@torch.inference_mode()
def generate(model: Any, idx: Tensor, max_new_tokens: int, how: Sampling = PLAIN) -> Iterator[Tensor]:
    """Continue the texts idx (B, T), T ≥ 1, yielding the next ids (B, 1) of all rows at a time: the plain way.

    Row i is sample i. Dropout is off while it runs; the model's mode is put back afterwards.
    """
    with _in_eval_mode(model):
        for _ in range(max_new_tokens):
            length = idx.shape[1]
            logits, _ = model(idx[:, window_start(length, model.config.block_size) :])
            new = draw(logits[:, -1], how, [(row, length) for row in range(len(idx))])[:, None]
            idx = torch.cat([idx, new], dim=1)
            yield new


@torch.inference_mode()
def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """The log-probability in nats of each id after the first, given those before it in its window; (len(ids) - 1,)."""
    block, device, found, at = model.config.block_size, next(model.parameters()).device, [], 1
    with _in_eval_mode(model):
        while at < len(ids):  # one window at a time: all ids that are predicted in it
            start = window_start(at, block)
            row = torch.tensor([ids[start : start + block + 1]], device=device)
            logits = model.logits(model.norm(model.features(row[:, :-1])))[0, at - 1 - start :]
            found.append(logits.float().log_softmax(-1).gather(-1, row[0, at - start :, None])[:, 0])
            at += len(logits)
    return torch.cat(found) if found else torch.zeros(0, device=device)


class Cache(nn.Module):
    """The keys and values of each row's window, and attention to them.

    They have a fixed place, (n_layer, rows, n_kv_head, length, head_dim) each, column p holding position p of a window.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def __init__(self, config: Any, rows: int, length: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        shape = (config.n_layer, rows, config.n_kv_head, length, config.head_dim)
        # Zeros, because attention multiplies what it does not look at by 0, and that must be a number.
        self.register_buffer("keys", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("positions", torch.zeros(rows, dtype=torch.long, device=device))  # of the next ids
        self.rows = torch.arange(rows, device=device)

    def fill(self, layer: int, rows: Tensor, source: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within new windows, from position 0 on; `rows` keep what the windows `source` have."""
        q, k, v = (t.to(self.keys.dtype) for t in (q, k, v))
        self.keys[layer, rows, :, : k.shape[2]] = k[source]
        self.values[layer, rows, :, : v.shape[2]] = v[source]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])

    def extend(self, layer: int, columns: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One more position for every row, which attends to those of the first `columns` that mask (rows, 1, 1,
        columns) leaves; None: all rows are at the last of them."""
        keys, values = self.keys[layer], self.values[layer]
        for kept, new in ((keys, k), (values, v)):
            if mask is None:
                kept[:, :, columns - 1 : columns] = new
            else:
                kept[self.rows, :, self.positions] = new[:, :, 0].to(kept.dtype)
        # Query heads of one key head are so many positions to it.
        queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).to(keys.dtype)
        y = F.scaled_dot_product_attention(queries, keys[:, :, :columns], values[:, :, :columns], attn_mask=mask)
        return y.reshape(q.shape)


class Decoder:
    """Continues several texts at once, each token reading that token alone.

    rows: how many texts. length: the most tokens of a window, at most and by default block_size; fewer take less memory
    where the texts are known to stay below. compiled: the step is compiled, on CUDA into one graph.
    The number format is the model's own, or that of the autocast in which it is made.
    """

    def __init__(self, model: Any, rows: int = 1, length: int | None = None, compiled: bool = False):
        self.model, self.rows, self.compiled = model, rows, compiled
        self.length = min(length or model.config.block_size, model.config.block_size)
        weight = model.tokens.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.cache = Cache(model.config, rows, self.length, weight.device, dtype)
        self.texts: list[list[int]] = []
        self.windows: list[int] = []  # the tokens in each row's
        self._step = self._read
        if compiled:
            mode = "reduce-overhead" if kind == "cuda" else None
            self._step = torch.compile(self._read, mode=mode, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def start(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read a text for each row, none of them empty; texts that are equal are read once. Returns what comes next,
        logits (rows, V)."""
        self.texts = [list(text) for text in texts]
        self.windows = [0] * len(texts)
        with _in_eval_mode(self.model):
            return self._reread(range(len(texts)))

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Every row reads one more id, ids (rows,). Returns logits (rows, V)."""
        for text, token in zip(self.texts, ids.tolist(), strict=True):
            text.append(token)
        full = [row for row, window in enumerate(self.windows) if window == self.model.config.block_size]
        logits = None
        with _in_eval_mode(self.model):
            if len(full) < len(self.texts):
                if full:  # what these rows read now is void: they read a new window below
                    self.cache.positions[full] = 0
                columns = max(window for row, window in enumerate(self.windows) if row not in full) + 1
                if self.compiled:  # few different sizes: each is compiled
                    columns = min(self.length, max(128, 1 << (columns - 1).bit_length()))
                equal = not self.compiled and len(set(self.windows)) == 1
                logits = self._step(ids, columns, equal)
                self.windows = [window + 1 for window in self.windows]
            if full:
                fresh = self._reread(full)
                logits = fresh if logits is None else logits.index_copy(0, torch.tensor(full, device=ids.device), fresh)
        assert logits is not None
        return logits

    def _read(self, ids: Tensor, columns: int, equal: bool) -> Tensor:
        """Logits (rows, V) after one id more for each row, ids (rows,). No window has more than `columns` then; equal:
        all have so many."""
        cache, mask = self.cache, None
        if not equal:
            seen = torch.arange(columns, device=ids.device) <= cache.positions[:, None]  # (rows, columns)
            mask = torch.zeros(seen.shape, dtype=cache.keys.dtype, device=ids.device).masked_fill(~seen, -torch.inf)
            mask = mask[:, None, None]
        past = [partial(cache.extend, layer, columns, mask) for layer in range(self.model.config.n_layer)]
        x = self.model.features(ids[:, None], cache.positions[:, None], past)
        cache.positions += 1
        return self.model.logits(self.model.norm(x[:, -1]))

    def _reread(self, rows: Sequence[int]) -> Tensor:
        """Read the windows of `rows` from their beginnings. Returns logits (len(rows), V)."""
        device, block = self.cache.keys.device, self.model.config.block_size
        windows = [tuple(self.texts[row][window_start(len(self.texts[row]), block) :]) for row in rows]
        unique = {window: i for i, window in enumerate(dict.fromkeys(windows))}
        longest = max(map(len, unique))
        ids = torch.tensor([[*window] + [0] * (longest - len(window)) for window in unique], device=device)
        source = torch.tensor([unique[window] for window in windows], device=device)
        where = torch.tensor(list(rows), device=device)
        past = [partial(self.cache.fill, layer, where, source) for layer in range(self.model.config.n_layer)]
        x = self.model.features(ids, past=past)  # what stands after a shorter window is void, and overwritten later
        for row, window in zip(rows, windows, strict=True):
            self.windows[row] = len(window)
        sizes = torch.tensor([len(window) for window in windows], device=device)
        self.cache.positions[where] = sizes
        return self.model.logits(self.model.norm(x[source, sizes - 1]))

    def write(
        self,
        texts: Sequence[Sequence[int]],
        max_new_tokens: int,
        how: Sampling = PLAIN,
        *,
        samples: Sequence[int] | None = None,
        rivals: int = -1,
    ) -> Iterator[list[Token]]:
        """Continue the texts, yielding the next token of each.

        samples: the number of each row's sample, on which its draws depend; None: the row's. rivals: so many of the
        likeliest ids come with each token; -1: no log-probabilities either.
        """
        numbers = range(len(texts)) if samples is None else samples
        logits = self.start(texts)
        for made in range(max_new_tokens):
            ids = draw(logits, how, [(number, len(text)) for number, text in zip(numbers, self.texts, strict=True)])
            yield _tokens(ids, logits, rivals)
            if made + 1 < max_new_tokens:
                logits = self.step(ids)


# ---- weights for decoding


class PackedLinear(nn.Module):
    """A linear layer for a CPU: float16 weights in the order in which FBGEMM reads them, float32 arithmetic.

    Decoding waits for weights to come from memory, and these are half of float32's bytes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def can_pack() -> bool:
    """Whether this machine's torch has FBGEMM (x86 alone has)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@torch.inference_mode()
def pack(model: Any) -> None:
    """Replace all matrices of `model`, in place, by those of `PackedLinear`."""
    head = PackedLinear(model.output_weight, None)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
    model.head = head


# ---- from tokens to text


class TextStream:
    """The text of a row as its tokens come: only what no later token can change, up to the first of the `stops`."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.stopped = False
        self._ids: list[int] = []  # those whose text is not all told, and one before them
        self._told = 0  # characters of their text
        self._held = ""  # what might be the beginning of a stop

    def put(self, token: int) -> str:
        """What can be told now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        open_end = text.endswith(BROKEN)  # a character whose other bytes may come
        new = text[self._told : len(text) - open_end]
        self._told += len(new)
        if not open_end:  # some tokenizers write a token differently at the beginning of a text: one stays before it
            self._ids = self._ids[-1:]
            self._told = len(self.tokenizer.decode(self._ids))
        return self._up_to_stop(new)

    def close(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        rest = self._up_to_stop(self.tokenizer.decode(self._ids)[self._told :])
        self._ids, self._told = [], 0
        held, self._held = ("" if self.stopped else self._held), ""
        return rest + held

    def _up_to_stop(self, new: str) -> str:
        text = self._held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        starts = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        held = max(starts, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def sample_text(model: Any, tokenizer: Tokenizer, characters: int, seed: int) -> str:
    """About `characters` characters that `model` writes of its own accord, the same for the same weights and seed."""
    start = tokenizer.end_of_text
    if start is None:  # a character tokenizer: the first of its sorted characters is a newline in most texts
        start = 0
    stream, text = TextStream(tokenizer), ""
    how = Sampling(seed=seed, vocab_size=tokenizer.vocab_size)
    for (token,) in Decoder(model, length=characters + 1).write([[start]], characters, how):
        text += stream.put(token.id)
        if len(text) >= characters:
            break
    return (text + stream.close())[:characters]
