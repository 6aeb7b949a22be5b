"""The trained SNN as a SavedModel that needs nothing but TensorFlow, checked in a fresh process."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import pruning
from snn_tf.errors import UserError
from snn_tf.evaluation import is_spiking, timesteps_of
from snn_tf.folding import fold
from snn_tf.graph import Graph, is_neuron
from snn_tf.machine import has_gpu

# Runs without this package: what it loads is only what a user has.
_RELOAD = """
import sys, numpy as np, tensorflow as tf
folder, source, target = sys.argv[1:]
images = tf.constant(np.load(source, allow_pickle=False))
outputs = tf.saved_model.load(folder).signatures["serving_default"](images=images)
np.savez(target, **{name: value.numpy() for name, value in outputs.items()})
"""
# Of the largest logit.
_ROUNDING = 1e-3
# There each process may choose other kernels, which round otherwise, and a spike that flips moves more.
_AGREEMENT_ON_GPU = 0.9


class Exported(tf.Module):
    """A model's serving function and its variables; no Keras object, wrapper or mask is written.

    Batch normalisation is folded. `serve` takes uint8 images [B, H, W, C] and gives logits and
    probabilities [B, classes], and the number of spikes [B], which is 0 for an ANN. `classes` is a file
    with the names of the classes, a JSON list in the order of the logits.
    """

    def __init__(self, model: keras.Model, classes: pathlib.Path):
        super().__init__()
        self.classes = tf.saved_model.Asset(str(classes))
        plain = fold(pruning.unwrap(model))
        neurons = Graph.of(plain).select(is_neuron).values() if is_spiking(plain) else ()
        network = keras.Model(plain.input, (plain.output, [layer.output for layer in neurons]))
        steps = timesteps_of(plain)

        def serve(images):
            logits, spikes = network(images, training=False)
            batch = tf.shape(images)[0]
            counts = [_spikes_per_image(train, steps, batch) for train in spikes]
            total = tf.add_n(counts) if counts else tf.zeros([batch])
            return {"logits": logits, "probabilities": tf.nn.softmax(logits), "spikes": total}

        self._weights = plain.weights
        signature = tf.TensorSpec(plain.input_shape, tf.uint8, name="images")
        self.serve = tf.function(serve, input_signature=[signature])


def _spikes_per_image(spikes: tf.Tensor, steps: int, batch: tf.Tensor) -> tf.Tensor:
    by_image = tf.reshape(tf.cast(spikes, tf.float32), [steps, batch, np.prod(spikes.shape[1:])])
    return tf.reduce_sum(by_image, axis=[0, 2])


def save(model: keras.Model, folder: pathlib.Path, class_names: Sequence[str]) -> Exported:
    """Writes a model with the names of its classes, by label, and returns what was written.

    Args:
      model: plain or wrapped.
      folder: becomes the SavedModel; the names are its `assets/classes.json`.
      class_names: one for each logit.

    Raises:
      OSError, tf.errors.OpError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        classes = pathlib.Path(scratch) / "classes.json"
        classes.write_text(json.dumps(list(class_names)))
        exported = Exported(model, classes)
        tf.saved_model.save(exported, str(folder), signatures={"serving_default": exported.serve})
    return exported


def check(exported: Exported, folder: pathlib.Path, images: np.ndarray) -> dict[str, float]:
    """Compares a SavedModel, reloaded in a fresh process, with the model it was made from.

    Args:
      exported: what `save` returned.
      folder: where it was written.
      images: uint8 [B, H, W, C].

    Returns:
      `export_max_difference` of the logits, and `export_agreement`, the share of equal classes.

    Raises:
      UserError: the reload failed, or logits differ by more than rounding (on a GPU, classes too often).
    """
    here = {name: value.numpy() for name, value in exported.serve(tf.constant(images)).items()}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = os.path.join(scratch, "images.npy"), os.path.join(scratch, "outputs.npz")
        np.save(source, images)
        command = [sys.executable, "-c", _RELOAD, str(folder.resolve()), source, target]
        result = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"export: the SavedModel could not be reloaded: {reason}")
        with np.load(target, allow_pickle=False) as file:
            there = {name: file[name] for name in here}
    difference = float(np.abs(there["logits"] - here["logits"]).max())
    agreement = float(np.mean(there["logits"].argmax(1) == here["logits"].argmax(1)))
    same = difference <= _ROUNDING * max(1.0, float(np.abs(here["logits"]).max()))
    if has_gpu():
        same = np.isfinite(difference) and agreement >= _AGREEMENT_ON_GPU
    if not same:
        raise UserError(f"export: the SavedModel, reloaded, gives logits that differ by {difference:g}")
    return {"export_max_difference": difference, "export_agreement": agreement}


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes of a SavedModel's files, plain and as one gzipped tar."""
    plain = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return {"bytes": plain, "bytes_gzipped": packed.tell()}
