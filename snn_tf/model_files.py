"""`model.keras` files read as data: what is in one is checked before Keras makes anything of it.

Keras's own safe mode refuses lambdas, but imports whatever module a file names. Here a file may name
only what this package's networks are made of.
"""

import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tf_keras as keras

from snn_tf import layers, pruning
from snn_tf.errors import UserError, first_line

_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_MEMBERS = {"metadata.json", _CONFIG, _WEIGHTS}
_LARGEST_CONFIG = 2**26  # bytes
# Deflated zeros shrink a thousandfold; weights that are mostly zeros come near it, nothing goes past.
_LARGEST_RATIO = 1100
_LAYERS = (layers.Conv2D, layers.Dropout, layers.LIF, layers.QuantisedReLU, layers.ReadOut)
_KNOWN = {
    "keras.initializers": {"GlorotUniform", "Ones", "Zeros"},
    "keras.layers": {
        *("Add", "AveragePooling2D", "BatchNormalization", "Conv2D", "Dense", "Flatten"),
        *("InputLayer", "Normalization", "ReLU"),
    },
    "keras.mixed_precision": {"Policy"},
    "snn_tf.layers": {kind.__name__ for kind in _LAYERS},
    "snn_tf.pruning": {pruning.Masked.__name__},
    "tf_keras.src.engine.functional": {"Functional"},
    None: {"ConstantSparsity", "PolynomialDecay"},  # schedules, which tfmot looks up by name
}
_UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, zipfile.BadZipFile, zlib.error),
)


def load(path: pathlib.Path) -> keras.Model:
    """Reads a network that this package has written.

    Raises:
      UserError: there is no such file, it is of another kind or damaged, it names a class that no
        network of this package has, or a weight is not finite.
    """
    _check(path)
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except _UNREADABLE as error:
        raise UserError(f"{path}: could not be read: {first_line(error)}") from error
    if not isinstance(model, keras.Model) or (len(model.inputs), len(model.outputs)) != (1, 1):
        raise UserError(f"{path}: must be a network of one input and one output")
    for layer in model.layers:
        for weight in layer.weights:
            if not np.isfinite(weight.numpy()).all():
                raise UserError(f"{path}: layer {layer.name}: {weight.name} is not finite")
    return model


def _check(path: pathlib.Path) -> None:
    if path.is_dir():
        raise UserError(
            f"{path}: must be a file in Keras's .keras format; it is a folder (a SavedModel?)"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            config = json.loads(archive.read(_CONFIG))
            strange = next(_strangers(config), None)
    except _UNREADABLE as error:
        raise UserError(f"{path}: could not be read: {first_line(error)}") from error
    if strange:
        raise UserError(f"{path}: holds {strange}, of which no network of this package is made")


def _check_members(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
    members = {info.filename: info for info in archive.infolist()}
    if strange := sorted(members.keys() ^ _MEMBERS):
        raise UserError(
            f"{path}: must hold {', '.join(sorted(_MEMBERS))}; {strange[0]} is the difference"
        )
    if members[_CONFIG].file_size > _LARGEST_CONFIG:
        raise UserError(f"{path}: {_CONFIG} must be at most {_LARGEST_CONFIG} bytes")
    for name, info in members.items():
        if info.file_size > _LARGEST_RATIO * max(info.compress_size, 1):
            raise UserError(
                f"{path}: {name} says it is {info.file_size} bytes, packed in {info.compress_size}"
            )


def _strangers(value: Any) -> Iterator[str]:
    """Classes in a model's configuration, at any depth, that are not `_KNOWN`."""
    if isinstance(value, dict):
        name, module = value.get("class_name", ""), value.get("module")
        if "class_name" in value and not (isinstance(name, str) and name in _known(module)):
            yield f"{module}.{name}" if module else str(name)
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strangers(part)


def _known(module: Any) -> set[str]:
    return _KNOWN.get(module, set()) if module is None or isinstance(module, str) else set()
