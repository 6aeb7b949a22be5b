"""Times an update of the masks against an epoch of training.

    python benchmarks/mask_update.py [--network=vgg16] [--structure=irregular] [--steps_per_epoch=351]

It takes `train.py`'s settings: `--structure`, `--saliency`, `--budget` and `--method` say which update.
"""

import tensorflow as tf
from absl import flags

import measure
import project
from snn_tf import runs
from snn_tf.config import COMPRESS
from snn_tf.objectives import AttentionGuided
from snn_tf.update import Recipe

FLAGS = flags.FLAGS


def program() -> None:
    started = measure.load()
    config = project.from_flags()
    teacher = project.meta_model(config)
    teacher.trainable = False
    pruner = project.student(config)
    guided = AttentionGuided(pruner, teacher, config)
    update = project.update(config, pruner.model, guided, pruner, Recipe.of(config, COMPRESS))
    split = project.noise(config.batch_size)
    step = project.step(update, tf.constant(split.images), tf.constant(split.labels))
    calls = {"step": step, "update": lambda: pruner.update(pruner.schedule.interval, update.optimizer)}
    times = measure.take_turns(calls, FLAGS.seconds, warm_up=1)
    epoch = [FLAGS.steps_per_epoch * seconds for seconds in (times["step"].cpu, times["step"].wall)]
    weights = sum(wrapper.layer.kernel.shape.num_elements() for wrapper in pruner.wrappers.values())
    rows = [
        ["mask update", times["update"].cpu, times["update"].wall],
        [f"epoch of {FLAGS.steps_per_epoch} steps", *epoch],
        [
            "share",
            *(f"{one / all_:.2%}" for one, all_ in zip(_pair(times["update"]), epoch, strict=True)),
        ],
    ]
    title = f"Mask update, {config.network}, {weights / 1e6:.1f} M weights, {config.structure}"
    measure.record(title, runs.device(), started, measure.table(("", "CPU s", "wall s"), rows))


def _pair(seconds: measure.Seconds) -> tuple[float, float]:
    return seconds.cpu, seconds.wall


if __name__ == "__main__":
    project.define_settings()
    flags.DEFINE_integer(
        "steps_per_epoch", project.STEPS_PER_EPOCH, "Steps between two updates.", lower_bound=1
    )
    flags.DEFINE_float("seconds", 60.0, "Seconds after which no further round begins.", lower_bound=0.0)
    project.main(program)
