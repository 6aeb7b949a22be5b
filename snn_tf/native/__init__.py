"""The neuron's scan as a TensorFlow operation in C++: compiled at first use, kept in the user's cache.

Nothing else knows how it is built. The equations are in `snn_tf.neuron`; `lif_kernel.cc` repeats them
for a processor's vector units.
"""

import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from types import ModuleType

import tensorflow as tf

from snn_tf import machine

_FOLDER = pathlib.Path(__file__).parent
_SOURCES = ("lif_kernel.h", "lif_kernel.cc", "lif_op.cc")
_LIBRARY = "lif.so"
# The kernel is compiled for this very processor; what includes TensorFlow's headers is not, since
# Eigen's do not compile for every one.
_OF_X86 = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
_KERNEL_FLAGS = ("-std=c++17", "-fPIC", "-O3", "-march=native", *_OF_X86)
_OP_FLAGS = ("-fPIC", "-O2", "-w")


class Unavailable(Exception):
    """The operation cannot be had here; the text says why, in one line."""


@functools.cache
def operations() -> ModuleType:
    """The module with `snn_tf_lif` and `snn_tf_lif_grad`, compiled if it must be.

    Raises:
      Unavailable: no compiler, a failing one, or no safe place for the result.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable(f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not installed")
    library = _cache() / _key(compiler) / _LIBRARY
    try:
        if not library.exists():
            _build(compiler, library)
        return tf.load_op_library(str(library))
    except (OSError, tf.errors.OpError) as error:
        raise Unavailable(f"{library}: {str(error).splitlines()[0]}") from error


def _cache() -> pathlib.Path:
    """A folder that only this user can write to."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = pathlib.Path(home) / "snn_tf" / "native"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise Unavailable(f"{folder}: {error.strerror}") from error
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise Unavailable(f"{folder}: others can write to it")
    return folder


def _key(compiler: str) -> str:
    """Names what decides the library: sources, compiler, flags, processor and TensorFlow."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, tf.version.VERSION, _processor(), *_KERNEL_FLAGS, *_OP_FLAGS]
    parts += [(_FOLDER / name).read_text() for name in _SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    lines = machine.cpuinfo().splitlines()
    telling = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join(sorted(telling)) or platform.processor()


def _build(compiler: str, library: pathlib.Path) -> None:
    """Compiles beside the target and renames, so that several processes may do it at once."""
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        kernel, op, built = (os.path.join(scratch, name) for name in ("kernel.o", "op.o", _LIBRARY))
        compile_flags = tf.sysconfig.get_compile_flags()
        _run(compiler, *_KERNEL_FLAGS, "-c", str(_FOLDER / "lif_kernel.cc"), "-o", kernel)
        _run(compiler, *_OP_FLAGS, *compile_flags, "-c", str(_FOLDER / "lif_op.cc"), "-o", op)
        _run(compiler, "-shared", kernel, op, "-o", built, *tf.sysconfig.get_link_flags())
        os.replace(built, library)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or [
            "it failed silently"
        ]
        raise Unavailable(f"{command[0]} cannot compile it: {errors[0]}")
