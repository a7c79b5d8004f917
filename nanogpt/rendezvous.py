"""Ranks agree before their process group exists, end together, and name those that are lost.

torchrun, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, gives them a key-value store.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from nanogpt.device import is_out_of_memory
from nanogpt.errors import InputError, RunStopped, first_line

T = TypeVar("T")
TIMEOUT_S = 600.0  # how long a rank waits for the others
STORE_S = 60.0  # how long it waits to connect to torchrun's store, which already runs
ANSWER_S = 10.0  # after a failure: how long the ranks wait for each other's answers
POLL_S = 0.2  # between two looks for an answer
PRINT_S = 1.0  # time for the main process to print an error before torchrun kills it


class Ranks:
    """The processes of a run, and the store through which they agree; alone without one.

    hosts: the host of each rank.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        self.timeout_s = timeout_s
        self.rank = 0
        self.hosts = [socket.gethostname()]
        self.store: Any = None
        self._calls = 0  # which all ranks make in the same order

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def size(self) -> int:
        return len(self.hosts)

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def run_on_main(self, function: Callable[[], T]) -> T:
        """The result of `function` on the main process, as JSON; where it raises, all ranks do.

        The error is printed by the main process and once by each other node.
        """
        if self.store is None:
            return function()
        self._calls += 1
        key = f"answer/{self._calls}"
        if self.is_main:
            try:
                value = function()
            except BaseException as error:
                self.store.set(key, json.dumps({"error": self._describe(error)}))
                self.leave()
                raise
            self.store.set(key, json.dumps({"value": value}))
            return value
        # The main process may itself wait for a lost rank.
        answer = json.loads(self._wait_for(key, 0, self.timeout_s + ANSWER_S))
        if "error" in answer:
            self.leave()
            if os.environ.get("GROUP_RANK", "0") == "0":  # on the node of the main process
                time.sleep(PRINT_S)
            is_stopped, text = answer["error"]
            raise (RunStopped if is_stopped else InputError)(text if os.environ.get("LOCAL_RANK", "0") == "0" else "")
        return answer["value"]

    def run_on_all(self, function: Callable[[], T]) -> T:
        """Call `function` on every rank and return this rank's result; an error on one rank ends all of them."""
        if self.store is None:
            return function()
        failure: Exception | None = None
        try:
            value = function()
        except Exception as error:
            failure = error
        key = f"result/{self._calls}"
        self.store.set(f"{key}/{self.rank}", json.dumps(failure and self._describe(failure)))
        if failure and not self.is_main and not isinstance(failure, InputError | RunStopped):
            raise failure  # a bug, whose traceback is of use

        def collect() -> None:
            if failure:
                raise failure
            for rank in range(1, self.size):
                problem = json.loads(self._wait_for(f"{key}/{rank}", rank, self.timeout_s))
                if problem:
                    is_stopped, text = problem
                    raise (RunStopped if is_stopped else InputError)(f"{self.name(rank)}: {text}")

        self.run_on_main(collect)
        return value

    def leave(self, size: int | None = None) -> None:
        """Stop using the store. The main process may host it, so it waits until `size` ranks have left."""
        if self.store is None:
            return
        with contextlib.suppress(dist.DistError):
            self.store.add("left", 1)
            deadline = time.monotonic() + ANSWER_S
            while self.is_main and self.store.add("left", 0) < (size or self.size) and time.monotonic() < deadline:
                time.sleep(0.05)

    def describe_lost(self) -> str:
        """The ranks that do not answer, in words. Each rank that lost another calls this."""
        if self.store is None:
            return "another process crashed or hangs"
        silent: list[int] | None = None

        def look() -> None:
            nonlocal silent
            with contextlib.suppress(dist.DistError):
                self.store.set(f"alive/{self.rank}", "")
                self.store.add("alive", 1)
                deadline = time.monotonic() + ANSWER_S
                while self.store.add("alive", 0) < self.size and time.monotonic() < deadline:
                    time.sleep(0.1)
                names = [rank for rank in range(self.size) if not self.store.check([f"alive/{rank}"])]
                self.leave(self.size - len(names))
                silent = names

        thread = threading.Thread(target=look, daemon=True)  # a store that hangs never returns
        thread.start()
        thread.join(3 * ANSWER_S)
        if silent is None:
            return f"the store on {self.hosts[0]} does not answer: that process or node hangs or has died"
        if not silent:
            return "all ranks answer, so the network between them failed"
        names = ", ".join(map(self.name, silent[:8]))
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        return f"{names}{more} did not answer: it hangs or has died"

    def _describe(self, error: BaseException) -> list[Any]:
        """An error as JSON: whether it is a RunStopped, as those that are no InputError become, and its text."""
        if isinstance(error, InputError | RunStopped):
            return [isinstance(error, RunStopped), str(error)]
        return [True, f"{self.name(self.rank)} failed: {error!r}"]

    def _wait_for(self, key: str, rank: int, timeout_s: float) -> str:
        """The value of a key that another rank sets. Raises RunStopped where it does not."""
        try:
            self.store.wait([key], timedelta(seconds=timeout_s))
            return self.store.get(key).decode()
        except dist.DistError as error:
            raise RunStopped(
                f"{self.name(self.rank)}: {self.name(rank)} did not answer for {timeout_s:g} s or has ended; see "
                "its output, then resume with --resume=auto"
            ) from error


def join(timeout_s: float = TIMEOUT_S) -> Ranks:
    """Meet the other processes of the run, if there are any. Raises InputError where one does not come.

    torchrun's store outlives a restart, with the keys of the ranks before. So the main process draws a prefix for all
    keys, and each rank knows the prefix to be of this start when it finds its own greeting answered.
    """
    ranks = Ranks(timeout_s)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ranks
    ranks.rank = int(os.environ.get("RANK", 0))
    greeting = [os.urandom(8).hex(), socket.gethostname()]
    runs_already = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=min(timeout_s, STORE_S) if runs_already else timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timedelta(seconds=timeout_s))
        greetings = (_gather if ranks.is_main else _greet)(store, ranks, size, greeting)
    except (dist.DistError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"rank {ranks.rank} on {greeting[1]}: {size} processes did not meet at {address} "
            f"({first_line(error)}): start torchrun on each node, and give it an address of its node "
            "that the others reach by --local_addr"
        ) from error
    ranks.hosts = [host for _, host in greetings]
    return ranks


def _gather(store: Any, ranks: Ranks, size: int, greeting: list[str]) -> list[list[str]]:
    """The main process's part of `join`: draw the prefix, wait for all greetings, and answer them."""
    prefix = os.urandom(8).hex()
    store.set("prefix", prefix)
    ranks.store = dist.PrefixStore(prefix, store)
    keys = [f"greeting/{rank}" for rank in range(1, size)]
    try:
        ranks.store.wait(keys, timedelta(seconds=ranks.timeout_s))
    except dist.DistError as error:
        missing = [str(rank) for rank, key in enumerate(keys, 1) if not ranks.store.check([key])]
        raise ValueError(f"no sign of rank {', '.join(missing)} for {ranks.timeout_s:g} s") from error
    greetings = [greeting, *(json.loads(ranks.store.get(key)) for key in keys)]
    ranks.store.set("greetings", json.dumps(greetings))
    return greetings


def _greet(store: Any, ranks: Ranks, size: int, greeting: list[str]) -> list[list[str]]:
    """Any other process's part of `join`: greet under the present prefix until the answer has this greeting."""
    prefix = ""
    deadline = time.monotonic() + ranks.timeout_s
    while time.monotonic() < deadline:
        if (present := store.get("prefix").decode()) != prefix:
            prefix = present
            ranks.store = dist.PrefixStore(prefix, store)
            ranks.store.set(f"greeting/{ranks.rank}", json.dumps(greeting))
        if ranks.store.check(["greetings"]):  # a wait that times out prints warnings
            greetings = json.loads(ranks.store.get("greetings"))
            if len(greetings) == size and greetings[ranks.rank] == greeting:
                return greetings
        time.sleep(POLL_S)
    raise ValueError(f"no answer of rank 0 for {ranks.timeout_s:g} s")


@contextlib.contextmanager
def explain_errors(
    hint: str, ranks: Ranks | None = None, before_update: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Turn running out of memory into an InputError with `hint`, and a lost process into RunStopped.

    Once before_update() is false, every InputError becomes RunStopped.
    """
    try:
        yield
    except (RuntimeError, MemoryError, InputError) as error:
        # A collective in which another process takes no part: DistError, or gloo's plain RuntimeError.
        is_lost = dist.is_available() and isinstance(error, dist.DistError)
        if is_lost or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            rank = os.environ.get("RANK", "0")
            lost = (ranks or Ranks()).describe_lost()
            raise RunStopped(
                f"rank {rank}: a collective failed or timed out ({first_line(error)}): {lost}; see the output there, "
                "then resume with --resume=auto"
            ) from error
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        message = str(error) if isinstance(error, InputError) else hint
        raise (InputError if before_update() else RunStopped)(message) from error
