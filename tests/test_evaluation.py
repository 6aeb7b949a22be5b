"""Evaluation: every example once, and activity and costs against a walk over every single spike."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from spiking_oracle import Count, Flatten, Neurons, Pool, Synapses, run

from snn_tf import copies, costs, evaluation, models, operations, pruning
from snn_tf.config import Config
from snn_tf.data import DataSpec, Split
from snn_tf.graph import inner
from snn_tf.layers import LIF, ReadOut

SHAPE = (10, 8, 2)
EXAMPLES, T, BATCH = 8, 4, 3
# Name, strides, padding, what the input carries.
CONVOLUTIONS = (
    ("conv1", (1, 1), "same", "image"),
    ("conv2", (1, 1), "valid", "spikes"),
    ("conv3", (2, 2), "same", "pooled"),
    ("conv4", (1, 1), "same", "spikes"),
    ("conv5", (1, 1), "same", "pooled"),
)
SOURCES = {name: source for name, _, _, source in CONVOLUTIONS} | {
    "dense6": "spikes",
    "logits": "spikes",
}
NEURONS = {"conv1": (10, 8, 3), "conv2": (8, 6, 4), "conv3": (2, 2, 5), "conv4": (2, 2, 3)}
NEURONS |= {"conv5": (1, 1, 4), "dense6": (6,)}


def ann():
    """Maps of 10×8, 8×6, 4×3 after a pool, 2×2, and 1×1 after another."""
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    x = keras.layers.Normalization(mean=[64.0, 64.0], variance=[4096.0, 4096.0])(image)
    for name, strides, padding, source in CONVOLUTIONS:
        if source == "pooled":
            x = keras.layers.AveragePooling2D(2)(x)
        filters = NEURONS[name][-1]
        x = keras.layers.Conv2D(filters, 3, strides, padding, use_bias=False, name=name)(x)
        x = keras.layers.ReLU(name=f"{name}_neuron")(x)
    x = keras.layers.Dense(6, use_bias=False, name="dense6")(keras.layers.Flatten()(x))
    x = keras.layers.ReLU(name="dense6_neuron")(x)
    logits = keras.layers.Dense(3, use_bias=False, name="logits")(x)
    model = keras.Model(image, ReadOut(name="read_out")(logits))
    rng = np.random.default_rng(32)
    for variable in model.weights:
        fan_in, mean = np.prod(variable.shape[:-1]), 0.0 if "logits" in variable.name else 0.3
        # A grid of 1/16: all currents and membranes are exact in float32, in any order of summation.
        variable.assign(np.round(rng.normal(mean, 1.0, variable.shape) * 32 / np.sqrt(fan_in)) / 16)
    return model


def spiking(timesteps=T, v_th=0.5, leak=0.5):
    """The SNN of `ann`, wrapped, with random masks."""
    model = copies.spiking(ann(), Config(timesteps=timesteps))
    for layer in model.layers:
        if isinstance(layer, LIF):
            layer.cell.v_th.assign(v_th)
            layer.cell.leak.assign(leak)
    rng = np.random.default_rng(6)
    masks = {name: rng.random(mask.shape) < 0.6 for name, mask in pruning.masks(model).items()}
    return pruning.wrap(model, masks)


def split(count=EXAMPLES):
    rng = np.random.default_rng(7)
    brightest = rng.integers(40, 256, (count, 1, 1, 1))
    images = (rng.random((count, *SHAPE)) * brightest).astype(np.uint8)
    return Split(images, rng.integers(0, 3, count).astype(np.int32))


def chain_of(model):
    """The same network for the walk."""
    layers = {inner(layer).name: layer for layer in model.layers}
    masks = pruning.masks(model)

    def pair(name, strides=(1, 1), padding="same"):
        kernel = inner(layers[name]).kernel.numpy().astype(np.float64)
        yield Synapses(name, kernel, masks[name], strides, padding)
        if f"{name}_neuron" in layers:
            cell = layers[f"{name}_neuron"].cell
            yield Neurons(f"{name}_neuron", float(cell.v_th), float(cell.leak))

    chain = []
    for name, strides, padding, source in CONVOLUTIONS:
        chain += [*([Pool()] if source == "pooled" else []), *pair(name, strides, padding)]
    return [*chain, Flatten(), *pair("dense6"), *pair("logits")]


@dataclasses.dataclass
class Case:
    model: keras.Model
    result: evaluation.Evaluation
    walks: list
    counts: dict

    @property
    def costs(self):
        neurons = sum(self.result.neurons.values())
        layers = evaluation.synapses(self.model)
        return costs.snn_costs(layers, self.result.activities, self.result.timesteps, neurons)


@pytest.fixture(scope="module")
def case():
    model, examples, counts = spiking(), split(), {}
    images = examples.images.astype(np.float64) / 64 - 1
    walks = [run(chain_of(model), image, T, counts) for image in images]
    return Case(
        model, evaluation.Evaluator(model, BATCH, activities=True).evaluate(examples), walks, counts
    )


# --- what is counted


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8, 100])
def test_every_example_is_counted_once_whatever_the_batch(batch_size, case):
    examples = split()
    result = evaluation.Evaluator(case.model, batch_size, activities=True).evaluate(examples)
    assert result.num_examples == EXAMPLES
    np.testing.assert_array_equal(
        result.confusion.sum(axis=1), np.bincount(examples.labels, minlength=3)
    )
    np.testing.assert_array_equal(result.confusion, case.result.confusion)
    assert result.spikes == case.result.spikes
    for name, activity in result.activities.items():
        np.testing.assert_array_equal(activity.total, case.result.activities[name].total)


def test_confusion_and_accuracy_are_those_of_the_walks_logits(case):
    expected = np.zeros((3, 3), int)
    for label, walk in zip(split().labels, case.walks, strict=True):
        expected[label, walk.logits.argmax()] += 1
    np.testing.assert_array_equal(case.result.confusion, expected)
    assert case.result.accuracy == np.trace(expected) / EXAMPLES
    right = [walk.logits.argmax() == y for y, walk in zip(split().labels, case.walks, strict=True)]
    assert case.result.correct.tolist() == right and 0 < sum(right) < EXAMPLES
    assert np.count_nonzero(expected.sum(0)) > 1 and (expected != expected.T).any()


def test_spikes_and_rates_are_those_of_the_walk(case):
    sizes = {f"{name}_neuron": int(np.prod(shape)) for name, shape in NEURONS.items()}
    assert case.result.neurons == sizes
    assert case.result.timesteps == T
    total = 0.0
    for name, size in sizes.items():
        spikes = sum(walk.spikes[name].sum() for walk in case.walks) / EXAMPLES
        assert case.result.spikes[name] == spikes
        assert case.result.spike_rates()[name] == pytest.approx(spikes / size / T, rel=1e-12)
        assert 0 < spikes < size * T, "a layer that never or always fires shows little"
        total += spikes
    assert case.result.spikes_per_neuron() == pytest.approx(total / sum(sizes.values()), rel=1e-12)


def test_activities_are_the_walks_inputs_place_by_place(case):
    assert list(case.result.activities) == [name for name in SOURCES if name != "conv1"]
    for name, activity in case.result.activities.items():
        inputs = np.array([walk.inputs[name] for walk in case.walks])
        np.testing.assert_array_equal(activity.total, inputs.sum(axis=1).mean(axis=0))
        np.testing.assert_array_equal(activity.nonzero, (inputs != 0).sum(axis=1).mean(axis=0))
    assert (case.result.activities["conv3"].total != case.result.activities["conv3"].nonzero).any()


# --- what it costs


def variant(row, convention, name="default"):
    return row["conventions"][convention]["variants"][name]


def test_accumulates_are_the_taps_that_spikes_walk_through(case):
    for row in case.costs["layers"][1:]:
        count = case.counts[row["name"]]
        assert count.value_exact > 0
        assert variant(row, "exact")["acs"] == count.value_exact / EXAMPLES
        padded = float(count.value_padded / EXAMPLES)
        assert variant(row, "padded")["acs"] == pytest.approx(padded, rel=1e-12)
        assert variant(row, "exact")["macs"] == variant(row, "padded")["macs"] == 0


def test_pooled_inputs_as_macs_are_the_taps_of_nonzero_inputs(case):
    for row in case.costs["layers"][1:]:
        if SOURCES[row["name"]] == "pooled":
            count = case.counts[row["name"]]
            exact, padded = (variant(row, c, "pooled_as_macs") for c in ("exact", "padded"))
            assert exact["macs"] == count.nonzero_exact / EXAMPLES
            assert padded["macs"] == pytest.approx(float(count.nonzero_padded / EXAMPLES), rel=1e-12)
            assert exact["acs"] == padded["acs"] == 0


def test_image_costs_the_taps_of_one_pass(case):
    count = Count()
    chain_of(case.model)[0].drive(np.ones(SHAPE), count)
    row = case.costs["layers"][0]
    for convention, taps in (("exact", count.nonzero_exact), ("padded", count.nonzero_padded)):
        assert variant(row, convention)["macs"] == taps
        assert variant(row, convention, "image_every_step")["macs"] == T * taps
        assert variant(row, convention)["acs"] == 0
    assert count.nonzero_exact < count.nonzero_padded


def test_every_neuron_firing_at_every_step_costs_timesteps_times_macs():
    model = spiking(v_th=1e-3, leak=1.0)
    for layer in model.layers:
        for variable in layer.trainable_weights:
            if variable.shape.rank > 1:
                variable.assign(abs(variable) + 1 / 16)
    examples = Split(np.full((2, *SHAPE), 200, np.uint8), np.zeros(2, np.int32))
    result = evaluation.Evaluator(model, 2, activities=True).evaluate(examples)
    assert set(result.spike_rates().values()) == {1.0}
    layers = evaluation.synapses(model)
    record = costs.snn_costs(layers, result.activities, T, 1)
    one_pass = costs.ann_costs(layers)
    for convention in operations.CONVENTIONS:
        for row, dense in zip(record["layers"][1:], one_pass["layers"][1:], strict=True):
            macs = variant(dense, convention)["macs"]
            assert variant(row, convention)["acs"] == pytest.approx(T * macs, rel=1e-12)


def test_network_that_never_fires_costs_its_image_alone():
    model = spiking(v_th=1e6)
    result = evaluation.Evaluator(model, BATCH, activities=True).evaluate(split())
    assert set(result.spikes.values()) == {0.0} and result.spikes_per_neuron() == 0.0
    record = costs.snn_costs(evaluation.synapses(model), result.activities, T, 1)
    for convention, name in itertools.product(operations.CONVENTIONS, ("default", "pooled_as_macs")):
        image = variant(record["layers"][0], convention)
        assert variant(record, convention, name) == image
        assert image["acs"] == 0 and image["macs"] > 0


def test_spikes_are_counted_beyond_what_float32_can_count():
    side, steps = 2367, 3
    image = keras.Input((side, side, 1), dtype="uint8")
    currents = keras.layers.Rescaling(1.0)(image)
    spikes = LIF(steps, constant_input=True, name="neuron")(currents)
    means = keras.layers.GlobalAveragePooling2D()(spikes)
    model = keras.Model(image, ReadOut(steps)(means))
    examples = Split(np.full((1, side, side, 1), 2, np.uint8), np.zeros(1, np.int32))
    result = evaluation.Evaluator(model, 1).evaluate(examples)
    assert result.spikes["neuron"] == side**2 * steps > 2**24
    assert float(np.float32(side**2 * steps)) != side**2 * steps


# --- which network is what


def test_snn_of_one_step_counts_as_an_snn():
    model = spiking(timesteps=1)
    assert evaluation.is_spiking(model) and evaluation.timesteps_of(model) == 1
    result = evaluation.Evaluator(model, BATCH, activities=True).evaluate(split())
    assert set(result.activities) == set(SOURCES) - {"conv1"}
    assert result.timesteps == 1 and result.spikes["conv1_neuron"] > 0


def test_ann_has_accuracy_and_activity_but_no_spikes():
    model, examples = ann(), split()
    result = evaluation.Evaluator(model, BATCH, activities=True).evaluate(examples)
    guesses = model(examples.images).numpy().argmax(axis=1)
    assert result.accuracy == np.mean(guesses == examples.labels)
    assert (result.timesteps, result.spikes) == (1, {})
    assert set(result.activities) == set(SOURCES) - {"conv1"}
    assert not evaluation.is_spiking(model) and evaluation.timesteps_of(model) == 1
    assert result.neurons["conv2_neuron"] == 8 * 6 * 4


def test_zeros_skipped_are_the_products_without_a_zero_of_the_mask_or_the_activation():
    """Convolutions of zeros and ones count them one by one; the image's zeros are not skipped."""
    rng = np.random.default_rng(9)
    masks = {name: rng.random(mask.shape) < 0.6 for name, mask in pruning.masks(ann()).items()}
    model, examples = pruning.wrap(ann(), masks), split()
    activities = evaluation.Evaluator(model, BATCH, activities=True).evaluate(examples).activities
    record = costs.ann_costs(evaluation.synapses(model), activities=activities)
    for row, (name, strides, padding, source) in zip(record["layers"], CONVOLUTIONS, strict=False):
        layer = next(layer for layer in model.layers if inner(layer).name == name)
        inputs = keras.Model(model.input, layer.input)(examples.images).numpy()
        charged = np.float64((inputs != 0) | (source == "image"))
        met = tf.nn.conv2d(charged, np.float64(masks[name]), strides, padding.upper())
        counted = variant(row, "exact", "zeros_skipped")
        assert counted["macs"] == pytest.approx(np.sum(met) / EXAMPLES, rel=1e-12)
    for convention in operations.CONVENTIONS:
        total = variant(record, convention, "zeros_skipped")
        rows = [variant(row, convention, "zeros_skipped") for row in record["layers"]]
        assert total["macs"] == pytest.approx(sum(row["macs"] for row in rows))
        assert total["macs"] < variant(record, convention)["macs"]
        assert total["energy_pj"]["fp32_45nm"] == pytest.approx(4.6 * total["macs"])


def test_activities_are_measured_only_if_asked_for(case):
    result = evaluation.Evaluator(case.model, BATCH).evaluate(split())
    assert not result.activities and result.spikes == case.result.spikes
    np.testing.assert_array_equal(result.correct, case.result.correct)


def test_wrapped_and_plain_models_evaluate_alike(case):
    plain = evaluation.Evaluator(pruning.unwrap(case.model), BATCH, activities=True).evaluate(split())
    np.testing.assert_array_equal(plain.confusion, case.result.confusion)
    assert plain.spikes == case.result.spikes


# --- synapses as the cost functions want them


def test_synapses_tell_source_strides_padding_and_mask(case):
    found = {s.name: s for s in evaluation.synapses(case.model)}
    assert {name: s.source for name, s in found.items()} == SOURCES
    for name, strides, padding, _ in CONVOLUTIONS:
        assert (found[name].strides, found[name].padding) == (strides, padding)
        assert found[name].output_shape == NEURONS[name]
    assert found["conv3"].input_shape == (4, 3, 4) and found["conv5"].input_shape == (1, 1, 3)
    assert found["dense6"].input_shape == (4,) and found["logits"].output_shape == (3,)
    for name, mask in pruning.masks(case.model).items():
        np.testing.assert_array_equal(found[name].mask, mask)
        assert 0 < Fraction(int(mask.sum()), mask.size) < 1


def test_synapses_of_a_plain_model_are_all_active():
    assert all(s.mask.all() for s in evaluation.synapses(ann()))


def test_synapses_of_a_resnet_know_what_reaches_them():
    spec = DataSpec("noise", (8, 8, 3), 4, "none", (128.0,) * 3, (64.0,) * 3)
    model = models.build(Config(network="resnet12", width=0.125), "relu", spec)
    found = {s.name: s for s in evaluation.synapses(model)}
    sources = {name: s.source for name, s in found.items()}
    assert sources.pop("stem1") == "image"
    assert sources.pop("stage1_block1_conv1") == "pooled"
    assert set(sources.values()) == {"spikes"}
    shortcut = found["stage2_block1_shortcut"]
    assert (shortcut.strides, shortcut.input_shape, shortcut.output_shape) == (
        (2, 2),
        (4, 4, 8),
        (2, 2, 16),
    )


def test_dense_layer_on_the_image_reads_the_image():
    image = keras.Input((2, 2, 1), dtype="uint8", name="image")
    x = keras.layers.Flatten()(keras.layers.Normalization(mean=[0.0], variance=[1.0])(image))
    x = keras.layers.ReLU(name="neuron")(keras.layers.Dense(3, use_bias=False, name="dense")(x))
    model = keras.Model(image, ReadOut()(keras.layers.Dense(2, use_bias=False, name="logits")(x)))
    assert [s.source for s in evaluation.synapses(model)] == ["image", "spikes"]


def test_predictor_gives_the_logits_of_any_number_of_images_from_one_trace():
    model = spiking()
    images = np.random.default_rng(3).integers(0, 256, (8, *SHAPE), np.uint8)
    predict = evaluation.predictor(model)
    whole = predict(images).numpy()
    np.testing.assert_array_equal(whole, model(images).numpy())
    assert len(np.unique(whole)) > 3
    for count in (1, 3, 7):
        np.testing.assert_array_equal(predict(images[:count]).numpy(), whole[:count])
    assert predict.experimental_get_tracing_count() == 1
