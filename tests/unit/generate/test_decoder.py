"""KV cache, compiled and low-precision models against the plain way: a forward pass of the window for each token."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import tokenizers
import torch
from conftest import plain_logprobs
from torch import Tensor

from model import GPT, GPTConfig
from nanogpt.distributed import World
from nanogpt.generate import decoder, low_precision
from nanogpt.generate.decoder import Decoder
from nanogpt.generate.low_precision import (
    BagLinear,
    PackedLinear,
    can_pack,
    replace_linears,
    rounded_linear,
    to_inference_precision,
)
from nanogpt.generate.sampling import Sampling, Token, sample_tokens, window_start
from nanogpt.generate.stream import sample_text
from nanogpt.memory import USABLE_SHARE, crop_to_memory, decoder_rows_that_fit
from nanogpt.text.tokenizer import Tokenizer

V, BLOCK = 37, 16
GREEDY = Sampling(temperature=0)
TEXTS = [[1, 2, 3], [4], [5, 6] * (BLOCK // 2), [7, 8, 9] * 5, [1, 2, 3]]  # the third fills the context; two are equal


@pytest.fixture(params=["gpt2", "modern"])
def model(request: pytest.FixtureRequest) -> GPT:
    """A model of random weights, so large that each token matters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": V, "block_size": BLOCK}
    if request.param == "modern":
        sizes |= {"arch": "modern", "bias": False, "n_kv_head": 2, "tied": False}
    model = GPT(GPTConfig(**sizes, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(12 if p.dim() == 2 else 1).add_(0.02 * torch.randn(p.shape))
        if request.param == "gpt2":
            model.position_embedding.weight.mul_(6)
    return model.eval()


def plain_generate(model: GPT, text: list[int], count: int, sampling: Sampling, sample_index: int = 0) -> list[int]:
    ids = list(text)
    for _ in range(count):
        window = torch.tensor([ids[window_start(len(ids), BLOCK) :]])
        ids.append(int(sample_tokens(model(window)[0][:, -1], sampling, [sample_index], [len(ids)])))
    return ids[len(text) :]


def generate(model: GPT, texts: list[list[int]], count: int, sampling: Sampling, **options: Any) -> list[list[int]]:
    tokens = Decoder(model, len(texts)).generate(texts, count, sampling, **options)
    return [[token.id for token in row] for row in zip(*tokens, strict=True)]


# --- The cache


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "ragged"])
def test_decoder_has_the_logits_of_the_plain_way(model: GPT, texts: list[list[int]]):
    """At each position, three contexts long, every row by itself."""
    decoder = Decoder(model, rows=len(texts))
    random = torch.Generator().manual_seed(3)
    known = [list(text) for text in texts]
    logits = decoder.prefill(texts)
    prefills = 0
    for _ in range(3 * BLOCK):
        for row, ids in enumerate(known):
            window = torch.tensor([ids[window_start(len(ids), BLOCK) :]])
            assert (logits[row] - model(window)[0][0, 0]).abs().max() < 1e-4 * logits[row].abs().max()
        new = torch.randint(V, (len(texts),), generator=random)
        for ids, token in zip(known, new.tolist(), strict=True):
            prefills += len(ids) - window_start(len(ids), BLOCK) == BLOCK
            ids.append(token)
        logits = decoder.decode_step(new)
    assert prefills >= 4 * len(texts)
    assert torch.equal(decoder.prefill(texts), Decoder(model, rows=len(texts)).prefill(texts))  # nothing is left over


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_k=30, top_p=0.95, min_p=0.01)])
def test_decoder_generates_the_tokens_of_the_plain_way(model: GPT, sampling: Sampling):
    """Each row by itself, whatever the others are; also where the model was training, with dropout."""
    rows = generate(model.train(), TEXTS, 40, sampling)
    for row, text in enumerate(TEXTS):
        assert rows[row] == plain_generate(model, text, 40, sampling, row)
    assert (rows[0] == rows[4]) == (sampling is GREEDY)
    assert len({token for row in rows for token in row}) > 5
    assert generate(model, [TEXTS[2]], 40, sampling, sample_indices=[2]) == [rows[2]]


def test_decoder_reads_equal_texts_once(model: GPT, monkeypatch: pytest.MonkeyPatch):
    shapes = []
    original = GPT.hidden_states

    def hidden_states(self: GPT, idx: Tensor, *args: Any, **options: Any) -> Tensor:
        shapes.append(idx.shape)
        return original(self, idx, *args, **options)

    monkeypatch.setattr(GPT, "hidden_states", hidden_states)
    generate(model, [[1, 2, 3]] * 6, 4, GREEDY)
    assert shapes == [(1, 3), (6, 1), (6, 1), (6, 1)]


def test_decoder_reads_many_texts_in_batches(model: GPT, monkeypatch: pytest.MonkeyPatch):
    expected = generate(model, TEXTS, 40, GREEDY)
    monkeypatch.setattr(decoder, "MAX_TOKENS_PER_PASS", 2 * BLOCK)
    assert generate(model, TEXTS, 40, GREEDY) == expected


def test_decoder_rows_that_fit_by_hand(model: GPT):
    """Keys and values of 2 layers, 4 heads (modern: 2) of 8 channels; 16 numbers for each id; 4 bytes each."""
    row = 4 * (2 * 2 * model.config.n_kv_head * 8 * 10 + 16 * V)
    assert decoder_rows_that_fit(model, 10, math.ceil(7 * row / USABLE_SHARE) + 1) == 7
    assert decoder_rows_that_fit(model, 10, math.floor(7 * row / USABLE_SHARE) - 1) == 6
    assert decoder_rows_that_fit(model, 10**9, 2**30) == decoder_rows_that_fit(model, BLOCK, 2**30)
    assert decoder_rows_that_fit(model, 10, 0) == 1
    assert decoder_rows_that_fit(model, 10, None) > 10**6


# --- Compiled


@pytest.mark.parametrize("model", ["modern"], indirect=True)
def test_compiled_decoders_of_any_size_are_eager_ones(model: GPT, monkeypatch: pytest.MonkeyPatch):
    """test_sample_compiled_writes_the_same has the default backend."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for rows, length, count in ((1, 8, 5), (5, None, 20)):
        texts = TEXTS[:rows]
        expected = [*Decoder(model, rows).generate(texts, count, GREEDY)]
        compiled = Decoder(model, rows, length, compiled=True)
        assert compiled.compiled
        for _ in range(2):
            assert [*compiled.generate(texts, count, GREEDY)] == expected


# --- Log-probabilities and samples


def test_logprobs_of_generated_tokens_are_the_plain_ones(model: GPT):
    """Three contexts long, whatever the temperature and the filters."""
    texts = [[1, 2, 3], [4, 5]]
    sampling = Sampling(temperature=3, top_k=9)
    rows: list[tuple[Token, ...]] = [
        *zip(*Decoder(model, 2).generate(texts, 50, sampling, top_logprobs=3), strict=True)
    ]
    for text, row in zip(texts, rows, strict=True):
        expected = plain_logprobs(model, text + [token.id for token in row])[len(text) - 1 :]
        assert (expected - torch.tensor([token.logprob for token in row])).abs().max() < 1e-4
        for token in row:
            best = [logprob for _, logprob in token.top_logprobs]
            assert best == sorted(best, reverse=True)
            assert len(best) == 3
            assert best[0] >= token.logprob == dict(token.top_logprobs).get(token.id, token.logprob)


def test_sample_text_is_a_function_of_weights_and_seed(model: GPT):
    tokenizer = Tokenizer.characters("".join(map(chr, range(97, 97 + V))))
    text = sample_text(model, tokenizer, 30, seed=3)
    assert model.training  # again
    assert text == sample_text(model, tokenizer, 30, seed=3) != sample_text(model, tokenizer, 30, seed=4)
    assert text == tokenizer.decode(plain_generate(model.eval(), [0], 30, Sampling(seed=3)))


@pytest.mark.parametrize(("end", "start"), [(V - 1, V - 1), (V, 0)])  # the model has no row for V
def test_sample_text_starts_with_the_end_of_text_if_it_has_a_row(
    model: GPT, monkeypatch: pytest.MonkeyPatch, end: int, start: int
):
    prompts: list[Any] = []
    original: Callable[..., Any] = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, texts: (prompts.append(texts), original(self, texts))[1])
    vocab = {f"{i:07d}": i for i in range(end)} | {"<|endoftext|>": end}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab))
    inner.decoder = tokenizers.decoders.Fuse()
    assert len(sample_text(model, Tokenizer(inner), 20, seed=0)) == 20  # of tokens of 7 characters
    assert prompts == [[[start]]]


# --- Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["all", "linears", "autocast"])
def test_sixteen_bits_are_near_float32(model: GPT, way: str, dtype: torch.dtype):
    """All weights, those of linear layers, or autocast. The last two are the same function."""
    texts = torch.randint(V, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    exact = model(texts)[0]
    with torch.autocast("cpu", dtype, enabled=way != "all"):
        autocast = model(texts)[0]
        if way == "all":
            model.to(dtype)
        elif way == "linears":
            replace_linears(model, partial(rounded_linear, dtype=dtype))
        logits = model(texts)[0]
        cached = Decoder(model, rows=3).prefill(texts.tolist())
        assert len(generate(model, [[1], [2, 3]], 30, Sampling())[1]) == 30
    assert logits.dtype == dtype
    error = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype] * exact.abs().max()
    assert 0 < (logits - exact).abs().max() < error
    assert (cached - exact[:, 0]).abs().max() < error
    assert way == "all" or torch.equal(logits, autocast)


@pytest.mark.skipif(not can_pack(), reason="needs FBGEMM, which torch has on x86 alone")
def test_packed_linears_are_float16(model: GPT):
    texts = torch.randint(V, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    rounded = GPT.from_tensors(model.config, {name: t.clone() for name, t in model.state_dict().items()}).eval()
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if p.dim() == 2 and "embedding" not in name:
                p.copy_(p.half().float())
        before = model(texts)[0]
        replace_linears(model, PackedLinear)
        after = model(texts)[0]
        x = rounded.norm(
            rounded.hidden_states(texts)[:, -1:]
        )  # tied: the output layer is rounded, the embedding is not
        expected = (x @ rounded.lm_head_weight.half().float().T)[..., :V]
    assert (after - expected).abs().max() < 1e-5 * before.abs().max()
    assert 1e-6 < (after - before).abs().max() / before.abs().max() < 5e-3
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    together = generate(model, [[1], [2, 3]], 30, Sampling())
    assert generate(model, [[2, 3]], 30, Sampling(), sample_indices=[1]) == together[1:]


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("outputs", [1, 33, 1000])
def test_bag_linear_rounds_weights_inputs_and_outputs_to_float16(
    outputs: int, threads: int, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    linear = torch.nn.Linear(48, outputs)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    plain, biased = BagLinear(weight, None), BagLinear(weight, bias)
    assert plain.table.numel() < 1.3 * weight.numel() + 15 * 48
    for scale in (1, 1e-3, 1e5):  # float16 ends at 65,504
        x = scale * torch.randn(1, 1, 48)
        rounded = 64 * (x / 64).half().double()
        expected = rounded @ weight.half().double().T
        y = plain(x)
        assert y.dtype == torch.float32
        assert y.shape == (1, 1, outputs)
        assert ((y - expected).abs() <= 2**-10.9 * expected.abs() + 64 * 2**-24).all()
        assert torch.equal(y, 64 * (y / 64).half().float())
        assert torch.equal(biased(x), y + bias)


@pytest.mark.parametrize("shape", [(1, 7, 48), (3, 1, 48)])  # a prompt, and several texts
def test_bag_linear_computes_more_tokens_in_float32(shape: tuple[int, int, int]):
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 1000)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = x.double() @ linear.weight.half().double().T + linear.bias
        assert (BagLinear(linear.weight, linear.bias)(x) - expected).abs().max() < 1e-5


def test_bags_decode_as_the_plain_model(model: GPT):
    text = TEXTS[3]
    expected = model(torch.tensor([text]))[0][0, -1]
    replace_linears(model, BagLinear)
    decoder = Decoder(model)
    decoder.prefill([text[:-3]])
    for token in text[-3:]:
        logits = decoder.decode_step(torch.tensor([token]))
    assert 0 < (logits[0] - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("speeds", "compiled", "rows", "expected"),
    [
        ({"float16": 2.0, "bfloat16": 1.5}, False, 3, PackedLinear),
        ({"float16": 2.0, "bfloat16": 1.5}, True, 3, torch.bfloat16),
        ({"float16": 1.7, "bfloat16": 1.5}, False, 3, torch.bfloat16),  # packing takes time, so it must gain a fifth
        ({"float16": 1.7, "bfloat16": 1.5}, False, 1, BagLinear),  # which takes none
        ({"float16": 0.9, "bfloat16": 0.5}, False, 3, torch.float32),
    ],
)
@pytest.mark.skipif(not can_pack(), reason="needs FBGEMM, which torch has on x86 alone")
def test_format_is_the_fastest_of_the_trial(
    model: GPT, speeds: dict[str, float], compiled: bool, rows: int, expected: Any, monkeypatch: pytest.MonkeyPatch
):
    """`speeds`: over float32, as measured. A key overrides them."""
    monkeypatch.setattr(low_precision, "load_or_measure", lambda name, shape, measure: speeds[name.split("-")[-1]])
    world = World(0, 1, torch.device("cpu"), torch.float32)
    plain = GPT.from_tensors(model.config, dict(model.state_dict()))
    with to_inference_precision(model, world, "auto", compiled, rows):
        assert torch.is_autocast_enabled("cpu") == (expected is torch.bfloat16)
        layer = model.blocks[1].mlp.up
        assert layer.weight.dtype == expected if isinstance(expected, torch.dtype) else isinstance(layer, expected)
    to_inference_precision(plain, world, "float32", compiled, rows)
    assert plain.blocks[1].mlp.up.weight.dtype == torch.float32


def test_format_speeds_are_measured(model: GPT):
    for name in ("bfloat16", *["float16"] * can_pack()):
        for rows in (1, 2):
            assert 0 < low_precision.format_speed(name, model, rows, 1000) < math.inf
    assert model.blocks[0].mlp.up.weight.dtype == torch.float32  # untouched


def test_a_step_that_does_not_compile_runs_as_it_is(
    model: GPT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    step = Mock(side_effect=RuntimeError("no C compiler"))
    monkeypatch.setattr(torch, "compile", Mock(return_value=step))
    tokens = Decoder(model, compiled=True).generate([TEXTS[0]], 5, GREEDY)
    assert [token.id for (token,) in tokens] == plain_generate(model, TEXTS[0], 5, GREEDY)
    output = capsys.readouterr()
    assert "torch.compile failed, continuing without it (RuntimeError: no C compiler)" in output.err
    assert output.out == ""


def test_the_context_is_shortened_to_what_memory_holds(model: GPT, capsys: pytest.CaptureFixture[str]):
    c = model.config
    needed = 4 * (2 * c.n_layer * c.n_kv_head * c.head_dim * BLOCK + 16 * V)
    crop_to_memory(model, None)
    crop_to_memory(model, math.ceil(needed / USABLE_SHARE) + 1)
    assert model.config.block_size == BLOCK
    crop_to_memory(model, int(needed / USABLE_SHARE) - 1)
    assert model.config.block_size == BLOCK // 2
    assert "a context of 8 tokens, not 16" in capsys.readouterr().err
    assert Decoder(model).length == BLOCK // 2
