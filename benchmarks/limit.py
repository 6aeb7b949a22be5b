"""The limit of a workload: its convolutions and products alone, without neurons, pools, loss, optimizer.

    python benchmarks/limit.py [--workload=W1] [--precision=bfloat16]

Every convolution is timed in two forms, TensorFlow's own and a product over patches, and the faster one
counts; so for its two gradients. The first convolution and the product that gives the logits run once a
step, the others at each of the T time steps. Beside it stands the machine's peak: the best rate of a
single product. Figures are CPU and wall seconds of a step.
"""

import dataclasses
import json
from collections.abc import Iterator

import tensorflow as tf
from absl import app, flags

import measure
import project
from measure import Call, Seconds
from snn_tf import convolution, runs
from workloads import WORKLOADS, Layer, Workload

FLAGS = flags.FLAGS
PHASES = ("infer", "train")
SPIKE_RATE = 0.2
_SIDES = (1024, 2048, 4096)

Forms = tuple[Call, ...]


def define_flags() -> None:
    """The flags of the program; they stay out of the way of programs that import it."""
    flags.DEFINE_multi_enum("workload", list(WORKLOADS), list(WORKLOADS), "Workloads.")
    flags.DEFINE_multi_enum("precision", ["float32", "bfloat16"], ["float32", "bfloat16"], "Types.")
    flags.DEFINE_boolean("json", False, "Print the last result as JSON, and record nothing.")


def limit(workload: Workload, dtype: tf.DType) -> dict[str, Seconds]:
    """Seconds of inference and of a training step, by phase."""
    total = {phase: Seconds(0.0, 0.0) for phase in PHASES}
    for part, forms in parts(workload, dtype):
        named = {str(number): project.waiting(form) for number, form in enumerate(forms)}
        best = min(measure.take_turns(named, budget=0.5).values(), key=lambda seconds: seconds.cpu)
        for phase in PHASES if part == "forward" else ("train",):
            total[phase] = Seconds(total[phase].cpu + best.cpu, total[phase].wall + best.wall)
    return total


def parts(workload: Workload, dtype: tf.DType) -> Iterator[tuple[str, Forms]]:
    """Every part of every layer, in each of its forms."""
    layers = list(workload.layers())
    for layer in layers:
        once = layer in (layers[0], layers[-1])
        count = workload.batch * (1 if once else workload.timesteps)
        shapes = _shapes(layer, count)
        spikes = tf.cast(tf.random.stateless_uniform(shapes[0], (0, 0)) < SPIKE_RATE, dtype)
        kernel, d_y = (tf.cast(tf.random.stateless_normal(shape, (1, 2)), dtype) for shape in shapes[1:])
        forms = convolution_forms if layer.kernel > 1 else product_forms
        for part, ways in forms(spikes, kernel, d_y).items():
            if layer is not layers[0] or part != "input gradient":
                yield part, ways


def _shapes(layer: Layer, count: int) -> tuple[list[int], list[int], list[int]]:
    """Of input, kernel and output."""
    around = [layer.side, layer.side] if layer.kernel > 1 else []
    window = [layer.kernel, layer.kernel] if layer.kernel > 1 else []
    ends = layer.inputs, layer.outputs
    return [count, *around, ends[0]], [*window, *ends], [count, *around, ends[1]]


def convolution_forms(x: tf.Tensor, kernel: tf.Tensor, d_y: tf.Tensor) -> dict[str, Forms]:
    """TensorFlow's own, and a product over patches, of a convolution and its gradients."""
    inputs, outputs = kernel.shape[2:]
    same = {"strides": [1] * 4, "padding": "SAME"}
    size, window = x.shape.as_list(), kernel.shape.as_list()

    def product(x: tf.Tensor, columns: int) -> tf.Tensor:
        return convolution.patches(x, 3, 3) @ tf.reshape(kernel, [-1, columns])

    return {
        "forward": (lambda: tf.nn.conv2d(x, kernel, 1, "SAME"), lambda: product(x, outputs)),
        "kernel gradient": (
            lambda: tf.raw_ops.Conv2DBackpropFilter(
                input=x, filter_sizes=window, out_backprop=d_y, **same
            ),
            lambda: tf.matmul(
                convolution.patches(x, 3, 3), tf.reshape(d_y, [-1, outputs]), transpose_a=True
            ),
        ),
        "input gradient": (
            lambda: tf.raw_ops.Conv2DBackpropInput(
                input_sizes=size, filter=kernel, out_backprop=d_y, **same
            ),
            lambda: product(d_y, inputs),
        ),
    }


def product_forms(x: tf.Tensor, kernel: tf.Tensor, d_y: tf.Tensor) -> dict[str, Forms]:
    """A product and its gradients, which have one form each."""
    return {
        "forward": (lambda: x @ kernel,),
        "kernel gradient": (lambda: tf.matmul(x, d_y, transpose_a=True),),
        "input gradient": (lambda: tf.matmul(d_y, kernel, transpose_b=True),),
    }


def peak_gflops(dtype: tf.DType) -> float:
    """The machine's peak: the best rate of a single product of square matrices, in GFLOP/s."""
    rates = []
    for side in _SIDES:
        x = tf.cast(tf.random.stateless_normal([side, side], (1, 2)), dtype)
        call = project.waiting(lambda x=x: x @ x)
        rates.append(2e-9 * side**3 / measure.take_turns({"product": call}, budget=1.0)["product"].wall)
    return max(rates)


def main(argv: list[str]) -> None:
    del argv
    measure.limit_threads(2)
    started = measure.load()
    rows, found = [], {}
    for name in FLAGS.workload:
        for precision in FLAGS.precision:
            seconds = limit(WORKLOADS[name], tf.dtypes.as_dtype(precision))
            peak = peak_gflops(tf.dtypes.as_dtype(precision))
            found = {phase: dataclasses.asdict(row) for phase, row in seconds.items()}
            found |= {"peak_gflops": peak, "device": runs.device()}
            figures = (figure for phase in PHASES for figure in dataclasses.astuple(seconds[phase]))
            rows.append([name, precision, *figures, peak])
    if FLAGS.json:
        print(json.dumps(found))
        return
    header = (
        "workload",
        "type",
        *(f"{phase}, {unit} s" for phase in PHASES for unit in ("CPU", "wall")),
    )
    table = measure.table((*header, "peak, GFLOP/s"), rows)
    measure.record("The limit: convolutions and products alone", runs.device(), started, table)


if __name__ == "__main__":
    define_flags()
    app.run(main)
