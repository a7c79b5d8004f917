"""Random content of JSON files, config files and flags: it is accepted, or refused in lines, never with a traceback."""

import contextlib
import copy
import hashlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, Run, flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bench
import evaluate
import export
import play
import sample
import train
from configurator import parse
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import Rows
from nanogpt.data.write import format_summary
from nanogpt.errors import InputError, RunStopped
from nanogpt.schema import options, type_hints

KEYS = [*vars(train.TrainConfig())]
# Derandomized, so that a change that passes here passes everywhere.
FUZZ = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])

numbers = st.sampled_from([-1, 0, 1, 2, 7, 64, 2**63, 10**400, 0.5, -0.0, 1e-9, 1e300, float("inf"), float("nan")])
words = st.sampled_from(["", "x", "scratch", "gpt2", "auto", "True", "erf", "uint32", "é\n", "../..", "/", "a" * 300])
scalars = st.none() | st.booleans() | numbers | words | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=5)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in a JSON value with each of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *places(item)]]


@st.composite
def mutated(draw: st.DrawFn, real: dict[str, Any]) -> Any:
    """A real file's content with one to three places changed, deleted or renamed; sometimes something else."""
    value = copy.deepcopy(real)
    if draw(st.integers(0, 20)) == 0:
        return draw(values)
    for _ in range(draw(st.integers(1, 3))):
        candidates = places(value)
        container, key = candidates[draw(st.integers(0, len(candidates) - 1))]
        change = draw(st.sampled_from(["same type", "same type", "same type", "other", "delete", "rename"]))
        if change == "other":
            container[key] = draw(values)
        elif change == "same type":
            same_type: Any = {int: st.integers(0, 99), float: numbers, bool: st.booleans(), str: words}
            container[key] = draw(same_type.get(type(container[key]), scalars))
        elif change == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[draw(words)] = container.pop(key)
    return value


def contents(real: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Bytes of a JSON file, most of them close to real ones."""
    text = json.dumps(real)
    cut = st.integers(0, len(text)).map(lambda n: text[:n].encode())
    return mutated(real).map(lambda value: json.dumps(value).encode()) | cut | st.binary(max_size=9)


def test_any_meta_json_is_accepted_or_refused(letters: Path, tmp_path: Path):
    folder = shutil.copytree(letters, tmp_path / "data")
    real = json.loads((folder / "meta.json").read_text())
    accepted = []

    @settings(FUZZ, max_examples=250)
    @given(contents(real))
    def check(content: bytes) -> None:
        (folder / "meta.json").write_bytes(content)
        with contextlib.suppress(InputError):
            data = open_dataset(folder, block_size=16, verify=True)
            assert data.vocab_size
            Rows(data.train, 16, data.vocab_size, 1)[0:4]
            assert format_summary(data.meta)
            accepted.append(content)

    check()
    assert len(accepted) > 5


def test_any_state_json_is_accepted_or_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With hashes that match, up to an evaluation with all of the state restored."""
    run(out_dir="out", max_iters=2, dtype="float16", skip_spikes=9)
    path = Path("out/ckpt/step-000002")
    real = json.loads((path / "state.json").read_text())
    hashes = json.loads((path / "MANIFEST.json").read_text())["sha256"]
    quick = ["--device=cpu", "--compile=False", "--deterministic=False", "--eval_iters=1", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir=out", "--resume=True", "--eval_only=True", *quick])
    statuses = []

    @settings(FUZZ, max_examples=200)
    @given(contents(real))
    def check(content: bytes) -> None:
        (path / "state.json").write_bytes(content)
        signed = hashes | {"state.json": hashlib.sha256(content).hexdigest()}
        (path / "MANIFEST.json").write_text(json.dumps({"sha256": signed}, indent=1))
        with contextlib.suppress(InputError, RunStopped):
            statuses.append(train.main())
        capsys.readouterr()

    check()
    assert set(statuses) == {0}
    assert len(statuses) > 8


# Neither powers nor shifts nor endless loops: a config file is code, and may take as long as it likes.
PYTHON = """
import nothing
seed = -1 + 2.5 / 0
if seed == 1e999 : n_layer , block_size = [ 7 ] , None
else : dropout += 'x' # or
for _x in { 1 : ( 2 ) } : del compile
def f ( x ) : return lambda : f'{ x
raise ValueError
class A : assert 0x __file__ . __builtins__ \\
"""
pieces = st.sampled_from(re.findall(r"\S+|\n", PYTHON))
literals = st.integers(1, 99).map(str) | scalars.map(repr) | pieces | values.map(repr)
assignments = st.builds("{} = {}\n".format, st.sampled_from([*KEYS, "_x", "seeed", "__file__"]), literals)
texts = (
    st.lists(assignments, max_size=3).map("".join)
    | st.lists(pieces).map(" ".join)
    | st.text("ab01=+-/%()[]{}:,.'\"\\#\n\t é\0")
)


def is_accepted(argv: list[str]) -> bool:
    """Whether train.py takes that command line; False where it is refused in lines, or is one for help."""
    with contextlib.suppress(InputError, SystemExit):
        config, _ = parse(train.TrainConfig, argv)
        train.check_config(config)
        return True
    return False


@pytest.mark.filterwarnings("ignore")  # of the syntax of random text
def test_any_config_file_is_accepted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    accepted = []

    @settings(FUZZ, max_examples=400)
    @given(texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=9))
    def check(content: bytes) -> None:
        Path("file.py").write_bytes(content)
        accepted.append(is_accepted(["file.py"]))

    check()
    assert 20 < sum(accepted) < len(accepted) - 20


def test_any_flags_are_accepted_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    names = st.sampled_from([*KEYS, "seeed", "", "-", "n-layer", "help"]) | st.text(max_size=4)
    odd = st.sampled_from(["9" * 5000, "1e5", "0x1", "--"])
    texts = scalars.map(str) | values.map(repr) | st.text(max_size=9) | odd
    flags = st.builds("--{}={}".format, names, texts) | names.map("--{}".format) | texts
    good = st.sampled_from(["--seed=7", "--dropout=0.1", "--bias", "True", "--compile=auto", "--n_layer", "1e1"])
    accepted = []

    @settings(FUZZ, max_examples=400)
    @given(st.lists(flags | good, max_size=6) | st.lists(good, max_size=3))
    def check(argv: list[str]) -> None:
        accepted.append(is_accepted(argv))
        capsys.readouterr()

    check()
    assert 20 < sum(accepted) < len(accepted) - 20


# --- Extreme numbers, for each key of each script

EXTREME = ["0", "-1", "1e300", "1e-320", "nan", "inf", str(2**63 - 1), str(2**31)]
look, prepare = (SimpleNamespace(**runpy.run_path(str(ROOT / f"data/{name}.py"))) for name in ("look", "prepare"))
CONFIGS = {
    "train": train.TrainConfig,
    "sample": sample.SampleConfig,
    "evaluate": evaluate.EvaluateConfig,
    "export": export.ExportConfig,
    "bench": bench.BenchConfig,
    "play": play.PlayConfig,
    "look": look.LookConfig,
    "prepare": prepare.PrepareConfig,
}
ENDLESS = {"minutes", "max_iters", "num_samples", "max_new_tokens"}  # large ones never end


def numeric_keys(config: type) -> list[str]:
    return [name for name, hint in type_hints(config).items() if {int, float} & set(options(hint))]


@pytest.mark.parametrize("script", CONFIGS)
def test_extreme_numbers_are_refused_in_a_line(script: str):
    for key in numeric_keys(CONFIGS[script]):
        for text in EXTREME:
            problem = None
            try:
                parse(CONFIGS[script], [f"--{key}={text}"])
            except InputError as error:
                problem = str(error)
            assert problem or text not in ("nan", "inf")
            assert problem is None or re.fullmatch(rf"--{key}={re.escape(text)}: .*", problem)


def test_large_numbers_that_mean_never_or_all_are_accepted():
    """Runs of version 0.1 may have them; rope_theta is that of a published model with a long context."""
    flags = ("--grad_clip=1e30", "--eval_interval=1000000000000", "--eval_iters=9999999999", "--rope_theta=3580165449")
    parse(train.TrainConfig, [*flags, "--arch=modern", f"--seed={2**63 - 1}", f"--loss_chunk={2**40}"])


TRAIN = [*flags(max_iters=2, eval_interval=1), "--dataset=letters", "--out_dir=new"]
COMMANDS: dict[str, tuple[Any, list[str]]] = {
    "train": (train.main, TRAIN),
    "modern": (train.main, [*TRAIN, "--arch=modern", "--optimizer=muon", "--bias=False"]),
    "sample": (sample.main, ["--start=ab", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]),
    "evaluate": (evaluate.main, ["--device=cpu", "--dtype=float32"]),
    "export": (export.main, ["--to=exported"]),
    "look": (look.main, ["--run=out", "--length=9"]),
    "rows": (look.main, ["--run=out", "--step=1", "--length=9"]),
    "prepare": (prepare.main, ["--input=text.txt", "--tokenizer=bpe:300", "--out=prepared", "--workers=1"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_extreme_numbers_that_are_accepted_work(
    run: Run, letters: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Status 0, or an error in lines."""
    Path("letters").symlink_to(letters)
    Path("text.txt").write_text("".join(f"The {n}th line.\n" for n in range(300)))
    run(out_dir="out", max_iters=2, dataset="letters")
    main, argv = COMMANDS[name]
    config = CONFIGS[{"modern": "train", "rows": "look"}.get(name, name)]
    statuses = []
    for key in sorted(set(numeric_keys(config)) - ENDLESS - {"workers"}):
        for text in EXTREME:
            for folder in ("new", "exported", "prepared"):
                shutil.rmtree(folder, ignore_errors=True)
            monkeypatch.setattr(sys, "argv", [name, *argv, f"--{key}={text}"])
            with contextlib.suppress(InputError, RunStopped):
                statuses.append(main() or 0)
            capsys.readouterr()
    assert set(statuses) == {0}
