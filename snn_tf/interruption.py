"""SIGTERM, SIGINT and SIGHUP: a training finishes its step and saves it; all else stops where it is.

Every file is written beside its place and renamed, so that a stage may stop anywhere. A second SIGINT
ends the process at once.

What is raised in a weak reference's callback or a destructor goes no further: Python says so and carries
on. `Interrupted` is then raised once more, a moment later.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from snn_tf.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MOMENT = 0.01  # seconds


class _State:
    asked = ""  # the signal that came
    waits = False  # whether the code that runs looks for it itself


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turns the three signals into `Interrupted` for the length of the block; only in the main thread.

    One that is ignored, as in a shell's background or under nohup, stays so.
    """
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGALRM)}
    hook = sys.unraisablehook
    _State.asked, _State.waits = "", False
    for number in _SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, _handle)
    signal.signal(signal.SIGALRM, _raise_if_not_waiting)
    sys.unraisablehook = _raising_again(hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.asked = ""


def _handle(number: int, frame: FrameType | None) -> None:
    del frame
    _State.asked = signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _raise_if_not_waiting()


def _raise_if_not_waiting(*_: object) -> None:
    if not _State.waits:
        check()


def _raising_again(hook: Callable) -> Callable:
    """A hook for what Python cannot pass on: `Interrupted` comes again, all else is said by `hook`."""

    def again(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            signal.setitimer(signal.ITIMER_REAL, _MOMENT)
        else:
            hook(unraisable)

    return again


def check() -> None:
    """Raises `Interrupted` if a signal has come."""
    if _State.asked:
        raise Interrupted(_State.asked)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A signal only raises where the block calls `check`."""
    with _waits(True):
        yield


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Within `deferred`: a signal raises at once, also one that came before."""
    with _waits(False):
        check()
        yield


@contextlib.contextmanager
def _waits(value: bool) -> Iterator[None]:
    before, _State.waits = _State.waits, value
    try:
        yield
    finally:
        _State.waits = before
