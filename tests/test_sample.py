"""sample.py as a user calls it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, Run, environment, save_as_nanogpt

import sample
from model import GPT
from nanogpt import InputError
from nanogpt.tokenizer import Tokenizer

RULER = "---------------"
Write = Callable[..., list[str]]


@pytest.fixture
def write(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Write:
    """`write("--flag" …)`: the texts that sample.py writes. The folder `out` holds a run of train.py."""
    run(out_dir="out", max_iters=20, eval_interval=10)
    capsys.readouterr()

    def call(*flags: str) -> list[str]:
        fixed = ["--num_samples=2", "--max_new_tokens=25", "--device=cpu", "--dtype=float32"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *fixed, *flags])
        sample.main()
        head, _, told = capsys.readouterr().out.rpartition("\nsampling from ")
        texts = (head + told).split(f"\n{RULER}\n")
        assert texts.pop() == ""
        return [texts[0].split("\n")[-1], *texts[1:]]

    return call


def by_hand(model: GPT, prompt: str, count: int) -> str:
    ids = ["abcd".index(letter) for letter in prompt]
    model.eval()
    for _ in range(count):
        context = torch.tensor([ids[-model.config.block_size :]])
        ids.append(int(model(context)[0][0, -1].argmax()))
    return "".join("abcd"[i] for i in ids)


def test_greedy_from_a_run(write: Write):
    expected = by_hand(GPT.from_checkpoint("out"), "dab", 25)
    assert write("--start=dab", "--temperature=0") == [expected, expected]
    Path("prompt.txt").write_text("dab")
    assert write("--start=FILE:prompt.txt", "--top_k=1") == [expected, expected]


def test_samples_differ_and_are_repeated_by_the_seed(write: Write):
    texts = write("--start=a", "--num_samples=5")
    assert len(set(texts)) == 5
    assert all(len(text) == 26 and text[0] == "a" for text in texts)
    assert write("--start=a", "--num_samples=5") == texts
    assert write("--start=a", "--num_samples=5", "--seed=2") != texts


def test_which_checkpoint(write: Write, capsys: pytest.CaptureFixture[str]):
    greedy = ("--start=bb", "--temperature=0", "--num_samples=1", "--max_new_tokens=60")
    for flags, folder in {
        ("--checkpoint=latest",): "step-000020",
        ("--checkpoint=step-000010",): "step-000010",
        ("--init_from=out/ckpt/step-000010",): "step-000010",
    }.items():
        expected = by_hand(GPT.from_checkpoint(f"out/ckpt/{folder}"), "bb", 60)
        assert write(*greedy, *flags) == [expected]
    with pytest.raises(
        InputError, match=r"checkpoint=step-000015: no such checkpoint in out; it has step-000020, step"
    ):
        write("--checkpoint=step-000015")


def greedy_by(theirs: Any, prompt: list[int], count: int) -> str:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(theirs(torch.tensor([ids[-32:]])).logits[0, -1].argmax()))
    return "".join("abcd"[i] for i in ids)


GREEDY = ("--start=c", "--temperature=0", "--num_samples=1", "--max_new_tokens=50")


def test_from_a_hugging_face_folder(write: Write, foreign: Any):
    foreign.save_pretrained("theirs")
    with pytest.raises(InputError, match=r"theirs has no tokenizer, and 4 ids are not GPT-2's: put the tokenizer.json"):
        write(*GREEDY, "--init_from=theirs")
    Tokenizer.characters("abcd").save("theirs")
    expected = greedy_by(foreign, [2], 50)
    assert len(set(expected)) > 1
    assert write(*GREEDY, "--init_from=theirs") == [expected]


def test_from_qwen3_which_has_more_ids_than_tokens(write: Write):
    """As released: 151,936 rows, 151,669 tokens. Ids without a token are as likely as others, and never drawn."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["to be or not to be"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet))
    bpe.add_special_tokens(["<|endoftext|>"])
    tokens, rows = bpe.get_vocab_size(), 512
    assert 257 < tokens < 300
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": rows}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, tie_word_embeddings=False)).eval()
    theirs.save_pretrained("qwen3")
    bpe.save("qwen3/tokenizer.json")

    texts = write("--init_from=qwen3", "--start=not to be", "--num_samples=5", "--temperature=9", "--top_k=None")
    assert len(set(texts)) == 5
    assert all(text.startswith("not to be") for text in texts)
    ids = bpe.encode("not to be").ids
    for _ in range(25):
        logits = theirs(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits[:tokens].argmax()))
    assert write("--init_from=qwen3", "--start=not to be", "--temperature=0")[0] == bpe.decode(ids, False)


def test_from_nanogpt_s_checkpoint(write: Write, foreign: Any):
    """nanoGPT keeps the characters beside the data, whose name its checkpoint holds."""
    Path("nano").mkdir()
    expected = greedy_by(save_as_nanogpt(foreign, Path("nano/ckpt.pt"), config={"dataset": "letters"}), [2], 50)
    Path("data/letters").mkdir(parents=True)
    Path("data/letters/train.bin").write_bytes(b"")
    Tokenizer.characters("abcd").save("data/letters")
    assert write(*GREEDY, "--init_from=nano/ckpt.pt") == [expected]
    assert write(*GREEDY, "--out_dir=nano") == [expected]  # as nanoGPT's users call it


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start=abX"], r"the character tokenizer has no id for 'X': leave such characters out"),
        (["--start="], r"start is empty: give a prompt with --start=TEXT"),
        (["--start=FILE:none.txt"], r"start=FILE:none.txt: cannot be read .*No such file"),
        (["--out_dir=nothing"], r"nothing holds no checkpoint .*train one with --out_dir=nothing first"),
        (["--temperature=-1"], r"--temperature=-1: must be at least 0"),
        (["--top_k=0"], r"--top_k=0: must be at least 1"),
        (["--device=cuda"], r"device=cuda: this machine has no usable CUDA device"),
    ],
)
def test_what_cannot_be_sampled(write: Write, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        write(*flags)


def test_a_tokenizer_of_another_model(write: Write, foreign: Any):
    foreign.save_pretrained("narrow")
    Tokenizer.characters("abcdef").save("narrow")
    with pytest.raises(InputError, match=r"ids go beyond the model's 4: it belongs to another model"):
        write("--init_from=narrow", "--start=f")


def test_the_command_line(write: Write):
    """As a process: all text on standard output."""
    command = [sys.executable, ROOT / "sample.py", "--out_dir=out", "--start=abc", "--num_samples=3", "--device=cpu"]
    done = subprocess.run([*command, "--max_new_tokens=10"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    texts = done.stdout.partition("\n")[2].split(f"\n{RULER}\n")
    assert [len(text) for text in texts] == [13, 13, 13, 0]
