"""Whatever stands in a user's files and flags: what cannot be used is told in a line, nothing ends in a traceback."""

import contextlib
import copy
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from configurator import parse
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import Rows
from nanogpt.data.write import format_summary
from nanogpt.errors import InputError, RunStopped

KEYS = [*vars(train.TrainConfig())]
# Derandomized, so that a change that passes here passes everywhere.
FUZZ = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])

numbers = st.sampled_from([-1, 0, 1, 2, 7, 64, 2**63, 10**400, 0.5, -0.0, 1e-9, 1e300, float("inf"), float("nan")])
words = st.sampled_from(["", "x", "scratch", "gpt2", "auto", "True", "erf", "uint32", "é\n", "../..", "/", "a" * 300])
scalars = st.none() | st.booleans() | numbers | words | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3), max_leaves=5)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in a JSON value with each of its keys or indices."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in [(value, key), *places(part)]]


@st.composite
def mutated(draw: st.DrawFn, real: dict[str, Any]) -> Any:
    """A real file's content with one to three places changed, left out or named anew; now and then something else."""
    value = copy.deepcopy(real)
    if draw(st.integers(0, 20)) == 0:
        return draw(values)
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        container, key = found[draw(st.integers(0, len(found) - 1))]
        change = draw(st.sampled_from(["same kind", "same kind", "same kind", "other", "out", "renamed"]))
        if change == "other":
            container[key] = draw(values)
        elif change == "same kind":
            kinds: Any = {int: st.integers(0, 99), float: numbers, bool: st.booleans(), str: words}
            container[key] = draw(kinds.get(type(container[key]), scalars))
        elif change == "out":
            del container[key]
        elif isinstance(container, dict):
            container[draw(words)] = container.pop(key)
    return value


def contents(real: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Bytes of a file of JSON, mostly not far from real ones."""
    text = json.dumps(real)
    cut = st.integers(0, len(text)).map(lambda n: text[:n].encode())
    return mutated(real).map(lambda value: json.dumps(value).encode()) | cut | st.binary(max_size=9)


def test_meta_json(letters: Path, tmp_path: Path):
    folder = shutil.copytree(letters, tmp_path / "data")
    real = json.loads((folder / "meta.json").read_text())
    opened = 0

    @settings(FUZZ, max_examples=500)
    @given(contents(real))
    def check(content: bytes) -> None:
        nonlocal opened
        (folder / "meta.json").write_bytes(content)
        with contextlib.suppress(InputError):
            data = open_dataset(folder, block_size=16, verify=True)
            assert data.vocab_size
            Rows(data.train, 16, data.vocab_size, 1)[0:4]
            assert format_summary(data.meta)
            opened += 1

    check()
    assert opened > 5


def test_state_json(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """With hashes that vouch for it, up to an evaluation with all of the state restored."""
    run(out_dir="out", max_iters=2, dtype="float16", skip_spikes=9)
    path = Path("out/ckpt/step-000002")
    real = json.loads((path / "state.json").read_text())
    hashes = json.loads((path / "MANIFEST.json").read_text())["sha256"]
    quick = ["--device=cpu", "--compile=False", "--deterministic=False", "--eval_iters=1", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir=out", "--resume=True", "--eval_only=True", *quick])
    ended = []

    @settings(FUZZ, max_examples=500)
    @given(contents(real))
    def check(content: bytes) -> None:
        (path / "state.json").write_bytes(content)
        signed = hashes | {"state.json": hashlib.sha256(content).hexdigest()}
        (path / "MANIFEST.json").write_text(json.dumps({"sha256": signed}, indent=1))
        with contextlib.suppress(InputError, RunStopped):
            ended.append(train.main())
        capsys.readouterr()

    check()
    assert set(ended) == {0}
    assert len(ended) > 20


# Neither powers nor shifts nor loops without an end: a config file is code, and may take as long as it likes.
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


def try_to_parse(argv: list[str]) -> bool:
    """Whether train.py takes that command line; False where it says in lines why not, or only helps."""
    with contextlib.suppress(InputError, SystemExit):
        config, _ = parse(train.TrainConfig, argv)
        config.check()
        return True
    return False


@pytest.mark.filterwarnings("ignore")  # of the syntax of what is made up here
def test_config_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    taken = []

    @settings(FUZZ, max_examples=800)
    @given(texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=9))
    def check(content: bytes) -> None:
        Path("file.py").write_bytes(content)
        taken.append(try_to_parse(["file.py"]))

    check()
    assert 30 < sum(taken) < len(taken) - 30


@pytest.mark.parametrize(
    "nested", ["-" * 10**5 + "1", "(" * 10**5, "seed = " + "1 + " * 10**4 + "1", "[" * 90 + "]" * 90]
)
def test_deeply_nested_config_files(tmp_path: Path, nested: str):
    (tmp_path / "file.py").write_text(nested)
    try_to_parse([str(tmp_path / "file.py")])


def test_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    names = st.sampled_from([*KEYS, "seeed", "", "-", "n-layer", "help"]) | st.text(max_size=4)
    texts = (
        scalars.map(str) | values.map(repr) | st.text(max_size=9) | st.sampled_from(["9" * 5000, "1e5", "0x1", "--"])
    )
    flags = st.builds("--{}={}".format, names, texts) | names.map("--{}".format) | texts
    good = st.sampled_from(["--seed=7", "--dropout=0.1", "--bias", "True", "--compile=auto", "--n_layer", "1e1"])
    taken = []

    @settings(FUZZ, max_examples=800)
    @given(st.lists(flags | good, max_size=6) | st.lists(good, max_size=3))
    def check(argv: list[str]) -> None:
        taken.append(try_to_parse(argv))
        capsys.readouterr()

    check()
    assert 30 < sum(taken) < len(taken) - 30


NO_NAMES = ["a" * 5000, "a/" * 5000, "nul\0", "half \ud800", "/dev/null/x"]


@pytest.mark.parametrize("keys", [{key: name} for key in ("out_dir", "dataset", "init_from") for name in NO_NAMES])
def test_names_that_no_file_has(run: Run, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises_no_network)
    for resume in (False, True, "auto"):
        with pytest.raises(InputError):
            run(max_iters=1, resume=resume, **keys)


def raises_no_network(*_: Any, **__: Any) -> None:
    raise OSError("no network")


@pytest.mark.parametrize("number", [2**63, -(2**63), 10**30])
def test_numbers_that_nothing_could_take(number: int):
    with pytest.raises(InputError, match=f"--seed={number}: expected a whole number, got"):
        parse(train.TrainConfig, [f"--seed={number}"])


@pytest.fixture(autouse=True)
def same_torch() -> Any:
    """What a run set for its process is put back."""
    yield
    torch.use_deterministic_algorithms(False)
