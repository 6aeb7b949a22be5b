"""Keras layers of the networks: convolution, neuron, read-out, and dropout that has no state.

Axes: outside `LIF`, time is folded into the batch, [T·B, ...], time-major, so that convolutions,
pools and products are Keras's own 4-D and 2-D layers. An ANN has T = 1. These layers keep the type of
their input, but for `ReadOut`, which gives float32; parameters and membranes are float32.
"""

import zlib

import tensorflow as tf
import tf_keras as keras

from snn_tf.ambient import dropout_seed, spike_price
from snn_tf.convolution import convolve
from snn_tf.errors import check_choice
from snn_tf.neuron import lif_compiled, lif_native, lif_scan, lif_step, quantised_relu
from snn_tf.surrogate import Surrogate

LEAST = 1e-3
"""Smallest leak, v_th and clip that training can reach: all stay above 0."""
FIRST_CLIP = 3.0
"""Clip of a `QuantisedReLU` at first: what 99.9 % of standard normal inputs are below."""

_register = keras.saving.register_keras_serializable("snn_tf")


def unfold_time(x: tf.Tensor, timesteps: int) -> tf.Tensor:
    """[T·B, ...] → [T, B, ...]."""
    return tf.reshape(x, [timesteps, tf.shape(x)[0] // timesteps, *x.shape[1:]])


def fold_time(x: tf.Tensor) -> tf.Tensor:
    """[T, B, ...] → [T·B, ...]."""
    return tf.reshape(x, [-1, *x.shape[2:]])


@_register
class Conv2D(keras.layers.Conv2D):
    """Keras's layer, computed as `snn_tf.convolution` finds cheapest."""

    def convolution_op(self, inputs, kernel):
        whole = (self.dilation_rate, self.groups, self.data_format) == ((1, 1), 1, "channels_last")
        if not whole:
            return super().convolution_op(inputs, kernel)
        return convolve(inputs, tf.convert_to_tensor(kernel), self.strides, self.padding)

    def get_prunable_weights(self):
        """The weights that tfmot's wrapper masks."""
        return [self.kernel]


@_register
class QuantisedReLU(keras.layers.Layer):
    """`snn_tf.neuron.quantised_relu` with a trained clip λ, `FIRST_CLIP` at first.

    Args:
      levels: L ≥ 1.
    """

    def __init__(self, levels: int, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.levels = levels

    def build(self, input_shape):
        self.clip = self.add_weight(
            "clip",
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(FIRST_CLIP),
            constraint=lambda clip: tf.maximum(clip, LEAST),
        )
        super().build(input_shape)

    def call(self, inputs):
        return quantised_relu(inputs, tf.convert_to_tensor(self.clip, tf.float32), self.levels)

    def get_config(self):
        return {**super().get_config(), "levels": self.levels}


@_register
class LIFCell(keras.layers.Layer):
    """One time step of leaky integrate-and-fire neurons, as a Keras RNN cell.

    Its state is the membrane u after the reset. `leak` and `v_th` are trainable scalars, 1 at first.

    Args:
      surrogate: kind of surrogate, see `snn_tf.surrogate`.
      surrogate_scale: its height γ > 0.
      initial_membrane: u before the first step as a share of v_th, in [0, 1).
    """

    def __init__(
        self,
        surrogate: str = "triangle",
        surrogate_scale: float = 0.3,
        initial_membrane: float = 0.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.surrogate = Surrogate(surrogate, surrogate_scale)
        self.initial_membrane = initial_membrane

    def build(self, input_shape):
        self.state_size = tf.TensorShape(input_shape[1:])
        self.output_size = self.state_size
        self.leak = self._scalar("leak", lambda leak: tf.clip_by_value(leak, LEAST, 1.0))
        self.v_th = self._scalar("v_th", lambda v_th: tf.maximum(v_th, LEAST))
        super().build(input_shape)

    def _scalar(self, name, constraint):
        """A weight of 1 that the optimizer puts through `constraint` after every step."""
        one = keras.initializers.Ones()
        return self.add_weight(name, shape=(), dtype="float32", initializer=one, constraint=constraint)

    def call(self, inputs, states, training=None):
        """inputs: I[t], [B, ...]; states: [u[t−1]]. Returns o[t] and [u[t]]."""
        del training
        current = tf.cast(inputs, tf.float32)
        parameters = self.leak, self.v_th, self.surrogate, spike_price.get()
        spikes, membrane = lif_step(states[0], current, *parameters)
        return tf.cast(spikes, inputs.dtype), [membrane]

    def get_initial_state(self, inputs=None, batch_size=None, dtype=None):
        """A membrane of η · v_th, float32."""
        del inputs, dtype
        return tf.fill([batch_size, *self.state_size], self.initial_membrane * self.v_th)

    def get_config(self):
        return {
            **super().get_config(),
            "surrogate": self.surrogate.kind,
            "surrogate_scale": self.surrogate.scale,
            "initial_membrane": self.initial_membrane,
        }


_IMPLEMENTATIONS = ("native", "fused", "plain", "rnn")


@_register
class LIF(keras.layers.Layer):
    """Leaky integrate-and-fire neurons over T time steps: currents [T·B, ...] → spikes [T·B, ...].

    Args:
      timesteps: T ≥ 1.
      implementation: "native", the scan as one operation in C++, for CPUs; "fused", the scan in
        TensorFlow with its own gradient, compiled by XLA; "plain", the same, not compiled, for any batch
        size at once: exports; "rnn", `keras.layers.RNN` around `LIFCell`. All give the same spikes. It
        is how to compute, not what, so a saved layer does not carry it: see `use_implementation`.
      constant_input: the input is [B, ...], the current of every step: direct input coding.
      use_bias: add a trained bias current b per channel, 0 at first.
      surrogate, surrogate_scale, initial_membrane: as for `LIFCell`.

    Raises:
      ValueError: there is no such implementation.
    """

    def __init__(
        self,
        timesteps: int,
        implementation: str = "plain",
        constant_input: bool = False,
        use_bias: bool = False,
        surrogate: str = "triangle",
        surrogate_scale: float = 0.3,
        initial_membrane: float = 0.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        check_choice("implementation", implementation, _IMPLEMENTATIONS)
        self.timesteps = timesteps
        self.implementation = implementation
        self.constant_input = constant_input
        self.use_bias = use_bias
        self.cell = LIFCell(surrogate, surrogate_scale, initial_membrane)

    def build(self, input_shape):
        self.cell.build(input_shape)
        if self.use_bias:
            zeros = keras.initializers.Zeros()
            self.bias_current = self.add_weight(
                "bias_current", shape=(input_shape[-1],), dtype="float32", initializer=zeros
            )
        super().build(input_shape)

    def call(self, inputs):
        current = unfold_time(inputs, 1 if self.constant_input else self.timesteps)
        if self.implementation == "native":
            spikes = self._native(current)
        elif self.implementation == "rnn":
            spikes = self._rnn(current)
        else:
            scan = lif_compiled if self.implementation == "fused" else lif_scan
            spikes = scan(self.biased(current), *self._parameters(), *self._settings())
        return tf.cast(fold_time(spikes), inputs.dtype)

    def _native(self, current):
        bias = tf.convert_to_tensor(self.bias_current) if self.use_bias else tf.zeros([0])
        return lif_native(current, *self._parameters(), bias, *self._settings())

    def _rnn(self, current):
        current = self.biased(current)
        if self.constant_input:
            current = tf.repeat(current, self.timesteps, axis=0)
        rnn = keras.layers.RNN(
            self.cell, return_sequences=True, time_major=True, unroll=True, autocast=False
        )
        return rnn(current)

    def biased(self, current: tf.Tensor) -> tf.Tensor:
        """The whole input current: that of the synapses, and the bias current if there is one."""
        return tf.cast(current, tf.float32) + self.bias_current if self.use_bias else current

    def _parameters(self):
        return [tf.convert_to_tensor(v, tf.float32) for v in (self.cell.leak, self.cell.v_th)]

    def _settings(self):
        return self.timesteps, self.cell.surrogate, self.cell.initial_membrane, spike_price.get()

    def get_config(self):
        return {
            **super().get_config(),
            "timesteps": self.timesteps,
            "constant_input": self.constant_input,
            "use_bias": self.use_bias,
            "surrogate": self.cell.surrogate.kind,
            "surrogate_scale": self.cell.surrogate.scale,
            "initial_membrane": self.cell.initial_membrane,
        }


def use_implementation(model: keras.Model, implementation: str) -> keras.Model:
    """Chooses how every `LIF` of a model computes, before its first call; returns the model.

    Raises:
      ValueError: `LIF` has no such implementation.
    """
    check_choice("implementation", implementation, _IMPLEMENTATIONS)
    for layer in model.layers:
        if isinstance(layer, LIF):
            layer.implementation = implementation
    return model


@_register
class ReadOut(keras.layers.Layer):
    """The output layer's neurons, which neither leak nor fire: logits = Σ_t current[t].

    [T·B, classes] → [B, classes], float32.
    """

    def __init__(self, timesteps: int = 1, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.timesteps = timesteps

    def call(self, inputs):
        return tf.reduce_sum(tf.cast(unfold_time(inputs, self.timesteps), tf.float32), axis=0)

    def get_config(self):
        return {**super().get_config(), "timesteps": self.timesteps}


@_register
class Dropout(keras.layers.Layer):
    """Dropout whose mask is constant over time and a function of seed and layer name alone.

    The seed comes from the surrounding `dropout_seed`. Kept values are scaled by 1 / (1 − rate).

    Args:
      rate: share of dropped features, in [0, 1).
      timesteps: T, folded into the first axis of the input.

    Raises:
      ValueError: called in training outside `dropout_seed`.
    """

    def __init__(self, rate: float, timesteps: int = 1, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.rate = rate
        self.timesteps = timesteps

    def call(self, inputs, training=None):
        if not training or self.rate == 0.0:
            return inputs
        seed = dropout_seed.get()
        if seed is None:
            raise ValueError(
                f"dropout layer {self.name}: call the model in training within dropout_seed"
            )
        salt = zlib.crc32(self.name.encode()) & 0x7FFFFFFF
        seed = tf.random.fold_in(seed, salt)
        x = unfold_time(inputs, self.timesteps)
        keep = _random_bits(tf.shape(x)[1:], seed) >= round(self.rate * 2**16)
        mask = tf.where(keep, tf.constant(1.0 / (1.0 - self.rate), x.dtype), tf.zeros([], x.dtype))
        return fold_time(x * mask)

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "timesteps": self.timesteps}


def _random_bits(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Uniform integers in [0, 2¹⁶), int32, the same with XLA and without, two of each that is drawn.

    Floats, and integers of a narrower range, differ between the two.
    """
    size = tf.reduce_prod(shape)
    drawn = tf.random.stateless_uniform([(size + 1) // 2], seed, None, None, tf.int32, alg="philox")
    halves = tf.reshape(tf.bitcast(drawn, tf.uint16), [-1])[:size]
    return tf.reshape(tf.cast(halves, tf.int32), shape)
