"""Times a convolution and its gradients in every form: what the table in `snn_tf.convolution` rests on.

    python benchmarks/convolution.py [--batch=80] [--width=1.0]

The maps are those of VGG16 on images of 32×32, kernels 3×3, in float32 and in bfloat16. A form that
`snn_tf.convolution.form` chooses is marked by a star. Figures are CPU milliseconds of a call.
"""

import itertools
from collections.abc import Callable

import tensorflow as tf
from absl import app, flags

import measure
import project
from snn_tf import convolution, runs

FLAGS = flags.FLAGS
flags.DEFINE_integer("batch", 80, "Maps in a call: batch size times T.", lower_bound=1)
flags.DEFINE_float("width", 1.0, "Multiplies the channels.", lower_bound=0.0)
# Side of the map, channels in and out.
MAPS = ((32, 64, 64), (16, 128, 128), (8, 256, 256), (4, 512, 512), (2, 512, 512))
PARTS = ("forward", "input gradient", "kernel gradient")

Function = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def forms(side: int) -> dict[str, Function]:
    """The forms that a map of this side allows, by their name in `snn_tf.convolution`."""
    found: dict[str, Function] = {
        convolution.CONVOLUTION: lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"),
        convolution.PATCHES: by_patches,
    }
    if convolution.form((side, side), (3, 3), tf.float32) == convolution.UNROLLED:
        found[convolution.UNROLLED] = convolution.product_with_unrolled
    return found


def by_patches(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The convolution as one product of the input's patches, in all three parts."""

    @tf.custom_gradient
    def convolve(x, kernel):
        def gradient(d_y):
            turned = tf.transpose(kernel[::-1, ::-1], [0, 1, 3, 2])
            rows = tf.reshape(d_y, [-1, kernel.shape[-1]])
            d_kernel = tf.matmul(convolution.patches(x, 3, 3), rows, transpose_a=True)
            return product(d_y, turned), tf.reshape(d_kernel, kernel.shape)

        return product(x, kernel), gradient

    def product(x, kernel):
        columns = kernel.shape[-1]
        y = convolution.patches(x, 3, 3) @ tf.reshape(kernel, [-1, columns])
        return tf.reshape(y, [-1, *x.shape[1:3], columns])

    return convolve(x, kernel)


def calls(form: Function, x: tf.Tensor, kernel: tf.Tensor, d_y: tf.Tensor) -> dict[str, measure.Call]:
    """Calls that compute one part each; what a part does not need is pruned from its graph."""

    def gradient(index):
        def compute():
            with tf.GradientTape() as tape:
                tape.watch([x, kernel])
                y = form(x, kernel)
            return tape.gradient(y, [x, kernel], d_y)[index]

        return compute

    parts = (lambda: form(x, kernel), gradient(0), gradient(1))
    return {name: project.waiting(part) for name, part in zip(PARTS, parts, strict=True)}


def rows(dtype: tf.DType) -> list[list[object]]:
    """A row for each map and form: CPU milliseconds of its parts."""
    table = []
    for side, inputs, outputs in MAPS:
        inputs, outputs = (max(8, round(FLAGS.width * channels)) for channels in (inputs, outputs))
        shapes = ((FLAGS.batch, side, side, inputs), (3, 3, inputs, outputs))
        x, kernel, d_y = (
            tf.cast(tf.random.stateless_normal(shape, (1, 2)), dtype)
            for shape in (*shapes, (FLAGS.batch, side, side, outputs))
        )
        found = {name: calls(form, x, kernel, d_y) for name, form in forms(side).items()}
        named = {(form, part): found[form][part] for form, part in itertools.product(found, PARTS)}
        times = measure.take_turns(named, budget=4.0)
        chosen = convolution.form((side, side), (3, 3), dtype)
        for form in found:
            size = f"{side}×{side}, {inputs} → {outputs}"
            star = "*" if form == chosen else ""
            table.append(
                [dtype.name, size, form + star, *(1e3 * times[form, part].cpu for part in PARTS)]
            )
    return table


def main(argv: list[str]) -> None:
    del argv
    measure.limit_threads(2)
    started = measure.load()
    header = ("type", "map and channels", "form", *(f"{part}, ms" for part in PARTS))
    table = measure.table(header, [*rows(tf.float32), *rows(tf.bfloat16)])
    title = f"Forms of a convolution, {FLAGS.batch} maps"
    measure.record(title, runs.device(), started, table)


if __name__ == "__main__":
    app.run(main)
