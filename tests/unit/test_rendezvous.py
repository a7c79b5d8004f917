"""Ranks as threads with one store: they meet, agree, fail together, and name those that are lost."""

import contextlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanogpt import distributed, pace, rendezvous
from nanogpt.checkpoint import claim_and_load
from nanogpt.errors import InputError, RunStopped
from nanogpt.rendezvous import Ranks
from nanogpt.run_dir import RunDir


def meet(store: Any, size: int, delays: dict[int, float], timeout_s: float = 10.0) -> list[Ranks]:
    """The ranks of a start, each of which comes after its delay."""

    def come(rank: int) -> Ranks:
        time.sleep(delays.get(rank, 0.0))
        ranks = Ranks(timeout_s)
        ranks.rank = rank
        greetings = (rendezvous._greet if rank else rendezvous._gather)(
            store, ranks, size, [f"{time.time_ns()}", f"host{rank}"]
        )
        ranks.hosts = [host for _, host in greetings]
        return ranks

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(come, range(size)))


def call(all_ranks: list[Ranks], function: Callable[[Ranks], Any]) -> list[Any]:
    """What the function returns or raises on each rank."""

    def attempt(ranks: Ranks) -> Any:
        try:
            return function(ranks)
        except (InputError, RunStopped) as error:
            return error

    with ThreadPoolExecutor(len(all_ranks)) as pool:
        return list(pool.map(attempt, all_ranks))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "POLL_S", 0.01)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Ranks]:
    monkeypatch.setattr(rendezvous, "PRINT_S", 0.0)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 1.0)
    monkeypatch.setattr(rendezvous, "LISTEN_S", 0.05)
    return meet(dist.HashStore(), 3, {})


def test_ranks_meet_though_the_store_has_the_keys_of_earlier_starts():
    store = dist.HashStore()
    prefixes = set()
    for size, late in ((3, 0), (3, 0), (2, 0), (3, 2), (1, 0), (2, 1)):
        all_ranks = meet(store, size, {late: 0.05})
        assert all(ranks.hosts == [f"host{rank}" for rank in range(size)] for ranks in all_ranks)
        assert call(all_ranks, lambda ranks: ranks.run_on_main(lambda: ranks.size)) == [size] * size
        prefixes.add(store.get("prefix"))
    assert len(prefixes) == 6


def test_meeting_ends_when_a_rank_does_not_come():
    with pytest.raises(ValueError, match=r"no sign of rank 1, 2 for 0\.3 s"):
        rendezvous._gather(dist.HashStore(), Ranks(0.3), 3, ["", "host0"])


def test_an_error_of_one_rank_ends_all_and_is_printed_once_a_node(three: list[Ranks], monkeypatch: pytest.MonkeyPatch):
    def fail(ranks: Ranks, culprit: int, error: type[Exception]) -> int:
        if ranks.rank == culprit:
            raise error("why")
        return ranks.rank

    assert call(three, lambda ranks: ranks.run_on_all(lambda: fail(ranks, -1, InputError))) == [0, 1, 2]
    for local_rank, printed in (("0", "rank 2 on host2: why"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        for error in (InputError, RunStopped):
            main, *others = call(three, lambda ranks, e=error: ranks.run_on_all(lambda: fail(ranks, 2, e)))  # type: ignore[misc]
            assert (type(main), str(main)) == (error, "rank 2 on host2: why")
            assert [(type(other), str(other)) for other in others] == [(error, printed)] * 2
    main, *others = call(three, lambda ranks: ranks.run_on_main(lambda: fail(ranks, 0, InputError)))
    assert {type(main), *map(type, others)} == {InputError}
    assert str(main) == "why"


def test_a_rank_that_does_not_come_is_named_by_ranks_that_came_before_the_main_process(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.1)
    all_ranks = meet(dist.HashStore(), 3, {}, timeout_s=0.5)

    def come(ranks: Ranks) -> None:
        if ranks.rank < 2:
            time.sleep((0.4, 0.0)[ranks.rank])
            ranks.run_on_all(lambda: None)

    main, other, _ = call(all_ranks, come)
    assert str(main).startswith("rank 0 on host0: rank 2 on host2 did not answer for 0.5 s")
    assert str(other) == str(main)


def test_the_main_process_waits_for_all_ranks_together(three: list[Ranks], monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []

    def wait_for(key: str, rank: int, timeout_s: float) -> str:
        time.sleep(0.01)
        waits.append(timeout_s)
        return "null"

    monkeypatch.setattr(three[0], "_wait_for", wait_for)
    three[0].run_on_all(lambda: None)
    assert three[0].timeout_s >= waits[0] > waits[1]


@pytest.mark.parametrize(("rank", "size"), [("", "2"), ("0", ""), ("2", "2"), ("-1", "2"), ("a", "2")])
def test_an_environment_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch, rank: str, size: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=rf"^RANK={rank}, LOCAL_RANK=0, WORLD_SIZE={size}: must be numbers"):
        rendezvous.world_size()


def test_auto_must_mean_the_same_on_all_ranks(three: list[Ranks], monkeypatch: pytest.MonkeyPatch):
    dtypes = iter((torch.float32, torch.bfloat16, torch.float32))
    monkeypatch.setattr(distributed, "pick_dtype", lambda *_: next(dtypes))
    main, *others = call(three, lambda ranks: distributed.start("cpu", ranks=ranks))
    assert "dtype=torch." in str(main)
    assert str(main).endswith(": set --device and --dtype")
    assert {type(main), *map(type, others)} == {InputError}


def test_settings_that_differ_are_named(three: list[Ranks]):
    same = {"learning_rate": 0.1, "betas": [0.9, 0.95], "minutes": None}
    assert call(three, lambda ranks: ranks.raise_unless_equal(same)) == [None] * 3
    main, *_ = call(three, lambda ranks: ranks.raise_unless_equal(same | {"seed": ranks.rank // 2}, of="data."))
    assert str(main).startswith("rank 2 on host2: data.seed=1, but 0 on rank 0 on host0: start all processes with")


def test_the_rank_that_does_not_answer_is_named(three: list[Ranks]):
    """By the rank that notices, and later, without the store, by one that was waiting in a collective."""
    for ranks in (three[0], three[2]):
        ranks.listen()
    words = "rank 1 on host1 did not answer: it hangs or has died"
    assert three[0].describe_lost() == words
    assert three[2].describe_lost() == words


def test_a_rank_that_is_lost_while_it_collects_answers_hides_no_other(
    three: list[Ranks], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)
    three[0].store.add("collectors", 1)  # by the rank that does not answer
    for ranks in (three[0], three[2]):
        ranks.listen()
    assert three[0].describe_lost() == "rank 1 on host1 did not answer: it hangs or has died"


def test_processes_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "2950")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match=r"^MASTER_ADDR=, MASTER_PORT=2950: must be the address"):
        rendezvous.join()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(RunStopped, match=r"^rank 0 on .* did not meet at localhost:0 \(Timed out"):
        rendezvous.join(timeout_s=0.2)


@pytest.mark.parametrize("writers", [(0,), (1, 2), (0, 1, 2), ()])
def test_ranks_that_write_and_ranks_that_only_read_stay_in_step(
    three: list[Ranks], writers: tuple[int, ...], tmp_path: Path
):
    """Until their settings are compared, which names the difference."""

    def claim(ranks: Ranks) -> None:
        with contextlib.ExitStack() as stack:
            run_dir = RunDir(tmp_path / "out")
            assert claim_and_load(run_dir, "auto", ranks.rank in writers, ranks, stack) is None
            ranks.raise_unless_equal({"eval_only": ranks.rank not in writers})

    with contextlib.ExitStack() as stack:
        if 0 not in writers:  # a main process that only reads leaves another run's directory to it
            stack.enter_context(RunDir(tmp_path / "out"))
        answers = call(three, claim)
    if len(writers) in (0, 3):
        assert answers == [None] * 3
    else:
        assert "eval_only=" in str(answers[0])


@pytest.mark.parametrize(
    ("noticed", "words"),
    [
        ([2], r"all ranks answer; rank 1 on host1 is at \w+\.py:\d+, \w+"),
        ([1, 2], "all ranks answer, so the network between them failed"),
    ],
    ids=["some", "all"],
)
def test_where_all_answer_those_are_named_that_noticed_nothing(three: list[Ranks], noticed: list[int], words: str):
    for ranks in three:
        ranks.listen()
    for rank in noticed:
        three[rank]._has_noticed = True
    assert re.fullmatch(words, three[0].describe_lost())


def test_a_rank_that_leaves_listens_no_more(three: list[Ranks]):
    for ranks in three:
        ranks.listen()
    call(three, Ranks.leave)
    assert not any(ranks._listener and ranks._listener.is_alive() for ranks in three)


def test_a_directory_is_shared_if_it_shows_the_mark(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanogpt.run_dir.SHARED_S", 0.1)
    with RunDir(tmp_path / "out") as main, RunDir(tmp_path / "another") as other:
        mark = main.mark()
        other.mark()
        RunDir(tmp_path / "out").raise_unless_shared(mark, "host0")
        for folder in (other.path, tmp_path / "none"):
            with pytest.raises(InputError, match="is not the directory that host0 writes into"):
                RunDir(folder).raise_unless_shared(mark, "host0")
        assert main.mark() != mark  # another start


class Layers(torch.nn.Module):
    """Two blocks that take some time each; before the first one all ranks of a sharded run wait."""

    def __init__(self, clock: Any, wait_s: float):
        super().__init__()
        self.clock = clock
        self.wait_s = wait_s
        self.block_s = 0.0
        self.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        for block in self.blocks:
            block.forward = self.compute_block  # type: ignore[method-assign]

    def compute_block(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.seconds += self.block_s
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.seconds += self.wait_s
        for block in self.blocks:
            x = block(x)
        return x


AT_END = "0.24 s to the end of a first forward pass, median 0.04 s"
AT_START = "0.22 s to the start of a first forward pass, median 0.02 s"


@pytest.mark.parametrize(
    ("is_sharded", "is_compiled", "data_s", "block_s", "times"),
    [
        (False, False, 0.2, 0.0, AT_END),
        (False, False, 0.0, 0.1, AT_END),
        (True, False, 0.2, 0.0, AT_END),
        (True, False, 0.0, 0.1, AT_END),
        (True, True, 0.2, 0.0, AT_START),
        (True, True, 0.0, 0.1, ""),  # not seen
    ],
    ids=["data", "blocks", "data, sharded", "blocks, sharded", "data, compiled", "blocks, compiled"],
)
def test_a_slow_rank_is_named(
    three: list[Ranks],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    is_sharded: bool,
    is_compiled: bool,
    data_s: float,
    block_s: float,
    times: str,
):
    """Its data or its blocks are late for a minute; in the next one it loses 2% of a step alone."""
    clock: Any = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    models = [Layers(clock, wait_s=0.4 if is_sharded else 0.0) for _ in three]
    if is_compiled:
        for model in models:
            model.blocks[0]._compiled_call_impl = model.blocks[0]._call_impl
    paces = [pace.Pace(model, ranks, clock, is_sharded) for model, ranks in zip(models, three, strict=True)]
    for step in range(1, 121):
        late_s, slow_s = (data_s, block_s) if step <= 60 else (0.02, 0.0)
        for rank in (2, 1, 0):
            clock.seconds = step - 1.0
            paces[rank].start()
            clock.seconds += 0.02 + late_s * (rank == 2)
            models[rank].block_s = 0.01 + slow_s * (rank == 2)
            models[rank](torch.zeros(1))
            models[rank](torch.zeros(1))  # the second forward pass does not count
            clock.seconds = float(step)
            paces[rank].report(step)
    line = f"step 60: rank 2 on host2 is slow: {times}; the difference is 20% of a step"
    assert capsys.readouterr().out.splitlines() == ([line] if times else [])
