"""Low-precision weights for decoding, which waits for weights to come from memory."""

import contextlib
import copy
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.trials import load_or_measure, round_size, time_call

MAX_TRIAL_ROWS = 16
MAX_TRIAL_CONTEXT = 1024  # tokens in the cache
MAX_OTHER_WEIGHTS = 2**24  # that pass through the caches before a block is timed
TRIAL_ROUNDS = 9
MIN_PACKED_GAIN = 1.2  # over another format: packing 124M weights takes three seconds, some hundred tokens
MIN_BAG_OUTPUTS = 64  # outputs that one embedding bag computes, so that padding to 16 and indices cost little
MAX_BAG_OUTPUTS = 448  # 28 of the 32 registers of AVX-512 hold their sums
BAG_SCALE = 64.0  # divides inputs: SmolLM2-135M's last product of an MLP has 23,616, and float16 ends at 65,504


class PackedLinear(nn.Module):
    """A linear layer for x86 CPUs: float16 weights in FBGEMM's packed order, float32 arithmetic."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class BagLinear(nn.Module):
    """A linear layer for one token at a time on x86 CPUs: float16 weights, inputs and outputs, float32 sums.

    An embedding bag adds rows of a table, each times a factor: with the columns of a matrix as the rows and the
    elements of a vector as the factors, that is their product. FBGEMM's kernel for bags reads weights faster than its
    products of one row do. Inputs and outputs up to four million fit; those of a prompt are not rounded.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # A bag for each block of outputs; equally many for each thread.
        threads = min(torch.get_num_threads(), math.ceil(self.out_features / MIN_BAG_OUTPUTS))
        self.num_bags = math.ceil(self.out_features / MAX_BAG_OUTPUTS / threads) * threads
        width = math.ceil(self.out_features / self.num_bags / 16) * 16
        padding = self.num_bags * width - self.out_features
        blocks = F.pad(weight.detach().half(), (0, 0, 0, padding)).view(self.num_bags, width, self.in_features)
        self.table = blocks.mT.reshape(-1, width)
        self.indices = torch.arange(len(self.table), dtype=torch.int32)
        self.offsets = torch.arange(0, len(self.table) + 1, self.in_features, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.in_features:  # a prompt
            blocks = self.table.view(self.num_bags, self.in_features, -1).float()
            sums = (x.reshape(-1, self.in_features) @ blocks).transpose(0, 1)
        else:
            scaled = x.reshape(1, -1) / BAG_SCALE
            factors = self.table.new_empty(self.num_bags, self.in_features).copy_(scaled).view(-1)
            scaled_sums = torch.embedding_bag(
                self.table, self.indices, self.offsets, per_sample_weights=factors, include_last_offset=True
            )[0]
            sums = scaled_sums.float() * BAG_SCALE
        y = sums.reshape(*x.shape[:-1], -1)[..., : self.out_features]
        return y if self.bias is None else y + self.bias


def can_pack() -> bool:
    """Return True where this build of torch has FBGEMM, that is on x86."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def rounded_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """Make a linear layer with weights in `dtype`, the same function as autocast to it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


def cpu_layer(name: str, rows: int) -> Callable[[Tensor, Tensor | None], nn.Module]:
    """Return what makes a CPU's linear layer in a format to decode `rows` texts. bfloat16 runs in an autocast."""
    if name == "float16":
        return BagLinear if rows == 1 else PackedLinear
    return partial(rounded_linear, dtype=getattr(torch, name))


@torch.no_grad()
def replace_linears(model: Any, layer: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """Replace all linear layers of a GPT in place by `layer(weight, bias)`; embeddings and norms stay.

    Tied weights are untied: the output layer becomes a `layer` of its own.
    """
    head = layer(model.lm_head_weight, None)
    replace_linears_of_blocks(model.blocks, layer)
    model.head = head


@torch.no_grad()
def replace_linears_of_blocks(blocks: nn.Module, layer: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, layer(child.weight, child.bias))


def fastest_format(model: Any, rows: int, names: list[str]) -> tuple[str, float]:
    """Find the fastest of float32 and the formats `names` to decode `rows` texts. Returns its speed over float32's.

    The outcome is kept, so the same seed writes the same text each time.
    """
    c = model.config
    rows = round_size(min(rows, MAX_TRIAL_ROWS))
    num_weights = round_size(min(sum(p.numel() for p in model.parameters()), MAX_OTHER_WEIGHTS))
    shape = [rows, c.block_size, c.n_embd, c.n_inner, c.n_head, c.n_kv_head, c.head_dim, num_weights]
    speeds = {"float32": 1.0}
    for name in names:
        measure = partial(format_speed, name, model, rows, num_weights)
        speeds[name] = load_or_measure(f"decode-step-{c.arch}-{name}", shape, measure)
    best = max(speeds, key=lambda name: speeds[name] / (MIN_PACKED_GAIN if name == "float16" and rows > 1 else 1))
    return best, speeds[best]


def format_speed(name: str, model: Any, rows: int, num_other_weights: int) -> float:
    """The speed of a block in a format over that in float32, in one thread, in the middle of the context.

    Weights as many as the model's others are read before each block: a large model's weights come from memory, a
    small one's from the caches.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    others = torch.ones(num_other_weights)
    steps = {each: make_trial_step(each, model, rows) for each in ("float32", name)}
    seconds: dict[str, list[float]] = {each: [] for each in steps}
    for _ in range(TRIAL_ROUNDS):
        for each, step in steps.items():
            others.sum()
            seconds[each].append(time_call(step))
    torch.set_num_threads(num_threads)
    return statistics.median(seconds["float32"]) / statistics.median(seconds[name])


def make_trial_step(name: str, model: Any, rows: int) -> Callable[[], None]:
    """A decode step of `rows` texts through the first block, with its linear layers in a format."""
    c = model.config
    context = min((c.block_size + 1) // 2, MAX_TRIAL_CONTEXT)
    block = copy.deepcopy(model.blocks[0])
    replace_linears_of_blocks(block, cpu_layer(name, rows))
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    cached = torch.ones(rows, c.n_kv_head, context, c.head_dim, dtype=dtype)
    x = torch.ones(rows, 1, c.n_embd)
    cos_sin = (torch.ones(c.head_dim), torch.zeros(c.head_dim)) if c.arch == "modern" else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.to(dtype), cached, cached, enable_gqa=c.n_kv_head < c.n_head)

    @torch.inference_mode()
    def step() -> None:
        with autocast_for(name):
            block(x, cos_sin, attend)

    return step


def autocast_for(name: str) -> contextlib.AbstractContextManager[None]:
    """The context in which a model runs whose linear layers have this format."""
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16")


def to_inference_precision(
    model: Any, world: World, dtype: str, compiled: bool, rows: int
) -> contextlib.AbstractContextManager[None]:
    """Move a GPT to its device with linear layers in `dtype`, or in the one that decodes `rows` texts fastest there.

    Returns the context to run it in. On a CPU "float16" means float16 weights and float32 sums, for one text also
    rounded inputs and outputs, and "auto" what is fastest in a trial. Raises InputError if this machine cannot do that.
    """
    model.to(world.device).eval()
    if world.device.type == "cpu":
        has_packed = can_pack() and not compiled
        if dtype == "float16" and not has_packed:
            raise InputError("--dtype=float16: on a CPU needs x86 and --compile=False; use --dtype=float32")
        if dtype == "auto":
            names = ["float16", "bfloat16"] if has_packed else ["bfloat16"]
            dtype, speed = fastest_format(model, rows, names)
            gain = "" if dtype == "float32" else f": {speed:.1f} × float32 here"
            print(f"weights in {dtype}{gain}", file=sys.stderr)
        if dtype != "float32":
            replace_linears(model, cpu_layer(dtype, rows))
        return autocast_for(dtype)

    if world.dtype != torch.float32:
        replace_linears(model, partial(rounded_linear, dtype=world.dtype))
    return world.autocast()
