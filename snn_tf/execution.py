"""How to compute on this machine: what every `auto` under Execution stands for.

It is decided once for a run and kept in `<run_dir>/execution.json`, so that a run that resumes goes on
computing as it began. A flag that says otherwise later holds for its own command, with `--overwrite`
from there on.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops

from snn_tf import machine, native
from snn_tf.config import Config
from snn_tf.errors import UserError, first_line
from snn_tf.files import read_json, write_json

AUTOMATIC = ("lif", "jit_compile", "precision")


def resolve(config: Config) -> Config:
    """Replaces every `auto` under Execution by what the run began with, or by what suits this machine.

    Says what it has chosen.

    With `--deterministic`, TensorFlow computes so from here on, for the whole process.

    Raises:
      UsageError: what the run began with contradicts a setting given now.
      UserError: the run folder cannot be read or written.
    """
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    path = pathlib.Path(config.run_dir) / "execution.json"
    kept = read_json(path) if path.exists() else {}
    if not isinstance(kept, dict) or not all(isinstance(value, str) for value in kept.values()):
        raise UserError(f"{path}: does not say how the run is computed; remove it to choose anew")
    best = _best(config)
    chosen = {
        name: kept.get(name, best[name]) if getattr(config, name) == "auto" else getattr(config, name)
        for name in AUTOMATIC
    }
    if chosen["lif"] == "native" and (reason := _native_missing()):
        print(f"--lif=native: using fused instead, {reason}")
        chosen["lif"] = "fused"
    resolved = dataclasses.replace(config, **chosen)
    remembered = chosen if config.overwrite else chosen | kept
    if remembered != kept:
        write_json(path, remembered)
        print("execution: " + ", ".join(f"--{name}={getattr(resolved, name)}" for name in chosen))
    return resolved


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Lets go, at the end of the block, of the graphs that were traced in it.

    TensorFlow registers the gradient of a `tf.custom_gradient` anew in every trace, and keeps it, and
    with it the graph, as long as the process lives.
    """
    registered = ops.gradient_registry._registry
    before = set(registered)
    try:
        yield
    finally:
        for name in registered.keys() - before:
            if name.startswith("CustomGradient-"):
                del registered[name]


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Raises `UserError` where the machine fails the block: no memory is left, or a file has gone."""
    try:
        yield
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        raise UserError(
            f"not enough memory: {first_line(error)}; lower --batch_size, --width or --timesteps, in "
            "convert --calibration_batch_size or --calibration_timesteps"
        ) from error
    except (tf.errors.NotFoundError, tf.errors.PermissionDeniedError, tf.errors.DataLossError) as error:
        raise UserError(f"a file could no longer be read: {first_line(error)}") from error


def _best(config: Config) -> dict[str, Any]:
    gpus = tf.config.list_physical_devices("GPU")
    compiled = config.jit_compile == "true" or (config.jit_compile == "auto" and bool(gpus))
    return {
        "lif": "fused" if gpus or compiled else "native",
        "jit_compile": "true" if gpus and config.lif != "native" else "false",
        "precision": "mixed_bfloat16" if _has_fast_bfloat16(gpus) else "float32",
    }


def _has_fast_bfloat16(gpus: list) -> bool:
    """Products of bfloat16 in hardware: on a CPU, AVX-512's or AMX's; on a GPU, from Ampere (8.0) on."""
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        return details.get("compute_capability", (0, 0)) >= (8, 0)
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(machine.cpuinfo().split())


def _native_missing() -> str:
    try:
        native.operations()
    except native.Unavailable as error:
        return str(error)
    return ""
