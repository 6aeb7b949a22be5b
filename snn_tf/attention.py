"""Attention maps of activations, and the losses that let a student follow a teacher.

Axes: activations are [B, H, W, C], logits [B, classes]. All arithmetic is float32.
"""

from collections.abc import Sequence

import tensorflow as tf

_EPSILON = 1e-6


def attention_map(activation: tf.Tensor, active: tf.Tensor | None = None) -> tf.Tensor:
    """Where a layer looks: q̂, the unit-length map of mean squared activation.

        q = vec( mean_c |A[:, :, c]|² ),    q̂ = q · rsqrt(max(Σ q², ε²))

    (Zagoruyko & Komodakis 2017.) The gradient is finite at q = 0, where q̂ is 0.

    Args:
      activation: A, [B, H, W, C].
      active: [C], 1 for the channels that count and 0 for the others; None counts all.

    Returns:
      q̂, [B, H·W], float32.
    """
    squared = tf.square(tf.cast(activation, tf.float32))
    if active is None:
        q = tf.reduce_mean(squared, axis=-1)
    else:
        weights = tf.cast(active, tf.float32)
        q = tf.linalg.matvec(squared, weights / tf.maximum(tf.reduce_sum(weights), 1.0))
    q = tf.reshape(q, [tf.shape(q)[0], q.shape[1] * q.shape[2]])
    norm = tf.reduce_sum(tf.square(q), axis=1, keepdims=True)
    return q * tf.math.rsqrt(tf.maximum(norm, _EPSILON**2))


def attention_loss(student: Sequence[tf.Tensor], teacher: Sequence[tf.Tensor]) -> tf.Tensor:
    """L_AT = Σ_j mean over batch and positions of (q̂_j^student − q̂_j^teacher)².

    Args:
      student, teacher: maps q̂_j, [B, H_j·W_j], layer by layer.

    Returns:
      Scalar.
    """
    pairs = zip(student, teacher, strict=True)
    return tf.add_n([tf.reduce_mean(tf.math.squared_difference(s, t)) for s, t in pairs])


def distillation_loss(student: tf.Tensor, teacher: tf.Tensor, temperature: float) -> tf.Tensor:
    """L_KD = ρ² · KL( softmax(z^teacher / ρ) ‖ softmax(z^student / ρ) ), batch mean.

    (Hinton et al. 2015.) `student`, `teacher`: logits z, [B, classes]. Returns a scalar.
    """
    log_p = tf.nn.log_softmax(teacher / temperature)
    log_q = tf.nn.log_softmax(student / temperature)
    divergence = tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)
    return temperature**2 * tf.reduce_mean(divergence)
