"""Tests of `snn_tf.neuron`: sequences drawn by hand, a NumPy oracle, and a smooth twin's differences."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from neuron_gradient import kept_for_gradient
from neuron_oracle import KINDS, antiderivative, grid_currents, lif

from snn_tf.neuron import lif_compiled, lif_scan, lif_step, quantised_relu
from snn_tf.surrogate import Surrogate

TOLERANCE = 1e-4  # of float32 sums in another order
TRIANGLE = Surrogate("triangle", 0.3)
# leak, v_th, then I[t], o[t] and u[t] after the reset.
SEQUENCES = {
    "at the threshold no spike, above it the excess stays": (
        *(1.0, 1.0),
        [0.5, 0.5, 0.25, 2.0, 0.0, 0.0],
        [0, 0, 1, 1, 1, 0],
        [0.5, 1.0, 0.25, 1.25, 0.25, 0.25],
    ),
    "the leak halves what is left, negative membranes too": (
        *(0.5, 0.75),
        [1.0, 0.0, 0.5, -1.0, 2.0],
        [1, 0, 0, 0, 1],
        [0.25, 0.125, 0.5625, -0.71875, 0.890625],
    ),
    "one spike a step however large the current": (
        *(1.0, 0.5),
        [2.0, 0.0, 0.0, 0.0],
        [1, 1, 1, 0],
        [1.5, 1.0, 0.5, 0.5],
    ),
}


def iterate(current, leak, v_th, timesteps, surrogate, initial=0.0):
    """`lif_step` over time, for a current of every step or of all steps."""
    currents = tf.unstack(tf.cast(current, tf.float32)) * (timesteps // current.shape[0])
    membrane = tf.zeros_like(currents[0]) + initial * v_th
    trains = []
    for arriving in currents:
        spikes, membrane = lif_step(membrane, arriving, leak, v_th, surrogate)
        trains.append(tf.cast(spikes, current.dtype))
    return tf.stack(trains)


def with_gradients(scan, current, leak, v_th, timesteps, surrogate, upstream):
    """Spikes, and the gradients of current, leak and v_th under `upstream`, as one flat list."""
    with tf.GradientTape() as tape:
        tape.watch([current, leak, v_th])
        spikes = scan(current, leak, v_th, timesteps, surrogate)
    return [spikes, *tape.gradient(spikes, [current, leak, v_th], output_gradients=upstream)]


def problem(timesteps, shape, dtype="float32", constant=False, leak=0.5):
    """Arguments of `with_gradients` after the scan: currents on the grid, random upstream."""
    rng = np.random.default_rng([timesteps, *shape])
    current = tf.cast(grid_currents(rng, (1 if constant else timesteps, *shape)), dtype)
    upstream = tf.cast(rng.normal(size=(timesteps, *shape)), dtype)
    return current, tf.constant(leak), tf.constant(0.75), timesteps, TRIANGLE, upstream


def assert_gradients_close(ours, theirs, tolerance):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        our, their = (tf.cast(g, tf.float32).numpy() for g in (our, their))
        assert np.abs(their).max() > 0.0
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance * np.abs(their).max())


@pytest.mark.parametrize("name", SEQUENCES)
def test_step_follows_sequence_by_hand(name):
    leak, v_th, currents, spikes, membranes = SEQUENCES[name]
    membrane = tf.zeros([1])
    for current, expected_spike, expected_membrane in zip(currents, spikes, membranes, strict=True):
        spike, membrane = lif_step(
            membrane, tf.constant([current]), tf.constant(leak), tf.constant(v_th), TRIANGLE
        )
        assert (float(spike[0]), float(membrane[0])) == (expected_spike, expected_membrane)


@pytest.mark.parametrize("name", SEQUENCES)
def test_scan_follows_sequence_by_hand(name):
    leak, v_th, currents, spikes, _ = SEQUENCES[name]
    current = tf.constant(currents)[:, tf.newaxis]
    ours = lif_scan(current, tf.constant(leak), tf.constant(v_th), len(currents), TRIANGLE)
    assert ours[:, 0].numpy().tolist() == spikes


@pytest.mark.parametrize("name", SEQUENCES)
def test_oracle_follows_sequence_by_hand(name):
    leak, v_th, currents, spikes, membranes = SEQUENCES[name]
    ours = lif(np.array(currents, np.float32)[:, None], leak, v_th)
    assert [values[:, 0].tolist() for values in ours] == [spikes, membranes]


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("leak", [0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("timesteps, shape", [(1, (6,)), (2, (2, 3, 4, 5)), (7, (1, 8)), (64, (40,))])
def test_scan_spikes_equal_oracle(timesteps, shape, dtype, leak, initial):
    rng = np.random.default_rng(timesteps)
    current = grid_currents(rng, (timesteps, *shape))
    expected, _ = lif(current, leak, 0.75, initial)
    settings = (tf.constant(leak), tf.constant(0.75), timesteps, TRIANGLE, initial)
    ours = lif_scan(tf.cast(current, dtype), *settings)
    assert ours.dtype == dtype and 0.0 < expected.mean() < 1.0
    np.testing.assert_array_equal(tf.cast(ours, tf.float32), expected)


def test_scan_membranes_are_float32_under_bfloat16_currents():
    current = tf.constant([[1.0], [2.0**-9], [2.0**-9], [2.0**-9]], tf.bfloat16)
    spikes = lif_scan(current, tf.constant(1.0), tf.constant(1.0 + 2.0**-8), 4, TRIANGLE)
    assert tf.cast(spikes[:, 0], tf.float32).numpy().tolist() == [0, 0, 0, 1]


def test_scan_of_constant_current_equals_repeated_current():
    current, *rest = problem(6, (4, 3), constant=True)
    spikes, d_current, d_leak, d_v_th = with_gradients(lif_scan, current, *rest)
    repeated = tf.repeat(current, 6, axis=0)
    expected, d_repeated, *others = with_gradients(lif_scan, repeated, *rest)
    np.testing.assert_array_equal(spikes, expected)
    summed = tf.reduce_sum(d_repeated, axis=0, keepdims=True)
    assert_gradients_close([d_current, d_leak, d_v_th], [summed, *others], 1e-6)


def test_scan_gradients_of_two_steps_by_hand():
    # u = 1.25 fires, 0.25 stays; then 0.375. z = 0.25 and −0.625; do/dz = 0.225 and 0.1125.
    # dL/du[2] = 2 · 0.1125 = 0.225; dL/du[1] = 0.225 + leak · 0.225 = 0.3375.
    # dL/dleak = 0.225 · 0.25; dL/dv_th = −0.225 · 1.25 − 2 · 0.1125 · 0.375 − leak · 0.225.
    current, upstream = tf.constant([[1.25], [0.25]]), tf.constant([[1.0], [2.0]])
    leak, v_th = tf.constant(0.5), tf.constant(1.0)
    for scan in (lif_scan, iterate):
        spikes, *gradients = with_gradients(scan, current, leak, v_th, 2, TRIANGLE, upstream)
        assert spikes.numpy().tolist() == [[1.0], [0.0]]
        for ours, expected in zip(gradients, ([[0.3375], [0.225]], 0.05625, -0.478125), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float32", TOLERANCE), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("timesteps, shape", [(1, (30,)), (5, (2, 3, 3, 4)), (64, (10,))])
def test_scan_equals_steps_and_their_autodiff(timesteps, shape, dtype, tolerance, constant):
    arguments = problem(timesteps, shape, dtype, constant)
    if timesteps == 1:  # the first step has nothing to leak from
        arguments = (arguments[0], tf.constant(0.5), *arguments[2:])
    spikes, *ours = with_gradients(lif_scan, *arguments)
    expected, *theirs = with_gradients(iterate, *arguments)
    np.testing.assert_array_equal(tf.cast(spikes, tf.float32), tf.cast(expected, tf.float32))
    if timesteps == 1:
        assert float(ours.pop(1)) == float(theirs.pop(1)) == 0.0
    assert_gradients_close(ours, theirs, tolerance)


@pytest.mark.parametrize("timesteps, constant", [(1, False), (5, False), (5, True)])
@pytest.mark.parametrize("scan", [lif_scan, lif_compiled])
def test_gradients_through_the_first_membrane_equal_autodiff(scan, timesteps, constant):
    arguments = problem(timesteps, (60,), constant=constant)
    spikes, *ours = with_gradients(functools.partial(scan, initial=0.5), *arguments)
    expected, *theirs = with_gradients(functools.partial(iterate, initial=0.5), *arguments)
    np.testing.assert_array_equal(spikes, expected)
    assert_gradients_close(ours, theirs, TOLERANCE)
    _, *without = with_gradients(scan, *arguments)
    assert all(np.abs(one - other).max() > 1e-2 for one, other in zip(ours, without, strict=True))


def test_gradient_of_the_first_membrane_by_hand():
    # u = 0.5 · 0.5 · 2 + 1.25 = 1.75 and no spike; z = −0.125, do/dz = 0.2625, dL/du = 0.13125.
    # dL/dleak = dL/du · 1; dL/dv_th = −0.2625 · 1.75 / 4 + 0.5 · leak · dL/du.
    arguments = (tf.constant([[1.25]]), tf.constant(0.5), tf.constant(2.0), 1, TRIANGLE)
    scan = functools.partial(lif_scan, initial=0.5)
    spikes, *gradients = with_gradients(scan, *arguments, tf.ones([1, 1]))
    assert spikes.numpy().tolist() == [[0.0]]
    for ours, expected in zip(gradients, ([[0.13125]], 0.13125, -0.08203125), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("initial, rounded", [(0.0, np.floor), (0.5, lambda x: np.floor(x + 0.5))])
def test_first_membrane_decides_how_spike_counts_are_rounded(initial, rounded):
    current = np.linspace(0.011, 0.989, 40, dtype=np.float32)
    settings = (tf.constant(1.0), tf.constant(1.0), 5, TRIANGLE, initial)
    counts = tf.reduce_sum(lif_scan(tf.constant(current)[tf.newaxis], *settings), axis=0)
    np.testing.assert_array_equal(counts, rounded(5 * current))


@pytest.mark.parametrize("leak", [0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_scan_equals_steps_for_every_surrogate(kind, leak):
    current, leak, v_th, timesteps, _, upstream = problem(5, (60,), leak=leak)
    rest = (leak, v_th, timesteps, Surrogate(kind, 0.7), upstream)
    spikes, *ours = with_gradients(lif_scan, current, *rest)
    expected, *theirs = with_gradients(iterate, current, *rest)
    np.testing.assert_array_equal(spikes, expected)
    assert_gradients_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("scan", [lif_scan, iterate])
def test_compiled_equals_eager(scan, jit_compile):
    arguments = problem(6, (3, 7))

    @tf.function(jit_compile=jit_compile)
    def compiled(current, leak, v_th, upstream):
        return with_gradients(scan, current, leak, v_th, 6, TRIANGLE, upstream)

    expected, *theirs = with_gradients(scan, *arguments)
    spikes, *ours = compiled(*arguments[:3], arguments[-1])
    np.testing.assert_array_equal(spikes, expected)
    assert_gradients_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("dtype, tolerance", [("float32", TOLERANCE), ("bfloat16", 1e-2)])
@pytest.mark.parametrize(
    "timesteps, shape, kind, constant",
    [
        (2, (3, 4, 5), "triangle", False),
        (5, (60,), "rectangular", False),
        (5, (2, 7), "sigmoid", True),
        (3, (11,), "arctan", False),
        (16, (9,), "triangle", False),
        (64, (40,), "triangle", False),
    ],
)
def test_compiled_functions_equal_the_scan(timesteps, shape, kind, constant, dtype, tolerance):
    current, leak, v_th, _, _, upstream = problem(timesteps, shape, dtype, constant)
    rest = (leak, v_th, timesteps, Surrogate(kind, 0.5), upstream)
    spikes, *ours = with_gradients(lif_compiled, current, *rest)
    expected, *theirs = with_gradients(lif_scan, current, *rest)
    np.testing.assert_array_equal(tf.cast(spikes, tf.float32), tf.cast(expected, tf.float32))
    assert spikes.dtype == expected.dtype and tf.reduce_any(expected > 0)
    assert_gradients_close(ours, theirs, tolerance)


@pytest.mark.parametrize("timesteps, batch, functions", [(16, 3, 2), (17, 3, 0), (16, None, 0)])
def test_xla_compiles_up_to_sixteen_steps_of_a_known_batch(timesteps, batch, functions):
    @tf.function
    def spikes(current):
        return lif_compiled(current, tf.constant(0.5), tf.constant(0.75), timesteps, TRIANGLE)

    graph = spikes.get_concrete_function(tf.TensorSpec([timesteps, batch])).graph
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    assert len(calls) == functions


SIZES = (4, 6, 5, 3)  # input, two layers of neurons, output
STEPS = 8


def random_network(seed):
    """Parameters by name, float32 values in float64, and analog currents x, [T, B, inputs]."""
    rng = np.random.default_rng(seed)
    draws = {
        f"w{i}": rng.normal(0.25, 0.25, shape)
        for i, shape in enumerate(itertools.pairwise(SIZES), start=1)
    }
    draws |= {"leak1": 0.9, "v_th1": 1.1, "leak2": 0.8, "v_th2": 0.9}
    x = rng.uniform(0.0, 1.5, (STEPS, 2, SIZES[0]))
    return {k: np.asarray(v, np.float32).astype(np.float64) for k, v in draws.items()}, np.float32(x)


def twin(parameters, x, kind, initial, point=None):
    """Loss ½ Σ logits², and what the layers do: o and z, each [2, T] lists, in float64.

    Without a `point` neurons spike. With one, o = o₀ + σ(z) − σ(z₀) and the reset takes o₀: a
    differentiable function with the same values there.
    """
    membranes, logits = [initial * parameters[name] for name in ("v_th1", "v_th2")], 0.0
    fired, potentials = [[], []], [[], []]
    for t, o in enumerate(x.astype(np.float64)):
        for layer in (0, 1):
            leak, v_th = (parameters[f"{name}{layer + 1}"] for name in ("leak", "v_th"))
            u = leak * membranes[layer] + o @ parameters[f"w{layer + 1}"]
            z = u / v_th - 1.0
            o = reset = (u > v_th).astype(np.float64)
            if point:
                reset, z0 = (recorded[layer][t] for recorded in point)
                o = reset + antiderivative(kind, z, 0.3) - antiderivative(kind, z0, 0.3)
            membranes[layer] = u - v_th * reset
            fired[layer].append(o)
            potentials[layer].append(z)
        logits = logits + o @ parameters["w3"]
    return 0.5 * np.sum(logits**2), (fired, potentials)


def central_differences(parameters, x, kind, initial, point, step=1e-6):
    gradients = {}
    for name, value in parameters.items():
        gradients[name] = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            losses = []
            for sign in (1.0, -1.0):
                moved = value.copy()
                moved[index] += sign * step
                losses.append(twin({**parameters, name: moved}, x, kind, initial, point)[0])
            gradients[name][index] = (losses[0] - losses[1]) / (2.0 * step)
    return gradients


@pytest.mark.parametrize("initial", [0.0, 0.25])
@pytest.mark.parametrize("scan", [lif_scan, iterate])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_differences_of_smooth_twin(kind, scan, initial):
    parameters, x = random_network(seed=5)
    loss, point = twin(parameters, x, kind, initial)
    for spikes in point[0]:
        assert np.sum(spikes, axis=0).max() >= 3, "at least two resets before the last spike"
    assert min(np.abs(np.abs(point[1][i]) - kink).min() for i in (0, 1) for kink in (0, 0.5)) > 1e-4
    expected = central_differences(parameters, x, kind, initial, point)

    tensors = {name: tf.constant(value, tf.float32) for name, value in parameters.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        o = tf.constant(x)
        for layer in "12":
            leak, v_th = tensors["leak" + layer], tensors["v_th" + layer]
            o = scan(o @ tensors["w" + layer], leak, v_th, STEPS, Surrogate(kind, 0.3), initial)
        logits = tf.reduce_sum(o @ tensors["w3"], axis=0)
        ours = 0.5 * tf.reduce_sum(tf.square(logits))
    gradients = tape.gradient(ours, tensors)

    np.testing.assert_allclose(ours, loss, rtol=TOLERANCE)
    for name in parameters:
        assert np.abs(expected[name]).max() > 1e-3, name
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradients[name], expected[name], rtol=0, atol=TOLERANCE * scale)


def clipped_currents():
    """Currents from below 0 to past a clip of 1.5, none halfway between two of 5 levels."""
    return np.linspace(-1.013, 2.487, 101, dtype=np.float32)


@pytest.mark.parametrize("levels", [1, 2, 5, 16])
def test_quantised_relu_is_the_rate_of_spikes_times_the_clip(levels):
    x = clipped_currents()
    spikes, _ = lif(np.broadcast_to(x, (levels, *x.shape)), 1.0, 1.5, initial=0.5)
    expected = 1.5 * spikes.mean(0)
    ours = quantised_relu(tf.constant(x), tf.constant(1.5), levels)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert len(np.unique(expected)) == levels + 1


def test_quantised_relu_rounds_halves_up():
    x = tf.constant([-0.25, 0.0, 0.125, 0.25, 0.375, 0.875, 1.0, 4.0])
    expected = [0.0, 0.0, 0.25, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert quantised_relu(x, tf.constant(1.0), 4).numpy().tolist() == expected


def straight_through(x, clip, levels, point):
    """Σ (1 + i mod 3) · h where rounding adds what it adds at `point` = (x₀, λ₀), in float64."""
    level = levels * np.clip(x / clip, 0.0, 1.0)
    level_0 = levels * np.clip(point[0] / point[1], 0.0, 1.0)
    rounding = np.floor(level_0 + 0.5) - level_0
    return np.sum((1 + np.arange(x.size) % 3) * clip * (level + rounding) / levels)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_quantised_relu_has_the_gradient_of_its_straight_through_form(compiled, dtype, tolerance):
    x = tf.cast(clipped_currents(), dtype)
    weights = tf.cast(1 + tf.range(x.shape[0]) % 3, dtype)

    @tf.function(
        input_signature=[tf.TensorSpec([101] if compiled else [None], dtype), tf.TensorSpec([])]
    )
    def gradients(x, clip):
        with tf.GradientTape() as tape:
            tape.watch([x, clip])
            h = quantised_relu(x, clip, 5)
        return tape.gradient(h, [x, clip], output_gradients=weights)

    calls = [op.type for op in gradients.get_concrete_function().graph.get_operations()]
    assert ("StatefulPartitionedCall" in calls or "PartitionedCall" in calls) == compiled
    d_x, d_clip = gradients(x, tf.constant(1.5))
    values, step = tf.cast(x, tf.float64).numpy(), 1e-6
    moved = [straight_through(values, 1.5 + s, 5, (values, 1.5)) for s in (step, -step)]
    assert d_clip.dtype == tf.float32
    np.testing.assert_allclose(d_clip, (moved[0] - moved[1]) / (2 * step), rtol=tolerance)
    within = (values >= 0.0) & (values <= 1.5)
    assert d_x.dtype == dtype
    np.testing.assert_array_equal(tf.cast(d_x, tf.float32), within * tf.cast(weights, tf.float32))


def test_scan_keeps_only_the_current_for_its_gradient():
    assert kept_for_gradient(lif_scan, 5) == []


def test_autodiff_of_steps_keeps_membranes_of_every_step():
    assert len(kept_for_gradient(iterate, 5)) >= 5
