"""Times the start: seconds to the end of the first training step, beside TensorFlow's import alone.

    python benchmarks/startup.py [--data_dir=DIR] [--rounds=3]

It runs `train.py` on scikit-learn's digits or, with `--data_dir`, on CIFAR-10 from that folder; when its
first step ended is read from TensorBoard's events. The first round fills the disk's cache and does not
count. Figures are wall seconds.
"""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from absl import app, flags
from tensorflow.core.util import event_pb2
from tensorflow.data import TFRecordDataset

import measure
from snn_tf import runs
from snn_tf.config import TRAIN_ANN

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of prepared TFDS data sets; without it, digits.")
flags.DEFINE_integer("rounds", 3, "Starts that count.", lower_bound=1)
_ROOT = pathlib.Path(__file__).parents[1]
_NETWORK = ("--network=vgg5", "--width=0.125", "--ann_epochs=1", "--log_every=1")


def seconds_of_import() -> float:
    """Of a process that imports TensorFlow and nothing else."""
    command = [sys.executable, "-c", "import tensorflow"]
    return measure.once(lambda: subprocess.run(command, check=True, capture_output=True)).wall


def seconds_to_first_step() -> float:
    """From the start of `train.py` to the end of its first training step, as its events say."""
    data = (
        ["--dataset=cifar10", f"--data_dir={FLAGS.data_dir}"] if FLAGS.data_dir else ["--dataset=digits"]
    )
    with tempfile.TemporaryDirectory() as run_dir:
        words = [f"--run_dir={run_dir}", f"--stage={TRAIN_ANN}", *_NETWORK, *data]
        began = time.time()
        subprocess.run([sys.executable, "train.py", *words], check=True, capture_output=True, cwd=_ROOT)
        files = pathlib.Path(run_dir, "tensorboard", TRAIN_ANN).glob("events*")
        events = (
            event_pb2.Event.FromString(record)
            for path in files
            for record in TFRecordDataset(str(path)).as_numpy_iterator()
        )
        return min(event.wall_time for event in events if event.step == 1) - began


def main(argv: list[str]) -> None:
    del argv
    started = measure.load()
    found = [(seconds_of_import(), seconds_to_first_step()) for _ in range(FLAGS.rounds + 1)][1:]
    imported, first_step = (statistics.median(column) for column in zip(*found, strict=True))
    rows = [["import tensorflow", imported], ["first training step of train.py", first_step]]
    title = f"Start, {'CIFAR-10' if FLAGS.data_dir else 'digits'}"
    measure.record(title, runs.device(), started, measure.table(("", "wall s"), rows))


if __name__ == "__main__":
    app.run(main)
