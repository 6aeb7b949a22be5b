"""Tests of `snn_tf.surrogate`: values worked out by hand, and derivatives of known functions."""

import numpy as np
import pytest
import tensorflow as tf
from neuron_oracle import KINDS, antiderivative, surrogate

from snn_tf.surrogate import Surrogate

HALF_WIDTH = 1 / np.pi
BY_HAND = {
    "triangle": [(-2.0, 0.0), (-1.0, 0.0), (-0.5, 0.15), (0.0, 0.3), (0.25, 0.225), (1.0, 0.0)],
    "rectangular": [(-0.75, 0.0), (-0.5, 0.0), (-0.25, 0.3), (0.0, 0.3), (0.49, 0.3), (0.5, 0.0)],
    "sigmoid": [(0.0, 0.3), (-0.25, 0.235934), (0.25, 0.235934), (0.5, 0.125992), (2.0, 0.000402)],
    "arctan": [(0.0, 0.3), (HALF_WIDTH, 0.15), (-HALF_WIDTH, 0.15), (2 * HALF_WIDTH, 0.06)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_at_points_by_hand(kind):
    z, expected = map(np.float32, zip(*BY_HAND[kind], strict=True))
    np.testing.assert_allclose(Surrogate(kind, 0.3).derivative(tf.constant(z)), expected, atol=5e-7)


@pytest.mark.parametrize("scale", [0.3, 1.7])
@pytest.mark.parametrize("kind", KINDS)
def test_derivative_equals_oracle(kind, scale):
    z = np.random.default_rng(0).normal(size=(40, 5, 2))
    ours = Surrogate(kind, scale).derivative(tf.constant(z))
    np.testing.assert_allclose(ours, surrogate(kind, z, scale), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_is_slope_of_antiderivative(kind):
    z = np.linspace(-2.0, 2.0, 401) + 0.0037  # no kink within a step of 1e-6
    above, below = (antiderivative(kind, z + step, 0.3) for step in (1e-6, -1e-6))
    ours = Surrogate(kind, 0.3).derivative(tf.constant(z))
    np.testing.assert_allclose(ours, (above - below) / 2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivative_keeps_type_and_shape(kind, dtype):
    derivative = Surrogate(kind).derivative(tf.zeros([2, 3, 1], dtype))
    assert derivative.dtype == dtype and derivative.shape == (2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_far_from_threshold_is_finite_and_small(kind):
    derivative = Surrogate(kind).derivative(tf.constant([-1e6, -1e3, 1e3, 1e6])).numpy()
    assert (derivative >= 0.0).all() and (derivative < 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_derivative_compiled_equals_eager(kind):
    z = tf.constant(np.linspace(-2.0, 2.0, 97), tf.float32)
    derivative = Surrogate(kind).derivative
    for compiled in (tf.function(derivative), tf.function(derivative, jit_compile=True)):
        np.testing.assert_allclose(compiled(z), derivative(z), rtol=1e-5, atol=1e-7)


def test_default_is_triangle_of_height_three_tenths():
    assert Surrogate() == Surrogate("triangle", 0.3)
