"""sample.py as a user calls it."""

import itertools
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, call_main, environment, flags
from random_models import build_gpt2, save_as_nanogpt

import sample
import train
from model import GPT
from nanogpt.errors import InputError
from nanogpt.generate.sampling import window_start
from nanogpt.generate.stream import TextStream
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

CPU = ("--device=cpu", "--dtype=float32")
COMMAND = [sys.executable, str(ROOT / "sample.py"), "--out_dir=out", *CPU]
GREEDY = ("--temperature=0", "--num_samples=1")
Write = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trained(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's out_dir."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert call_main(train.main, *flags(dataset=letters, out_dir=folder, eval_interval=10)) == 0
    return folder


@pytest.fixture
def write(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Write:
    """`write("--flag" …)`: the samples that sample.py writes. The folder `out` holds a run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "out")

    def write_samples(*flags: str) -> list[str]:
        call_main(sample.main, "--num_samples=2", "--max_new_tokens=25", *CPU, *flags)
        *samples, rest = capsys.readouterr().out.split(sample.SEPARATOR)
        assert rest == ""
        return samples

    return write_samples


def greedy(model: Any, prompt: str, count: int, block_size: int) -> str:
    """The prompt and `count` letters, from a forward pass of the window for each."""
    ids = ["abcd".index(letter) for letter in prompt]
    for _ in range(count):
        output = model(torch.tensor([ids[window_start(len(ids), block_size) :]]))
        logits = output[0] if isinstance(output, tuple) else output.logits
        ids.append(int(logits[0, -1].argmax()))
    return "".join("abcd"[i] for i in ids)


def greedy_run(prompt: str, count: int, folder: str = "out") -> str:
    return greedy(GPT.from_checkpoint(folder).eval(), prompt, count, 16)


# --- The model


def test_sample_continues_the_prompt_greedily(write: Write):
    expected = greedy_run("dab", 25)
    assert write("--start=dab", "--temperature=0") == [expected, expected]
    Path("prompt.txt").write_text("dab")
    for filters in ("--top_k=1", "--top_p=1e-9", "--min_p=0.999999"):
        assert write("--start=FILE:prompt.txt", "--temperature=1", filters) == [expected, expected]


def test_sample_reads_the_named_checkpoint(write: Write):
    for flag, folder in {
        "--checkpoint=latest": "step-000020",
        "--checkpoint=step-000010": "step-000010",
        "--init_from=out/ckpt/step-000010": "step-000010",
    }.items():
        assert write("--start=bb", *GREEDY, "--max_new_tokens=60", flag) == [greedy_run("bb", 60, f"out/ckpt/{folder}")]


def test_sample_reads_nanogpt_s_checkpoint(write: Write, foreign: Any):
    """nanoGPT keeps the characters beside the data, whose name its checkpoint holds."""
    Path("nano").mkdir()
    expected = greedy(save_as_nanogpt(foreign, Path("nano/ckpt.pt"), config={"dataset": "letters"}), "c", 50, 32)
    assert len(set(expected)) > 1
    Path("data/letters").mkdir(parents=True)
    Path("data/letters/train.bin").write_bytes(b"")
    Tokenizer.characters("abcd").save("data/letters")
    for flag in ("--init_from=nano/ckpt.pt", "--out_dir=nano"):  # the latter as nanoGPT's users call it
        assert write("--start=c", *GREEDY, "--max_new_tokens=50", flag) == [expected]


def test_sample_writes_no_ids_without_a_token(write: Write, foreign: Any):
    """Qwen3 as released has 151,936 rows and 151,669 tokens."""
    foreign.save_pretrained("wide")
    Tokenizer.characters("abc").save("wide")
    options = ("--init_from=wide", "--start=c", "--temperature=9", "--max_new_tokens=200")
    assert set("".join(write(*options))) == set("abc")


def test_sample_takes_no_other_vocabulary_for_gpt2_s(write: Write):
    """A vocab.json without tokenizer.json says that the 50,257 ids are others."""
    build_gpt2(vocab_size=GPT2_VOCAB).save_pretrained("foreign")
    Path("foreign/vocab.json").write_text("{}")
    with pytest.raises(InputError, match="foreign has no tokenizer, and its 50257 ids may not be GPT-2's"):
        write("--init_from=foreign", "--start=a")


def test_sample_that_runs_out_of_memory_says_what_needs_less(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sample.Decoder, "generate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(InputError, match="not enough memory for this model: try --dtype=bfloat16, or fewer --max_new"):
        write("--start=a")


def test_chat_refuses_a_template_that_ends_no_answer(write: Write, foreign: Any):
    foreign.save_pretrained("plain")
    tokenizer = Tokenizer.characters("abcd")
    tokenizer.template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save("plain")
    with pytest.raises(InputError, match="ends an answer with no special token: restore the template"):
        write("--init_from=plain", "--start=a", "--chat=True")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start="], r"^--start: the prompt is empty"),
        (["--start=FILE:none.txt"], r"^--start=FILE:none.txt: .*No such file"),
        (["--out_dir=nothing"], r"^nothing .*--out_dir=nothing"),
        (["--checkpoint=step-000015"], r"checkpoint=step-000015: .*step-000020, step-000010"),
        (["--interactive=True", "--start=a"], r"^--start: an interactive session"),
        (["--interactive=True", "--num_samples=3"], r"^--num_samples: an interactive session"),
        (["--chat=True"], r"^--chat=True: there is no question"),
        (["--dtype=float16", "--compile=True"], r"^--dtype=float16: .*--compile=False"),
    ],
)
def test_sample_refuses_wrong_usage(write: Write, arguments: list[str], message: str):
    with pytest.raises(InputError, match=message):
        write(*arguments)


# --- The text


def test_samples_come_in_groups_where_memory_is_limited(
    write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    together = write("--start=dab", "--num_samples=5")
    monkeypatch.setattr(sample, "decoder_rows_that_fit", lambda *args: 2)
    call_main(sample.main, "--start=dab", "--num_samples=5", "--max_new_tokens=25", *CPU)
    printed = capsys.readouterr()
    assert printed.out.split(sample.SEPARATOR) == [*together, ""]
    source, groups, *speeds = printed.err.splitlines()
    assert source == "sampling from out/ckpt/step-000020"
    assert groups.startswith("2 of 5 samples at a time")
    counts = [re.fullmatch(r"\d+\.\d tok/s \((\d+) tokens in \d+\.\d s\)", line)[1] for line in speeds]
    assert counts == ["50", "50", "25"]


def test_samples_each_end_before_their_stop_string(write: Write):
    options = ("--start=a", "--num_samples=5", "--temperature=1")
    samples = write(*options)
    assert write(*options, "--stop=b") == ["a" + text[1:].partition("b")[0] for text in samples]
    assert len({text[1:].find("b") for text in samples}) > 1


def test_sample_shows_the_probability_of_each_token(write: Write, monkeypatch: pytest.MonkeyPatch):
    """In a terminal by color, elsewhere in a line for each token."""
    options = ("--start=dab", *GREEDY, "--max_new_tokens=5", "--logprobs=True")
    text = greedy_run("dab", 5)
    expected = "dab"
    for n in range(3, 8):
        ids = torch.tensor([["abcd".index(letter) for letter in text[:n]]])
        expected += f"\n{100 * GPT.from_checkpoint('out').eval()(ids)[0].softmax(-1).max():6.1f}%  {text[n]!r}"
    assert write(*options) == [expected]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert write(*options) == [expected]
    monkeypatch.setenv("NO_COLOR", "")
    assert re.sub("\033\\[38;5;\\d+m(.)\033\\[0m", r"\1", write(*options)[0]) == text


@pytest.mark.slow
def test_sample_compiled_writes_the_same(write: Write):
    for count in (1, 25):
        options = ("--start=d", "--temperature=0", f"--max_new_tokens={count}")
        assert write(*options, "--compile=True") == write(*options)


# --- An interactive session


def test_interactive_session(write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A line is a prompt, an empty one continues the text; errors are printed; Ctrl-C stops the text alone."""

    def converse(*lines: Any, temperature: int = 0) -> tuple[list[str], str]:
        """The lines that are printed, and the messages."""
        monkeypatch.setattr("builtins.input", Mock(side_effect=[*lines, EOFError()]))
        options = ("--interactive=True", "--max_new_tokens=8", f"--temperature={temperature}")
        call_main(sample.main, *CPU, *options)
        printed = capsys.readouterr()
        return printed.out.splitlines(), printed.err

    expected = greedy_run("dab", 16)
    texts, messages = converse("", "dab", "", "Zz", KeyboardInterrupt(), "a" * 17, "c")
    assert texts == [expected[:11], expected[11:19], greedy_run("c", 8)]
    for error in ("there is no text to continue yet", "the character tokenizer has no id for 'Z'", "the prompt has 17"):
        assert f"error: {error}" in messages

    one, other, *more = converse("c", "c", "", "", temperature=1)[0]
    assert one != other  # each turn has noise of its own
    assert [len(text) for text in more] == [8, 8]  # beyond the context too

    tokens = itertools.count()
    original = TextStream.put

    def put(self: TextStream, token: int) -> str:
        if next(tokens) == 3:
            raise KeyboardInterrupt
        return original(self, token)

    monkeypatch.setattr(TextStream, "put", put)
    assert converse("c", "c")[0] == [greedy_run("c", 3), greedy_run("c", 8)]


def test_interactive_session_in_a_terminal(write: Write):
    """Ctrl-C stops the text and not the program, Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, "--interactive=True", "--max_new_tokens=1000000", "--temperature=0"]
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, process_group=0)
    os.close(theirs)
    output = ""

    def wait_for(text: str) -> None:
        nonlocal output
        while text not in output:
            assert select.select([ours], [], [], 60)[0], output
            output += os.read(ours, 4096).decode()
        output = output.partition(text)[2]

    expected = greedy_run("dab", 20)
    wait_for("> ")
    for _ in range(2):
        os.write(ours, b"dab\n")
        wait_for(expected)
        process.send_signal(signal.SIGINT)
        wait_for("tok/s")
        wait_for("> ")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0


# --- The process


def test_ctrl_c_loses_no_text(write: Write):
    command = [*COMMAND, "--num_samples=3", "--max_new_tokens=1000000", "--start=dab"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    *samples, end = (begin + rest).split(sample.SEPARATOR)
    assert len(samples) == 3
    assert end == ""
    assert all(text[:3] == "dab" and len(text) > 20 for text in samples)
