"""Every form of a convolution against TensorFlow's own, forward and both gradients."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from snn_tf import convolution
from snn_tf.convolution import CONVOLUTION, PATCHES, UNROLLED
from snn_tf.layers import Conv2D

FORMS = {
    CONVOLUTION: lambda x, kernel: tf.nn.conv2d(x, kernel, 1, "SAME"),
    UNROLLED: convolution.product_with_unrolled,
    PATCHES: convolution.with_patches_gradient,
}


def with_gradients(compute, x, kernel, upstream):
    """y, dL/dx and dL/dkernel in float32, where dL/dy = upstream."""
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        y = compute(x, kernel)
    return [value.numpy().astype(np.float32) for value in (y, *tape.gradient(y, [x, kernel], upstream))]


def some(*shape):
    """Whole numbers from -2 to 2: sums of their products are exact, in bfloat16 products too."""
    return np.random.default_rng(shape).integers(-2, 3, shape).astype(np.float32)


@pytest.mark.parametrize("form", [UNROLLED, PATCHES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("side, kernel", [((2, 2), (3, 3)), ((1, 2), (3, 3)), ((3, 2), (5, 3))])
def test_form_equals_the_convolution(form, dtype, side, kernel):
    x, y = some(2, *side, 3), some(2, *side, 4)
    arguments = [tf.cast(value, dtype) for value in (x, some(*kernel, 3, 4), y)]
    expected = with_gradients(FORMS[CONVOLUTION], *map(tf.constant, (x, some(*kernel, 3, 4), y)))
    for found, value in zip(with_gradients(FORMS[form], *arguments), expected, strict=True):
        np.testing.assert_array_equal(found, value)
        assert value.any()


@pytest.mark.parametrize("side", [3, 8])
def test_patches_gradient_equals_the_convolutions_on_larger_maps(side):
    arguments = [
        tf.constant(v) for v in (some(2, side, side, 3), some(3, 3, 3, 4), some(2, side, side, 4))
    ]
    expected = with_gradients(FORMS[CONVOLUTION], *arguments)
    for found, value in zip(with_gradients(FORMS[PATCHES], *arguments), expected, strict=True):
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
    "side, kernel, dtype, expected",
    [
        (32, 3, tf.bfloat16, CONVOLUTION),
        (8, 3, tf.bfloat16, PATCHES),
        (8, 3, tf.float32, CONVOLUTION),
        (2, 3, tf.float32, UNROLLED),
        (2, 3, tf.bfloat16, UNROLLED),
        (1, 3, tf.float32, UNROLLED),
        (3, 3, tf.float32, CONVOLUTION),
        (3, 5, tf.float32, UNROLLED),
        (2, 1, tf.bfloat16, CONVOLUTION),
        (2, 2, tf.bfloat16, CONVOLUTION),
        (None, 3, tf.bfloat16, CONVOLUTION),
    ],
)
def test_form_by_map_kernel_and_type(side, kernel, dtype, expected):
    assert convolution.form((side, side), (kernel, kernel), dtype) == expected


@pytest.mark.parametrize("side", [3, 4, 9])
@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": 1, "padding": "same"},
        {"strides": 2, "padding": "same"},
        {"strides": 1, "padding": "valid"},
        {"strides": 1, "padding": "same", "dilation_rate": 2},
    ],
)
def test_layer_equals_keras(arguments, side):
    ours, keras_own = (cls(4, 3, use_bias=True, **arguments) for cls in (Conv2D, keras.layers.Conv2D))
    x = tf.constant(some(2, side, side, 3))
    for layer in (ours, keras_own):
        layer.build(x.shape)
        layer.set_weights([some(3, 3, 3, 4), some(4)])
    np.testing.assert_array_equal(ours(x).numpy(), keras_own(x).numpy())
