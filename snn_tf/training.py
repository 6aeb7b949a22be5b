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

from snn_tf import data, health, interruption
from snn_tf.ambient import dropout_seed
from snn_tf.checkpoints import Checkpoints
from snn_tf.config import Config
from snn_tf.errors import Interrupted, UserError
from snn_tf.evaluation import Evaluation, Evaluator
from snn_tf.graph import neuron_parameters
from snn_tf.layers import LEAST
from snn_tf.objectives import AttentionGuided, Objective
from snn_tf.pruners import Pruner
from snn_tf.runs import StageFolder
from snn_tf.summaries import TensorBoard
from snn_tf.update import Batch, Recipe, Update, moving_statistics

Values = dict[str, float]

_SHOWN_MAPS = 4
_LONGEST_CALL = 2.0  # seconds
_FINITE_REMEDY = "lower the learning rate, or set --clip_norm"


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
        self.cutout = recipe.cutout
        self.update = Update(config, recipe, model, objective, self.steps_per_epoch, self.seed, pruner)
        self.profiling = False
        self.counted = time.perf_counter()
        self.seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64, name="seconds")
        self.evaluator = Evaluator(model, config.batch_size)
        self.board = TensorBoard(folder.tensorboard)
        self.watch = health.Watch(folder.stage, source.spec.num_classes)
        self.saved = time.perf_counter()
        # Up to the last epoch's end.
        self.skipped_before = tf.Variable(0, trainable=False, dtype=tf.int64, name="skipped_before")
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            folder.fingerprint(),
            config.keep_checkpoints,
            model=model,
            optimizer=self.update.optimizer,
            skipped=self.update.skipped,
            skipped_before=self.skipped_before,
            seconds=self.seconds,
            **({"pruner": pruner} if pruner else {}),
        )

    def run(self) -> Evaluation:
        """Trains to the end and returns the model's evaluation on the validation split.

        Raises:
          UserError: loss or gradient is not finite, or a checkpoint could not be written.
          Interrupted: a signal came; the step under way is finished and saved.
        """
        # Keras models are cycles of references: those of the way here are freed now, not at some time.
        gc.collect()
        first = self.checkpoints.restore()
        if self._validates(first):  # a signal may have come before it was done
            self._validate(first, next(self._batches(first - 1)))
        batches = self._batches(first)
        progress = tqdm(
            total=self.total_steps * self.config.batch_size,
            initial=first * self.config.batch_size,
            desc=f"{self.folder.stage:9}",
            unit="img",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        self.counted = self.saved = time.perf_counter()
        step, affordable = first, 1
        with progress, interruption.deferred():
            while step < self.total_steps:
                count = min(affordable, self._until_next_halt(step))
                began = time.perf_counter()
                with self._profiled(step + 1, count):
                    values, batch = self.update.several(batches, tf.constant(count))
                    values = {name: float(value) for name, value in values.items()}
                # The first call compiles: what it says of a step's length is corrected by the next.
                affordable = max(1, int(count * _LONGEST_CALL / (time.perf_counter() - began)))
                step += count
                progress.update(count * self.config.batch_size)
                self._attend_or_save(step, values, batch, progress)
        self._count_time()
        return self.result

    def _batches(self, first: int) -> Iterator[Batch]:
        """What the steps after `first` see."""
        return iter(
            data.training_batches(
                self.source.train,
                self.source.spec,
                self.config.batch_size,
                self.seed,
                first,
                self.total_steps,
                self.cutout,
            )
        )

    def _until_next_halt(self, step: int) -> int:
        """Steps that may run in one call after `step`: up to the next one that something waits for."""
        intervals = [self.steps_per_epoch, self.config.log_every]
        intervals += [self.config.checkpoint_interval()[0] or self.steps_per_epoch]
        intervals += [self.pruner.schedule.interval] if self.pruner else []
        halts = [interval - step % interval for interval in intervals]
        halts += [traced - step for traced in self._traced() if traced > step]
        longest = self.config.steps_per_call or self.total_steps
        return min(longest, self.total_steps - step, *halts)

    def _is_to_save(self, step: int) -> bool:
        steps, seconds = self.config.checkpoint_interval()
        if seconds:
            due = time.perf_counter() - self.saved >= seconds
        else:
            due = step % (steps or self.steps_per_epoch) == 0
        return due or step == self.total_steps

    def _traced(self) -> tuple[int, int]:
        """The last step before a profiler trace, and the last in it."""
        first, last = self.config.profile_steps or (1, 0)
        return first - 1, last

    def _attend_or_save(self, step: int, values: Values, batch: Batch, progress: tqdm) -> None:
        """Does what is due after `step` steps; if a signal has come, saves them and raises."""
        try:
            self._attend(step, values, batch, progress)
            interruption.check()
        except Interrupted as stopped:
            self._save(step)
            raise Interrupted(
                stopped.signal,
                f"{self.folder.stage}: step {step} of {self.total_steps} is saved",
            ) from None

    def _attend(self, step: int, values: Values, batch: Batch, progress: tqdm) -> None:
        """Does what is due after `step` steps, of which the last made `values` of `batch`."""
        self._check_finite(step)
        ends_epoch = step % self.steps_per_epoch == 0
        if ends_epoch or step % self.config.log_every == 0:
            self._log(step, values, progress)
        if self.pruner and self.pruner.schedule.due(step):
            churn = self.pruner.update(step, self.update.optimizer)
            self.board.scalars(step, {f"churn/{name}": value for name, value in churn.items()})
        if ends_epoch:
            self._handle_degenerate(step, self._at_bounds())
        if self._validates(step):
            with interruption.immediate():
                self._validate(step, batch)
        self._count_time()
        if self._is_to_save(step):
            self._save(step)

    def _at_bounds(self) -> list[str]:
        """Warnings of the neurons' parameters that are trained."""
        parameters = neuron_parameters(self.model)
        for kind in ("v_th", "leak"):
            if not getattr(self.config, f"train_{kind}"):
                parameters[kind] = {}
        return health.at_bounds(parameters, LEAST)

    def _validates(self, step: int) -> bool:
        interval = self.steps_per_epoch * self.config.validate_every
        return step > 0 and (step % interval == 0 or step == self.total_steps)

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

    def _log(self, step: int, values: Values, progress: tqdm) -> None:
        self.watch.saw(values["loss"], values["accuracy"])
        progress.set_postfix(
            loss=f"{values['loss']:.3f}", accuracy=f"{values['accuracy']:.3f}", refresh=False
        )
        rate = progress.format_dict["rate"]
        self.board.scalars(
            step,
            {
                "loss/total": values.pop("loss"),
                "accuracy/training": values.pop("accuracy"),
                "skipped_steps": int(self.update.skipped),
                "learning_rate": float(self.update.rate(step - 1)),
                **({"images_per_second": rate} if rate else {}),
                **values,
            },
        )

    def _validate(self, step: int, batch: Batch) -> None:
        self.result = self.evaluator.evaluate(self.source.validation)
        self.board.state(step, self.model, self.result)
        rates = self.result.spike_rates()
        for warning in self.watch.end_epoch(rates, step):
            tqdm.write(warning)
        self._handle_degenerate(step, health.silenced(rates))
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
        with interruption.deferred():
            kept = [(v, v.numpy()) for v in moving_statistics(self.model)]
            norms = {name: float(norm) for name, norm in self._term_norms(images, labels).items()}
            for variable, value in kept:
                variable.assign(value)
        total = sum(norms.values()) or 1.0
        return {f"gradient_share/{name}": norm / total for name, norm in norms.items()}

    def _warn(self, step: int, warnings: list[str]) -> None:
        for line in self.watch.once(step, warnings):
            tqdm.write(line)

    def _handle_degenerate(self, step: int, findings: list[str]) -> None:
        """Says what `health` found after `step` steps, or ends there, as `--on_degenerate` says."""
        if findings and self.config.on_degenerate == "stop":
            self._stop(f"step {step}: {findings[0]}", "--on_degenerate=warn goes on")
        self._warn(step, findings)

    def _check_finite(self, step: int) -> None:
        """Looks at the steps up to `step` for loss or gradients that are not finite."""
        skipped, bad = int(self.update.skipped), int(self.update.bad_step)
        if bad:
            layers = _listed(self.update.bad_layers())
            if self.config.on_nonfinite == "stop":
                self._stop(
                    f"loss or gradient is not finite at step {bad} ({layers})",
                    f"{_FINITE_REMEDY} or --on_nonfinite=skip",
                )
            self._warn(bad, [f"loss or gradient is not finite ({layers}); such steps are skipped"])
        if step % self.steps_per_epoch == 0:
            if skipped - int(self.skipped_before) >= self.steps_per_epoch:
                self._stop(f"loss or gradient is not finite at any step of the epoch up to {step}")
            self.skipped_before.assign(skipped)

    def _stop(self, reason: str, remedy: str = _FINITE_REMEDY) -> NoReturn:
        kept = self.checkpoints.newest or "none"
        raise UserError(f"{self.folder.stage}: {reason}; last good checkpoint: {kept}; {remedy}")

    def _save(self, step: int) -> None:
        """Keeps the state after `step` steps. Weights that a finite gradient spoils are found here."""
        spoilt = [v.name for v in self.update.variables if not tf.reduce_all(tf.math.is_finite(v))]
        if spoilt:
            self._stop(f"{', '.join(spoilt)} not finite after step {step}")
        self.checkpoints.save(step)
        self.saved = time.perf_counter()


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more layers" if len(names) > most else ""
    return ", ".join(names[:most]) + more
