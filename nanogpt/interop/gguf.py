"""Read GGUF, the file of llama.cpp and the programs around it, by llama.cpp's own package `gguf`.

A file holds everything: sizes, tensors (perhaps quantized), tokenizer, chat template. It is memory-mapped, and all
sizes that it states are checked before memory is allocated.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.files import regular_file_size
from nanogpt.interop.names import (
    ARCHITECTURES,
    Architecture,
    Unread,
    Weights,
    first_line,
    tensor_layout,
    translate,
    validate_sizes,
)
from nanogpt.schema import Count, matches
from nanogpt.text.fast_bpe import LLAMA_3_PATTERN, PATTERNS
from nanogpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

HINT = "download or convert it again"
MAX_HEADER_PARTS = 5_000_000  # strings and numbers; Gemma 3's vocabulary, the largest published one, has two million
BASE_NAMES = ("gpt2", "llama", "qwen2", "qwen3")  # general.architecture, as in Hugging Face's model_type
# GPTConfig's field -> key after the architecture's name
SIZES = {
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "block_size": "context_length",
}
GPT2_SIZES = SIZES | {"norm_eps": "attention.layer_norm_epsilon"}
MODERN_SIZES = SIZES | {
    "n_kv_head": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
IGNORED = ("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling: a divisor of each frequency
PUBLISHED_SCALING = (1.0, 4.0, 8192.0)  # of Llama 3.1 to 3.3, after the factor

# Types of tokens in tokenizer.ggml.token_type.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
GPT2_SPLIT = PATTERNS["gpt2"]
QWEN2_SPLIT = LLAMA_3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the expressions that split text, one after the other
SPLITS = {
    "gpt-2": [GPT2_SPLIT],
    "smollm": [r"\p{N}", GPT2_SPLIT],
    "starcoder": [r"\p{N}", GPT2_SPLIT],
    "llama-bpe": [LLAMA_3_PATTERN],
    "smaug-bpe": [LLAMA_3_PATTERN],
    "qwen2": [QWEN2_SPLIT],
    "deepseek-r1-qwen": [QWEN2_SPLIT],
    "gpt-4o": [GPT4O_SPLIT],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
# These take a word that is in the vocabulary as it is, whatever the merges would make of it.
IGNORE_MERGES = ("llama-bpe",)
# The models of these were trained on text in NFC, which llama.cpp does not make.
NFC = ("qwen2", "deepseek-r1-qwen")
NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Header:
    """The settings and tensors of a GGUF file."""

    def __init__(self, path: Path):
        """Raises InputError for a file that is damaged or that states more than it holds."""
        try:
            import gguf
        except ImportError as error:
            raise InputError(f'{path}: needs the package gguf: pip install -e ".[gguf]"') from error

        class Reader(gguf.GGUFReader):
            """The package's reader, which takes neither a part beyond the end of the file nor endless many."""

            num_parts = 0

            def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
                self.num_parts += 1
                if self.num_parts > MAX_HEADER_PARTS:
                    raise ValueError(f"its header has more than {MAX_HEADER_PARTS:,} parts")
                order = override_order or self.byte_order
                # Raises ValueError beyond the end, and is much faster than slices of NumPy's memmap.
                return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), offset)

        self.source = str(path)
        try:
            size = regular_file_size(path)
            reader = Reader(path)
            self._fields = reader.fields
            self.tensors = {tensor.name: tensor for tensor in reader.tensors}
            if sum(int(tensor.n_bytes) for tensor in reader.tensors) > size:
                raise ValueError("it states tensors larger than the file")
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            raise InputError(f"{path}: cannot be read ({first_line(error)}); {HINT}") from error
        if (self.get("split.count") or 1) > 1:
            raise InputError(f"{path}: is one of several parts; merge them with llama.cpp's llama-gguf-split --merge")

    def get(self, key: str) -> Any:
        """The value of a setting, None if it is missing."""
        field = self._fields.get(key)
        try:
            value = None if field is None else field.contents()
        except ValueError as error:  # a text that is not UTF-8
            raise InputError(f"{self.source}: {key} cannot be read ({first_line(error)}); {HINT}") from error
        # The shortest decimal of a float32: 1e-5 and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def keys(self, prefix: str) -> list[str]:
        """The rest of all keys that begin with `prefix`."""
        return [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]


def read_gguf(path: Path) -> Weights:
    """Read a model and its tokenizer from a GGUF file; quantized weights become float32.

    Raises InputError if it is missing or damaged, or computes a function that model.py does not.
    """
    header = Header(path)
    source = header.source
    name = header.get("general.architecture")
    architecture = next((known for known in ARCHITECTURES if known.model_type == name and name in BASE_NAMES), None)
    if architecture is None:
        raise InputError(f"{source}: architecture {name!r} is not supported; use a model of {', '.join(BASE_NAMES)}")
    tokenizer = _read_tokenizer(header) if header.get("tokenizer.ggml.tokens") else None

    config = _read_config(header, architecture)
    stored = dict(header.tensors)
    if name == "llama" and ROPE_FACTORS in stored:
        factors = _dequantize(source, stored.pop(ROPE_FACTORS)).numpy().reshape(-1)
        config["rope_scaling"] = _to_rope_scaling(source, factors, config)
    config["tied"] = name == "gpt2" or "output.weight" not in stored
    config["bias"] = architecture.has_biases and any(tensor.endswith(".bias") for tensor in stored)

    theirs = {gguf_name: hf_name for hf_name, gguf_name in _names(architecture, config).items()}
    if config["tied"]:
        theirs["output.weight"] = "lm_head.weight"  # some files repeat the token embedding
    unread: dict[str, Unread] = {}
    for gguf_name, tensor in stored.items():
        read = partial(_dequantize, source, tensor)
        if name == "llama" and gguf_name.endswith((".attn_q.weight", ".attn_k.weight")):
            is_query = gguf_name.endswith(".attn_q.weight")
            read = partial(_restore_rows, read, config["n_head" if is_query else "n_kv_head"])
        unread[theirs.get(gguf_name, gguf_name)] = Unread(tuple(tensor.shape[::-1].tolist()), read)

    weights = Weights(source, config, translate(source, unread, config, transposed=False))
    weights.tokenizer = tokenizer
    ends = [header.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    weights.end_ids = sorted({end for end in ends if end is not None})
    bos_token = tokenizer.named_tokens.get("bos_token") if tokenizer else None
    if header.get("tokenizer.ggml.add_bos_token") and bos_token:
        weights.notes.append(f"{source}: its texts begin with {bos_token}; begin a prompt with it, too")
    return weights


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a GGUF file. Raises InputError if it has none, or one of an unknown kind."""
    return _read_tokenizer(Header(path))


def _read_config(header: Header, architecture: Architecture) -> dict[str, Any]:
    """Translate the header's settings to arguments of GPTConfig, without those that the tensors decide.

    Raises InputError for impossible sizes, and for a setting that is unknown or that model.py does not compute.
    """
    source, prefix = header.source, architecture.model_type + "."
    sizes = GPT2_SIZES if architecture.model_type == "gpt2" else MODERN_SIZES
    config = {ours: header.get(prefix + theirs) for ours, theirs in sizes.items()}
    tokens = header.get("tokenizer.ggml.tokens") or []
    config["vocab_size"] = len(tokens) or header.get(prefix + "vocab_size")
    if architecture.model_type != "gpt2":
        n_head, n_embd = config["n_head"], config["n_embd"]
        config["n_kv_head"] = config["n_kv_head"] or n_head
        config["rope_theta"] = config["rope_theta"] or 1e4
        if config["head_dim"] is None and matches([n_embd, n_head], list[Count]):
            config["head_dim"] = n_embd // max(n_head, 1)
    validate_sizes(source, config)

    supported: dict[str, tuple] = {
        "vocab_size": (config["vocab_size"],),
        "attention.value_length": (config.get("head_dim"),),
        "rope.dimension_count": (config.get("head_dim"),),
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (0.0, 1.0),
        "rope.scaling.attn_factor": (1.0,),
        "expert_count": (0,),
        "expert_used_count": (0,),
    }
    for key in header.keys(prefix):
        value = header.get(prefix + key)
        if key not in sizes.values() and key not in IGNORED and value not in supported.get(key, ()):
            raise InputError(f"{source}: {prefix}{key}={value!r} is not supported; use another model")
    return config | architecture.fields


def _names(architecture: Architecture, model_config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's name of each tensor, without the prefix -> its name in GGUF."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.model_type.upper()], model_config["n_layer"])
    translated = {}
    for name in tensor_layout(model_config):
        prefix = "" if name.startswith("lm_head.") else architecture.prefix
        translated[name] = names.get_name(prefix + name, (".weight", ".bias"))
    return translated


def _dequantize(source: str, tensor: Any) -> Tensor:
    """A tensor of the file in float32."""
    import gguf

    try:
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
    except NotImplementedError as error:
        raise InputError(
            f"{source}: quantization {tensor.tensor_type.name} is not supported; use a file in F16 or Q8_0"
        ) from error


def _restore_rows(read: Callable[[], Tensor], heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of Llama's q and k, in which the two channels that rotate are neighbors."""
    tensor = read()
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _to_rope_scaling(source: str, factors: np.ndarray, model_config: dict[str, Any]) -> list[float]:
    """Llama 3's four numbers from the divisors of the frequencies; empty if all are 1.

    Only the ratios of the last three have an effect, so low_freq_factor is 1 here. Raises InputError for divisors that
    no such numbers give.
    """
    theta, head_dim = model_config["rope_theta"], model_config["head_dim"]
    if (factors == 1).all():
        return []
    divisors = factors.astype(np.float64)
    factor = float(str(factors.max()))
    candidates = [[factor, *PUBLISHED_SCALING]]
    between = (divisors > 1) & (divisors < factor)
    if len(factors) == head_dim // 2 and np.count_nonzero(between) >= 2:
        # Between the two limits the multiplier is a straight line of the frequency.
        frequencies = theta ** -(np.arange(0, head_dim, 2)[between] / head_dim)
        share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(frequencies, share, 1)
        high = 1 - 1 / start
        context = slope * 2 * math.pi * (high - 1)
        candidates += [[factor, 1.0, round(high, 3), float(round(context))], [factor, 1.0, high, context]]
    for candidate in candidates:
        if np.allclose(rope_divisors(candidate, theta, head_dim), divisors, rtol=1e-5, atol=0):
            return candidate
    raise InputError(f"{source}: {ROPE_FACTORS} is not Llama 3's scaling of the rotary frequencies; use another model")


def rope_divisors(rope_scaling: list[float], theta: float, head_dim: int) -> np.ndarray:
    """The divisors of the rotary frequencies (head_dim / 2,) for Llama 3's four numbers."""
    factor, low, high, context = rope_scaling
    turns = context / (2 * math.pi) * theta ** -(np.arange(0, head_dim, 2) / head_dim)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


def _read_tokenizer(header: Header) -> Tokenizer:
    """The file's tokenizer with its special tokens and chat template. Raises InputError for an unknown kind."""
    source = header.source
    kind, split = header.get("tokenizer.ggml.model"), header.get("tokenizer.ggml.pre") or "default"
    if kind != "gpt2":
        raise InputError(f"{source}: its tokenizer is of kind {kind!r}, which is not supported; use another model")
    if split not in SPLITS:
        raise InputError(f"{source}: pre-tokenizer {split!r} is not supported, only {', '.join(SPLITS)}")

    tokens, merges = header.get("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.merges")
    types = header.get("tokenizer.ggml.token_type") or [1] * len(tokens or [])
    ids = {name: header.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMED_TOKENS.items()}
    try:
        if not matches([tokens, merges], list[list[str]]) or len(types) != len(tokens) != len(set(tokens)):
            raise ValueError("its tokens, types and merges do not fit each other")
        tokenizer = Tokenizer(_byte_level(tokens, types, merges, split))
        tokenizer.name_tokens({name: tokens[token_id] for name, token_id in ids.items() if token_id is not None})
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{source}: its tokenizer is damaged ({first_line(error)}); {HINT}") from error
    template = header.get("tokenizer.chat_template")
    tokenizer.template = template if isinstance(template, str) else None
    return tokenizer


def _byte_level(tokens: list[str], types: list[int], merges: list[str], split: str) -> "tokenizers.Tokenizer":
    """A byte-level tokenizer by the words of GGUF. Raises whatever the library does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    inner = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split in IGNORE_MERGES))
    if split in NFC:
        inner.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[split]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    inner.decoder = decoders.ByteLevel()
    by_type = {kind: [token for token, its in zip(tokens, types, strict=True) if its == kind] for kind in set(types)}
    inner.add_special_tokens(by_type.get(CONTROL, []))
    inner.add_tokens([AddedToken(token, normalized=False) for token in by_type.get(USER_DEFINED, [])])
    return inner
