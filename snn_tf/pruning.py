"""Masks in training: tfmot's prune wrappers, with the one copy of each mask.

The wrappers stay from `compress` to `export`; elsewhere masks are a read-only dict by layer name. When
and how masks change is decided in `snn_tf.pruners`. tfmot is imported here and nowhere else.
"""

import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude

from snn_tf.copies import copy_weights
from snn_tf.errors import check_choice
from snn_tf.graph import Graph, inner, is_synapse
from snn_tf.layers import Conv2D

Masks = Mapping[str, np.ndarray]

tfmot.sparsity.keras.PrunableLayer.register(Conv2D)


@keras.saving.register_keras_serializable("snn_tf")
class Masked(PruneLowMagnitude):
    """tfmot's wrapper with a pure forward pass: masks change only where `Pruner` changes them.

    The wrapped weights are kept masked themselves, so the gradient reaches inactive weights too. Masks
    take a byte per weight.
    """

    def add_weight(self, name=None, shape=None, dtype=None, **settings):
        dtype = tf.bool if name == "mask" else dtype
        return super().add_weight(name, shape, dtype, **settings)

    def call(self, inputs, training=None):
        del training
        return self.layer.call(inputs)


def sparsity_schedule(
    kind: str, density: float, interval: int, last_update: int
) -> tfmot.sparsity.keras.PruningSchedule:
    """tfmot's schedule of sparsity, updated every `interval` steps up to `last_update`.

    Args:
      kind: "constant", 1 - `density` at every update; "cubic", from 0 to 1 - `density` at the last.

    Raises:
      ValueError: there is no such kind.
    """
    check_choice("kind", kind, ("constant", "cubic"))
    # One of 1, to which a tiny density would round, is refused by tfmot.
    sparsity = min(1.0 - density, math.nextafter(1.0, 0.0))
    if kind == "constant":
        return tfmot.sparsity.keras.ConstantSparsity(
            sparsity, begin_step=0, end_step=last_update, frequency=interval
        )
    return tfmot.sparsity.keras.PolynomialDecay(
        0.0, sparsity, begin_step=0, end_step=last_update, frequency=interval
    )


def wrap(
    model: keras.Model,
    masks: Masks | None = None,
    schedule: tfmot.sparsity.keras.PruningSchedule | None = None,
) -> keras.Model:
    """A copy of a plain model whose synapse layers are wrapped.

    Args:
      model: functional model without wrappers.
      masks: by layer name; all active if None.
      schedule: tfmot's pruning schedule, used by its own method only.
    """
    settings = {"pruning_schedule": schedule} if schedule else {}

    def wrapped(layer):
        copy = type(layer).from_config(layer.get_config())
        return Masked(copy, dtype=copy.dtype_policy, **settings) if is_synapse(layer) else copy

    result = keras.models.clone_model(model, clone_function=wrapped)
    copy_weights(model, result)
    if masks is not None:
        assign_masks(result, masks)
        project(result)
    return result


def unwrap(model: keras.Model) -> keras.Model:
    """A plain copy of a wrapped model, with the same weights and no masks."""

    def bare(layer):
        layer = inner(layer)
        return type(layer).from_config(layer.get_config())

    result = keras.models.clone_model(model, clone_function=bare)
    copy_weights(model, result)
    return result


def wrappers(model: keras.Model) -> dict[str, Masked]:
    """The prune wrappers by the name of the layer inside, in topological order."""
    return {inner(w).name: w for w in model.layers if isinstance(w, Masked)}


def mask_of(wrapper: Masked) -> tf.Variable:
    """A wrapper's mask, boolean, in the shape of the kernel."""
    ((_, mask, _),) = wrapper.pruning_vars
    return mask


def gate_of(wrapper: Masked) -> tf.Tensor:
    """A wrapper's mask as factors, float32 0 and 1."""
    return tf.cast(mask_of(wrapper), tf.float32)


def mask_by_tfmot(wrapper: Masked, step: int) -> np.ndarray:
    """The mask, boolean, that tfmot's own method makes of a layer's weights after `step` steps."""
    kernel = inner(wrapper).kernel
    mask, threshold = tf.Variable(gate_of(wrapper)), tf.Variable(0.0)
    pruning = Pruning(
        training_step_fn=lambda: tf.constant(step, tf.int64),
        pruning_vars=[(kernel, mask, threshold)],
        pruning_schedule=wrapper.pruning_schedule,
        block_size=wrapper.block_size,
        block_pooling_type=wrapper.block_pooling_type,
    )
    pruning.conditional_mask_update()
    return mask.numpy() > 0


def masks(model: keras.Model) -> dict[str, np.ndarray]:
    """All masks, boolean, by layer name; without wrappers everything is active."""
    found = wrappers(model)
    return {
        name: mask_of(found[name]).numpy() if name in found else np.ones(inner(layer).kernel.shape, bool)
        for name, layer in Graph.of(model).select(is_synapse).items()
    }


def assign_masks(model: keras.Model, new: Masks) -> None:
    """Sets the masks of a wrapped model."""
    for name, wrapper in wrappers(model).items():
        mask_of(wrapper).assign(new[name].astype(bool))


def project(model: keras.Model) -> None:
    """W ← W ⊙ M in every wrapper. Optimizer steps need it not: they leave what is masked as it is."""
    for wrapper in wrappers(model).values():
        inner(wrapper).kernel.assign(inner(wrapper).kernel.read_value() * gate_of(wrapper))


def stray_weights(model: keras.Model) -> dict[str, int]:
    """Number of non-zero weights outside their mask, for the layers that have any."""
    counts = {
        name: int(np.count_nonzero(inner(w).kernel.numpy()[~mask_of(w).numpy()]))
        for name, w in wrappers(model).items()
    }
    return {name: count for name, count in counts.items() if count}
