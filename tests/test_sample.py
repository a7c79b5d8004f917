"""sample.py as a user calls it."""

import re
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
from nanogpt import InputError, inference
from nanogpt.inference import window_start
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
        *texts, rest = capsys.readouterr().out.split(f"\n{RULER}\n")
        assert rest == ""
        return texts

    return call


def by_hand(model: GPT, prompt: str, count: int) -> str:
    ids = ["abcd".index(letter) for letter in prompt]
    model.eval()
    for _ in range(count):
        context = torch.tensor([ids[window_start(len(ids), model.config.block_size) :]])
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
        ids.append(int(theirs(torch.tensor([ids[window_start(len(ids), 32) :]])).logits[0, -1].argmax()))
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
        (["--start=" + "abc" * 6], r"start has 18 tokens, but the model's context ends at 16: shorten it"),
        (["--temperature=-1"], r"--temperature=-1: must be at least 0"),
        (["--top_k=0"], r"--top_k=0: must be at least 1"),
        (["--top_p=0"], r"--top_p=0.*: must be above 0"),
        (["--min_p=1"], r"--min_p=1.*: must be below 1"),
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


def test_filters_and_stops(write: Write):
    greedy = write("--start=dab", "--temperature=0")
    for flags in (["--top_p=1e-9"], ["--min_p=0.999999"], ["--top_k=1"]):
        assert write("--start=dab", "--temperature=1", *flags) == greedy
    end = greedy[0][10:12]
    assert write("--start=dab", "--temperature=0", f"--stop={end}") == [f"dab{greedy[0][3:].partition(end)[0]}"] * 2


def test_each_text_has_its_own_stop(write: Write):
    keys = ("--start=a", "--num_samples=5", "--temperature=1")
    whole = write(*keys)
    assert write(*keys, "--stop=b") == ["a" + text[1:].partition("b")[0] for text in whole]
    assert len({text[1:].find("b") for text in whole}) > 1


def test_how_sure_it_was(write: Write, monkeypatch: pytest.MonkeyPatch):
    """In a terminal by colour, elsewhere a line for each token, with the model's own probability."""
    keys = ("--start=dab", "--temperature=0", "--max_new_tokens=5", "--logprobs=True", "--num_samples=1")
    (plain,) = write("--start=dab", "--temperature=0", "--max_new_tokens=5", "--num_samples=1")
    first, *lines = write(*keys)[0].split("\n")
    assert first == "dab"
    model = GPT.from_checkpoint("out").eval()
    for n, line in enumerate(lines, 3):
        percent = 100 * model(torch.tensor([["abcd".index(letter) for letter in plain[:n]]]))[0].softmax(-1).max()
        assert line == f"{percent:6.1f}%  {plain[n]!r}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    (shown,) = write(*keys)
    assert re.sub("\033\\[[0-9;]*m", "", shown) == plain
    assert len(re.findall("\033\\[38;5;\\d+m.\033\\[0m", shown)) == 5


def test_a_conversation(write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A line is a prompt, an empty one lets the text go on; mistakes are told; Ctrl-C stops the text alone."""
    typed = iter(["dab", "", "Zz", KeyboardInterrupt(), "a" * 17, "c", EOFError()])

    def read(prompt: str) -> str:
        if isinstance(line := next(typed), BaseException):
            raise line
        return line

    stop_at: list[int] = []
    original = inference.TextStream.put

    def put(self: inference.TextStream, token: int) -> str:
        if stop_at and stop_at.pop():
            raise KeyboardInterrupt
        return original(self, token)

    monkeypatch.setattr("builtins.input", read)
    fixed = ["--device=cpu", "--dtype=float32", "--out_dir=out", "--interactive=True", "--temperature=0"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *fixed, "--max_new_tokens=8"])
    monkeypatch.setattr(inference.TextStream, "put", put)
    expected = by_hand(GPT.from_checkpoint("out"), "dab", 16)
    sample.main()
    told = capsys.readouterr()
    first, second, third = told.out.splitlines()
    assert (first, second) == (expected[:11], expected[11:19])
    assert third == by_hand(GPT.from_checkpoint("out"), "c", 8)
    assert "error: the character tokenizer has no id for 'Z' 'z'" in told.err
    assert "error: start has 17 tokens, but the model's context ends at 16" in told.err
    typed, stop_at = iter(["c", "c", EOFError()]), [0, 0, 0, 1, 0, 0, 0]
    sample.main()
    stopped, whole = capsys.readouterr().out.splitlines()
    assert stopped == third[:4]
    assert whole == third
    typed = iter(["c", "c", "", "", EOFError()])
    sys.argv.append("--temperature=1")
    sample.main()
    one, other, *more = capsys.readouterr().out.splitlines()
    assert one != other  # each turn has its own draws
    assert [len(text) for text in more] == [8, 8]  # beyond the context too


def test_the_command_line(write: Write):
    """As a process: all text on standard output."""
    command = [sys.executable, ROOT / "sample.py", "--out_dir=out", "--start=abc", "--num_samples=3", "--device=cpu"]
    done = subprocess.run([*command, "--max_new_tokens=10"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert first == "sampling from out/ckpt/step-000020"
    assert re.fullmatch(r"\d+\.\d tok/s \(30 tokens in \d+\.\d s\)", second)
    texts = done.stdout.split(f"\n{RULER}\n")
    assert [len(text) for text in texts] == [13, 13, 13, 0]
