"""Levers of the step on a CPU, each against the step without it, in turn, in float32: medians of ratios.

    python runs/cpu_step/levers.py

1. Plain attention (three operations) instead of torch's fused kernel, inside whole models. Prediction: it wins at 64
   positions, where the fused kernel's set-up dominates, and loses at 256, where it writes and reads the square.
2. Freed memory kept by the C library (nanogpt/distributed.py, disable_malloc_trim), in fresh processes. Prediction: a
   gain of the page faults' own time, about 4% (2.5 to 5 ms of 60).
3. GELU as x σ(2u) with a backward pass of its own (below). Prediction: half of the 8 ms that torch's takes
   of a 51 ms step, so 1.08.
4. RMS norm with a backward pass of its own (CPUNorm), in the modern network. Prediction: half of torch's 1.2 ms in
   each of 13 norms of a 75 ms step, so 1.10.
5. No compiler imported at the start (nanogpt/optim.py is no torch.optim.Optimizer), in fresh processes that make one
   update. Prediction: 1.5 s less.
6. Muon's matrices of one shape orthogonalized together instead of one by one. Prediction: the products stay as they
   are, the calls around them become a third, so 1.5 for the optimizer's step.
7. Clipping inside the update's kernel instead of a pass of its own. Prediction: 1.3 ms less of 57, so 1.02.

Outcome (levers.json): 1 made no difference in float32 and stays for bfloat16, where the fused kernel was found 3 to 8
times slower on a CPU that has it. 2 was 1.05 once and nothing the next time. 3 and 4 gained 1.02 to 1.04, less than
half of the prediction: on two threads what is left is waiting, not arithmetic. 3 was slower in whole steps of 124M
parameters and was taken out. 5 gained more than predicted, 1.8 to
2.4 s. 6 gained 2.7 where 1.5 was predicted. 7 is as predicted, 1.17 of the update and so a hundredth of the step.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import model as model_file  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanogpt.device import disable_malloc_trim  # noqa: E402
from nanogpt.distributed import World  # noqa: E402
from nanogpt.optim import Optimizer, clip_divisor, gradient_norm  # noqa: E402
from train import TrainConfig  # noqa: E402

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65, "bias": False}
MODERN = {"arch": "modern", "n_layer": 4, "n_head": 3, "n_kv_head": 1, "n_embd": 96, "n_inner": 192}
MODERN |= {"vocab_size": 65, "bias": False}
ALONE, ZERO = World(0, 1, torch.device("cpu"), torch.float32), torch.zeros(())
WIDE_MODERN = {"n_layer": 2, "n_head": 6, "n_kv_head": 6, "n_embd": 768, "n_inner": 2048}
WIDE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 500, "bias": False}


def step(model: GPT, idx: torch.Tensor) -> float:
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
        model, idx = GPT(GPTConfig(block_size=T, **sizes)), torch.randint(sizes["vocab_size"], (B, T))
        ratios = []
        for _ in range(count):
            times = []
            for limit in (0, T):  # fused, plain
                model_file.PLAIN_ATTENTION_UP_TO = limit
                times.append(step(model, idx))
            ratios.append(times[0] / times[1])
        rows.append(
            {"n_embd": sizes["n_embd"], "rows": B, "T": T, "fused_over_plain": round(statistics.median(ratios[5:]), 3)}
        )
        print(rows[-1], flush=True)
    return rows


def memory(rounds: int = 7) -> dict:
    def one(keep: str) -> float:
        run = subprocess.run([sys.executable, __file__, keep], capture_output=True, text=True, check=True)
        return float(run.stdout)

    pairs = [(one("return"), one("keep")) for _ in range(rounds)]
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


class TorchNorm:
    apply = staticmethod(lambda x, gain, eps: F.rms_norm(x, x.shape[-1:], eps=eps) * gain)


def by_hand(lever: str, place: object, name: str, ways: tuple, sizes: dict, B: int, T: int, count: int) -> dict:
    """A whole model's forward and backward with torch's own operation and with ours at `place`.`name`."""
    ratios = []
    model, idx = GPT(GPTConfig(block_size=T, **sizes)), torch.randint(sizes["vocab_size"], (B, T))
    before = getattr(place, name)
    for _ in range(count):
        times = []
        for way in ways:
            setattr(place, name, way)
            times.append(step(model, idx))
        ratios.append(times[0] / times[1])
    setattr(place, name, before)
    row = {"lever": lever, "n_embd": sizes["n_embd"], "rows": B, "T": T}
    return told(row | {"torchs_over_ours": round(statistics.median(ratios[count // 10 :]), 3)})


def start(rounds: int = 7) -> dict:
    """Seconds of a process that imports torch, makes one update of AdamW's, and ends."""
    before = "import torch; p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4)"
    theirs = f"{before}; torch.optim.AdamW([p], fused=True).step()"
    ours = (
        f"{before}; z = [[torch.zeros(4)], [torch.zeros(4)]]; torch._fused_adamw_([p.detach()], [p.grad], *z, [], "
        "[torch.ones(())], lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False)"
    )

    def one(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    pairs = [(one(theirs), one(ours)) for _ in range(rounds)]
    return told({"lever": "start", "saved_s": round(statistics.median(a - b for a, b in pairs), 2)})


def updates() -> list[dict]:
    """Milliseconds of an update, and ratios: Muon one by one over together; clipping as a pass over in the kernel."""
    rows = []
    for sizes, kind in ((SMALL, "adamw"), (MODERN, "muon")):
        model = GPT(GPTConfig(block_size=64, **sizes))
        optimizer = Optimizer(model, TrainConfig(optimizer=kind), ALONE)
        grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        times: dict[str, list[float]] = {"together": [], "one by one": [], "clipped apart": []}
        for _ in range(60):
            for way, taken in times.items():
                for name, p in model.named_parameters():
                    p.grad = grads[name].clone()
                begin = time.perf_counter()
                shrink = clip_divisor(1.0, gradient_norm(model.parameters()))
                if way == "clipped apart":
                    torch._foreach_div_([p.grad for p in model.parameters()], shrink)
                    shrink = torch.ones(())
                if way == "one by one" and optimizer.maps:
                    with torch.no_grad():
                        for name in optimizer.maps:
                            optimizer._muon({name: model.get_parameter(name).grad}, 1e-4, shrink, ZERO)
                            model.get_parameter(name).grad = None
                optimizer.step(1e-2, shrink, ZERO)
                taken.append(time.perf_counter() - begin)
        row = {"lever": f"update, {kind}", "ms": round(1e3 * statistics.median(times["together"]), 2)}
        for way in list(times)[1:]:
            ratios = [a / b for a, b in zip(times[way], times["together"], strict=True)]
            row[f"{way}, over"] = round(statistics.median(ratios[5:]), 3)
        rows.append(told(row))
    return rows


def told(row: dict) -> dict:
    print(row, flush=True)
    return row


def main() -> None:
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
    facts |= {"attention": attention(), "freed_memory": memory()}
    mlp, norm = model_file.MLP, model_file.CPUNorm
    gelus = mlp.forward, lambda self, x: self.down(CPUGelu.apply(self.up(x)))
    facts["by_hand"] = [
        by_hand("gelu", mlp, "forward", gelus, SMALL, 12, 64, 80),
        by_hand("gelu", mlp, "forward", gelus, WIDE, 4, 256, 15),
        by_hand("norm", model_file, "CPUNorm", (TorchNorm, norm), MODERN, 24, 64, 80),
        by_hand("norm", model_file, "CPUNorm", (TorchNorm, norm), MODERN | WIDE_MODERN, 4, 256, 15),
    ]
    facts |= {"start": start(), "updates": updates()}
    (Path(__file__).parent / "levers.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] in (["keep"], ["return"]):  # one side of the second lever: the median step of a fresh process
        if sys.argv[1] == "keep":
            disable_malloc_trim()
        model, idx = GPT(GPTConfig(block_size=64, **SMALL)), torch.randint(65, (12, 64))
        print(statistics.median([step(model, idx) for _ in range(120)][20:]))
    else:
        main()
