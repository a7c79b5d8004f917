"""An initialization whose first layer attends to the preceding tokens."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from nanogpt.sharding import copy_rows, gather

DISTANCES = 4  # heads attend to the tokens 1, 2, 3 and 0 positions back, in turn
MIN_FREQUENCY = 0.2  # radians per position; slower rotations hardly differ between neighbors
STRENGTH = 2.0  # of the keys' and queries' common part: 50/√D times the random rest
QUERY_GAIN = 1.5  # a higher one makes a narrower peak


@torch.no_grad()
def look_back(model: Any) -> None:
    """Initialize each head of a GPT's first layer to attend to one of the last four tokens (arch=modern).

    From random weights a network stalls until it learns such heads (Varre et al. 2025, arXiv:2508.12837). Here all
    embeddings get one vector in common, from which every key and query gets the same direction, the queries' rotated
    back by their distance. To a tied output layer that vector adds the same logit for all tokens, which changes no
    probability.
    """
    c = model.config
    attention = model.blocks[0].attention
    common = F.normalize(torch.randn(c.n_embd), dim=0)
    embedding = gather(model.token_embedding.weight)
    embedding[: c.vocab_size] += 0.01 * math.sqrt(c.n_embd) * common.to(embedding.device)  # half as long as the rest
    copy_rows(model.token_embedding.weight, embedding)

    frequencies = 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
    key = F.normalize((frequencies > MIN_FREQUENCY).float(), dim=0) / math.sqrt(2)  # of either half of the channels
    angles = (torch.arange(1, c.n_head + 1) % DISTANCES)[:, None] * frequencies  # (n_head, D/2)
    cos, sin = angles.cos(), angles.sin()
    queries = torch.cat((key * (cos + sin), key * (cos - sin)), dim=1)  # (n_head, D): the key rotated back
    directions = torch.cat((queries.flatten(), key.repeat(2 * c.n_kv_head)))
    qkv = gather(attention.qkv.weight)
    qkv[: len(directions)] += STRENGTH * torch.outer(directions, common).to(qkv.device)
    copy_rows(attention.qkv.weight, qkv)
    attention.q_norm.weight.fill_(QUERY_GAIN)
