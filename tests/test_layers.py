"""Tests of `snn_tf.layers`: values, equal implementations, constraints, saving, and seeds."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from neuron_oracle import KINDS, grid_currents, lif

from snn_tf.ambient import dropout_seed, spike_price
from snn_tf.layers import (
    FIRST_CLIP,
    LEAST,
    LIF,
    Dropout,
    QuantisedReLU,
    ReadOut,
    fold_time,
    unfold_time,
    use_implementation,
)
from snn_tf.surrogate import Surrogate

IMPLEMENTATIONS = ("fused", "rnn")
SEED = (7, 3)
TOLERANCE = 1e-4  # of float32 sums in another order


def folded_currents(timesteps, shape, dtype="float32", constant=False):
    """Currents on the grid, [T·B, ...] for `shape` [B, ...]; [B, ...] if constant."""
    rng = np.random.default_rng([timesteps, *shape])
    return tf.cast(grid_currents(rng, ((1 if constant else timesteps) * shape[0], *shape[1:])), dtype)


def make_lif(timesteps, currents, leak=0.5, v_th=0.75, bias=None, **kwargs):
    """A layer that is built for `currents`, with these parameters."""
    layer = LIF(timesteps, use_bias=bias is not None, **kwargs)
    layer.build(currents.shape)
    layer.cell.leak.assign(leak)
    layer.cell.v_th.assign(v_th)
    if bias is not None:
        layer.bias_current.assign(bias)
    return layer


def spikes_and_gradients(layer, currents, upstream):
    with tf.GradientTape() as tape:
        tape.watch(currents)
        spikes = layer(currents)
    sources = [currents, *layer.trainable_variables]
    return spikes, tape.gradient(spikes, sources, output_gradients=upstream)


def upstream_for(timesteps, shape, dtype="float32"):
    rng = np.random.default_rng(len(shape))
    return tf.cast(rng.normal(size=(timesteps * shape[0], *shape[1:])), dtype)


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(tf.cast(ours, tf.float32), tf.cast(theirs, tf.float32))


def assert_close(ours, theirs, tolerance):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype and our.shape == their.shape
        our, their = (tf.cast(g, tf.float32).numpy() for g in (our, their))
        np.testing.assert_allclose(our, their, rtol=0, atol=tolerance * np.abs(their).max())


def test_fold_time_is_time_major_and_undone_by_unfold_time():
    x = tf.reshape(tf.range(2 * 3 * 4), [2, 3, 4])
    folded = fold_time(x)
    assert folded[:, 0].numpy().tolist() == [0, 4, 8, 12, 16, 20]
    assert_equal(unfold_time(folded, 2), x)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("leak", [0.5, 1.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_spikes_equal_oracle(implementation, leak, constant):
    timesteps, shape = 6, (2, 3, 3, 4)
    currents = folded_currents(timesteps, shape, constant=constant)
    bias = np.array([-0.25, 0.0, 0.125, 0.5], np.float32)
    layer = make_lif(
        timesteps, currents, leak, 0.75, bias, implementation=implementation, constant_input=constant
    )
    per_step = currents.numpy().reshape(-1, *shape) + bias
    expected, _ = lif(np.broadcast_to(per_step, (timesteps, *shape)), leak, 0.75)
    assert_equal(layer(currents), expected.reshape(-1, *shape[1:]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_membranes_start_at_a_share_of_v_th(implementation):
    timesteps, shape = 6, (2, 3, 4)
    currents = folded_currents(timesteps, shape)
    settings = {"implementation": implementation, "initial_membrane": 0.5}
    per_step = currents.numpy().reshape(-1, *shape)
    expected, _ = lif(per_step, 0.5, 0.75, initial=0.5)
    assert (lif(per_step, 0.5, 0.75)[0] != expected).any()
    assert_equal(make_lif(timesteps, currents, **settings)(currents), expected.reshape(-1, *shape[1:]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_adds_bias_to_bfloat16_currents_in_float32(implementation):
    currents = tf.constant([[1.0, 1.0]], tf.bfloat16)
    bias = [2.0**-9, 2.0**-11]  # of which bfloat16 sees nothing beside 1
    layer = make_lif(1, currents, 1.0, 1.0 + 2.0**-10, bias, implementation=implementation)
    assert_equal(layer(currents), [[1.0, 0.0]])


@pytest.mark.parametrize("use_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", TOLERANCE), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("timesteps, shape", [(1, (4, 9)), (5, (2, 3, 3, 4)), (64, (3, 4))])
def test_lif_fused_equals_rnn(timesteps, shape, dtype, tolerance, constant, use_bias):
    currents = folded_currents(timesteps, shape, dtype, constant)
    bias = np.linspace(-0.5, 0.5, shape[-1]).round(2) if use_bias else None
    upstream = upstream_for(timesteps, shape, dtype)
    results = [
        spikes_and_gradients(
            make_lif(timesteps, currents, bias=bias, implementation=name, constant_input=constant),
            *(currents, upstream),
        )
        for name in IMPLEMENTATIONS
    ]
    (spikes, ours), (expected, theirs) = results
    assert spikes.dtype == expected.dtype == dtype
    assert 0.0 < tf.reduce_mean(tf.cast(spikes, tf.float32)) < 1.0
    assert_equal(spikes, expected)
    assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "plain"])
def test_spike_price_is_added_to_the_gradient_of_every_spike(implementation, constant):
    currents = folded_currents(3, (2, 5), constant=constant)
    upstream = upstream_for(3, (2, 5))
    layer = make_lif(3, currents, implementation=implementation, constant_input=constant)
    _, expected = spikes_and_gradients(layer, currents, upstream + 0.25)
    with spike_price(tf.constant(0.25)):
        _, found = spikes_and_gradients(layer, currents, upstream)
    assert_close(found, expected, TOLERANCE)
    _, without = spikes_and_gradients(layer, currents, upstream)
    assert abs(float(found[1] - without[1])) > 0.01


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "plain"])
def test_spike_price_is_not_lost_beside_a_gradient_in_bfloat16(implementation):
    currents = folded_currents(3, (40, 5), "bfloat16")
    layer = make_lif(3, currents, implementation=implementation)
    price = 2.0**-10  # of which bfloat16 sees nothing beside 1

    def d_v_th(upstream, price):
        with spike_price(tf.constant(price)):
            _, gradients = spikes_and_gradients(layer, currents, tf.fill([120, 5], upstream))
        return float(gradients[1 + [v.name for v in layer.trainable_variables].index("v_th:0")])

    one, none = (tf.constant(value, tf.bfloat16) for value in (1.0, 0.0))
    assert d_v_th(one, price) - d_v_th(one, 0.0) == pytest.approx(d_v_th(none, price), rel=1e-2)
    assert d_v_th(none, price) == pytest.approx(price * d_v_th(one, 0.0), rel=1e-4)


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("leak", [0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_lif_fused_equals_rnn_for_every_surrogate(kind, leak, initial):
    timesteps, shape = 5, (3, 20)
    currents, upstream = folded_currents(timesteps, shape), upstream_for(timesteps, shape)
    settings = {"surrogate": kind, "surrogate_scale": 0.7, "initial_membrane": initial}
    (spikes, ours), (expected, theirs) = (
        spikes_and_gradients(
            make_lif(timesteps, currents, leak, implementation=name, **settings), currents, upstream
        )
        for name in IMPLEMENTATIONS
    )
    assert_equal(spikes, expected)
    assert all(np.abs(gradient).max() > 0.0 for gradient in ours)
    assert_close(ours, theirs, TOLERANCE)


def test_lif_surrogate_and_scale_reach_the_gradient():
    currents = tf.constant([[1.25]])
    for kind, expected in (("triangle", 0.7 * 0.75), ("rectangular", 0.7)):  # z = 0.25, v_th = 1
        layer = make_lif(1, currents, v_th=1.0, surrogate=kind, surrogate_scale=0.7)
        _, (gradient, *_) = spikes_and_gradients(layer, currents, tf.ones([1, 1]))
        np.testing.assert_allclose(gradient, [[expected]], rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_compiled_equals_eager(implementation, jit_compile):
    timesteps, shape = 4, (2, 3, 3, 4)
    currents, upstream = folded_currents(timesteps, shape), upstream_for(timesteps, shape)
    layer = make_lif(timesteps, currents, bias=np.ones(4) / 8, implementation=implementation)
    compiled = tf.function(lambda *args: spikes_and_gradients(layer, *args), jit_compile=jit_compile)
    spikes, ours = compiled(currents, upstream)
    expected, theirs = spikes_and_gradients(layer, currents, upstream)
    assert_equal(spikes, expected)
    assert_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_parameters_are_two_float32_scalars_of_one_and_a_bias_of_zero(implementation):
    with_bias = LIF(3, implementation, use_bias=True, dtype="mixed_bfloat16")
    with_bias.build((6, 5))
    found = {w.name.split("/")[-1]: w for w in with_bias.trainable_weights}
    assert {name: w.shape.as_list() for name, w in found.items()} == {
        "leak:0": [],
        "v_th:0": [],
        "bias_current:0": [5],
    }
    assert all(w.dtype == tf.float32 for w in found.values())
    assert [float(found[name]) for name in ("leak:0", "v_th:0")] == [1.0, 1.0]
    assert not found["bias_current:0"].numpy().any() and not with_bias.non_trainable_weights


def test_lif_implementations_exchange_weights():
    currents = folded_currents(4, (2, 5))
    fused = make_lif(4, currents, 0.5, 0.25, np.arange(5.0), implementation="fused")
    rnn = make_lif(4, currents, 1.0, 1.0, np.zeros(5), implementation="rnn")
    rnn.set_weights(fused.get_weights())
    assert (float(rnn.cell.leak), float(rnn.cell.v_th)) == (0.5, 0.25)
    assert_equal(rnn.bias_current, np.arange(5.0))


@pytest.mark.parametrize("gradient, leak, v_th", [(1e3, 1e-3, 1e-3), (-1e3, 1.0, 1001.0)])
@pytest.mark.parametrize("optimizer, rate", [("SGD", 1.0), ("Adam", 1e3)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_stays_in_range_after_optimizer_step(implementation, optimizer, rate, gradient, leak, v_th):
    layer = make_lif(2, tf.zeros([2, 3]), 1.0, 1.0, implementation=implementation)
    rule = getattr(keras.optimizers.legacy, optimizer)(rate)
    rule.apply_gradients([(tf.constant(gradient), v) for v in layer.trainable_variables])
    assert float(layer.cell.leak) == np.float32(leak)
    np.testing.assert_allclose(layer.cell.v_th, v_th, rtol=1e-5)


def test_lif_optimizer_step_within_range_is_left_as_it_is():
    layer = make_lif(2, tf.zeros([2, 3]), 0.5, 0.75)
    gradients = [(tf.constant(0.25), v) for v in layer.trainable_variables]
    keras.optimizers.legacy.SGD(1.0).apply_gradients(gradients)
    assert (float(layer.cell.leak), float(layer.cell.v_th)) == (0.25, 0.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lif_traces_once_per_input_shape(implementation):
    layer = make_lif(2, tf.zeros([4, 3]), implementation=implementation)
    compiled = tf.function(layer)
    for rows in (4, 4, 6, 4, 6):
        compiled(tf.random.stateless_normal([rows, 3], SEED))
        layer.cell.v_th.assign_add(0.125)
    assert compiled.experimental_get_tracing_count() == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_relu_rounds_to_shares_of_its_clip_in_the_type_of_its_input(dtype):
    layer = QuantisedReLU(4, name="neuron")
    x = tf.constant([[-1.0, 0.75, 1.25, 2.0, 9.0]], dtype)
    layer(x)
    assert [w.name for w in layer.trainable_weights] == ["neuron/clip:0"]
    assert (layer.clip.dtype, float(layer.clip)) == (tf.float32, FIRST_CLIP)
    layer.clip.assign(2.0)
    assert layer(x).dtype == dtype
    assert_equal(layer(x), [[0.0, 1.0, 1.5, 2.0, 2.0]])


def test_quantised_relu_keeps_its_clip_above_0_in_training():
    layer = QuantisedReLU(4)
    layer.build((1, 2))
    keras.optimizers.legacy.SGD(1.0).apply_gradients([(tf.constant(1e3), layer.clip)])
    assert float(layer.clip) == np.float32(LEAST)


def test_read_out_sums_over_time():
    x = np.arange(12, dtype=np.float32).reshape(6, 2)  # three steps of two images
    assert ReadOut(3)(tf.constant(x)).numpy().tolist() == [[12.0, 15.0], [18.0, 21.0]]
    assert ReadOut()(tf.constant(x)).numpy().tolist() == x.tolist()


def test_read_out_sums_bfloat16_in_float32():
    x = tf.constant([[256.0], [1.0], [1.0], [1.0]], tf.bfloat16)
    logits = ReadOut(4)(x)
    assert logits.dtype == tf.float32 and logits.numpy().tolist() == [[259.0]]


def test_read_out_gives_every_step_the_same_gradient():
    x = tf.zeros([6, 2])
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = ReadOut(3)(x)
    upstream = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    assert_equal(tape.gradient(logits, x, output_gradients=upstream), np.tile(upstream, (3, 1)))


def dropped(shape=(41, 49), rate=0.5, name="here", seed=SEED, timesteps=1):
    with dropout_seed(tf.constant(seed)):
        return Dropout(rate, timesteps, name=name)(tf.ones(shape), training=True).numpy()


def test_dropout_is_a_function_of_seed_and_name():
    tf.random.set_seed(1)
    first = dropped()
    tf.random.set_seed(2)
    assert_equal(dropped(), first)
    for other in (dropped(seed=(8, 3)), dropped(seed=(7, 4)), dropped(name="there")):
        assert 0.4 < np.mean(other != first) < 0.6  # independent masks differ at half of the places


def test_dropout_has_no_state():
    layer = Dropout(0.5, name="here")
    with dropout_seed(tf.constant(SEED)):
        calls = [layer(tf.ones([41, 49]), training=True) for _ in range(2)]
    assert_equal(*calls)
    assert not layer.weights and not layer.variables


def test_dropout_mask_is_constant_over_time_and_independent_over_images():
    masks = dropped((3 * 20, 50), timesteps=3).reshape(3, 20, 50)
    assert_equal(masks[1], masks[0])
    assert_equal(masks[2], masks[0])
    assert 0.4 < np.mean(masks[0, 1:] != masks[0, :-1]) < 0.6


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_scales_the_rest(rate):
    result = dropped((400, 250), rate)
    share = np.mean(result == 0.0)
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / result.size)
    np.testing.assert_allclose(result[result != 0.0], 1 / (1 - rate), rtol=1e-6)


def test_dropout_draws_an_odd_number_of_independent_bits():
    masks = dropped((7, 3), 0.5) != 0.0, dropped((7001, 3), 0.5) != 0.0
    assert masks[0].shape == (7, 3)
    flat = masks[1].ravel()
    assert 0.48 < np.mean(flat[1:] != flat[:-1]) < 0.52


def test_dropout_multiplies_values_and_gradients_by_the_mask():
    x = tf.random.stateless_normal([8, 30], SEED)
    layer = Dropout(0.5, timesteps=2, name="here")
    with dropout_seed(tf.constant(SEED)), tf.GradientTape() as tape:
        tape.watch(x)
        result = layer(x, training=True)
    mask = dropped((8, 30), timesteps=2)
    assert_equal(result, x * mask)
    assert_equal(tape.gradient(result, x), mask)


def test_dropout_keeps_bfloat16():
    with dropout_seed(tf.constant(SEED)):
        result = Dropout(0.5, name="here")(tf.ones([41, 49], tf.bfloat16), training=True)
    assert result.dtype == tf.bfloat16
    assert_equal(result, dropped())


@pytest.mark.parametrize("arguments", [{"training": False}, {"training": None}, {}])
def test_dropout_is_identity_in_evaluation_and_needs_no_seed(arguments):
    x = tf.random.stateless_normal([4, 6], SEED)
    assert_equal(Dropout(0.5)(x, **arguments), x)


def test_dropout_of_rate_zero_is_identity_and_needs_no_seed():
    x = tf.random.stateless_normal([4, 6], SEED)
    assert_equal(Dropout(0.0)(x, training=True), x)


def test_dropout_without_seed_says_what_is_missing():
    with pytest.raises(ValueError, match=r"layer here: .* within dropout_seed"):
        Dropout(0.5, name="here")(tf.ones([2, 2]), training=True)


def test_dropout_seed_ends_with_its_context():
    with pytest.raises(RuntimeError), dropout_seed(tf.constant([1, 1])):
        raise RuntimeError
    with pytest.raises(ValueError, match="dropout_seed"):
        Dropout(0.5)(tf.ones([2, 2]), training=True)
    with dropout_seed(tf.constant(SEED)):
        with dropout_seed(tf.constant([1, 1])):
            pass
        assert_equal(Dropout(0.5, name="here")(tf.ones([41, 49]), training=True), dropped())


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_dropout_compiled_equals_eager_with_one_trace_for_all_seeds(jit_compile):
    layer = Dropout(0.5, name="here")

    @tf.function(jit_compile=jit_compile)
    def compiled(x, step):
        with dropout_seed(tf.stack([SEED[0], step])):
            return layer(x, training=True)

    for step in (3, 4):
        assert_equal(compiled(tf.ones([41, 49]), tf.constant(step)), dropped(seed=(SEED[0], step)))
    assert compiled.experimental_get_tracing_count() == 1


def small_snn():
    """A functional model of every layer, with parameters that are not the initial ones."""
    image = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(image)
    x = LIF(3, constant_input=True, use_bias=True, surrogate="arctan", name="first")(x)
    x = keras.layers.AveragePooling2D(2)(Dropout(0.25, 3, name="dropout")(x))
    x = keras.layers.Dense(5, use_bias=False)(keras.layers.Flatten()(x))
    x = QuantisedReLU(4, name="clipped")(x)
    x = LIF(3, implementation="rnn", surrogate_scale=0.5, initial_membrane=0.25, name="second")(x)
    model = keras.Model(image, ReadOut(3, name="read_out")(keras.layers.Dense(3, use_bias=False)(x)))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.set_weights([rng.uniform(0.1, 0.4, w.shape) for w in layer.get_weights()])
    return model


def test_model_of_all_layers_survives_saving(tmp_path):
    model = small_snn()
    model.save(tmp_path / "snn.keras")
    loaded = keras.models.load_model(tmp_path / "snn.keras")
    for name in ("first", "second", "clipped", "dropout", "read_out"):
        assert loaded.get_layer(name).get_config() == model.get_layer(name).get_config()
    first, second = (loaded.get_layer(name).cell.surrogate for name in ("first", "second"))
    assert (first, second) == (Surrogate("arctan", 0.3), Surrogate("triangle", 0.5))
    assert loaded.get_layer("second").cell.initial_membrane == 0.25
    for ours, theirs in zip(loaded.weights, model.weights, strict=True):
        assert_equal(ours, theirs)
    images = tf.random.stateless_uniform([4, 6, 6, 2], SEED)
    for training in (False, True):
        with dropout_seed(tf.constant(SEED)):
            expected = model(images, training=training)
            assert_equal(loaded(images, training=training), expected)
        assert np.abs(expected).max() > 0.0
    cell = loaded.get_layer("second").cell
    gradients = [(tf.constant(1e3), v) for v in (cell.leak, cell.v_th)]
    keras.optimizers.legacy.SGD(1.0).apply_gradients(gradients)
    assert float(cell.leak) == float(cell.v_th) == np.float32(1e-3)


def test_model_of_all_layers_compiled_equals_eager():
    model = small_snn()
    images = tf.random.stateless_uniform([4, 6, 6, 2], SEED)
    with dropout_seed(tf.constant(SEED)):
        expected = model(images, training=True)
        for jit_compile in (False, True):
            compiled = tf.function(lambda x: model(x, training=True), jit_compile=jit_compile)
            np.testing.assert_allclose(compiled(images), expected, rtol=TOLERANCE)


def test_model_traces_once_per_input_shape():
    compiled = tf.function(small_snn())
    for batch in (4, 4, 2, 4, 2):
        assert compiled(tf.zeros([batch, 6, 6, 2])).shape == (batch, 3)
    assert compiled.experimental_get_tracing_count() == 2


@pytest.mark.parametrize("word", ["auto", "nativ", ""])
def test_implementation_that_there_is_not_is_refused(word):
    said = f"^implementation is '{word}'; allowed are native, fused, plain, rnn$"
    with pytest.raises(ValueError, match=said):
        LIF(2, implementation=word)
    with pytest.raises(ValueError, match=said):
        use_implementation(keras.Sequential([LIF(2)]), word)
