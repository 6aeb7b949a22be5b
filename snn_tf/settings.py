"""What is known of a setting, such as meaning, unit and range, and whether a value is allowed.

The settings themselves are in `snn_tf.config`.
"""

import dataclasses
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from snn_tf.errors import UsageError

_KEY = "setting"
# Control characters, halves of surrogate pairs (what is no UTF-8 on a command line), line separators.
_NOT_IN_A_LINE = {"Cc", "Cs", "Zl", "Zp"}
_LARGEST_INTEGER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is known of one hyper-parameter besides its name, type and default.

    Attributes:
      help: meaning, with the equation's symbol where there is one.
      group: heading under which `--help` shows it.
      stages: stages whose result depends on it; empty if no result does.
      unit: unit of a number, shown in the help.
      low, high: bounds of a number, or of each number of a list.
      low_open, high_open: whether the bound itself is excluded.
      choices: allowed words.
    """

    help: str
    group: str
    stages: tuple[str, ...] = ()
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    choices: tuple[str, ...] = ()

    def allowed(self) -> str:
        """The range or the choices in words, empty if anything goes."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.low == -math.inf and self.high == math.inf:
            return ""
        if self.high == math.inf:
            return ("above " if self.low_open else "at least ") + f"{self.low:.10g}"
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"in {left}{self.low:.10g}, {self.high:.10g}{right}"

    def admits(self, value: Any) -> bool:
        """Whether a single value is among the choices and within the bounds."""
        if self.choices:
            return value in self.choices
        if isinstance(value, int | float) and not isinstance(value, bool):
            above = value > self.low if self.low_open else value >= self.low
            below = value < self.high if self.high_open else value <= self.high
            return math.isfinite(value) and above and below
        return True


def setting(
    default: Any, help: str, group: str, stages: Sequence[str] = (), unit: str = "", **rest: Any
) -> Any:
    """A field of a dataclass that knows its `Setting`; see `setting_of`."""
    metadata = {_KEY: Setting(help, group, tuple(stages), unit, **rest)}
    return dataclasses.field(default=default, metadata=metadata)


def setting_of(field: dataclasses.Field) -> Setting:
    """What is known of a field that `setting` made."""
    return field.metadata[_KEY]


def check(field: dataclasses.Field, value: Any) -> None:
    """Raises `UsageError` naming flag, value and what is allowed, if a field may not have the value."""
    known = setting_of(field)
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str) and not _is_one_line(item):
            raise UsageError(
                f"--{field.name}={value!a}: must be one line of Unicode text, without space at its ends"
            )
        if not known.admits(item):
            allowed = known.allowed() or "a finite number"
            raise UsageError(f"--{field.name}={shown(value)}: must be {allowed}")
        if isinstance(item, int) and item > _LARGEST_INTEGER:
            raise UsageError(f"--{field.name}={shown(value)}: must be at most {_LARGEST_INTEGER}")


def _is_one_line(text: str) -> bool:
    """Whether a flagfile gives the text back as it is."""
    kinds = {unicodedata.category(character) for character in text}
    return text == text.strip() and kinds.isdisjoint(_NOT_IN_A_LINE)


def shown(value: Any) -> str:
    """A setting's value as it is written on a command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
