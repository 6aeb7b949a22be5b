"""On a GPU: what `auto` chooses there, and that the compiled steps compute what a CPU computes.

Run with `pytest -m gpu`; without a GPU these tests are skipped.
"""

import numpy as np
import pytest
import tensorflow as tf
from neuron_oracle import grid_currents, lif
from small_networks import build, initialised, some_images

from snn_tf import copies, execution, provenance, pruners, pruning
from snn_tf.config import Config
from snn_tf.graph import Graph, is_neuron
from snn_tf.initialisation import initialise
from snn_tf.layers import use_implementation
from snn_tf.neuron import lif_scan
from snn_tf.objectives import AttentionGuided, CrossEntropy
from snn_tf.surrogate import Surrogate
from snn_tf.update import Recipe, Update

pytestmark = pytest.mark.gpu
CPU, GPU = "CPU:0", "GPU:0"
BATCH, STEPS = 8, 3
SETTINGS = {
    "network": "vgg5",
    "width": 0.25,
    "head": "linear",
    "density": 0.3,
    "density_schedule": "constant",
    "timesteps": 3,
}
RECIPE = Recipe("sgd", 0.05, 1e-3, 2)


@pytest.fixture(autouse=True)
def exact_float32():
    """Products of float32 as such: TensorFloat-32 has 10 bits."""
    if not tf.config.list_physical_devices("GPU"):
        pytest.skip("TensorFlow sees no GPU")
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(True)


def config_on(device: str, **settings) -> Config:
    return Config(
        **SETTINGS, precision="float32", lif="fused", jit_compile=str(device == GPU).lower(), **settings
    )


def ann(config: Config) -> Update:
    model = initialised(config.network, 1, width=config.width, head=config.head, batch_norm=True)
    return Update(config, RECIPE, model, CrossEntropy(model, config), 4, 1)


def guided(config: Config) -> Update:
    plain = build(config.network, width=config.width, head=config.head)
    pruner = pruners.make_pruner(plain, config, 4)
    initialise(pruner.model, 2, pruner.start(2))
    pruning.project(pruner.model)
    assert all(0 < pruner.gate(name).numpy().mean() < 1 for name in pruner.wrappers)
    teacher = initialised(config.network, 9, width=config.width, head=config.head)
    teacher.trainable = False
    objective = AttentionGuided(pruner, teacher, config)
    return Update(config, RECIPE, pruner.model, objective, 4, 1, pruner)


def snn(config: Config) -> Update:
    plain = copies.spiking(initialised(config.network, 1, width=config.width, head=config.head), config)
    for layer in Graph.of(plain).select(is_neuron).values():
        layer.cell.v_th.assign(0.4)
        layer.cell.leak.assign(0.9)
    model = use_implementation(pruning.wrap(plain), config.lif)
    return Update(config, RECIPE, model, CrossEntropy(model, config), 4, 1)


KINDS = {
    "train_ann": (ann, {}),
    "compress": (guided, {"saliency": "fisher"}),
    "compress, channels": (guided, {"structure": "channel"}),
    "train_snn": (snn, {}),
}


def trained_on(device: str, kind: str) -> tuple[list[float], list[np.ndarray]]:
    """Losses of some steps and every variable after them."""
    make, settings = KINDS[kind]
    with tf.device(device):
        update = make(config_on(device, **settings))
        assert all(device in variable.device for variable in update.variables)
        images = tf.constant(some_images(BATCH, (32, 32, 3)))
        labels = tf.constant(np.arange(BATCH, dtype=np.int32))
        losses = [float(update.step(images, labels)["loss"]) for _ in range(STEPS)]
    variables = [*update.model.variables, *(update.pruner.variables if update.pruner else ())]
    return losses, [variable.numpy() for variable in variables]


def test_auto_is_xla_the_fused_neuron_and_bfloat16(tmp_path):
    config = execution.resolve(Config(run_dir=str(tmp_path)))
    assert (config.lif, config.jit_compile, config.precision) == ("fused", "true", "mixed_bfloat16")


def test_device_is_named():
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    assert provenance.device() == details["device_name"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_scan_spikes_equal_oracle(dtype):
    current = grid_currents(np.random.default_rng(0), (5, 4, 6, 6, 3))
    expected, _ = lif(current, 0.5, 0.75)
    scan = tf.function(lif_scan, jit_compile=True)
    with tf.device(GPU):
        ours = scan(
            tf.cast(current, dtype), tf.constant(0.5), tf.constant(0.75), 5, Surrogate("triangle", 0.3)
        )
    assert "GPU" in ours.device and 0.0 < expected.mean() < 1.0
    np.testing.assert_array_equal(tf.cast(ours, tf.float32), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_equal_those_of_a_cpu(kind):
    losses, variables = trained_on(GPU, kind)
    expected_losses, expected = trained_on(CPU, kind)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    for ours, theirs in zip(variables, expected, strict=True):
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0)
        assert difference <= 1e-3 * np.abs(theirs.astype(np.float64)).max(initial=0) + 1e-5
