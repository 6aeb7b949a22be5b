"""Tests of `snn_tf.models`: the networks against their table, the SNN's graph, initialisation."""

import functools
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from small_networks import build, initialised, kernels, output_shapes, some_images, spec_of, weights_of

from snn_tf import copies, costs, evaluation, models
from snn_tf.ambient import dropout_seed
from snn_tf.config import Config
from snn_tf.errors import UsageError
from snn_tf.folding import fold
from snn_tf.graph import Graph, inner, is_neuron, is_norm, is_synapse, neuron_parameters
from snn_tf.initialisation import fit_clips, initialise
from snn_tf.layers import FIRST_CLIP, LIF, Dropout, QuantisedReLU, ReadOut
from snn_tf.pruning import wrap

VGG = {
    "vgg5": "64 P 128 128 P",
    "vgg9": "64 P 128 256 P 256 512 P 512 P 512",
    "vgg11": "64 P 128 256 P 512 512 P 512 P 512 512",
    "vgg13": "64 64 P 128 128 P 256 256 P 512 512 512 P 512",
    "vgg16": "64 64 P 128 128 P 256 256 256 P 512 512 512 P 512 512 512",
    "vgg19": "64 64 P 128 128 P 256 256 256 256 P 512 512 512 512 P 512 512 512 512",
}
RESNET = {"resnet12": [1, 1, 1, 1], "resnet20": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}
# Sums over the tables of kernel size times widths, at 32×32, three channels and ten classes.
WEIGHTS = {
    "vgg5": 50_595_520,
    "vgg9": 32_065_216,
    "vgg11": 36_193_984,
    "vgg13": 34_608_832,
    "vgg16": 39_917_248,
    "vgg19": 45_225_664,
    "resnet12": 4_986_560,
    "resnet20": 11_253_440,
    "resnet34": 21_354_176,
}


def vgg_table(network, side=32, head=(4096, 4096), linear=False):
    """(name, output shape) of every layer, written out from the row of widths and pools."""
    entries = VGG[network].split()
    if linear and side >> entries.count("P") >= 2:
        entries.append("P")
    yield from [("image", (side, side, 3)), ("standardise", (side, side, 3))]
    number = pools = width = 0
    for entry, following in itertools.zip_longest(entries, entries[1:]):
        if entry == "P":
            pools, side = pools + 1, side // 2
            yield f"pool{pools}", (side, side, width)
            continue
        number, width = number + 1, int(entry)
        parts = ("", "_neuron") if following == "P" else ("", "_neuron", "_dropout")
        yield from ((f"conv{number}{part}", (side, side, width)) for part in parts)
    yield "flatten", (side * side * width,)
    for units in () if linear else head:
        number += 1
        yield from ((f"dense{number}{part}", (units,)) for part in ("", "_neuron", "_dropout"))
    yield from [("logits", (10,)), ("read_out", (10,))]


def resnet_table(network, side=32):
    """(name, output shape) of every layer; a shortcut layer stands where the shape changes."""
    yield from [("image", (side, side, 3)), ("standardise", (side, side, 3))]
    for number, parts in enumerate(
        [("", "_neuron", "_dropout"), ("", "_neuron", "_dropout"), ("", "_neuron")], start=1
    ):
        yield from ((f"stem{number}{part}", (side, side, 64)) for part in parts)
    side, before = side // 2, 64
    yield "stem_pool", (side, side, 64)
    for stage, (width, blocks) in enumerate(
        zip((64, 128, 256, 512), RESNET[network], strict=True), start=1
    ):
        side = side if stage == 1 else side // 2
        for block in range(1, blocks + 1):
            parts = ["conv1", "conv1_neuron", "conv1_dropout", "conv2"]
            parts += ["shortcut"] if before != width else []
            for part in [*parts, "add", "conv2_neuron"]:
                yield f"stage{stage}_block{block}_{part}", (side, side, width)
            before = width
    yield from [("flatten", (side * side * 512,)), ("logits", (10,)), ("read_out", (10,))]


def table(network):
    return list(vgg_table(network) if network in VGG else resnet_table(network))


def recorded_macs(model):
    record = costs.ann_costs(evaluation.synapses(model))
    exact = record["conventions"]["exact"]["one_pass_macs"]
    return record["macs"], exact


@pytest.mark.parametrize("network", WEIGHTS)
def test_network_is_that_of_the_table(network):
    model = build(network)
    assert list(output_shapes(model).items()) == table(network)
    assert weights_of(model) == WEIGHTS[network] == model.count_params()
    rates = {layer.name: layer.rate for layer in model.layers if isinstance(layer, Dropout)}
    assert rates == {
        name: 0.5 if name.startswith("dense") else 0.2
        for name, _ in table(network)
        if name.endswith("_dropout")
    }


@pytest.mark.parametrize(
    ("network", "kernel", "strides"),
    [
        ("stem1", (3, 3, 3, 64), 1),
        ("stage1_block1_conv1", (3, 3, 64, 64), 1),
        ("stage2_block1_conv1", (3, 3, 64, 128), 2),
        ("stage2_block1_conv2", (3, 3, 128, 128), 1),
        ("stage2_block1_shortcut", (1, 1, 64, 128), 2),
        ("stage2_block2_conv1", (3, 3, 128, 128), 1),
        ("stage4_block1_shortcut", (1, 1, 256, 512), 2),
    ],
)
def test_resnet_convolution_has_kernel_and_strides(network, kernel, strides):
    layer = resnet20().get_layer(network)
    assert tuple(layer.kernel.shape) == kernel
    assert layer.strides == (strides, strides) and layer.padding == "same" and not layer.use_bias


@functools.cache
def resnet20():
    return build("resnet20")


def test_vgg16_costs_are_the_published_ones():
    model = build("vgg16")
    assert recorded_macs(model) == (338_403_328, 272_515_840)


def test_vgg16_with_linear_head_has_a_fifth_pool():
    model = build("vgg16", head="linear")
    assert list(output_shapes(model).items()) == list(vgg_table("vgg16", linear=True))
    assert weights_of(model) == 14_715_584
    assert recorded_macs(model)[0] == 313_201_664


@pytest.mark.parametrize(("side", "pools"), [(16, 4), (31, 4), (32, 5), (64, 5)])
def test_linear_head_has_its_pool_where_it_fits(side, pools):
    model = build("vgg9", image_shape=(side, 64, 3), head="linear", width=0.1)
    names = list(Graph.of(model).layers)
    assert sum(name.startswith("pool") for name in names) == pools
    last = "pool5" if pools == 5 else "conv7_dropout"
    assert names[-4:] == [last, "flatten", "logits", "read_out"]
    assert ("conv7_dropout" in names) == (pools == 4)


@pytest.mark.parametrize(
    ("width", "widths"),
    [
        (1.0, [64, 128, 256, 512, 4096]),
        (0.5, [32, 64, 128, 256, 2048]),
        (0.3, [16, 40, 80, 152, 1232]),
        (0.1, [8, 16, 24, 48, 408]),
        (0.01, [8, 8, 8, 8, 40]),
        (1.1, [72, 144, 280, 560, 4504]),
    ],
)
def test_width_is_rounded_to_multiples_of_eight(width, widths):
    shapes = output_shapes(build("vgg9", width=width, image_shape=(16, 16, 1), classes=7))
    names = ("conv1", "conv2", "conv3", "conv5", "dense8")
    assert [shapes[name][-1] for name in names] == widths
    assert shapes["dense9"] == shapes["dense8"] and shapes["logits"] == (7,)


def test_width_reaches_every_part_of_a_resnet():
    shapes = output_shapes(build("resnet12", width=0.25))
    assert {shapes[f"stem{number}"][-1] for number in (1, 2, 3)} == {16}
    for stage, width in enumerate((16, 32, 64, 128), start=1):
        assert {shapes[f"stage{stage}_block1_{part}"][-1] for part in ("conv1", "conv2", "add")} == {
            width
        }


@pytest.mark.parametrize(
    ("network", "image_shape", "last"),
    [
        ("vgg5", (8, 8, 1), (2, 2, 16)),
        ("vgg5", (4, 9, 3), (1, 2, 16)),
        ("vgg16", (16, 16, 1), (1, 1, 48)),
        ("vgg16", (33, 50, 3), (2, 3, 48)),
        ("vgg16", (64, 64, 3), (4, 4, 48)),
        ("resnet12", (8, 8, 1), (1, 1, 48)),
        ("resnet12", (2, 2, 3), (1, 1, 48)),
        ("resnet12", (15, 27, 1), (1, 2, 48)),
        ("resnet20", (64, 64, 3), (4, 4, 48)),
    ],
)
def test_network_takes_images_of_many_sizes(network, image_shape, last):
    model = initialised(network, image_shape=image_shape, classes=4, width=0.1)
    before_flatten = Graph.of(model).inputs["flatten"][0]
    assert output_shapes(model)[before_flatten] == last
    logits = model(some_images(2, image_shape)).numpy()
    assert logits.shape == (2, 4) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and np.ptp(logits) > 0


@pytest.mark.parametrize(
    ("network", "image_shape", "pool"),
    [
        ("vgg16", (8, 8, 1), "pool4"),
        ("vgg19", (64, 15, 3), "pool4"),
        ("vgg5", (3, 3, 3), "pool2"),
        ("resnet12", (1, 5, 1), "stem_pool"),
    ],
)
def test_pool_that_does_not_fit_is_told_with_network_and_image(network, image_shape, pool):
    with pytest.raises(UsageError) as error:
        build(network, image_shape=image_shape, width=0.1, dataset="digits")
    line = str(error.value)
    height, width, _ = image_shape
    for word in (f"--network={network}", pool, f"{height}×{width}", "--dataset=digits"):
        assert word in line
    assert "\n" not in line


def test_dropout_flags_set_the_rates():
    model = build("vgg5", image_shape=(8, 8, 1), width=0.1, dropout=0.3, head_dropout=0.6)
    rates = {layer.name: layer.rate for layer in model.layers if isinstance(layer, Dropout)}
    assert rates == {"conv2_dropout": 0.3, "dense4_dropout": 0.6, "dense5_dropout": 0.6}


def test_new_network_has_weights_of_zero():
    assert not any(kernel.any() for kernel in kernels(build("resnet12", width=0.1)).values())


# --- what the networks compute


def by_hand_vgg5(images, spec, w):
    x = (tf.cast(images, tf.float32) - spec.mean) / spec.std
    x = tf.nn.avg_pool2d(tf.nn.relu(tf.nn.conv2d(x, w["conv1"], 1, "SAME")), 2, 2, "VALID")
    x = tf.nn.relu(tf.nn.conv2d(x, w["conv2"], 1, "SAME"))
    x = tf.nn.avg_pool2d(tf.nn.relu(tf.nn.conv2d(x, w["conv3"], 1, "SAME")), 2, 2, "VALID")
    x = tf.nn.relu(tf.reshape(x, [len(images), -1]) @ w["dense4"])
    return tf.nn.relu(x @ w["dense5"]) @ w["logits"]


def by_hand_resnet12(images, spec, w):
    x = (tf.cast(images, tf.float32) - spec.mean) / spec.std
    for stem in ("stem1", "stem2", "stem3"):
        x = tf.nn.relu(tf.nn.conv2d(x, w[stem], 1, "SAME"))
    x = tf.nn.avg_pool2d(x, 2, 2, "VALID")
    for stage, strides in ((1, 1), (2, 2), (3, 2), (4, 2)):
        name = f"stage{stage}_block1"
        branch = tf.nn.relu(tf.nn.conv2d(x, w[f"{name}_conv1"], strides, "SAME"))
        branch = tf.nn.conv2d(branch, w[f"{name}_conv2"], 1, "SAME")
        shortcut = x if stage == 1 else tf.nn.conv2d(x, w[f"{name}_shortcut"], strides, "SAME")
        x = tf.nn.relu(branch + shortcut)
    return tf.reshape(x, [len(images), -1]) @ w["logits"]


@pytest.mark.parametrize(
    ("network", "by_hand"), [("vgg5", by_hand_vgg5), ("resnet12", by_hand_resnet12)]
)
def test_ann_computes_what_its_equations_say(network, by_hand):
    shape = (16, 18, 3)
    model = initialised(network, image_shape=shape, width=0.1)
    images = some_images(3, shape)
    expected = by_hand(images, spec_of(shape), kernels(model))
    np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-5)


def test_images_are_standardised_per_channel():
    spec = spec_of((4, 4, 2))
    spec = type(spec)("noise", (4, 4, 2), 3, "none", (100.0, 50.0), (20.0, 5.0))
    model = models.build(Config(network="vgg5", width=0.1), "relu", spec)
    image = np.full((1, 4, 4, 2), 60, np.uint8)
    standardised = model.get_layer("standardise")(image).numpy()
    np.testing.assert_allclose(standardised[0, 0, 0], [-2.0, 2.0], rtol=1e-6)


def test_precision_is_that_of_the_products_and_never_of_weights_and_logits():
    model = initialised("resnet12", image_shape=(8, 8, 1), width=0.1, precision="mixed_bfloat16")
    for layer in Graph.of(model).select(is_synapse).values():
        assert layer.kernel.dtype == "float32" or layer.kernel.true_dtype == "float32"
    types = {name: layer.output.dtype.name for name, layer in Graph.of(model).layers.items()}
    assert types.pop("image") == "uint8"
    assert {types.pop(name) for name in ("standardise", "logits", "read_out")} == {"float32"}
    assert set(types.values()) == {"bfloat16"}


# --- the SNN


@pytest.mark.parametrize("network", WEIGHTS)
def test_snn_has_graph_names_and_kernels_of_the_ann(network):
    settings = {"image_shape": (16, 16, 3), "width": 0.05, "timesteps": 2}
    ann = build(network, **settings)
    snn = copies.spiking(ann, Config(network=network, timesteps=2))
    ann_graph, snn_graph = Graph.of(ann), Graph.of(snn)
    assert list(ann_graph.layers) == list(snn_graph.layers)
    assert ann_graph.inputs == snn_graph.inputs
    assert output_shapes(ann) == output_shapes(snn)
    assert all(isinstance(layer, keras.layers.ReLU) for layer in ann_graph.select(is_neuron).values())
    assert all(isinstance(layer, LIF) for layer in snn_graph.select(is_neuron).values())


@pytest.mark.parametrize("network", ["vgg5", "resnet12"])
def test_ann_of_quantised_activations_has_the_graph_of_that_with_relu(network):
    settings = {"image_shape": (8, 8, 3), "width": 0.05, "activation_levels": 4, "batch_norm": True}
    plain, quantised = (build(network, neuron, **settings) for neuron in ("relu", "quantised_relu"))
    assert Graph.of(plain).inputs == Graph.of(quantised).inputs
    assert output_shapes(plain) == output_shapes(quantised)
    assert models.attended(plain) == models.attended(quantised)
    neurons = Graph.of(quantised).select(is_neuron)
    assert neurons.keys() == Graph.of(plain).select(is_neuron).keys()
    assert {layer.levels for layer in neurons.values() if isinstance(layer, QuantisedReLU)} == {4}
    snn = Graph.of(copies.spiking(fold(quantised), Config(timesteps=2)))
    assert all(isinstance(layer, LIF) for layer in snn.select(is_neuron).values())


def test_snn_is_built_by_its_name():
    ann, snn = (build("vgg5", neuron, image_shape=(4, 4, 1), width=0.1) for neuron in ("relu", "lif"))
    assert not evaluation.is_spiking(ann) and evaluation.is_spiking(snn)
    assert list(Graph.of(ann).layers) == list(Graph.of(snn).layers)


def test_snn_starts_with_the_anns_weights_leak_1_and_v_th_1():
    ann = initialised("resnet12", image_shape=(8, 8, 1), width=0.1)
    snn = copies.spiking(ann, Config(network="resnet12"))
    ours = kernels(snn)
    assert all(
        kernel.any() and np.array_equal(ours[name], kernel) for name, kernel in kernels(ann).items()
    )
    cells = [layer.cell for layer in Graph.of(snn).select(is_neuron).values()]
    assert {float(cell.leak) for cell in cells} == {float(cell.v_th) for cell in cells} == {1.0}


@pytest.mark.parametrize("network", ["vgg5", "resnet12"])
def test_first_convolution_is_computed_once_and_all_others_at_every_step(network):
    batch, steps = 3, 4
    snn = build(network, "lif", image_shape=(8, 8, 1), width=0.1, timesteps=steps)
    graph = Graph.of(snn)
    outputs = keras.Model(snn.input, {name: layer.output for name, layer in graph.layers.items()})
    sizes = {name: len(x) for name, x in outputs(some_images(batch, (8, 8, 1))).items()}
    first = "conv1" if network == "vgg5" else "stem1"
    once = {name for name, size in sizes.items() if size == batch}
    assert once == {"image", "standardise", first, "read_out"}
    assert {sizes[name] for name in sizes.keys() - once} == {steps * batch}
    constant = [name for name, layer in graph.select(is_neuron).items() if layer.constant_input]
    assert constant == [f"{first}_neuron"]


def test_snn_settings_reach_neurons_dropout_and_read_out():
    config = Config(
        network="vgg5",
        timesteps=3,
        lif="rnn",
        surrogate="arctan",
        surrogate_scale=0.7,
        initial_membrane=0.25,
        bias_current=True,
    )
    ann = build("vgg5", image_shape=(4, 4, 1), width=0.1)
    for timesteps, expected in ((None, 3), (6, 6)):
        snn = copies.spiking(ann, config, timesteps)
        timed = [layer for layer in snn.layers if isinstance(layer, LIF | Dropout | ReadOut)]
        assert len(timed) == 5 + 3 + 1
        assert {layer.timesteps for layer in timed} == {expected}
        for layer in Graph.of(snn).select(is_neuron).values():
            assert (layer.implementation, layer.use_bias) == ("rnn", True)
            assert (layer.cell.surrogate.kind, layer.cell.surrogate.scale) == ("arctan", 0.7)
            assert layer.cell.initial_membrane == 0.25
            assert not layer.bias_current.numpy().any()


def test_snn_keeps_its_dropout_mask_over_time():
    ann = initialised("vgg5", image_shape=(4, 4, 1), width=0.1, head="linear")
    snn = copies.spiking(ann, Config(network="vgg5", timesteps=3))
    dropout = snn.get_layer("conv2_dropout")
    with dropout_seed(tf.constant([1, 2])):
        kept = dropout(tf.ones([6, 2, 2, 16]), training=True).numpy().reshape(3, 2, -1)
    assert 0 < np.mean(kept == 0) < 1
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1], kept.shape))


def test_neuron_behind_image_and_spikes_is_refused():
    image = keras.Input((4, 4, 1), name="image")
    spikes = keras.layers.ReLU(name="first")(keras.layers.Conv2D(1, 3, padding="same")(image))
    both = keras.layers.ReLU(name="second")(keras.layers.Add()([spikes, image]))
    logits = keras.layers.Dense(2)(keras.layers.Flatten()(both))
    with pytest.raises(UsageError, match="layer second: the image and spikes are added"):
        copies.spiking(keras.Model(image, logits), Config())


# --- initialisation and attention


@pytest.mark.parametrize("density", [1.0, 0.2])
def test_initialise_draws_normal_weights_of_hes_deviation(density):
    model = build("vgg5", image_shape=(8, 8, 3), width=0.5)
    initialise(model, 3, {"conv3": density, "dense4": density})
    found = kernels(model)
    for name, fan_in in (("conv2", 9 * 32), ("conv3", 9 * 64), ("dense4", 4 * 64), ("dense5", 2048)):
        kernel = found[name] / math.sqrt(
            2 / (fan_in * (density if name in ("conv3", "dense4") else 1.0))
        )
        error = 1 / math.sqrt(kernel.size)
        assert abs(kernel.mean()) < 5 * error
        assert abs(kernel.std() - 1) < 5 * error
        # The share of a normal distribution within one deviation.
        assert abs(np.mean(np.abs(kernel) < 1) - 0.6827) < 5 * error


def test_initialise_scales_by_the_density_alone():
    settings = {"image_shape": (8, 8, 1), "width": 0.1}
    dense, sparse = build("vgg5", **settings), build("vgg5", **settings)
    initialise(dense, 3)
    initialise(sparse, 3, {"conv2": 0.25})
    ours, theirs = kernels(sparse), kernels(dense)
    assert np.array_equal(ours["conv2"], 2 * theirs["conv2"])
    assert np.array_equal(ours["conv3"], theirs["conv3"])


def test_initialise_is_a_function_of_seed_and_layer_name():
    settings = {"image_shape": (8, 8, 1), "width": 0.1}
    first, second, other = (initialised("resnet12", seed, **settings) for seed in (5, 5, 6))
    ours, same, others = kernels(first), kernels(second), kernels(other)
    for name, kernel in ours.items():
        assert np.array_equal(kernel, same[name])
        assert np.mean(kernel == others[name]) < 0.01
    assert ours["stem2"].shape == ours["stem3"].shape
    assert np.mean(ours["stem2"] == ours["stem3"]) < 0.01
    wrapped = wrap(build("resnet12", **settings))
    initialise(wrapped, 5)
    assert all(np.array_equal(kernel, ours[name]) for name, kernel in kernels(wrapped).items())


CALMED = [
    ("vgg16", {"width": 0.25}, {"dense15_norm": 1024}),
    ("vgg9", {"width": 0.25, "head": "linear"}, {"conv7_norm": 128}),
    ("vgg5", {"width": 0.001}, {"dense5_norm": 8}),
    ("resnet12", {"width": 0.125}, dict.fromkeys(["conv2_norm", "shortcut_norm"], 256)),
    ("resnet20", {"width": 0.125}, {}),
]


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize(("network", "settings", "expected"), CALMED, ids=[row[0] for row in CALMED])
def test_initialise_calms_what_the_logits_read(network, settings, expected, density):
    model = build(network, batch_norm=True, **settings)
    initialise(model, 1, {"logits": density})
    gammas = {name: layer.gamma.numpy() for name, layer in Graph.of(model).select(is_norm).items()}
    for name, inputs in expected.items():
        calmed = gammas.pop(f"stage4_block1_{name}" if network == "resnet12" else name)
        assert np.allclose(calmed, min(1.0, 4.0 / math.sqrt(density * inputs)))
    assert all(np.all(gamma == 1.0) for gamma in gammas.values())


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_summed_squares_of_what_the_logits_read_do_not_grow_with_width(width):
    settings = {"batch_norm": True, "dropout": 0, "head_dropout": 0}
    model = initialised("vgg5", image_shape=(8, 8, 3), width=width, **settings)
    read = keras.Model(model.input, model.get_layer("logits").input)
    features = read(some_images(64, (8, 8, 3)), training=True)
    # Half of 16 γ²: batch normalisation gives a variance of 1, of which ReLU keeps half.
    assert np.mean(np.sum(np.square(features), axis=-1)) == pytest.approx(8.0, rel=0.03)


@pytest.mark.parametrize(("network", "settings", "expected"), CALMED, ids=[row[0] for row in CALMED])
def test_clips_start_as_much_smaller_as_what_they_clip(network, settings, expected):
    model = build(network, "quantised_relu", batch_norm=True, activation_levels=5, **settings)
    initialise(model, 1)
    *others, last = (layer.clip.numpy() for layer in Graph.of(model).select(is_neuron).values())
    scale = min([1.0, *(4.0 / math.sqrt(inputs) for inputs in expected.values())])
    assert last == pytest.approx(FIRST_CLIP * scale) and set(others) == {FIRST_CLIP}


def test_clips_follow_the_trained_normalisations_before_them():
    model = build("resnet12", "quantised_relu", batch_norm=True, activation_levels=5, width=0.125)
    rng = np.random.default_rng(3)
    norms = Graph.of(model).select(is_norm)
    for norm in norms.values():
        norm.gamma.assign(rng.uniform(0.1, 2.0, norm.gamma.shape))
    fit_clips(model)

    def expected(*names):
        squares = np.concatenate([norms[name].gamma.numpy() ** 2 for name in names])
        return pytest.approx(FIRST_CLIP * np.sqrt(squares.mean()), rel=1e-6)

    clips = neuron_parameters(model)["clip"]
    block = "stage4_block1"
    assert clips[f"{block}_conv1_neuron"] == expected(f"{block}_conv1_norm")
    assert clips[f"{block}_conv2_neuron"] == expected(f"{block}_conv2_norm", f"{block}_shortcut_norm")


def test_clips_without_a_normalisation_stay():
    model = build("vgg5", "quantised_relu", activation_levels=5, width=0.1)
    fit_clips(model)
    assert set(neuron_parameters(model)["clip"].values()) == {FIRST_CLIP}


def test_last_clip_rounds_no_more_to_zero_than_the_one_before():
    settings = {"batch_norm": True, "activation_levels": 5, "dropout": 0, "head_dropout": 0}
    model = initialised("vgg5", neuron="quantised_relu", image_shape=(8, 8, 3), width=0.5, **settings)
    seen = keras.Model(model.input, [model.get_layer(f"dense{n}_neuron").output for n in (4, 5)])
    before, last = (np.mean(x != 0) for x in seen(some_images(64, (8, 8, 3)), training=True))
    assert last == pytest.approx(before, abs=0.05) and last > 0.3


def test_copy_weights_goes_by_name_through_wrappers_and_spares_masks():
    source = initialised("vgg5", image_shape=(4, 4, 1), width=0.1)
    masks = {
        name: np.arange(kernel.size).reshape(kernel.shape) % 2
        for name, kernel in kernels(source).items()
    }
    target = wrap(build("vgg5", image_shape=(4, 4, 1), width=0.1), masks)
    copies.copy_weights(source, target)
    found = kernels(target)
    assert all(np.array_equal(found[name], kernel) for name, kernel in kernels(source).items())
    for wrapper in (layer for layer in target.layers if layer is not inner(layer)):
        np.testing.assert_array_equal(wrapper.pruning_vars[0][1], masks[wrapper.layer.name])


@pytest.mark.parametrize(
    ("network", "image_shape", "names"),
    [
        ("vgg5", (8, 8, 1), ["conv1", "conv3"]),
        ("vgg16", (32, 32, 3), ["conv2", "conv4", "conv7", "conv10", "conv13"]),
        ("vgg16", (16, 16, 3), ["conv2", "conv4", "conv7", "conv10", "conv13"]),
        ("vgg9", (32, 32, 3), ["conv1", "conv3", "conv5", "conv6", "conv7"]),
        ("resnet12", (32, 32, 3), ["stem3", *(f"stage{s}_block1_conv2" for s in (1, 2, 3, 4))]),
        (
            "resnet34",
            (16, 16, 3),
            ["stem3", *(f"stage{s}_block{b}_conv2" for s, b in ((1, 3), (2, 4), (3, 6), (4, 3)))],
        ),
    ],
)
def test_attended_layers_are_the_last_before_each_pool_and_the_head(network, image_shape, names):
    model = build(network, image_shape=image_shape, width=0.05)
    expected = [f"{name}_neuron" for name in names]
    assert models.attended(model) == models.attended(wrap(model)) == expected


def test_neuron_that_there_is_not_is_refused():
    said = "^neuron is 'lfi'; allowed are relu, quantised_relu, lif$"
    with pytest.raises(ValueError, match=said):
        models.build(Config(network="vgg5"), "lfi", spec_of((8, 8, 1), 10))
