"""Requests to stop, save and decay: from signals to the training loop, by name."""

import signal
from collections.abc import Iterator

import pytest

from nanogpt import control as control_module
from nanogpt.control import Control, Requests, SignalCatcher, ignore_save_signal

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGINT, Control(interrupt=1.0)),
        (signal.SIGTERM, Control(terminate=1.0)),
        (signal.SIGUSR1, Control(save=1.0)),
    ],
)
def test_a_signal_becomes_a_request(number: signal.Signals, expected: Control):
    ignore_save_signal()
    signal.raise_signal(signal.SIGUSR1)  # there is nothing to save yet
    signals = SignalCatcher()
    signal.raise_signal(number)
    assert signals.control(save_due=False, decay_steps=0) == expected
    second = Control() if number == signal.SIGUSR1 else expected  # one checkpoint was asked for
    assert signals.control(save_due=False, decay_steps=0) == second
    assert signals.control(save_due=True, decay_steps=7) == second._replace(save=1.0, decay_steps=7.0)


def test_a_second_interrupt_ends_at_once():
    SignalCatcher()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_requests_obey_the_sum_over_the_ranks():
    requests = Requests()
    requests.add([Control(), Control(save=2.0)])
    assert (requests.exit_status, requests.save, requests.decay_steps) == (0, True, 0)
    requests.add([Control(interrupt=1.0), Control(decay_steps=12.0)])
    assert (requests.exit_status, requests.save, requests.decay_steps) == (130, True, 12)
    requests.add([Control(terminate=1.0)])
    assert (requests.exit_status, requests.save, requests.decay_steps) == (143, True, 12)


def test_a_run_that_saves_nothing_is_interrupted_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    SignalCatcher(can_save=False)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_interrupts_a_print_is_remembered(monkeypatch: pytest.MonkeyPatch):
    def interrupted(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(control_module, "print0", interrupted)
    signals = SignalCatcher()
    signal.raise_signal(signal.SIGTERM)
    assert signals.control(save_due=False, decay_steps=0).terminate == 1


def test_a_save_signal_between_two_lines_is_not_lost():
    class Arriving(set):
        """In which SIGUSR1 arrives right after the first look for it."""

        def __contains__(self, name: object) -> bool:
            is_here = super().__contains__(name)
            if name == "SIGUSR1":
                self.add(name)
            return is_here

    signals = SignalCatcher()
    signals.received = Arriving()
    assert [signals.control(save_due=False, decay_steps=0).save for _ in range(2)] == [0, 1]
