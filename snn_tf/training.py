"""One training loop for all stages: a compiled step, checkpoints, progress, and TensorBoard's events.

A stage brings its model, its objective and, for compression, its pruner. What a step sees is a
function of seed and step alone, so a stopped training continues where its last checkpoint stands.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import tensorflow as tf
import tf_keras as keras
from tqdm import tqdm

from snn_tf import data
from snn_tf.config import Config
from snn_tf.errors import UserError, first_line
from snn_tf.evaluation import Evaluation, Evaluator
from snn_tf.graph import Graph, inner, is_neuron, is_synapse
from snn_tf.layers import LIF, dropout_seed
from snn_tf.objectives import AttentionGuided, Objective
from snn_tf.pruners import Pruner
from snn_tf.pruning import mask_of, wrappers
from snn_tf.runs import StageFolder
from snn_tf.summaries import TensorBoard

_SHOWN_MAPS = 4


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


class Trainer:
    """Trains one stage's model, from its newest checkpoint if there is one.

    Args:
      config: seed, batch size, schedule, clipping and how to execute.
      recipe: the stage's optimizer and length.
      model: plain ANN, or wrapped student or SNN.
      objective: what is minimised.
      source: the data set.
      folder: the stage's folder.
      pruner: moves the masks; None leaves them as they are.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        model: keras.Model,
        objective: Objective,
        source: data.Data,
        folder: StageFolder,
        pruner: Pruner | None = None,
    ):
        self.config, self.recipe, self.model, self.objective = config, recipe, model, objective
        self.source, self.folder, self.pruner = source, folder, pruner
        self.seed = config.stage_seed(folder.stage)
        self.steps_per_epoch = data.steps_per_epoch(source.train, config.batch_size)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.rate = LearningRate(config, recipe, self.steps_per_epoch)
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
        self.profiling = False
        self.counted = time.perf_counter()
        self.seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64, name="seconds")
        self.step = tf.function(self._step, jit_compile=config.jit_compile == "true" or None)
        self.evaluator = Evaluator(model, config.batch_size)
        self.board = TensorBoard(folder.tensorboard)
        self.manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=model,
                optimizer=self.optimizer,
                seconds=self.seconds,
                **({"pruner": pruner} if pruner else {}),
            ),
            str(folder.path / "checkpoints"),
            max_to_keep=config.keep_checkpoints,
        )

    def _step(self, images: tf.Tensor, labels: tf.Tensor) -> dict[str, tf.Tensor]:
        """One update on uint8 images [B, H, W, C] and labels [B]; returns loss terms and accuracy."""
        number = tf.cast(self.optimizer.iterations, tf.int32)
        with dropout_seed(tf.stack([self.seed, number])), tf.GradientTape() as tape:
            terms, logits = self.objective(images, labels)
            loss = tf.add_n(list(terms.values()))
        gradients = self._prepared(tape.gradient(loss, self.variables))
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

    def _prepared(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Scores the raw gradients, then adds weight decay, gates by the masks, and clips.

        Gating keeps optimizer slots, and so weights, at zero outside the masks.
        """
        named = {
            self.kernels.get(v.ref(), ""): g for v, g in zip(self.variables, gradients, strict=True)
        }
        if self.pruner:
            self.pruner.observe(named)
        gates = self._gates()
        prepared = []
        for variable, gradient in zip(self.variables, gradients, strict=True):
            if name := self.kernels.get(variable.ref()):
                gradient += self.recipe.weight_decay * variable
                gradient = gradient * gates[name] if name in gates else gradient
            prepared.append(gradient)
        if self.config.clip_norm:
            prepared, _ = tf.clip_by_global_norm(prepared, self.config.clip_norm)
        return prepared

    def _gates(self) -> dict[str, tf.Tensor]:
        if self.pruner:
            return {name: self.pruner.gate(name) for name in wrappers(self.model)}
        return {name: mask_of(wrapper) for name, wrapper in wrappers(self.model).items()}

    def run(self) -> Evaluation:
        """Trains to the end and returns the model's evaluation on the validation split.

        Raises:
          UserError: the loss is not finite, or a checkpoint could not be written.
        """
        first = self._restore()
        batches = data.training_batches(
            self.source.train,
            self.source.spec,
            self.config.batch_size,
            self.seed,
            first,
            self.total_steps,
        )
        progress = tqdm(
            total=self.total_steps * self.config.batch_size,
            initial=first * self.config.batch_size,
            desc=f"{self.folder.stage:9}",
            unit="img",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        self.counted = time.perf_counter()
        with progress:
            for step, (images, labels) in enumerate(batches, start=first + 1):
                self._one(step, images, labels, progress)
        self._count_time()
        return self.evaluator.evaluate(self.source.validation)

    def _one(self, step: int, images: tf.Tensor, labels: tf.Tensor, progress: tqdm) -> None:
        with self._profiled(step):
            values = self.step(images, labels)
        ends_epoch = step % self.steps_per_epoch == 0
        if ends_epoch or step % self.config.log_every == 0:
            self._log(step, {name: float(value) for name, value in values.items()}, progress)
        if self.pruner and self.pruner.due(step):
            self._check_finite()
            churn = self.pruner.update(step, self.optimizer)
            self.board.scalars(step, {f"churn/{name}": value for name, value in churn.items()})
        if ends_epoch:
            self._end_epoch(step, images, labels)
        self._count_time()
        if (
            step % (self.config.checkpoint_every or self.steps_per_epoch) == 0
            or step == self.total_steps
        ):
            self._save(step)
        progress.update(self.config.batch_size)

    def _count_time(self) -> None:
        """Adds what has passed since it was last called: steps, waiting for data, and checkpoints."""
        now = time.perf_counter()
        self.seconds.assign_add(now - self.counted)
        self.counted = now

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        """Begins a trace before the step and ends it after, where `--profile_steps` asks for it."""
        first, last = self.config.profile_steps or (0, 0)
        if first <= step <= last and not self.profiling:
            tf.profiler.experimental.start(str(self.folder.tensorboard))
            self.profiling = True
        yield
        if self.profiling and step == min(last, self.total_steps):
            tf.profiler.experimental.stop()
            self.profiling = False

    def _log(self, step: int, values: dict[str, float], progress: tqdm) -> None:
        self._check_finite()
        progress.set_postfix(
            loss=f"{values['loss']:.3f}", accuracy=f"{values['accuracy']:.3f}", refresh=False
        )
        rate = progress.format_dict["rate"]
        self.board.scalars(
            step,
            {
                "loss/total": values.pop("loss"),
                "accuracy/training": values.pop("accuracy"),
                "learning_rate": float(self.rate(step - 1)),
                **({"images_per_second": rate} if rate else {}),
                **values,
            },
        )

    def _end_epoch(self, step: int, images: tf.Tensor, labels: tf.Tensor) -> None:
        self.board.state(step, self.model, self.evaluator.evaluate(self.source.validation))
        if isinstance(self.objective, AttentionGuided):
            shown, _ = next(iter(data.evaluation_batches(self.source.validation, _SHOWN_MAPS)))
            self.board.attention_maps(step, shown, self.objective.maps(shown))
            self.board.scalars(step, self._gradient_shares(images, labels))

    @tf.function
    def _term_norms(self, images, labels):
        with dropout_seed(tf.stack([self.seed, 0])), tf.GradientTape(persistent=True) as tape:
            terms, _ = self.objective(images, labels)
        zero = tf.UnconnectedGradients.ZERO
        return {
            name: tf.linalg.global_norm(tape.gradient(term, self.variables, unconnected_gradients=zero))
            for name, term in terms.items()
        }

    def _gradient_shares(self, images, labels) -> dict[str, float]:
        """Norm of each loss term's gradient over the sum of these norms."""
        norms = {name: float(norm) for name, norm in self._term_norms(images, labels).items()}
        total = sum(norms.values()) or 1.0
        return {f"gradient_share/{name}": norm / total for name, norm in norms.items()}

    def _check_finite(self) -> None:
        if (bad := int(self.first_bad_step)) >= 0:
            self._stop(f"the loss is not finite at step {bad}")

    def _stop(self, reason: str) -> NoReturn:
        kept = self.manager.latest_checkpoint or "none"
        raise UserError(
            f"{self.folder.stage}: {reason}; last good checkpoint: {kept}; "
            "lower the learning rate, or set --clip_norm"
        )

    def _restore(self) -> int:
        """Restores the newest checkpoint and returns the number of finished steps."""
        try:
            newest = self.manager.restore_or_initialize()
        except (OSError, ValueError, IndexError, tf.errors.OpError) as error:
            newest, line = self.manager.latest_checkpoint, first_line(error)
            raise UserError(f"{newest}: checkpoint could not be read: {line}") from error
        if newest is None:
            return 0
        return int(self.optimizer.iterations)

    def _save(self, step: int) -> None:
        """Keeps the state after `step` steps. Weights that a finite loss spoils are found here."""
        self._check_finite()
        spoilt = [v.name for v in self.variables if not tf.reduce_all(tf.math.is_finite(v))]
        if spoilt:
            self._stop(f"{', '.join(spoilt)} not finite after step {step}")
        try:
            self.manager.save(checkpoint_number=step)
        except (OSError, tf.errors.OpError) as error:
            line = first_line(error)
            raise UserError(
                f"{self.manager.directory}: checkpoint could not be written: {line}"
            ) from error


def trained_variables(model: keras.Model, config: Config) -> list[tf.Variable]:
    """The model's trainable variables, less leaks and thresholds that `config` holds fixed."""
    fixed = set()
    for layer in Graph.of(model).select(is_neuron).values():
        if isinstance(layer, LIF):
            fixed |= set() if config.train_leak else {layer.cell.leak.ref()}
            fixed |= set() if config.train_v_th else {layer.cell.v_th.ref()}
    return [variable for variable in model.trainable_variables if variable.ref() not in fixed]
