"""Memory per GPU, bytes sent, and seconds per step by arithmetic, for DDP, FSDP2 and HSDP.

`shards` processes share one copy of the weights: 1 is DDP, all of them FSDP2, those of a node HSDP. Everything is
counted for one rank and one step, without torch. tables.py prints it; measure.py compares it with what is counted.

Units of FSDP2: each block, gathered in the dtype of the matrix products, in forward and again in backward; and the root
(embeddings, last norm, output layer), gathered once in float32 and kept. Gradients are reduced in float32: over the
shards after each micro-step, which gathers again too, and over the copies once in a step. The weights
of the update and its moments are float32 and sharded by rows, padded to a multiple of the shards.
"""

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

FLOAT32 = 4
NEWTON_SCHULZ_ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a network without biases, by the names of GPTConfig, which may take its place."""

    arch: str
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_inner: int
    vocab_size: int
    block_size: int
    tied: bool = True
    bias: bool = False
    qk_norm: bool = True

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64


@dataclass(frozen=True)
class Cluster:
    """Speeds in bytes per second of one GPU's links, inside of its node and between nodes; FLOP/s that it reaches."""

    gpus: int
    gpus_per_node: int = 8
    inside: float = 400e9
    between: float = 50e9
    flops: float = 474e12


@dataclass(frozen=True)
class Step:
    """The work of one rank in a step. itemsize: bytes of a number in the matrix products."""

    rows: int  # of a micro-batch
    micro_steps: int = 1
    itemsize: int = 2
    optimizer: str = "adamw"
    checkpointing: bool = False
    loss_chunk: int = 0


class Collective(NamedTuple):
    """A collective of a step: bytes of its whole tensor (of an all-to-all, the busiest rank's), processes, calls."""

    kind: str
    what: str
    size: float
    ranks: int
    count: int = 1
    among: str = "shards"  # of one copy, or "replicas": the ranks with the same shard


# --- Parameters


def block_shapes(c: Any) -> list[tuple[int, ...]]:
    """Shapes of a block's parameters."""
    qkv_rows = (c.n_head + 2 * c.n_kv_head) * c.head_dim
    matrices = [(qkv_rows, c.n_embd), (c.n_embd, c.n_head * c.head_dim)]
    matrices += [(c.n_inner, c.n_embd)] * (2 if c.arch == "modern" else 1)
    matrices += [(c.n_embd, c.n_inner)]
    vectors = [(c.n_embd,)] * 2
    if c.arch == "modern" and c.qk_norm:
        vectors += [(c.head_dim,)] * 2
    if c.bias:
        vectors += [(rows,) for rows, _ in matrices] + [(c.n_embd,)] * 2
    return matrices + vectors


def root_shapes(c: Any) -> list[tuple[int, ...]]:
    """Shapes of the parameters outside of the blocks."""
    shapes: list[tuple[int, ...]] = [(c.padded_vocab_size, c.n_embd)] * (1 if c.tied else 2)
    if c.arch == "gpt2":
        shapes.append((c.block_size, c.n_embd))
    return shapes + [(c.n_embd,)] * (2 if c.bias else 1)


def maps(c: Any) -> list[tuple[int, int]]:
    """Rows and columns, the smaller first, of each map of a block that Muon orthogonalizes."""
    queries, keys = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    widths = [queries, keys, keys, queries] + [c.n_inner] * (3 if c.arch == "modern" else 2)
    return [(min(c.n_embd, width), max(c.n_embd, width)) for width in widths]


def numel(shapes: list[tuple[int, ...]], shards: int = 1) -> int:
    """Numbers in parameters whose rows are padded to a multiple of the shards."""
    return sum(-(-shape[0] // shards) * shards * math.prod(shape[1:]) for shape in shapes)


def all_numel(c: Any, shards: int = 1) -> int:
    """Numbers in all parameters, with the padding of the vocabulary and of the shards."""
    return numel(root_shapes(c), shards) + c.n_layer * numel(block_shapes(c), shards)


def hidden_numel(c: Any) -> int:
    """Numbers that Muon trains."""
    return c.n_layer * sum(r * s for r, s in maps(c))


# --- Arithmetic


def flops_per_token(c: Any, checkpointing: bool = False) -> float:
    """FLOPs of forward and backward, attention as a full square; with checkpointing the blocks' forward twice."""
    square = 4 * c.block_size * c.n_head * c.head_dim
    blocks = c.n_layer * (2 * sum(r * s for r, s in maps(c)) + square)
    logits = 2 * c.vocab_size * c.n_embd
    return (4 if checkpointing else 3) * blocks + 3 * logits


def map_flops(r: int, s: int) -> int:
    """FLOPs of one map's Newton-Schulz iteration."""
    return NEWTON_SCHULZ_ROUNDS * (4 * r * r * s + 2 * r**3)


def busiest_owner(c: Any, shards: int) -> tuple[int, int]:
    """Numbers and FLOPs of the rank with most of Muon's work: the largest maps first, each to the least busy rank."""
    owners = [(0, rank, 0, 0) for rank in range(shards)]  # cost, rank, numbers, FLOPs
    for r, s in sorted(maps(c) * c.n_layer, key=lambda rs: -rs[0] * rs[0] * rs[1]):
        cost, rank, numbers, flops = owners[0]
        heapq.heapreplace(owners, (cost + r * r * s, rank, numbers + r * s, flops + map_flops(r, s)))
    return max(owner[2] for owner in owners), max(owner[3] for owner in owners)


def arithmetic_seconds(c: Any, cluster: Cluster, shards: int, step: Step) -> float:
    """Seconds of matrix products in a step, Muon's by the busiest rank."""
    tokens = step.rows * step.micro_steps * c.block_size
    flops = tokens * flops_per_token(c, step.checkpointing)
    if step.optimizer == "muon":
        flops += busiest_owner(c, shards if shards > 1 else cluster.gpus)[1]
    return flops / cluster.flops


# --- Communication


def collectives(c: Any, gpus: int, shards: int, step: Step) -> list[Collective]:
    """The collectives of a step; DDP's buckets as one."""
    replicas = gpus // shards
    muon: list[Collective] = []
    if shards == 1:
        if step.optimizer == "muon":  # each rank orthogonalizes a share of the maps of each shape
            counts = Counter(maps(c) * c.n_layer)
            size = step.itemsize * sum(-(-count // gpus) * gpus * r * s for (r, s), count in counts.items())
            muon = [Collective("all-gather", "updates", size, gpus, among="replicas")]
        return [Collective("all-reduce", "gradients", FLOAT32 * all_numel(c), gpus, among="replicas"), *muon]

    if step.optimizer == "muon":  # rows to the owners of their maps, and back
        for what, numbers in (("momenta", hidden_numel(c) / shards), ("updates", busiest_owner(c, shards)[0])):
            muon.append(Collective("all-to-all", what, step.itemsize * numbers, shards))
    root = FLOAT32 * numel(root_shapes(c), shards)
    block = FLOAT32 * numel(block_shapes(c), shards)
    gathers = [
        Collective("all-gather", "root", root, shards, step.micro_steps),
        Collective("all-gather", "block", block * step.itemsize / FLOAT32, shards, 2 * c.n_layer * step.micro_steps),
    ]
    for what, size, count in (("root", root, 1), ("block", block, c.n_layer)):
        gathers.append(Collective("reduce-scatter", what, size, shards, count * step.micro_steps))
        if replicas > 1:
            gathers.append(Collective("all-reduce", what, size / shards, replicas, count, "replicas"))
    return gathers + muon


def sent_bytes(part: Collective) -> float:
    """Bytes that a rank sends, in a ring."""
    passes = 2 if part.kind == "all-reduce" else 1
    return part.count * passes * part.size * (part.ranks - 1) / part.ranks


def collective_seconds(part: Collective, cluster: Cluster, shards: int, flat: bool = False) -> float:
    """Seconds of a collective: by stages over all links of a node, or flat, in one ring through all ranks.

    By stages: inside each node, and between each GPU and its counterparts in other nodes for its part of the data.
    """
    local = shards if part.among == "shards" else cluster.gpus_per_node // shards
    local = max(min(local, cluster.gpus_per_node, part.ranks), 1)  # ranks in a node
    nodes = part.ranks // local
    if flat and nodes > 1:
        return sent_bytes(part) / cluster.between
    if part.kind == "all-to-all":  # what each pair of ranks has for each other passes one link
        inside = part.size * (local - 1) / part.ranks / cluster.inside
        return part.count * (inside + part.size * (nodes - 1) / nodes / cluster.between)
    inside = sent_bytes(part._replace(ranks=local)) / cluster.inside
    return inside + sent_bytes(part._replace(size=part.size / local, ranks=nodes)) / cluster.between


class Seconds(NamedTuple):
    """Seconds of a step: best and worst."""

    arithmetic: float
    communication: tuple[float, float]  # by stages; in one flat ring
    step: tuple[float, float]  # all overlapped, by stages; nothing overlapped, in one flat ring


def step_seconds(c: Any, cluster: Cluster, shards: int, step: Step) -> Seconds:
    arithmetic = arithmetic_seconds(c, cluster, shards, step)
    parts = collectives(c, cluster.gpus, shards, step)
    best, worst = (sum(collective_seconds(part, cluster, shards, flat) for part in parts) for flat in (False, True))
    return Seconds(arithmetic, (best, worst), (max(arithmetic, best), arithmetic + worst))


def balance_tokens(c: Any, cluster: Cluster, shards: int, step: Step) -> tuple[float, float]:
    """Tokens per GPU and step at which communication takes as long as forward and backward, best and worst."""
    best, worst = step_seconds(c, cluster, shards, step).communication
    per_token = flops_per_token(c, step.checkpointing) / cluster.flops
    return best / per_token, worst / per_token


# --- Memory


def state_bytes(c: Any, shards: int, optimizer: str) -> dict[str, float]:
    """Bytes of a rank's weights, gradients and moments, in float32."""
    numbers = all_numel(c, shards) / shards
    moments = 2 * numbers - (hidden_numel(c) / shards if optimizer == "muon" else 0)
    return {"weights": FLOAT32 * numbers, "gradients": FLOAT32 * numbers, "moments": FLOAT32 * moments}


def unit_bytes(c: Any, shards: int, itemsize: int) -> float:
    """Bytes of what FSDP2 holds whole beside the shards.

    The root's weights and gradients, two blocks' weights (one is gathered ahead), and a block's gradients in float32.
    """
    if shards == 1:
        return 0
    root = numel(root_shapes(c), shards)
    block = numel(block_shapes(c), shards)
    return 2 * FLOAT32 * root + (2 * itemsize + FLOAT32) * block


def update_bytes(c: Any, shards: int, step: Step) -> float:
    """Bytes of the temporaries of Muon's update; of AdamW's, none.

    In the products' dtype there are all gradients, the updates of the shapes that are done, and of each map of the
    present shape three iterates and two Gram matrices; at the end, while results are sent or converted, three times
    all updates. Shards divide the maps.
    """
    if step.optimizer != "muon":
        return 0
    counts = {shape: -(-count // shards) for shape, count in Counter(maps(c) * c.n_layer).items()}
    total = sum(count * r * s for (r, s), count in counts.items())
    peak = 3 * step.itemsize * total
    done = 0
    for r, s in sorted(counts, key=lambda shape: shape[0] ** 2 * shape[1], reverse=True):
        count = counts[r, s]
        peak = max(peak, step.itemsize * (total + done + count * (3 * r * s + 2 * r * r)))
        done += count * r * s
    return peak


def activation_bytes(c: Any, step: Step) -> float:
    """Bytes that forward saves for backward, and the loss's three arrays of logits."""
    a, channels, tokens = step.itemsize, c.n_embd, step.rows * c.block_size
    is_modern = c.arch == "modern"
    norm = FLOAT32 * channels + (4 if is_modern else 8)
    kept = c.n_kv_head * c.head_dim  # values; GPT-2 also keeps queries and keys, which rotation makes anew
    kept += 0 if is_modern else (c.n_head + c.n_kv_head) * c.head_dim
    block = 2 * norm + a * (2 * channels + kept + c.n_head * c.head_dim) + 4 * c.n_head
    block += a * (4 if is_modern else 2) * c.n_inner
    if is_modern:  # queries and keys are normalized in float32 and rotated; gate and up cast their input
        rotated = (c.n_head + c.n_kv_head) * c.head_dim
        block += (FLOAT32 + a) * rotated + 4 * (c.n_head + c.n_kv_head)
        block += 2 * channels if a == 2 else 0
    blocks = c.n_layer * FLOAT32 * channels + block if step.checkpointing else c.n_layer * block
    logits = 3 * FLOAT32 * c.vocab_size * min(tokens, step.loss_chunk or tokens)
    return tokens * (blocks + norm + a * channels) + logits


def cast_bytes(c: Any, shards: int, step: Step) -> float:
    """Bytes of autocast's copies of float32 matrices in the dtype of the products; FSDP2 gathers blocks in it."""
    if step.itemsize == FLOAT32:
        return 0
    return step.itemsize * (c.padded_vocab_size * c.n_embd + (hidden_numel(c) if shards == 1 else 0))


def memory_bytes(c: Any, shards: int, step: Step) -> float:
    """Peak of a step: weights and moments, beside the most that forward, backward or the update need.

    When the output layer's gradient comes, two of the loss's three arrays of logits are gone, except in chunks. Tied,
    the gradients of the matrix's two uses are added at the end of backward: in float32 into a third one
    (findings/torch_tied_weight_third_gradient.sh). FSDP2 then copies the root's gradients to reduce and scatter them;
    a copy by gloo (findings/gloo_copies_what_it_gathers.sh) takes the place of the gradients, which are freed by then.
    """
    state = state_bytes(c, shards, step.optimizer)
    kept = state["weights"] + state["moments"]
    matrix = FLOAT32 * c.padded_vocab_size * c.n_embd
    freed_logits = 0 if step.loss_chunk else 2 * FLOAT32 * c.vocab_size * step.rows * c.block_size
    backward = activation_bytes(c, step) + cast_bytes(c, shards, step) + max(matrix - freed_logits, 0)
    gradients = matrix
    if c.tied:
        gradients *= 3 if step.itemsize == FLOAT32 else 2
    update = update_bytes(c, shards, step)
    if shards == 1:  # DDP's buckets hold the gradients from the start
        return kept + state["gradients"] + max(backward, gradients, update)
    root = FLOAT32 * numel(root_shapes(c), shards)
    units = unit_bytes(c, shards, step.itemsize) - root  # without the root's gradients
    end = state["gradients"] + max(units + max(gradients, 2 * root), update)
    return kept + max(units + backward, end)
