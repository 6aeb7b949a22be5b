"""One optimizer step: gradient, decay, masks, scores, clipping, update; and many of them in one call.

`Update` is what a training consists of, without data, checkpoints and events: those are in
`snn_tf.training`.
"""

import dataclasses

import tensorflow as tf
import tf_keras as keras

from snn_tf.ambient import dropout_seed
from snn_tf.config import COMPRESS, TRAIN_SNN, Config
from snn_tf.graph import Graph, inner, is_neuron, is_norm, is_synapse
from snn_tf.layers import LIF
from snn_tf.objectives import Objective
from snn_tf.pruners import Pruner
from snn_tf.pruning import Masked, gate_of, mask_of, wrappers

Values = dict[str, tf.Tensor]
Batch = tuple[tf.Tensor, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a stage trains.

    Attributes:
      optimizer: "sgd" or "adam".
      learning_rate: its peak.
      weight_decay: L2 coefficient added to the gradient of synapse weights.
      epochs: length of the stage.
      cutout: side of the square that is blanked in each image, in pixels; 0 for none.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    epochs: int
    cutout: int = 0

    @classmethod
    def of(cls, config: Config, stage: str) -> "Recipe":
        """How the settings train a stage: train_ann, compress or train_snn."""
        if stage == TRAIN_SNN:
            return cls(
                config.snn_optimizer,
                config.snn_learning_rate,
                config.snn_weight_decay,
                config.snn_epochs,
                config.snn_cutout,
            )
        return cls(
            config.ann_optimizer,
            config.ann_learning_rate,
            config.ann_weight_decay,
            config.compress_epochs if stage == COMPRESS else config.ann_epochs,
            config.ann_cutout,
        )


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
      pruner: keeps scores and gates; None where masks stay as they are now.

    Attributes:
      step: the compiled function of one step: images uint8 [B, H, W, C] and labels int32 [B] to loss
        terms and accuracy, scalars by name.
      several: the compiled function of many steps: an iterator over batches and their number, at least
        1, to the last one's values and its batch. No Python runs between its steps.
      variables: what the optimizer moves.
      skipped: number of steps whose loss or gradient was not finite: these left everything but the
        optimizer's count of steps as it was.
      bad_step: number of the last such step, from 1; 0 for none.
      bad_gradients: whether the gradient of each of `variables` was not finite in it.
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
        self.sparse = _sparse(model)
        self.skipped = tf.Variable(0, trainable=False, dtype=tf.int64, name="skipped")
        self.bad_step = tf.Variable(0, trainable=False, dtype=tf.int64, name="bad_step")
        self.bad_gradients = tf.Variable(
            [False] * len(self.variables), trainable=False, name="bad_gradients"
        )
        self.step = tf.function(self.compute, jit_compile=config.jit_compile == "true" or None)
        self.several = tf.function(self._several)

    def compute(self, images: tf.Tensor, labels: tf.Tensor) -> Values:
        """What `step` compiles."""
        number = tf.cast(self.optimizer.iterations, tf.int32)
        statistics = [(v, tf.identity(v)) for v in moving_statistics(self.model)]
        with dropout_seed(tf.stack([self.seed, number])), tf.GradientTape() as tape:
            terms, logits = self.objective(images, labels)
            loss = tf.add_n(list(terms.values()))
        raw = tape.gradient(loss, self.variables)
        ready = self.prepared(raw)
        squares = tf.stack([tf.nn.l2_loss(gradient) for gradient in ready])
        norm = tf.sqrt(2.0 * tf.reduce_sum(squares))
        tf.cond(
            tf.math.is_finite(loss) & tf.math.is_finite(norm),
            lambda: self.apply(raw, ready, norm),
            lambda: self._skip(squares, statistics),
        )
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
        """Adds weight decay to the raw gradients and gates by the masks.

        Gating keeps optimizer slots, and so weights, at zero outside the masks.
        """
        gates = self._gates()
        ready = []
        for variable, gradient in zip(self.variables, gradients, strict=True):
            if name := self.kernels.get(variable.ref()):
                if self.weight_decay:
                    gradient += self.weight_decay * variable
                gradient = gradient * gates[name] if name in gates else gradient
            ready.append(gradient)
        return ready

    def apply(self, raw: list[tf.Tensor], ready: list[tf.Tensor], norm: tf.Tensor) -> None:
        """Scores the raw gradients, clips the others by their global norm, and moves the variables."""
        if self.pruner:
            self.pruner.observe(
                {self.kernels.get(v.ref(), ""): g for v, g in zip(self.variables, raw, strict=True)}
            )
        clipped = self.clipped(ready, norm)
        self.optimizer.apply_gradients(zip(clipped, self.variables, strict=True))

    def clipped(self, gradients: list[tf.Tensor], norm: tf.Tensor) -> list[tf.Tensor]:
        """Scales gradients of a global norm `norm` to at most `--clip_norm`."""
        if not self.clip_norm:
            return gradients
        return tf.clip_by_global_norm(gradients, self.clip_norm, use_norm=norm)[0]

    def _skip(self, squares: tf.Tensor, statistics: list[tuple[tf.Variable, tf.Tensor]]) -> None:
        """Counts a step that is not finite, and takes back what its pass did to moving statistics.

        Args:
          squares: half the square of each gradient's norm.
          statistics: moving statistics and their values before the pass.
        """
        for variable, value in statistics:
            variable.assign(value)
        self.skipped.assign_add(1)
        self.optimizer.iterations.assign_add(1)
        self.bad_step.assign(self.optimizer.iterations)
        self.bad_gradients.assign(~tf.math.is_finite(squares))

    def bad_layers(self) -> list[str]:
        """Layers whose gradient was not finite in the last step that was not."""
        owners = {
            variable.ref(): name
            for name, layer in Graph.of(self.model).layers.items()
            for variable in layer.trainable_variables
        }
        pairs = zip(self.variables, self.bad_gradients.numpy(), strict=True)
        return list(dict.fromkeys(owners[variable.ref()] for variable, bad in pairs if bad))

    def _gates(self) -> dict[str, tf.Tensor]:
        if self.pruner:
            return {name: self.pruner.gate(name) for name in wrappers(self.model)}
        return {name: gate_of(wrapper) for name, wrapper in self.sparse.items()}


def trained_variables(model: keras.Model, config: Config) -> list[tf.Variable]:
    """The model's trainable variables, less leaks and thresholds that `config` holds fixed."""
    fixed = set()
    for layer in Graph.of(model).select(is_neuron).values():
        if isinstance(layer, LIF):
            fixed |= set() if config.train_leak else {layer.cell.leak.ref()}
            fixed |= set() if config.train_v_th else {layer.cell.v_th.ref()}
    return [variable for variable in model.trainable_variables if variable.ref() not in fixed]


def _sparse(model: keras.Model) -> dict[str, Masked]:
    """The wrappers whose mask leaves weights out, by layer name."""
    return {name: w for name, w in wrappers(model).items() if not mask_of(w).numpy().all()}


def moving_statistics(model: keras.Model) -> list[tf.Variable]:
    """Moving means and variances of a model's batch normalisation: what training passes move besides."""
    layers = Graph.of(model).select(is_norm).values()
    return [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
