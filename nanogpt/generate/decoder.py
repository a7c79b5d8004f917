"""Decode with a KV cache."""

import types
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.generate.sampling import PLAIN, Sampling, Token, eval_mode, sample_tokens, to_tokens, window_start
from nanogpt.generate.stream import TextStream
from nanogpt.memory import MAX_TOKENS_PER_PASS
from nanogpt.text.tokenizer import Tokenizer


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
        with eval_mode(self.model):
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
        with eval_mode(self.model):
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
        at_once, unique = max(1, MAX_TOKENS_PER_PASS // longest), [*sharing]
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
            yield to_tokens(ids, logits, rivals)
            if made + 1 < max_new_tokens:
                logits = self.step(ids)


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
