"""The network against transformers' GPT-2 and Qwen3, its counts against torch's, its start against the paper's."""

import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from model import GPT, CPUNorm, GPTConfig, plain_attention
from nanogpt.interop.names import strip_wrappers, translate

TOLERANCE = 1e-5  # float32 in another order of operations
TINY = GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=70, block_size=320)
MODERN: dict[str, Any] = vars(TINY) | {"arch": "modern", "bias": False, "norm_eps": 0.0, "n_inner": 0}


def build_oracle(config: GPTConfig) -> Any:
    """transformers' model of the same function, every parameter moved away from its special start (zeros, ones)."""
    deviation = config.n_embd**-0.5  # large enough for each part to matter
    if config.arch == "modern":
        theirs: Any = transformers.Qwen3Config(
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim,
            hidden_size=config.n_embd,
            intermediate_size=config.n_inner,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.block_size,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
            initializer_range=deviation,
            bos_token_id=0,
            eos_token_id=0,
        )
        kind: Any = transformers.Qwen3ForCausalLM
    else:
        theirs = transformers.GPT2Config(
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            activation_function={"tanh": "gelu_new", "erf": "gelu"}[config.gelu],
            initializer_range=deviation,
            bos_token_id=0,
            eos_token_id=0,
        )
        kind = transformers.GPT2LMHeadModel
    torch.manual_seed(1)
    oracle = kind._from_config(theirs, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return oracle


def in_our_names(tensors: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    return translate("oracle", strip_wrappers("oracle", tensors), vars(config), transposed=config.arch == "gpt2")


def assert_equals_oracle(config: GPTConfig, T: int) -> None:
    """Logits, loss and the gradient of every parameter; −1 leaves out the last target, as transformers does."""
    oracle = build_oracle(config)
    model = GPT.from_tensors(config, in_our_names(oracle.state_dict(), config))
    idx = torch.randint(config.vocab_size, (2, T))
    expected = oracle(input_ids=idx, labels=idx)
    logits, loss = model(idx, F.pad(idx[:, 1:], (0, 1), value=-1))
    assert logits.shape == (2, T, config.vocab_size)
    assert (logits - expected.logits).abs().max() <= TOLERANCE
    assert abs(loss - expected.loss) <= TOLERANCE
    last, no_loss = model(idx)
    assert no_loss is None
    assert (last - expected.logits[:, -1:]).abs().max() <= TOLERANCE

    names, parameters = zip(*model.named_parameters(), strict=True)
    their_names, their_parameters = zip(*oracle.named_parameters(), strict=True)
    theirs = torch.autograd.grad(expected.loss, their_parameters)
    gradients = in_our_names(dict(zip(their_names, theirs, strict=True)), config)
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        rows = len(gradients[name])
        assert (gradient[:rows] - gradients[name]).abs().max() <= TOLERANCE * gradients[name].abs().max(), name
        assert not gradient[rows:].any(), name


@pytest.mark.parametrize(
    ("n_embd", "n_head"), [(768, 12), (1024, 16), (1280, 20), (1600, 25)], ids=["gpt2", "medium", "large", "xl"]
)
def test_equals_transformers_at_each_width(n_embd: int, n_head: int) -> None:
    config = GPTConfig(n_layer=2, n_head=n_head, n_embd=n_embd, vocab_size=500, block_size=48)
    assert_equals_oracle(config, T=32)


@pytest.mark.parametrize(("gelu", "T"), [("tanh", 128), ("tanh", 129), ("erf", 64)])
def test_equals_transformers_with_either_gelu_and_attention(gelu: str, T: int) -> None:
    assert model_file.PLAIN_ATTENTION_UP_TO == 128
    assert_equals_oracle(GPTConfig(**vars(TINY) | {"gelu": gelu}), T)


@pytest.mark.parametrize(
    "sizes",
    [
        {"norm_eps": 1e-3},
        {"n_kv_head": 2, "head_dim": 16, "tied": False, "rope_theta": 1e6, "n_inner": 40},
        {"n_kv_head": 1, "head_dim": 6, "rope_theta": 100.0},
    ],
    ids=["a key head each", "two, untied", "one for all"],
)
@pytest.mark.parametrize("T", [64, 129])
def test_modern_equals_transformers_qwen3(sizes: dict, T: int) -> None:
    assert_equals_oracle(GPTConfig(**MODERN | {"n_kv_head": 0, "head_dim": 0} | sizes), T)


def test_modern_equals_transformers_at_the_shape_of_qwen3() -> None:
    sizes = {"n_layer": 1, "n_head": 16, "n_kv_head": 8, "head_dim": 128, "n_embd": 1024, "n_inner": 3072}
    assert_equals_oracle(GPTConfig(**MODERN | sizes | {"rope_theta": 1e6}), T=64)


@pytest.mark.parametrize("gain", [(8,), (3, 1, 1, 8)])
def test_norm_by_hand_has_the_right_gradients(gain: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 8, dtype=torch.double, requires_grad=True)
    scale = torch.randn(gain, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(CPUNorm.apply(x, scale, 1e-2), F.rms_norm(x, (8,), eps=1e-2) * scale)
    assert torch.autograd.gradcheck(lambda x, scale: CPUNorm.apply(x, scale, 1e-2), (x, scale))


@pytest.mark.parametrize("arch", [vars(TINY), MODERN])
def test_less_memory_for_the_same_gradients(arch: dict) -> None:
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**arch)), torch.randint(70, (2, 40))
    targets = torch.where(torch.rand(2, 40) < 0.1, -1, idx)
    logits, expected = model(idx, targets)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.activation_checkpointing, model.loss_chunk = True, 17  # which does not divide the 80 targets
    none, loss = model(idx, targets)
    assert logits is not None
    assert none is None
    torch.testing.assert_close(loss, expected)
    for ours, plain in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_plain_attention_equals_torchs(n_kv_head: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(4, 2, 33, 16, requires_grad=True)
    k, v = torch.randn(2, n_kv_head, 2, 33, 16, requires_grad=True)
    plain = plain_attention(q, k, v, 0.0)
    heads_second = (t.transpose(0, 1) for t in (q, k, v))
    fused = F.scaled_dot_product_attention(*heads_second, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    assert (plain - fused).abs().max() < 1e-6
    upstream = torch.randn_like(plain)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (plain, fused)), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("T", [64, 256])
@pytest.mark.parametrize("arch", [vars(TINY), MODERN])
def test_mixed_precision_stays_close(T: int, arch: dict) -> None:
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**arch)), torch.randint(70, (2, T))
    expected = model(idx, idx)[1].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(idx, idx)[1].item() == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
def test_equals_transformers_as_published() -> None:
    assert_equals_oracle(GPTConfig(), T=64)


@pytest.mark.parametrize(
    "more",
    [
        {"bias": True},
        {"bias": False, "n_inner": 100},
        {"arch": "modern", "bias": False},
        {"arch": "modern", "bias": False, "n_kv_head": 1, "head_dim": 32, "n_inner": 40, "tied": False},
    ],
)
def test_counts_parameters_and_flops(more: dict) -> None:
    config = GPTConfig(n_layer=3, n_head=2, n_embd=48, vocab_size=130, block_size=40, **more)
    model, idx = GPT(config), torch.randint(130, (2, 40))
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    assert padding == 62 * 48
    stored = padding if config.tied else 2 * padding
    assert model.count_parameters() == sum(p.numel() for p in model.parameters()) - stored
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == idx.numel() * (model.flops_per_token() + 6 * padding)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({"bias": False}, 124_337_664),
        ({}, 124_439_808),
        ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
        ({"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
    ],
)
def test_known_sizes(sizes: dict, parameters: int) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.n_embd
    assert model.count_parameters() == parameters == sum(p.numel() for p in model.parameters()) - padding
    if parameters == 124_337_664:
        assert 1024 * model.flops_per_token(1024) == 874_944_921_600


def test_padding_stays_zero_and_has_no_logits() -> None:
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    idx = torch.randint(TINY.vocab_size, (4, 16))
    for _ in range(5):
        optimizer.zero_grad()
        logits, loss = model(idx, idx)
        loss.backward()
        optimizer.step()
    assert logits.shape[-1] == TINY.vocab_size < len(model.tokens.weight)
    assert not model.tokens.weight[TINY.vocab_size :].any()


def test_initialization() -> None:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=5000, block_size=128)
    model = GPT(config)
    idx = torch.randint(5000, (4, 128))
    assert model(idx, torch.randint(5000, (4, 128)))[1].item() == pytest.approx(math.log(5000), abs=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            rows = parameter[: config.vocab_size]
            expected = 0.02 / 4 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert rows.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(rows.mean().item()) < 0.03 * expected, name


def test_crop_block_size() -> None:
    torch.manual_seed(0)
    model, idx = GPT(TINY), torch.randint(70, (2, 16))
    before = model(idx, idx)[0]
    model.crop_block_size(16)
    assert torch.equal(model(idx, idx)[0], before)
    assert model.config.block_size == 16 == len(model.positions.weight)
    assert torch.autograd.grad(model(idx, idx)[1], model.positions.weight)[0].any()
    with pytest.raises(ValueError, match="block_size=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size=17"):
        model.crop_block_size(17)


@pytest.mark.parametrize("T", [16, 320])
def test_dropout_only_in_training(T: int) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**vars(TINY) | {"dropout": 0.2}))
    plain = GPT.from_tensors(TINY, model.state_dict())
    idx = torch.randint(70, (2, T))
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    assert torch.equal(model.eval()(idx, idx)[0], plain(idx, idx)[0])


def test_attention_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    mean = sum(plain_attention(q, k, v, 0.3) for _ in range(4000)) / 4000
    assert (mean - plain_attention(q, k, v, 0.0)).abs().max() < 0.1


@pytest.mark.parametrize("T", [24, 320])
@pytest.mark.parametrize("arch", [vars(TINY), MODERN | {"n_kv_head": 2}])
def test_later_tokens_never_change_earlier_logits(T: int, arch: dict) -> None:
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**arch)), torch.randint(70, (1, T))
    before = model(idx, idx)[0]
    for cut in (1, T // 2, T - 1):
        changed = idx.clone()
        changed[:, cut:] = (idx[:, cut:] + 1) % 70
        after = model(changed, idx)[0]
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert (before[:, cut:] != after[:, cut:]).any(-1).all()


def test_tensors_that_do_not_fit_are_refused() -> None:
    tensors = GPT(TINY).state_dict()
    for wrong in (
        {"tokens.weight": torch.zeros(69, 32)},
        {"tokens.weight": torch.zeros(192, 32)},
        {"extra": torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=next(iter(wrong))):
            GPT.from_tensors(TINY, tensors | wrong)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        GPT.from_tensors(GPTConfig(**vars(TINY) | {"bias": False}), tensors)


@pytest.mark.parametrize(
    ("sizes", "name", "value"),
    [
        *((vars(TINY), *wrong) for wrong in (("n_head", 5), ("n_layer", 0), ("gelu", "fast"), ("vocab_size", -1))),
        *((vars(TINY), *wrong) for wrong in (("n_kv_head", 2), ("head_dim", 16), ("tied", False), ("arch", "gpt3"))),
        *((MODERN, *wrong) for wrong in (("bias", True), ("n_kv_head", 3), ("head_dim", 7))),
    ],
)
def test_contradicting_sizes_are_refused(sizes: dict, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        GPTConfig(**sizes | {name: value})


def test_runs_when_copied_alone(tmp_path: Path) -> None:
    shutil.copy(model_file.__file__, tmp_path)
    code = "import sys, model, torch; model.GPT(model.GPTConfig(1, 1, 8, 9, 4))(torch.zeros(1, 4, dtype=int))"
    code += "; sys.exit('nanogpt' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# ---- documents that do not see one another


END = 69
DOCUMENTS = [1, 40, 88, 2, 29, 160]  # lengths; the last is cut off by the row's end


@pytest.mark.parametrize("T", [64, 128, 256])
@pytest.mark.parametrize("arch", [vars(TINY), MODERN | {"n_kv_head": 2, "head_dim": 16}], ids=["gpt2", "modern"])
def test_documents_in_a_row_equal_documents_apart(arch: dict, T: int) -> None:
    """Logits, loss and gradients, with activation checkpointing too. Unmasked, they differ."""
    torch.manual_seed(4)
    model = GPT(GPTConfig(**arch))
    with torch.no_grad():
        model.tokens.weight.mul_(20)  # so that each id matters
    idx, targets = torch.randint(END, (3, T + 1)).unfold(1, T, 1).unbind(1)
    rows = [DOCUMENTS, DOCUMENTS[::-1], [T]]  # the second ends on a document's end, the third holds none
    spans = [[(0, DOCUMENTS[0])], [], []]
    for row, lengths, found in zip(idx, rows, spans, strict=True):
        found.clear()
        begin = 0
        for length in lengths:
            end = min(begin + length, T)
            if begin < end:
                row[end - 1] = END if begin + length <= T and lengths is not rows[2] else row[end - 1]
                found.append((begin, end))
            begin += length
    targets = targets.clone()
    targets[:, 10:20] = -1

    losses, pieces = 0.0, []
    for row, target, found in zip(idx, targets, spans, strict=True):
        for begin, end in found:
            logits, _ = model(row[None, begin:end], target[None, begin:end])
            pieces.append(logits[0])
            losses = losses + F.cross_entropy(logits[0], target[begin:end], ignore_index=-1, reduction="sum")
    losses = losses / (targets >= 0).sum()
    expected = torch.autograd.grad(losses, [*model.parameters()])
    plain = model(idx, targets)[0]
    model.end_of_text = END
    for saving in (False, True):
        model.activation_checkpointing = saving
        logits, loss = model(idx, targets)
        assert (logits.flatten(0, 1) - torch.cat(pieces)).abs().max() <= TOLERANCE
        assert abs(loss - losses) <= TOLERANCE
        for (name, _), ours, theirs in zip(
            model.named_parameters(), torch.autograd.grad(loss, [*model.parameters()]), expected, strict=True
        ):
            assert (ours - theirs).abs().max() <= TOLERANCE * max(theirs.abs().max(), 1), name
    assert (plain - logits).abs().max() > 0.1


def test_a_row_without_a_target_that_counts_has_no_loss_and_no_gradient() -> None:
    model = GPT(TINY)
    idx = torch.randint(70, (2, 8))
    for model.loss_chunk in (0, 5):
        loss = model(idx, torch.full_like(idx, -1))[1]
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [vars(TINY), MODERN | {"n_kv_head": 2, "head_dim": 16}], ids=["gpt2", "modern"])
def test_documents_apart_when_compiled(arch: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model = GPT(GPTConfig(**arch | {"n_layer": 1}))
    with torch.no_grad():
        model.tokens.weight.mul_(20)
    model.end_of_text = END
    idx = torch.randint(70, (2, 256))
    expected = model(idx, idx)
    gradients = torch.autograd.grad(expected[1], [*model.parameters()])
    logits, loss = torch.compile(model)(idx, idx)
    assert (logits - expected[0]).abs().max() <= TOLERANCE
    for ours, theirs in zip(torch.autograd.grad(loss, [*model.parameters()]), gradients, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE * max(theirs.abs().max(), 1)
    # What CUDA takes, as far as a CPU can tell: it has no backward pass of FlexAttention, and torch 2.13's code for it
    # gives wrong numbers after rotary positions.
    monkeypatch.setattr(model_file, "FLEX_ATTENTION_ON", "cpu")
    torch._dynamo.reset()
    with torch.no_grad():
        logits, loss = torch.compile(model, backend="aot_eager")(idx, idx)
    assert (logits - expected[0]).abs().max() <= TOLERANCE
