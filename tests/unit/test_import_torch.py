"""nanogpt.import_torch: a faster import of torch, after which torch is complete."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

DEFERS = """
torch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()
with torch.device("meta"):
    torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
assert torch.Generator().manual_seed(3).initial_seed() == 3
assert not {"torch._meta_registrations", "torch._decomp"} & {*sys.modules}
"""
STATE = """
import torch._decomp as decomp
print(sorted(torch._C._dispatch_get_registrations_for_dispatch_key("Meta")))
print([(name, sorted(map(str, table))) for name, table in decomp.global_decomposition_table.items()])
names = sorted(name for name in sys.modules if name.startswith("torch"))
print(names, decomp.__spec__.loader.__class__, flush=True)
"""
FAKE_TENSORS = """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    convolved = torch.nn.functional.conv1d(torch.empty(1, 4, 4), torch.empty(4, 4, 3))
assert convolved.shape == (1, 4, 2)
"""
COMPILE = """
norm, x = torch.nn.LayerNorm(8), torch.randn(3, 8)
assert torch.allclose(torch.compile(norm, backend="aot_eager")(x), norm(x))
"""
CHECKPOINTING = """
from torch.utils.checkpoint import checkpoint
x = torch.zeros(3, requires_grad=True)
checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
assert x.grad.tolist() == [1, 1, 1]
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_torch_defers_modules_until_torch_imports_another() -> None:
    output = run(f"""
import os, sys, nanogpt.import_torch, torch
for code in {[DEFERS + STATE, FAKE_TENSORS, COMPILE, CHECKPOINTING]}:  # each in a copy of this fresh process
    if not (child := os.fork()):
        exec(code)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
""")
    assert output == run("import sys, torch, torch.utils._device" + STATE)


RUNS = """
import sys
import nanogpt.import_torch
import sample, train

small = ["--arch=modern", "--look_back=True", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8"]
run = ["train.py", f"--dataset={sys.argv[1]}", f"--out_dir={sys.argv[2]}", "--device=cpu", "--eval_iters=1"]
source = [f"--out_dir={sys.argv[2]}", "--device=cpu"]
for sys.argv in ([*run, *small, "--max_iters=2"], [*run, "--resume=True", "--max_iters=3"]):
    assert train.main() == 0
sys.argv = ["sample.py", *source, "--num_samples=1", "--max_new_tokens=9", "--start=a"]
sample.main()
late = {"torch._meta_registrations", "torch._decomp", "torch._dynamo", "sympy"} & {*sys.modules}
assert not late, late
"""


def test_a_run_on_a_cpu_starts_without_torchs_compiler(letters: Path, tmp_path: Path) -> None:
    """In a new home, so that this is the first start on the machine, with its trials."""
    command = [sys.executable, "-c", RUNS, letters, tmp_path / "out"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"HOME": str(tmp_path)}, check=True, timeout=120)


def test_an_interrupt_during_later_imports_prints_no_traceback():
    code = "import nanogpt.import_torch\nraise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")
