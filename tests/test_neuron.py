"""Tests of `snn_tf.neuron`: sequences drawn by hand, a NumPy oracle, and a smooth twin's differences."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from neuron_oracle import KINDS, antiderivative, grid_currents, lif

from snn_tf.neuron import lif_compiled, lif_scan, lif_step
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


def iterate(current, leak, v_th, timesteps, surrogate):
    """`lif_step` over time, for a current of every step or of all steps."""
    currents = tf.unstack(tf.cast(current, tf.float32)) * (timesteps // current.shape[0])
    membrane = tf.zeros_like(currents[0])
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


@pytest.mark.parametrize("leak", [0.5, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("timesteps, shape", [(1, (3,)), (2, (2, 3, 4, 5)), (7, (1, 8)), (64, (40,))])
def test_scan_spikes_equal_oracle(timesteps, shape, dtype, leak):
    rng = np.random.default_rng(timesteps)
    current = grid_currents(rng, (timesteps, *shape))
    expected, _ = lif(current, leak, 0.75)
    ours = lif_scan(tf.cast(current, dtype), tf.constant(leak), tf.constant(0.75), timesteps, TRIANGLE)
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


def twin(parameters, x, kind, point=None):
    """Loss ½ Σ logits², and what the layers do: o and z, each [2, T] lists, in float64.

    Without a `point` neurons spike. With one, o = o₀ + σ(z) − σ(z₀) and the reset takes o₀: a
    differentiable function with the same values there.
    """
    membranes, logits = [0.0, 0.0], 0.0
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


def central_differences(parameters, x, kind, point, step=1e-6):
    gradients = {}
    for name, value in parameters.items():
        gradients[name] = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            losses = []
            for sign in (1.0, -1.0):
                moved = value.copy()
                moved[index] += sign * step
                losses.append(twin({**parameters, name: moved}, x, kind, point)[0])
            gradients[name][index] = (losses[0] - losses[1]) / (2.0 * step)
    return gradients


@pytest.mark.parametrize("scan", [lif_scan, iterate])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_differences_of_smooth_twin(kind, scan):
    parameters, x = random_network(seed=5)
    loss, point = twin(parameters, x, kind)
    for spikes in point[0]:
        assert np.sum(spikes, axis=0).max() >= 3, "at least two resets before the last spike"
    assert min(np.abs(np.abs(point[1][i]) - kink).min() for i in (0, 1) for kink in (0, 0.5)) > 1e-4
    expected = central_differences(parameters, x, kind, point)

    tensors = {name: tf.constant(value, tf.float32) for name, value in parameters.items()}
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        o = tf.constant(x)
        for layer in "12":
            leak, v_th = tensors["leak" + layer], tensors["v_th" + layer]
            o = scan(o @ tensors["w" + layer], leak, v_th, STEPS, Surrogate(kind, 0.3))
        logits = tf.reduce_sum(o @ tensors["w3"], axis=0)
        ours = 0.5 * tf.reduce_sum(tf.square(logits))
    gradients = tape.gradient(ours, tensors)

    np.testing.assert_allclose(ours, loss, rtol=TOLERANCE)
    for name in parameters:
        assert np.abs(expected[name]).max() > 1e-3, name
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradients[name], expected[name], rtol=0, atol=TOLERANCE * scale)


def kept_for_gradient(scan, timesteps):
    """Arrays that the gradient of a scan reads from its forward pass, less the current itself."""
    with tf.Graph().as_default() as graph:
        current = tf.compat.v1.placeholder(tf.float32, [timesteps, 2, 3])
        scalars = [tf.compat.v1.placeholder(tf.float32, []) for _ in range(2)]
        spikes = scan(current, *scalars, timesteps, TRIANGLE)
        forward = {op.name for op in graph.get_operations()}
        upstream = tf.compat.v1.placeholder(tf.float32, spikes.shape)
        gradients = tf.gradients(spikes, [current, *scalars], grad_ys=upstream)
        assert all(gradient is not None for gradient in gradients)
        backward = [op for op in graph.get_operations() if op.name not in forward]
    read = {tensor.ref() for op in backward for tensor in op.inputs if tensor.op.name in forward}
    arrays = [ref.deref() for ref in read if ref.deref().shape.num_elements() > 1]
    return [tensor.name for tensor in arrays if source(tensor) is not current]


def source(tensor):
    """The tensor that a chain of identities starts from."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def test_scan_keeps_only_the_current_for_its_gradient():
    assert kept_for_gradient(lif_scan, 5) == []


def test_autodiff_of_steps_keeps_membranes_of_every_step():
    assert len(kept_for_gradient(iterate, 5)) >= 5
