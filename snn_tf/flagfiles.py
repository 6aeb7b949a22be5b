"""Flagfiles: `--flagfile=FILE` replaced by the words in FILE, one a line, and so on inside it.

absl does the same, but passes over a file that includes itself or has no name, and does not name one
that is not text. Relative paths, nested ones too, start from the working directory.
"""

import os
from collections.abc import Sequence

from snn_tf.errors import UsageError

_NAMES = ("--flagfile", "-flagfile")
_COMMENTS = ("#", "//")
_LARGEST = 2**20  # characters
_DEEPEST = 16


def expanded(words: Sequence[str], within: tuple[str, ...] = ()) -> list[str]:
    """Command line words, those of flagfiles in the place of the flagfile.

    Args:
      words: without the program's name.
      within: paths of the flagfiles that the words stand in, outermost first.

    Raises:
      UsageError: a flagfile has no name, cannot be read, includes itself, or lies too deep.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, given, path = word.partition("=")
        if name not in _NAMES:
            found.append(word)
            continue
        path = os.path.expanduser(path if given else next(rest, ""))
        _check_path(path, within)
        found += expanded(_words_in(path), (*within, path))
    return found


def _check_path(path: str, within: tuple[str, ...]) -> None:
    if not path:
        raise UsageError("--flagfile=: must name a file, such as --flagfile=flags/quickstart.flags")
    if path in within:
        chain = " → ".join((*within[within.index(path) :], path))
        raise UsageError(f"--flagfile={path}: must not include itself ({chain})")
    if len(within) >= _DEEPEST:
        raise UsageError(f"--flagfile={path}: must be nested at most {_DEEPEST} deep")


def _words_in(path: str) -> list[str]:
    """A flagfile's lines, without comments and blank lines."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_LARGEST + 1)
    except UnicodeDecodeError:
        raise UsageError(f"--flagfile={path}: must be a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--flagfile={path}: cannot be read ({reason})") from None
    if len(text) > _LARGEST:
        raise UsageError(f"--flagfile={path}: must be at most {_LARGEST} characters long")
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith(_COMMENTS)]
