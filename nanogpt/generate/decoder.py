"""Generate tokens with a KV cache: prefill, then one decode step per token."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.compile import set_cache_folder, warn_of_failure
from nanogpt.generate.sampling import Sampling, Token, sample_tokens, to_tokens, window_start
from nanogpt.memory import MAX_TOKENS_PER_PASS


class KVCache(nn.Module):
    """Keys and values of each row's context window, and the attention that reads and writes them.

    shape: (n_layer, rows, n_kv_head, length, head_dim) of keys and values; position p of a window is in column p.
    A module, because torch.compile and CUDA graphs count on its buffers to keep their addresses.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor  # (rows,), of each row's next token

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype):
        super().__init__()
        # Zeros: attention multiplies masked values by 0, and 0 times an uninitialized NaN is NaN.
        self.register_buffer("keys", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("values", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("positions", torch.zeros(shape[1], dtype=torch.long, device=device))
        self.rows = torch.arange(shape[1], device=device)

    def attend_prefill(self, layer: int, rows: Tensor, windows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention in whole windows. Row rows[i] of the cache keeps the keys and values of windows[i]."""
        q, k, v = (t.to(self.keys.dtype) for t in (q, k, v))
        T = k.shape[2]
        self.keys[layer, rows, :, :T] = k[windows]
        self.values[layer, rows, :, :T] = v[windows]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])

    def attend_decode(self, layer: int, columns: int, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one new token per row to the first `columns` positions.

        mask: (rows, 1, 1, columns), added to the scores; None if all rows are at the last of these positions.
        """
        keys, values = self.keys[layer], self.values[layer]
        for cached, new in ((keys, k), (values, v)):
            if mask is None:
                cached[:, :, columns - 1 : columns] = new
            else:
                cached[self.rows, :, self.positions] = new[:, :, 0].to(cached.dtype)
        # Query heads that share a key head become query positions of one head.
        queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).to(keys.dtype)
        y = F.scaled_dot_product_attention(queries, keys[:, :, :columns], values[:, :, :columns], attn_mask=mask)
        return y.reshape(q.shape)


class Decoder:
    """Continues several texts at once, with the model in eval mode.

    rows: the number of texts. length: the longest context window in tokens, at most and by default block_size; shorter
    saves memory if no text exceeds it. compiled: compile the decode step, on CUDA into one graph.
    The cache has the model's dtype, or that of the autocast in which the decoder is made.
    """

    def __init__(self, model: Any, rows: int = 1, length: int | None = None, compiled: bool = False):
        config = model.config
        self.model = model
        self.rows = rows
        self.block_size: int = config.block_size
        self.length = min(length or config.block_size, config.block_size)
        self.compiled = compiled
        self.texts: list[list[int]] = []

        weight = model.token_embedding.weight
        device_type = weight.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        shape = (config.n_layer, rows, config.n_kv_head, self.length, config.head_dim)
        self.cache = KVCache(shape, weight.device, dtype)

        self._step = self._forward_step
        if compiled:
            mode = "reduce-overhead" if device_type == "cuda" else None
            set_cache_folder()
            self._step = torch.compile(self._forward_step, mode=mode, fullgraph=True, dynamic=False)
            try:
                for _ in range(3):  # the first step compiles, the others record the CUDA graph
                    self.prefill([[0]] * rows)
                    self.decode_step(torch.zeros(rows, dtype=torch.long))
            except Exception as error:
                with contextlib.redirect_stdout(sys.stderr):
                    warn_of_failure(error)
                self.compiled = False
                self._step = self._forward_step

    @torch.inference_mode()
    def prefill(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read one text for each row, equal ones once. Returns the logits (rows, V) of the next tokens."""
        assert len(texts) == self.rows
        self.model.eval()
        self.texts = [list(text) for text in texts]
        return self._prefill_rows(range(self.rows))

    @torch.inference_mode()
    def decode_step(self, ids: Tensor) -> Tensor:
        """Read one more token for each row, ids (rows,). Returns the logits (rows, V) of the next tokens."""
        windows = [len(text) - window_start(len(text), self.block_size) for text in self.texts]  # their lengths
        for text, token in zip(self.texts, ids.tolist(), strict=True):
            text.append(token)
        full = [row for row, length in enumerate(windows) if length == self.block_size]
        if len(full) == self.rows:
            return self._prefill_rows(full)

        if full:
            self.cache.positions[full] = 0  # any will do: these rows are prefilled below
        columns = 1 + max(length for length in windows if length < self.block_size)
        assert columns <= self.length
        ids = ids.to(self.cache.keys.device)
        if self.compiled:
            # One shape for all steps. The next run of a CUDA graph overwrites its output, so copy it.
            logits = self._step(ids, self.length, False).clone()
        else:
            logits = self._step(ids, columns, len(set(windows)) == 1)
        if full:
            logits[full] = self._prefill_rows(full)
        return logits

    def generate(
        self,
        texts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        sample_indices: Sequence[int] | None = None,
        top_logprobs: int | None = None,
    ) -> Iterator[list[Token]]:
        """Continue the texts, yielding the next token of each.

        sample_indices: the index of each row's sample, which decides its noise; None: the row.
        top_logprobs: tokens bring their log-probability and this many of the most probable ids; None: neither.
        """
        if sample_indices is None:
            sample_indices = range(self.rows)
        logits = self.prefill(texts)
        for step in range(1, max_new_tokens + 1):
            ids = sample_tokens(logits, sampling, sample_indices, [len(text) for text in self.texts])
            yield to_tokens(ids, logits, top_logprobs)
            if step < max_new_tokens:
                logits = self.decode_step(ids)

    def _forward_step(self, ids: Tensor, columns: int, equal_lengths: bool) -> Tensor:
        """Compute the logits (rows, V) after one more token per row, ids (rows,), and cache its keys and values.

        columns: at least the longest window then. equal_lengths: all windows have exactly this length.
        """
        cache = self.cache
        mask = None
        if not equal_lengths:
            visible = torch.arange(columns, device=ids.device) <= cache.positions[:, None]  # (rows, columns)
            mask = torch.zeros(visible.shape, dtype=cache.keys.dtype, device=ids.device)
            mask = mask.masked_fill(~visible, -torch.inf)[:, None, None]
        attention = [partial(cache.attend_decode, layer, columns, mask) for layer in range(len(cache.keys))]
        x = self.model.hidden_states(ids[:, None], cache.positions[:, None], attention)
        cache.positions += 1
        return self.model.logits(self.model.norm(x[:, -1]))

    def _prefill_rows(self, rows: Sequence[int]) -> Tensor:
        """Read the context windows of `rows` into the cache. Returns logits (len(rows), V)."""
        device = self.cache.keys.device
        texts = [self.texts[row] for row in rows]
        windows = [tuple(text[window_start(len(text), self.block_size) :]) for text in texts]
        index = {window: i for i, window in enumerate(dict.fromkeys(windows))}  # of the distinct windows
        source = torch.tensor([index[window] for window in windows], device=device)
        lengths = torch.tensor([len(window) for window in index], device=device)
        # The keys and values of the padding are overwritten before anything reads them.
        padded = nn.utils.rnn.pad_sequence([torch.tensor(window) for window in index], batch_first=True).to(device)
        assert padded.shape[1] <= self.length

        cache_rows = torch.tensor(rows, device=device)
        logits = []
        batch_size = max(1, MAX_TOKENS_PER_PASS // padded.shape[1])
        for first in range(0, len(padded), batch_size):
            batch = padded[first : first + batch_size]
            in_batch = (first <= source) & (source < first + batch_size)
            args = (cache_rows[in_batch], source[in_batch] - first)
            attention = [partial(self.cache.attend_prefill, layer, *args) for layer in range(len(self.cache.keys))]
            x = self.model.hidden_states(batch, attention=attention)
            last = x[torch.arange(len(batch), device=device), lengths[first : first + batch_size] - 1]
            logits.append(self.model.logits(self.model.norm(last)))
        self.cache.positions[cache_rows] = lengths[source]
        return torch.cat(logits)[source]
