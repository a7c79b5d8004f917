"""Optimizations of the step on a CPU, each alternating with the step without it, in float32: medians of ratios.

    python runs/cpu_step/levers.py

1. Plain attention (three operations) instead of torch's fused kernel, in whole models. Prediction: faster at 64
   positions, where the set-up of the fused kernel dominates; slower at 256, where it writes and reads the T × T matrix.
2. Freed memory stays with the process (disable_malloc_trim in nanogpt/device.py), in fresh processes. Prediction: a
   gain of the page faults' own time, about 4% (2.5 to 5 ms of 60).
3. GELU as x σ(2u) with its own backward pass (below). Prediction: half of the 8 ms of torch's GELU in a step of 51 ms,
   so 1.08.
4. RMSNorm with its own backward pass (RMSNormFunction in nanogpt/cpu_kernels.py), in the modern network. Prediction:
   half of torch's 1.2 ms in each of 13 norms of a 75 ms step, so 1.10.
5. No compiler imported at the start (nanogpt/optim.py is not a torch.optim.Optimizer), in fresh processes that make one
   update. Prediction: 1.5 s less.
6. Muon's matrices of one shape orthogonalized together instead of one by one. Prediction: the products take the same
   time, the calls around them a third, so 1.5 for the optimizer step.
7. Clipping inside the update's kernel instead of in a pass of its own. Prediction: 1.3 ms less of 57, so 1.02.

Outcome (levers.json): 1 made no difference in float32; it stays for bfloat16, where the fused kernel was 3 to 8 times
slower on a CPU that has bfloat16. 2 was 1.05 once and nothing the next time. 3 and 4 gained 1.02 to 1.04, less than
half of the prediction: on two threads the rest is waiting, not arithmetic. 3 was slower in whole steps of 124M
parameters and was removed. 5 gained more than predicted, 1.8 to 2.4 s. 6 gained 2.7 instead of 1.5. 7 is as predicted,
1.17 of the update and so a hundredth of the step.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model import GPT, MLP, GPTConfig  # noqa: E402
from nanogpt import cpu_kernels  # noqa: E402
from nanogpt.device import disable_malloc_trim  # noqa: E402
from nanogpt.distributed import World  # noqa: E402
from nanogpt.optim import Optimizer, clip_divisor, gradient_norm  # noqa: E402

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65, "bias": False}
MODERN = {"arch": "modern", "n_layer": 4, "n_head": 3, "n_kv_head": 1, "n_embd": 96, "n_inner": 192}
MODERN |= {"vocab_size": 65, "bias": False}
WORLD = World(0, 1, torch.device("cpu"), torch.float32)
ZERO = torch.zeros(())
WIDE_MODERN = {"n_layer": 2, "n_head": 6, "n_kv_head": 6, "n_embd": 768, "n_inner": 2048}
WIDE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 500, "bias": False}


def new_model(T: int, sizes: dict[str, Any]) -> GPT:
    model = GPT(GPTConfig(block_size=T, **sizes))
    cpu_kernels.use_cpu_kernels(model)  # as train.py does
    return model


def time_step(model: GPT, idx: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""
    start = time.perf_counter()
    model(idx, idx)[1].backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def attention() -> list[dict]:
    disable_malloc_trim()
    rows = []
    for sizes, B, T, count in (
        (SMALL, 12, 64, 80),
        (SMALL, 6, 128, 60),
        (SMALL, 6, 256, 40),
        (WIDE, 4, 64, 30),
        (WIDE, 4, 256, 15),
    ):
        model = new_model(T, sizes)
        idx = torch.randint(sizes["vocab_size"], (B, T))
        ratios = []
        for _ in range(count):
            times = []
            for limit in (0, T):  # fused, plain
                cpu_kernels.MAX_PLAIN_ATTENTION = limit
                times.append(time_step(model, idx))
            ratios.append(times[0] / times[1])
        rows.append(
            {"n_embd": sizes["n_embd"], "rows": B, "T": T, "fused_over_plain": round(statistics.median(ratios[5:]), 3)}
        )
        print(rows[-1], flush=True)
    return rows


def memory(rounds: int = 7) -> dict:
    def run(setting: str) -> float:
        done = subprocess.run([sys.executable, __file__, setting], capture_output=True, text=True, check=True)
        return float(done.stdout)

    pairs = [(run("return"), run("keep")) for _ in range(rounds)]
    row = {"returned_ms": [round(1e3 * a, 1) for a, _ in pairs], "kept_ms": [round(1e3 * b, 1) for _, b in pairs]}
    row["returned_over_kept"] = round(statistics.median(a / b for a, b in pairs), 3)
    print(row)
    return row


class CPUGelu(torch.autograd.Function):
    """The tanh form of GELU as x σ(2u)."""

    LINEAR = 2 * math.sqrt(2 / math.pi)  # 2u = LINEAR x + CUBIC x³
    CUBIC = LINEAR * 0.044715

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        gate = x.square().mul_(CPUGelu.CUBIC).add_(CPUGelu.LINEAR).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, gate = ctx.saved_tensors
        slope = x.square().mul_(3 * CPUGelu.CUBIC).add_(CPUGelu.LINEAR).mul_(x)  # x d(2u)/dx
        return torch.ops.aten.sigmoid_backward(slope, gate).add_(gate).mul_(grad)


class TorchNormFunction:
    apply = staticmethod(lambda x, gain, eps: F.rms_norm(x, x.shape[-1:], eps=eps) * gain)


def compare_functions(
    lever: str, owner: Any, name: str, functions: tuple, sizes: dict[str, Any], B: int, T: int, count: int
) -> dict:
    """Time a whole model's forward and backward with torch's function and with ours as `owner.name`."""
    ratios = []
    model = new_model(T, sizes)
    idx = torch.randint(sizes["vocab_size"], (B, T))
    original = getattr(owner, name)
    for _ in range(count):
        times = []
        for function in functions:
            setattr(owner, name, function)
            times.append(time_step(model, idx))
        ratios.append(times[0] / times[1])
    setattr(owner, name, original)
    row = {"lever": lever, "n_embd": sizes["n_embd"], "rows": B, "T": T}
    return print_row(row | {"torchs_over_ours": round(statistics.median(ratios[count // 10 :]), 3)})


def start(rounds: int = 7) -> dict:
    """Compare processes that import torch and make one update of AdamW."""
    before = "import torch; p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4)"
    theirs = f"{before}; torch.optim.AdamW([p], fused=True).step()"
    ours = (
        f"{before}; z = [[torch.zeros(4)], [torch.zeros(4)]]; torch._fused_adamw_([p.detach()], [p.grad], *z, [], "
        "[torch.ones(())], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)"
    )

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    pairs = [(run(theirs), run(ours)) for _ in range(rounds)]
    return print_row({"lever": "start", "saved_s": round(statistics.median(a - b for a, b in pairs), 2)})


def updates() -> list[dict]:
    """Milliseconds of an update; ratios of Muon one by one to together, and of a clipping pass to the kernel's."""
    rows = []
    for sizes, kind in ((SMALL, "adamw"), (MODERN, "muon")):
        model = GPT(GPTConfig(block_size=64, **sizes))
        optimizer = Optimizer(model, WORLD, kind=kind, learning_rate=6e-4)
        grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        times: dict[str, list[float]] = {"together": [], "one by one": [], "clipped apart": []}
        for _ in range(60):
            for variant, seconds in times.items():
                for name, p in model.named_parameters():
                    p.grad = grads[name].clone()
                start = time.perf_counter()
                divisor = clip_divisor(1.0, gradient_norm(model.parameters()))
                if variant == "clipped apart":
                    torch._foreach_div_([p.grad for p in model.parameters()], divisor)
                    divisor = torch.ones(())
                if variant == "one by one":
                    with torch.no_grad():
                        for name in optimizer.row_splits:
                            optimizer._muon({name: model.get_parameter(name).grad}, 1e-4, divisor, ZERO)
                            model.get_parameter(name).grad = None
                optimizer.step(1e-2, divisor, ZERO)
                seconds.append(time.perf_counter() - start)
        row = {"lever": f"update, {kind}", "ms": round(1e3 * statistics.median(times["together"]), 2)}
        for variant in list(times)[1:]:
            ratios = [a / b for a, b in zip(times[variant], times["together"], strict=True)]
            row[f"{variant}, over"] = round(statistics.median(ratios[5:]), 3)
        rows.append(print_row(row))
    return rows


def print_row(row: dict) -> dict:
    print(row, flush=True)
    return row


def main() -> None:
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
    report |= {"attention": attention(), "freed_memory": memory()}
    cpu_kernels.MAX_PLAIN_ATTENTION = 128
    gelus = (MLP.forward, lambda self, x: self.down(CPUGelu.apply(self.up(x))))
    norms = (TorchNormFunction, cpu_kernels.RMSNormFunction)
    report["by_hand"] = [
        compare_functions("gelu", MLP, "forward", gelus, SMALL, 12, 64, 80),
        compare_functions("gelu", MLP, "forward", gelus, WIDE, 4, 256, 15),
        compare_functions("norm", cpu_kernels, "RMSNormFunction", norms, MODERN, 24, 64, 80),
        compare_functions("norm", cpu_kernels, "RMSNormFunction", norms, MODERN | WIDE_MODERN, 4, 256, 15),
    ]
    report |= {"start": start(), "updates": updates()}
    (Path(__file__).parent / "levers.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] in (["keep"], ["return"]):  # one process of the second lever: its median step
        if sys.argv[1] == "keep":
            disable_malloc_trim()
        model = new_model(64, SMALL)
        idx = torch.randint(65, (12, 64))
        print(statistics.median([time_step(model, idx) for _ in range(120)][20:]))
    else:
        main()
