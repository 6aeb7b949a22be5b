"""Batch normalisation folded away: the same function, the same zeros, the same names."""

import numpy as np
import pytest
import tf_keras as keras
from small_networks import build, clips_of, initialised, kernels, scramble, some_images, spread_clips

from snn_tf import pruning
from snn_tf.errors import UserError
from snn_tf.folding import fold
from snn_tf.graph import Graph, is_norm

SHAPE = (8, 8, 3)
NETWORKS = {
    "vgg5": {"network": "vgg5", "width": 0.02},
    "linear": {"network": "vgg5", "width": 0.2, "head": "linear"},
    "resnet12": {"network": "resnet12", "width": 0.1},
}


def normed(seed=4, **settings) -> keras.Model:
    """A network whose normalisations have parameters and statistics far from their first ones."""
    model = initialised(image_shape=SHAPE, batch_norm=True, **settings)
    scramble(model, seed)
    return model


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_networks_have_a_norm_after_every_convolution_and_hidden_product(settings):
    model = build(image_shape=SHAPE, batch_norm=True, **settings)
    graph = Graph.of(model)
    followed = {graph.inputs[name][0] for name in graph.select(is_norm)}
    assert followed == set(kernels(model)) - {"logits"}
    assert not Graph.of(build(image_shape=SHAPE, **settings)).select(is_norm)


@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_folded_network_equals_the_unfolded_in_evaluation(settings):
    model = normed(**settings)
    folded = fold(model)
    images = some_images(5, SHAPE)
    expected = model(images, training=False).numpy()
    assert np.ptp(expected, axis=0).max() > 0.1
    np.testing.assert_allclose(folded(images), expected, rtol=2e-4, atol=2e-4)
    graph = Graph.of(folded)
    assert not graph.select(is_norm)
    assert list(graph.layers) == [name for name in Graph.of(model).layers if not name.endswith("_norm")]
    unfolded = keras.Model(model.input, model.get_layer(list(kernels(model))[-1]).output)
    assert folded.output_shape[-1] == unfolded.output_shape[-1]


def test_folded_layer_is_the_formula_by_hand():
    model = normed(**NETWORKS["vgg5"])
    layer, norm = model.get_layer("conv2"), model.get_layer("conv2_norm")
    mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy()
    gain = norm.gamma.numpy() / np.sqrt(variance + norm.epsilon)
    folded = fold(model).get_layer("conv2")
    np.testing.assert_allclose(folded.kernel, layer.kernel.numpy() * gain, rtol=1e-5)
    np.testing.assert_allclose(folded.bias, norm.beta.numpy() - mean * gain, rtol=1e-4, atol=1e-6)


def test_folding_keeps_zeros_and_leaves_the_original_alone():
    model = normed(**NETWORKS["resnet12"])
    rng = np.random.default_rng(0)
    for name, kernel in kernels(model).items():
        model.get_layer(name).kernel.assign(kernel * (rng.random(kernel.shape) < 0.3))
    before = model.get_weights()
    zeros = {name: kernel == 0 for name, kernel in kernels(model).items()}
    found = {name: kernel == 0 for name, kernel in kernels(fold(model)).items()}
    assert all(np.array_equal(found[name], zeros[name]) for name in zeros)
    assert all(map(np.array_equal, before, model.get_weights()))


def test_folding_keeps_trained_clips():
    model = build("vgg5", "quantised_relu", SHAPE, width=0.02, batch_norm=True, activation_levels=3)
    clips = spread_clips(model)
    assert clips_of(fold(model)) == clips


def test_network_without_norms_is_returned_as_it_is():
    model = initialised("vgg5", image_shape=SHAPE, width=0.02)
    assert fold(model) is model


def test_bias_of_the_layer_itself_is_folded_too():
    image = keras.Input((4,), name="image")
    x = keras.layers.Dense(3, name="hidden", bias_initializer="ones")(image)
    norm = keras.layers.BatchNormalization(name="hidden_norm", scale=False)
    model = keras.Model(image, norm(x))
    norm.moving_mean.assign([1.0, 2.0, 3.0])
    values = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(fold(model)(values), model(values, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["after a neuron", "shared"])
def test_norm_that_cannot_be_folded_is_named(case):
    image = keras.Input((4,), name="image")
    x = keras.layers.Dense(3, name="hidden")(image)
    if case == "after a neuron":
        output = keras.layers.BatchNormalization(name="late")(keras.layers.ReLU(name="neuron")(x))
    else:
        output = keras.layers.Add(name="add")([keras.layers.BatchNormalization(name="late")(x), x])
    with pytest.raises(UserError, match=r"^layer late: cannot be folded; "):
        fold(keras.Model(image, output))


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_norms_keep_float32_statistics_and_the_fused_kernel(precision):
    model = build(image_shape=SHAPE, batch_norm=True, precision=precision, **NETWORKS["vgg5"])
    for name, layer in Graph.of(model).select(is_norm).items():
        assert {weight.dtype.name for weight in layer.weights} == {"float32"}
        assert layer.fused == name.startswith("conv")


def test_masks_of_a_wrapped_network_fit_the_folded_one():
    model = normed(**NETWORKS["vgg5"])
    rng = np.random.default_rng(0)
    masks = {name: rng.random(kernel.shape) < 0.5 for name, kernel in kernels(model).items()}
    wrapped = pruning.wrap(model, masks)
    again = pruning.wrap(fold(pruning.unwrap(wrapped)), pruning.masks(wrapped))
    found = pruning.masks(again)
    assert found.keys() == masks.keys()
    assert all(np.array_equal(found[name], masks[name]) for name in masks)
    assert pruning.stray_weights(again) == {}
    images = some_images(3, SHAPE)
    np.testing.assert_allclose(again(images), wrapped(images, training=False), rtol=1e-3, atol=1e-3)
