"""torch.compile on request: CUDA graphs where a step is one short micro-batch, and a fallback when it fails."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention

import model as model_file
from model import GPT, GPTConfig
from nanogpt.compile import compile_model, should_compile
from nanogpt.data.rows import EvalWindows
from nanogpt.distributed import World
from nanogpt.evaluation import evaluate

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
X = torch.zeros(2, 8, dtype=torch.long)


def make_model(**sizes: Any) -> GPT:
    return GPT(GPTConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 9, "block_size": 8} | sizes))


def loss_and_gradients(model: GPT, forward: Callable[..., Any], *inputs: Any) -> list[torch.Tensor]:
    loss = forward(*inputs)[1]
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_should_compile_is_auto_on_cuda():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert should_compile(True, cpu)
    assert should_compile("auto", cuda)
    assert not should_compile("auto", cpu)
    assert not should_compile(False, cuda)


@pytest.mark.parametrize(
    ("device", "is_whole_step", "n_embd", "expected"),
    [
        ("cuda", True, 16, True),
        ("cpu", True, 16, False),
        ("cuda", False, 16, False),  # the next micro-batch would overwrite the gradients
        ("cuda", True, 2**15, False),  # the host keeps ahead of long steps
    ],
)
def test_short_whole_steps_become_cuda_graphs(
    monkeypatch: pytest.MonkeyPatch, device: str, is_whole_step: bool, n_embd: int, expected: bool
):
    modes: list[str | None] = []

    def fail_out_of_memory(model: GPT, mode: str | None) -> None:
        modes.append(mode)
        raise MemoryError

    monkeypatch.setattr(torch, "compile", fail_out_of_memory)
    with torch.device("meta"):
        model = make_model(n_embd=n_embd, block_size=1024)
    x = torch.zeros(8, 1024, device="meta")
    world = World(0, 1, torch.device(device), torch.float32)
    with pytest.raises(MemoryError):
        compile_model(model, world, (x, x, None), is_whole_step=is_whole_step)
    assert modes == ["reduce-overhead" if expected else None]


@pytest.mark.parametrize("fails", ["compile", "forward", "evaluation"])
def test_a_failing_compiler_leaves_the_plain_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
):
    error = RuntimeError("no C++ compiler was found\nand more")

    def compile(model: torch.nn.Module, mode: str | None) -> Any:
        def forward(*inputs: Any) -> Any:
            if fails == "forward" or not model.training:
                raise error
            return model(*inputs)

        if fails == "compile":
            raise error
        return forward

    monkeypatch.setattr(torch, "compile", compile)
    model = make_model()
    assert compile_model(model, WORLD, (X, X, None), is_whole_step=True) is model
    assert "warning: torch.compile failed" in capsys.readouterr().out
    assert model.training
    assert all(p.grad is None for p in model.parameters())  # of the attempt


def test_run_compiles_nothing_after_its_first_step(monkeypatch: pytest.MonkeyPatch):
    graphs: list[int] = []  # inputs of each that are variable sizes

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(sum(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    original: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: original(model, backend=count, fullgraph=True))
    windows = EvalWindows(np.arange(9).repeat(9), 8, 0, 1, vocab_size=9)
    for rows, n_embd in ((2, 16), (3, 32)):  # two models in turn, as --minutes has them
        x = torch.zeros(rows, 8, dtype=torch.long)
        soft_targets = [torch.zeros(rows, 8, 4, dtype=torch.long), torch.rand(rows, 8, 4)]
        inputs = (x, x, soft_targets)
        compiled = compile_model(make_model(n_embd=n_embd), WORLD, inputs, is_whole_step=True)
        evaluate(compiled, windows, rows, WORLD)
        compiled(*inputs)[1].backward()
    assert graphs == [0, 0, 0, 0]  # of each model one for training, one for evaluation; no graph breaks


@pytest.mark.parametrize("options", [{"document_separator_id": 3}, {"activation_checkpointing": True, "loss_chunk": 8}])
def test_network_is_one_graph_equal_to_eager(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # no backward on a CPU, except unfused
    torch.manual_seed(0)
    model = make_model(arch="modern", bias=False)
    for name, value in options.items():
        setattr(model, name, value)
    ids = torch.randint(9, (4, 8))
    inputs = (ids, ids, [torch.randint(9, (4, 8, 3)), torch.rand(4, 8, 3)])
    expected = loss_and_gradients(model, model, *inputs)
    monkeypatch.setattr(model_file, "FLEX_ATTENTION_DEVICE", "cpu")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(loss_and_gradients(model, compiled, *inputs), expected)
