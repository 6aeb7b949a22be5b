"""SIGTERM and SIGINT: a training finishes its step and saves it; everything else stops where it is.

Every file is written beside its place and renamed, so that a stage may stop anywhere. A second SIGINT
ends the process at once.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from snn_tf.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _State:
    asked = ""  # the signal that came
    waits = False  # whether the code that runs looks for it itself


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turns the two signals into `Interrupted` for the length of the block; only in the main thread.

    One that is ignored, as in a shell's background, stays so.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _State.asked, _State.waits = "", False
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.asked = ""


def _handle(number: int, frame: FrameType | None) -> None:
    del frame
    _State.asked = signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not _State.waits:
        check()


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
