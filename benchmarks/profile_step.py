"""Where the time of this project's training step goes, by TensorFlow operation.

    python benchmarks/profile_step.py [--workload=W2] [--precision=auto]

Times are those of TensorFlow's profiler, in which operations run one after the other; an operation's
threads count once. Products in place of convolutions count as products.
"""

import collections
import pathlib
import tempfile

import tensorflow as tf
from absl import flags
from tensorflow.tsl.profiler.protobuf import xplane_pb2

import measure
import project
from snn_tf import runs
from workloads import WORKLOADS

FLAGS = flags.FLAGS
KINDS = {
    "convolutions and products": ("Conv2D", "MatMul"),
    "neurons": ("Lif",),
    "optimizer": ("ResourceApply", "L2Loss"),
}


def milliseconds(call: measure.Call, count: int) -> collections.Counter:
    """Mean time of each operation in a call, by its type; functions, which hold others, are left out."""
    for _ in range(2):
        call()
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            for _ in range(count):
                call()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    found: collections.Counter = collections.Counter()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
            if name and not name.endswith(":") and not kind.lstrip().startswith("__inference"):
                found[kind] += event.duration_ps / 1e9 / count
    return found


def kind_of(operation: str) -> str:
    """The heading under which an operation stands."""
    matches = (kind for kind, words in KINDS.items() if any(word in operation for word in words))
    return next(matches, "other")


def program() -> None:
    started = measure.load()
    workload = WORKLOADS[FLAGS.workload]
    config = project.settings(
        timesteps=workload.timesteps, batch_size=workload.batch, precision=FLAGS.precision
    )
    update = project.update(config, project.network(workload, config))
    found = milliseconds(project.step(update, *project.examples(workload)), FLAGS.steps)
    whole = found.total()
    together: collections.Counter = collections.Counter()
    for operation, spent in found.items():
        together[kind_of(operation)] += spent
    headings = [[kind, spent, f"{spent / whole:.1%}"] for kind, spent in together.most_common()]
    rows = [
        [operation, kind_of(operation), spent, f"{spent / whole:.1%}"]
        for operation, spent in found.most_common(FLAGS.operations)
    ]
    measure.record(
        f"Profile of a training step, {FLAGS.workload}, {config.precision}, {config.lif}",
        runs.device(),
        started,
        measure.table(("kind", "ms", "share"), headings),
        measure.table(("operation", "kind", "ms", "share"), rows),
    )


if __name__ == "__main__":
    flags.DEFINE_enum("workload", "W2", list(WORKLOADS), "Workload.")
    flags.DEFINE_enum("precision", "auto", ["auto", "float32", "mixed_bfloat16"], "As for train.py.")
    flags.DEFINE_integer("steps", 5, "Steps in the trace.", lower_bound=1)
    flags.DEFINE_integer("operations", 15, "Operations in the table.", lower_bound=1)
    project.main(program)
