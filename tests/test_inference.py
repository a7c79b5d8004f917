"""Drawing tokens: against argmax, softmax and the plain loop."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import GPT, GPTConfig
from nanogpt.inference import generate, next_token, sample_text
from nanogpt.tokenizer import Tokenizer

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0])


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=11, block_size=8, dropout=0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    return model


def draw(count: int, **keys: Any) -> Tensor:
    """How often each id comes, of `count` draws."""
    generator = torch.Generator().manual_seed(2)
    ids = next_token(LOGITS.expand(count, -1), generator=generator, **keys)
    assert ids.shape == (count, 1)
    return torch.bincount(ids[:, 0], minlength=5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "kept"), [(1.0, None, 5), (0.5, None, 5), (2.0, 5, 5), (1.0, 3, 3), (1.5, 2, 2)]
)
def test_frequencies_are_those_of_softmax(temperature: float, top_k: int | None, kept: int):
    odds = (LOGITS / temperature).exp()
    odds[LOGITS.argsort(descending=True)[kept:]] = 0
    expected = 20_000 * odds / odds.sum()
    seen = draw(20_000, temperature=temperature, top_k=top_k)
    assert seen[expected == 0].sum() == 0
    chi_squared = ((seen - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_squared < {5: 18.47, 3: 13.82, 2: 10.83}[kept]  # exceeded by chance once in a thousand


def test_greedy():
    """Temperature 0, or one candidate only; at a low temperature nothing overflows."""
    for keys in ({"temperature": 0}, {"temperature": 0, "top_k": 3}, {"temperature": 5.0, "top_k": 1}):
        assert draw(100, **keys).tolist() == [100, 0, 0, 0, 0]
    rows = torch.tensor([[1.0, 3.0, 2.0], [9e4, 0.0, -9e4]])
    assert next_token(rows, 1e-3).tolist() == next_token(rows, 0).tolist() == [[1], [0]]


def test_generate_is_the_plain_loop(model: GPT):
    """Beyond block_size the last tokens count; dropout is off, and on again afterwards."""
    prompts = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
    new = torch.cat(list(generate(model, prompts, 12, temperature=0)), dim=1)
    assert model.training
    assert new.shape == (3, 12)
    model.eval()
    for row, prompt in enumerate(prompts.tolist()):
        ids = list(prompt)
        for _ in range(12):
            context = torch.tensor([ids[-8:]])
            logits = model(context, context)[0]  # with targets: all positions
            ids.append(int(logits[0, -1].argmax()))
        assert new[row].tolist() == ids[5:]
    assert len({tuple(row) for row in new.tolist()}) == 3  # a model that says one thing would prove nothing
    first = generate(model.train(), prompts, 12)
    next(first)
    assert not model.training
    first.close()  # left early
    assert model.training


def test_ids_beyond_the_tokenizer_are_never_drawn(model: GPT):
    with torch.no_grad():
        model.tokens.weight[5:11] = model.tokens.weight[5:11].abs() * 50
        model.norm.bias.fill_(10)  # all of the excess ids are far likelier
    prompt = torch.zeros(20, 1, dtype=torch.long)
    free = torch.cat(list(generate(model, prompt, 5)), dim=1)
    bound = torch.cat(list(generate(model, prompt, 5, vocab_size=5)), dim=1)
    assert free.min() >= 5
    assert bound.max() < 5


def test_sample_text(model: GPT):
    """As many characters as asked for, the same ones each time."""
    tokenizer = Tokenizer.characters("abcdefghijk")
    text = sample_text(model, tokenizer, 30, seed=3)
    assert len(text) == 30
    assert text == sample_text(model, tokenizer, 30, seed=3) != sample_text(model, tokenizer, 30, seed=4)


def test_sample_text_of_long_tokens():
    """It stops when there is enough, also where a token is several characters, and starts at the end of a text."""
    asked: list[list[int]] = []

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.config = torch.nn.Parameter(torch.zeros(1)), SimpleNamespace(block_size=4)

        def forward(self, idx: Tensor) -> tuple[Tensor, None]:
            asked.append(idx[0].tolist())
            return torch.tensor([[[-1e9, 0.0, -1e9]]]), None

    words = SimpleNamespace(end_of_text=2, vocab_size=3, decode=lambda ids: "".join("xyz"[i] * 7 for i in ids))
    assert sample_text(Constant(), words, 20, seed=0) == "y" * 20  # type: ignore[arg-type]
    assert asked[0] == [2]
    assert max(map(len, asked)) == 4
    assert len(asked) == 10
