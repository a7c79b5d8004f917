"""Cases of conversations: the tokens and the targets that data/prepare.py writes, and what ends an answer."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cases.command import Case, Result, run
from cases.weights import export, write_qwen3, write_tokenizer

Try = Callable[[Path, Path], tuple[bool, str]]

# Templates of our own, each in the style of a published one in what it does with a message's content.
SPLITS_THOUGHTS = (
    "{% for m in messages %}{% set c = m.content %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if '</think>' in c and not loop.last %}{{ c.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ c }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPACE_BEFORE_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + '<|im_end|>' }}{% endif %}{% endfor %}"
)
BLOCKS = """{% for m in messages %}
{{ '<|im_start|>' + m.role }}
{% if m.role == 'assistant' %}
{% generation %}
{{ m.content + '<|im_end|>' }}
{% endgeneration %}
{% else %}
{{ m.content + '<|im_end|>' }}
{% endif %}
{% endfor %}
"""
NO_TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + (' plain' if tools is none and documents is none else '') }}\n"
    "{{ m.content + '<|im_end|>' }}{% endfor %}"
)
AS_JSON = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content | tojson(ensure_ascii=False) }}"
    "{{ '<|im_end|>' }}{% endfor %}"
)
LINES = "{% for m in messages %}{{ '<|im_start|>\\n' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"


def prepare(
    checkout: Path, folder: Path, template: str, contents: list[str], rstrip: bool = False
) -> tuple[Result, str, list[str]]:
    """Prepare a conversation of these questions and answers: how it ended, the data's text, and its targets."""
    model = folder / "model"
    tokenizer = write_tokenizer(model, rstrip)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")

    talks = [[f"filler {number}", "x"] for number in range(40)] + [contents]
    rows = []
    for talk in talks:
        roles = ("user", "assistant") * len(talk)
        messages = [{"role": role, "content": content} for role, content in zip(roles, talk, strict=False)]
        rows.append(json.dumps({"messages": messages}))
    (folder / "talk.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = folder / "data"
    result = run(
        checkout,
        "data/prepare.py",
        f"--input={folder / 'talk.jsonl'}",
        "--chat=True",
        f"--tokenizer={model}",
        f"--out={data}",
        "--val_share=0.5",
        "--workers=1",
    )
    if result.status:
        return result, result.last_line, []

    def decode(some: np.ndarray) -> str:
        return tokenizer.decode(some.tolist(), skip_special_tokens=False)

    end = tokenizer.token_to_id("<|endoftext|>")
    for split in ("train", "val"):
        ids = np.fromfile(data / f"{split}.bin", dtype=np.uint16)
        mask = np.fromfile(data / f"{split}.mask", dtype=np.uint8)
        ends = np.flatnonzero(ids == end)
        for first, last in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            text = decode(ids[first:last])
            if "filler" not in text:
                runs = np.split(ids[first:last], np.flatnonzero(np.diff(mask[first:last])) + 1)
                return result, text, [decode(part) for part in runs[1 - int(mask[first]) :: 2]]
    return result, "the conversation is not in the data", []


def check(template: str, contents: list[str], text: str, targets: list[str], rstrip: bool = False) -> Try:
    """A case's function: right if the data holds this text with these targets."""

    def try_it(checkout: Path, folder: Path) -> tuple[bool, str]:
        result, seen_text, seen_targets = prepare(checkout, folder, template, contents, rstrip)
        is_right = result.status == 0 and seen_text == text and seen_targets == targets
        return is_right, f"targets {seen_targets!r} of {seen_text!r}"

    return try_it


THOUGHT = "<think>\nhm\n</think>\n\n"


def find_ends(checkout: Path, folder: Path) -> tuple[bool, str]:
    """Tune a model on conversations for a step, and export it."""
    prepare(checkout, folder, BLOCKS.replace("{% generation %}\n", "").replace("{% endgeneration %}\n", ""), ["?", "!"])
    small = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--eval_iters=1"]
    train = ["--max_iters=1", "--device=cpu", "--compile=False", "--gradient_accumulation_steps=1"]
    run(checkout, "train.py", f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}", *small, *train)
    run(checkout, "export.py", f"--out_dir={folder / 'out'}", f"--to={folder / 'theirs'}")
    return read_ends(folder / "theirs", [256, 258])


def read_ends(exported: Path, expected: list[int]) -> tuple[bool, str]:
    ends = json.loads((exported / "generation_config.json").read_text())["eos_token_id"]
    has_template = (exported / "chat_template.jinja").exists()
    return ends == expected and has_template, f"eos_token_id {ends}, {'with' if has_template else 'no'} chat template"


def export_again(checkout: Path, folder: Path) -> tuple[bool, str]:
    """Export a folder like Qwen3's, which states two end tokens and names one of them."""
    model = folder / "model"
    write_qwen3(model)
    (model / "chat_template.jinja").write_text(SPLITS_THOUGHTS, encoding="utf-8")
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256]}))
    result = export(checkout, model, folder / "again")
    if result.status:
        return False, result.last_line
    is_right, seen = read_ends(folder / "again", [256, 258])
    names = json.loads((folder / "again/tokenizer_config.json").read_text())
    is_same = (folder / "again/chat_template.jinja").read_text(encoding="utf-8") == SPLITS_THOUGHTS
    return is_right and is_same and names.get(
        "eos_token"
    ) == "<|im_end|>", f"{seen}, eos_token {names.get('eos_token')}"


CASES: dict[str, Case] = {
    "C1": Case(
        "a template that splits answers at `</think>` and drops the thoughts of earlier ones (as Qwen3's)",
        check(
            SPLITS_THOUGHTS,
            ["a", THOUGHT + "b", "c", THOUGHT + "d"],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            f"<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n{THOUGHT}d<|im_end|>\n",
            ["b<|im_end|>", f"{THOUGHT}d<|im_end|>"],
        ),
    ),
    "C2": Case(
        "a template that trims contents and puts a space before answers (as Llama-2's and Mistral's)",
        check(SPACE_BEFORE_ANSWERS, [" a ", " b\n"], "[INST] a [/INST] b<|im_end|>", [" b<|im_end|>"]),
    ),
    "C3": Case(
        "a template with `{% generation %}` on lines of its own",
        check(
            BLOCKS,
            ["a", "b"],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
            ["b<|im_end|>\n"],
        ),
    ),
    "C3 none": Case(
        "a template that asks whether `tools is none`",
        check(
            NO_TOOLS,
            ["a", "b"],
            "<|im_start|>user plain\na<|im_end|><|im_start|>assistant plain\nb<|im_end|>",
            ["<|im_start|>assistant plain\nb<|im_end|>"],
        ),
    ),
    "C3 json": Case(
        "a template with `tojson(ensure_ascii=False)`",
        check(
            AS_JSON,
            ["a", '"é"'],
            '<|im_start|>user\n"a"<|im_end|><|im_start|>assistant\n"\\"é\\""<|im_end|>',
            ['<|im_start|>assistant\n"\\"é\\""<|im_end|>'],
        ),
    ),
    "C3 rstrip": Case(
        "special tokens that take the white space after them along (`rstrip`, as Phi-3's)",
        check(
            LINES,
            ["a", "b"],
            "<|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>",
            ["<|im_start|>assistant\nb<|im_end|>"],
            rstrip=True,
        ),
    ),
    "C4": Case("a model tuned on conversations is exported: which tokens end its texts?", find_ends),
    "C4 again": Case("a folder like Qwen3's is loaded and exported again", export_again),
}
