"""configurator.py: what flags and files may set, which wins, and that every mistake is named at once."""

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

from configurator import key, parse
from load import make_schedule
from nanogpt.errors import InputError
from train import TrainConfig


@dataclass
class Demo:
    out_dir: str = key("out", "where the run lives", group="Files")
    note: str | None = key(None, "a remark")
    batch_size: int = key(12, "rows", group="Batches", ge=1)
    seed: int = key(1337, "seed")
    dropout: float = key(0.0, "share of units left out, 10% = 0.1", group="Model", ge=0, lt=1)
    learning_rate: float = key(6e-4, "step size", gt=0)
    min_lr: float | None = key(None, "lowest step size")
    top_k: int | None = key(200, "candidates", le=1000)
    max_iters: int = key(100, "updates")
    eval_only: bool = key(False, "evaluate and stop")
    compile: Literal["auto", True, False] = key("auto", "use torch.compile")
    dtype: Literal["auto", "float32"] = key("auto", "number format")
    words: list[str] = key([], "any number of them")


def errors(*argv: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse(Demo, argv)
    return str(caught.value).splitlines()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        Path(name).write_text(text)
        return name

    return write


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("batch_size=5e3", 5000),
        ("seed=-1", -1),
        ("learning_rate=1e-3", 0.001),
        ("top_k=none", None),
        ("eval_only=False", False),
        ("compile=auto", "auto"),
        ("compile=true", True),
        ("out_dir=123", "123"),
        ("out_dir=None", "None"),
        ("out_dir=", ""),
        ("out_dir=a=b --c", "a=b --c"),
        ("note=None", None),
        ("note=1e3", "1e3"),
    ],
)
def test_flag_values(flag, value):
    name, text = flag.split("=", 1)
    for argv in ([f"--{flag}"], [f"--{name}", text]):
        config, explicit = parse(Demo, argv)
        assert (getattr(config, name), type(getattr(config, name))) == (value, type(value))
        assert explicit == {name: value}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--BATCH_size=1", "no such key; did you mean --batch_size?"),
        ("--zzz=1", "no such key; --help lists them"),
        ("--batch_size=2.5", "expected a whole number, got 2.5"),
        ("--top_k=1001", "must be at most 1,000, is 1001"),
        ("--dtype=float8", "expected auto or float32, got 'float8'"),
        ("--max_iters", "needs a value, as in --max_iters=100"),
    ],
)
def test_flag_mistakes(flag, message):
    assert errors(flag) == [f"{flag}: {message}"]


def test_flags_may_have_hyphens_and_bools_no_value():
    explicit = parse(Demo, ["--batch-size", "3", "--eval-only", "--seed=5"])[1]
    assert explicit == {"batch_size": 3, "eval_only": True, "seed": 5}
    assert parse(Demo, ["--eval_only", "False"])[1] == {"eval_only": False}
    assert errors("--eval_only", "recipe.py") == ["recipe.py: no such file or directory"]  # read as a config file
    assert errors("--max_iters", "--seed", "-1") == ["--max_iters: needs a value, as in --max_iters=100"]


def test_a_list_takes_all_words_up_to_the_next_flag():
    for argv in (["--words", "a", "b=c", "--seed=1"], ["--words=a", "--seed", "1", "--words", "b=c"]):
        config, explicit = parse(Demo, argv)
        assert explicit == {"words": ["a", "b=c"], "seed": 1}
        assert config.words == ["a", "b=c"]
    assert errors("--words", "--seed=1") == ["--words: needs a value"]


def test_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(Demo, ["--out_dir=~/run", "--note=~"])[1] == {"out_dir": "/home/me/run", "note": "~"}


def test_words_without_a_flag_fill_the_positional_key():
    assert parse(Demo, ["here", "--seed", "1"], positional="out_dir")[1] == {"out_dir": "here", "seed": 1}
    assert parse(Demo, ["a", "--seed=1", "b.py"], positional="words")[1] == {"words": ["a", "b.py"], "seed": 1}
    with pytest.raises(InputError, match="--out_dir=here there: takes one value, got 2"):
        parse(Demo, ["here", "there"], positional="out_dir")


def test_a_key_without_default_is_required(capsys):
    @dataclass
    class Required:
        runs: list[str] = key(..., "folders")

    assert parse(Required, ["a"], positional="runs")[0].runs == ["a"]
    with pytest.raises(InputError, match="--runs is missing"):
        parse(Required, [], positional="runs")
    with pytest.raises(SystemExit):
        parse(Required, ["--help"], positional="runs")
    assert "folders (required)" in capsys.readouterr().out


def test_later_files_win_over_earlier_and_flags_over_files(write):
    one = write("one.py", "batch_size = 1\nmax_iters = 5e3\nseed = 1")
    two = write("two.py", "batch_size = batch_size + 1\ndropout = max_iters / 20_000\nseed += 1")
    config, explicit = parse(Demo, ["--seed=9", one, "--seed", "8", two])
    assert explicit == {"batch_size": 2, "max_iters": 5000, "dropout": 0.25, "seed": 8}
    assert explicit.flags == {"seed"}
    assert config == Demo(**explicit)


def test_a_file_is_python_and_sets_only_what_it_assigns(write):
    text = """
import time, math as compile_time
_half = 0.5
def scaled(rate):
    local = rate * _half
    return local + 0 * batch_size
if out_dir == "out":
    max_iters = sum(n for n in range(4))
else:
    eval_only = True
for _ in range(2):
    learning_rate = scaled(learning_rate)
note = "x" + str(time.time())
min_lr = learning_rate / 10
compile = False
"""
    config, explicit = parse(Demo, [write("recipe.py", text)])
    assert set(explicit) == {"max_iters", "learning_rate", "note", "min_lr", "compile"}
    assert (config.max_iters, config.learning_rate, config.min_lr) == (6, 1.5e-4, 1.5e-4 / 10)


def test_a_key_imported_from_another_file_counts(write, monkeypatch):
    write("shared_recipe_values.py", "seed = 5")
    monkeypatch.syspath_prepend(".")
    assert parse(Demo, [write("recipe.py", "from shared_recipe_values import seed")])[1] == {"seed": 5}


def test_every_problem_of_files_and_flags_is_reported_at_once(write):
    good = write("good_recipe.py", "seed = 3")
    bad = write(
        "bad.py", "max_itrs = 5\n\nout_dir = 123\ntokens = 1\nbatch_size = '8'\ndropout = 2\neval_only = 0\n1 / 0"
    )
    broken = write("broken.py", "seed = 1\nseed = = 2")
    text = write("a.txt", "seed = 5")
    assert errors(bad, "--seed=x", broken, text, good, "god_recipe.py", "--seeed=1", "batch_size=3") == [
        "bad.py:8: ZeroDivisionError: division by zero",
        "bad.py:1: max_itrs: no such key; did you mean max_iters?",
        "bad.py:3: out_dir: expected text, got 123",
        "bad.py:4: tokens: no such key; a name that is not a key must begin with _",
        "bad.py:5: batch_size: expected a whole number, got '8'",
        "bad.py:6: dropout: must be below 1, is 2.0",
        "bad.py:7: eval_only: expected True or False, got 0",
        "broken.py:2: not valid Python: invalid syntax",
        "a.txt: is not a config file, which ends in .py; give values with --key=value",
        "god_recipe.py: no such file or directory; did you mean good_recipe.py?",
        "batch_size=3: no such file; did you mean the flag --batch_size=3?",
        "--seed=x: expected a whole number, got 'x'",
        "--seeed=1: no such key; did you mean --seed?",
    ]


def test_a_missing_recipe_is_searched_for_in_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert errors("train_gtp2")[0].endswith(f"did you mean {Path('config/train_gpt2.py')}?")


def test_help_lists_every_key_by_group_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Demo, ["--nonsense", "--help"], "Shows keys.")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Files: --out_dir .*Batches: --batch_size .*--seed .*Model: --dropout", text)
    assert "share of units left out, 10% = 0.1 (default: 0.0)" in text
    assert all(f"--{field.name} " in text for field in dataclasses.fields(Demo))


@pytest.mark.parametrize(
    "nested", ["-" * 10**5 + "1", "(" * 10**5, "seed = " + "1 + " * 10**4 + "1", "[" * 90 + "]" * 90]
)
def test_a_deeply_nested_file_is_refused_in_a_line(write, nested):
    with contextlib.suppress(InputError):  # Python may take it
        parse(Demo, [write("file.py", nested)])


@pytest.mark.parametrize(
    ("recipe", "values", "floor"),
    [
        ("train_gpt2", {"gradient_accumulation_steps": 40, "batch_size": 12, "max_iters": 600000}, 6e-5),
        ("train_shakespeare_char", {"learning_rate": 1e-3, "beta2": 0.99, "n_embd": 384, "max_iters": 5000}, 1e-4),
        ("train_shakespeare_char_cpu", {"max_iters": 2000, "device": "cpu", "compile": False}, 1e-4),
    ],
)
def test_recipes_have_nanogpts_values_and_decay_if_made_shorter(recipe, values, floor):
    file = str(ROOT / f"config/{recipe}.py")
    assert parse(TrainConfig, [file])[1].items() >= values.items()
    shorter, _ = parse(TrainConfig, [file, "--max_iters=1000", "--warmup_iters=9"])
    assert make_schedule(shorter).lr(1000) == pytest.approx(floor)
