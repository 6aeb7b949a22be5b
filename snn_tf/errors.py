"""Errors that a user can cause: one readable line each, and the exit code that goes with it.

And the one that a caller of a function can: a word that it does not know.
"""

import re
import textwrap
from collections.abc import Sequence

# What TensorFlow writes before the message of an error in a graph.
_BEFORE_MESSAGE = re.compile(r"Graph execution error:|Detected at node |<stack traces |\s|$")


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows it and TensorFlow's names of nodes."""
    lines = str(error).strip().split("\n")
    said = next((line for line in lines if not _BEFORE_MESSAGE.match(line)), lines[0])
    return textwrap.shorten(re.sub(r"\{\{.*?\}\}|\[Op:.*", "", said), 300)


def check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    """Raises `ValueError`, for whoever calls a function with a word that it does not know."""
    if value not in allowed:
        raise ValueError(f"{argument} is {value!r}; allowed are {', '.join(allowed)}")


class UserError(Exception):
    """Something outside the program is not as it must be: data, files, disk, a trained run."""

    exit_code = 1


class UsageError(UserError, ValueError):
    """The settings themselves are wrong; the line names flag, value and what is allowed."""

    exit_code = 2


class Interrupted(BaseException):
    """A signal asked the process to stop.

    It is no `Exception`, so that nothing on the way up takes it for a failure.

    Args:
      signal: its name, such as "SIGTERM".
      kept: what was saved.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command, given again, goes on

    def __init__(self, signal: str, kept: str = "what is finished is kept"):
        super().__init__(f"stopped by {signal}; {kept}; the same command goes on from there")
        self.signal = signal
