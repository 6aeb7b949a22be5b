"""The command line: flags derived from `Config`, help, and errors as single lines.

Help and flag errors are answered before TensorFlow is loaded.
"""

import contextlib
import dataclasses
import difflib
import logging as standard_logging
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags, logging

from snn_tf import interruption
from snn_tf.config import FOLDER, Config
from snn_tf.errors import Interrupted, UsageError, UserError
from snn_tf.flagfiles import expanded
from snn_tf.lock import locked
from snn_tf.settings import setting_of, shown

_LONGEST_NAME = 100
_FOLDERS = ("run_dir", "meta_model", "snn_start", "data_dir", "manual_dir")
_EPILOGUE = """
Flags may stand in a file, one per line: --flagfile=FILE, several times and nested. The last value
given wins, so what overrides a file follows it. What is False or True is set by --batch_norm and
unset by --nobatch_norm or --batch_norm=false. --verbosity=0 shows TensorFlow's own messages.

Symbols: W weights, m the moving average of their gradient, T time steps, v_th threshold of a neuron;
losses are L_CE, cross entropy, L_KD, distillation, and L_AT, which compares attention maps."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one flag per setting of `Config` in `flag_values`."""
    definers = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple: flags.DEFINE_list,
    }
    for field in dataclasses.fields(Config):
        default: Any = field.default
        initial = [str(item) for item in default] if isinstance(default, tuple) else default
        help_text = setting_of(field).help
        definers[type(default)](field.name, initial, help_text, flag_values=flag_values)


def config_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Makes the `Config` from parsed flags. Raises `UsageError` if a value is not allowed."""
    return Config(**{field.name: _read(field, flag_values) for field in dataclasses.fields(Config)})


def _read(field: dataclasses.Field, flag_values: flags.FlagValues) -> Any:
    value = flag_values[field.name].value
    if field.name in _FOLDERS:
        return os.path.expanduser(value)
    if field.name == "dataset" and value.startswith(FOLDER) and value != FOLDER:
        return FOLDER + os.path.normpath(os.path.expanduser(value.removeprefix(FOLDER)))
    if not isinstance(field.default, tuple):
        return value
    if field.name != "profile_steps":
        return tuple(value)
    try:
        return tuple(int(item) for item in value)
    except ValueError:
        line = f"--{field.name}={','.join(value)}: must be whole numbers, such as 10,20"
        raise UsageError(line) from None


def help_text() -> str:
    """All flags under their headings: default, unit, what is allowed, meaning."""
    lines = ["usage: python train.py --flagfile=FILE [--FLAG=VALUE ...]"]
    group = ""
    for field in dataclasses.fields(Config):
        setting = setting_of(field)
        if setting.group != group:
            group = setting.group
            lines += ["", group]
        default = shown(field.default) if field.default != "" else "empty"
        facts = [f"default {default or 'none'}", setting.unit, setting.allowed()]
        lines.append(f"  --{field.name}  ({'; '.join(fact for fact in facts if fact)})")
        lines += textwrap.wrap(setting.help, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n" + _EPILOGUE


def parse(argv: Sequence[str], flag_values: flags.FlagValues = flags.FLAGS) -> Config:
    """Reads command line words, flagfiles included, into the settings.

    Args:
      argv: the program's name and the words.
      flag_values: with the flags of `define_flags`; parsed afterwards.

    Raises:
      UsageError: a word is not a flag, a value is not allowed, or a flagfile is not as it must be.
    """
    words = expanded(argv[1:])
    for word in words:
        # absl's search for a similar name is recursive in its length.
        if len(word.partition("=")[0]) > _LONGEST_NAME:
            raise UsageError(f"{_one_line(word[:40])}...: there is no flag with so long a name")
    try:
        rest = flag_values([argv[0], *words])
    except (flags.Error, ValueError) as error:
        raise UsageError(_one_line(_refusal(error, flag_values))) from error
    if len(rest) > 1:
        raise UsageError(f"{_one_line(rest[1])}: flags start with --, such as --density=0.05")
    return config_from_flags(flag_values)


def _refusal(error: Exception, flag_values: flags.FlagValues) -> str:
    """What absl found wrong, as the flag, its value and what is allowed."""
    text = str(error).removeprefix("flag ")
    if isinstance(error, flags.UnrecognizedFlagError):
        names = [*(field.name for field in dataclasses.fields(Config)), "flagfile"]
        near = difflib.get_close_matches(error.flagname, names)
        return f"--{error.flagname}: is no flag; " + (
            f"near are {', '.join(f'--{name}' for name in near)}" if near else "--help shows all"
        )
    if isinstance(error, flags.IllegalFlagValueError):
        given = text.removesuffix(f": {error.__context__}")
        kind = type(flag_values[given.lstrip("-").partition("=")[0]].default)
        return f"{given}: must be {_KINDS[kind]}" if kind in _KINDS else text
    if text.startswith("Missing value"):
        flag = text.rpartition(" ")[2]
        return f"{flag}: must have a value, as in {flag}=VALUE"
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def _quiet_import(quiet: bool) -> Iterator[None]:
    """Sets up TensorFlow before it is loaded, and sends to nowhere what it says meanwhile."""
    # With several, the order in which oneDNN adds up a filter gradient varies, and so do its last bits.
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
    # Else a process takes all of a GPU's memory, and the one that reloads an export finds none.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    if not quiet:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    standard_logging.getLogger("tensorflow").setLevel(standard_logging.ERROR)
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _run_stages(config: Config) -> None:
    with _quiet_import(flags.FLAGS.verbosity < 0), interruption.deferred():
        from snn_tf import execution, stages
    try:
        with execution.reported():
            stages.run(config)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}") from error


def run() -> None:
    """Entry point of `train.py` and of the console script `snn-train`."""
    try:
        _run()
        sys.stdout.flush()
    except (UserError, Interrupted) as error:
        with contextlib.suppress(OSError):  # of a terminal that was closed, or for want of room
            print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        # What Python still flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Whoever read the output has gone, and needs no line, or there is no room for it.
        if not isinstance(error, BrokenPipeError):
            print(f"train.py: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(UserError.exit_code)


def _run() -> None:
    if any(word in ("-h", "help") or word.startswith(("-help", "--help")) for word in sys.argv[1:]):
        print(help_text())
        return
    if len(sys.argv) == 1:
        raise UsageError(
            "no flags; --flagfile=FILE says what to run, such as --flagfile=flags/quickstart.flags, and "
            "--help shows all"
        )
    define_flags()
    config = parse(sys.argv)
    logging.set_verbosity(flags.FLAGS.verbosity)
    with interruption.handled(), locked(config.run_dir):
        _run_stages(config)
