"""Compares the training loop on real input with the bare step on one batch that stays in memory.

    python benchmarks/input_pipeline.py [--data_dir=DIR] [--network=vgg16] [--timesteps=5] [--steps=60]

It takes `train.py`'s settings, and runs its loop in the stage `train_snn`, from dense and from masked
weights. Images are CIFAR-10's with `--data_dir`, else random ones of that shape; they are cropped and
flipped either way. Last comes the share of the time that a step waits for its batch.
"""

import dataclasses
import pathlib
import time

import numpy as np
import tf_keras as keras
from absl import flags

import measure
import project
from snn_tf import data, runs, training
from snn_tf.config import TRAIN_SNN, Config
from snn_tf.objectives import CrossEntropy
from snn_tf.runs import StageFolder
from snn_tf.update import Recipe

FLAGS = flags.FLAGS
_EVALUATED = 64


class TimedTrainer(training.Trainer):
    """`train.py`'s loop, noting when each of its calls is done.

    Attributes:
      marks: step, CPU seconds and wall seconds after every call, before what is due then.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.marks: list[tuple[int, float, float]] = []

    def _attend(self, step, *done):
        self.marks.append((step, time.process_time(), time.perf_counter()))
        super()._attend(step, *done)

    def seconds_a_step(self) -> measure.Seconds:
        """Of all steps after the first call, which compiles; what comes after the last is left out."""
        (first, *began), (last, *ended) = self.marks[0], self.marks[-1]
        cpu, wall = ((b - a) / (last - first) for a, b in zip(began, ended, strict=True))
        return measure.Seconds(cpu, wall)


def source(config: Config) -> data.Data:
    """CIFAR-10 or noise: `--steps` training batches, and a few images to evaluate at the end."""
    count = FLAGS.steps * config.batch_size
    if config.data_dir:
        loaded = data.load(config)
        spec, split, names = loaded.spec, loaded.train, loaded.class_names
    else:
        spec = dataclasses.replace(project.SPEC, augment="crop_flip")
        split, names = project.noise(count), project.CLASS_NAMES
    repeated = np.arange(count) % len(split)
    few = split.take(np.arange(_EVALUATED))
    return data.Data(spec, split.take(repeated), few, few, names)


def trainer(config: Config, model: keras.Model, source: data.Data) -> TimedTrainer:
    """The loop of one epoch over `source`."""
    recipe = dataclasses.replace(Recipe.of(config, TRAIN_SNN), epochs=1)
    folder = StageFolder(pathlib.Path(config.run_dir), TRAIN_SNN)
    folder.open(config, upstream=())
    return TimedTrainer(config, recipe, model, CrossEntropy(model, config), source, folder)


def share_waiting(loop: TimedTrainer) -> float:
    """Share of the wall time that a step waits for its batch, over a tenth of `--steps`, at least 5."""
    steps = max(5, FLAGS.steps // 10)
    batches = iter(
        data.training_batches(
            loop.source.train, loop.source.spec, loop.config.batch_size, loop.seed, 0, steps + 1
        )
    )
    waiting, computing = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        project.step(loop.update, *batch)()
        waiting.append(arrived - began)
        computing.append(time.perf_counter() - arrived)
    # The first batch is waited for by a loop once, not at every step.
    return sum(waiting[1:]) / sum(waiting[1:] + computing[1:])


def row(config: Config, examples: data.Data) -> list[object]:
    """Images a second of the bare step and of the loop, and shares, at one density."""
    loop = trainer(config, project.snn(config), examples)
    batches = data.training_batches(examples.train, examples.spec, config.batch_size, 0, 0, 1)
    bare = {"step": project.step(loop.update, *next(iter(batches)))}
    before = measure.take_turns(bare, FLAGS.seconds)["step"]
    loop.run()
    after = measure.take_turns(bare, FLAGS.seconds)["step"]
    cpu, wall = (before.cpu + after.cpu) / 2, (before.wall + after.wall) / 2
    whole = loop.seconds_a_step()
    shares = (wall / whole.wall, cpu / whole.cpu, share_waiting(loop))
    rates = (config.batch_size / seconds for seconds in (wall, whole.wall))
    return [f"{config.density:g}", *rates, *(f"{share:.1%}" for share in shares)]


def program() -> None:
    started = measure.load()
    rows = []
    for density in map(float, FLAGS.densities):
        config = project.from_flags(density=density)
        rows.append(row(config, source(config)))
    name = "CIFAR-10" if config.data_dir else "noise"
    title = (
        f"Training loop on {name}, {config.network}, batch {config.batch_size}, T = {config.timesteps}, "
        f"{config.precision}, {config.lif}"
    )
    header = (
        "density",
        "bare step, images/s",
        "loop, images/s",
        "loop / bare, wall",
        "loop / bare, CPU",
    )
    table = measure.table((*header, "share waiting for input"), rows)
    measure.record(title, runs.device(), started, table)


if __name__ == "__main__":
    project.define_settings()
    flags.DEFINE_list("densities", ["1", "0.05"], "Densities of the network's masks.")
    flags.DEFINE_integer("steps", 60, "Steps of the loop.", lower_bound=2)
    flags.DEFINE_float("seconds", 20.0, "Of the bare step, before the loop and after.", lower_bound=0.0)
    project.main(program)
