"""The project's own networks and steps, made and run as `train.py` makes and runs them."""

import dataclasses
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras as keras
from absl import app, flags

import measure
from snn_tf import cli, copies, data, execution, models, pruners, pruning, surgery
from snn_tf.config import COMPRESS, TRAIN_ANN, TRAIN_SNN, Config
from snn_tf.errors import UserError
from snn_tf.folding import fold
from snn_tf.graph import Graph, inner, is_neuron, is_synapse
from snn_tf.initialisation import initialise
from snn_tf.layers import use_implementation
from snn_tf.objectives import CrossEntropy, Objective
from snn_tf.pruners import Pruner
from snn_tf.update import Recipe, Update
from workloads import CLASSES, LEAK, LEARNING_RATE, SIDE, SURROGATE_SCALE, V_TH, Workload, channels_last

_scratch = tempfile.TemporaryDirectory()
CLASS_NAMES = [str(label) for label in range(CLASSES)]
SPEC = data.DataSpec("noise", (SIDE, SIDE, 3), CLASSES, "none", (0.0,) * 3, (1.0,) * 3)
RECIPE = Recipe("adam", LEARNING_RATE, weight_decay=0.0, epochs=1)
# As many as CIFAR-10's training split gives at a batch size of 128.
STEPS_PER_EPOCH = 351
# A network is measured as sparse as --density says: masks that fall to it begin dense.
COMMON = {"dropout": 0.0, "head_dropout": 0.0, "density_schedule": "constant"}


def define_settings(**defaults) -> None:
    """Defines `train.py`'s flags for a program, with defaults of its own."""
    cli.define_flags()
    for name, value in {**COMMON, **defaults}.items():
        flags.FLAGS.set_default(name, value)


def from_flags(**changes) -> Config:
    """The settings that `define_settings` defined, `changes` over them, resolved for this machine."""
    scratch = tempfile.mkdtemp(dir=_scratch.name)
    return execution.resolve(dataclasses.replace(cli.config_from_flags(), run_dir=scratch, **changes))


def main(program: Callable[[], None]) -> None:
    """Runs a program after its flags have been read; a user's mistake becomes one line."""

    def run(argv: list[str]) -> None:
        measure.limit_threads(2)
        try:
            program()
        except UserError as error:
            print(f"{argv[0]}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)

    app.run(run)


def settings(**changes) -> Config:
    """The workloads' settings, `changes` over them, and every `auto` resolved for this machine."""
    common = {
        "run_dir": tempfile.mkdtemp(dir=_scratch.name),
        "schedule": "constant",
        "surrogate_scale": SURROGATE_SCALE,
        **COMMON,
    }
    return execution.resolve(Config(**{**common, **changes}))


def network(workload: Workload, config: Config, neuron: str = "lif") -> keras.Model:
    """A workload's network in its wrappers, with the workload's weights, leaks and thresholds.

    It takes float32 images [B, H, W, C] that are standardised already, as the other libraries' do.
    """
    plan = models.Plan(workload.convolutions, workload.head)
    plain = models.build(config, neuron, SPEC, plan)
    image = keras.Input(SPEC.image_shape, name="image")
    model = pruning.wrap(keras.models.clone_model(plain, image))
    graph = Graph.of(use_implementation(model, config.lif))
    synapses = graph.select(is_synapse).values()
    for layer, kernel in zip(synapses, channels_last(workload.weights()), strict=True):
        inner(layer).kernel.assign(kernel)
    for layer in graph.select(is_neuron).values() if neuron == "lif" else ():
        layer.cell.leak.assign(LEAK)
        layer.cell.v_th.assign(V_TH)
    return model


def meta_model(config: Config, spec: data.DataSpec = SPEC) -> keras.Model:
    """The dense ANN of `--network`, initialised."""
    model = models.build(config, "relu", spec)
    initialise(model, config.stage_seed(TRAIN_ANN))
    return model


def student(config: Config) -> Pruner:
    """A pruner around a fresh student of `--network`, which has its first masks."""
    pruner = pruners.make_pruner(models.build(config, "relu", SPEC), config, STEPS_PER_EPOCH)
    seed = config.stage_seed(COMPRESS)
    initialise(pruner.model, seed, pruner.start(seed))
    pruning.project(pruner.model)
    return pruner


def snn(config: Config) -> keras.Model:
    """The SNN of `--network` at `--density` and `--structure`, from random masks; dense ones at 1."""
    pruner = student(config)
    ann = pruning.unwrap(pruner.model)
    masks = pruning.masks(pruner.model)
    if isinstance(pruner, pruners.ChannelPruner):
        ann, masks = surgery.remove_channels(ann, pruner.channels()), None
    model = pruning.wrap(copies.spiking(fold(ann), config), masks)
    return use_implementation(model, config.lif)


def examples(workload: Workload) -> tuple[tf.Tensor, tf.Tensor]:
    """The workload's images [B, H, W, C], float32, and labels [B], int32."""
    images, labels = workload.examples()
    return tf.constant(images.transpose(0, 2, 3, 1)), tf.constant(labels, tf.int32)


def noise(count: int) -> data.Split:
    """Random images, uint8, and labels of the shape of `SPEC`."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *SPEC.image_shape), np.uint8)
    return data.Split(images, rng.integers(0, CLASSES, count).astype(np.int32))


def update(
    config: Config,
    model: keras.Model,
    objective: Objective | None = None,
    pruner: Pruner | None = None,
    recipe: Recipe = RECIPE,
) -> Update:
    """What `train.py` trains a model with; its `step` is the training step."""
    objective = objective or CrossEntropy(model, config)
    return Update(
        config, recipe, model, objective, STEPS_PER_EPOCH, config.stage_seed(TRAIN_SNN), pruner
    )


def step(update: Update, images: tf.Tensor, labels: tf.Tensor) -> measure.Call:
    """A training step as a call that returns when it is done."""
    return lambda: float(update.step(images, labels)["loss"])


def waiting(function: measure.Call) -> measure.Call:
    """The compiled function as a call that returns when its result, a tensor or several, is there."""
    compiled = tf.function(function, autograph=False)
    return lambda: tf.nest.map_structure(lambda x: tf.reshape(x, [-1])[:1].numpy(), compiled())
