"""Conversion: thresholds against a walk in NumPy, and rates that tend to the ANN's activations."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import tf_keras as keras
from small_networks import scramble
from spiking_oracle import Flatten, Neurons, Pool, Synapses

from snn_tf import conversion, copies, models
from snn_tf.config import Config
from snn_tf.data import DataSpec
from snn_tf.errors import UserError
from snn_tf.folding import fold
from snn_tf.graph import Graph, is_neuron
from snn_tf.initialisation import initialise
from snn_tf.layers import LIF, Dropout, QuantisedReLU, ReadOut

EXACT = Config(v_th_scale=1.0, calibration_percentile=100.0, calibration_timesteps=16)
SHORT, LONG = 20, 160


def convolution(x, name, filters, strides=1, size=3):
    settings = {"padding": "same", "use_bias": False, "name": name}
    return keras.layers.Conv2D(filters, size, strides, **settings)(x)


def relu(x, name):
    return keras.layers.ReLU(name=f"{name}_neuron")(x)


def standardised(shape):
    image = keras.Input(shape, dtype="uint8", name="image")
    channels = shape[-1]
    return image, keras.layers.Normalization(mean=[64.0] * channels, variance=[4096.0] * channels)(image)


def finished(image, x, seed):
    logits = keras.layers.Dense(3, use_bias=False, name="logits")(
        keras.layers.Flatten(name="features")(x)
    )
    model = keras.Model(image, ReadOut(name="read_out")(logits))
    initialise(model, seed)
    return model


def chain(seed=0):
    image, x = standardised((6, 6, 2))
    x = relu(convolution(x, "conv1", 4), "conv1")
    x = keras.layers.AveragePooling2D(2, name="pool1")(x)
    x = relu(convolution(x, "conv2", 5), "conv2")
    x = keras.layers.Dense(6, use_bias=False, name="dense3")(keras.layers.Flatten(name="flatten")(x))
    return finished(image, relu(x, "dense3"), seed)


def residual(seed=0):
    """A block with an identity shortcut, then one with a projected one, dropout between."""
    image, x = standardised((6, 6, 2))
    x = shortcut = Dropout(0.5, name="drop")(relu(convolution(x, "stem", 4), "stem"))
    x = relu(convolution(x, "same1", 4), "same1")
    x = keras.layers.Add(name="same_add")([convolution(x, "same2", 4), shortcut])
    x = shortcut = relu(x, "same2")
    x = relu(convolution(x, "half1", 6, strides=2), "half1")
    x = convolution(x, "half2", 6)
    x = keras.layers.Add(name="half_add")([x, convolution(shortcut, "shortcut", 6, 2, size=1)])
    return finished(image, relu(x, "half2"), seed)


def pooled_shortcut(seed=0):
    """The identity comes first in the addition, and through a pool."""
    image, x = standardised((6, 6, 2))
    x = keras.layers.AveragePooling2D(2, name="pool")(relu(convolution(x, "stem", 4), "stem"))
    branch = convolution(relu(convolution(x, "block1", 5), "block1"), "block2", 4)
    x = keras.layers.Add(name="add")([x, branch])
    return finished(image, relu(x, "block2"), seed)


def images(count, shape=(6, 6, 2), seed=0, top=256):
    return np.random.default_rng(seed).integers(0, top, (count, *shape)).astype(np.uint8)


def traced(model, batch):
    """The outputs of all neurons, and the current of the output layer at every step, by name."""
    chosen = {layer.name: layer.output for layer in model.layers if isinstance(layer, traced.kinds)}
    outputs = keras.Model(model.input, chosen | {"logits": model.get_layer("logits").output})(batch)
    return {name: x.numpy() for name, x in outputs.items()}


traced.kinds = (keras.layers.ReLU, QuantisedReLU, LIF)


def errors(ann, config, batch, steps):
    """By layer, over the first `steps`: max |s · rate − activation| over the largest activation."""
    converted = conversion.convert(ann, config, [batch])
    trains, activations = traced(converted.model, batch), traced(ann, batch)
    assert trains.keys() == activations.keys()
    found = {}
    for name, activation in activations.items():
        by_step = trains[name].reshape(config.timesteps, *activation.shape)
        scale, largest = converted.scales[name], np.abs(activation).max()
        assert largest > 0
        found[name] = [
            float(np.abs(scale * by_step[:t].mean(0) - activation).max() / largest) for t in steps
        ]
    return found


# --- rates tend to activations


@pytest.mark.parametrize("build", [chain, residual, pooled_shortcut])
def test_scaled_rates_and_logits_tend_to_the_anns_as_timesteps_grow(build):
    config = dataclasses.replace(EXACT, timesteps=LONG)
    found = errors(build(), config, images(3), (SHORT, LONG))
    assert len(found) >= 4
    for name, (short, long) in found.items():
        assert long < 0.08 and long < short / 5, name


@pytest.mark.parametrize("batch_norm", [False, True])
def test_resnet12_logits_and_every_rate_tend_to_the_anns(batch_norm):
    spec = DataSpec("noise", (8, 8, 3), 4, "none", (128.0,) * 3, (64.0,) * 3)
    config = dataclasses.replace(EXACT, network="resnet12", width=0.125, timesteps=128)
    config = dataclasses.replace(config, calibration_timesteps=48, batch_norm=batch_norm)
    ann = models.build(config, "relu", spec)
    initialise(ann, 0)
    scramble(ann, 4)
    found = errors(ann, config, images(2, (8, 8, 3)), (32, 128))
    assert len(found) == 12  # eleven layers of neurons, and the logits
    for name, (short, long) in found.items():
        assert long < 0.4 and long < 0.5 * short, name


def test_vgg5_with_batch_norm_tends_to_the_ann_as_timesteps_grow():
    spec = DataSpec("noise", (6, 6, 2), 3, "none", (64.0,) * 2, (64.0,) * 2)
    config = dataclasses.replace(EXACT, network="vgg5", width=0.02, timesteps=LONG, batch_norm=True)
    ann = models.build(config, "relu", spec)
    initialise(ann, 0)
    scramble(ann, 4)
    found = errors(ann, config, images(3), (SHORT, LONG))
    assert len(found) == 6
    for name, (short, long) in found.items():
        assert long < 0.08 and long < short / 4, name


def test_bias_currents_are_the_folded_biases_over_the_scale_of_the_current():
    """Of both branches where they meet; thresholds cover the current with its bias."""
    config = Config(network="resnet12", width=0.125, batch_norm=True, timesteps=2)
    config = dataclasses.replace(config, v_th_scale=1.0, calibration_percentile=100.0)
    spec = DataSpec("noise", (8, 8, 3), 4, "none", (128.0,) * 3, (64.0,) * 3)
    ann = models.build(config, "relu", spec)
    initialise(ann, 0)
    scramble(ann, 4)
    batch = images(3, (8, 8, 3))
    converted = conversion.convert(ann, config, [batch])
    plain = fold(ann)

    def bias(name):
        return plain.get_layer(name).bias.numpy()

    block, model, scales = "stage2_block1", converted.model, converted.scales
    both = (bias(f"{block}_conv2") + bias(f"{block}_shortcut")) / scales[f"{block}_add"]
    np.testing.assert_allclose(model.get_layer(f"{block}_conv2_neuron").bias_current, both, rtol=1e-4)
    first = model.get_layer("stem1_neuron")
    np.testing.assert_allclose(first.bias_current, bias("stem1"), rtol=1e-6)
    current = keras.Model(plain.input, plain.get_layer("stem1").output)(batch)
    assert float(first.cell.v_th) == pytest.approx(float(np.max(current)), rel=1e-5)
    assert not any(layer.use_bias for layer in model.layers if isinstance(layer, keras.layers.Conv2D))


def test_model_returns_the_sum_of_the_output_currents():
    config = dataclasses.replace(EXACT, timesteps=7)
    batch = images(3)
    model = conversion.convert(chain(), config, [batch]).model
    by_step = traced(model, batch)["logits"].reshape(7, 3, 3)
    np.testing.assert_allclose(model(batch), by_step.sum(0), rtol=1e-6)


# --- thresholds


def percentile(values, percent):
    """Linear between the two nearest ranks."""
    ordered = sorted(values.ravel().tolist())
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def calibrated(layers, batches, timesteps, percent):
    """v_th by name, layer after layer: trains are lists [batch][image][step] of maps."""
    trains = [
        [[(image / 64.0 - 1.0)] * timesteps for image in batch.astype(np.float64)] for batch in batches
    ]
    found = {}
    for layer in layers:
        if isinstance(layer, Neurons):
            layer.v_th = found[layer.name] = max(
                percentile(np.array([train[t] for train in batch]), percent)
                for batch, t in itertools.product(trains, range(timesteps))
            )
        step = layer.drive if isinstance(layer, Synapses) else layer.step
        for batch in trains:
            for train in batch:
                if isinstance(layer, Neurons):
                    layer.membrane = 0.0
                train[:] = [step(x) for x in train]
    return found


def oracle_of(ann):
    def synapses(name):
        kernel = ann.get_layer(name).kernel.numpy().astype(np.float64)
        return Synapses(name, kernel, kernel != 0)

    return [
        synapses("conv1"),
        Neurons("conv1_neuron", 0.0),
        Pool(),
        synapses("conv2"),
        Neurons("conv2_neuron", 0.0),
        Flatten(),
        synapses("dense3"),
        Neurons("dense3_neuron", 0.0),
    ]


def test_thresholds_are_those_of_a_walk_in_numpy():
    ann = chain(seed=3)
    batches = [images(3, seed=1, top=90), images(2, seed=2), images(3, seed=3, top=150)]
    config = Config(v_th_scale=1.0, calibration_percentile=90.0, calibration_timesteps=6, timesteps=2)
    converted = conversion.convert(ann, config, batches)
    expected = calibrated(oracle_of(ann), batches, 6, 90.0)
    assert list(expected) == ["conv1_neuron", "conv2_neuron", "dense3_neuron"]
    scale = 1.0
    for name, v_th in expected.items():
        cell = converted.model.get_layer(name).cell
        assert float(cell.v_th) == pytest.approx(v_th, rel=1e-5)
        assert float(cell.leak) == 1.0
        scale *= v_th
        assert converted.scales[name] == pytest.approx(scale, rel=1e-5)
    assert converted.scales["logits"] == converted.scales["dense3_neuron"]


def test_every_batch_and_every_step_can_set_a_threshold():
    """The brightest image decides the first layer; the second layer is silent at the first step."""
    ann = chain(seed=3)
    config = dataclasses.replace(EXACT, timesteps=2)
    dim, bright = images(2, seed=1, top=80), images(2, seed=2)
    v_th = [
        float(conversion.convert(ann, config, batches).model.get_layer("conv1_neuron").cell.v_th)
        for batches in ([bright, dim], [dim, bright], [dim])
    ]
    assert v_th[0] == v_th[1] > v_th[2]
    one_step = dataclasses.replace(config, calibration_timesteps=1)
    with pytest.raises(UserError, match="layer conv2_neuron"):
        conversion.convert(ann, one_step, [bright])


def test_v_th_scale_multiplies_all_thresholds_once_they_are_calibrated():
    ann = residual()
    plain, scaled = (
        conversion.convert(ann, dataclasses.replace(EXACT, v_th_scale=kappa, timesteps=2), [images(3)])
        for kappa in (1.0, 0.3)
    )
    assert plain.scales == scaled.scales
    thresholds = 0
    for one, other in zip(plain.model.weights, scaled.model.weights, strict=True):
        factor = 0.3 if one.name.endswith("v_th:0") else 1.0
        thresholds += factor != 1.0
        np.testing.assert_allclose(other.numpy(), factor * one.numpy(), rtol=1e-6)
    assert thresholds == 5


# --- trained clips


def quantised(ann, levels, share):
    """The ANN with rounded activations, a layer's clip being a share of its largest one on `images`."""

    def layer_of(layer):
        if isinstance(layer, keras.layers.ReLU):
            return QuantisedReLU(levels, name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(ann, clone_function=layer_of)
    copies.copy_weights(ann, copy)
    largest = {name: np.abs(values).max() for name, values in traced(ann, images(3)).items()}
    for layer in copy.layers:
        if isinstance(layer, QuantisedReLU):
            layer.clip.assign(share * largest[layer.name])
    return copy


HALF = Config(initial_membrane=0.5, v_th_scale=0.3)


@pytest.mark.parametrize("build", [chain, residual, pooled_shortcut])
def test_clips_are_the_scales_and_no_factor_is_put_to_thresholds(build):
    ann = quantised(build(), 4, 0.8)
    converted = conversion.convert(ann, dataclasses.replace(HALF, timesteps=4), [images(3)])
    graph = Graph.of(converted.model)
    for name, layer in graph.select(is_neuron).items():
        clip = float(ann.get_layer(name).clip)
        assert converted.scales[name] == pytest.approx(clip, rel=1e-5)
        (source,) = graph.inputs[name]
        assert float(layer.cell.v_th) == pytest.approx(clip / converted.scales[source], rel=1e-5)


@pytest.mark.parametrize("timesteps", [1, 4, 5])
def test_first_layer_fires_its_rounded_activations_exactly(timesteps):
    ann, batch = quantised(chain(), timesteps, 0.7), images(3)
    config = dataclasses.replace(HALF, timesteps=timesteps)
    converted = conversion.convert(ann, config, [batch])
    rate = traced(converted.model, batch)["conv1_neuron"].reshape(timesteps, 3, 6, 6, 4).mean(0)
    activation = traced(ann, batch)["conv1_neuron"]
    assert len(np.unique(rate)) == timesteps + 1
    np.testing.assert_allclose(converted.scales["conv1_neuron"] * rate, activation, rtol=1e-5)


@pytest.mark.parametrize("build", [chain, residual, pooled_shortcut])
def test_rates_tend_to_clipped_activations_as_levels_and_timesteps_grow(build):
    config = dataclasses.replace(HALF, timesteps=LONG)
    found = errors(quantised(build(), LONG, 0.8), config, images(3), (SHORT, LONG))
    for name, (short, long) in found.items():
        assert long < 0.08 and long < short / 3, name


# --- weights


def thinned(model, seed=5):
    """Sets two thirds of every kernel to 0."""
    rng = np.random.default_rng(seed)
    for variable in (weight for weight in model.weights if "kernel" in weight.name):
        variable.assign(variable * (rng.random(variable.shape) < 1 / 3))
    return model


@pytest.mark.parametrize("build", [chain, residual])
def test_zeros_stay_zeros_and_the_ann_stays_as_it_was(build):
    ann = thinned(build())
    before = ann.get_weights()
    converted = conversion.convert(ann, dataclasses.replace(EXACT, timesteps=2), [images(4)])
    for kept, variable in zip(before, ann.weights, strict=True):
        np.testing.assert_array_equal(variable.numpy(), kept)
        name = variable.name.split("/")[0]
        np.testing.assert_array_equal(converted.model.get_layer(name).kernel.numpy() != 0, kept != 0)


def test_only_kernels_before_an_addition_are_rescaled():
    """Beside an identity by v_th between the two; beside a projection to its scale."""
    ann = residual()
    converted = conversion.convert(ann, dataclasses.replace(EXACT, timesteps=2), [images(3)])
    v_th = {
        layer.name: float(layer.cell.v_th) for layer in converted.model.layers if isinstance(layer, LIF)
    }
    factors = {"same2": v_th["same1_neuron"], "half2": v_th["half1_neuron"]}
    for name in ("stem", "same1", "same2", "half1", "half2", "shortcut", "logits"):
        kernel = ann.get_layer(name).kernel.numpy() * factors.get(name, 1.0)
        np.testing.assert_allclose(converted.model.get_layer(name).kernel, kernel, rtol=1e-5)
    assert all(abs(factor - 1.0) > 0.01 for factor in factors.values())
    assert converted.scales["same_add"] == converted.scales["stem_neuron"]
    assert converted.scales["half_add"] == converted.scales["same2_neuron"]


def test_bias_current_starts_at_zero_and_changes_no_threshold():
    ann, batch = chain(), images(3)
    plain = dataclasses.replace(EXACT, timesteps=3)
    without = conversion.convert(ann, plain, [batch])
    with_bias = conversion.convert(ann, dataclasses.replace(plain, bias_current=True), [batch])
    assert not with_bias.model.get_layer("conv1_neuron").bias_current.numpy().any()
    assert with_bias.scales == pytest.approx(without.scales, rel=1e-6)


# --- sizes of weights


def rms_before(model, *synapses):
    kept = np.concatenate([model.get_layer(name).kernel.numpy().ravel() for name in synapses])
    return float(np.sqrt(np.mean(kept[kept != 0] ** 2)))


def biased_chain():
    model = chain()
    biased = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            layer.get_config() | ({"use_bias": True} if layer.name in ("conv1", "conv2") else {})
        ),
    )
    initialise(biased, 0)
    rng = np.random.default_rng(4)
    for name in ("conv1", "conv2"):
        biased.get_layer(name).bias.assign(rng.uniform(-0.1, 0.3, biased.get_layer(name).bias.shape))
    return biased


@pytest.mark.parametrize("build", [chain, biased_chain, residual])
def test_weights_brought_to_one_size_fire_the_same_spikes(build):
    ann, batch = thinned(build()), images(8)
    eager = dataclasses.replace(EXACT, timesteps=6, v_th_scale=0.3)
    before, after = (
        conversion.convert(ann, dataclasses.replace(eager, weight_rms=rms), [batch])
        for rms in (0.0, 0.02)
    )
    assert after.scales == before.scales
    one, other = traced(before.model, batch), traced(after.model, batch)
    assert all(np.array_equal(one[name], other[name]) for name in one) and one["logits"].any()
    assert all(0 < train.mean() < 1 for name, train in one.items() if name != "logits")
    synapses = {"half1": ["half1"], "half2": ["half2", "shortcut"], "same1": ["same1"]}
    if build is not residual:
        synapses = {"conv1": ["conv1"], "conv2": ["conv2"], "dense3": ["dense3"]}
    for neuron, names in synapses.items():
        ratios = rms_before(before.model, *names) / 0.02, rms_before(after.model, *names) / 0.02
        assert ratios[0] > 1.6 and 0.7 < ratios[1] < 1.42, neuron
        small, large = (
            model.get_layer(f"{neuron}_neuron").cell.v_th for model in (after.model, before.model)
        )
        mantissa, _ = np.frexp(np.float32(small) / np.float32(large))
        assert mantissa == 0.5, "not a power of two"


def test_weights_beside_an_identity_and_of_the_output_keep_their_size():
    ann = residual()
    one, other = (
        conversion.convert(ann, dataclasses.replace(EXACT, timesteps=2, weight_rms=rms), [images(3)])
        for rms in (0.0, 0.02)
    )
    for name in ("same2", "logits"):
        np.testing.assert_array_equal(
            one.model.get_layer(name).kernel, other.model.get_layer(name).kernel
        )
    same = [model.get_layer("same2_neuron").cell.v_th.numpy() for model in (one.model, other.model)]
    assert same[0] == same[1]


# --- what cannot be converted


def test_layer_whose_percentile_is_not_positive_is_named():
    ann = chain()
    kernel = ann.get_layer("dense3").kernel
    kernel.assign(-abs(kernel))
    with pytest.raises(
        UserError,
        match=r"^layer dense3_neuron: the 100th percentile .* or --calibration_timesteps$",
    ):
        conversion.convert(ann, dataclasses.replace(EXACT, timesteps=2), [images(3)])


def test_low_percentile_that_is_negative_is_refused_with_its_value():
    config = Config(calibration_percentile=1.0, calibration_timesteps=4)
    with pytest.raises(UserError, match=r"^layer conv1_neuron: the 1th percentile .* is -\d"):
        conversion.convert(chain(), config, [images(3)])


def test_identities_of_different_scales_cannot_be_added():
    image, x = standardised((6, 6, 2))
    first = relu(convolution(x, "first", 4), "first")
    second = relu(convolution(first, "second", 4), "second")
    x = relu(keras.layers.Add(name="add")([first, second]), "sum")
    with pytest.raises(UserError, match="first_neuron, second_neuron: added without weights"):
        conversion.convert(finished(image, x, 0), EXACT, [images(2)])
