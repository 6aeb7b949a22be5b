"""Tests of `snn_tf.graph`: roles, what feeds what, and the walk backwards."""

import itertools

import pytest
import tf_keras as keras
from small_networks import build, spread_clips

from snn_tf.graph import Graph, inner, is_image, is_neuron, is_source, is_synapse, neuron_parameters
from snn_tf.layers import LIF, Dropout, ReadOut
from snn_tf.pruning import Masked, wrap

SHAPE = (5, 5, 1)
SMALL = {"width": 0.1, "head": "linear"}
CHAIN = [
    "image",
    "standardise",
    *("conv1", "conv1_neuron", "pool1"),
    *("conv2", "conv2_neuron", "conv2_dropout"),
    *("conv3", "conv3_neuron", "pool2"),
    *("flatten", "logits", "read_out"),
]


def vgg5():
    return build("vgg5", image_shape=SHAPE, **SMALL)


@pytest.fixture(scope="module")
def resnet():
    return Graph.of(build("resnet20", image_shape=(8, 8, 1), width=0.1))


def diamond():
    """x -> a -> b -> add <- c <- x, with the short branch named first in the addition."""
    x = keras.Input((4,), name="x")
    a = keras.layers.Dense(4, name="a")(x)
    b = keras.layers.ReLU(name="b")(a)
    c = keras.layers.Dense(4, name="c")(x)
    added = keras.layers.Add(name="add")([c, b])
    return keras.Model(x, keras.layers.Dense(2, name="out")(added))


@pytest.mark.parametrize(
    ("layer", "roles"),
    [
        (keras.layers.InputLayer((2,)), {is_image, is_source}),
        (keras.layers.Conv2D(2, 3), {is_synapse}),
        (keras.layers.Dense(2), {is_synapse}),
        (Masked(keras.layers.Dense(2)), {is_synapse}),
        (Masked(keras.layers.Conv2D(2, 3)), {is_synapse}),
        (keras.layers.ReLU(), {is_neuron, is_source}),
        (LIF(3), {is_neuron, is_source}),
        (keras.layers.AveragePooling2D(2), set()),
        (keras.layers.Add(), set()),
        (keras.layers.Flatten(), set()),
        (keras.layers.Normalization(mean=0.0, variance=1.0), set()),
        (Dropout(0.2), set()),
        (ReadOut(), set()),
    ],
)
def test_role_is_told_by_the_layer(layer, roles):
    assert {role for role in (is_image, is_synapse, is_neuron, is_source) if role(layer)} == roles


def test_inner_takes_off_a_wrapper_and_nothing_else():
    dense = keras.layers.Dense(2)
    assert inner(dense) is dense
    assert inner(Masked(dense)) is dense


def test_chain_is_read_in_order():
    graph = Graph.of(vgg5())
    assert list(graph.layers) == CHAIN
    assert graph.inputs == {"image": ()} | {
        name: (before,) for before, name in itertools.pairwise(CHAIN)
    }


def test_wrapped_model_has_the_graph_of_the_plain_one():
    model = vgg5()
    wrapped = wrap(model)
    assert any(layer.name not in CHAIN for layer in wrapped.layers)
    graph = Graph.of(wrapped)
    assert list(graph.layers) == CHAIN
    assert graph.inputs == Graph.of(model).inputs
    assert isinstance(graph.layers["conv1"], Masked)
    assert list(graph.select(is_synapse)) == ["conv1", "conv2", "conv3", "logits"]


def test_residual_block_is_fed_by_branch_and_shortcut(resnet):
    assert resnet.inputs["stage1_block1_add"] == ("stage1_block1_conv2", "stem_pool")
    assert resnet.inputs["stage1_block2_add"] == ("stage1_block2_conv2", "stage1_block1_conv2_neuron")
    assert resnet.inputs["stage2_block1_add"] == ("stage2_block1_conv2", "stage2_block1_shortcut")
    assert resnet.inputs["stage2_block1_shortcut"] == ("stage1_block2_conv2_neuron",)
    assert resnet.inputs["stage2_block1_conv1"] == ("stage1_block2_conv2_neuron",)


@pytest.mark.parametrize("network", ["resnet12", "resnet34"])
def test_layers_follow_what_feeds_them(network):
    graph = Graph.of(build(network, image_shape=(4, 4, 1), width=0.1))
    order = list(graph.layers)
    assert len(graph.inputs) == len(order)
    for name, sources in graph.inputs.items():
        assert all(order.index(source) < order.index(name) for source in sources)


def test_layers_follow_what_feeds_them_on_branches_of_unequal_length():
    graph = Graph.of(diamond())
    order = list(graph.layers)
    assert graph.inputs["add"] == ("c", "b")
    assert order[0] == "x" and order[-2:] == ["add", "out"] and order.index("a") < order.index("b")


def test_select_keeps_the_order(resnet):
    neurons = list(resnet.select(is_neuron))
    blocks = [f"stage{stage}_block{block}_" for stage in (1, 2, 3, 4) for block in (1, 2)]
    expected = [f"stem{i}_neuron" for i in (1, 2, 3)]
    expected += [f"{block}{conv}_neuron" for block in blocks for conv in ("conv1", "conv2")]
    assert neurons == expected
    assert list(resnet.select(is_image)) == ["image"]
    assert [name for name in resnet.select(is_synapse) if "shortcut" in name] == [
        f"stage{stage}_block1_shortcut" for stage in (2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("name", "role", "met"),
    [
        ("image", is_source, []),
        ("stem1", is_source, ["image"]),
        ("stem1", is_neuron, []),
        ("stem1_neuron", is_neuron, []),
        ("stem2_neuron", is_neuron, ["stem1_neuron"]),
        ("stage1_block1_conv2_neuron", is_neuron, ["stage1_block1_conv1_neuron", "stem3_neuron"]),
        ("stage1_block1_conv2_neuron", is_synapse, ["stage1_block1_conv2", "stem3"]),
        (
            "stage1_block2_conv2_neuron",
            is_synapse,
            ["stage1_block2_conv2", "stage1_block1_conv2", "stem3"],
        ),
        (
            "stage2_block1_conv2_neuron",
            is_neuron,
            ["stage2_block1_conv1_neuron", "stage1_block2_conv2_neuron"],
        ),
        ("stage2_block1_conv2_neuron", is_synapse, ["stage2_block1_conv2", "stage2_block1_shortcut"]),
        ("logits", is_source, ["stage4_block2_conv2_neuron"]),
    ],
)
def test_nearest_stops_at_the_first_of_its_role_on_each_way(resnet, name, role, met):
    assert resnet.nearest(name, role) == met


def test_neuron_parameters_are_those_that_its_kind_of_neuron_trains():
    clipped = build("vgg5", "quantised_relu", SHAPE, activation_levels=3, **SMALL)
    clips = spread_clips(clipped)
    assert neuron_parameters(clipped) == {"v_th": {}, "leak": {}, "clip": clips}
    spiking = build("vgg5", "lif", SHAPE, **SMALL)
    cell = spiking.get_layer("conv2_neuron").cell
    cell.v_th.assign(0.25)
    cell.leak.assign(0.5)
    ones = dict.fromkeys(("conv1_neuron", "conv2_neuron", "conv3_neuron"), 1.0)
    assert neuron_parameters(spiking) == {
        "v_th": ones | {"conv2_neuron": 0.25},
        "leak": ones | {"conv2_neuron": 0.5},
        "clip": {},
    }
    assert neuron_parameters(vgg5()) == {"v_th": {}, "leak": {}, "clip": {}}


def test_nearest_names_a_layer_met_on_two_ways_once():
    assert Graph.of(diamond()).nearest("add", is_image) == ["x"]


def test_layers_called_again_keep_their_first_place():
    model = diamond()
    before = Graph.of(model)
    again = model.get_layer("out")(model.get_layer("b")(keras.Input((4,), name="other")))
    keras.Model(model.input, [model.output, model.get_layer("a").output])
    assert again.shape[-1] == 2
    assert Graph.of(model).inputs == before.inputs
