"""Times the neuron's scan, forward and gradient, in each implementation.

    python benchmarks/lif_scan.py [--timesteps=8] [--neurons=1048576] [--precision=mixed_bfloat16]

Implementations take turns; figures are CPU and wall milliseconds of a call.
"""

import tensorflow as tf
import tf_keras as keras
from absl import flags

import measure
import project
from measure import Call
from snn_tf import native, runs
from snn_tf.layers import LIF

BATCH = 32
IMPLEMENTATIONS = ("native", "fused", "plain", "rnn")
FLAGS = flags.FLAGS


def define_flags() -> None:
    """The flags of the program; they stay out of the way of programs that import it."""
    flags.DEFINE_integer("timesteps", 8, "T.", lower_bound=1)
    flags.DEFINE_integer("neurons", 2**20, f"Neurons, a batch of {BATCH} included.", lower_bound=BATCH)
    flags.DEFINE_float("seconds", 20.0, "After which no further round begins.", lower_bound=0.0)
    flags.DEFINE_enum(
        "precision", "float32", ["float32", "mixed_bfloat16"], "Type of currents and spikes."
    )


def calls(current: tf.Tensor, upstream: tf.Tensor, implementation: str) -> dict[str, Call]:
    """Forward alone, and forward with gradient, of one implementation."""
    layer = LIF(FLAGS.timesteps, implementation)
    layer(current)

    def both():
        with tf.GradientTape() as tape:
            tape.watch(current)
            spikes = layer(current)
        return tape.gradient(spikes, [current, *layer.trainable_variables], upstream)

    return {
        f"{implementation}, forward": project.waiting(lambda: layer(current)),
        f"{implementation}, with gradient": project.waiting(both),
    }


def available() -> list[str]:
    """The implementations that this machine can run."""
    try:
        native.operations()
    except native.Unavailable as error:
        print(f"native: left out, {error}")
        return [name for name in IMPLEMENTATIONS if name != "native"]
    return list(IMPLEMENTATIONS)


def program() -> None:
    started = measure.load()
    dtype = keras.mixed_precision.Policy(FLAGS.precision).compute_dtype
    shape = [FLAGS.timesteps * BATCH, FLAGS.neurons // BATCH]
    current, upstream = (
        tf.cast(tf.random.stateless_normal(shape, (seed, 0)), dtype) for seed in range(2)
    )
    found: dict[str, Call] = {}
    for implementation in available():
        found |= calls(current, upstream, implementation)
    times = measure.take_turns(found, FLAGS.seconds)
    rows = [[name, 1e3 * row.cpu, 1e3 * row.wall] for name, row in times.items()]
    title = f"The neuron's scan, T = {FLAGS.timesteps}, {FLAGS.neurons} neurons, {FLAGS.precision}"
    table = measure.table(("implementation", "CPU ms", "wall ms"), rows)
    measure.record(title, runs.device(), started, table)


if __name__ == "__main__":
    define_flags()
    project.main(program)
