"""How cost grows: with T, for all libraries; with batch, width and density, for this project.

    .venv-bench/bin/python benchmarks/scaling.py --over=timesteps [--workload=W1] [--setting=best]
    python benchmarks/scaling.py --over=density [--network=vgg16] [--timesteps=5]

Over T every library runs a workload in processes of its own; time and memory are plotted too. The rest
takes `train.py`'s settings; the points of a table take turns, and speeds an image are compared with its
first row. Densities count multiply-adds; the
irregular structure is computed as a dense one, the channel structure is smaller.
"""

import math
import pathlib
import sys
from typing import Any

import matplotlib
import tensorflow as tf
from absl import flags
from matplotlib import pyplot as plt

import measure
import memory
import peers
import project
import worker
from snn_tf import costs, evaluation, runs
from snn_tf.config import TRAIN_SNN, Config
from snn_tf.update import Recipe

matplotlib.use("agg")
FLAGS = flags.FLAGS
FIGURES = {"training": "train", "inference": "infer"}
Point = dict[str, Any]
Curves = dict[tuple[str, str], dict[str, list[float]]]


def define_flags() -> None:
    """The flags of the program, `train.py`'s besides."""
    project.define_settings(budget="macs")
    peers.define_flags()
    varied = ["timesteps", "batch", "width", "density"]
    flags.DEFINE_multi_enum("over", varied, varied, "What is varied.")
    flags.DEFINE_list("timesteps_of_all", ["1", "2", "4", "8", "16"], "T for all libraries.")
    flags.DEFINE_list("batches", ["8", "32", "128"], "Batch sizes.")
    flags.DEFINE_list("widths", ["0.25", "0.5", "1"], "Widths.")
    flags.DEFINE_list("densities", ["0.25", "0.05"], "Densities, beside the dense network.")
    FLAGS.set_default("setting", [peers.BEST])


def points() -> dict[str, list[Point]]:
    """Changes of the settings, by what is varied."""
    density = [{"density": 1.0}] + [
        {"density": float(value), "structure": structure}
        for structure in ("irregular", "channel")
        for value in FLAGS.densities
    ]
    return {
        "batch": [{"batch_size": int(size)} for size in FLAGS.batches],
        "width": [{"width": float(width)} for width in FLAGS.widths],
        "density": density,
    }


def calls(config: Config) -> tuple[float, dict[str, measure.Call]]:
    """Multiply-adds of a pass of an image, in millions, and a training step and an inference."""
    model = project.snn(config)
    macs = costs.ann_costs(evaluation.synapses(model))["macs"] / 1e6
    split = project.noise(config.batch_size)
    images, labels = tf.constant(split.images), tf.constant(split.labels)
    update = project.update(config, model, recipe=Recipe.of(config, TRAIN_SNN))
    predict = evaluation.predictor(model)
    return macs, {
        "training": project.step(update, images, labels),
        "inference": lambda: predict(images).numpy(),
    }


def over(varied: str) -> None:
    """Records the table of what is varied; ratios are to its first row."""
    started = measure.load()
    found = points()[varied]
    configs = [project.from_flags(**{"density": 1.0, **point}) for point in found]
    made = [calls(config) for config in configs]
    named = {
        f"{number} {phase}": call
        for number, (_, both) in enumerate(made)
        for phase, call in both.items()
    }
    times = measure.take_turns(named, FLAGS.seconds)
    rows = []
    for number, (point, config) in enumerate(zip(found, configs, strict=True)):
        row: list[object] = [", ".join(map(str, point.values())), made[number][0]]
        for phase in FIGURES:
            seconds, first = times[f"{number} {phase}"], times[f"0 {phase}"]
            images = config.batch_size / configs[0].batch_size
            row += [1e3 * seconds.cpu / config.batch_size, config.batch_size / seconds.wall]
            row += [images * first.cpu / seconds.cpu, images * first.wall / seconds.wall]
        rows.append(row)
    header = [varied, "M MACs"]
    for phase in FIGURES:
        header += [f"{phase}, CPU ms an image", "images/s", "× the first, CPU", "× the first, wall"]
    title = (
        f"Cost over {varied}, {configs[0].network}, T = {configs[0].timesteps}, {configs[0].precision}"
    )
    measure.record(title, runs.device(), started, measure.table(header, rows))


def over_timesteps(workload: str, setting: str) -> None:
    """Records time and memory of all libraries against T, and plots them."""
    started = measure.load()
    timesteps = list(map(int, FLAGS.timesteps_of_all))
    curves: Curves = {}
    rows = []
    for library, variant in peers.entrants(setting):
        found = [
            worker.run(library, variant, workload, FLAGS.timeout, seconds=FLAGS.seconds, timesteps=steps)
            for steps in timesteps
        ]
        for words, phase in FIGURES.items():
            named = {
                f"{words}, CPU s": [seconds_of(result, phase) for result in found],
                f"{words}, peak MiB": [memory.peak_mib(result, phase) for result in found],
            }
            curves.setdefault((library, variant), {}).update(named)
            rows += [[library, variant, name, *values] for name, values in named.items()]
        print(f"{workload}, {library}, {variant}: done", file=sys.stderr)
    folder = pathlib.Path(__file__).parent
    plot(curves, timesteps, "CPU s", folder / f"time_{workload}_{setting}.png")
    plot(curves, timesteps, "peak MiB", folder / f"memory_{workload}_{setting}.png")
    header = ("library", "variant", "figure", *(f"T = {steps}" for steps in timesteps))
    title = f"Cost over T, {workload}, {setting}"
    measure.record(title, runs.device(), started, measure.table(header, rows))


def seconds_of(result: dict, phase: str) -> float:
    """A phase's CPU seconds in what `worker.run` found; nan if it failed."""
    return math.nan if "error" in result else result[phase]["cpu"]


def plot(curves: Curves, timesteps: list[int], unit: str, path: pathlib.Path) -> None:
    """Training and inference side by side, a line for each library and variant."""
    figure, axes = plt.subplots(1, len(FIGURES), figsize=(10, 4.5), layout="constrained")
    for axis, words in zip(axes, FIGURES, strict=True):
        for (library, variant), named in curves.items():
            axis.plot(timesteps, named[f"{words}, {unit}"], marker="o", label=f"{library} ({variant})")
        axis.set(title=words, xlabel="T", ylabel=unit)
        axis.set_xticks(timesteps)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def program() -> None:
    for varied in FLAGS.over:
        if varied != "timesteps":
            over(varied)
            continue
        for workload in FLAGS.workload:
            for setting in FLAGS.setting:
                over_timesteps(workload, setting)


if __name__ == "__main__":
    define_flags()
    project.main(program)
