"""Tests of `snn_tf.surgery`: tie groups against lists written by hand, and the cut network's logits."""

import numpy as np
import pytest
import tf_keras as keras
from small_networks import (
    build,
    clips_of,
    initialised,
    kernels,
    output_shapes,
    scramble,
    some_images,
    spec_of,
    spread_clips,
    weights_of,
)

from snn_tf import costs, evaluation, models, pruning
from snn_tf.channels import ChannelBudget, ChannelLayer
from snn_tf.config import Config
from snn_tf.graph import Graph, inner, is_synapse
from snn_tf.surgery import channel_layers, output_positions, remove_channels, tie_groups

SHAPE = (8, 8, 3)
NETWORKS = {
    "vgg5": {"network": "vgg5", "head": "mlp", "width": 0.15, "image_shape": SHAPE},
    "vgg9": {"network": "vgg9", "head": "linear", "width": 0.1, "image_shape": (16, 19, 1)},
    "resnet12": {"network": "resnet12", "width": 0.2, "image_shape": SHAPE},
    "resnet20": {"network": "resnet20", "width": 0.2, "image_shape": SHAPE},
}


def groups_of_synapses(model):
    groups = tie_groups(model)
    return {name: groups[name] for name in Graph.of(model).select(is_synapse)}


def some_channels(model, seed=0):
    """For each group, a random half of its channels, one at least."""
    rng = np.random.default_rng(seed)
    shapes = output_shapes(model)
    active = {}
    for group in tie_groups(model).values():
        if group and group not in active:
            size = shapes[group][-1]
            active[group] = np.isin(np.arange(size), rng.permutation(size)[: max(1, size // 2)])
    return active


def silenced(model, active):
    """A copy in which no synapse reads a dormant channel; channels are the last axis of every map."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    groups, shapes, graph = tie_groups(model), output_shapes(model), Graph.of(model)
    for name, kernel in kernels(model).items():
        source = graph.inputs[name][0]
        if group := groups[source]:
            before = graph.inputs[source][0] if source == "flatten" else source
            read = (
                np.broadcast_to(active[group], shapes[before]) if source == "flatten" else active[group]
            )
            kernel = np.where(read.reshape(-1, 1), kernel, 0)
        copy.get_layer(name).kernel.assign(kernel)
    return copy


def put_whole_numbers(model, seed):
    """Kernels of -1, 0 and 1, few for each output: sums of few small whole numbers are exact."""
    rng = np.random.default_rng(seed)
    for name, kernel in kernels(model).items():
        fan_in = kernel.size // kernel.shape[-1]
        share = min(1.0, 5.0 / fan_in) if name != "logits" else 0.5
        present = rng.random(kernel.shape) < share
        model.get_layer(name).kernel.assign(present * rng.choice([-1.0, 1.0, 1.0, 1.0], kernel.shape))


def test_groups_of_a_chain_are_its_layers():
    model = build("vgg5", image_shape=SHAPE, width=0.1)
    expected = {
        None: ["image", "standardise", "logits", "read_out"],
        "conv1": ["conv1", "conv1_neuron", "pool1"],
        "conv2": ["conv2", "conv2_neuron", "conv2_dropout"],
        "conv3": ["conv3", "conv3_neuron", "pool2", "flatten"],
        "dense4": ["dense4", "dense4_neuron", "dense4_dropout"],
        "dense5": ["dense5", "dense5_neuron", "dense5_dropout"],
    }
    assert tie_groups(model) == {name: group for group, names in expected.items() for name in names}


def test_groups_chain_of_identity_shortcuts_is_one_named_after_its_first_layer():
    groups = groups_of_synapses(build("resnet20", image_shape=SHAPE, width=0.1))
    expected = {
        "stem1": ["stem1"],
        "stem2": ["stem2"],
        "stem3": ["stem3", "stage1_block1_conv2", "stage1_block2_conv2"],
        None: ["logits"],
    }
    expected |= {
        name: [name] for name in (f"stage{s}_block{b}_conv1" for s in (1, 2, 3, 4) for b in (1, 2))
    }
    tied = {group: {name for name in groups if groups[name] == group} for group in groups.values()}
    stages = {frozenset(tied.pop(groups[f"stage{stage}_block1_conv2"])) for stage in (2, 3, 4)}
    assert tied == {group: set(names) for group, names in expected.items()}
    assert stages == {
        frozenset(f"stage{s}_{name}" for name in ("block1_conv2", "block1_shortcut", "block2_conv2"))
        for s in (2, 3, 4)
    }


def test_groups_name_their_first_producer():
    for network in ("resnet12", "resnet34"):
        groups = groups_of_synapses(build(network, image_shape=SHAPE, width=0.1))
        order = list(groups)
        for name, group in groups.items():
            assert group is None or order.index(group) <= order.index(name)
            assert group is None or groups[group] == group


def test_groups_pass_through_pools_additions_and_flattening():
    groups = tie_groups(build("resnet12", image_shape=SHAPE, width=0.1))
    assert groups["stem_pool"] == groups["stage1_block1_add"] == groups["stem3"]
    assert groups["flatten"] == groups["stage4_block1_conv2_neuron"] == groups["stage4_block1_shortcut"]
    assert groups["image"] is groups["standardise"] is groups["logits"] is groups["read_out"] is None


@pytest.mark.parametrize("reads", ["image", "classes"])
def test_groups_added_to_image_or_classes_are_never_removed(reads):
    image = keras.Input((4, 4, 3), name="image")
    hidden = keras.layers.Conv2D(3, 3, padding="same", name="hidden")(image)
    if reads == "image":
        hidden = keras.layers.Add(name="add")([hidden, image])
    x = keras.layers.Flatten(name="flatten")(keras.layers.ReLU(name="neuron")(hidden))
    first, second = (keras.layers.Dense(2, name=name)(x) for name in ("first", "second"))
    model = keras.Model(image, keras.layers.Add(name="logits")([first, second]))
    groups = groups_of_synapses(model)
    free = {} if reads == "image" else {"hidden": "hidden"}
    assert groups == {"hidden": None, "first": None, "second": None} | free


@pytest.mark.parametrize("settings", [NETWORKS["vgg5"], NETWORKS["resnet12"]], ids=["vgg5", "resnet12"])
def test_groups_are_those_of_the_wrapped_and_the_spiking_network(settings):
    model = build(**settings)
    assert (
        tie_groups(pruning.wrap(model))
        == tie_groups(model)
        == tie_groups(build(neuron="lif", **settings))
    )


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("budget", "positions"), [("weights", (1, 1, 1)), ("macs", (30, 6, 6))])
def test_channel_layers_of_a_chain(wrapped, budget, positions):
    model = build("vgg5", image_shape=(5, 6, 3), width=0.15, classes=4)
    layers = channel_layers(pruning.wrap(model) if wrapped else model, budget)
    assert layers == [
        ChannelLayer("conv1", 9, 1, None, "conv1", 3, 8, positions[0]),
        ChannelLayer("conv2", 9, 1, "conv1", "conv2", 8, 16, positions[1]),
        ChannelLayer("conv3", 9, 1, "conv2", "conv3", 16, 16, positions[2]),
        ChannelLayer("dense4", 1, 1, "conv3", "dense4", 16, 616, 1),
        ChannelLayer("dense5", 1, 1, "dense4", "dense5", 616, 616, 1),
        ChannelLayer("logits", 1, 1, "dense5", None, 616, 4, 1),
    ]


def test_channel_layers_count_the_positions_behind_a_flatten():
    layers = channel_layers(build("vgg5", image_shape=(8, 12, 1), width=0.1, classes=4), "weights")
    assert layers[3] == ChannelLayer("dense4", 1, 6, "conv3", "dense4", 16, 408, 1)


def test_channel_layers_of_a_block_with_a_shortcut():
    model = build("resnet12", image_shape=(8, 8, 1), width=0.1)
    layers = {layer.name: layer for layer in channel_layers(model, "macs")}
    out = tie_groups(model)["stage2_block1_add"]
    assert layers["stage2_block1_conv1"] == ChannelLayer(
        "stage2_block1_conv1", 9, 1, "stem3", "stage2_block1_conv1", 8, 16, 4
    )
    assert layers["stage2_block1_shortcut"] == ChannelLayer(
        "stage2_block1_shortcut", 1, 1, "stem3", out, 8, 16, 4
    )
    assert layers["stage2_block1_conv2"] == ChannelLayer(
        "stage2_block1_conv2", 9, 1, "stage2_block1_conv1", out, 16, 16, 4
    )


def test_output_positions_are_those_of_the_map():
    layers = Graph.of(build("resnet12", image_shape=(9, 7, 1), width=0.1)).layers
    found = {name: output_positions(layers[name]) for name in ("stem1", "stage1_block1_conv1")}
    assert found == {"stem1": 63, "stage1_block1_conv1": 12}
    assert output_positions(layers["stage2_block1_shortcut"]) == 4
    assert output_positions(layers["logits"]) == 1


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_budget_counts_what_the_cut_network_has(settings):
    model = initialised(**settings)
    active = some_channels(model)
    small = remove_channels(model, active)
    counts = {group: int(flags.sum()) for group, flags in active.items()}
    by_weights, by_macs = (
        ChannelBudget(channel_layers(model, budget), 1.0) for budget in ("weights", "macs")
    )
    assert by_weights.target == weights_of(model)
    assert by_weights.cost(counts) == weights_of(small) < weights_of(model) / 2
    assert by_macs.cost(counts) == costs.ann_costs(evaluation.synapses(small))["macs"]


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_cut_logits_equal_the_masked_ones_bit_for_bit(settings):
    image_shape = settings["image_shape"]
    arguments = {key: value for key, value in settings.items() if key != "image_shape"}
    # Pixels 0, 64, 128 and 192 become -2, -1, 0 and 1.
    model = models.build(Config(**arguments), "relu", spec_of(image_shape, mean=128.0, std=64.0))
    put_whole_numbers(model, seed=3)
    active = some_channels(model, seed=4)
    masked = silenced(model, active)
    images = some_images(6, image_shape) & 0b11000000
    everything = keras.Model(masked.input, [layer.output for layer in masked.layers[1:]])(images)
    # Each pool divides by 4, and float32 holds 24 bits: a far cry from where sums are rounded.
    grid = 0.25 ** sum("pool" in name for name in Graph.of(model).layers)
    assert max(float(np.abs(values).max()) for values in everything) < 2**21 * grid
    logits = masked(images).numpy()
    assert len(np.unique(logits)) > 5
    np.testing.assert_array_equal(remove_channels(masked, active)(images), logits)


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_cut_logits_are_close_to_the_masked_ones_for_any_weights(settings):
    model = initialised(**settings)
    active = some_channels(model, seed=5)
    masked = silenced(model, active)
    images = some_images(4, settings["image_shape"])
    logits = masked(images).numpy()
    assert not np.allclose(logits, model(images), atol=1e-2)
    np.testing.assert_allclose(remove_channels(model, active)(images), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["vgg5", "resnet12"])
def test_cut_network_takes_the_norms_of_active_channels(network):
    settings = NETWORKS[network]
    model = initialised(**settings, batch_norm=True)
    scramble(model, seed=6)
    active = some_channels(model, seed=5)
    masked = silenced(model, active)
    images = some_images(4, settings["image_shape"])
    logits = masked(images, training=False).numpy()
    assert not np.allclose(logits, model(images, training=False), atol=1e-2)
    small = remove_channels(model, active)
    np.testing.assert_allclose(small(images, training=False), logits, rtol=1e-4, atol=1e-4)
    kept = active[tie_groups(model)["conv2" if network == "vgg5" else "stem2"]]
    name = "conv2_norm" if network == "vgg5" else "stem2_norm"
    for mine, whole in zip(small.get_layer(name).weights, model.get_layer(name).weights, strict=True):
        np.testing.assert_array_equal(mine, whole.numpy()[kept])


def test_cut_kernels_are_the_slices_of_active_channels():
    model = initialised("vgg5", image_shape=(8, 8, 1), width=0.1, classes=3)
    active = some_channels(model)
    old, new = kernels(model), kernels(remove_channels(model, active))
    kept = {group: list(np.flatnonzero(flags)) for group, flags in active.items()}
    np.testing.assert_array_equal(new["conv1"], old["conv1"][..., kept["conv1"]])
    rows = old["conv2"][:, :, kept["conv1"]]
    np.testing.assert_array_equal(new["conv2"], rows[..., kept["conv2"]])
    # Flattened maps of 2×2: position before channel.
    rows = [position * 16 + channel for position in range(4) for channel in kept["conv3"]]
    np.testing.assert_array_equal(new["dense4"], old["dense4"][rows][:, kept["dense4"]])
    np.testing.assert_array_equal(new["logits"], old["logits"][kept["dense5"]])


def test_cut_network_keeps_names_graph_and_classes():
    model = initialised("resnet12", image_shape=SHAPE, width=0.2)
    active = some_channels(model)
    small = remove_channels(model, active)
    assert list(Graph.of(small).layers) == list(Graph.of(model).layers)
    assert Graph.of(small).inputs == Graph.of(model).inputs
    assert small.output_shape == model.output_shape and small.input_shape == model.input_shape
    shapes = output_shapes(small)
    for name, group in groups_of_synapses(model).items():
        assert shapes[name][-1] == (active[group].sum() if group else 10)


def test_cut_of_nothing_gives_the_same_network():
    model = initialised("resnet12", image_shape=SHAPE, width=0.1)
    everything = {group: np.ones_like(flags) for group, flags in some_channels(model).items()}
    same = remove_channels(model, everything)
    old = kernels(model)
    assert all(np.array_equal(kernel, old[name]) for name, kernel in kernels(same).items())


def test_cut_network_keeps_trained_clips():
    model = build("vgg5", "quantised_relu", SHAPE, width=0.1, activation_levels=3)
    clips = spread_clips(model)
    assert clips_of(remove_channels(model, some_channels(model))) == clips


def test_cut_network_takes_the_biases_of_active_channels():
    image = keras.Input((3,), name="image")
    hidden = keras.layers.ReLU(name="neuron")(keras.layers.Dense(4, name="hidden")(image))
    model = keras.Model(image, keras.layers.Dense(2, name="logits")(hidden))
    model.get_layer("hidden").bias.assign([1.0, 2.0, 3.0, 4.0])
    model.get_layer("logits").bias.assign([5.0, 6.0])
    small = remove_channels(model, {"hidden": np.array([False, True, False, True])})
    np.testing.assert_array_equal(inner(small.get_layer("hidden")).bias, [2.0, 4.0])
    np.testing.assert_array_equal(small.get_layer("logits").bias, [5.0, 6.0])


def test_budget_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"^budget is 'mac'; allowed are weights, macs$"):
        channel_layers(build("vgg5", image_shape=(8, 8, 1), width=0.1, classes=4), "mac")
