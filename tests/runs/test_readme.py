"""The README's commands, in its order: run on small data, or only parsed where they need a network or much time."""

import re
import shlex
import shutil
import string
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, run_script

import configurator

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Flags that make a run small, by script. A script that is not here fails the test.
SMALL = {
    "data/shakespeare_char/prepare.py": "--input=my.txt --out=data/shakespeare_char",
    "data/prepare.py": "--workers=1",
    "data/look.py": "",
    "train.py": "--device=cpu --n_layer=1 --batch_size=2 --block_size=32 --max_iters=2 --eval_iters=1",
    "sample.py": "--device=cpu --num_samples=1 --max_new_tokens=3",
    "evaluate.py": "--device=cpu",
    "export.py": "",
}
# Parts of commands that are only parsed: they need the hub, a download, minutes, or an end by Ctrl-C.
ONLY_PARSED = ("gpt2", "openwebtext", "data/shakespeare/", "--minutes", "play.py")


def find_commands(readme: str) -> list[str]:
    """Commands in blocks whose first line is one, and in inline code, in their order; `$ ` marks one among output."""
    commands = []
    for block, inline in re.findall(r"^```\n(.*?)^```|`([^`]+)`", readme, flags=re.MULTILINE | re.DOTALL):
        lines = [inline.replace("\n", " ")] if inline else block.splitlines()
        if lines[0].startswith("$ "):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        if re.match(r"(python3?|pip|make|torchrun) ", lines[0]):
            commands += lines
    return commands


class ParsedError(Exception):
    """Raised once a script has parsed its flags."""


def check_python(words: list[str]) -> None:
    script, *arguments = words
    files = [str(ROOT / word) if word.startswith("config/") else word for word in arguments]
    if not any(part in " ".join(words) for part in ONLY_PARSED):
        assert run_script(script, *files, *SMALL[script].split()) == 0
        return

    original = configurator.parse

    def parse(*args, **kwargs):
        raise ParsedError(original(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configurator, "parse", parse)
        with pytest.raises(ParsedError):
            run_script(script, *files)


def check_command(command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "python":
        check_python(words)
    elif program == "torchrun":
        check_python([word for word in words if word not in ("--standalone", "--nproc_per_node=8")])
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "pip":
        pinned = [word for word in words if "==" in word]
        assert set(pinned) <= set((ROOT / "constraints.txt").read_text().split())
        assert pinned or words[:3] == ["install", "-c", "constraints.txt"]
    else:
        assert command == "python3 -m venv .venv && . .venv/bin/activate"


def test_commands_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = f"{string.printable} To be, or not to be.\n" * 50
    for path in ("my.txt", "notes/more.md"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(text)
    lines = "".join(f'{{"text": "A line, number {n}."}}\n' for n in range(500))  # some are in the val split
    Path("more").mkdir()
    Path("more/lines.jsonl.zst").write_bytes(pytest.importorskip("zstandard").compress(lines.encode()))

    commands = find_commands(README)
    assert len(commands) > 20
    for command in commands:
        if "_rte=" in command:  # the example of mistakes
            continue
        if "--out_dir=out-shakespeare " in command:  # its run starts from a download
            shutil.copytree("out-shakespeare-fast-cpu", "out-shakespeare")
        check_command(command)
    exported = {path.name for path in Path("exports/shakespeare").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported


def test_mistakes_are_reported_as_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pattern = r"^\$ python (\S+) (.*)\n((?:error: .*\n)+)"
    script, flags, output = re.search(pattern, README, flags=re.MULTILINE).groups()
    monkeypatch.chdir(ROOT)
    assert run_script(script, *flags.split()) == 2
    assert capsys.readouterr().err == output


def test_extras_and_flags_in_the_text_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", README)) <= set(extras)
    keys = set(re.findall(r"`--(\w+)[=`]", README)) - {"key"}
    assert len(keys) > 5
    assert keys <= set(re.findall(r"^    (\w+): .*= key\(", (ROOT / "train.py").read_text(), flags=re.MULTILINE))
