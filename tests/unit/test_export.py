"""export.py: the model card, what is refused, and that a failure leaves nothing behind."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from conftest import Export
from random_models import CHARACTERS, save_random_run
from safetensors import SafetensorError
from tokenizers import Regex, normalizers, pre_tokenizers

from load import load_weights
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.files import read_json, write_report
from nanogpt.interop.gguf_tokenizer import QWEN2_SPLIT
from nanogpt.text.tokenizer import Tokenizer
from train import TrainConfig


@pytest.fixture
def run_export(run_export: Export) -> Export:
    """`run_export("to", "--flag" …)`: what export.py wrote, beside a run in `out`."""
    save_random_run("out")
    return run_export


def test_model_card_states_sizes_and_origin(run_export: Export, capsys: pytest.CaptureFixture[str]):
    Path("new").mkdir()  # an empty folder may exist
    card = (run_export("new") / "README.md").read_text()
    assert "wrote new: 26,688 parameters in float32" in capsys.readouterr().out
    facts = {"parameters": "26,688", "weights": "float32", "steps": "1,234", "tokens": "48,000", "dataset": "poems"}
    facts["validation loss"] = "1.5000 nats per token"
    assert all(f"| {fact} | {value} |" in card for fact, value in facts.items())
    assert f"knows {CHARACTERS.vocab_size} characters" in card
    assert "/home/me" not in card
    card = (run_export("deep/er", "--init_from=new", "--dtype=bfloat16") / "README.md").read_text()
    assert "| converted from | new |" in card
    assert "| steps |" not in card


def test_names_that_are_no_utf8_are_written_and_read(run_export: Export):
    name = os.fsdecode(b"\xff")
    run_export(name)
    assert "converted from | \\udcff" in (run_export(f"{name}.1", f"--init_from={name}") / "README.md").read_text()
    write_report("json", "report.json", {"model": name})
    assert read_json(Path("report.json")) == {"model": name}
    write_report("json", "report.json", {"rows": [{"last_loss": math.nan}]})
    assert '"last_loss": null' in Path("report.json").read_text()  # JSON has no NaN


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to="], "--to is empty"),
        (["--to=full"], "--to=full: exists and is not overwritten"),
        (["--to=full/file/x"], r"--to=full/file/x: cannot be written \(Not a directory\)"),
        (["--to=" + 300 * "x"], r"cannot be written \(File name too long\)"),
        (["--to=taken"], r"\.taken\.partial exists; wait for the export that is writing it, or delete it"),
        (["--out_dir=mute"], r"mute.* has no tokenizer, and its 7 ids may not be GPT-2's"),
        (["--out_dir=other"], r"the tokenizer has \d+ ids, the model 7"),
        (["--to=full/old.gguf"], r"--to=full/old\.gguf: exists and is not overwritten"),
        (["--to=model.safetensors"], r"weights are written in a folder; give --to=FOLDER, or --to=NAME\.gguf"),
        (["--dtype=q8_0"], "--dtype=q8_0: new/folder is a folder, which has no such weights"),
        (["--to=a/b.gguf", "--out_dir=nul"], r"no equal of this tokenizer, which has the character NUL"),
        (["--to=a/b.gguf", "--shard_gb=1"], "--shard_gb=1: .* a single file each; leave it out"),
        (["--adapters=True", "--shard_gb=5"], "--shard_gb=5: .* leave it out"),
        (["--shard_gb=0", "--dtype=int8"], r"shard_gb=0: .*\n--dtype=int8: "),
    ],
)
def test_export_refuses(run_export: Export, flags: list[str], message: str):
    save_random_run("mute", None)
    save_random_run("other", vocab_size=7)
    save_random_run("nul", Tokenizer.characters("a\0"))
    Path("full").mkdir()
    Path("full/file").touch()
    Path("full/old.gguf").touch()
    Path(".taken.partial").mkdir()
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError, match=message):
        run_export("new/folder", *flags)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O"), KeyboardInterrupt()])
@pytest.mark.parametrize("to", ["new/folder", "new/model.gguf"])
def test_export_that_fails_leaves_nothing(
    run_export: Export, monkeypatch: pytest.MonkeyPatch, to: str, error: BaseException
):
    before = sorted(Path().rglob("*"))

    def fail(tensors: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    if to.endswith(".gguf"):
        gguf = pytest.importorskip("gguf")
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", Mock(side_effect=error))
    is_interrupt = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if is_interrupt else InputError) as caught:
        run_export(to)
    assert is_interrupt or str(caught.value).startswith(f"--to={to}: cannot be written (")
    assert sorted(Path().rglob("*")) == before


def test_export_names_special_tokens_that_the_model_has_no_row_for(
    run_export: Export, capsys: pytest.CaptureFixture[str]
):
    words = Tokenizer.bytes()
    rows = words.vocab_size
    words._inner.add_special_tokens(["[PAD]"])
    padded = Tokenizer(words._inner)
    save_random_run("padded", padded, vocab_size=rows)
    folder = run_export("new", "--out_dir=padded")
    assert "[PAD]" in capsys.readouterr().err
    exported = Tokenizer.load(folder)
    assert exported is not None
    assert exported.special_tokens["[PAD]"] == rows


def test_export_of_llama_states_the_rotary_settings_in_both_forms(run_export: Export):
    """transformers 4 and mlx-lm read them at the top level alone; transformers 5 writes rope_parameters."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    for number, numbers in enumerate(([], [*scaling.values()])):
        rope = {"rope_theta": 5e5, "rope_scaling": [*map(float, numbers)]}
        save_random_run(f"run{number}", arch="modern", bias=False, qk_norm=False, **rope)
        config = read_json(run_export(f"new{number}", f"--out_dir=run{number}") / "config.json")
        llama3 = {"rope_type": "llama3"} | scaling if numbers else None
        assert (config["rope_theta"], config.get("rope_scaling")) == (5e5, llama3)
        assert json.dumps(llama3) in json.dumps(config)  # with 8, not 8.0, of which transformers 4 warns
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5} | (llama3 or {})


def test_export_of_gpt2_has_the_names_and_tokens_of_openais_files(run_export: Export):
    """mlx-lm takes no other names of tensors, and CTranslate2's converter of GPT-2 no tokenizer without unk_token."""
    save_random_run("words", Tokenizer.bytes())
    folder = run_export("new", "--out_dir=words")
    names = safetensors.torch.load_file(folder / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"wte", "wpe", "h", "ln_f"}
    assert read_json(folder / "tokenizer_config.json")["unk_token"] == "<|endoftext|>"
    assert "unk_token" not in read_json(run_export("characters") / "tokenizer_config.json")  # which refuse a text


def change_weight(folder: Path, name: str, value: float) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(run_export: Export, value: float):
    change_weight(run_export("new"), "h.1.mlp.c_fc.weight", value)
    message = r"new: blocks\.1\.mlp\.up\.weight holds NaN or infinite weights"
    with pytest.raises(InputError, match=message):
        run_export("again", "--init_from=new")
    with pytest.raises(InputError, match=message):
        load_weights(TrainConfig(init_from="new"), {}, World(0, 1, torch.device("cpu"), torch.float32))


def test_weights_that_a_dtype_makes_infinite_are_refused(run_export: Export):
    """In a GGUF file norms are float32, and numbers of q8_0 are up to 127 times a float16."""

    def refuse(to: str, dtype: str, message: str) -> None:
        with pytest.raises(InputError, match=f"--dtype={dtype}: {message}"):
            run_export(to, "--init_from=new", f"--dtype={dtype}")
        assert not Path(to).exists()

    folder = run_export("new")
    change_weight(folder, "h.1.mlp.c_fc.weight", 7e4)
    refuse("again.gguf", "float16", r"blk\.1\.ffn_up\.weight has weights too large for it; give")
    run_export("blocks.gguf", "--init_from=new", "--dtype=q8_0")
    change_weight(folder, "h.1.mlp.c_fc.weight", 9e6)
    refuse("again.gguf", "q8_0", r"blk\.1\.ffn_up\.weight has weights too large for it; give")
    change_weight(folder, "h.1.mlp.c_fc.weight", 0.0)
    change_weight(folder, "ln_f.weight", -7e4)
    refuse("again", "float16", r"norm\.weight has weights beyond 65,504; give")
    run_export("norm.gguf", "--init_from=new", "--dtype=float16")


def test_a_file_has_no_adapters(run_export: Export):
    run_export("new.gguf")
    with pytest.raises(InputError, match=r"--adapters=True: new\.gguf is not a run with LoRA; leave it out"):
        run_export("adapters", "--init_from=new.gguf", "--adapters=True")


def test_gguf_export_names_the_normalizer_that_llama_cpp_lacks(run_export: Export, capsys: pytest.CaptureFixture[str]):
    words = Tokenizer.train_bpe(["to be or not to be"], 270)
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words._inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    words._inner.normalizer = normalizers.NFC()
    save_random_run("normalizes", words)
    for run, is_noted in (("normalizes", True), ("out", False)):
        run_export(f"{run}.gguf", f"--out_dir={run}")
        assert ("does not apply the tokenizer's NFC" in capsys.readouterr().out) == is_noted


def test_the_umask_decides_who_can_read_weights(run_export: Export):
    before = os.umask(0o027)
    try:
        save_random_run("private")
        files = [*run_export("new", "--out_dir=private").iterdir(), *Path("private/ckpt").glob("step-*/*")]
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert {"model.safetensors", "optimizer.safetensors"} <= {path.name for path in files}
