"""What computes: whether TensorFlow sees a GPU, and what Linux says of the processor."""

import pathlib

import tensorflow as tf

_CPUS = pathlib.Path("/proc/cpuinfo")


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(tf.config.list_physical_devices("GPU"))


def cpuinfo() -> str:
    """Lines `name : value`, a block for each core; empty where the system is not Linux."""
    try:
        return _CPUS.read_text()
    except OSError:
        return ""
