"""The CPU kernels compute model.py's own functions, forward and backward."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig, RMSNorm
from nanogpt import cpu_kernels
from nanogpt.cpu_kernels import (
    MAX_PLAIN_ATTENTION,
    MAX_PLAIN_BACKWARD,
    causal_attention,
    mlp_forward,
    plain_attention,
    rms_norm_forward,
    use_cpu_kernels,
)

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 70, "block_size": 160}
MODERN = SIZES | {"arch": "modern", "bias": False}


@pytest.mark.parametrize("T", [33, MAX_PLAIN_ATTENTION, MAX_PLAIN_ATTENTION + 1])
@pytest.mark.parametrize(
    "sizes",
    [
        SIZES | {"bias": True},
        SIZES | {"bias": False, "gelu": "erf"},
        MODERN,
        MODERN | {"n_kv_head": 2, "head_dim": 6},
        MODERN | {"n_kv_head": 1, "norm_eps": 0.1},
    ],
)
def test_model_with_cpu_kernels_equals_the_plain_model(sizes: dict[str, Any], T: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_kernels, "MIN_WIDE_LAYER", 0)
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for p in plain.parameters():  # away from gains of one, and large enough for each part to matter
            p.add_(torch.randn_like(p), alpha=0.2)
    fast = GPT.from_tensors(plain.config, {name: p.detach().clone() for name, p in plain.named_parameters()})
    fast.requires_grad_()
    use_cpu_kernels(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    idx = torch.randint(70, (3, T))
    results = []
    for model in (plain, fast):
        logits, loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        with torch.no_grad():
            evaluated = model(idx, idx.roll(-1, 1))[0]
        results.append([logits, loss, evaluated, *(p.grad for p in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("arch", "n_embd", "arrays"), [("gpt2", 768, (2, 1)), ("modern", 768, (4, 2)), ("modern", 128, (4, 4))]
)
def test_backward_keeps_half_of_a_wide_mlp(arch: str, n_embd: int, arrays: tuple[int, int]):
    """arrays: as wide as the MLP, in the plain model and with the kernels. A narrow one stays as it is."""
    model = GPT(GPTConfig(**SIZES | {"arch": arch, "bias": arch == "gpt2", "n_embd": n_embd, "n_inner": 1030}))
    idx = torch.randint(70, (2, 16))
    for expected, change in zip(arrays, (lambda _: None, use_cpu_kernels), strict=True):
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        change(model)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(idx, idx)
        wide = [tensor for tensor in saved.values() if tensor.numel() == 2 * 16 * 1030]
        assert len(wide) == expected * model.config.n_layer


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_mlp_under_autocast_has_torchs_gradients(arch: str):
    torch.manual_seed(0)
    mlp = GPT(GPTConfig(**SIZES | {"arch": arch, "bias": arch == "gpt2"})).blocks[0].mlp
    x = torch.randn(2, 5, 32, requires_grad=True)
    results = []
    for forward in (mlp.forward, partial(mlp_forward, mlp)):
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *mlp.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.parametrize(("of", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rms_norm_under_autocast(of: torch.dtype, dtype: torch.dtype):
    """Of the residual stream it returns and keeps bfloat16, as the next layer does; of queries and keys float32."""
    torch.manual_seed(0)
    norm = RMSNorm(32, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(5, 32, dtype=of, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = rms_norm_forward(norm, x), norm(x)
        with torch.no_grad():
            assert torch.equal(rms_norm_forward(norm, x), y)
    assert y.dtype == y.grad_fn.saved_tensors[0].dtype == dtype  # type: ignore[union-attr]
    assert (y - expected).abs().max() <= 0.01 * expected.abs().max()
    for inputs in (x, norm.weight):
        actual, grad = (
            torch.autograd.grad(out.float().square().sum(), inputs, retain_graph=True)[0] for out in (y, expected)
        )
        assert actual.dtype == grad.dtype
        assert (actual - grad).norm() <= 0.01 * grad.norm()


@pytest.mark.parametrize(("T", "backward"), [(MAX_PLAIN_BACKWARD, "FusedForward"), (MAX_PLAIN_BACKWARD + 1, "Scaled")])
def test_attention_in_bfloat16_has_the_gradients_of_float32(T: int, backward: str):
    torch.manual_seed(0)
    attention = GPT(GPTConfig(**MODERN | {"n_kv_head": 2})).blocks[0].attention
    inputs = [torch.randn(2, heads, T, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(2, 4, T, 8)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    y = causal_attention(attention, *inputs)
    assert y.grad_fn is not None
    assert backward in y.grad_fn.name()
    expected = torch.autograd.grad((attention.causal_attention(*exact) * weights).sum(), exact)
    for actual, grad in zip(torch.autograd.grad((y * weights).sum(), inputs), expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - grad).norm() <= 0.01 * grad.norm()


def test_attention_with_dropout_is_torchs_own_in_long_rows():
    attention = GPT(GPTConfig(**MODERN | {"dropout": 0.1})).blocks[0].attention
    q, k, v = torch.randn(3, 1, 4, MAX_PLAIN_BACKWARD, 8, dtype=torch.bfloat16, requires_grad=True).unbind()
    grad_fn = causal_attention(attention, q, k, v).grad_fn
    assert grad_fn is not None
    assert "FusedForward" not in grad_fn.name()


def test_model_in_bfloat16_has_the_gradients_of_float32():
    """Under autocast QK norm leaves queries and keys in float32. The vocabulary has two slices of gradients."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODERN | {"n_kv_head": 2, "vocab_size": 5000}))
    idx = torch.randint(5000, (2, MAX_PLAIN_ATTENTION + 9))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            loss = model(idx, idx.roll(-1, 1))[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        use_cpu_kernels(model)
        model.loss_chunk = 100
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).norm() <= 0.02 * expected.norm()


def test_evaluation_with_a_chunked_loss_computes_no_gradients(monkeypatch: pytest.MonkeyPatch):
    model = GPT(GPTConfig(**MODERN))
    model.loss_chunk = 5
    monkeypatch.setattr("model.add_product", None)
    idx = torch.randint(70, (2, 16))
    with torch.no_grad():
        model(idx, idx)
    with pytest.raises(TypeError):
        model(idx, idx)


@pytest.mark.parametrize("is_training", [True, False])
def test_one_copy_of_queries_keys_and_values_changes_no_bit(is_training: bool):
    model = GPT(GPTConfig(**SIZES | {"dropout": 0.3})).train(is_training)
    use_cpu_kernels(model)
    attention = model.blocks[0].attention
    x = torch.randn(3, 20, 32, requires_grad=True)
    results = []
    for attention_fn in (None, partial(plain_attention, dropout=0.3 if is_training else 0.0)):
        torch.manual_seed(1)
        y = attention(x, None, attention_fn)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])))
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_attention_dropout_drops_probabilities_and_keeps_their_mean():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 8, 4).expand(-1, 4000, -1, -1, -1)  # one row of one head, 4,000 times
    attention = SimpleNamespace(dropout=0.3, training=True)
    dropped = causal_attention(attention, q, k, v)
    attention.training = False
    exact = causal_attention(attention, q, k, v)
    assert (dropped.mean(0) - exact[0]).abs().max() < 0.1
    # The first position sees itself alone: its value is dropped, or divided by 1 - 0.3.
    first = dropped[:, 0, 0]
    assert (first == 0).all(-1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert first.abs().max().item() == pytest.approx(exact[0, 0, 0].abs().max().item() / 0.7)
