"""Tests of the neuron in C++: its values, how it is built, and what happens where it cannot be."""

import os
import shutil
import stat

import numpy as np
import pytest
import tensorflow as tf
from neuron_gradient import kept_for_gradient
from neuron_oracle import KINDS, grid_currents

from snn_tf import native
from snn_tf.layers import LIF
from snn_tf.neuron import lif_compiled, lif_native, lif_scan
from snn_tf.surrogate import Surrogate

BLOCK = 256  # neurons that the C++ walks together


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Skips without a compiler; with one, sources that it does not compile are a failure."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the native neuron needs a C++ compiler")
    native.operations()


def with_gradients(scan, current, leak, v_th, *rest):
    """Spikes of a scan, and gradients of current, leak and v_th for one fixed upstream gradient."""
    leak, v_th = tf.constant(leak), tf.constant(v_th)
    with tf.GradientTape() as tape:
        tape.watch([current, leak, v_th])
        spikes = scan(current, leak, v_th, *rest)
        upstream = tf.cast(tf.reshape(tf.range(tf.size(spikes)) % 13 - 6, spikes.shape), spikes.dtype)
        loss = tf.reduce_sum(tf.cast(spikes * upstream, tf.float32))
    return [x.numpy() for x in (spikes, *tape.gradient(loss, [current, leak, v_th]))]


def native_scan(current, leak, v_th, timesteps, surrogate, initial=0.0, price=0.0):
    return lif_native(current, leak, v_th, tf.zeros([0]), timesteps, surrogate, initial, price)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("neurons", [1, BLOCK - 1, BLOCK, BLOCK + 1, 33 * BLOCK + 7])
@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize("initial", [0.0, 0.5])
def test_native_equals_fused_on_exact_values(initial, timesteps, neurons, kind):
    current = tf.constant(grid_currents(np.random.default_rng(timesteps), (timesteps, neurons)))
    settings = (0.5, 0.75, timesteps, Surrogate(kind, 0.5), initial)
    spikes, *gradients = with_gradients(native_scan, current, *settings)
    expected, *wanted = with_gradients(lif_scan, current, *settings)
    np.testing.assert_array_equal(spikes, expected)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [native_scan, lif_compiled])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_price_of_spikes_equals_fused(dtype, kind, scan):
    current = tf.cast(grid_currents(np.random.default_rng(3), (4, BLOCK + 7)), dtype)
    settings = (0.5, 0.75, 4, Surrogate(kind, 0.5), 0.5, tf.constant(-0.375))
    _, *found = with_gradients(scan, current, *settings)
    _, *expected = with_gradients(lif_scan, current, *settings)
    _, *without = with_gradients(lif_scan, current, *settings[:-1])
    for ours, theirs, other in zip(found, expected, without, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4 if dtype == "float32" else 1e-2, atol=1e-4)
        assert np.abs(theirs - other).max() > 0.01


def test_native_equals_fused_over_64_steps():
    current = tf.constant(grid_currents(np.random.default_rng(1), (64, 3, 5)))
    settings = (1.0, 0.75, 64, Surrogate())
    spikes, *_ = with_gradients(native_scan, current, *settings)
    expected, *_ = with_gradients(lif_scan, current, *settings)
    assert 0.01 < expected.mean() < 0.99
    np.testing.assert_array_equal(spikes, expected)


def test_native_takes_a_constant_current():
    current = tf.constant(grid_currents(np.random.default_rng(2), (1, 2, 300)))
    settings = (0.5, 0.75, 6, Surrogate(), 0.25)
    for ours, theirs in zip(
        with_gradients(native_scan, current, *settings),
        with_gradients(lif_scan, current, *settings),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)


def test_native_agrees_on_any_values_in_nearly_all_spikes():
    rng = np.random.default_rng(3)
    current = tf.constant(rng.standard_normal((8, 50_000)), tf.float32)
    spikes, *gradients = with_gradients(native_scan, current, 0.9, 0.7, 8, Surrogate())
    expected, *wanted = with_gradients(lif_scan, current, 0.9, 0.7, 8, Surrogate())
    assert (spikes == expected).mean() >= 0.9999
    assert 0.05 < expected.mean() < 0.95
    assert (np.abs(gradients[0] - wanted[0]) <= 1e-4 * np.abs(wanted[0]) + 1e-5).mean() >= 0.9995


def test_native_bfloat16_spikes_equal_those_of_the_same_currents_in_float32():
    current = tf.cast(tf.constant(grid_currents(np.random.default_rng(4), (4, 700))), tf.bfloat16)
    spikes, d_current, *_ = with_gradients(native_scan, current, 0.5, 0.75, 4, Surrogate())
    expected, wanted, *_ = with_gradients(
        lif_scan, tf.cast(current, tf.float32), 0.5, 0.75, 4, Surrogate()
    )
    assert spikes.dtype == d_current.dtype == tf.bfloat16.as_numpy_dtype
    np.testing.assert_array_equal(spikes.astype(np.float32), expected)
    one_unit = 2.0**-7
    np.testing.assert_allclose(d_current.astype(np.float32), wanted, rtol=one_unit)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("channels", [3, 300])
def test_native_layer_with_bias_equals_fused(channels, constant):
    timesteps, batch = 4, 5
    current = tf.constant(
        grid_currents(np.random.default_rng(5), ((1 if constant else timesteps) * batch, 2, channels))
    )
    outcomes = []
    for implementation in ("native", "fused"):
        layer = LIF(timesteps, implementation, constant_input=constant, use_bias=True)
        layer(current)
        layer.cell.leak.assign(0.5)
        layer.cell.v_th.assign(0.75)
        layer.bias_current.assign(np.arange(channels) % 8 / 8)
        with tf.GradientTape() as tape:
            spikes = layer(current)
            upstream = tf.cast(tf.reshape(tf.range(tf.size(spikes)) % 11, spikes.shape), tf.float32)
            loss = tf.reduce_sum(spikes * upstream)
        outcomes.append([spikes, *tape.gradient(loss, layer.trainable_variables)])
    assert len(outcomes[0]) == 4
    np.testing.assert_array_equal(outcomes[0][0], outcomes[1][0])
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def test_native_gives_the_same_bits_every_time():
    rng = np.random.default_rng(6)
    current = tf.constant(rng.standard_normal((5, 200_000)), tf.float32)
    first = with_gradients(native_scan, current, 0.9, 0.7, 5, Surrogate())
    for _ in range(3):
        again = with_gradients(native_scan, current, 0.9, 0.7, 5, Surrogate())
        assert [x.tobytes() for x in again] == [x.tobytes() for x in first]


def test_native_keeps_only_the_current_for_the_gradient():
    assert kept_for_gradient(native_scan, 5) == []


def test_mismatched_current_is_an_error():
    with pytest.raises(tf.errors.InvalidArgumentError, match="1 or `timesteps` rows"):
        native.operations().snn_tf_lif(
            tf.zeros([3, 4]), 1.0, 1.0, tf.zeros([0]), timesteps=5, initial=0.0
        )


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and a loader that has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return native.operations.__wrapped__


def test_missing_compiler_is_said(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(native.Unavailable, match="no-such-compiler is not installed"):
        fresh()


def test_failing_compiler_is_said_in_one_line_and_leaves_no_library(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'x.cc:1: error: it cannot be' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native.Unavailable, match="it cannot be") as caught:
        fresh()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.so"))


def test_cache_that_others_can_write_to_is_refused(fresh, tmp_path):
    folder = tmp_path / "snn_tf" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(native.Unavailable, match="others can write"):
        fresh()


def test_cache_is_made_for_its_user_alone(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_build", lambda compiler, library: library.parent.mkdir())
    with pytest.raises(native.Unavailable):
        fresh()
    assert stat.S_IMODE(os.stat(tmp_path / "snn_tf" / "native").st_mode) == 0o700


def test_key_depends_on_sources_and_compiler_flags(monkeypatch):
    compiler = "g++"
    key = native._key(compiler)
    assert key == native._key(compiler)
    monkeypatch.setattr(native, "_KERNEL_FLAGS", (*native._KERNEL_FLAGS, "-O1"))
    assert native._key(compiler) != key
