"""Runs with LoRA: small checkpoints, exact resuming, the base checked, and the scripts that take them."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXTURE, NO_SIZES, Run, SignalAt, assert_same_checkpoint, call_main, metrics, steps
from random_models import build_gpt2, build_llama, build_qwen3

import evaluate
import export
import sample
from model import GPT
from nanogpt import checkpoint
from nanogpt.errors import InputError
from nanogpt.interop.huggingface import read_tokenizer
from nanogpt.text.tokenizer import Tokenizer

OPEN = NO_SIZES | {"block_size": ...}
LORA: dict[str, Any] = OPEN | {"init_from": "base", "lora_rank": 2, "lora_alpha": 8}
BUILD = {"gpt2": build_gpt2, "llama": build_llama, "qwen3": build_qwen3}


@pytest.fixture
def _base(run: Run) -> None:
    """transformers' GPT-2 of four letters in `base`."""
    save_base("gpt2")


def save_base(kind: str) -> None:
    torch.manual_seed(0)
    BUILD[kind](vocab_size=4).save_pretrained("base")
    Tokenizer.characters("abcd").save(Path("base"))


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("gpt2", {"dropout": 0.2, "gradient_accumulation_steps": 2, "log_layers": True, "skip_spikes": 6.0}),
        (
            "llama",
            {"dtype": "bfloat16", "activation_checkpointing": True, "loss_chunk": 8, "lora_targets": "q_proj,mlp"},
        ),
        ("qwen3", MIXTURE | {"dtype": "float16", "weight_decay": 0.0}),
    ],
)
def test_resume_is_exact_to_the_bit(
    run: Run, signal_at: SignalAt, one_and_two: Path, kind: str, recipe: dict[str, Any]
):
    for name in ("one", "two"):
        Path(name).symlink_to(one_and_two / name)
    save_base(kind)
    keys = LORA | recipe
    assert run(out_dir="whole", **keys) == 0
    signal_at(9, signal.SIGTERM)
    assert run(out_dir="parts", **keys) == 143
    assert run(out_dir="parts", resume=True, **keys) == 0
    assert metrics("parts") == metrics("whole")
    losses = [loss for (loss,) in metrics("whole", "val_loss")]
    assert losses[-1] < losses[0]
    assert_same_checkpoint("whole", "parts", 20)


@pytest.mark.usefixtures("_base")
def test_checkpoints_hold_adapters_alone(run: Run, capsys: pytest.CaptureFixture[str]):
    before = {name: tensor.clone() for name, tensor in GPT.from_pretrained("base").state_dict().items()}
    run(out_dir="out", log_layers=True, **LORA)
    assert "28,160 parameters, of which 2,048 are LoRA adapters and train" in capsys.readouterr().out
    saved = checkpoint.load(Path("out/ckpt/step-000020"))
    assert all(".lora_" in name for name in saved.model)
    assert saved.optimizer.keys() == {
        f"{name}/{key}" for name in saved.model for key in ("step", "exp_avg", "exp_avg_sq")
    }
    numel = sum(tensor.numel() for tensor in saved.model.values())
    assert numel == 2048
    files = Path("out/ckpt/step-000020")
    assert (files / "model.safetensors").stat().st_size < 4 * numel + 4000
    assert (files / "optimizer.safetensors").stat().st_size < 8 * numel + 16_000
    assert set(metrics("out", "layer_grad_norms")[0][0]) == {"blocks.0", "blocks.1"}

    after = GPT.from_checkpoint("out", "latest").state_dict()
    assert after.keys() == before.keys()
    changed = {name.split(".", 2)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight"}


@pytest.mark.usefixtures("_base")
def test_every_script_takes_a_run_with_lora(run: Run, capsys: pytest.CaptureFixture[str], letters: Path):
    run(out_dir="out", **LORA)
    (_, val_loss) = metrics("out", "step", "val_loss")[-1]
    call_main(export.main, "--out_dir=out", "--checkpoint=latest", "--to=adapters", "--adapters=True")
    call_main(export.main, "--out_dir=out", "--checkpoint=latest", "--to=merged")
    flags = ("--device=cpu", "--dtype=float32")
    greedy = ("--temperature=0", "--num_samples=1", "--max_new_tokens=9", "--start=ab")
    results: list[tuple[float, str]] = []
    for source in ("--out_dir=out", "--init_from=adapters", "--init_from=merged"):
        capsys.readouterr()
        call_main(sample.main, source, *greedy, *flags)
        text = capsys.readouterr().out
        call_main(evaluate.main, source, f"--dataset={letters}", "--json=results.json", *flags)
        loss = json.loads(Path("results.json").read_text())["loss"]
        results.append((loss, text))
    assert results[0][0] == pytest.approx(val_loss, rel=0.1)  # of a few windows
    assert len(results[0][1]) > 9
    assert results == 3 * [(pytest.approx(results[0][0], abs=1e-6), results[0][1])]

    call_main(export.main, "--out_dir=out", "--to=half", "--adapters=True", "--dtype=bfloat16")
    assert "validation loss" in Path("half/README.md").read_text()
    assert read_tokenizer("half").vocab == read_tokenizer("merged").vocab
    run(out_dir="tuned", init_from="out", max_iters=2, **OPEN)  # all weights, from the merged ones
    run(out_dir="again", **LORA | {"init_from": "merged", "max_iters": 2})  # adapters on them
    with pytest.raises(InputError, match="init_from=out: has adapters itself"):  # whose base could become itself
        run(out_dir="chain", **LORA | {"init_from": "out", "max_iters": 2})
    a, b = (GPT.from_checkpoint(name, "step-000002") for name in ("tuned", "again"))
    assert a.config == b.config
    with pytest.raises(InputError, match="--adapters=True: tuned is not a run with LoRA"):
        call_main(export.main, "--out_dir=tuned", "--to=new", "--adapters=True")


def test_a_base_is_found_although_its_run_went_on(run: Run):
    run(out_dir="base", max_iters=4, eval_interval=4, learning_rate=1e-6)
    run(out_dir="out", max_iters=4, **LORA)
    tuned = GPT.from_checkpoint("out").state_dict()
    first = checkpoint.find("base")
    run(out_dir="base", resume=True, max_iters=8, learning_rate=1e-2)
    assert checkpoint.find("base") != first  # another one is the best now
    again = GPT.from_checkpoint("out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in tuned.items())
    (checkpoint.find("base") / "model.safetensors").write_bytes(b"damaged")
    again = GPT.from_checkpoint("out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in tuned.items())
    (first / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"their base cannot be read: .* is damaged: the SHA-256 of model.safe"):
        GPT.from_checkpoint("out")


@pytest.mark.usefixtures("_base")
def test_another_base_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    keys = LORA | {"block_size": 8}  # the base has 16 positions
    run(out_dir="out", **keys)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    GPT.from_checkpoint("../out")  # by the base's full path
    monkeypatch.chdir(tmp_path)

    def assert_refused(message: str) -> None:
        for load in (lambda: run(out_dir="out", resume=True, **keys), lambda: GPT.from_checkpoint("out")):
            with pytest.raises(InputError, match=message) as caught:
                load()
            assert "\n" not in str(caught.value)

    Path("base").rename("moved")
    assert_refused("step-0000.. has adapters, and their base cannot be read: '.*/base' is not a file or folder")
    build_gpt2(vocab_size=4, scale=0.1).save_pretrained("base")
    assert_refused("step-0000.. has adapters of another base: .*base is not what the run started from")
    shutil.rmtree("base")
    shutil.copytree("out", "base")
    with pytest.raises(InputError, match="has adapters of another base"):
        GPT.from_checkpoint("base")  # a run that would be its own base
    shutil.rmtree("base")
    Path("moved").rename("base")
    assert run(out_dir="out", resume=True, **keys | {"max_iters": 24}) == 0
    assert steps("out")[-1] == 24


@pytest.mark.usefixtures("_base")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_from": "scratch"}, "lora_rank: init_from=scratch has no weights to adapt"),
        ({"optimizer": "muon"}, "lora_rank: optimizer=muon is not for adapters"),
        ({"lora_targets": "mlp,qproj"}, "no layer is called 'qproj'; did you mean q_proj?"),
        ({"lora_targets": ""}, "no layer is called ''; choose from attention"),
        ({"lora_targets": "q_proj"}, "no layer is called 'q_proj'; did you mean c_proj?"),  # this is GPT-2
        ({"out_dir": "."}, "lora_rank: init_from=base is in out_dir"),
    ],
)
def test_impossible_settings_are_refused(run: Run, keys: dict[str, Any], message: str):
    with pytest.raises(InputError) as caught:
        run(**{"out_dir": "out"} | LORA | keys)
    assert message in str(caught.value)
    assert not Path("out/ckpt").exists()


@pytest.mark.usefixtures("_base")
def test_adapters_cannot_change_on_resume(run: Run):
    run(out_dir="out", **LORA | {"max_iters": 2})
    run(out_dir="full", max_iters=2)
    for keys, message in [
        ({"lora_rank": 4}, "lora_rank=4: the run in out has lora_rank=2, which cannot change"),
        ({"lora_rank": 0}, "lora_rank=0: the run in out has lora_rank=2"),
        ({"lora_alpha": 1}, "lora_alpha=1.0: the run in out has lora_alpha=8.0"),
        ({"lora_targets": "mlp"}, "lora_targets=mlp: the run in out has lora_targets=attention,mlp"),
        ({"out_dir": "full"}, "lora_rank=2: the run in full has lora_rank=0"),
    ]:
        with pytest.raises(InputError, match=message):
            run(**{"out_dir": "out", "resume": True, "max_iters": 3} | LORA | keys)


@pytest.mark.usefixtures("_base")
def test_adapters_that_float16_makes_infinite_are_refused(run: Run):
    run(out_dir="out", **LORA | {"max_iters": 1})
    saved = checkpoint.load(checkpoint.find("out", "latest"))
    next(iter(saved.model.values()))[0, 0] = 7e4
    checkpoint.save(Path("out"), saved.model, saved.optimizer, saved.state, None)
    flags = ("--out_dir=out", "--checkpoint=latest", "--to=wide", "--adapters=True", "--dtype=float16")
    with pytest.raises(InputError, match=r"--dtype=float16: .* has weights beyond 65,504"):
        call_main(export.main, *flags)
    assert not Path("wide").exists()
