"""Runs the whole pipeline on digits over and over in one process, and watches what the process holds.

    python benchmarks/soak.py [--minutes=60]

A round is all six stages in a fresh run folder. After each, a line says resident memory (MiB), open file
descriptors and threads. At the end: their slopes by least squares over the rounds after the warm-up, and
exit code 1 if memory rises faster than `--limit` or descriptors or threads are more than at its end.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from typing import NamedTuple

os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import psutil
from absl import app, flags, logging

from snn_tf import runs, stages
from snn_tf.config import Config

FLAGS = flags.FLAGS
flags.DEFINE_float("minutes", 60.0, "How long; a round that has begun is finished.", lower_bound=0.1)
flags.DEFINE_float("warm_up", 0.25, "Share of the rounds left out of the slopes.", 0.0, 0.9)
flags.DEFINE_float("limit", 20.0, "Largest slope of resident memory, MiB an hour.")

SETTINGS = {
    "dataset": "digits",
    "network": "vgg5",
    "width": 0.125,
    "head": "linear",
    "batch_size": 64,
    "ann_epochs": 2,
    "compress_epochs": 4,
    "snn_epochs": 2,
    "ann_optimizer": "adam",
    "ann_learning_rate": 0.003,
    "snn_learning_rate": 0.005,
    "timesteps": 4,
    "v_th_scale": 0.5,
    "density": 0.2,
}


class Sample(NamedTuple):
    """What the process holds after a round."""

    hours: float
    mib: float
    descriptors: int
    threads: int


def sample(process: psutil.Process, began: float) -> Sample:
    """Reads the process's state, `began` being the start by `time.monotonic`."""
    hours = (time.monotonic() - began) / 3600
    mib = process.memory_info().rss / 2**20
    return Sample(hours, mib, process.num_fds(), process.num_threads())


def play_round(number: int) -> None:
    """All stages in a folder of their own, each round with another seed."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        stages.run(Config(run_dir=os.path.join(scratch, "run"), seed=number, **SETTINGS))


def slope(hours: np.ndarray, values: np.ndarray) -> float:
    """Least squares' rise of `values` an hour."""
    return float(np.polyfit(hours, values, 1)[0]) if len(hours) > 1 else 0.0


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    print(runs.device(), runs.versions()["tensorflow"])
    process, began, samples = psutil.Process(), time.monotonic(), []
    while not samples or samples[-1].hours * 60 < FLAGS.minutes:
        play_round(len(samples))
        samples.append(sample(process, began))
        hours, mib, descriptors, threads = samples[-1]
        print(
            f"round {len(samples):4}  {60 * hours:6.1f} min  {mib:7.1f} MiB  "
            f"{descriptors} descriptors  {threads} threads",
            flush=True,
        )
    kept = np.array(samples[int(FLAGS.warm_up * len(samples)) :])
    rise = slope(kept[:, 0], kept[:, 1])
    print(f"{len(kept)} rounds after the warm-up: {rise:+.1f} MiB an hour (limit {FLAGS.limit:g}),")
    grown = kept[-1, 2:] - kept[0, 2:]
    print(f"descriptors {grown[0]:+.0f}, threads {grown[1]:+.0f}")
    sys.exit(int(rise > FLAGS.limit or grown.max() > 0))


if __name__ == "__main__":
    app.run(main)
