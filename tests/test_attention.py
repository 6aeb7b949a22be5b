"""Tests of `snn_tf.attention`: maps and losses by hand, and against NumPy."""

import numpy as np
import pytest
import tensorflow as tf

from snn_tf.attention import attention_loss, attention_map, distillation_loss


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def map_oracle(activation):
    """q̂ [B, H·W], float64, image by image and place by place."""
    images, height, width, channels = activation.shape
    result = np.zeros((images, height * width))
    for b, h, w in np.ndindex(images, height, width):
        result[b, h * width + w] = sum(float(a) ** 2 for a in activation[b, h, w]) / channels
    return result / np.maximum(np.sqrt((result**2).sum(axis=1, keepdims=True)), 1e-6)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_map_by_hand():
    activation = tf.constant([[[[4.0, -2.0], [1.0, 5.0], [2.0, 2.0]]]])  # q = 10, 13, 4
    expected = np.array([[10.0, 13.0, 4.0]]) / np.sqrt(285.0)
    np.testing.assert_allclose(attention_map(activation), expected, rtol=1e-6)


def test_map_equals_oracle():
    activation = normal(3, 4, 5, 6)
    ours = attention_map(tf.constant(activation))
    np.testing.assert_allclose(ours, map_oracle(activation), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-6)


def test_map_of_bfloat16_is_computed_in_float32():
    activation = tf.cast(normal(2, 3, 3, 4), tf.bfloat16)
    ours = attention_map(activation)
    assert ours.dtype == tf.float32
    np.testing.assert_allclose(ours, map_oracle(tf.cast(activation, tf.float32).numpy()), rtol=1e-5)


def test_map_does_not_depend_on_scale():
    activation = normal(2, 3, 3, 4)
    np.testing.assert_allclose(
        attention_map(tf.constant(100 * activation)), attention_map(tf.constant(activation)), rtol=1e-5
    )


def test_map_averages_over_active_channels_only():
    activation = normal(2, 3, 3, 4)
    active = tf.constant([1.0, 0.0, 1.0, 0.0])
    expected = map_oracle(activation[..., [0, 2]])
    np.testing.assert_allclose(attention_map(tf.constant(activation), active), expected, rtol=1e-5)
    activation[..., [1, 3]] *= 50.0
    np.testing.assert_allclose(attention_map(tf.constant(activation), active), expected, rtol=1e-5)


def test_map_averages_over_the_number_of_active_channels():
    # Below ε the norm is ε, so the size of q shows: q = (1e-4)² over one channel, 0 over the other.
    activation = tf.constant([[[[1e-4, 5.0]]]])
    np.testing.assert_allclose(attention_map(activation, tf.constant([1.0, 0.0])), [[0.01]], rtol=1e-5)
    silent = tf.constant([[[[1e-4, 0.0]]]])
    for active in (None, tf.ones(2)):
        np.testing.assert_allclose(attention_map(silent, active), [[0.005]], rtol=1e-5)


def test_map_of_all_channels_active_equals_map_without_mask():
    activation = tf.constant(normal(2, 3, 3, 4))
    ours = attention_map(activation, tf.ones(4))
    np.testing.assert_allclose(ours, attention_map(activation), rtol=1e-6)


@pytest.mark.parametrize("active", [None, [1.0, 0.0], [0.0, 0.0]])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-5, 1e-3])
def test_map_of_weak_activations_has_a_finite_gradient(size, active):
    activation = tf.fill([1, 2, 2, 2], size)
    with tf.GradientTape() as tape:
        tape.watch(activation)
        attention = attention_map(activation, None if active is None else tf.constant(active))
        loss = tf.reduce_sum(attention * [[1.0, 2.0, 3.0, 4.0]])
    assert np.isfinite(attention).all() and np.isfinite(tape.gradient(loss, activation)).all()
    if size == 0.0:
        assert not attention.numpy().any()


def test_map_of_a_silent_image_leaves_the_others_alone():
    activation = normal(2, 3, 3, 4)
    activation[0] = 0.0
    with tf.GradientTape() as tape:
        watched = tf.constant(activation)
        tape.watch(watched)
        attention = attention_map(watched)
        loss = tf.reduce_sum(attention[:, 0])
    gradient = tape.gradient(loss, watched)
    assert not attention[0].numpy().any() and not gradient[0].numpy().any()
    np.testing.assert_allclose(attention[1:], map_oracle(activation[1:]), rtol=1e-5)
    assert np.isfinite(gradient).all() and np.abs(gradient[1]).max() > 0.0


def test_map_gradient_equals_central_differences():
    activation = normal(1, 2, 2, 3).astype(np.float64)
    weights = normal(1, 4, seed=1)
    with tf.GradientTape() as tape:
        watched = tf.constant(activation, tf.float32)
        tape.watch(watched)
        loss = tf.reduce_sum(attention_map(watched) * weights)
    expected = np.zeros_like(activation)
    for index in np.ndindex(activation.shape):
        losses = []
        for step in (1e-6, -1e-6):
            moved = activation.copy()
            moved[index] += step
            losses.append((map_oracle(moved) * weights).sum())
        expected[index] = (losses[0] - losses[1]) / 2e-6
    np.testing.assert_allclose(tape.gradient(loss, watched), expected, atol=1e-5)


def test_attention_loss_by_hand():
    student = [tf.constant([[1.0, 0.0], [0.0, 1.0]]), tf.constant([[1.0], [0.5]])]
    teacher = [tf.constant([[0.0, 1.0], [0.0, 0.5]]), tf.constant([[0.0], [0.5]])]
    # First layer: (1 + 1 + 0 + 0.25) over 2 images of 2 places; second: 1 over 2 images of 1.
    np.testing.assert_allclose(attention_loss(student, teacher), 2.25 / 4 + 1.0 / 2, rtol=1e-6)


def test_attention_loss_of_equal_maps_is_zero():
    maps = [tf.constant(normal(2, 9)), tf.constant(normal(2, 4))]
    assert float(attention_loss(maps, maps)) == 0.0


def test_attention_loss_is_a_mean_over_positions():
    student, teacher = normal(3, 16), normal(3, 16, seed=1)
    once = attention_loss([tf.constant(student)], [tf.constant(teacher)])
    fourfold = [tf.constant(np.tile(maps, (1, 4))) for maps in (student, teacher)]
    np.testing.assert_allclose(attention_loss(*([maps] for maps in fourfold)), once, rtol=1e-6)


def test_attention_loss_refuses_different_numbers_of_layers():
    maps = tf.ones([1, 4])
    with pytest.raises(ValueError):
        attention_loss([maps, maps], [maps])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_equals_oracle(temperature):
    student, teacher = 3 * normal(5, 7), 3 * normal(5, 7, seed=1)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    divergence = np.mean(np.sum(p * np.log(p / q), axis=1))
    ours = distillation_loss(tf.constant(student), tf.constant(teacher), temperature)
    np.testing.assert_allclose(ours, temperature**2 * divergence, rtol=1e-5)


def test_distillation_gradient_equals_formula():
    student, teacher = 3 * normal(5, 7), 3 * normal(5, 7, seed=1)
    with tf.GradientTape() as tape:
        logits = tf.constant(student)
        tape.watch(logits)
        loss = distillation_loss(logits, tf.constant(teacher), 4.0)
    expected = 4.0 * (softmax(student / 4.0) - softmax(teacher / 4.0)) / 5
    np.testing.assert_allclose(tape.gradient(loss, logits), expected, atol=1e-6)


def test_distillation_of_equal_or_shifted_logits_is_zero():
    logits = tf.constant(normal(5, 7))
    assert float(distillation_loss(logits, logits, 4.0)) == 0.0
    np.testing.assert_allclose(distillation_loss(logits + 3.0, logits, 4.0), 0.0, atol=1e-5)


def test_distillation_of_certain_teacher_is_finite():
    student, teacher = tf.constant([[0.0, 1e4]]), tf.constant([[1e4, 0.0]])
    np.testing.assert_allclose(distillation_loss(student, teacher, 1.0), 1e4, rtol=1e-6)
