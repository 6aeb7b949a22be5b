"""Times the neuron's scan, forward and gradient, in each implementation.

    python benchmarks/lif_scan.py [--timesteps=8] [--neurons=1048576] [--precision=mixed_bfloat16]

Implementations take turns; figures are medians of CPU and wall milliseconds a call, after a warm-up.
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
import tf_keras as keras
from absl import app, flags

from snn_tf import native, runs
from snn_tf.layers import LIF

BATCH = 32
FLAGS = flags.FLAGS
flags.DEFINE_integer("timesteps", 8, "T.", lower_bound=1)
flags.DEFINE_integer("neurons", 2**20, f"Neurons, a batch of {BATCH} included.", lower_bound=BATCH)
flags.DEFINE_integer("rounds", 15, "Timed calls of each implementation.", lower_bound=1)
flags.DEFINE_enum("precision", "float32", ["float32", "mixed_bfloat16"], "Type of currents and spikes.")

Call = Callable[[], object]


def calls(
    current: tf.Tensor, upstream: tf.Tensor, implementation: str, compiled: bool
) -> dict[str, Call]:
    """Forward alone, and forward with gradient, of one implementation."""
    layer = LIF(FLAGS.timesteps, implementation)
    layer(current)

    def forward():
        return layer(current)

    def both():
        with tf.GradientTape() as tape:
            tape.watch(current)
            spikes = layer(current)
        return tape.gradient(spikes, [current, *layer.trainable_variables], upstream)

    return {
        name: tf.function(function, jit_compile=compiled)
        for name, function in {"forward": forward, "with gradient": both}.items()
    }


def measure(calls_by_name: dict[str, Call]) -> dict[str, tuple[float, float]]:
    """Median CPU and wall milliseconds of every call, the calls taking turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls_by_name}
    for number in range(FLAGS.rounds + 2):
        for name, call in calls_by_name.items():
            cpu, wall = time.process_time(), time.perf_counter()
            tf.nest.map_structure(lambda x: x[..., :1].numpy() if x.shape.rank else x.numpy(), call())
            if number >= 2:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: tuple(1e3 * statistics.median(column) for column in zip(*rows, strict=True))
        for name, rows in times.items()
    }


def main(argv: list[str]) -> None:
    del argv
    dtype = keras.mixed_precision.Policy(FLAGS.precision).compute_dtype
    shape = [FLAGS.timesteps * BATCH, FLAGS.neurons // BATCH]
    current, upstream = (tf.cast(tf.random.normal(shape), dtype) for _ in range(2))
    ways = {"fused": ("fused", False), "fused, XLA": ("fused", True), "rnn": ("rnn", False)}
    try:
        native.operations()
        ways = {"native": ("native", False), **ways}
    except native.Unavailable as error:
        print(f"native: left out, {error}")
    found = {
        f"{label:12}{phase}": call
        for label, way in ways.items()
        for phase, call in calls(current, upstream, *way).items()
    }
    print(f"{runs.device()}, TensorFlow {tf.__version__}, load {os.getloadavg()[0]:.1f}")
    print(f"T = {FLAGS.timesteps}, {FLAGS.neurons} neurons, {FLAGS.precision}")
    for name, (cpu, wall) in measure(found).items():
        print(f"  {name:28}{cpu:9.2f} ms CPU{wall:9.2f} ms wall")


if __name__ == "__main__":
    app.run(main)
