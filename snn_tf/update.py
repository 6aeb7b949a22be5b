"""One optimizer step: gradient, scores, decay, masks, clipping, update; and many of them in one call.

`Update` is what a training consists of, without data, checkpoints and events: those are in
`snn_tf.training`.
"""

import dataclasses

import tensorflow as tf
import tf_keras as keras

from snn_tf.config import Config
from snn_tf.graph import Graph, inner, is_neuron, is_synapse
from snn_tf.layers import LIF, dropout_seed
from snn_tf.objectives import Objective
from snn_tf.pruners import Pruner
from snn_tf.pruning import mask_of, wrappers

Values = dict[str, tf.Tensor]
Batch = tuple[tf.Tensor, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage's optimizer works.

    Attributes:
      optimizer: "sgd" or "adam".
      learning_rate: its peak.
      weight_decay: L2 coefficient added to the gradient of synapse weights.
      epochs: length of the stage.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    epochs: int


class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate by step, as `--schedule` and `--warmup_epochs` say."""

    def __init__(self, config: Config, recipe: Recipe, steps_per_epoch: int):
        schedules = keras.optimizers.schedules
        total = recipe.epochs * steps_per_epoch
        peak = recipe.learning_rate
        # Steps count from 0, and a boundary still has the rate before it.
        drops = [total * percent // 100 - 1 for percent in (60, 80, 90)]
        self.warmup_steps = config.warmup_epochs * steps_per_epoch
        self.base = {
            "cosine": schedules.CosineDecay(peak, total),
            "step": schedules.PiecewiseConstantDecay(drops, [peak * 0.1**n for n in range(4)]),
            "constant": lambda step: tf.constant(peak),
        }[config.schedule]

    def __call__(self, step):
        rise = (tf.cast(step, tf.float32) + 1.0) / max(self.warmup_steps, 1.0)
        return self.base(step) * tf.minimum(rise, 1.0)


class Update:
    """The optimizer step of one stage.

    Args:
      config: momentum, clipping, and how to execute.
      recipe: the stage's optimizer.
      model: plain ANN, or wrapped student or SNN.
      objective: what is minimised.
      steps_per_epoch: optimizer steps in an epoch.
      seed: key of the dropout masks.
      pruner: keeps scores and gates; None where masks stay as they are.

    Attributes:
      step: the compiled function of one step: images uint8 [B, H, W, C] and labels int32 [B] to loss
        terms and accuracy, scalars by name.
      several: the compiled function of many steps: an iterator over batches and their number, at least
        1, to the last one's values and its batch. No Python runs between its steps.
      variables: what the optimizer moves.
      first_bad_step: number of the first step, from 1, whose loss was not finite; -1 for none.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        model: keras.Model,
        objective: Objective,
        steps_per_epoch: int,
        seed: int,
        pruner: Pruner | None = None,
    ):
        self.model, self.objective, self.pruner, self.seed = model, objective, pruner, seed
        self.weight_decay, self.clip_norm = recipe.weight_decay, config.clip_norm
        self.rate = LearningRate(config, recipe, steps_per_epoch)
        # These classes call TensorFlow's kernels, which pass over the weights once.
        self.optimizer = (
            keras.optimizers.legacy.Adam(self.rate)
            if recipe.optimizer == "adam"
            else keras.optimizers.legacy.SGD(self.rate, momentum=config.momentum)
        )
        self.variables = trained_variables(model, config)
        self.kernels = {
            inner(layer).kernel.ref(): name for name, layer in Graph.of(model).select(is_synapse).items()
        }
        self.first_bad_step = tf.Variable(-1, trainable=False, dtype=tf.int64, name="first_bad_step")
        self.step = tf.function(self.compute, jit_compile=config.jit_compile == "true" or None)
        self.several = tf.function(self._several)

    def compute(self, images: tf.Tensor, labels: tf.Tensor) -> Values:
        """What `step` compiles."""
        number = tf.cast(self.optimizer.iterations, tf.int32)
        with dropout_seed(tf.stack([self.seed, number])), tf.GradientTape() as tape:
            terms, logits = self.objective(images, labels)
            loss = tf.add_n(list(terms.values()))
        gradients = self.prepared(tape.gradient(loss, self.variables))
        bad = tf.logical_not(tf.math.is_finite(loss)) & (self.first_bad_step < 0)
        self.first_bad_step.assign(tf.where(bad, tf.cast(number + 1, tf.int64), self.first_bad_step))
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))
        guesses = tf.argmax(logits, axis=1, output_type=labels.dtype)
        accuracy = tf.reduce_mean(tf.cast(guesses == labels, tf.float32))
        return {
            "loss": loss,
            **{f"loss/{name}": term for name, term in terms.items()},
            "accuracy": accuracy,
        }

    def _several(self, batches: tf.data.Iterator, count: tf.Tensor) -> tuple[Values, Batch]:
        step = self.step.get_concrete_function(*batches.element_spec)
        batch, values = tf.nest.map_structure(
            lambda x: tf.zeros(x.shape, x.dtype), (batches.element_spec, step.structured_outputs)
        )
        for _ in tf.range(count):
            batch = next(batches)
            values = step(*batch)
        return values, batch

    def prepared(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Scores the raw gradients, then adds weight decay, gates by the masks, and clips.

        Gating keeps optimizer slots, and so weights, at zero outside the masks.
        """
        named = {
            self.kernels.get(v.ref(), ""): g for v, g in zip(self.variables, gradients, strict=True)
        }
        if self.pruner:
            self.pruner.observe(named)
        gates = self._gates()
        ready = []
        for variable, gradient in zip(self.variables, gradients, strict=True):
            if name := self.kernels.get(variable.ref()):
                if self.weight_decay:
                    gradient += self.weight_decay * variable
                gradient = gradient * gates[name] if name in gates else gradient
            ready.append(gradient)
        if self.clip_norm:
            ready, _ = tf.clip_by_global_norm(ready, self.clip_norm)
        return ready

    def _gates(self) -> dict[str, tf.Tensor]:
        if self.pruner:
            return {name: self.pruner.gate(name) for name in wrappers(self.model)}
        return {name: mask_of(wrapper) for name, wrapper in wrappers(self.model).items()}


def trained_variables(model: keras.Model, config: Config) -> list[tf.Variable]:
    """The model's trainable variables, less leaks and thresholds that `config` holds fixed."""
    fixed = set()
    for layer in Graph.of(model).select(is_neuron).values():
        if isinstance(layer, LIF):
            fixed |= set() if config.train_leak else {layer.cell.leak.ref()}
            fixed |= set() if config.train_v_th else {layer.cell.v_th.ref()}
    return [variable for variable in model.trainable_variables if variable.ref() not in fixed]
