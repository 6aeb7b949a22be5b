"""How masks change over a student's training.

A `Pruner` keeps the scores and carries updates out; when one is due is in `snn_tf.mask_schedule`, which
weights or channels are kept is decided in `snn_tf.sparsity` and `snn_tf.channels`.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import budget as budgets
from snn_tf import channels, sparsity
from snn_tf.config import Config
from snn_tf.mask_schedule import MaskSchedule
from snn_tf.pruning import (
    Masks,
    assign_masks,
    gate_of,
    mask_by_tfmot,
    masks,
    project,
    wrap,
    wrappers,
)
from snn_tf.surgery import channel_layers, output_positions, tie_groups


class Pruner(tf.Module, abc.ABC):
    """Masks of a student over its training. Subclasses know the structure: what a unit is.

    Attributes:
      scores: m, the moving average of the loss's gradient with respect to every prunable weight,
        active or not, by layer name; empty unless the method is attention.
      squares: the same average of the gradient's square; empty unless the saliency is fisher.
      schedule: when masks change.
    """

    def __init__(self, model: keras.Model, config: Config, steps_per_epoch: int):
        """Wraps `model`, a plain functional one; the result is in the attribute `model`.

        Raises:
          UsageError: the density or the interval of updates is impossible.
        """
        super().__init__()
        self.config = config
        self.schedule = MaskSchedule(config, steps_per_epoch)
        self.model = wrap(model, schedule=self.schedule.of_tfmot)
        self.wrappers = wrappers(self.model)
        guided = config.method == "attention"
        self.scores = self._averages("score") if guided else {}
        self.squares = self._averages("square") if guided and config.saliency == "fisher" else {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each prunable kernel, by layer name."""
        return {name: tuple(w.layer.kernel.shape) for name, w in self.wrappers.items()}

    def _averages(self, name: str) -> dict[str, tf.Variable]:
        return {
            layer: tf.Variable(tf.zeros(shape), trainable=False, name=f"{name}/{layer}")
            for layer, shape in self.shapes.items()
        }

    def observe(self, gradients: Mapping[str, tf.Tensor]) -> None:
        """m ← decay · m + (1 − decay) · gradient, squares likewise; by layer name, not masked."""
        decay = self.config.score_decay
        for name, score in self.scores.items():
            score.assign(decay * score + (1.0 - decay) * gradients[name])
        for name, square in self.squares.items():
            square.assign(decay * square + (1.0 - decay) * tf.square(gradients[name]))

    def gate(self, name: str) -> tf.Tensor:
        """1 where the optimizer may move a layer's weights, 0 elsewhere, in the kernel's shape."""
        return gate_of(self.wrappers[name])

    def active_channels(self, neuron: str) -> tf.Tensor | None:
        """[C], 1 for the active channels of a neuron layer; None if all are."""
        del neuron
        return None

    @abc.abstractmethod
    def start(self, seed: int) -> dict[str, float]:
        """Sets the first masks. Returns each layer's density as its initialisation needs it."""

    @abc.abstractmethod
    def revise(self, step: int) -> None:
        """Sets the next masks; weights and slots are left to `update`."""

    def update(self, step: int, optimizer: keras.optimizers.legacy.Optimizer) -> dict[str, float]:
        """Revises masks, then projects weights and clears the slots of all that was not kept.

        Returns:
          Mask churn by layer: share of the newly active among the active weights.
        """
        before = {name: self.gate(name).numpy() for name in self.wrappers}
        old = masks(self.model)
        self.revise(step)
        project(self.model)
        for name, wrapper in self.wrappers.items():
            kept = before[name] * self.gate(name)
            for slot in optimizer.get_slot_names():
                variable = optimizer.get_slot(wrapper.layer.kernel, slot)
                variable.assign(variable * kept)
        new = masks(self.model)
        return {name: float((new[name] & ~old[name]).sum() / new[name].sum()) for name in new}

    def kernels(self) -> dict[str, np.ndarray]:
        """Every layer's weights by name."""
        return {name: wrapper.layer.kernel.numpy() for name, wrapper in self.wrappers.items()}

    def saliencies(self) -> dict[str, np.ndarray]:
        """What every weight is worth, as `--saliency` and `--macs_exponent` say.

        |W| for both kinds of magnitude, and wherever the method is not attention. |W m| is the loss's
        first-order change without the weight.
        fisher is |W| √(mean of squared gradients): its square estimates the change to second order, up
        to a factor common to all weights, by the diagonal of the empirical Fisher information (Theis et
        al. 2018) of batches. The last two stay the same if a layer's weights are scaled and a batch
        normalisation takes that back.
        """
        return self._per_cost(self._worths())

    def regrowth_scores(self) -> dict[str, np.ndarray]:
        """m of every weight, as `--macs_exponent` says."""
        return self._per_cost({name: score.numpy() for name, score in self.scores.items()})

    def _per_cost(self, values: Masks) -> dict[str, np.ndarray]:
        exponent = self.config.macs_exponent
        return {
            name: value / output_positions(self.wrappers[name]) ** exponent
            for name, value in values.items()
        }

    def _worths(self) -> dict[str, np.ndarray]:
        weights = {name: np.abs(kernel) for name, kernel in self.kernels().items()}
        saliency = self.config.saliency if self.config.method == "attention" else "magnitude"
        if saliency == "weight_gradient":
            return {name: weights[name] * np.abs(m.numpy()) for name, m in self.scores.items()}
        if saliency == "fisher":
            return {name: weights[name] * np.sqrt(v.numpy()) for name, v in self.squares.items()}
        return weights

    def chance(self, step: int) -> np.random.Generator:
        """What random masks are drawn from: the same at every run of the update at `step`."""
        return np.random.default_rng([self.config.seed, step])


class IrregularPruner(Pruner):
    """Units are single weights."""

    def __init__(self, model, config, steps_per_epoch):
        super().__init__(model, config, steps_per_epoch)
        names = list(self.wrappers)
        self.input_layer, self.output_layer = names[0], names[-1]
        self.budget(config.density)

    def budget(self, density: float) -> budgets.Budget:
        """The budget at a density. Raises `UsageError` if the floors do not fit into it."""
        shapes = self.shapes
        by_macs = self.config.budget == "macs"
        return budgets.Budget(
            sizes={name: math.prod(shape) for name, shape in shapes.items()},
            unit_costs={
                name: output_positions(w) if by_macs else 1 for name, w in self.wrappers.items()
            },
            density=density,
            min_layer_density=self.config.min_layer_density,
            protected={name: self._protected(name, shape) for name, shape in shapes.items()},
        )

    def _protected(self, name: str, shape: tuple[int, ...]) -> int:
        """Weights that a layer never loses, whatever its density."""
        if self.config.dense_ends and name in (self.input_layer, self.output_layer):
            return math.prod(shape)
        return shape[-1] if name == self.output_layer else 0

    def start(self, seed):
        first = {name: np.ones(shape, bool) for name, shape in self.shapes.items()}
        if not self.schedule.starts_dense:
            rng = np.random.default_rng(seed)
            budget = self.budget(self.config.density)
            first = sparsity.initial_masks(self.shapes, budget, rng, self.output_layer)
        assign_masks(self.model, first)
        return {name: float(mask.mean()) for name, mask in first.items()}

    def revise(self, step):
        if self.config.method == "magnitude_uniform":
            return self._revise_by_tfmot(step)
        budget = self.budget(self.schedule.density(step))
        if self.config.method == "attention":
            new = self._guided(budget, self.schedule.drop_fraction(step))
        elif self.config.method == "magnitude":
            new = sparsity.ranked_masks(self.saliencies(), budget, self.output_layer)
        else:
            before, rng = masks(self.model), self.chance(step)
            values = {name: rng.random(mask.shape, np.float32) for name, mask in before.items()}
            new = sparsity.ranked_masks(values, budget, self.output_layer, before)
        assign_masks(self.model, new)

    def _guided(self, budget: budgets.Budget, p: float) -> Masks:
        within_layers = self.config.saliency == "layer_magnitude"
        update = sparsity.update_masks if within_layers else sparsity.update_masks_globally
        values, scores = self.saliencies(), self.regrowth_scores()
        return update(values, scores, masks(self.model), budget, p, self.output_layer)

    def _revise_by_tfmot(self, step: int) -> None:
        new = {name: mask_by_tfmot(wrapper, step) for name, wrapper in self.wrappers.items()}
        assign_masks(self.model, new)


class ChannelPruner(Pruner):
    """Units are channels of tie groups; only the consumers' input slices are masked.

    Producers go on computing dormant channels with frozen filters, so that the gradient at a dormant
    slice is not zero and a channel can come back.
    """

    def __init__(self, model, config, steps_per_epoch):
        super().__init__(model, config, steps_per_epoch)
        self.layers = channel_layers(self.model, config.budget)
        self.groups = tie_groups(self.model)
        self.active = {
            group: tf.Variable(tf.ones(size), trainable=False, name=f"active/{group}")
            for group, size in self.budget(config.density).sizes.items()
        }
        self.out_group = {layer.name: layer.out_group for layer in self.layers}

    def budget(self, density: float) -> channels.ChannelBudget:
        """The budget at a density. Raises `UsageError` if one channel per group exceeds it."""
        return channels.ChannelBudget(self.layers, density)

    def gate(self, name):
        mask = super().gate(name)
        group = self.out_group[name]
        return mask * self.active[group] if group else mask

    def active_channels(self, neuron):
        group = self.groups[neuron]
        return tf.convert_to_tensor(self.active[group]) if group else None

    def channels(self) -> dict[str, np.ndarray]:
        """The active channels, boolean [C], by tie group."""
        return {group: variable.numpy() > 0 for group, variable in self.active.items()}

    def start(self, seed):
        first = self.channels()
        if not self.schedule.starts_dense:
            rng = np.random.default_rng(seed)
            first = channels.initial_channels(self.budget(self.config.density), rng)
        self._assign(first)
        return {
            layer.name: float(first[layer.in_group].mean()) if layer.in_group else 1.0
            for layer in self.layers
        }

    def revise(self, step):
        budget = self.budget(self.schedule.density(step))
        if self.config.method == "random":
            rng = self.chance(step)
            values = {group: rng.random(size) for group, size in budget.sizes.items()}
            return self._assign(channels.ranked_channels(values, budget, self.channels()))
        norms, values = self._norms(self.saliencies())
        if self.config.method == "magnitude":
            return self._assign(channels.ranked_channels(values, budget))
        _, scores = self._norms(self.regrowth_scores())
        p = self.schedule.drop_fraction(step)
        self._assign(channels.update_channels(norms, values, scores, self.channels(), budget, p))

    def _norms(self, kernels: Masks) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Frobenius norm of each unit's slices towards active channels, and it over √(slice size)."""
        active = self.channels()
        cut, layers = {}, []
        for layer in self.layers:
            kept = channels.output_mask(layer, active)
            cut[layer.name] = kernels[layer.name][..., kept]
            layers.append(dataclasses.replace(layer, out_channels=int(kept.sum())))
        norms = channels.channel_norms(cut, layers)
        sizes = channels.slice_sizes(layers)
        return norms, {group: norm / math.sqrt(sizes[group]) for group, norm in norms.items()}

    def _assign(self, new: Mapping[str, np.ndarray]) -> None:
        for group, variable in self.active.items():
            variable.assign(new[group].astype(np.float32))
        new_masks = {
            layer.name: channels.input_mask(layer, new, self.shapes[layer.name]) for layer in self.layers
        }
        assign_masks(self.model, new_masks)


def make_pruner(model: keras.Model, config: Config, steps_per_epoch: int) -> Pruner:
    """The pruner of `config.structure`, around a wrapped copy of a plain model."""
    kind = IrregularPruner if config.structure == "irregular" else ChannelPruner
    return kind(model, config, steps_per_epoch)
