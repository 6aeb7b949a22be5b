"""Convolutions in the cheapest of the forms that give the same result, by a fixed table.

    convolution  TensorFlow's own
    unrolled     one product of whole maps, [B, H·W·C_in] × [H·W·C_in, H·W·C_out], for maps so small that
                 every output position sees every input position; taps that meet padding cost nothing
    patches      for the kernel's gradient: one product of the input's patches and the output's
                 gradient, [B·H·W, k·k·C_in]ᵀ × [B·H·W, C_out]

On CPUs the library's convolutions fall far behind its products on small maps, bfloat16 kernel
gradients above all. The table, `form`, holds what `benchmarks/convolution.py` measured; nothing is
tried out at run time, so that a run repeats bit for bit. GPUs always take TensorFlow's own.
"""

import tensorflow as tf

from snn_tf.machine import has_gpu

CONVOLUTION, UNROLLED, PATCHES = "convolution", "unrolled", "patches"
_MOST_POSITIONS_FOR_PATCHES = 8 * 8


def convolve(x: tf.Tensor, kernel: tf.Tensor, strides: tuple[int, int], padding: str) -> tf.Tensor:
    """The convolution of x, [B, H, W, C_in], with a kernel, [k, k, C_in, C_out], differentiable once.

    Args:
      x, kernel: of one type; H, W and the kernel's shape are known.
      strides: vertical and horizontal.
      padding: "same" or "valid".

    Returns:
      [B, H', W', C_out], in the type of x.
    """
    plain = tuple(strides) == (1, 1) and padding == "same"
    chosen = form(x.shape[1:3], kernel.shape[:2], x.dtype) if plain and not has_gpu() else CONVOLUTION
    if chosen == UNROLLED:
        return product_with_unrolled(x, kernel)
    if chosen == PATCHES:
        return with_patches_gradient(x, kernel)
    return tf.nn.conv2d(x, kernel, strides, padding.upper())


def form(map_shape: tf.TensorShape, kernel_shape: tf.TensorShape, dtype: tf.DType) -> str:
    """The form that a convolution of stride 1 and "same" padding takes on a CPU.

    Args:
      map_shape: H, W; unknown sizes take TensorFlow's own.
      kernel_shape: sides of the kernel.
      dtype: of both.
    """
    sides = list(zip(map_shape, kernel_shape, strict=True))
    if None in map_shape or any(kernel % 2 == 0 or kernel == 1 for _, kernel in sides):
        return CONVOLUTION
    if all(side <= (kernel + 1) // 2 for side, kernel in sides):
        return UNROLLED
    small = map_shape[0] * map_shape[1] <= _MOST_POSITIONS_FOR_PATCHES
    return PATCHES if small and dtype == tf.bfloat16 else CONVOLUTION


def product_with_unrolled(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A "same" convolution of stride 1 as one product; for the sizes of `unrolled`."""
    _, height, width, channels = x.shape
    y = tf.reshape(x, [-1, height * width * channels]) @ unrolled(kernel, height, width)
    return tf.reshape(y, [-1, height, width, kernel.shape[-1]])


def unrolled(kernel: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """The matrix [H·W·C_in, H·W·C_out] of a "same" convolution of stride 1 on whole H × W maps.

    H ≤ (k + 1) / 2, and W likewise: position p reaches position q by the tap ⌊k/2⌋ + p − q.
    """
    rows, columns, *channels = kernel.shape
    taps = tf.unstack(tf.reshape(kernel, [rows * columns, *channels]))
    positions = [(y, x) for y in range(height) for x in range(width)]

    def tap(p: tuple[int, int], q: tuple[int, int]) -> tf.Tensor:
        return taps[(rows // 2 + p[0] - q[0]) * columns + columns // 2 + p[1] - q[1]]

    return tf.concat([tf.concat([tap(p, q) for q in positions], 1) for p in positions], 0)


@tf.custom_gradient
def with_patches_gradient(x: tf.Tensor, kernel: tf.Tensor):
    """A "same" convolution of stride 1 whose kernel gradient is a product with the input's patches."""

    def gradient(d_y):
        d_x = tf.raw_ops.Conv2DBackpropInput(
            input_sizes=tf.shape(x), filter=kernel, out_backprop=d_y, strides=[1] * 4, padding="SAME"
        )
        rows = tf.reshape(d_y, [-1, kernel.shape[-1]])
        d_kernel = tf.matmul(patches(x, *kernel.shape[:2]), rows, transpose_a=True)
        return tf.ensure_shape(d_x, x.shape), tf.reshape(d_kernel, kernel.shape)

    return tf.nn.conv2d(x, kernel, 1, "SAME"), gradient


def patches(x: tf.Tensor, rows: int, columns: int) -> tf.Tensor:
    """What each tap of a rows × columns kernel reads: [B, H, W, C] → [B·H·W, rows·columns·C].

    Rows and columns are odd; outside the map, zeros are read.
    """
    _, height, width, channels = x.shape
    around = [[0, 0], [rows // 2] * 2, [columns // 2] * 2, [0, 0]]
    padded = tf.pad(x, around)
    read = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return tf.reshape(tf.concat(read, -1), [-1, rows * columns * channels])
