"""What TensorBoard shows of a training."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import pruning
from snn_tf.errors import UserError, first_line
from snn_tf.evaluation import Evaluation
from snn_tf.graph import Graph, inner, is_synapse, neuron_parameters

_MAP_PIXELS = 64


class TensorBoard:
    """Writes one stage's events; `step` is always the number of optimizer updates.

    Every method raises `UserError` if the folder cannot be written.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        with self._writable():
            self.writer = tf.summary.create_file_writer(str(folder))

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except tf.errors.OpError as error:
            raise UserError(f"{self.folder}: could not be written: {first_line(error)}") from error

    @contextlib.contextmanager
    def _at(self, step: int) -> Iterator[None]:
        """What is written inside belongs to `step`, and is on disk afterwards."""
        with self._writable():
            with self.writer.as_default(step=step):
                yield
            self.writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers by tag."""
        with self._at(step):
            for tag, value in values.items():
                tf.summary.scalar(tag, value)

    def state(self, step: int, model: keras.Model, evaluation: Evaluation) -> None:
        """Writes validation accuracy, densities, neurons' parameters, spike rates, weight histograms."""
        graph = Graph.of(model)
        masks = pruning.masks(model)
        values = {"accuracy/validation": evaluation.accuracy}
        if pruning.wrappers(model):
            values |= {f"density/{name}": float(mask.mean()) for name, mask in masks.items()}
        for kind, found in neuron_parameters(model).items():
            values |= {f"{kind}/{name}": value for name, value in found.items()}
        values |= {f"spike_rate/{name}": rate for name, rate in evaluation.spike_rates().items()}
        self.scalars(step, values)
        with self._at(step):
            for name, layer in graph.select(is_synapse).items():
                tf.summary.histogram(f"weights/{name}", inner(layer).kernel.numpy()[masks[name]])

    def attention_maps(self, step: int, images, maps: Mapping[str, tuple[tf.Tensor, tf.Tensor]]) -> None:
        """Writes, per layer, a row per image: the image, the teacher's map and the student's."""
        shown = _resized(tf.cast(images, tf.float32) / 255.0)
        with self._at(step):
            for name, (student, teacher) in maps.items():
                panels = [shown, *(_heat(x) for x in (teacher, student))]
                rows = np.concatenate([np.broadcast_to(p, (*p.shape[:3], 3)) for p in panels], axis=2)
                tf.summary.image(f"attention/{name}", np.concatenate(rows, axis=0)[np.newaxis])


def _resized(images: tf.Tensor) -> np.ndarray:
    return tf.image.resize(images, [_MAP_PIXELS, _MAP_PIXELS], method="nearest").numpy()


def _heat(maps: tf.Tensor) -> np.ndarray:
    """[B, H, W] → [B, pixels, pixels, 1], each map scaled to [0, 1]."""
    peak = tf.reduce_max(maps, axis=[1, 2], keepdims=True)
    return _resized((maps / tf.maximum(peak, 1e-12))[..., tf.newaxis])
