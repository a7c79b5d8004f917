"""Cases of pictures and numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from cases.command import Case, Result, run

TINY = [
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4"),
    *("--gradient_accumulation_steps=1", "--max_iters=2", "--eval_iters=1", "--sample_chars=0"),
    *("--device=cpu", "--dtype=float32", "--compile=False"),
]


def write_run(folder: Path, name: str, seed: int, losses: list[float | None], copies: int = 1) -> Path:
    """A run's folder as compare.py reads it; its lines are there `copies` times."""
    run_dir = folder / name
    (run_dir / "ckpt" / "step-000020").mkdir(parents=True)
    state = {"config": {"seed": seed, "n_layer": 2}}
    (run_dir / "ckpt" / "step-000020" / "state.json").write_text(json.dumps(state))
    lines = []
    for n, loss in enumerate(losses):
        position = {"step": 10 * n, "tokens": 1000 * n, "time_s": 1.0 * n}
        lines.append(json.dumps(position | {"train_loss": 1.0, "val_loss": loss, "val_bpb": None}) + "\n")
    (run_dir / "metrics.jsonl").write_text("".join(lines) * copies)
    return run_dir


def compare(checkout: Path, folder: Path, *runs: Path | str, out: str = "picture.png") -> Result:
    return run(checkout, "compare.py", *map(str, runs), f"--out={folder / out}")


def same_run_twice(checkout: Path, folder: Path) -> tuple[bool, str]:
    one = write_run(folder, "one", 1, [4.0, 3.0, 2.0])
    (folder / "link").symlink_to(one)
    result = compare(checkout, folder, one, folder / "link")
    return result.status == 0 and "±" not in result.output, result.last_line if result.status else find(result, "±")


def copied_run(checkout: Path, folder: Path) -> tuple[bool, str]:
    one = write_run(folder, "one", 1, [4.0, 3.0, 2.0])
    shutil.copytree(one, folder / "copy")
    result = compare(checkout, folder, one, folder / "copy")
    return result.status == 0 and "±" not in result.output, result.last_line if result.status else find(result, "±")


def find(result: Result, text: str) -> str:
    """The first line of output with this text."""
    return next((line for line in result.output.splitlines() if text in line), f"no {text}")


def concatenated(checkout: Path, folder: Path) -> tuple[bool, str]:
    result = compare(checkout, folder, write_run(folder, "one", 1, [4.0, 3.0, 2.0], copies=2))
    return result.is_clear_error, result.last_line


def null_position(checkout: Path, folder: Path) -> tuple[bool, str]:
    one = write_run(folder, "one", 1, [4.0, 3.0, 2.0])
    file = one / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 10,', '"step": null,'))
    result = compare(checkout, folder, one)
    return result.is_clear_error, result.last_line


def huge_loss(checkout: Path, folder: Path) -> tuple[bool, str]:
    result = compare(checkout, folder, write_run(folder, "one", 1, [4.0, 1e308, -1e308]))
    return result.is_clear_error, result.last_line


def without_suffix(checkout: Path, folder: Path) -> tuple[bool, str]:
    result = compare(checkout, folder, write_run(folder, "one", 1, [4.0, 3.0]), out="picture")
    written = sorted(path.name for path in folder.iterdir() if path.is_file())
    is_right = result.is_clear_error or (result.status == 0 and written == ["picture"])
    return is_right, f"says {Path(result.last_line).name}, wrote {', '.join(written)}"


def strange_names(checkout: Path, folder: Path) -> tuple[bool, str]:
    """Of the legend; an .svg holds its texts in comments."""
    runs = [write_run(folder, name, 1, [4.0, 3.0]) for name in ("_plain", "$x^{$", "other")]
    for path in runs:
        shutil.rmtree(path / "ckpt")
    result = compare(checkout, folder, *runs, out="picture.svg")
    if result.status:
        return False, result.last_line
    picture = (folder / "picture.svg").read_text()
    missing = [path.name for path in runs if not any(f"<!-- {space}{path.name} -->" in picture for space in ("", " "))]
    return not missing, f"missing in the legend: {', '.join(missing) or 'none'}"


def extreme(*arguments: str, script: str = "train.py") -> Callable[[Path, Path], tuple[bool, str]]:
    """A number that is refused in a line, or works."""

    def case(checkout: Path, folder: Path) -> tuple[bool, str]:
        text, data = folder / "text.txt", folder / "data"
        text.write_text("".join(f"The {n}th line of a text.\n" for n in range(300)))
        run(checkout, "data/prepare.py", f"--input={text}", "--tokenizer=byte", f"--out={data}")
        tiny = [*TINY, f"--dataset={data}", f"--out_dir={folder / 'out'}"]
        if script == "sample.py":
            run(checkout, "train.py", *tiny)
            tiny = ["--device=cpu", "--max_new_tokens=5", "--num_samples=1", f"--out_dir={folder / 'out'}"]
        given = [argument.format(data=data) for argument in arguments]
        result = run(checkout, script, *tiny, *given, timeout=60)
        return result.status == 0 or result.is_clear_error, result.last_line

    return case


CASES: dict[str, Case] = {
    "N1": Case("compare.py with one run by two paths", same_run_twice),
    "N1b": Case("compare.py with a run and its copy", copied_run),
    "N2": Case("compare.py on the lines of two runs in one file", concatenated),
    "N2b": Case("compare.py on a step that is null", null_position),
    "N2c": Case("compare.py on a loss of 1e308", huge_loss),
    "N2d": Case("compare.py --out=picture", without_suffix),
    "N2e": Case("compare.py on runs called _plain and $x^{$", strange_names),
    "N3": Case("mixture shares of 1e308", extreme("--dataset={data}:1e308,{data}/:1e308")),
    "N3b": Case("--minutes=1e300", extreme("--minutes=1e300")),
    "N3c": Case("--n_embd=9223372036854775807", extreme("--n_embd=9223372036854775807", "--n_head=1")),
    "N3d": Case("--top_p=1e-320", extreme("--top_p=1e-320", script="sample.py")),
    "N3e": Case("--max_iters=4503599627370497", extreme("--max_iters=4503599627370497")),
    "N3f": Case("--n_layer=1000000000", extreme("--n_layer=1000000000")),
}
