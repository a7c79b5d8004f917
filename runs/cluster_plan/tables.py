"""The tables of docs/scaling.md on clusters, by plan.py and simulate.py.

    python runs/cluster_plan/tables.py            # prints them
    python runs/cluster_plan/tables.py --write    # writes them into the page

Change a model, a step or a speed here or in plan.py, and print them for another cluster.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import plan
import simulate
from plan import Cluster, Shape, Step

DOCS = Path(__file__).resolve().parents[2] / "docs/scaling.md"
MODELS = {
    "124M": Shape("gpt2", 12, 12, 12, 64, 768, 3072, 50_257, 1024),  # GPT-2
    "1.5B": Shape("gpt2", 48, 25, 25, 64, 1600, 6400, 50_257, 1024),  # GPT-2 XL
    "8B": Shape("modern", 36, 32, 8, 128, 4096, 12_288, 151_936, 4096, tied=False),  # Qwen3-8B
}
STEPS = {
    "124M": Step(rows=32),
    "1.5B": Step(rows=16, checkpointing=True),
    "8B": Step(rows=16, checkpointing=True, loss_chunk=4096),
}
GPUS = (8, 64, 1024)
SPREAD = 0.02  # of the time that a rank's arithmetic takes


def markdown(head: str, rows: list[list[str]]) -> str:
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def between(best: float, worst: float, form: str) -> str:
    texts = dict.fromkeys((format(best, form), format(worst, form)))
    return "–".join(texts)


def layouts(cluster: Cluster) -> dict[str, int]:
    """Shards by name."""
    shards = {"DDP": 1, "FSDP2": cluster.gpus}
    return shards | ({"HSDP": cluster.gpus_per_node} if cluster.gpus > cluster.gpus_per_node else {})


def sizes() -> str:
    """Memory, bytes and seconds of each model, number of GPUs and layout."""
    text = ""
    for name, c in MODELS.items():
        step = STEPS[name]
        checkpointing = ", with activation checkpointing" if step.checkpointing else ""
        text += (
            f"**{name}**, {plan.all_numel(c):,} parameters; {step.rows} rows of {c.block_size:,} tokens"
            f"{checkpointing}, whose activations take {plan.activation_bytes(c, step) / 1e9:.2g} GB more\n\n"
        )
        rows = []
        for gpus in GPUS:
            cluster = Cluster(gpus)
            rows += [size_row(c, step, cluster, layout, shards) for layout, shards in layouts(cluster).items()]
        text += markdown(
            "| GPUs | | memory: GB | sent: GB | arithmetic: s | communication: s | step: s | tokens at balance |", rows
        )
        text += "\n"
    return text


def size_row(c: Shape, step: Step, cluster: Cluster, layout: str, shards: int) -> list[str]:
    memory = []
    sent = []
    for optimizer in ("adamw", "muon"):
        memory.append(sum(plan.state_bytes(c, shards, optimizer).values()) + plan.unit_bytes(c, shards, step.itemsize))
        parts = plan.collectives(c, cluster.gpus, shards, replace(step, optimizer=optimizer))
        sent.append(sum(map(plan.sent_bytes, parts)))
    seconds = plan.step_seconds(c, cluster, shards, step)
    return [
        f"{cluster.gpus:,}",
        layout,
        ", ".join(f"{size / 1e9:.3g}" for size in memory),
        ", ".join(f"{size / 1e9:.3g}" for size in sent),
        f"{seconds.arithmetic:.2g}",
        between(*seconds.communication, ".2g"),
        between(*seconds.step, ".2g"),
        between(*(round(tokens, -2) for tokens in plan.balance_tokens(c, cluster, shards, step)), ",.0f"),
    ]


def simulated_step(c: Shape, step: Step, cluster: Cluster, shards: int, flat: bool) -> float:
    """Seconds of a step with FSDP2's overlap; the root is gathered before the blocks and reduced after them."""
    seconds = {
        (part.kind, part.what): plan.collective_seconds(part, cluster, shards, flat) / part.count
        for part in plan.collectives(c, cluster.gpus, shards, step)
    }
    gather = seconds.pop(("all-gather", "block"))
    reduce = seconds.pop(("reduce-scatter", "block")) + seconds.pop(("all-reduce", "block"), 0.0)
    forward = plan.arithmetic_seconds(c, cluster, shards, step) / c.n_layer / (4 if step.checkpointing else 3)
    backward = (3 if step.checkpointing else 2) * forward
    slowest = simulate.slowest_rank(cluster.gpus, SPREAD)
    overlapped = simulate.simulate_step(c.n_layer, slowest * forward, slowest * backward, gather, reduce)
    return overlapped + sum(seconds.values())


def steps(name: str = "8B", gpus: int = 1024) -> str:
    """Simulated steps of one model by the rows of a GPU."""
    c = MODELS[name]
    cluster = Cluster(gpus)
    rows = []
    for layout in ("FSDP2", "HSDP"):
        for num_rows in (1, 4, 16):
            step = replace(STEPS[name], rows=num_rows)
            shards = layouts(cluster)[layout]
            seconds = plan.step_seconds(c, cluster, shards, step)
            simulated = [simulated_step(c, step, cluster, shards, flat) for flat in (False, True)]
            share = [seconds.arithmetic / s for s in reversed(simulated)]
            cells = [layout, f"{num_rows * c.block_size:,}", f"{seconds.arithmetic:.2g}"]
            cells += [between(*seconds.communication, ".2g"), between(*simulated, ".2g"), between(*share, ".0%")]
            rows.append(cells)
    head = "| | tokens per GPU | arithmetic: s | communication: s | simulated step: s | arithmetic's share |"
    return markdown(head, rows)


def saves(gpus: int = 1024, failures: int = 3000) -> str:
    """Goodput by the seconds of a save and the rate of failures."""
    rows = []
    for gpu_hours in (simulate.GPU_HOURS_PER_FAILURE, simulate.GPU_HOURS_PER_FAILURE // 10):
        for save in (5, 50, 200):
            mean = 3600 * gpu_hours / gpus
            goodput = {
                minutes: simulate.simulate_run(60 * minutes, save, simulate.RESTART_S, mean, failures)
                for minutes in simulate.INTERVALS_MIN
            }
            best = max(goodput, key=goodput.__getitem__)
            rules = (simulate.young(save, mean), simulate.daly(save, mean))
            cells = [f"{gpu_hours:,}", f"{mean / 3600:.0f}", str(save), str(best)]
            cells.append(", ".join(f"{seconds / 60:.0f}" for seconds in rules))
            cells += [f"{goodput[best]:.1%}", ", ".join(f"{goodput[minutes]:.1%}" for minutes in (5, 15, 60))]
            rows.append(cells)
    head = (
        "| GPU hours per failure | hours between failures | save: s | best: min | Young, Daly: min | goodput "
        "| at 5, 15, 60 min |"
    )
    return markdown(head, rows)


def begin(name: str) -> str:
    return f"<!-- {name}: by runs/cluster_plan/tables.py -->\n"


TABLES = {"sizes": sizes, "steps": steps, "saves": saves}
END = "<!-- end -->"


def main() -> None:
    page = DOCS.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        if "--write" not in sys.argv:
            print(table())
            continue
        before, _, rest = page.partition(begin(name))
        page = before + begin(name) + table() + rest[rest.index(END) :]
    if "--write" in sys.argv:
        DOCS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
