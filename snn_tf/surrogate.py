"""Surrogate derivatives of the spike function, in the normalised potential z = u / v_th − 1.

A spike o = [z > 0] has no useful derivative; training uses one of these in its place, each with
height γ at the threshold:

    triangle     γ · max(0, 1 − |z|)          (Bellec et al. 2018; DIET-SNN, Rathi & Roy 2020)
    rectangular  γ · [|z| < ½]                (Wu et al. 2018)
    sigmoid      4γ · σ(4z) · (1 − σ(4z))     (Zenke & Ganguli 2018's family)
    arctan       γ / (1 + (πz)²)              (Fang et al. 2021)
"""

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf


def _sigmoid(z: tf.Tensor) -> tf.Tensor:
    s = tf.sigmoid(4.0 * z)
    return 4.0 * s * (1.0 - s)


_UNIT_HEIGHT: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "triangle": lambda z: tf.maximum(1.0 - tf.abs(z), 0.0),
    "rectangular": lambda z: tf.cast(tf.abs(z) < 0.5, z.dtype),
    "sigmoid": _sigmoid,
    "arctan": lambda z: 1.0 / (1.0 + tf.square(math.pi * z)),
}


KINDS = tuple(_UNIT_HEIGHT)


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """A surrogate by its kind and its height γ > 0."""

    kind: str = "triangle"
    scale: float = 0.3

    def derivative(self, z: tf.Tensor) -> tf.Tensor:
        """do/dz at the normalised potential `z`, any shape, same dtype."""
        return self.scale * _UNIT_HEIGHT[self.kind](z)
