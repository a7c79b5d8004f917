"""What a model is asked once it stands: its loss on fixed windows, text, and sampling likely a text is.

Text comes in two ways: `generate` reads the whole context anew for each token, and is the oracle; `Decoder` keeps the
keys and values of what it has read. Both draw the same tokens.
"""

import contextlib
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt import InputError
from nanogpt.data import EvalWindows, hashed_uniform
from nanogpt.distributed import World
from nanogpt.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoding puts in the place of bytes that are no character, or not yet one
MOST_TOKENS = 2**14  # read in one pass, so that the memory of many long texts' activations stays small


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
        x, y = world.to_device(F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1))
        with world.autocast():
            loss = model(x, y)[1]
        loss_sum += loss.float() * count
        counted += count
    model.train()
    total, number = world.all_reduce_sum(
        torch.cat([loss_sum, *world.to_device(torch.tensor([float(counted)]))])
    ).tolist()
    if not number:
        raise InputError("the loss mask leaves no token to evaluate on: give a larger --eval_iters or more data")
    return total / number


# ---- drawing a token


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters work in the order in which they stand here, each on what the last one left.

    temperature: 1 is the unscaled probabilities, 0 (and below 1e-6) always the likeliest token. top_k: that many of the
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


PLAIN = Sampling()  # from the model's own filtered_probs


def filtered_probs(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What may be drawn from logits (B, V): in shares (B, K), which need not sum to 1, and the ids (B, K) that have
    them, each row's in order; None: all of them, K = V. temperature must be above 0."""
    logits, ids = logits.float() / sampling.temperature, None
    most = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if most < logits.shape[-1] or sampling.top_p < 1:
        logits, ids = logits.topk(most)  # the likeliest first
    shares = logits.softmax(-1)
    if sampling.top_p < 1:
        shares = shares * (shares.cumsum(-1) - shares < sampling.top_p)  # unless those before it are enough
    if sampling.min_p > 0:
        shares = shares * (shares >= sampling.min_p * shares.amax(-1, keepdim=True))
    if ids is not None:  # back in order: which of two is a hair likelier must not decide what is drawn
        kept = int((shares > 0).sum(-1).max())
        ids, order = ids[:, :kept].sort(-1)
        shares = shares[:, :kept].gather(-1, order)
    return shares, ids


def sample_tokens(logits: Tensor, sampling: Sampling, places: Sequence[tuple[int, int]]) -> Tensor:
    """One id (B,) for each row of logits (B, V).

    places: for each row the number of its sample and the position of the id in its text. They and the seed alone
    decide the noise, so that a sample is the same in any batch. Raises InputError for logits that are no numbers.
    """
    logits = logits[:, : sampling.vocab_size]
    if not logits.isfinite().all():
        raise InputError(
            "what the model gives is no number: its weights are broken, or too large for the number format; "
            "try --dtype=float32"
        )
    if sampling.temperature < 1e-6:  # which would overflow
        return logits.argmax(-1)
    shares, ids = filtered_probs(logits, sampling)
    shares = (shares.cpu() if shares.device.type == "mps" else shares).double()  # which MPS lacks
    below = shares.cumsum(-1)
    # Less than 1, and by so much that no rounding makes the product the sum itself, above which there is no id.
    noise = hashed_uniform(sampling.seed, *np.array(places, dtype=np.uint64).T).clip(max=1 - 1e-12)
    target = torch.from_numpy(noise).to(below.device)[:, None] * below[:, -1:]
    found = torch.searchsorted(below, target, right=True).to(logits.device)
    return (found if ids is None else ids.gather(-1, found))[:, 0]


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
def generate(model: Any, idx: Tensor, max_new_tokens: int, sampling: Sampling = PLAIN) -> Iterator[Tensor]:
    """Continue the texts idx (B, T), T ≥ 1, yielding the next ids (B, 1) of all rows at a time: the plain way.

    Row i is sample i. Dropout is off while it runs; the model's mode is put back afterwards.
    """
    with _in_eval_mode(model):
        for _ in range(max_new_tokens):
            length = idx.shape[1]
            logits, _ = model(idx[:, window_start(length, model.config.block_size) :])
            new = sample_tokens(logits[:, -1], sampling, [(row, length) for row in range(len(idx))])[:, None]
            idx = torch.cat([idx, new], dim=1)
            yield new


@torch.inference_mode()
def score(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How sure the model is of the ids y (B, T) that follow each of x (B, T), −1 where nobody asks: for those asked
    for, row by row, the log-probabilities in nats, (asked,), and whether each is the likeliest id there, (asked,).
    Raises InputError for logits that are no numbers, as `sample_tokens` does."""
    with _in_eval_mode(model):
        asked = y >= 0  # only for these are there logits, of which each is as large as the vocabulary
        logits, ids = model.logits(model.norm(model.hidden_states(x)[asked])).float(), y[asked]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        if not logprobs.isfinite().all():  # a NaN anywhere in a row of logits is in its sum, too
            raise InputError(
                "what the model gives is no number: its weights are broken, or too large for the number format; "
                "try --dtype=float32"
            )
        return logprobs, logits.argmax(-1) == ids


def rows_to_score(model: Any, length: int) -> int:
    """How many rows of `length` ids `score` takes in one pass, its logits being a gigabyte or less."""
    return max(1, min(MOST_TOKENS, 2**28 // model.config.vocab_size) // length)


def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """The log-probability in nats of each id after the first, given those before it in its window; (len(ids) - 1,)."""
    block, device, found, at = model.config.block_size, next(model.parameters()).device, [], 1
    while at < len(ids):  # one window at a time: all ids that are predicted in it
        start = window_start(at, block)
        row = torch.tensor([ids[start : start + block + 1]], device=device)
        x, y = row[:, :-1], row[:, 1:].clone()
        y[:, : at - 1 - start] = -1
        found.append(score(model, x, y)[0])
        at += len(found[-1])
    return torch.cat(found) if found else torch.zeros(0, device=device)


class KVCache(nn.Module):
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
        self.cache = KVCache(model.config, rows, self.length, weight.device, dtype)
        self.texts: list[list[int]] = []
        self.windows: list[int] = []  # the tokens in each row's
        self._step = self._decode_step
        if compiled:
            # torch keeps so many compiled versions of a function and no more, and each decoder needs one: the function
            # is copied. (To be gone once torch counts them by what was given to torch.compile.)
            copy = types.FunctionType(Decoder._decode_step.__code__.replace(), globals())
            mode = "reduce-overhead" if kind == "cuda" else None
            self._step = torch.compile(types.MethodType(copy, self), mode=mode, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def start(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read a text for each row; texts that are equal are read once. Returns what comes next, logits (rows, V).

        Raises ValueError where there is not one text for each row, one is empty, or one is longer than `length` where
        that is shorter than the context.
        """
        if len(texts) != self.rows or not all(map(len, texts)):
            raise ValueError(f"a decoder of {self.rows} rows needs so many texts, none of them empty")
        self.texts = [list(text) for text in texts]
        self.windows = [0] * len(texts)
        with _in_eval_mode(self.model):
            return self._prefill(range(len(texts)))

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Every row reads one more id, ids (rows,). Returns logits (rows, V).

        Raises ValueError before `start`, for another number of ids, and where `length` is shorter than the context and
        is exceeded.
        """
        if ids.shape != (len(self.texts),) or not self.texts:
            raise ValueError(f"expected {len(self.texts)} ids, one for each text, got {tuple(ids.shape)}; start first")
        block = self.model.config.block_size
        self._check(max(self.windows) + 1)
        for text, token in zip(self.texts, ids.tolist(), strict=True):
            text.append(token)
        ids = ids.to(self.cache.keys.device)
        full = [row for row, window in enumerate(self.windows) if window == block]
        logits = None
        with _in_eval_mode(self.model):
            if len(full) < len(self.texts):
                if full:  # what these rows read now is void: they read a new window below
                    self.cache.positions[full] = 0
                columns = max(window for row, window in enumerate(self.windows) if row not in full) + 1
                if self.compiled:  # one shape for all steps; and what a graph has made, its next run overwrites
                    logits = self._step(ids, self.length, False).clone()
                else:
                    logits = self._step(ids, columns, len(set(self.windows)) == 1)
                self.windows = [window + 1 for window in self.windows]
            if full:
                fresh = self._prefill(full)
                logits = fresh if logits is None else logits.index_copy(0, torch.tensor(full, device=ids.device), fresh)
        assert logits is not None
        return logits

    def _check(self, longest: int) -> None:
        if self.length < longest and self.length < self.model.config.block_size:
            raise ValueError(f"{longest} tokens do not fit into a decoder that was made for length={self.length}")

    def _decode_step(self, ids: Tensor, columns: int, equal: bool) -> Tensor:
        """Logits (rows, V) after one id more for each row, ids (rows,). No window has more than `columns` then; equal:
        all have so many."""
        cache, mask = self.cache, None
        if not equal:
            seen = torch.arange(columns, device=ids.device) <= cache.positions[:, None]  # (rows, columns)
            mask = torch.zeros(seen.shape, dtype=cache.keys.dtype, device=ids.device).masked_fill(~seen, -torch.inf)
            mask = mask[:, None, None]
        attention = [partial(cache.extend, layer, columns, mask) for layer in range(self.model.config.n_layer)]
        x = self.model.hidden_states(ids[:, None], cache.positions[:, None], attention)
        cache.positions += 1
        return self.model.logits(self.model.norm(x[:, -1]))

    def _prefill(self, rows: Sequence[int]) -> Tensor:
        """Read the windows of `rows` from their beginnings. Returns logits (len(rows), V)."""
        device, block = self.cache.keys.device, self.model.config.block_size
        sharing: dict[tuple[int, ...], list[int]] = {}  # the rows that have a window
        for row in rows:
            text = self.texts[row]
            sharing.setdefault(tuple(text[window_start(len(text), block) :]), []).append(row)
        longest = max(map(len, sharing))
        self._check(longest)
        found: dict[int, Tensor] = {}
        at_once, unique = max(1, MOST_TOKENS // longest), [*sharing]
        for windows in (unique[first : first + at_once] for first in range(0, len(unique), at_once)):
            # What stands after a shorter window is void, and overwritten later.
            ids = torch.tensor([[*window] + [0] * (longest - len(window)) for window in windows], device=device)
            readers = [(row, i) for i, window in enumerate(windows) for row in sharing[window]]
            where, source = torch.tensor(readers, device=device).T
            attention = [partial(self.cache.fill, layer, where, source) for layer in range(self.model.config.n_layer)]
            x = self.model.hidden_states(ids, attention=attention)
            sizes = torch.tensor([len(window) for window in windows], device=device)
            last = x[torch.arange(len(windows), device=device), sizes - 1]
            logits = self.model.logits(self.model.norm(last))
            self.cache.positions[where] = sizes[source]
            for row, i in readers:
                self.windows[row], found[row] = len(windows[i]), logits[i]
        return torch.stack([found[row] for row in rows])

    def generate(
        self,
        texts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = PLAIN,
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
            ids = sample_tokens(
                logits, sampling, [(number, len(text)) for number, text in zip(numbers, self.texts, strict=True)]
            )
            yield _tokens(ids, logits, rivals)
            if made + 1 < max_new_tokens:
                logits = self.step(ids)


def rows_that_fit(model: Any, length: int, free: int | None) -> int:
    """How many texts of up to `length` tokens a decoder can write at once in half of `free` bytes; None: any number."""
    c = model.config
    kept = 2 * c.n_layer * c.n_kv_head * c.head_dim * min(length, c.block_size)
    each = 4 * (kept + 16 * c.vocab_size)  # drawing makes a few copies of the logits, some of 8 bytes a number
    return 2**31 if free is None else max(1, free // 2 // each)


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


def rounded_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A linear layer that keeps its weights in `dtype`: what autocast to it would make of them at each use."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


@torch.no_grad()
def pack(model: Any, layer: Callable[[Tensor, Tensor | None], nn.Module] = PackedLinear) -> None:
    """Replace all matrices of `model`, in place, by `layer` of weight and bias. Embeddings and norms stay."""
    head = layer(model.lm_head_weight, None)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))
    model.head = head


# ---- from tokens to text


class TextStream:
    """The text of a row as its tokens come: only what no later token can change, up to the first of the `stops`.

    before: the ids that the text goes on from, or the last of them. ends: ids that end the text, and are no part of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
        ends: Collection[int] = (),
    ):
        self.tokenizer, self.stops, self.ends = tokenizer, [stop for stop in stops if stop], ends
        self.stopped = False
        # Some tokenizers write a token differently at the beginning of a text: after whole characters one stays.
        self._anchor: list[int] = []
        self._open: list[int] = []  # the ids after it whose text is not all told
        self._told = 0  # characters of their text
        self._held = ""  # what might be the beginning of a stop
        for token in before:
            self._settled(token)

    def put(self, token: int) -> str:
        """What can be told now."""
        if self.stopped:
            return ""
        if token in self.ends:
            rest, self.stopped = self.close(), True
            return rest
        return self._up_to_stop(self._settled(token))

    def close(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        rest = self._up_to_stop(self._text(self._open)[self._told :])
        self._open, self._told = [], 0
        held, self._held = ("" if self.stopped else self._held), ""
        return rest + held

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([*self._anchor, *ids])[len(self.tokenizer.decode(self._anchor)) :]

    def _settled(self, token: int) -> str:
        """What is new in the text with one token more, and stays."""
        self._open.append(token)
        text = self._text(self._open)
        whole = text.rstrip(BROKEN)
        # A character has four bytes at most: three may wait for the last.
        new = text[self._told : max(len(whole), len(text) - 3)]
        self._told += len(new)
        if whole == text:
            if BROKEN not in self.tokenizer.decode([token]):
                self._anchor = [token]
            self._open, self._told = [], 0
        elif len(self._open) > 8:  # bytes that became no character: close those that nothing depends on
            for count in (4, 3, 2, 1):
                first = self._text(self._open[:count])
                if len(first) <= self._told and first + self._text(self._open[count:]) == text:
                    self._open, self._told = self._open[count:], self._told - len(first)
                    break
        return new

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
    sampling = Sampling(seed=seed, vocab_size=tokenizer.vocab_size)
    for (token,) in Decoder(model, length=characters + 1).generate([[start]], characters, sampling):
        text += stream.put(token.id)
        if len(text) >= characters:
            break
    return (text + stream.close())[:characters]
