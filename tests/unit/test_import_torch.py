"""nanogpt.import_torch: a faster import of torch, after which torch is complete."""

import subprocess
import sys

DEFERS = """
torch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()
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
    assert output == run("import sys, torch" + STATE)
