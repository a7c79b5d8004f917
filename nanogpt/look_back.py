"""An initialization whose first layer attends to the preceding tokens."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = 4  # heads attend to the tokens 1, 2, 3 and 0 positions back, in turn
MIN_FREQUENCY = 0.2  # radians per position; slower rotations hardly differ between neighbors
STRENGTH = 2.0  # scale of the keys' and queries' common part: 50/√D times the random rest
QUERY_GAIN = 1.5  # a higher one makes a narrower peak


def look_back(sizes: Any, name: str, weight: Tensor) -> None:
    """Adjust the initial value of a GPT's parameter so that the first layer attends to the last tokens (arch=modern).

    From random weights a network stalls until it learns such heads (Varre et al. 2025, arXiv:2508.12837). Here each
    head begins with one of the last four tokens: all embeddings get one vector in common, from which every key and
    query gets the same direction, the queries' rotated back by their distance. To a tied output layer that vector adds
    the same logit for all tokens, which changes no probability. sizes: the GPTConfig.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ 1)  # not the embedding's own numbers
    common = F.normalize(torch.randn(sizes.n_embd, generator=generator), dim=0)
    if name == "token_embedding.weight":
        weight[: sizes.vocab_size] += 0.01 * math.sqrt(sizes.n_embd) * common  # half as long as the rest
    elif name == "blocks.0.attention.q_norm.weight":
        weight.fill_(QUERY_GAIN)
    elif name == "blocks.0.attention.qkv.weight":
        D = sizes.head_dim
        frequencies = 1 / sizes.rope_theta ** (torch.arange(0, D, 2) / D)
        key = F.normalize((frequencies > MIN_FREQUENCY).float(), dim=0) / math.sqrt(2)  # of either half of the channels
        angles = (torch.arange(1, sizes.n_head + 1) % DISTANCES)[:, None] * frequencies  # (n_head, D/2)
        cos, sin = angles.cos(), angles.sin()
        queries = torch.cat((key * (cos + sin), key * (cos - sin)), dim=1)  # (n_head, D): the key rotated back
        directions = torch.cat((queries.flatten(), key.repeat(2 * sizes.n_kv_head)))
        weight[: len(directions)] += STRENGTH * torch.outer(directions, common)
