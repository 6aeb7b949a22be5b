"""Times one training step of each stage: `train_ann`, `compress`, `train_snn`.

    python benchmarks/train_step.py [--network=vgg16] [--batch_size=128] [--timesteps=5]

It takes `train.py`'s settings. Steps take turns on random images of 32×32. Beside them runs the ANN on
T times the batch, with the SNN's optimizer: the same convolutions as the SNN's, without its neurons.
"""

import tensorflow as tf
from absl import flags

import measure
import project
from measure import Call, Seconds
from snn_tf import runs
from snn_tf.config import Config
from snn_tf.objectives import AttentionGuided
from snn_tf.update import Recipe, Update

FLAGS = flags.FLAGS
ANN, COMPRESS, SNN, WIDE_ANN = "train_ann", "compress", "train_snn", "ANN on T times the batch"


def updates(config: Config) -> dict[str, Update]:
    """What `train.py` trains each stage's network with."""
    ann, compress, snn = (Recipe.of(config, stage) for stage in (ANN, COMPRESS, SNN))
    teacher = project.meta_model(config)
    teacher.trainable = False
    pruner = project.student(config)
    guided = AttentionGuided(pruner, teacher, config)
    return {
        ANN: project.update(config, project.meta_model(config), recipe=ann),
        COMPRESS: project.update(config, pruner.model, guided, pruner, compress),
        SNN: project.update(config, project.snn(config), recipe=snn),
        WIDE_ANN: project.update(config, project.meta_model(config), recipe=snn),
    }


def calls(config: Config) -> dict[str, Call]:
    """A step of each."""
    split = project.noise(config.batch_size * config.timesteps)
    few, many = (
        (tf.constant(split.images[:count]), tf.constant(split.labels[:count]))
        for count in (config.batch_size, len(split))
    )
    return {
        name: project.step(update, *(many if name == WIDE_ANN else few))
        for name, update in updates(config).items()
    }


def ratios(times: dict[str, Seconds], timesteps: int) -> list[list[object]]:
    """What a step costs against others."""
    wanted = {
        "compress / train_ann": (COMPRESS, ANN, 1),
        f"train_snn / {timesteps} steps of train_ann": (SNN, ANN, timesteps),
        "train_snn / ANN on T times the batch": (SNN, WIDE_ANN, 1),
    }
    return [
        [words, times[one].cpu / times[other].cpu / count, times[one].wall / times[other].wall / count]
        for words, (one, other, count) in wanted.items()
    ]


def program() -> None:
    started = measure.load()
    config = project.from_flags()
    times = measure.take_turns(calls(config), FLAGS.seconds)
    images = {WIDE_ANN: config.batch_size * config.timesteps}
    rows = [
        [name, row.cpu, row.wall, images.get(name, config.batch_size) / row.wall]
        for name, row in times.items()
    ]
    title = (
        f"A training step, {config.network}, batch {config.batch_size}, T = {config.timesteps}, "
        f"{config.precision}, {config.lif}"
    )
    steps = measure.table(("step", "CPU s", "wall s", "images/s"), rows)
    against = measure.table(("cost of a step", "CPU", "wall"), ratios(times, config.timesteps))
    measure.record(title, runs.device(), started, steps, against)


if __name__ == "__main__":
    project.define_settings()
    flags.DEFINE_float("seconds", 120.0, "Seconds after which no further round begins.", lower_bound=0.0)
    project.main(program)
