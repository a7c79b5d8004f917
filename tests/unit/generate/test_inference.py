"""Drawing tokens against softmax and transformers, the cache against the plain way, text against what was encoded."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from model import GPT, GPTConfig
from nanogpt.errors import InputError
from nanogpt.evaluation import logprobs
from nanogpt.generate import decoder
from nanogpt.generate.decoder import Decoder, sample_text
from nanogpt.generate.low_precision import can_pack, replace_linears, rounded_linear
from nanogpt.generate.sampling import Sampling, filtered_probs, generate, sample_tokens, window_start
from nanogpt.generate.stream import TextStream
from nanogpt.memory import decoder_rows_that_fit
from nanogpt.text.tokenizer import Tokenizer

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0])
V, BLOCK = 37, 16


@pytest.fixture(params=["gpt2", "modern"])
def model(request: pytest.FixtureRequest) -> GPT:
    """Of random weights, so large that each token matters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": V, "block_size": BLOCK}
    kind = {"arch": "modern", "bias": False, "n_kv_head": 2, "tied": False} if request.param == "modern" else {}
    model = GPT(GPTConfig(**sizes, **kind, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(12 if p.dim() == 2 else 1).add_(0.02 * torch.randn(p.shape))
        if request.param == "gpt2":
            model.positions.weight.mul_(6)
    return model


# ---- drawing


def oracle(how: Sampling) -> Tensor:
    """What transformers makes of LOGITS."""
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(how.temperature)]
    warpers += [transformers.TopKLogitsWarper(how.top_k)] if how.top_k else []
    warpers += [transformers.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    warpers += [transformers.MinPLogitsWarper(how.min_p)] if how.min_p > 0 else []
    return transformers.LogitsProcessorList(warpers)(torch.zeros(1, 1), LOGITS[None]).softmax(-1)[0]


def chances(logits: Tensor, how: Sampling) -> Tensor:
    """What `filtered_probs` says of every id."""
    shares, ids = filtered_probs(logits, how)
    if ids is not None:
        shares = torch.zeros_like(logits).scatter(-1, ids, shares)
    return shares / shares.sum(-1, keepdim=True)


FILTERS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0, top_k=5),
    Sampling(top_k=3),
    Sampling(top_p=0.8),
    Sampling(min_p=0.3),
    Sampling(temperature=1.5, top_k=4, top_p=0.9, min_p=0.2),
    Sampling(top_k=1),
    Sampling(top_p=1e-9),
    Sampling(top_k=100, top_p=0.9),
]


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_frequencies_are_those_of_transformers_filters(how: Sampling):
    expected = oracle(how)
    both = chances(torch.stack([LOGITS, LOGITS.flip(0)]), how)
    assert (both[0] - expected).abs().max() < 1e-6
    assert (both[1] - both[0].flip(0)).abs().max() < 1e-6
    count = 20_000
    ids = sample_tokens(LOGITS.expand(count, -1), how, [(i // 100, i % 100) for i in range(count)])
    seen, expected = torch.bincount(ids, minlength=5), count * expected
    assert seen[expected == 0].sum() == 0
    kept = int((expected > 0).sum())
    chi_squared = ((seen - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_squared < {5: 18.47, 4: 16.27, 3: 13.82, 2: 10.83, 1: 1e-6}[kept]  # by chance once in a thousand


def test_a_draw_is_its_seed_s_sample_s_and_position_s_alone():
    how, places = Sampling(seed=7), [(sample, position) for sample in range(5) for position in range(40)]
    logits = torch.randn(len(places), 50, generator=torch.Generator().manual_seed(1))
    ids = sample_tokens(logits, how, places)
    backwards = [*range(len(places))][::-1]
    assert torch.equal(sample_tokens(logits[backwards], how, [places[i] for i in backwards]), ids.flip(0))
    assert all(sample_tokens(logits[i : i + 1], how, [places[i]]) == ids[i] for i in range(0, len(places), 7))
    alike = logits[:1].expand(len(places), -1)
    for other in (Sampling(seed=8), how):
        moved = [(sample + (other is how), position) for sample, position in places]
        assert (sample_tokens(alike, other, moved) == sample_tokens(alike, how, places)).float().mean() < 0.3


def test_greedy():
    """At temperature 0; at a low temperature nothing overflows. Ids beyond the tokenizer's are never drawn."""
    rows = torch.tensor([[1.0, 3.0, 2.0], [9e4, 0.0, -9e4]])
    places = [(0, 0), (1, 0)]
    for how in (
        Sampling(temperature=0),
        Sampling(temperature=1e-3),
        Sampling(temperature=1e-45),
        Sampling(temperature=0, top_k=2, top_p=0.5),
    ):
        assert sample_tokens(rows, how, places).tolist() == [1, 0]
    assert sample_tokens(rows.flip(1), Sampling(temperature=0, vocab_size=2), places).tolist() == [1, 1]
    assert sample_tokens(rows.flip(1).repeat(200, 1), Sampling(vocab_size=2), [(i, 0) for i in range(400)]).max() == 1


@pytest.mark.parametrize("how", [Sampling(top_k=2), Sampling(top_k=2, top_p=0.99), Sampling(top_k=2, min_p=0.5)])
def test_of_equals_no_more_than_top_k_stay(how: Sampling):
    assert (chances(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), how) > 0).sum() == 2


@pytest.mark.parametrize("how", [Sampling(), Sampling(top_k=4), Sampling(top_p=0.9), Sampling(top_k=4, min_p=0.1)])
def test_a_hair_s_difference_does_not_change_what_is_drawn(how: Sampling):
    """Rounding may change which of two is the likelier, as between the cached and the plain way."""
    places = [(sample, 0) for sample in range(500)]
    one, other = torch.tensor([[1.0, 1.00001, 1.0, 0.5, -2.0]]), torch.tensor([[1.00001, 1.0, 1.00001, 0.5, -2.0]])
    assert (
        sample_tokens(one.expand(500, -1), how, places) != sample_tokens(other.expand(500, -1), how, places)
    ).sum() <= 1


@pytest.mark.parametrize("how", [Sampling(), Sampling(temperature=0), Sampling(top_k=2, top_p=0.9)])
def test_what_is_no_number_is_no_token(how: Sampling):
    logits = torch.zeros(3, 5)
    for bad in (torch.nan, torch.inf):
        logits[1, 2] = bad
        with pytest.raises(InputError, match="try --dtype=float32"):
            sample_tokens(logits, how, [(0, 0), (1, 0), (2, 0)])


# ---- the cache


def test_where_windows_begin():
    """A context of 8: full at 8 tokens; with the ninth the last four are kept."""
    assert [window_start(n, 8) for n in range(1, 15)] == [0] * 8 + [5] * 5 + [10]
    for block in (1, 2, 3, 7, 64):
        for n in range(1, 300):
            kept, before = n - window_start(n, block), n - 1 - window_start(n - 1, block)
            assert 1 <= kept <= block
            assert kept == (before + 1 if before < block else max(1, block // 2))


def test_generate_is_the_plain_loop(model: GPT):
    """Dropout is off, and on again afterwards."""
    prompts = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(1))
    new = torch.cat(list(generate(model, prompts, 40, Sampling(temperature=0))), dim=1)
    assert model.training
    assert new.shape == (3, 40)
    model.eval()
    for row, prompt in enumerate(prompts.tolist()):
        ids = list(prompt)
        for n in range(5, 45):
            begin = n if n <= BLOCK else BLOCK // 2 + (n - BLOCK - 1) % (BLOCK // 2 + 1)  # so many are seen
            context = torch.tensor([ids[-begin:]])
            ids.append(int(model(context, context)[0][0, -1].argmax()))
        assert new[row].tolist() == ids[5:]
    assert len({tuple(row) for row in new.tolist()}) > 1  # a model that says one thing would prove nothing
    assert len(set(new.flatten().tolist())) > 5
    first = generate(model.train(), prompts, 12)
    next(first)
    assert not model.training
    first.close()  # left early
    assert model.training


TEXTS = [[1, 2, 3], [4], [5, 6] * (BLOCK // 2), [7, 8, 9] * 5, [1, 2, 3]]  # the third fills the context; two are equal


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "ragged"])
def test_logits_are_those_of_the_plain_way(model: GPT, texts: list[list[int]]):
    """At each position, three contexts long, every row by itself."""
    model.eval()
    decoder, draws = Decoder(model, rows=len(texts)), torch.Generator().manual_seed(3)
    known, logits = [list(text) for text in texts], decoder.start(texts)
    rereads = 0
    for _ in range(3 * BLOCK):
        for row, ids in enumerate(known):
            window = torch.tensor([ids[window_start(len(ids), BLOCK) :]])
            assert (logits[row] - model(window)[0][0, 0]).abs().max() < 1e-4 * logits[row].abs().max()
        new = torch.randint(V, (len(texts),), generator=draws)
        for ids, token in zip(known, new.tolist(), strict=True):
            rereads += len(ids) - window_start(len(ids), BLOCK) == BLOCK
            ids.append(token)
        logits = decoder.step(new)
    assert rereads >= 4 * len(texts)
    assert torch.equal(decoder.start(texts), Decoder(model, rows=len(texts)).start(texts))  # what was is forgotten


@pytest.mark.parametrize("how", [Sampling(temperature=0), Sampling(temperature=1.5, top_k=30, top_p=0.95, min_p=0.01)])
def test_text_is_that_of_the_plain_way(model: GPT, how: Sampling):
    """Greedy and drawn, each row for itself, whatever the others are."""
    written = [
        [token.id for token in row] for row in zip(*Decoder(model, rows=5).generate(TEXTS, 40, how), strict=True)
    ]
    assert model.training
    plain = [torch.tensor([TEXTS[0]] * 5), torch.tensor([TEXTS[1]] * 5)]
    for row in (0, 1, 4):
        ids = torch.cat(list(generate(model, plain[row == 1], 40, how)), dim=1)[row]
        assert written[row] == ids.tolist()
    assert (written[0] == written[4]) == (how.temperature == 0)
    alone = Decoder(model).generate([TEXTS[2]], 40, how, samples=[2])
    assert [token.id for (token,) in alone] == written[2]


def test_equal_texts_are_read_once(model: GPT, monkeypatch: pytest.MonkeyPatch):
    shapes: list[Any] = []
    original = GPT.hidden_states
    monkeypatch.setattr(
        GPT,
        "hidden_states",
        lambda self, idx, *rest, **keys: (shapes.append(idx.shape), original(self, idx, *rest, **keys))[1],
    )
    [*Decoder(model, rows=6).generate([[1, 2, 3]] * 6, 4)]
    assert shapes == [(1, 3), (6, 1), (6, 1), (6, 1)]


def test_a_cache_no_longer_than_needed(model: GPT):
    full, short = Decoder(model), Decoder(model, length=9)
    assert short.cache.keys.shape[3] == 9
    assert [*short.generate([[1, 2, 3]], 6)] == [*full.generate([[1, 2, 3]], 6)]


def test_long_texts_are_read_a_few_at_a_time(model: GPT, monkeypatch: pytest.MonkeyPatch):
    how = Sampling(temperature=0)
    whole = [*Decoder(model, rows=5).generate(TEXTS, 40, how)]
    monkeypatch.setattr(decoder, "MAX_TOKENS_PER_PASS", 2 * BLOCK)
    assert [*Decoder(model, rows=5).generate(TEXTS, 40, how)] == whole


def test_what_a_decoder_cannot_do(model: GPT):
    decoder = Decoder(model, rows=2, length=4)
    one = torch.tensor([1, 1])
    with pytest.raises(ValueError, match="start first"):
        decoder.step(one)
    for texts in ([[1]], [[1], []], [[1]] * 3):
        with pytest.raises(ValueError, match="2 rows"):
            decoder.start(texts)
    with pytest.raises(ValueError, match=r"5 tokens .* length=4"):
        decoder.start([[1] * 5, [1]])
    decoder.start([[1], [1, 2]])
    with pytest.raises(ValueError, match="2 ids"):
        decoder.step(torch.tensor([1]))
    for _ in range(2):
        decoder.step(one)
    with pytest.raises(ValueError, match=r"5 tokens .* length=4"):
        decoder.step(one)


def test_how_many_texts_fit(model: GPT):
    """By hand: keys and values of 2 layers, 4 heads (modern: 2) of 8 channels; 16 numbers for each id; 4 bytes each."""
    heads = model.config.n_kv_head
    each = 4 * (2 * 2 * heads * 8 * 10 + 16 * V)
    assert decoder_rows_that_fit(model, 10, 2 * 7 * each) == 7
    assert decoder_rows_that_fit(model, 10, 2 * 7 * each - 1) == 6
    assert decoder_rows_that_fit(model, 10**9, 2**30) == decoder_rows_that_fit(model, BLOCK, 2**30)
    assert decoder_rows_that_fit(model, 10, 0) == 1
    assert decoder_rows_that_fit(model, 10, None) > 10**6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["all", "matrices", "autocast"])
def test_sixteen_bits(model: GPT, way: str, dtype: torch.dtype):
    """The whole model, its matrices alone, or autocast: all work, near float32; the last two are the same function."""
    model.eval()
    texts = torch.randint(V, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    exact = model(texts)[0]
    with torch.autocast("cpu", dtype, enabled=way != "all"):
        autocast = model(texts)[0]
        if way == "all":
            model.to(dtype)
        elif way == "matrices":
            replace_linears(model, partial(rounded_linear, dtype=dtype))
        found = model(texts)[0]
        logits = Decoder(model, rows=3).start(texts.tolist())
        assert len([*Decoder(model, rows=2).generate([[1], [2, 3]], 30)]) == 30
    assert found.dtype == dtype
    error = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype] * exact.abs().max()
    assert 0 < (found - exact).abs().max() < error
    assert (logits - exact[:, 0]).abs().max() < error
    assert way == "all" or torch.equal(found, autocast)


def test_many_compiled_decoders(model: GPT, monkeypatch: pytest.MonkeyPatch):
    """torch keeps eight versions of a function; each decoder is one of its own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    how = Sampling(temperature=0)
    for rows in range(1, 11):
        texts = TEXTS[:1] * rows
        written = [*Decoder(model, rows, compiled=True).generate(texts, 3 + (rows == 1) * BLOCK, how)]
        assert written == [*Decoder(model, rows).generate(texts, 3 + (rows == 1) * BLOCK, how)]


@pytest.mark.slow
def test_compiled_steps(model: GPT):
    how = Sampling(temperature=0)
    eager, compiled = Decoder(model, rows=5), Decoder(model, rows=5, compiled=True)
    for _ in range(2):
        assert [*compiled.generate(TEXTS, 20, how)] == [*eager.generate(TEXTS, 20, how)]


# ---- how sure it was


def test_logprobs(model: GPT):
    """Of a text three contexts long: those of its tokens as they were drawn. Of a short one: the loss."""
    texts = [[1, 2, 3], [4, 5]]
    rows = [*zip(*Decoder(model, rows=2).generate(texts, 50, Sampling(temperature=3, top_k=9), rivals=3), strict=True)]
    for text, row in zip(texts, rows, strict=True):
        found = logprobs(model, text + [token.id for token in row])
        assert found.shape == (len(text) + 49,)
        assert (found[len(text) - 1 :] - torch.tensor([token.logprob for token in row])).abs().max() < 1e-4
        for token in row:
            assert len(token.rivals) == 3
            assert sorted((p for _, p in token.rivals), reverse=True) == [p for _, p in token.rivals]
            assert token.id not in dict(token.rivals) or dict(token.rivals)[token.id] == token.logprob
            assert token.rivals[0][1] >= token.logprob
    assert model.training
    ids = torch.arange(BLOCK + 1)
    loss = model.eval()(ids[None, :-1], ids[None, 1:])[1]
    assert loss is not None
    assert abs(logprobs(model, ids.tolist()).mean().item() + loss.item()) < 1e-5
    assert logprobs(model, [3]).shape == (0,)


# ---- packed weights


@pytest.mark.skipif(not can_pack(), reason="needs FBGEMM, which torch has on x86 alone")
def test_packed_weights_are_float16(model: GPT):
    model.eval()
    texts = torch.randint(V, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    rounded = GPT.from_tensors(model.config, {name: t.clone() for name, t in model.state_dict().items()}).eval()
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if p.dim() == 2 and name not in ("positions.weight", "tokens.weight"):
                p.copy_(p.half().float())
        before = model(texts)[0]
        replace_linears(model)
        after = model(texts)[0]
        expected = rounded(texts)[0]
        if model.config.tied:  # the output layer is rounded, the embedding is not
            x = rounded.norm(rounded.hidden_states(texts)[:, -1:])
            expected = (x @ rounded.tokens.weight.half().float().T)[..., :V]
    assert (after - expected).abs().max() < 1e-5 * before.abs().max()
    assert 1e-6 < (after - before).abs().max() / before.abs().max() < 5e-3
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    together = [*zip(*Decoder(model, rows=2).generate([[1], [2, 3]], 30), strict=True)]
    assert [[token] for token in together[1]] == [*Decoder(model).generate([[2, 3]], 30, samples=[1])]


# ---- text

HARD = "naïve 🤷🏽‍♀️ 日本語 \u0301 \ufffd x\r\n\t  \u200b𝒳 é\u0000 ﷽"


def byte_level() -> Tokenizer:
    """Tokens of one byte to a few, which cut characters apart."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([HARD] * 3, trainer)
    return Tokenizer(bpe)


def word_pieces() -> Tokenizer:
    """A token that begins a text is written without its space."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁to": 0, "▁be": 1, "▁or": 2, "ing": 3}))
    inner.decoder = tokenizers.decoders.Metaspace()
    return Tokenizer(inner)


def told(tokenizer: Tokenizer, ids: list[int], *stops: str) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    return [*(stream.put(token) for token in ids), stream.close()], stream


def test_characters_of_several_tokens():
    tokenizer = byte_level()
    ids = tokenizer.encode(HARD)
    pieces, _ = told(tokenizer, ids)
    assert "".join(pieces) == HARD
    assert len(ids) > len(HARD)
    assert pieces[-1] == ""
    assert all(piece.strip("\ufffd ") == piece.strip(" ") for piece in pieces if "\ufffd " not in piece)
    random = torch.Generator().manual_seed(0)
    for _ in range(200):  # any bytes: what is told is what decoding gives in the end
        noise = torch.randint(tokenizer.vocab_size, (12,), generator=random).tolist()
        assert "".join(told(tokenizer, noise)[0]) == tokenizer.decode(noise)


def test_a_text_that_ends_amid_a_character():
    tokenizer = byte_level()
    ids = tokenizer.encode("a🤷")
    pieces, _ = told(tokenizer, ids[:-1])
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == "\ufffd"


def byte_fallback() -> Tokenizer:
    """Bytes for what has no token: while they are no characters, each is a U+FFFD."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    return Tokenizer(inner)


def test_bytes_that_become_characters_together():
    tokenizer = byte_fallback()
    ids = [256, *"日🤷é".encode(), 256]
    assert told(tokenizer, ids)[0] == ["a", "", "", "日", "", "", "", "🤷", "", "é", "a", ""]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_that_never_become_a_character(make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch):
    """They are told after a while, and what is read again for each token stays short."""
    tokenizer = make()
    lone = next(i for i in range(tokenizer.vocab_size) if "0x80" in tokenizer.label(i))
    lengths: list[int] = []
    original = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: (lengths.append(len(ids)), original(ids))[1])
    pieces, _ = told(tokenizer, [lone] * 100)
    assert "".join(pieces) == "\ufffd" * 100
    assert len("".join(pieces[:50])) > 40
    assert max(lengths) < 16


def test_tokens_with_a_space_before_them():
    assert told(word_pieces(), [0, 1, 3, 2, 0])[0] == ["to", " be", "ing", " or", " to", ""]
    assert TextStream(word_pieces(), before=[0]).put(1) == " be"
    amid = TextStream(byte_level(), before=byte_level().encode("é")[:1])
    assert amid.put(byte_level().encode("é")[1]) == "é"


@pytest.mark.parametrize(
    ("stops", "text", "count"),
    [
        (["\n\n"], "ab", 4),
        (["cc", "\n\n"], "ab", 4),
        (["c"], "ab\n\n", 5),
        (["d\n"], "ab\n\ncd", 99),
        (["b\n\nc"], "a", 5),
        (["d", "cd"], "ab\n\n", 6),
        (["", "zz"], "ab\n\ncd", 99),
    ],
)
def test_stops(stops: list[str], text: str, count: int):
    """What may begin a stop is held back until it is known; a text ends before it."""
    pieces, stream = told(Tokenizer.characters("abcdz\n"), Tokenizer.characters("abcdz\n").encode("ab\n\ncd"), *stops)
    assert "".join(pieces) == text
    assert stream.stopped == (count < 99)
    assert not any(pieces[count:]) or count == 99


def test_sample_text(model: GPT):
    """As many characters as asked for, the same ones each time; it starts at the end of a text where there is one."""
    tokenizer = Tokenizer.characters("".join(map(chr, range(97, 97 + V))))
    text = sample_text(model, tokenizer, 30, seed=3)
    assert len(text) == 30
    assert text == sample_text(model, tokenizer, 30, seed=3) != sample_text(model, tokenizer, 30, seed=4)
    plain = generate(model, torch.tensor([[0]]), 30, Sampling(seed=3))
    assert text == tokenizer.decode([int(token) for token in plain])


def test_sample_text_of_long_tokens(model: GPT, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    original: Callable[..., Any] = Decoder.generate
    monkeypatch.setattr(Decoder, "generate", lambda self, *rest: (asked.append(rest), original(self, *rest))[1])
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"{i:07d}": i for i in range(V - 1)} | {"<|endoftext|>": 36})
    )
    inner.decoder = tokenizers.decoders.Fuse()
    text = sample_text(model, Tokenizer(inner), 20, seed=0)
    assert asked[0][0] == [[36]]
    assert len(text) == 20
    assert math.isfinite(int(text[:7]) if text[0] == "0" else 0)
