"""What a record says of how it was made: the commit, the packages, the device."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import tensorflow as tf

from snn_tf import machine

_PACKAGES = (
    "tensorflow",
    "tf_keras",
    "tensorflow-model-optimization",
    "tensorflow-datasets",
    "numpy",
    "snn_tf",
)


def commit() -> str:
    """Commit of the source tree, with -dirty if it has changes; empty outside a git checkout of it."""
    try:
        _git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*words: str) -> str:
    command = ["git", "-C", str(pathlib.Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device() -> str:
    """The GPU's name, or the processor's, as exactly as it is known, and its number of cores."""
    if gpus := tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    facts: dict[str, str] = {}
    for line in machine.cpuinfo().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    # Virtual machines hide the rest of the name, and other processors train to other bits.
    kind = "-".join(facts[name] for name in ("cpu family", "model", "stepping") if name in facts)
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({kind})" if kind else name
