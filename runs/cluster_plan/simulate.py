"""Simulate a step with overlapping communication, and a run with failures and saves.

Goodput is the share of a run's time in steps that count: without saving, restarting, and steps that are repeated.
Young (1974) saves each √(2 δ M) seconds, for saves of δ seconds and M seconds between failures of the whole run. Daly
(2006) extends this to saves that are long against M, and has the expected time of a run in closed form.
"""

import math
import random

GPU_HOURS_PER_FAILURE = 50_000  # 419 unexpected interruptions of 16,384 GPUs in 54 days (Grattafiori et al. 2024)
RESTART_S = 300.0
INTERVALS_MIN = (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60, 75, 90, 120, 150, 180, 240)


def simulate_step(blocks: int, forward: float, backward: float, gather: float, reduce: float, ahead: int = 1) -> float:
    """Seconds of a step of equal blocks under FSDP2, with two queues: arithmetic, and one link.

    A block waits for its weights, gathered in `gather` seconds in forward and again in backward, while at most `ahead`
    blocks before it are unfinished. In backward its gradients are reduced behind it in `reduce` seconds.
    """
    link = 0.0  # when the link is free
    ends = [0.0] * (ahead + 1)  # of each block's arithmetic; the first ones stand for blocks before the first
    for i in range(2 * blocks):
        done = ends[-ahead - 1]  # of block i - ahead - 1
        reduces = reduce if i - ahead - 1 >= blocks else 0.0
        link = max(link, done) + reduces + gather
        ends.append(max(link, ends[-1]) + (forward if i < blocks else backward))
    for end in ends[-min(ahead + 1, blocks) :]:
        link = max(link, end) + reduce
    return link


def slowest_rank(ranks: int, spread: float, steps: int = 20, seed: int = 0) -> float:
    """Mean time of the slowest rank, which all wait for; of one rank it is normal with mean 1 and this spread."""
    draws = random.Random(seed)
    return sum(max(draws.gauss(1, spread) for _ in range(ranks)) for _ in range(steps)) / steps


def simulate_run(interval: float, save: float, restart: float, between: float, failures: int, seed: int = 0) -> float:
    """Goodput of a run that ends at the given number of failures.

    between: mean seconds from one failure to the next. The run saves after each `interval` seconds of steps, for `save`
    seconds. A failure loses the steps since the last save; the restart takes `restart` seconds, and may fail too.
    """
    draws = random.Random(seed)
    time = useful = 0.0
    for _ in range(failures):
        up = draws.expovariate(1 / between) - restart
        time += up + restart
        useful += interval * max(up // (interval + save), 0)
    return useful / time


def expected_goodput(interval: float, save: float, restart: float, between: float) -> float:
    """Daly's closed form of the same."""
    return interval / (between * math.exp(restart / between) * math.expm1((interval + save) / between))


def young(save: float, between: float) -> float:
    """Seconds of steps from one save to the next."""
    return math.sqrt(2 * save * between)


def daly(save: float, between: float) -> float:
    """Seconds of steps from one save to the next, for saves below twice the time between failures."""
    x = math.sqrt(save / (2 * between))
    return young(save, between) * (1 + x / 3 + x * x / 9) - save
