"""Times inference over batch sizes: the predictor, and the exported SavedModel.

    python benchmarks/infer.py [--network=vgg16] [--timesteps=5] [--batch_sizes=1,8,64,256]

It takes `train.py`'s settings. Both ways get batches of ever other sizes, the largest last; a batch size
met for the first time must not cost a new trace.
"""

import pathlib
import tempfile

import tensorflow as tf
from absl import flags

import measure
import project
from measure import Call
from snn_tf import evaluation, export, runs

FLAGS = flags.FLAGS
PREDICTOR, EXPORTED = "predictor", "SavedModel"


def batch_sizes() -> list[int]:
    """What `--batch_sizes` says."""
    return [int(size) for size in FLAGS.batch_sizes]


def rows(ways: dict[str, Call]) -> list[list[object]]:
    """A row for each batch size and way: seconds of its first call, CPU and wall of the later ones."""
    images = tf.constant(project.noise(max(batch_sizes())).images)
    found = []
    for size in batch_sizes():
        batch = images[:size]
        calls = {name: lambda way=way, batch=batch: way(batch) for name, way in ways.items()}
        first = {name: measure.once(call).wall for name, call in calls.items()}
        for name, row in measure.take_turns(calls, FLAGS.seconds).items():
            found.append([size, name, first[name], 1e3 * row.cpu / size, row.wall, size / row.wall])
    return found


def program() -> None:
    started = measure.load()
    config = project.from_flags()
    model = project.snn(config)
    predict = evaluation.predictor(model)
    with tempfile.TemporaryDirectory() as folder:
        export.save(model, pathlib.Path(folder), project.CLASS_NAMES)
        serve = tf.saved_model.load(folder).signatures["serving_default"]
        ways = {
            PREDICTOR: lambda batch: predict(batch).numpy(),
            EXPORTED: lambda batch: serve(images=batch)["logits"].numpy(),
        }
        table = measure.table(
            ("batch", "way", "first call, s", "CPU ms an image", "wall s a call", "images/s"), rows(ways)
        )
    traces = predict.experimental_get_tracing_count()
    title = f"Inference, {config.network}, T = {config.timesteps}, {config.precision}, {config.lif}"
    note = f"Traces of the predictor: {traces}. The SavedModel's signature cannot be traced again."
    measure.record(title, runs.device(), started, table, note)


if __name__ == "__main__":
    project.define_settings(density=1.0)
    flags.DEFINE_list("batch_sizes", ["1", "4", "16", "64", "256"], "Images in a call.")
    flags.DEFINE_float("seconds", 5.0, "Seconds after which no further round begins.", lower_bound=0.0)
    project.main(program)
