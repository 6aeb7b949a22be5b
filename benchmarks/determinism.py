r"""What --deterministic costs: CPU seconds of a training step with it and without, stage by stage.

    python benchmarks/determinism.py --rounds=3
    python benchmarks/determinism.py --flagfile=flags/cifar10_vgg16_irregular_0.1_t5_small.flags \
        --steps=8

Every measurement is a process of its own, since TensorFlow cannot be made to forget; the two kinds take
turns. A flagfile's data set must be there; the default is the quickstart's digits.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
STAGES = ("train_ann", "compress", "train_snn")


def cpu_seconds(flags: list[str], steps: int) -> dict[str, float]:
    """CPU seconds a step in this process, by stage, after the steps that compile and warm up."""
    from absl import flags as absl_flags

    from snn_tf import cli, stages, training

    cli.define_flags()
    absl_flags.FLAGS(["train.py", *flags])
    found = {}

    def measured(trainer):
        batches = trainer._batches(0)
        for count in (1, steps):
            trainer.update.several(batches, count_of(count))
        began = time.process_time()
        values, _ = trainer.update.several(batches, count_of(steps))
        float(values["loss"])
        found[trainer.folder.stage] = (time.process_time() - began) / steps
        return trainer.evaluator.evaluate(trainer.source.validation)

    training.Trainer.run = measured
    stages.run(cli.config_from_flags())
    return found


def count_of(steps: int):
    """A number of steps as `Update.several` takes it."""
    import tensorflow as tf

    return tf.constant(steps)


def measurement(flags: list[str], steps: int, deterministic: bool) -> list[float]:
    """CPU seconds a step of each stage, in a fresh process and run folder."""
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"--run_dir={folder}",
            "--meta_model=",
            f"--stage=train_ann,compress,convert,{STAGES[-1]}",
        ]
        command = [sys.executable, __file__, f"--steps={steps}", "--measure", "--", *flags, *own]
        command.append(f"--deterministic={deterministic}")
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return [float(word) for word in result.stdout.splitlines()[-1].split()]


def main() -> None:
    """Prints medians over the rounds, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flagfile", default="flags/quickstart.flags")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given, flags = parser.parse_known_args()
    if given.measure:
        found = cpu_seconds([flag for flag in flags if flag != "--"], given.steps)
        print(*(found[stage] for stage in STAGES))
        return
    flags = [f"--flagfile={given.flagfile}", *flags]
    taken: dict[bool, list[list[float]]] = {False: [], True: []}
    for _ in range(given.rounds):
        for deterministic in taken:
            taken[deterministic].append(measurement(flags, given.steps, deterministic))
    print(f"{given.flagfile}, {given.rounds} rounds of {given.steps} steps; CPU ms a step, medians")
    for number, stage in enumerate(STAGES):
        off, on = (statistics.median(row[number] for row in taken[kind]) for kind in (False, True))
        cost = f"{100 * (on / off - 1):+.1f} %"
        print(f"{stage:10} {1e3 * off:9.2f}   --deterministic {1e3 * on:9.2f}   {cost}")


if __name__ == "__main__":
    main()
