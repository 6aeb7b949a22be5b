"""One training loop for all stages: calls of many steps, checkpoints, progress, TensorBoard's events.

A stage brings its model, its objective and, for compression, its pruner. What a step sees is a
function of seed and step alone, so a stopped training continues where its last checkpoint stands.
"""

import contextlib
import functools
import gc
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import tensorflow as tf
import tf_keras as keras
from tqdm import tqdm

from snn_tf import data, health
from snn_tf.config import Config
from snn_tf.errors import UserError, first_line
from snn_tf.evaluation import Evaluation, Evaluator
from snn_tf.graph import Graph, is_norm
from snn_tf.layers import dropout_seed
from snn_tf.objectives import AttentionGuided, Objective
from snn_tf.pruners import Pruner
from snn_tf.runs import StageFolder
from snn_tf.summaries import TensorBoard
from snn_tf.update import Batch, Recipe, Update

_SHOWN_MAPS = 4
_LONGEST_CALL = 2.0  # seconds


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
        self.config, self.model, self.objective = config, model, objective
        self.source, self.folder, self.pruner = source, folder, pruner
        self.seed = config.stage_seed(folder.stage)
        self.steps_per_epoch = data.steps_per_epoch(source.train, config.batch_size)
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.update = Update(config, recipe, model, objective, self.steps_per_epoch, self.seed, pruner)
        self.profiling = False
        self.counted = time.perf_counter()
        self.seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64, name="seconds")
        self.evaluator = Evaluator(model, config.batch_size)
        self.board = TensorBoard(folder.tensorboard)
        self.watch = health.Watch(folder.stage)
        self.manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=model,
                optimizer=self.update.optimizer,
                seconds=self.seconds,
                **({"pruner": pruner} if pruner else {}),
            ),
            str(folder.path / "checkpoints"),
            max_to_keep=config.keep_checkpoints,
        )

    def run(self) -> Evaluation:
        """Trains to the end and returns the model's evaluation on the validation split.

        Raises:
          UserError: the loss is not finite, or a checkpoint could not be written.
        """
        # Keras models are cycles of references: those of the way here are freed now, not at some time.
        gc.collect()
        first = self._restore()
        batches = iter(
            data.training_batches(
                self.source.train,
                self.source.spec,
                self.config.batch_size,
                self.seed,
                first,
                self.total_steps,
            )
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
        step, affordable = first, 1
        with progress:
            while step < self.total_steps:
                count = min(affordable, self._until_next_halt(step))
                began = time.perf_counter()
                with self._profiled(step + 1, count):
                    values, batch = self.update.several(batches, tf.constant(count))
                    values = {name: float(value) for name, value in values.items()}
                # The first call compiles: what it says of a step's length is corrected by the next.
                affordable = max(1, int(count * _LONGEST_CALL / (time.perf_counter() - began)))
                step += count
                self._attend(step, values, batch, progress)
                progress.update(count * self.config.batch_size)
        self._count_time()
        return self.evaluator.evaluate(self.source.validation)

    def _until_next_halt(self, step: int) -> int:
        """Steps that may run in one call after `step`: up to the next one that something waits for."""
        intervals = [self.steps_per_epoch, self.config.log_every, self._checkpoint_interval()]
        intervals += [self.pruner.interval] if self.pruner else []
        halts = [interval - step % interval for interval in intervals]
        halts += [traced - step for traced in self._traced() if traced > step]
        longest = self.config.steps_per_call or self.total_steps
        return min(longest, self.total_steps - step, *halts)

    def _checkpoint_interval(self) -> int:
        return self.config.checkpoint_every or self.steps_per_epoch

    def _traced(self) -> tuple[int, int]:
        """The last step before a profiler trace, and the last in it."""
        first, last = self.config.profile_steps or (1, 0)
        return first - 1, last

    def _attend(self, step: int, values: dict[str, float], batch: Batch, progress: tqdm) -> None:
        """Does what is due after `step` steps, of which the last made `values` of `batch`."""
        ends_epoch = step % self.steps_per_epoch == 0
        if ends_epoch or step % self.config.log_every == 0:
            self._log(step, values, progress)
        if self.pruner and self.pruner.due(step):
            self._check_finite()
            churn = self.pruner.update(step, self.update.optimizer)
            self.board.scalars(step, {f"churn/{name}": value for name, value in churn.items()})
        validates = step % (self.steps_per_epoch * self.config.validate_every) == 0
        if validates or step == self.total_steps:
            self._validate(step, batch, progress)
        self._count_time()
        if step % self._checkpoint_interval() == 0 or step == self.total_steps:
            self._save(step)

    def _count_time(self) -> None:
        """Adds what has passed since it was last called: steps, waiting for data, and checkpoints."""
        now = time.perf_counter()
        self.seconds.assign_add(now - self.counted)
        self.counted = now

    @contextlib.contextmanager
    def _profiled(self, first: int, count: int) -> Iterator[None]:
        """Traces the steps from `first` on where `--profile_steps` says so; calls end where it does."""
        begins, last = self._traced()
        if begins < first <= last and not self.profiling:
            tf.profiler.experimental.start(str(self.folder.tensorboard))
            self.profiling = True
        with tf.profiler.experimental.Trace(self.folder.stage, step_num=first, _r=1):
            yield
        if self.profiling and first + count - 1 == min(last, self.total_steps):
            tf.profiler.experimental.stop()
            self.profiling = False

    def _log(self, step: int, values: dict[str, float], progress: tqdm) -> None:
        self._check_finite()
        self.watch.saw(values["loss"])
        progress.set_postfix(
            loss=f"{values['loss']:.3f}", accuracy=f"{values['accuracy']:.3f}", refresh=False
        )
        rate = progress.format_dict["rate"]
        self.board.scalars(
            step,
            {
                "loss/total": values.pop("loss"),
                "accuracy/training": values.pop("accuracy"),
                "learning_rate": float(self.update.rate(step - 1)),
                **({"images_per_second": rate} if rate else {}),
                **values,
            },
        )

    def _validate(self, step: int, batch: Batch, progress: tqdm) -> None:
        evaluation = self.evaluator.evaluate(self.source.validation)
        self.board.state(step, self.model, evaluation)
        for warning in self.watch.end_epoch(evaluation.spike_rates()):
            progress.write(warning)
        if isinstance(self.objective, AttentionGuided):
            self.board.attention_maps(step, self.shown, self.objective.maps(self.shown))
            self.board.scalars(step, self._gradient_shares(*batch))

    @functools.cached_property
    def shown(self) -> tf.Tensor:
        """The validation images whose attention maps TensorBoard shows."""
        return next(iter(data.evaluation_batches(self.source.validation, _SHOWN_MAPS)))[0]

    @tf.function
    def _term_norms(self, images, labels):
        with dropout_seed(tf.stack([self.seed, 0])), tf.GradientTape(persistent=True) as tape:
            terms, _ = self.objective(images, labels)
        zero = tf.UnconnectedGradients.ZERO
        return {
            name: tf.linalg.global_norm(
                tape.gradient(term, self.update.variables, unconnected_gradients=zero)
            )
            for name, term in terms.items()
        }

    def _gradient_shares(self, images, labels) -> dict[str, float]:
        """Norm of each loss term's gradient over the sum of these norms; the model stays as it is."""
        kept = [(v, v.numpy()) for v in moving_statistics(self.model)]
        norms = {name: float(norm) for name, norm in self._term_norms(images, labels).items()}
        for variable, value in kept:
            variable.assign(value)
        total = sum(norms.values()) or 1.0
        return {f"gradient_share/{name}": norm / total for name, norm in norms.items()}

    def _check_finite(self) -> None:
        if (bad := int(self.update.first_bad_step)) >= 0:
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
        return int(self.update.optimizer.iterations)

    def _save(self, step: int) -> None:
        """Keeps the state after `step` steps. Weights that a finite loss spoils are found here."""
        self._check_finite()
        spoilt = [v.name for v in self.update.variables if not tf.reduce_all(tf.math.is_finite(v))]
        if spoilt:
            self._stop(f"{', '.join(spoilt)} not finite after step {step}")
        try:
            self.manager.save(checkpoint_number=step)
        except (OSError, tf.errors.OpError) as error:
            line = first_line(error)
            raise UserError(
                f"{self.manager.directory}: checkpoint could not be written: {line}"
            ) from error


def moving_statistics(model: keras.Model) -> list[tf.Variable]:
    """Moving means and variances of a model's batch normalisation: what training passes move besides."""
    layers = Graph.of(model).select(is_norm).values()
    return [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]
