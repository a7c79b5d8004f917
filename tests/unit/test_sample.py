"""sample.py as a user calls it."""

import math
import os
import pty
import re
import select
import signal
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
from nanogpt.errors import InputError
from nanogpt.generate.sampling import Token, window_start
from nanogpt.generate.stream import TextStream
from nanogpt.text.tokenizer import Tokenizer

SEPARATOR = "---------------"
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
        *texts, rest = capsys.readouterr().out.split(f"\n{SEPARATOR}\n")
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
    """In a terminal by color, elsewhere a line for each token, with the model's own probability."""
    keys = ("--start=dab", "--temperature=0", "--max_new_tokens=5", "--logprobs=True", "--num_samples=1")
    (plain,) = write("--start=dab", "--temperature=0", "--max_new_tokens=5", "--num_samples=1")
    first, *lines = write(*keys)[0].split("\n")
    assert first == "dab"
    model = GPT.from_checkpoint("out").eval()
    for n, line in enumerate(lines, 3):
        percent = 100 * model(torch.tensor([["abcd".index(letter) for letter in plain[:n]]]))[0].softmax(-1).max()
        assert line == f"{percent:6.1f}%  {plain[n]!r}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert write(*keys) == ["\n".join([first, *lines])]
    monkeypatch.setenv("NO_COLOR", "")
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
    original = TextStream.put

    def put(self: TextStream, token: int) -> str:
        if stop_at and stop_at.pop():
            raise KeyboardInterrupt
        return original(self, token)

    monkeypatch.setattr("builtins.input", read)
    fixed = ["--device=cpu", "--dtype=float32", "--out_dir=out", "--interactive=True", "--temperature=0"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *fixed, "--max_new_tokens=8"])
    monkeypatch.setattr(TextStream, "put", put)
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


def test_more_samples_than_fit_are_written_in_groups(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    keys = ("--start=dab", "--num_samples=5")
    together = write(*keys)
    monkeypatch.setattr(sample, "rows_that_fit", lambda *about: 2)
    assert write(*keys) == together
    monkeypatch.setattr(sys, "argv", [*sys.argv, *keys])
    sample.main()
    told = capsys.readouterr().err
    assert "2 of 5 samples at a time" in told
    assert "(125 tokens in" in told


def test_pieces_have_the_probability_of_all_their_tokens():
    """A stop that did not come, and a character of several tokens, show the product."""
    tokens = [Token(id, math.log(p)) for id, p in enumerate([0.5, 0.25, 0.5, 0.5])]
    tokenizer = Tokenizer.characters("abcd")
    text = sample.Sample(TextStream(tokenizer, ["bca"]), lambda piece, p: f"[{piece} {p:.4g}]")
    for token in tokens:
        text.put(token)
    assert text.text == "[a 0.5][bcd 0.0625]"
    assert text.tokens == 4


def test_texts_show_one_after_the_other(capsys: pytest.CaptureFixture[str]):
    """The next one as soon as the first has ended, from its beginning."""
    tokenizer = Tokenizer.characters("abcd")
    samples = [sample.Sample(TextStream(tokenizer, ["d"]), lambda piece, p: piece) for _ in range(3)]
    printer = sample.Printer(samples, "> ", "|")
    shown = []
    for row in ("aba", "bdc", "dac", "aad"):
        for each, letter in zip(samples, row, strict=True):
            each.put(Token("abcd".index(letter)))
        printer.update()
        shown.append(capsys.readouterr().out)
    assert shown == ["> a", "b", "|> b|> acc", "|"]
    printer.update(closed=True)
    assert capsys.readouterr().out == ""


COMMAND = [sys.executable, str(ROOT / "sample.py"), "--out_dir=out", "--device=cpu"]


def test_a_reader_that_leaves(write: Write):
    """As `| head -1`: no complaint."""
    command = [*COMMAND, "--num_samples=3", "--max_new_tokens=3000", "--start=a"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read().splitlines() == ["sampling from out/ckpt/step-000020"]


def test_ctrl_c_loses_no_text(write: Write):
    command = [*COMMAND, "--num_samples=3", "--max_new_tokens=1000000", "--start=dab"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    begin = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    texts = (begin + rest).split(f"\n{SEPARATOR}\n")
    assert process.returncode == 130
    assert told.splitlines()[-1] == "interrupted"
    assert len(texts) == 4
    assert all(text[:3] == "dab" and len(text) > 20 for text in texts[:3])


def test_a_conversation_by_pipe(write: Write):
    """Only texts on standard output."""
    command = [*COMMAND, "--interactive=True", "--max_new_tokens=5", "--temperature=0", "--dtype=float32"]
    done = subprocess.run(command, env=environment(), input="\ndab\n\n", capture_output=True, text=True, timeout=60)
    expected = by_hand(GPT.from_checkpoint("out"), "dab", 10)
    assert done.returncode == 0
    assert done.stdout == f"{expected[:8]}\n{expected[8:]}\n"
    assert "error: there is no text yet that could go on" in done.stderr


def test_a_conversation_in_a_terminal(write: Write):
    """A real one: Ctrl-C stops the text and not the program, Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--interactive=True", "--max_new_tokens=1000000", "--temperature=0", "--dtype=float32"]
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, process_group=0)
    os.close(theirs)
    seen = ""

    def until(what: str) -> None:
        nonlocal seen
        while what not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096).decode()
        seen = seen.partition(what)[2]

    expected = by_hand(GPT.from_checkpoint("out"), "dab", 20)
    until("> ")
    for _ in range(2):
        os.write(ours, b"dab\n")
        until(expected)
        process.send_signal(signal.SIGINT)
        until("tok/s")
        until("> ")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0


def test_what_does_not_go_together(write: Write):
    for flag in ("--start=a", "--num_samples=3"):
        with pytest.raises(InputError, match=f"^{flag[2:].partition('=')[0]}: an interactive text"):
            write("--interactive=True", flag)
    with pytest.raises(InputError, match="float16: on a CPU only where"):
        write("--dtype=float16", "--compile=True")


@pytest.mark.slow
def test_compiled(write: Write, capsys: pytest.CaptureFixture[str]):
    keys = ("--start=dab", "--temperature=0")
    assert write(*keys, "--compile=True") == write(*keys)


def test_the_command_line(write: Write):
    """As a process: all text on standard output."""
    command = [sys.executable, ROOT / "sample.py", "--out_dir=out", "--start=abc", "--num_samples=3", "--device=cpu"]
    done = subprocess.run([*command, "--max_new_tokens=10"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0
    first, second = done.stderr.splitlines()
    assert first == "sampling from out/ckpt/step-000020"
    assert re.fullmatch(r"\d+\.\d tok/s \(30 tokens in \d+\.\d s\)", second)
    texts = done.stdout.split(f"\n{SEPARATOR}\n")
    assert [len(text) for text in texts] == [13, 13, 13, 0]
