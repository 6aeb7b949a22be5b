"""What the layers of a network need beside their inputs, given around its call.

with dropout_seed(seed), spike_price(price):
    logits = model(images, training=True)
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Generic, TypeVar

import tensorflow as tf

T = TypeVar("T")


class Ambient(Generic[T]):
    """A value for the length of a block, with another before and after it.

    Args:
      name: what it is called.
      default: its value outside of any block.
    """

    def __init__(self, name: str, default: T):
        self._variable = contextvars.ContextVar(name, default=default)

    def get(self) -> T:
        """The value of the innermost block."""
        return self._variable.get()

    @contextlib.contextmanager
    def __call__(self, value: T) -> Iterator[None]:
        token = self._variable.set(value)
        try:
            yield
        finally:
            self._variable.reset(token)


dropout_seed = Ambient[tf.Tensor | None]("dropout_seed", None)
"""The seed of every `Dropout`: an integer tensor [2], such as (seed, step)."""

spike_price = Ambient[tf.Tensor | float]("spike_price", 0.0)
"""What a spike of any `LIF` costs in its gradient, a float32 scalar."""
