from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from mlx_distributed.cli.interrupt import Interrupt

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield Interrupt()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_before_training_it_ends_at_once(interrupt: Interrupt, number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert not interrupt.requested


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_while_training_the_first_asks_and_the_second_insists(interrupt: Interrupt, first: int, second: int) -> None:
    interrupt.training = True
    assert not interrupt.requested
    signal.raise_signal(first)
    assert interrupt.requested
    with pytest.raises(KeyboardInterrupt, match="interrupted twice: ended without saving; --resume goes on"):
        signal.raise_signal(second)


def test_after_training_it_ends_at_once(interrupt: Interrupt) -> None:
    interrupt.training = True
    interrupt.training = False
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_came_while_signals_were_blocked_is_not_lost(interrupt: Interrupt, number: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        Interrupt()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_it_is_known_whether_this_process_alone_is_to_end(interrupt: Interrupt, number: int) -> None:
    interrupt.training = True
    signal.raise_signal(number)
    assert interrupt.terminated is (number == signal.SIGTERM)
