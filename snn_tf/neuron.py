"""The leaky integrate-and-fire neuron: its equations, their scan over time with a gradient, and an
activation of ANNs that says no more than its spikes can.

Leaky integrate-and-fire with soft reset (DIET-SNN, Rathi & Roy 2020); one scalar firing threshold
v_th > 0 and one scalar leak in (0, 1] per layer:

    u[t] = leak · u[t−1] + I[t]
    o[t] = 1 if u[t] > v_th else 0,      z[t] = u[t] / v_th − 1
    u[t] ← u[t] − v_th · o[t]            in the same step

Before the first step u is a share η of v_th, 0 unless said otherwise. With η = ½ and leak 1 a constant
current I in [0, v_th] gives T · I / v_th spikes rounded to nearest; η = 0 rounds down, and whole
numbers above 0 to one less (Bu et al. 2022).

Time is the first axis: currents I and spikes o are [T, B, ...]. Membranes are float32 whatever the
currents' type. The reset passes no surrogate gradient; v_th has a gradient through z and through
the amounts of the reset and of the first membrane.
"""

import tensorflow as tf

from snn_tf import native
from snn_tf.machine import has_gpu
from snn_tf.surrogate import KINDS, Surrogate

_MOST_COMPILED_STEPS = 16


def lif_step(
    membrane: tf.Tensor,
    current: tf.Tensor,
    leak: tf.Tensor,
    v_th: tf.Tensor,
    surrogate: Surrogate,
    price: tf.Tensor | float = 0.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One time step, differentiable by autodiff.

    Args:
      membrane: u[t−1] after its reset, [B, ...], float32.
      current: I[t], same shape and type.
      leak, v_th: scalars.
      surrogate: stands for do/dz.
      price: what a spike costs, a scalar that is added to dL/do.

    Returns:
      o[t] and u[t] after the reset, as `membrane`.
    """
    u = leak * membrane + current
    spikes = _fire(u, v_th, surrogate, price)
    return spikes, u - v_th * tf.stop_gradient(spikes)


def _fire(u: tf.Tensor, v_th: tf.Tensor, surrogate: Surrogate, price: tf.Tensor | float) -> tf.Tensor:
    @tf.custom_gradient
    def fire(u, v_th):
        def gradient(d_spikes):
            d_z = (d_spikes + price) * surrogate.derivative(u / v_th - 1.0)
            return d_z / v_th, -tf.reduce_sum(d_z * u) / tf.square(v_th)

        return tf.cast(u > v_th, u.dtype), gradient

    return fire(u, v_th)


def lif_scan(
    current: tf.Tensor,
    leak: tf.Tensor,
    v_th: tf.Tensor,
    timesteps: int,
    surrogate: Surrogate,
    initial: float = 0.0,
    price: tf.Tensor | float = 0.0,
) -> tf.Tensor:
    """All time steps at once, with a hand-written gradient.

    The tape keeps the input current alone, and the gradient replays membranes and spikes. Where XLA does
    not compile, TensorFlow's graph optimiser may merge the replay with the forward pass and keep them.

    Args:
      current: I, [T, B, ...]; or [1, B, ...], the same current at every step.
      leak, v_th: scalars, float32.
      timesteps: T ≥ 1.
      surrogate: stands for do/dz.
      initial: η, the membrane before the first step as a share of v_th.
      price: what a spike costs, a scalar that is added to dL/do in float32. A loss's own term of so
        little weight would be lost beside the rest where spikes are bfloat16.

    Returns:
      o, [T, B, ...], in the type of `current`.
    """
    return _scan(_spikes, _backward, current, leak, v_th, timesteps, surrogate, initial, price)


def lif_compiled(
    current: tf.Tensor,
    leak: tf.Tensor,
    v_th: tf.Tensor,
    timesteps: int,
    surrogate: Surrogate,
    initial: float = 0.0,
    price: tf.Tensor | float = 0.0,
) -> tf.Tensor:
    """`lif_scan` in functions that XLA compiles, for CPUs where it does not compile the whole graph.

    Same arguments and result. XLA makes a loop over memory of each result, and each time step is one. So
    the forward pass packs a neuron's spikes into the bits of an integer, which another function unpacks:
    of both together XLA would make T loops. It is `lif_scan` itself where T is large, so that compiling
    takes long; where B is not known, since XLA would compile for each B; and on GPUs, where the whole
    step is compiled.
    """
    if timesteps > _MOST_COMPILED_STEPS or not _worth_compiling(current):
        return lif_scan(current, leak, v_th, timesteps, surrogate, initial, price)
    return _scan(
        _packed_spikes, _compiled_backward, current, leak, v_th, timesteps, surrogate, initial, price
    )


def _scan(forward, backward, current, leak, v_th, timesteps, surrogate, initial, price):
    @tf.custom_gradient
    def scan(current, leak, v_th):
        def gradient(d_spikes):
            return backward(current, leak, v_th, d_spikes, price, timesteps, surrogate, initial)

        return forward(current, leak, v_th, timesteps, initial), gradient

    return scan(current, leak, v_th)


def _spikes(current, leak, v_th, timesteps, initial):
    replayed = _replay(current, leak, v_th, timesteps, initial)
    return tf.stack([tf.cast(u > v_th, current.dtype) for _, u in replayed])


def _packed_spikes(current, leak, v_th, timesteps, initial):
    """As `_spikes`, by way of integers [B, ...] whose bit t is o[t]."""

    def pack(current, leak, v_th):
        replayed = _replay(current, leak, v_th, timesteps, initial)
        bits = [
            tf.bitwise.left_shift(tf.cast(u > v_th, tf.int32), t) for t, (_, u) in enumerate(replayed)
        ]
        return tf.add_n(bits)

    def unpack(words):
        steps = tf.reshape(tf.range(timesteps), [timesteps] + [1] * words.shape.rank)
        return tf.cast(tf.bitwise.right_shift(words, steps) & 1, current.dtype)

    return _compiled(unpack)(_compiled(pack)(current, leak, v_th))


def _compiled_backward(current, leak, v_th, d_spikes, price, timesteps, surrogate, initial):
    def backward(*tensors):
        return _backward(*tensors, timesteps, surrogate, initial)

    return _compiled(backward)(current, leak, v_th, d_spikes, tf.convert_to_tensor(price))


def _worth_compiling(x):
    """Whether XLA, which compiles for each shape, should: on GPUs it compiles the whole step."""
    return x.shape.is_fully_defined() and not has_gpu()


def _compiled(function):
    return tf.function(function, jit_compile=True, autograph=False)


def quantised_relu(x: tf.Tensor, clip: tf.Tensor, levels: int) -> tf.Tensor:
    """ReLU clipped at λ = `clip` and rounded to multiples of λ / L, L = `levels` (QCFS, Bu et al. 2022):

        h = λ / L · ⌊L / λ · min(max(x, 0), λ) + ½⌋

    It is λ times the spike rate of a neuron with v_th = λ, leak 1 and a first membrane of λ / 2 whose
    current is x for T = L steps, but where x is halfway between two levels: there the neuron gives the
    lower, since it fires above v_th alone. The gradient takes ⌊y + ½⌋ for y:

        dh/dx = 1 where 0 ≤ x ≤ λ, else 0;      dh/dλ = h / λ − x / λ where 0 ≤ x ≤ λ, else h / λ

    Args:
      x: any shape, float32 or bfloat16.
      clip: λ > 0, a scalar, float32.
      levels: L ≥ 1.

    Returns:
      h, as `x`.
    """

    def rounded(x, clip):
        ratio = tf.cast(x, tf.float32) / clip
        return ratio, tf.floor(levels * tf.clip_by_value(ratio, 0.0, 1.0) + 0.5) / levels

    def forward(x, clip):
        return tf.cast(clip * rounded(x, clip)[1], x.dtype)

    def backward(x, clip, d_h):
        ratio, rate = rounded(x, clip)
        within = (ratio >= 0.0) & (ratio <= 1.0)
        d_h = tf.cast(d_h, tf.float32)
        d_x = tf.where(within, d_h, 0.0)
        return tf.cast(d_x, x.dtype), tf.reduce_sum(d_h * rate - d_x * ratio)

    def run(function, *arguments):
        once = not tf.executing_eagerly() and _worth_compiling(x)
        return (_compiled(function) if once else function)(*arguments)

    @tf.custom_gradient
    def activation(x, clip):
        return run(forward, x, clip), lambda d_h: run(backward, x, clip, d_h)

    return activation(x, clip)


def lif_native(
    current: tf.Tensor,
    leak: tf.Tensor,
    v_th: tf.Tensor,
    bias: tf.Tensor,
    timesteps: int,
    surrogate: Surrogate,
    initial: float = 0.0,
    price: tf.Tensor | float = 0.0,
) -> tf.Tensor:
    """`lif_scan` as one operation in C++, on CPUs, which also adds a bias current.

    Kept for the backward pass is the input current alone.

    Args:
      current, leak, v_th, timesteps, surrogate, initial, price: as for `lif_scan`.
      bias: [C], float32, added to the current's last axis; empty for none.

    Returns:
      o, [T, B, ...], in the type of `current`.

    Raises:
      snn_tf.native.Unavailable: the operation cannot be compiled here.
    """
    operations = native.operations()

    @tf.custom_gradient
    def scan(current, leak, v_th, bias):
        def gradient(d_spikes):
            kind, scale = KINDS.index(surrogate.kind), surrogate.scale
            return operations.snn_tf_lif_grad(
                current, leak, v_th, bias, d_spikes, price, surrogate=kind, scale=scale, initial=initial
            )

        spikes = operations.snn_tf_lif(current, leak, v_th, bias, timesteps=timesteps, initial=initial)
        return spikes, gradient

    return scan(current, leak, v_th, bias)


def _replay(current, leak, v_th, timesteps, initial):
    """(u[t−1] after its reset, u[t] before its reset) for every t, by the module's equations."""
    currents = tf.unstack(tf.cast(current, tf.float32), axis=0)
    membrane = tf.fill(tf.shape(currents[0]), initial * v_th)
    pairs = []
    for t in range(timesteps):
        u = leak * membrane + currents[t % len(currents)]
        pairs.append((membrane, u))
        membrane = u - v_th * tf.cast(u > v_th, tf.float32)
    return pairs


def _backward(current, leak, v_th, d_spikes, price, timesteps, surrogate, initial):
    """Gradients of current, leak and v_th: the chain rule along the replayed scan, last step first.

    With δ[t] = dL/du[t] before and ρ[t] = dL/du[t] after the reset, ρ[T] = 0, and dL/do[t] = `d_spikes`
    + `price`:

        δ[t] = dL/do[t] · h(z[t]) / v_th + ρ[t],      ρ[t−1] = leak · δ[t],      dL/dI[t] = δ[t]
        dL/dleak = Σ δ[t] · u[t−1]
        dL/dv_th = Σ −dL/do[t] · h(z[t]) · u[t] / v_th² − ρ[t] · o[t],  and η · ρ[0]
    """
    after_reset = 0.0
    d_current, d_leak, d_v_th = [], [], []
    replayed = _replay(current, leak, v_th, timesteps, initial)
    steps = zip(replayed, tf.unstack(d_spikes), strict=True)
    for (previous, u), d_spike in reversed(list(steps)):
        d_z = (tf.cast(d_spike, tf.float32) + price) * surrogate.derivative(u / v_th - 1.0)
        spikes = tf.cast(u > v_th, tf.float32)
        d_v_th.append(tf.reduce_sum(-d_z * u / tf.square(v_th) - after_reset * spikes))
        d_u = d_z / v_th + after_reset
        d_leak.append(tf.reduce_sum(d_u * previous))
        d_current.append(d_u)
        after_reset = leak * d_u
    d_v_th.append(initial * tf.reduce_sum(after_reset))
    d_current.reverse()
    stacked = tf.add_n(d_current)[tf.newaxis] if current.shape[0] == 1 else tf.stack(d_current)
    return tf.cast(stacked, current.dtype), tf.add_n(d_leak), tf.add_n(d_v_th)
