"""What the settings of a run may not be together, or which words some of them take.

Takes plain values by the name of their setting; one value's own range is checked in `snn_tf.settings`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from snn_tf.errors import UsageError
from snn_tf.settings import shown

Values = Mapping[str, Any]

_EXAMPLES = {"stage": "all", "run_dir": "runs/default", "dataset": "digits"}
_PATTERNS = {"[", "\\"}
_NEEDED_BY_MAGNITUDE_UNIFORM = {
    "structure": "irregular",
    "budget": "weights",
    "dense_ends": False,
    "macs_exponent": 0.0,
}


def check(values: Values) -> None:
    """Raises `UsageError` naming flag, value and what is allowed, at the first contradiction."""
    _check_folders(values)
    _check_execution(values)
    _check_compression(values)


def same_folder(one: str, other: str) -> bool:
    """Whether two paths lead to one folder, which need not be there."""
    return os.path.realpath(one) == os.path.realpath(other)


def _check_folders(values: Values) -> None:
    for flag, example in _EXAMPLES.items():
        if not values[flag]:
            raise UsageError(f"--{flag}=: must not be empty; an example is --{flag}={example}")
    for flag in ("run_dir", "data_dir"):
        folder = values[flag]
        if folder and (strange := _PATTERNS.intersection(os.path.abspath(folder))):
            raise UsageError(
                f"--{flag}={folder}: must lead to a path without {min(strange)}, which "
                "TensorFlow takes for a pattern"
            )
    for flag in ("meta_model", "snn_start"):
        folder = values[flag]
        if folder and same_folder(folder, values["run_dir"]):
            raise UsageError(f"--{flag}={folder}: must be another folder than --run_dir")


def _check_execution(values: Values) -> None:
    if not re.fullmatch(r"[0-9]{1,9}m?", str(values["checkpoint_every"])):
        raise UsageError(
            f"--checkpoint_every={values['checkpoint_every']}: must be a number of steps, such as 200, "
            "or of minutes, such as 10m"
        )
    first_last = values["profile_steps"]
    if first_last and (len(first_last) != 2 or first_last[0] >= first_last[1]):
        raise UsageError(f"--profile_steps={shown(first_last)}: must be two rising steps, such as 10,20")
    if (values["lif"], values["jit_compile"]) == ("native", "true"):
        raise UsageError("--jit_compile=true: must be false or auto with --lif=native")


def _check_compression(values: Values) -> None:
    if values["drop_fraction_end"] > values["drop_fraction"]:
        raise UsageError(
            f"--drop_fraction_end={values['drop_fraction_end']:g}: "
            f"must be at most --drop_fraction={values['drop_fraction']:g}"
        )
    if values["dense_ends"] and values["structure"] == "channel":
        raise UsageError("--dense_ends=True: must be False with --structure=channel")
    if values["activation_levels"] and values["method"] == "dense":
        raise UsageError(
            f"--activation_levels={values['activation_levels']}: must be 0 with --method=dense, which "
            "trains no student; --density=1 --student_start=meta_model trains a dense one"
        )
    if values["method"] == "magnitude_uniform":
        for flag, needed in _NEEDED_BY_MAGNITUDE_UNIFORM.items():
            if values[flag] != needed:
                raise UsageError(
                    f"--{flag}={values[flag]}: must be {needed} with --method=magnitude_uniform"
                )
