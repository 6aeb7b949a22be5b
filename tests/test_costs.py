"""Costs against walks over every neuron and every tap, published totals and identities."""

import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_tf.costs import ENERGY, VARIANTS, ann_costs, snn_costs
from snn_tf.operations import CONVENTIONS, Activity, Synapses, acs, macs, nonzero_macs, taps

VGG16 = [64, 64, "P", 128, 128, "P", 256, 256, 256, "P", 512, 512, 512, "P", 512, 512, 512]


def outputs(size, kernel, stride, padding):
    return len(range(0, size, stride)) if padding == "same" else len(range(0, size - kernel + 1, stride))


def synapses(mask, height, width, strides=(1, 1), padding="same", source="spikes", name="conv"):
    kh, kw, cin, cout = mask.shape
    out = (outputs(height, kh, strides[0], padding), outputs(width, kw, strides[1], padding), cout)
    return Synapses(name, mask, (height, width, cin), out, strides, padding, source)


def product(mask, source="spikes", name="product"):
    return Synapses(name, mask, mask.shape[:1], mask.shape[1:], source=source)


def random_mask(shape, seed, density=0.4):
    return np.random.default_rng(seed).random(shape) < density


def front(size, kernel, stride, padding):
    """Zeros in front of an axis, by the two cases of TensorFlow's guide."""
    if padding == "valid":
        return 0
    return max(0, kernel - (stride if size % stride == 0 else size % stride)) // 2


def walk(layer):
    """Every tap with an active weight: its input position and whether it lies inside the map."""
    if layer.mask.ndim == 2:
        for c, o in itertools.product(*map(range, layer.mask.shape)):
            if layer.mask[c, o]:
                yield (c,), True
        return
    height, width, _ = layer.input_shape
    kh, kw, cin, cout = layer.mask.shape
    top = front(height, kh, layer.strides[0], layer.padding)
    left = front(width, kw, layer.strides[1], layer.padding)
    rows, columns, _ = layer.output_shape
    for y, x, i, j in itertools.product(range(rows), range(columns), range(kh), range(kw)):
        h, w = y * layer.strides[0] + i - top, x * layer.strides[1] + j - left
        for c, o in itertools.product(range(cin), range(cout)):
            if layer.mask[i, j, c, o]:
                yield (h, w, c), 0 <= h < height and 0 <= w < width


def walked_taps(layer):
    met = np.zeros(layer.input_shape, int)
    for position, inside in walk(layer):
        if inside:
            met[position] += 1
    return met


def padded_charge(layer, channel):
    """What a spike costs in the padded convention, from the weights that leave its channel."""
    leaving = sum(bool(m) for m in layer.mask[..., channel, :].ravel())
    ratio = Fraction(1)
    for out, size in zip(layer.output_shape[:-1], layer.input_shape[:-1], strict=True):
        ratio *= Fraction(out, size)
    return leaving * ratio


def activity_of(train):
    """From [T, N, ...]: sums over time, means over images."""
    return Activity(total=train.sum(0).mean(0), nonzero=(train != 0).sum(0).mean(0))


@st.composite
def convolutions(draw, paddings=("same", "valid"), largest_stride=3):
    kh, kw = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2, 3, 5]))
    padding = draw(st.sampled_from(paddings))
    smallest = (1, 1) if padding == "same" else (kh, kw)
    height, width = (draw(st.integers(low, low + 6)) for low in smallest)
    shape = (kh, kw, draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    mask = random_mask(shape, draw(st.integers(0, 10**6)), draw(st.sampled_from([0.1, 0.5, 1.0])))
    strides = (draw(st.integers(1, largest_stride)), draw(st.integers(1, largest_stride)))
    return synapses(mask, height, width, strides, padding)


CASES = [
    synapses(random_mask((3, 3, 2, 3), 0), 4, 5),
    synapses(random_mask((3, 3, 2, 3), 1), 5, 4, (2, 2)),
    synapses(random_mask((3, 3, 2, 3), 2), 6, 6, (2, 2)),
    synapses(random_mask((5, 5, 2, 2), 3), 7, 8, (3, 3)),
    synapses(random_mask((5, 5, 1, 2), 4), 2, 2),
    synapses(random_mask((3, 3, 3, 2), 5), 1, 1),
    synapses(random_mask((1, 1, 3, 4), 6), 5, 5, (2, 2)),
    synapses(random_mask((3, 3, 2, 2), 7), 6, 5, (1, 1), "valid"),
    synapses(random_mask((3, 3, 2, 2), 8), 7, 8, (2, 3), "valid"),
    product(random_mask((6, 5), 9)),
]


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_exact_taps_equal_a_walk_over_all_taps(layer):
    np.testing.assert_array_equal(taps(layer, "exact"), walked_taps(layer))


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_macs_equal_the_walks_taps_without_and_with_padding(layer):
    walked = [inside for _, inside in walk(layer)]
    assert macs(layer, "exact") == sum(walked)
    assert macs(layer, "padded") == len(walked)


def test_product_taps_are_the_active_weights_of_each_input():
    layer = product(np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], bool))
    for convention in CONVENTIONS:
        assert taps(layer, convention).tolist() == [2, 0, 3]
        assert macs(layer, convention) == 5


@pytest.mark.parametrize("layer", CASES)
def test_acs_equal_accumulates_counted_one_by_one(layer):
    steps, images = 3, 2
    spikes = np.random.default_rng(11).random((steps, images, *layer.input_shape)) < 0.3
    exact = padded = 0
    for step, image in itertools.product(range(steps), range(images)):
        exact += sum(inside and spikes[(step, image, *position)] for position, inside in walk(layer))
        for position in np.argwhere(spikes[step, image]):
            padded += padded_charge(layer, position[-1])
    activity = activity_of(spikes)
    assert exact > 0
    assert acs(layer, activity, "exact") == pytest.approx(exact / images, rel=1e-12)
    assert acs(layer, activity, "padded") == pytest.approx(float(padded / images), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.integers(1, 3), st.integers(1, 2), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_costs_of_any_activity_equal_a_walk_over_all_taps(layer, steps, images, rate, seed):
    rng = np.random.default_rng(seed)
    shape = (steps, images, *layer.input_shape)
    values = (rng.random(shape) < rate) * rng.integers(1, 5, shape) / 4
    taps = nonzero = padded = 0.0
    for step, image in itertools.product(range(steps), range(images)):
        for position, inside in walk(layer):
            value = values[(step, image, *position)] if inside else 0.0
            taps += value
            nonzero += value != 0
        for position in np.argwhere(values[step, image]):
            padded += values[(step, image, *position)] * float(padded_charge(layer, position[-1]))
    activity = activity_of(values)
    assert acs(layer, activity, "exact") == pytest.approx(taps / images, rel=1e-9)
    assert nonzero_macs(layer, activity, "exact") == pytest.approx(nonzero / images, rel=1e-9)
    assert acs(layer, activity, "padded") == pytest.approx(padded / images, rel=1e-9)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_counts_after_a_pool_equal_a_walk_over_rates_and_nonzero_inputs(padding):
    spikes = np.random.default_rng(12).random((4, 2, 8, 6, 2)) < 0.2
    pooled = spikes.reshape(4, 2, 4, 2, 3, 2, 2).mean(axis=(3, 5))
    assert set(np.unique(pooled)) >= {0, 0.25, 0.5}
    layer = synapses(random_mask((3, 3, 2, 3), 13), 4, 3, padding=padding, source="pooled")
    rate_taps = nonzero_taps = 0
    for step, image in itertools.product(range(4), range(2)):
        for position, inside in walk(layer):
            value = pooled[(step, image, *position)] if inside else 0
            rate_taps += value
            nonzero_taps += value != 0
    activity = activity_of(pooled)
    assert acs(layer, activity, "exact") == pytest.approx(rate_taps / 2, rel=1e-12)
    assert nonzero_macs(layer, activity, "exact") == pytest.approx(nonzero_taps / 2, rel=1e-12)
    assert rate_taps < nonzero_taps


def test_float32_activity_is_summed_in_double_precision():
    layer = product(np.ones((3, 1), bool))
    total = np.array([2.0**24, 1, 1], np.float32)
    assert acs(layer, Activity(total, total), "padded") == 2**24 + 2


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.integers(1, 7), st.sampled_from(CONVENTIONS))
def test_all_firing_at_every_step_costs_timesteps_times_macs(layer, timesteps, convention):
    always = np.full(layer.input_shape, timesteps)
    activity = Activity(always, always)
    expected = pytest.approx(timesteps * macs(layer, convention), rel=1e-12)
    assert acs(layer, activity, convention) == expected
    assert nonzero_macs(layer, activity, convention) == expected


@settings(max_examples=40, deadline=None)
@given(convolutions(paddings=("same",), largest_stride=1))
def test_padded_is_at_least_exact_for_stride_1_and_same_padding(layer):
    assert macs(layer, "padded") >= macs(layer, "exact")


def test_padded_exceeds_exact_by_the_rim_of_the_map():
    layer = synapses(np.ones((3, 3, 1, 1), bool), 4, 4)
    assert (macs(layer, "padded"), macs(layer, "exact")) == (144, 100)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_exact_taps_equal_tensorflows_gradient_of_a_convolution_of_ones(size, kernel, stride, padding):
    if padding == "valid" and size < kernel:
        with pytest.raises(ValueError, match="output_shape"):
            synapses(np.ones((kernel, kernel, 1, 1), bool), size, size, (stride, stride), padding)
        return
    import tensorflow as tf

    mask = random_mask((kernel, kernel, 2, 3), size)
    layer = synapses(mask, size, size + 1, (stride, stride), padding)
    ones = tf.ones((1, *layer.input_shape))
    with tf.GradientTape() as tape:
        tape.watch(ones)
        out = tf.nn.conv2d(ones, tf.cast(mask, tf.float32), stride, padding.upper())
    assert out.shape[1:] == layer.output_shape
    assert macs(layer, "exact") == tf.reduce_sum(out)
    np.testing.assert_array_equal(taps(layer, "exact"), tape.gradient(out, ones)[0])


def vgg(plan, head, size=32):
    """Dense VGG of 3x3 convolutions and a head of these widths; its masks take no memory."""
    layers, channels, source = [], 3, "image"
    for width in plan:
        if width == "P":
            size, source = size // 2, "pooled"
            continue
        mask = np.broadcast_to(np.True_, (3, 3, channels, width))
        layers.append(synapses(mask, size, size, source=source, name=f"conv{len(layers)}"))
        channels, source = width, "spikes"
    channels *= size * size
    for width in head:
        mask = np.broadcast_to(np.True_, (channels, width))
        layers.append(product(mask, source, name=f"dense{len(layers)}"))
        channels, source = width, "spikes"
    return layers


def test_vgg16_has_the_published_weights_and_macs():
    costs = ann_costs(vgg(VGG16, [4096, 4096, 10]))
    assert costs["weights"] == costs["active_weights"] == 39_917_248
    assert round(costs["macs"] / 1e6, 1) == 338.4
    assert round(costs["conventions"]["exact"]["one_pass_macs"] / 1e6, 1) == 272.5
    assert costs["energy_pj"]["fp32_45nm"] == pytest.approx(338.4e6 * 4.6, rel=1e-4)
    linear = ann_costs(vgg([*VGG16, "P"], [10]))
    assert round(linear["weights"] / 1e6, 2) == 14.72
    assert round(linear["macs"] / 1e6, 1) == 313.2


def small_network(density=0.4):
    """Image 6x6x3, convolution, convolution, pool, product onto 4 classes."""
    stem = synapses(random_mask((3, 3, 3, 4), 20, density), 6, 6, source="image", name="stem")
    body = synapses(random_mask((3, 3, 4, 2), 21, density), 6, 6, name="body")
    return [stem, body, product(random_mask((18, 4), 22, density), "pooled", name="head")]


def small_activities(layers, total, nonzero):
    return {
        s.name: Activity(np.full(s.input_shape, total), np.full(s.input_shape, nonzero)) for s in layers
    }


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_snn_variants_charge_image_and_pooled_inputs_as_named(convention):
    layers = small_network()
    stem, body, head = (macs(s, convention) for s in layers)
    costs = snn_costs(layers, small_activities(layers, total=1.5, nonzero=3.0), timesteps=5, neurons=9)
    variants = costs["conventions"][convention]["variants"]
    expected = {
        "default": (stem, 1.5 * (body + head)),
        "image_every_step": (5 * stem, 1.5 * (body + head)),
        "pooled_as_macs": (stem + 3 * head, 1.5 * body),
        "image_every_step_pooled_as_macs": (5 * stem + 3 * head, 1.5 * body),
    }
    assert set(variants) == set(VARIANTS)
    for name, (expected_macs, expected_acs) in expected.items():
        assert variants[name]["macs"] == pytest.approx(expected_macs, rel=1e-12)
        assert variants[name]["acs"] == pytest.approx(expected_acs, rel=1e-12)
        energy = variants[name]["energy_pj"]
        assert energy["fp32_45nm"] == pytest.approx(4.6 * expected_macs + 0.9 * expected_acs)
        assert energy["int32_45nm"] == pytest.approx(3.2 * expected_macs + 0.1 * expected_acs)
    assert costs["neuron_updates"] == 45


def test_plain_fields_are_the_padded_default():
    layers = small_network()
    costs = snn_costs(layers, small_activities(layers, 1.5, 3.0), timesteps=5, neurons=9)
    for record in (costs, *costs["layers"]):
        padded = record["conventions"]["padded"]
        default = padded["variants"]["default"]
        assert {key: record[key] for key in default} == default
        assert record["mac_density"] == padded["mac_density"]


def test_silent_network_costs_the_images_macs_only():
    layers = small_network()
    costs = snn_costs(layers, small_activities(layers, 0.0, 0.0), timesteps=5, neurons=9)
    for convention in CONVENTIONS:
        for name, variant in VARIANTS.items():
            counted = costs["conventions"][convention]["variants"][name]
            stem = macs(layers[0], convention)
            assert counted["macs"] == (5 * stem if variant.image_every_step else stem)
            assert counted["acs"] == 0
    assert [layer["acs"] for layer in costs["layers"]] == [0, 0, 0]


def test_always_firing_network_costs_timesteps_times_the_ann():
    layers = small_network()
    snn = snn_costs(layers, small_activities(layers, 5, 5), timesteps=5, neurons=9)
    ann = ann_costs(layers)
    for convention in CONVENTIONS:
        once = ann["conventions"][convention]["variants"]["default"]["macs"]
        for name in ("image_every_step", "image_every_step_pooled_as_macs"):
            counted = snn["conventions"][convention]["variants"][name]
            assert counted["macs"] + counted["acs"] == pytest.approx(5 * once, rel=1e-12)


def test_layers_of_the_record_add_up_to_the_network():
    layers = small_network()
    costs = snn_costs(layers, small_activities(layers, 1.5, 3.0), timesteps=5, neurons=9)
    rows = costs["layers"]
    assert [(r["name"], r["source"]) for r in rows] == [(s.name, s.source) for s in layers]
    for key in ("weights", "active_weights", "macs", "acs"):
        assert costs[key] == pytest.approx(sum(r[key] for r in rows), rel=1e-12)
    for model in ENERGY:
        assert costs["energy_pj"][model] == pytest.approx(sum(r["energy_pj"][model] for r in rows))
    assert [r["active_weights"] for r in rows] == [int(s.mask.sum()) for s in layers]
    assert [r["density"] for r in rows] == [s.mask.mean() for s in layers]


def test_density_1_equals_dense():
    costs = ann_costs(small_network(density=1.0))
    for record in (costs, *costs["layers"]):
        assert record["density"] == record["compression"] == record["mac_density"] == 1
        for convention in CONVENTIONS:
            counted = record["conventions"][convention]
            assert counted["one_pass_macs"] == counted["dense_macs"]
            assert counted["variants"]["default"]["macs"] == counted["dense_macs"]


def test_densities_count_weights_and_macs_each_over_the_dense_network():
    layers = small_network()
    costs = ann_costs(layers)
    active = sum(int(s.mask.sum()) for s in layers)
    weights = 108 + 72 + 72
    assert (costs["weights"], costs["density"]) == (weights, active / weights)
    assert costs["compression"] == pytest.approx(weights / active)
    one_pass = sum(len(list(walk(s))) for s in layers)
    assert costs["mac_density"] == pytest.approx(one_pass / (36 * 108 + 36 * 72 + 72))
    exact = costs["conventions"]["exact"]
    assert exact["one_pass_macs"] == sum(inside for s in layers for _, inside in walk(s))
    assert exact["mac_density"] == exact["one_pass_macs"] / exact["dense_macs"]
    assert exact["mac_density"] != costs["mac_density"]


def test_cut_network_has_the_uncut_network_as_denominator():
    uncut = [product(random_mask((8, 6), 30), name="a"), product(random_mask((6, 4), 31), name="b")]
    cut = [product(np.ones((8, 3), bool), name="a"), product(np.ones((3, 4), bool), name="b")]
    costs = ann_costs(cut, dense=uncut)
    assert (costs["weights"], costs["active_weights"], costs["macs"]) == (72, 36, 36)
    assert costs["density"] == costs["mac_density"] == 0.5
    assert [row["density"] for row in costs["layers"]] == [0.5, 0.5]
    activities = {s.name: Activity(np.ones(s.input_shape), np.ones(s.input_shape)) for s in cut}
    assert snn_costs(cut, activities, 4, 7, dense=uncut)["compression"] == 2


def test_layer_without_active_weights_has_no_compression():
    empty, rest = product(np.zeros((3, 2), bool), name="a"), product(np.ones((2, 3), bool), name="b")
    costs = ann_costs([empty, rest])
    assert [row["compression"] for row in costs["layers"]] == [None, 1.0]
    assert costs["compression"] == 2.0


def leaves(value):
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if children is None else [leaf for child in children for leaf in leaves(child)]


def test_records_hold_plain_values_and_survive_json():
    layers = small_network()
    activities = small_activities(layers, np.float32(1.5), np.float32(3))
    snn = snn_costs(layers, activities, timesteps=np.int64(5), neurons=np.int64(9))
    for record in (ann_costs(layers), snn):
        assert {type(leaf) for leaf in leaves(record)} <= {str, int, float}
        assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert type(snn["macs"]) is int


WRONG = {
    "mask of shape": {"mask": np.ones((3, 3, 5, 2), bool)},
    r"allowed are \[kh": {"mask": np.ones((4, 2), bool)},
    "output_shape is": {"output_shape": (6, 6, 3)},
    "padding is 'full'; allowed are same, valid": {"padding": "full"},
    "source is 'sound'; allowed are image, spikes, pooled": {"source": "sound"},
}


@pytest.mark.parametrize("message", WRONG)
def test_synapses_refuse_what_does_not_fit(message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small_network()[1], **WRONG[message])


def test_costs_refuse_missing_or_misshapen_activities_and_unknown_conventions():
    layers = small_network()
    activities = small_activities(layers, 1.0, 1.0)
    with pytest.raises(ValueError, match="missing for body"):
        snn_costs(layers, {"head": activities["head"]}, 5, 9)
    with pytest.raises(ValueError, match=r"body: an activity of shape \(18,\)"):
        snn_costs(layers, activities | {"body": activities["head"]}, 5, 9)
    with pytest.raises(ValueError, match="allowed are padded, exact"):
        taps(layers[0], "true")
    with pytest.raises(ValueError, match="same layers"):
        ann_costs(layers, dense=layers[:2])
