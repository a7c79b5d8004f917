"""Ranks agree before their process group exists, end together, and name those that are lost.

torchrun, or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, gives them a key-value store.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
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
LISTEN_S = 2.0  # between two looks for a roll call
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
        self._listener: threading.Thread | None = None
        self._wake = threading.Event()  # of the listener: to call the roll, or to end
        self._has_left = False
        self._has_noticed = False  # that a rank is lost
        self._places: list[str | None] | None = None  # where each rank was at a roll call; None: no answer

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
        # The main process may come late, and then wait for a lost rank.
        answer = json.loads(self._wait_for(key, 0, 2 * self.timeout_s + ANSWER_S))
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
            deadline = time.monotonic() + self.timeout_s
            for rank in range(1, self.size):
                problem = json.loads(self._wait_for(f"{key}/{rank}", rank, max(deadline - time.monotonic(), POLL_S)))
                if problem:
                    is_stopped, text = problem
                    raise (RunStopped if is_stopped else InputError)(f"{self.name(rank)}: {text}")

        self.run_on_main(collect)
        return value

    def raise_unless_equal(
        self, settings: dict[str, Any], of: str = "", hint: str = "start all processes with the same settings and data"
    ) -> None:
        """Raise InputError for settings that differ from the main process's. of: a prefix of their names."""
        theirs = self.run_on_main(lambda: settings)

        def compare() -> None:
            own = json.loads(json.dumps(settings))
            different = [name for name in own if own[name] != theirs.get(name)]
            if different:
                lines = [f"{of}{name}={own[name]}, but {theirs.get(name)} on {self.name(0)}" for name in different]
                raise InputError("; ".join(lines) + ": " + hint)

        self.run_on_all(compare)

    def leave(self) -> None:
        """Stop using the store. The main process may host it, so it waits until all ranks have left."""
        self._stop_listening()
        if self.store is not None:
            with contextlib.suppress(dist.DistError):
                _count(self.store, "left", self.size if self.is_main else 0)

    def listen(self) -> None:
        """From now on answer roll calls, in a thread, also while this rank waits in a collective."""
        if self.store is not None:
            self._listener = threading.Thread(target=self._answer_roll_call, args=(self.store.clone(),), daemon=True)
            self._listener.start()
            atexit.register(self._stop_listening)  # a thread still inside the store can crash the interpreter at exit

    def _stop_listening(self) -> None:
        if not self._wake.is_set():
            self._has_left = True
            self._wake.set()
            if self._listener:
                self._listener.join(ANSWER_S)

    def _answer_roll_call(self, store: Any) -> None:
        """Wait for a roll call, of this rank or another; answer it, and keep the answers of all."""
        with contextlib.suppress(dist.DistError):  # the store has gone
            while not self._wake.wait(LISTEN_S) and not store.check(["roll call"]):
                pass
            if self._has_left:
                return
            store.set("roll call", "")
            store.set(f"place/{self.rank}", "" if self._has_noticed else _place())
            _count(store, "answers", self.size)
            # One rank asks for all, else requests grow with the square; the others do if it is lost meanwhile.
            if store.add("collectors", 1) > 1:
                with contextlib.suppress(dist.DistError):
                    store.wait(["places"], timedelta(seconds=ANSWER_S))
            if not store.check(["places"]):
                keys = [f"place/{rank}" for rank in range(self.size)]
                answers = [store.get(key).decode() if store.check([key]) else None for key in keys]
                store.set("places", json.dumps(answers))
            places: list[str | None] = json.loads(store.get("places"))
            self._places = places
            readers = self.size - places.count(None)
            _count(store, "read", readers if self.is_main else 0)  # the main process may host the store

    def describe_lost(self) -> str:
        """Name the ranks that do not answer; if all do, say where those are that have not noticed the failure."""
        if self.store is None:
            return "another process crashed or hangs"
        self._has_noticed = True
        self._wake.set()
        if self._listener:
            self._listener.join(3 * ANSWER_S)  # a store that hangs never answers
        if self._places is None:
            return f"the store on {self.hosts[0]} does not answer: that process or node hangs or has died"
        silent = [self.name(rank) for rank, place in enumerate(self._places) if place is None]
        busy = [f"{self.name(rank)} is at {place}" for rank, place in enumerate(self._places) if place]
        if silent:
            return f"{_shorten(silent)} did not answer: it hangs or has died"
        return f"all ranks answer; {_shorten(busy)}" if busy else "all ranks answer, so the network between them failed"

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
                f"{self.name(self.rank)}: {self.name(rank)} did not answer for {self.timeout_s:g} s or has ended; see "
                "its output, then resume with --resume=auto"
            ) from error


def _count(store: Any, name: str, enough: int) -> None:
    """Add one to a count, and wait until it is enough, for a while."""
    deadline = time.monotonic() + ANSWER_S
    count = store.add(name, 1)
    while count < enough and time.monotonic() < deadline:
        time.sleep(0.1 + enough / 1000)  # so that thousands of ranks do not flood the store
        count = store.add(name, 0)


def _place() -> str:
    """Where the main thread of this process is."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}, {frame.f_code.co_name}"


def _shorten(items: list[str]) -> str:
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return ", ".join(items[:8]) + more


def read_place() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) alone. Raises InputError."""
    rank, local_rank, size = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if "WORLD_SIZE" not in os.environ or size == "1":
        return 0, 1
    if not (rank.isdecimal() and local_rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={size}: must be numbers, RANK below WORLD_SIZE; start "
            "the processes by torchrun"
        )
    return int(rank), int(size)


def world_size() -> int:
    """The number of processes that torchrun started."""
    return read_place()[1]


def join(timeout_s: float = TIMEOUT_S) -> Ranks:
    """Meet the other processes of the run, if there are any.

    Raises RunStopped where one does not come, and InputError without an address.

    torchrun's store outlives a restart, with the keys of the ranks before. So the main process draws a prefix for all
    keys, and each rank knows the prefix to be of this start when it finds its own greeting answered.
    """
    ranks = Ranks(timeout_s)
    ranks.rank, size = read_place()
    if size == 1:
        return ranks
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not port.isdecimal():
        raise InputError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: must be the address and the port at which {size} processes "
            "meet; start them by torchrun"
        )
    greeting = [os.urandom(8).hex(), socket.gethostname()]
    runs_already = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = timedelta(seconds=min(timeout_s, STORE_S) if runs_already else timeout_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timedelta(seconds=timeout_s))
        greetings = (_gather if ranks.is_main else _greet)(store, ranks, size, greeting)
    except (dist.DistError, ValueError) as error:
        raise RunStopped(
            f"rank {ranks.rank} on {greeting[1]}: {size} processes did not meet at {address}:{port} "
            f"({first_line(error)}): see the output of each; if one ended, fix its error, else start torchrun on each "
            "node, with a --local_addr that the others reach"
        ) from error
    ranks.hosts = [host for _, host in greetings]
    ranks.listen()
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
        raise ValueError(f"no sign of rank {_shorten(missing)} for {ranks.timeout_s:g} s") from error
    greetings = [greeting, *(json.loads(ranks.store.get(key)) for key in keys)]
    ranks.store.set("greetings", json.dumps(greetings))
    return greetings


def _greet(store: Any, ranks: Ranks, size: int, greeting: list[str]) -> list[list[str]]:
    """The other processes' part of `join`: greet under the current prefix until the answer has this greeting."""
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
