"""The training loop: schedules, one step in value, what stops it, how it resumes, and its events."""

import dataclasses
import math
import os
import signal

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from run_folders import Killed
from small_networks import clips_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from snn_tf import copies, data, models, pruners, pruning
from snn_tf.config import Config
from snn_tf.errors import Interrupted, UserError
from snn_tf.files import write_json
from snn_tf.graph import Graph, inner, is_neuron, is_synapse
from snn_tf.initialisation import initialise
from snn_tf.interruption import handled
from snn_tf.layers import LEAST
from snn_tf.objectives import AttentionGuided, CrossEntropy
from snn_tf.runs import StageFolder
from snn_tf.summaries import TensorBoard
from snn_tf.training import Trainer
from snn_tf.update import LearningRate, Recipe, trained_variables

SHAPE, CLASSES = (4, 4, 1), 3
STEPS_PER_EPOCH, EPOCHS = 3, 4
STEPS = STEPS_PER_EPOCH * EPOCHS
SYNAPSES = ("conv1", "conv2", "conv3", "logits")
NEURONS = ("conv1_neuron", "conv2_neuron", "conv3_neuron")
SETTINGS = {
    "network": "vgg5",
    "width": 0.1,
    "head": "linear",
    "batch_size": 8,
    "compress_epochs": EPOCHS,
    "density": 0.3,
    "timesteps": 2,
    "checkpoint_every": "2",
    "log_every": 1,
}


def some_data() -> data.Data:
    """Noise whose brightness tells the class: 26 training images, so that two are left over."""
    rng = np.random.default_rng(5)

    def split(count):
        labels = rng.integers(0, CLASSES, count).astype(np.int32)
        noise = rng.integers(0, 100, (count, *SHAPE))
        return data.Split((noise + 70 * labels[:, None, None, None]).astype(np.uint8), labels)

    spec = data.DataSpec("noise", SHAPE, CLASSES, "crop_flip", (120.0,), (60.0,))
    names = [str(label) for label in range(CLASSES)]
    return data.Data(spec, split(8 * STEPS_PER_EPOCH + 2), split(7), split(5), names)


DATA = some_data()


def network(config: Config, seed: int = 1) -> keras.Model:
    model = models.build(config, "relu", DATA.spec)
    initialise(model, seed)
    return model


def random_masks(model: keras.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {
        name: rng.random(inner(layer).kernel.shape) < 0.6
        for name, layer in Graph.of(model).select(is_synapse).items()
    }


def spiking(config: Config) -> keras.Model:
    """A wrapped SNN with masks, low thresholds and leaks below 1."""
    plain = copies.spiking(network(config), config)
    for layer in Graph.of(plain).select(is_neuron).values():
        layer.cell.v_th.assign(0.4)
        layer.cell.leak.assign(0.9)
    return pruning.wrap(plain, random_masks(plain))


def student(config: Config) -> pruners.Pruner:
    neuron = "quantised_relu" if config.activation_levels else "relu"
    pruner = pruners.make_pruner(models.build(config, neuron, DATA.spec), config, STEPS_PER_EPOCH)
    initialise(pruner.model, 2, pruner.start(2))
    pruning.project(pruner.model)
    return pruner


def stage_folder(run_dir, stage: str) -> StageFolder:
    """A stage's folder with what a trainer reads from it."""
    folder = StageFolder(run_dir, stage)
    identity = {"stage": stage, "settings": {}, "upstream": None, "fingerprint": stage}
    write_json(folder.path / "stage.json", identity)
    return folder


def trainer_of(kind: str, run_dir, **settings) -> Trainer:
    """A trainer of train_ann, compress (four kinds) or train_snn, made as by a new process."""
    if kind in ("irregular", "channel"):
        settings["structure"] = kind
    settings["batch_norm"] = kind == "normed"
    settings["activation_levels"] = 3 if kind == "levels" else 0
    config = Config(**SETTINGS | settings)
    if kind == "ann":
        model, recipe = network(config), Recipe("sgd", 0.05, 1e-3, EPOCHS)
        objective = CrossEntropy(model, config)
        return Trainer(config, recipe, model, objective, DATA, stage_folder(run_dir, "train_ann"))
    recipe = Recipe("adam", 0.01, 1e-3, EPOCHS)
    if kind == "snn":
        model = spiking(config)
        objective = CrossEntropy(model, config)
        return Trainer(config, recipe, model, objective, DATA, stage_folder(run_dir, "train_snn"))
    pruner = student(config)
    objective = AttentionGuided(pruner, network(config, seed=9), config)
    folder = stage_folder(run_dir, "compress")
    return Trainer(config, recipe, pruner.model, objective, DATA, folder, pruner)


def linear_model(masks: np.ndarray | None = None) -> keras.Model:
    """logits = x W, with pixels divided by 100; W is [4, 3], wrapped if there is a mask."""
    image = keras.Input((2, 2, 1), dtype="uint8", name="image")
    x = keras.layers.Normalization(mean=0.0, variance=100.0**2, name="standardise")(image)
    x = keras.layers.Flatten(name="flatten")(x)
    logits = keras.layers.Dense(CLASSES, use_bias=False, name="logits")(x)
    model = keras.Model(image, logits)
    kernel = np.random.default_rng(3).normal(size=(4, CLASSES))
    model.get_layer("logits").kernel.assign(kernel)
    return model if masks is None else pruning.wrap(model, {"logits": masks})


def linear_trainer(run_dir, config, recipe, model=None, pruner=None) -> Trainer:
    model = pruner.model if pruner else model or linear_model()
    small = [
        data.Split(split.images[:, :2, :2], split.labels) for split in (DATA.train, DATA.validation)
    ]
    spec = dataclasses.replace(DATA.spec, image_shape=(2, 2, 1), augment="none")
    source = data.Data(spec, *small, small[1], DATA.class_names)
    objective = CrossEntropy(model, config)
    return Trainer(config, recipe, model, objective, source, stage_folder(run_dir, "train_ann"), pruner)


def state(trainer: Trainer) -> dict[str, np.ndarray]:
    """Every number that training may change: weights, masks, slots, scores, active channels."""
    optimizer, found = trainer.update.optimizer, [*trainer.model.variables]
    found += trainer.pruner.variables if trainer.pruner else []
    numbers = {f"{number} {variable.name}": variable for number, variable in enumerate(found)}
    for number, variable in enumerate(trainer.update.variables):
        for slot in optimizer.get_slot_names():
            numbers[f"{slot} {number} {variable.name}"] = optimizer.get_slot(variable, slot)
    return {
        name: variable.numpy()
        for name, variable in (numbers | {"iterations": optimizer.iterations}).items()
    }


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []


# --- recipe and learning rate


def test_recipe_of_a_stage_has_that_stages_settings():
    config = Config(
        **{"ann_optimizer": "adam", "ann_learning_rate": 0.25, "ann_weight_decay": 0.5, "ann_cutout": 1},
        **{"snn_optimizer": "sgd", "snn_learning_rate": 0.75, "snn_weight_decay": 1.0, "snn_cutout": 2},
        **{"ann_epochs": 3, "compress_epochs": 4, "snn_epochs": 5},
    )
    assert Recipe.of(config, "train_ann") == Recipe("adam", 0.25, 0.5, 3, 1)
    assert Recipe.of(config, "compress") == Recipe("adam", 0.25, 0.5, 4, 1)
    assert Recipe.of(config, "train_snn") == Recipe("sgd", 0.75, 1.0, 5, 2)


def rates(total: int, **settings) -> np.ndarray:
    """The learning rate of each of `total` steps, peak 0.5, two steps an epoch."""
    recipe = Recipe("sgd", 0.5, 0.0, total // 2)
    schedule = LearningRate(Config(**settings), recipe, steps_per_epoch=2)
    return np.array([float(schedule(tf.constant(step, tf.int64))) for step in range(total)])


def test_rate_cosine_falls_towards_zero():
    expected = [0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    np.testing.assert_allclose(rates(20, schedule="cosine"), expected, rtol=1e-5)


def test_rate_constant_stays():
    np.testing.assert_allclose(rates(20, schedule="constant"), 0.5)


@pytest.mark.parametrize("total", [10, 20, 50])
def test_rate_step_drops_after_60_80_and_90_percent(total):
    shares = [(0.5, 60), (0.05, 20), (0.005, 10), (0.0005, 10)]
    expected = np.concatenate([np.full(total * percent // 100, rate) for rate, percent in shares])
    np.testing.assert_allclose(rates(total, schedule="step"), expected, rtol=1e-5)


def test_rate_warm_up_multiplies_the_schedule_by_a_linear_rise():
    rise = np.minimum(np.arange(1, 21) / 6, 1.0)
    for schedule in ("cosine", "step", "constant"):
        warm = rates(20, schedule=schedule, warmup_epochs=3.0)
        np.testing.assert_allclose(warm, rates(20, schedule=schedule) * rise, rtol=1e-5)


# --- one step in value


def numpy_training(kernel, mask, batches, rates, config, recipe):
    """SGD with momentum on softmax cross entropy of x W, from the equations, in float64."""
    velocity, losses = np.zeros_like(kernel), []
    for (images, labels), rate in zip(batches, rates, strict=True):
        x = images.reshape(len(images), -1) / 100.0
        targets = np.eye(CLASSES)[labels] * (1 - config.label_smoothing)
        targets += config.label_smoothing / CLASSES
        exponents = np.exp(x @ kernel)
        p = exponents / exponents.sum(axis=1, keepdims=True)
        losses.append(-(targets * np.log(p)).sum(axis=1).mean())
        gradient = (x.T @ (p - targets) / len(x) + recipe.weight_decay * kernel) * mask
        norm = np.sqrt((gradient**2).sum())
        if config.clip_norm and norm > config.clip_norm:
            gradient *= config.clip_norm / norm
        velocity = config.momentum * velocity - rate * gradient
        kernel = kernel + velocity
    return kernel, losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 0.15])
def test_steps_equal_numpys(tmp_path, masked, clip_norm):
    config = Config(
        batch_size=8, momentum=0.8, clip_norm=clip_norm, label_smoothing=0.1, warmup_epochs=1.0
    )
    recipe = Recipe("sgd", 0.3, 0.05, 2)
    mask = np.arange(12).reshape(4, 3) % 3 != 1 if masked else None
    model = linear_model(mask)
    kernel = inner(Graph.of(model).layers["logits"]).kernel
    start = kernel.numpy().astype(np.float64)
    trainer = linear_trainer(tmp_path, config, recipe, model)
    batches = [
        (images.numpy(), labels.numpy())
        for images, labels in data.evaluation_batches(trainer.source.train, 8)
    ][:3]
    values = [
        trainer.update.step(tf.constant(images), tf.constant(labels)) for images, labels in batches
    ]
    rise = [(step + 1) / 3 * 0.15 * (1 + math.cos(math.pi * step / 6)) for step in range(3)]
    ones = np.ones((4, 3)) if mask is None else mask
    expected, losses = numpy_training(start, ones, batches, rise, config, recipe)
    np.testing.assert_allclose(kernel.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([value["loss"] for value in values], losses, rtol=1e-5)
    first = batches[0][0].reshape(8, -1) / 100.0 @ start
    assert float(values[0]["accuracy"]) == pytest.approx(np.mean(first.argmax(1) == batches[0][1]))


def made_up(variables) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.normal(size=variable.shape).astype(np.float32) for variable in variables]


def prepared(trainer: Trainer, gradients) -> dict[str, np.ndarray]:
    """What the optimizer gets of gradients, kernels by layer name and the rest by position."""
    results = trainer.update.prepared([tf.constant(gradient) for gradient in gradients])
    results = trainer.update.clipped(results, tf.linalg.global_norm(results))
    keys = [
        trainer.update.kernels.get(variable.ref(), str(number))
        for number, variable in enumerate(trainer.update.variables)
    ]
    return {key: result.numpy() for key, result in zip(keys, results, strict=True)}


def channel_gates(pruner: pruners.ChannelPruner) -> dict[str, np.ndarray]:
    """In a chain a weight moves if the channel it reads and the channel it makes are both active."""
    active, gates = pruner.channels(), {}
    ends = {"conv1": (None, "conv1"), "conv2": ("conv1", "conv2"), "conv3": ("conv2", "conv3")}
    for name, (source, target) in (ends | {"logits": ("conv3", None)}).items():
        gate = np.ones(pruner.wrappers[name].layer.kernel.shape)
        if source:
            gate[..., ~active[source], :] = 0
        if target:
            gate[..., ~active[target]] = 0
        gates[name] = gate
    return gates


@pytest.mark.parametrize("clip_norm", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["ann", "irregular", "channel", "snn"])
def test_gradients_get_decay_then_gates_then_clipping(tmp_path, kind, clip_norm):
    # Sparse from the start, so that gates have zeros.
    trainer = trainer_of(kind, tmp_path, clip_norm=clip_norm, density_schedule="constant")
    gradients = made_up(trainer.update.variables)
    gates = {
        "ann": lambda: dict.fromkeys(SYNAPSES, 1.0),
        "channel": lambda: channel_gates(trainer.pruner),
    }.get(kind, lambda: pruning.masks(trainer.model))()
    expected = {}
    for number, (variable, gradient) in enumerate(zip(trainer.update.variables, gradients, strict=True)):
        name = trainer.update.kernels.get(variable.ref(), str(number))
        expected[name] = gradient
        if name in SYNAPSES:
            expected[name] = (gradient + 1e-3 * variable.numpy()) * gates[name]
    norm = math.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in expected.values()))
    factor = clip_norm / norm if clip_norm else 1.0
    assert set(SYNAPSES) < expected.keys() if kind == "snn" else set(SYNAPSES) == expected.keys()
    assert norm > 2.0 and (kind == "ann" or any((gate == 0).any() for gate in gates.values()))
    found = prepared(trainer, gradients)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient * factor, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("kind", ["irregular", "channel"])
def test_scores_average_the_raw_gradient_of_every_weight(tmp_path, kind):
    trainer = trainer_of(kind, tmp_path, clip_norm=1e-3, score_decay=0.75)
    gradients = made_up(trainer.update.variables)
    nothing = [tf.zeros(variable.shape) for variable in trainer.update.variables]
    for _ in range(2):
        trainer.update.apply([tf.constant(g) for g in gradients], nothing, tf.constant(0.0))
    raw = {
        trainer.update.kernels[v.ref()]: g
        for v, g in zip(trainer.update.variables, gradients, strict=True)
    }
    for name, score in trainer.pruner.scores.items():
        np.testing.assert_allclose(score.numpy(), (1 - 0.75**2) * raw[name], rtol=1e-5, err_msg=name)


def test_weight_decay_spares_v_th_and_leak(tmp_path):
    trainer = trainer_of("snn", tmp_path)
    trainer.update.weight_decay = 0.5
    found = prepared(trainer, [np.zeros(v.shape, np.float32) for v in trainer.update.variables])
    masks = pruning.masks(trainer.model)
    neurons = [found.pop(name) for name in list(found) if name not in SYNAPSES]
    assert neurons == [0.0] * 6
    for name, gradient in found.items():
        kernel = inner(Graph.of(trainer.model).layers[name]).kernel.numpy()
        np.testing.assert_allclose(gradient, 0.5 * kernel * masks[name], rtol=1e-6)
        assert gradient.any()


def test_weight_decay_spares_gamma_and_beta(tmp_path):
    trainer = trainer_of("normed", tmp_path)
    trainer.update.weight_decay = 0.5
    found = prepared(trainer, [np.zeros(v.shape, np.float32) for v in trainer.update.variables])
    assert {name for name, gradient in found.items() if gradient.any()} == set(SYNAPSES)
    assert len(found) == len(SYNAPSES) + 6


def test_gradient_shares_leave_moving_statistics_as_they_are(tmp_path):
    trainer = trainer_of("normed", tmp_path)
    images, labels = next(iter(data.training_batches(DATA.train, DATA.spec, 8, 1, 0, 1)))
    before = state(trainer)
    shares = trainer._gradient_shares(images, labels)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert_same_bits(state(trainer), before)
    trainer.update.compute(images, labels)
    after = state(trainer)
    moved = {v.split()[-1] for v in before if not np.array_equal(before[v], after[v])}
    assert sum("moving" in name for name in moved) == 6


@pytest.mark.parametrize("train_leak", [True, False])
@pytest.mark.parametrize("train_v_th", [True, False])
def test_trained_variables_leave_out_what_is_held(train_leak, train_v_th):
    config = Config(**SETTINGS, train_leak=train_leak, train_v_th=train_v_th)
    model = spiking(config)
    layers = Graph.of(model).layers
    expected = [inner(layers[name]).kernel.ref() for name in SYNAPSES]
    expected += [layers[name].cell.leak.ref() for name in NEURONS if train_leak]
    expected += [layers[name].cell.v_th.ref() for name in NEURONS if train_v_th]
    found = [variable.ref() for variable in trained_variables(model, config)]
    assert len(found) == len(expected) and set(found) == set(expected)


@pytest.mark.parametrize(
    "kind, way",
    [
        ("irregular", "eager"),
        ("normed", "compiled"),
        ("snn", "eager"),
        ("snn", "compiled"),
        pytest.param("irregular", "compiled", marks=pytest.mark.slow),
    ],
)
def test_step_is_the_same_eager_as_graph_and_compiled(tmp_path, kind, way):
    batches = list(data.training_batches(DATA.train, DATA.spec, 8, 1, 0, 3))

    def steps(trainer, step):
        before = state(trainer)
        terms = [step(images, labels) for images, labels in batches]
        after = state(trainer)
        moved = {name for name in before if not np.array_equal(before[name], after[name])}
        assert any("kernel" in name for name in moved)
        assert any("v_th" in name for name in moved) == (kind == "snn")
        assert not any("leak" in name for name in moved)
        return [{name: float(value) for name, value in term.items()} for term in terms]

    graph = trainer_of(kind, tmp_path / "graph", train_leak=False)
    other = trainer_of(
        kind, tmp_path / way, train_leak=False, jit_compile="true" if way == "compiled" else "false"
    )
    expected = steps(graph, graph.update.step)
    found = steps(other, other.update.compute if way == "eager" else other.update.step)
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


# --- killed and resumed


def run_and_be_killed(trainer: Trainer, after: int) -> None:
    """Runs until `after` steps have been computed, and not one thing more."""
    whole = trainer.update.several

    def several(batches, count):
        done = int(trainer.update.optimizer.iterations)
        found = whole(batches, tf.minimum(count, after - done))
        if int(trainer.update.optimizer.iterations) == after:
            raise Killed
        return found

    trainer.update.several = several
    with pytest.raises(Killed):
        trainer.run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Uninterrupted trainings by kind, each made once: (trainer, its evaluation, state at its start)."""
    made = {}

    def get(kind):
        if kind not in made:
            profile = (4, 6) if kind == "snn" else ()
            trainer = trainer_of(kind, tmp_path_factory.mktemp(kind), profile_steps=profile)
            start = state(trainer)
            made[kind] = trainer, trainer.run(), start
        return made[kind]

    return get


@pytest.mark.parametrize(
    "kind, kills",
    [
        ("ann", [(1, 0), (5, 4), (7, 6)]),
        ("irregular", [(5, 4)]),
        ("channel", [(5, 4)]),
        ("normed", [(5, 4)]),
        ("levels", [(5, 4)]),
        ("snn", [(3, 2), (5, 4)]),
    ],
)
def test_killed_and_resumed_training_ends_bit_for_bit_the_same(tmp_path, kind, kills, finished):
    """Killed after so many steps, with so many in the newest checkpoint; masks change at 3, 6 and 9."""
    whole, expected, start = finished(kind)
    for killed_after, restored in kills:
        trainer = trainer_of(kind, tmp_path)
        run_and_be_killed(trainer, killed_after)
        newest = trainer.checkpoints.newest
        assert (newest is None) if not restored else newest.name == f"step-{restored}"
    resumed = trainer_of(kind, tmp_path)
    counts, several = [], resumed.update.several
    resumed.update.several = lambda *rest: (counts.append(int(rest[1])), several(*rest))[1]
    result = resumed.run()
    assert sum(counts) == STEPS - kills[-1][1]
    assert_same_bits(state(resumed), state(whole))
    assert np.array_equal(result.confusion, expected.confusion)
    assert result.spikes == expected.spikes
    end = state(whole)
    moved = {name for name in start if not np.array_equal(start[name], end[name])}
    parts = {
        "snn": ("v_th", "leak"),
        "irregular": ("/mask", "score"),
        "channel": ("/mask", "score", "active"),
        "normed": ("/mask", "gamma", "beta", "moving_mean", "moving_variance"),
        "levels": ("/mask", "clip"),
    }
    for part in ("kernel", *parts.get(kind, ())):
        assert any(part in name for name in moved), part


@pytest.mark.parametrize("kind", ["irregular", "snn"])
def test_number_of_steps_in_a_call_does_not_change_a_bit(tmp_path, kind, finished):
    """Calls of one step against calls up to where checkpoints, masks and epochs halt them."""
    trainer = trainer_of(kind, tmp_path, steps_per_call=1)
    trainer.run()
    assert_same_bits(state(trainer), state(finished(kind)[0]))


def test_calls_halt_at_checkpoints_masks_log_points_epochs_and_traces(tmp_path):
    halts = {"checkpoint_every": "5", "mask_update": 4, "log_every": 7, "profile_steps": (9, 10)}
    trainer = trainer_of("irregular", tmp_path, **halts)
    step, seen = 0, []
    while step < STEPS:
        step += trainer._until_next_halt(step)
        seen.append(step)
    assert seen == [3, 4, 5, 6, 7, 8, 9, 10, 12]
    few = trainer_of("irregular", tmp_path, steps_per_call=2, checkpoint_every="100", log_every=100)
    assert [few._until_next_halt(step) for step in range(4)] == [2, 2, 1, 2]


def test_training_killed_between_its_last_checkpoint_and_its_record_does_nothing_more(
    tmp_path, finished
):
    whole, expected, _ = finished("ann")
    trainer_of("ann", tmp_path).run()
    again = trainer_of("ann", tmp_path)
    again.update.several = None
    assert np.array_equal(again.run().confusion, expected.confusion)
    for first, second in zip(again.model.variables, whole.model.variables, strict=True):
        assert np.array_equal(first.numpy(), second.numpy())


def test_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(tmp_path, capsys):
    config, recipe = Config(batch_size=8, checkpoint_every="1"), Recipe("sgd", 0.1, 0.0, 1)
    whole = linear_trainer(tmp_path, config, recipe)
    whole.run()
    newest = whole.checkpoints.newest
    with open(newest / "state.data-00000-of-00001", "r+b") as file:
        file.truncate(10)
    resumed = linear_trainer(tmp_path, config, recipe)
    resumed.run()
    said = capsys.readouterr().out
    assert f"{newest}/state.data-00000-of-00001: has 10 bytes" in said
    assert f"continues from {newest.with_name('step-2')}\n" in said
    assert_same_bits(state(resumed), state(whole))


# --- what is not finite


class NotFinite:
    """An objective that goes wrong in one step: its loss, or only its loss's gradient."""

    def __init__(self, trainer: Trainer, step: int, spoilt: str):
        self.trainer, self.step, self.spoilt = trainer, step, spoilt
        self.good = trainer.update.objective

    def __call__(self, images, labels):
        terms, logits = self.good(images, labels)
        now = self.trainer.update.optimizer.iterations == self.step - 1
        loss = terms["cross_entropy"]
        if self.spoilt == "loss":
            return {"cross_entropy": loss * tf.where(now, math.nan, 1.0)}, logits
        zero = tf.cast(now, tf.float32) * (loss - tf.stop_gradient(loss))
        return {"cross_entropy": loss + tf.where(now, tf.sqrt(zero), 0.0)}, logits


@pytest.mark.parametrize(
    "spoilt, step, good, found",
    [
        ("loss", 5, 4, "loss or gradient is not finite at step 5 (logits)"),
        ("gradient", 6, 4, "loss or gradient is not finite at step 6 (logits)"),
    ],
)
def test_non_finite_training_stops_and_keeps_the_last_good_checkpoint(
    tmp_path, spoilt, step, good, found
):
    config = Config(batch_size=8, checkpoint_every="2", log_every=50)
    recipe = Recipe("sgd", 0.1, 0.0, EPOCHS)
    whole = linear_trainer(tmp_path / "whole", config, recipe)
    whole.run()
    trainer = linear_trainer(tmp_path, config, recipe)
    trainer.update.objective = NotFinite(trainer, step, spoilt)
    with pytest.raises(UserError) as caught:
        trainer.run()
    kept = tmp_path / "train_ann" / "checkpoints" / f"step-{good}"
    line = str(caught.value)
    assert "\n" not in line and caught.value.exit_code == 1
    assert line.startswith("train_ann: ") and found in line and f"checkpoint: {kept};" in line
    resumed = linear_trainer(tmp_path, config, recipe)
    resumed.run()
    assert_same_bits(state(resumed), state(whole))


def test_loss_that_is_not_finite_is_noticed_before_masks_change(tmp_path):
    config = Config(
        batch_size=8, density=0.5, mask_update=2, log_every=50, checkpoint_every="50", compress_epochs=4
    )
    pruner = pruners.make_pruner(linear_model(), config, STEPS_PER_EPOCH)
    pruner.start(1)
    trainer = linear_trainer(tmp_path, config, Recipe("sgd", 0.1, 0.0, 4), pruner=pruner)
    trainer.update.objective = NotFinite(trainer, 2, "loss")
    with pytest.raises(UserError, match=r"not finite at step 2 \(logits\); last good checkpoint: none"):
        trainer.run()


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
@pytest.mark.parametrize(("kind", "batch_norm"), [("irregular", True), ("snn", False)])
def test_step_that_is_not_finite_changes_nothing_but_its_number(
    tmp_path, kind, batch_norm, spoilt, compiled
):
    settings = {"jit_compile": compiled, "clip_norm": 1.0, "batch_norm": batch_norm}
    trainer = trainer_of(kind, tmp_path, **settings)
    trainer.update.objective = NotFinite(trainer, 3, spoilt)
    batches = [next(trainer._batches(step)) for step in range(4)]
    states = []
    for batch in batches:
        trainer.update.step(*batch)
        states.append({k: v for k, v in state(trainer).items() if k != "iterations"})
    assert_same_bits(states[2], states[1])
    assert [int(x) for x in (trainer.update.skipped, trainer.update.bad_step)] == [1, 3]
    assert set(SYNAPSES) <= set(trainer.update.bad_layers()) <= {*SYNAPSES, *NEURONS}
    assert int(trainer.update.optimizer.iterations) == 4
    for before, after in ((states[0], states[1]), (states[2], states[3])):
        assert any(not np.array_equal(before[name], after[name]) for name in before)
    assert all(np.isfinite(value).all() for value in states[3].values())


def test_layers_of_gradients_that_are_not_finite_are_named(tmp_path):
    trainer = trainer_of("ann", tmp_path)
    gradients = [tf.zeros(variable.shape) for variable in trainer.update.variables]
    squares = [math.nan if "conv2" in v.name else 1.0 for v in trainer.update.variables]
    assert len(gradients) == len(squares)
    trainer.update._skip(tf.constant(squares), [])
    assert trainer.update.bad_layers() == ["conv2"]


def test_skip_counts_and_says_it_once_and_goes_on(tmp_path, capsys):
    config = Config(batch_size=8, on_nonfinite="skip", log_every=1)
    trainer = linear_trainer(tmp_path, config, Recipe("sgd", 0.1, 0.0, EPOCHS))
    good = trainer.update.objective

    def objective(images, labels):
        terms, logits = good(images, labels)
        bad = tf.reduce_any(trainer.update.optimizer.iterations == tf.constant([3, 7], tf.int64))
        return {"cross_entropy": terms["cross_entropy"] * tf.where(bad, math.inf, 1.0)}, logits

    trainer.update.objective = objective
    trainer.run()
    assert int(trainer.update.skipped) == 2 and int(trainer.update.optimizer.iterations) == STEPS
    said = capsys.readouterr().out
    assert said.count("not finite") == 1 and "warning: step 4: loss or gradient is not finite" in said
    counted = series(events(trainer), "skipped_steps")
    assert [counted[step] for step in (3, 4, 7, 8, STEPS)] == [0, 1, 1, 2, 2]


def finite_but(steps: set[int] | None, run_dir, **settings) -> Trainer:
    """A trainer that skips some steps, counted from 1, or all if None: there the loss is not finite."""
    config = Config(batch_size=8, on_nonfinite="skip", **settings)
    trainer = linear_trainer(run_dir, config, Recipe("sgd", 0.1, 0.0, EPOCHS))
    good = trainer.update.objective

    def objective(images, labels):
        terms, logits = good(images, labels)
        numbers = range(1, STEPS + 1) if steps is None else sorted(steps)
        step = trainer.update.optimizer.iterations + 1
        bad = tf.reduce_any(step == tf.constant(list(numbers), tf.int64))
        return {"cross_entropy": terms["cross_entropy"] * tf.where(bad, math.nan, 1.0)}, logits

    trainer.update.objective = objective
    return trainer


def killed_after_step(trainer: Trainer, last: int, monkeypatch) -> None:
    """Trains, a checkpoint every step, and is killed once that of step `last` is saved."""
    save = trainer._save

    def killed(step):
        save(step)
        if step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.checkpoints.newest.name == f"step-{last}"


NEVER_FINITE = "not finite at any step of the epoch up to 3; last good"


def test_epoch_without_one_finite_step_stops_even_with_skip(tmp_path):
    with pytest.raises(UserError, match=NEVER_FINITE) as caught:
        finite_but(None, tmp_path).run()
    assert str(caught.value).endswith("; lower the learning rate, or set --clip_norm")


def test_epoch_without_one_finite_step_stops_after_a_resumption_in_it_too(tmp_path, monkeypatch):
    settings = {"checkpoint_every": "1", "steps_per_call": 1}
    killed_after_step(finite_but(None, tmp_path, **settings), 1, monkeypatch)
    with pytest.raises(UserError, match=NEVER_FINITE):
        finite_but(None, tmp_path, **settings).run()


def test_steps_skipped_before_a_resumption_count_in_their_own_epoch_alone(tmp_path, monkeypatch):
    settings = {"checkpoint_every": "1", "steps_per_call": 1}
    skipped = {1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH + 1}
    assert len(skipped) == STEPS_PER_EPOCH
    killed_after_step(finite_but(skipped, tmp_path, **settings), STEPS_PER_EPOCH - 1, monkeypatch)
    trainer = finite_but(skipped, tmp_path, **settings)
    trainer.run()
    assert int(trainer.update.skipped) == len(skipped)


def test_events_that_cannot_be_written_are_one_line(tmp_path):
    blocked = tmp_path / "events"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not be written: ") as caught:
        TensorBoard(blocked).scalars(1, {"loss": 0.5})
    assert str(caught.value).startswith(f"{blocked}: ") and "\n" not in str(caught.value)


# --- degenerate networks


def degenerate(run_dir, finding: str, **settings) -> Trainer:
    """A trainer of an SNN that has gone silent, or two of whose leaks stay at their lower bound."""
    trainer = trainer_of("snn", run_dir, warmup_epochs=1e9, **settings)
    cells = [layer.cell for layer in Graph.of(trainer.model).select(is_neuron).values()]
    if finding == "silence":
        cells[1].v_th.assign(1e6)
    else:
        for cell in cells[:2]:
            cell.leak.assign(LEAST)
    return trainer


DEGENERATE = {
    "silence": "no spike reaches the output layer; the first silent layer is conv2_neuron; ",
    "bound": "leak of conv1_neuron, conv2_neuron is at its lower bound, 0.001; ",
}


@pytest.mark.parametrize("finding", DEGENERATE)
def test_degenerate_network_is_warned_of_once_and_trained_on(tmp_path, capsys, finding):
    trainer = degenerate(tmp_path, finding)
    trainer.run()
    assert int(trainer.update.optimizer.iterations) == STEPS
    said = [line for line in capsys.readouterr().out.splitlines() if DEGENERATE[finding] in line]
    assert len(said) == 1 and said[0].startswith(f"train_snn: warning: step {STEPS_PER_EPOCH}: ")


@pytest.mark.parametrize("finding", DEGENERATE)
def test_degenerate_network_ends_the_training_if_asked(tmp_path, finding):
    trainer = degenerate(tmp_path, finding, on_degenerate="stop")
    with pytest.raises(UserError) as caught:
        trainer.run()
    line = str(caught.value)
    assert line.startswith(f"train_snn: step {STEPS_PER_EPOCH}: {DEGENERATE[finding]}")
    assert line.endswith(
        f"last good checkpoint: {trainer.checkpoints.newest}; --on_degenerate=warn goes on"
    )
    assert trainer.checkpoints.newest.name == "step-2"


def test_parameters_that_are_not_trained_are_not_warned_of(tmp_path, capsys):
    degenerate(tmp_path, "bound", train_leak=False, on_degenerate="stop").run()
    assert "lower bound" not in capsys.readouterr().out


# --- signals


def test_signal_ends_the_training_after_its_call_and_the_step_is_saved(tmp_path, finished):
    whole = finished("irregular")[0]
    trainer = trainer_of("irregular", tmp_path)
    several = trainer.update.several

    def signalled(batches, count):
        found = several(batches, tf.minimum(count, 1))
        if int(trainer.update.optimizer.iterations) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    trainer.update.several = signalled
    trainer._until_next_halt = lambda step: 1
    with pytest.raises(Interrupted, match=f"compress: step 5 of {STEPS} is saved"), handled():
        trainer.run()
    assert trainer.checkpoints.newest.name == "step-5"
    resumed = trainer_of("irregular", tmp_path)
    resumed.run()
    assert_same_bits(state(resumed), state(whole))


def test_signal_in_a_validation_saves_the_step_and_the_validation_is_made_up_for(tmp_path, finished):
    whole = finished("irregular")[0]
    trainer = trainer_of("irregular", tmp_path)
    evaluate = trainer.evaluator.evaluate

    def signalled(split):
        if int(trainer.update.optimizer.iterations) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(split)

    trainer.evaluator.evaluate = signalled
    with pytest.raises(Interrupted, match="step 6 of"), handled():
        trainer.run()
    assert trainer.checkpoints.newest.name == "step-6"
    assert 6 not in series(events(trainer), "accuracy/validation")
    resumed = trainer_of("irregular", tmp_path)
    resumed.run()
    assert_same_bits(state(resumed), state(whole))
    found = events(resumed)
    assert sorted(series(found, "accuracy/validation")) == EPOCH_ENDS
    shares = series(found, "gradient_share/attention")
    assert shares == series(events(whole), "gradient_share/attention")


def test_minutes_between_checkpoints_are_counted_by_the_clock(tmp_path):
    config = Config(batch_size=8, checkpoint_every="1m", keep_checkpoints=99, steps_per_call=1)
    trainer = linear_trainer(tmp_path, config, Recipe("sgd", 0.1, 0.0, EPOCHS))
    several = trainer.update.several

    def slow(batches, count):
        if int(trainer.update.optimizer.iterations) in (3, 7):
            trainer.saved -= 61.0
        return several(batches, count)

    trainer.update.several = slow
    trainer.run()
    assert {path.name for path in trainer.checkpoints.folder.iterdir()} == {
        "step-4",
        "step-8",
        "step-12",
    }


# --- TensorBoard


def events(trainer: Trainer) -> EventAccumulator:
    """Everything in a trainer's event files."""
    found = EventAccumulator(str(trainer.folder.tensorboard), size_guidance={"tensors": 0})
    return found.Reload()


def series(found: EventAccumulator, tag: str) -> dict[int, float]:
    """A scalar by step."""
    assert found.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    return {event.step: float(tf.make_ndarray(event.tensor_proto)) for event in found.Tensors(tag)}


def steps_of(found: EventAccumulator, tag: str, plugin: str) -> list[int]:
    assert found.SummaryMetadata(tag).plugin_data.plugin_name == plugin
    return [event.step for event in found.Tensors(tag)]


EPOCH_ENDS = list(range(STEPS_PER_EPOCH, STEPS + 1, STEPS_PER_EPOCH))


@pytest.mark.parametrize("kind", ["irregular", "channel"])
def test_events_of_compress(finished, kind):
    trainer, result, _ = finished(kind)
    found = events(trainer)
    terms = [series(found, f"loss/{name}") for name in ("cross_entropy", "distillation", "attention")]
    for step, total in series(found, "loss/total").items():
        assert total == pytest.approx(sum(term[step] for term in terms), rel=1e-5)
        assert all(term[step] > 0 for term in terms)
    rate = [0.005 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    assert series(found, "learning_rate") == pytest.approx(dict(enumerate(rate, start=1)), rel=1e-4)
    accuracies = series(found, "accuracy/training")
    assert list(accuracies) == list(range(1, STEPS + 1))
    assert all(8 * value == round(8 * value) for value in accuracies.values())
    validation = series(found, "accuracy/validation")
    assert list(validation) == EPOCH_ENDS
    assert validation[STEPS] == pytest.approx(result.accuracy)
    shares = [
        series(found, f"gradient_share/{name}")
        for name in ("cross_entropy", "distillation", "attention")
    ]
    for step in EPOCH_ENDS:
        assert sum(share[step] for share in shares) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["irregular", "channel"])
def test_events_show_density_churn_and_weights_by_layer(finished, kind):
    trainer, _, _ = finished(kind)
    found = events(trainer)
    churned = 0.0
    for name, mask in pruning.masks(trainer.model).items():
        density = series(found, f"density/{name}")
        assert list(density) == EPOCH_ENDS
        assert density[STEPS] == pytest.approx(mask.mean())
        churn = series(found, f"churn/{name}")
        assert list(churn) == EPOCH_ENDS[:3]
        churned += sum(churn.values())
        assert steps_of(found, f"weights/{name}", "histograms") == EPOCH_ENDS
        histogram = tf.make_ndarray(found.Tensors(f"weights/{name}")[-1].tensor_proto)
        assert histogram[:, 2].sum() == mask.sum()
    assert churned > 0


def test_events_of_compress_show_trained_clips(finished):
    trainer, _, _ = finished("levels")
    found = events(trainer)
    for name, clip in clips_of(trainer.model).items():
        values = series(found, f"clip/{name}")
        assert list(values) == EPOCH_ENDS
        assert values[STEPS] == pytest.approx(clip) and values[3] != values[6]


def test_events_show_attention_maps_as_images(finished):
    trainer, _, _ = finished("irregular")
    found = events(trainer)
    for name in ("conv1_neuron", "conv3_neuron"):
        assert steps_of(found, f"attention/{name}", "images") == EPOCH_ENDS
        width, height, picture = tf.make_ndarray(found.Tensors(f"attention/{name}")[-1].tensor_proto)
        # A row for each of four images: itself, the teacher's map, the student's.
        assert (int(width), int(height)) == (3 * 64, 4 * 64)
        pixels = tf.io.decode_png(picture).numpy()[:64, :, 0]
        itself, *maps = np.split(pixels, 3, axis=1)
        shown = next(iter(data.evaluation_batches(DATA.validation, 4)))[0]
        assert np.array_equal(itself[::16, ::16], shown[0, :, :, 0])
        student, teacher = trainer.objective.maps(shown)[name]
        for panel, wanted in zip(maps, (teacher[0], student[0]), strict=True):
            grey = 255 * wanted.numpy() / wanted.numpy().max()
            stride = 64 // len(grey)
            np.testing.assert_allclose(panel[::stride, ::stride], grey, atol=1)
        assert np.abs(teacher[0] - student[0]).max() > 0.01


def test_events_of_train_snn(finished):
    trainer, result, _ = finished("snn")
    found = events(trainer)
    cells = {name: trainer.model.get_layer(name).cell for name in NEURONS}
    for name, cell in cells.items():
        for tag, variable in (("v_th", cell.v_th), ("leak", cell.leak)):
            values = series(found, f"{tag}/{name}")
            assert list(values) == EPOCH_ENDS
            assert values[STEPS] == pytest.approx(float(variable)) and values[3] != values[6]
        rate = series(found, f"spike_rate/{name}")
        assert list(rate) == EPOCH_ENDS
        assert rate[STEPS] == pytest.approx(result.spike_rates()[name])
    assert any(0.0 < rate < 1.0 for rate in result.spike_rates().values())
    assert list(series(found, "loss/cross_entropy")) == list(range(1, STEPS + 1))


def test_validation_every_few_epochs_and_at_the_end(tmp_path):
    config = Config(batch_size=8, validate_every=3)
    trainer = linear_trainer(tmp_path, config, Recipe("sgd", 0.1, 0.0, EPOCHS))
    trainer.run()
    found = events(trainer)
    assert list(series(found, "accuracy/validation")) == [3 * STEPS_PER_EPOCH, STEPS]
    assert list(series(found, "accuracy/training")) == EPOCH_ENDS


@pytest.mark.parametrize("resumed", [False, True])
def test_validation_images_are_read_once_an_epoch(tmp_path, resumed):
    config, recipe = Config(batch_size=8), Recipe("sgd", 0.1, 0.0, EPOCHS)
    if resumed:
        linear_trainer(tmp_path, config, recipe).run()
    trainer = linear_trainer(tmp_path, config, recipe)
    evaluate, read = trainer.evaluator.evaluate, []
    trainer.evaluator.evaluate = lambda split: read.append(split) or evaluate(split)
    result = trainer.run()
    assert len(read) == (1 if resumed else EPOCHS)
    assert result.accuracy == evaluate(trainer.source.validation).accuracy


def test_profile_steps_leave_a_trace(finished):
    trainer, _, _ = finished("snn")
    (trace,) = trainer.folder.tensorboard.glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0
    other, _, _ = finished("ann")
    assert not (other.folder.tensorboard / "plugins").exists()


@pytest.mark.parametrize(
    "start, profile_steps",
    [(4, (3, 6)), (0, (0, 2)), (0, (STEPS, STEPS + 5)), (8, (3, 6)), (0, (STEPS + 1, STEPS + 2))],
    ids=["resumed within", "from 0", "from the last step", "resumed behind", "too late"],
)
def test_profile_trace_ends_wherever_training_starts_and_ends(tmp_path, start, profile_steps):
    recipe = Recipe("sgd", 0.1, 0.0, EPOCHS)
    if start:
        before = linear_trainer(tmp_path, Config(batch_size=8, checkpoint_every=start), recipe)
        run_and_be_killed(before, start + 1)
    trainer = linear_trainer(tmp_path, Config(batch_size=8, profile_steps=profile_steps), recipe)
    trainer.run()
    traced = start < profile_steps[1] and profile_steps[0] <= STEPS
    assert len(list(trainer.folder.tensorboard.glob("plugins/profile/*"))) == traced
    tf.profiler.experimental.start(str(tmp_path / "free"))
    tf.profiler.experimental.stop(save=False)
