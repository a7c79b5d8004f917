"""Measure the distance of this program from its oracles; the tests hold each figure to a bound.

    python runs/oracles/run.py [--reference=NANOGPT_CHECKOUT]

1. transformers' GPT2LMHeadModel with random weights: the largest difference of the logits, of the loss, and of any
   gradient relative to the largest of its tensor.
2. A Markov source of order 2 and four letters: the trained model's loss on 40,000 validation tokens divided by the
   source's entropy. 1 is the best possible.
3. With a nanoGPT checkout: our prepare.py's files against its, byte for byte, and its logits for its own ckpt.pt.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from random_models import build_gpt2  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from nanogpt.interop.names import strip_wrappers, translate  # noqa: E402

SHAPES = {"gpt2": (768, 12), "gpt2-medium": (1024, 16), "gpt2-large": (1280, 20), "gpt2-xl": (1600, 25)}


def against_transformers(config: GPTConfig, T: int) -> dict[str, float]:
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    oracle = build_gpt2(scale=config.n_embd**-0.5, n_positions=config.block_size, **sizes)

    def in_our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return translate("transformers", strip_wrappers("transformers", tensors), vars(config), transposed=True)

    model = GPT.from_tensors(config, in_our_names(dict(oracle.state_dict())))
    idx = torch.randint(config.vocab_size, (2, T + 1))
    expected = oracle(idx[:, :-1], labels=None).logits
    their_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), idx[:, 1:].flatten())
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    names, parameters = zip(*oracle.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(their_loss, parameters), strict=True))
    theirs = in_our_names(gradients)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    relative = [((ours[n][: len(g)] - g).abs().max() / g.abs().max()).item() for n, g in theirs.items()]
    return {
        "logits": (logits - expected).abs().max().item(),
        "loss": abs(loss.item() - their_loss.item()),
        "gradients": max(relative),
    }


def against_nanogpt(checkout: Path) -> dict[str, float | bool]:
    spec = importlib.util.spec_from_file_location("reference_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    sizes = {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "vocab_size": 65,
        "block_size": 64,
        "bias": False,
        "dropout": 0.0,
    }
    theirs = module.GPT(module.GPTConfig(**sizes)).eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"model": theirs.state_dict(), "model_args": sizes}, Path(folder) / "ckpt.pt")
        ours = GPT.from_pretrained(folder).eval()
    idx = torch.randint(65, (4, 64))
    found: dict[str, float | bool] = {"logits": (ours(idx, idx)[0] - theirs(idx, idx)[0]).abs().max().item()}
    for name in ("shakespeare_char", "shakespeare"):
        pairs = [[root / "data" / name / f"{split}.bin" for root in (ROOT, checkout)] for split in ("train", "val")]
        found[f"{name}.bin equal"] = all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    return found


def against_the_source() -> float:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/oracles/test_markov.py"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"loss over the source's own: ([\d.]+)", output)[1])


def main() -> None:
    small = {"n_layer": 2, "vocab_size": 500, "block_size": 48}
    facts = {name: against_transformers(GPTConfig(n_embd=C, n_head=H, **small), 32) for name, (C, H) in SHAPES.items()}
    facts["gpt2 (124M) whole"] = against_transformers(GPTConfig(), 64)
    facts["loss over a known source's own"] = against_the_source()
    for flag in sys.argv[1:]:
        facts["nanoGPT"] = against_nanogpt(Path(flag.removeprefix("--reference=")))
    for name, fact in facts.items():
        print(f"{name:32}", fact)
    (HERE / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
