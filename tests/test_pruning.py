"""Tests of `snn_tf.pruning`: wrappers and files, and masks over real training steps."""

import dataclasses
import functools
import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from small_networks import initialised, kernels, some_images, weights_of

from snn_tf import channels, copies, costs, evaluation, model_files, pruners, pruning, surgery
from snn_tf.ambient import dropout_seed
from snn_tf.config import Config
from snn_tf.errors import UsageError
from snn_tf.graph import Graph, inner
from snn_tf.initialisation import initialise
from snn_tf.objectives import cross_entropy

SHAPE, CLASSES = (4, 4, 1), 3
NETWORK = {"network": "vgg5", "head": "linear", "width": 0.1}
LAYERS = ("conv1", "conv2", "conv3", "logits")
# vgg5 at width 0.1: 9·1·8, 9·8·16 and 9·16·16 in the convolutions, 16·3 in the head.
SIZES = {"conv1": 72, "conv2": 1152, "conv3": 2304, "logits": 48}
POSITIONS = {"conv1": 16, "conv2": 4, "conv3": 4, "logits": 1}
STEPS_PER_EPOCH = 4
EPOCHS = 4
# Updates after 11 and 22 steps: what grows at the first has ten steps of its own.
REGROWING = {"compress_epochs": 6, "mask_update": 11, "mask_update_end": 1.0, "drop_fraction": 0.9}

IMAGES = some_images(16, SHAPE)
LABELS = np.arange(16) % CLASSES


@functools.cache
def plain(**settings) -> keras.Model:
    """A network without wrappers, which no test changes."""
    return initialised(**NETWORK | {"image_shape": SHAPE, "classes": CLASSES} | settings)


def random_masks(model, seed=2):
    rng = np.random.default_rng(seed)
    return {name: rng.random(kernel.shape) < 0.5 for name, kernel in kernels(model).items()}


def config_of(**settings) -> Config:
    defaults = {
        "density": 0.3,
        "density_schedule": "auto",
        "compress_epochs": EPOCHS,
        "min_layer_density": 0.0,
    }
    return Config(**NETWORK | defaults | settings)


def student(config: Config, seed=3) -> pruners.Pruner:
    """A pruner with first masks and first weights, as the compress stage makes it."""
    pruner = pruners.make_pruner(plain(network=config.network), config, STEPS_PER_EPOCH)
    initialise(pruner.model, seed, pruner.start(seed))
    pruning.project(pruner.model)
    return pruner


def sgd():
    return keras.optimizers.legacy.SGD(0.05, momentum=0.9)


def adam():
    return keras.optimizers.legacy.Adam(0.01)


def train_step(pruner: pruners.Pruner, optimizer) -> None:
    """A training step by the design: m gets the raw gradient, the optimizer the gated one."""
    variables = pruner.model.trainable_variables
    number = int(optimizer.iterations)
    with dropout_seed(tf.constant([0, number])), tf.GradientTape() as tape:
        loss = cross_entropy(pruner.model(IMAGES, training=True), tf.constant(LABELS), 0.0)
    names = {wrapper.layer.kernel.ref(): name for name, wrapper in pruner.wrappers.items()}
    raw = {names[v.ref()]: g for v, g in zip(variables, tape.gradient(loss, variables), strict=True)}
    pruner.observe(raw)
    gated = [raw[names[v.ref()]] * pruner.gate(names[v.ref()]) for v in variables]
    optimizer.apply_gradients(zip(gated, variables, strict=True))


def updates(pruner, optimizer, first=1, last=3 * STEPS_PER_EPOCH):
    """Trains, and yields after every update of the masks its step and churn."""
    for step in range(first, last + 1):
        train_step(pruner, optimizer)
        assert pruning.stray_weights(pruner.model) == {}
        if pruner.schedule.due(step):
            yield step, pruner.update(step, optimizer)


def train_until(pruner, optimizer, step, first=1):
    """Trains up to `step`, without the mask update that may be due there."""
    for _ in updates(pruner, optimizer, first, step - 1):
        pass
    train_step(pruner, optimizer)


def active(pruner):
    return {name: int(mask.sum()) for name, mask in pruning.masks(pruner.model).items()}


def slots_of(pruner, optimizer):
    """Every optimizer slot of every kernel: {(layer, slot): values}."""
    return {
        (name, slot): optimizer.get_slot(wrapper.layer.kernel, slot).numpy()
        for name, wrapper in pruner.wrappers.items()
        for slot in optimizer.get_slot_names()
    }


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


# --- wrappers


@pytest.mark.parametrize("network", ["vgg5", "resnet12"])
def test_wrap_and_unwrap_give_back_the_network(network):
    model = plain(network=network)
    wrapped = pruning.wrap(model)
    assert list(pruning.wrappers(wrapped)) == list(kernels(model))
    back = pruning.unwrap(wrapped)
    assert pruning.wrappers(back) == {}
    assert [layer.get_config() for layer in back.layers] == [
        layer.get_config() for layer in model.layers
    ]
    for copy in (wrapped, back):
        assert same(kernels(copy), kernels(model))
        np.testing.assert_array_equal(copy(IMAGES), model(IMAGES))


def test_wrap_copies_and_leaves_the_original_alone():
    model = plain()
    before = kernels(model)
    wrapped = pruning.wrap(model, random_masks(model))
    assert same(kernels(model), before)
    assert not same(kernels(wrapped), before)
    back = pruning.unwrap(wrapped)
    back.get_layer("conv1").kernel.assign_add(tf.ones((3, 3, 1, 8)))
    assert not same(kernels(back), kernels(wrapped))


@pytest.mark.parametrize("neuron", ["relu", "lif"])
def test_wrap_masks_the_weights(neuron):
    config = config_of(timesteps=3)
    model = plain() if neuron == "relu" else copies.spiking(plain(), config)
    masks = random_masks(model)
    wrapped = pruning.wrap(model, masks)
    assert same(pruning.masks(wrapped), masks)
    assert same(
        kernels(wrapped), {name: kernel * masks[name] for name, kernel in kernels(model).items()}
    )
    by_hand = keras.models.clone_model(model)
    copies.copy_weights(wrapped, by_hand)
    np.testing.assert_array_equal(wrapped(IMAGES), by_hand(IMAGES))


def test_masks_of_a_plain_network_are_all_active():
    masks = pruning.masks(plain())
    assert {name: mask.size for name, mask in masks.items()} == SIZES
    assert all(mask.dtype == bool and mask.all() for mask in masks.values())


def test_masks_take_a_byte_per_weight_and_come_back_from_a_file(tmp_path):
    made = random_masks(plain())
    model = pruning.wrap(plain(), made)
    assert {pruning.mask_of(w).dtype for w in pruning.wrappers(model).values()} == {tf.bool}
    model.save(tmp_path / "model.keras")
    found = pruning.masks(model_files.load(tmp_path / "model.keras"))
    assert found.keys() == made.keys()
    for name, mask in made.items():
        np.testing.assert_array_equal(found[name], mask)


def test_masks_are_a_copy():
    wrapped = pruning.wrap(plain())
    pruning.masks(wrapped)["conv1"][:] = False
    assert pruning.masks(wrapped)["conv1"].all()


def test_training_pass_changes_neither_masks_nor_steps():
    wrapped = pruning.wrap(plain(), random_masks(plain()))
    before = [variable.numpy() for variable in wrapped.variables]
    with dropout_seed(tf.constant([0, 1])):
        logits = [wrapped(IMAGES, training=True).numpy() for _ in range(2)]
    np.testing.assert_array_equal(*logits)
    after = [variable.numpy() for variable in wrapped.variables]
    assert all(map(np.array_equal, before, after))


def test_gradient_at_inactive_weights_is_that_of_the_weight_itself():
    model = plain()
    wrapped = pruning.wrap(model, random_masks(model))
    free = pruning.unwrap(wrapped)
    found = []
    for network in (wrapped, free):
        with tf.GradientTape() as tape:
            loss = cross_entropy(network(IMAGES), tf.constant(LABELS), 0.0)
        layers = Graph.of(network).layers
        found.append(tape.gradient(loss, {name: inner(layers[name]).kernel for name in LAYERS}))
    for name, mask in pruning.masks(wrapped).items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        assert np.mean(found[0][name].numpy()[~mask] != 0) > 0.3


def test_stray_weights_are_counted_and_projection_clears_them():
    model = plain()
    wrapped = pruning.wrap(model)
    masks = {name: np.ones(kernel.shape, bool) for name, kernel in kernels(model).items()}
    masks["conv2"].flat[[3, 5, 7]] = False
    pruning.assign_masks(wrapped, masks)
    assert pruning.stray_weights(wrapped) == {"conv2": 3}
    pruning.project(wrapped)
    assert pruning.stray_weights(wrapped) == {}
    assert (kernels(wrapped)["conv2"] == 0).sum() == 3


def test_strip_pruning_gives_the_plain_network():
    model = plain()
    wrapped = pruning.wrap(model, random_masks(model))
    stripped = tfmot.sparsity.keras.strip_pruning(wrapped)
    assert pruning.wrappers(stripped) == {}
    assert [layer.name for layer in stripped.layers] == [layer.name for layer in model.layers]
    np.testing.assert_array_equal(stripped(IMAGES), wrapped(IMAGES))


# --- files


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("neuron", ["relu", "lif"])
def test_saved_model_comes_back_bit_for_bit(tmp_path, precision, neuron):
    model = plain(precision=precision)
    if neuron == "lif":
        model = copies.spiking(model, config_of(timesteps=3, precision=precision))
    wrapped = pruning.wrap(model, random_masks(model))
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    assert same(pruning.masks(loaded), pruning.masks(wrapped))
    assert same(kernels(loaded), kernels(wrapped))
    for copy in (loaded, pruning.unwrap(loaded)):
        np.testing.assert_array_equal(copy(IMAGES), wrapped(IMAGES))
    assert {type(w) for w in pruning.wrappers(loaded).values()} == {pruning.Masked}
    products = {w.output.dtype.name for name, w in pruning.wrappers(loaded).items() if name != "logits"}
    assert products == {precision.removeprefix("mixed_")}
    assert Graph.of(loaded).inputs == Graph.of(wrapped).inputs
    if neuron == "lif":
        cells = [
            [layer.cell for layer in net.layers if hasattr(layer, "cell")] for net in (loaded, wrapped)
        ]
        assert all(float(ours.v_th) == float(its.v_th) for ours, its in zip(*cells, strict=True))


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_checkpoint_holds_weights_masks_scores_and_slots(tmp_path, structure):
    def made(seed):
        pruner, optimizer = student(config_of(structure=structure), seed), adam()
        return (
            pruner,
            optimizer,
            tf.train.Checkpoint(model=pruner.model, pruner=pruner, optimizer=optimizer),
        )

    pruner, optimizer, checkpoint = made(3)
    train_until(pruner, optimizer, 6)
    path = checkpoint.save(str(tmp_path / "checkpoint"))
    ours = [value.numpy() for value in (*pruner.model.variables, *pruner.variables)]
    other, other_optimizer, target = made(4)
    train_until(other, other_optimizer, 2)
    assert not same(kernels(other.model), kernels(pruner.model))
    target.restore(path).assert_existing_objects_matched()
    theirs = [value.numpy() for value in (*other.model.variables, *other.variables)]
    assert all(map(np.array_equal, ours, theirs))
    assert same(slots_of(other, other_optimizer), slots_of(pruner, optimizer))
    for one, its in ((pruner, optimizer), (other, other_optimizer)):
        train_until(one, its, 9, first=7)
    assert same(kernels(other.model), kernels(pruner.model))
    assert same(pruning.masks(other.model), pruning.masks(pruner.model))


# --- when masks move


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [4, 8, 12]),
        ({"mask_update_end": 1.0}, [4, 8, 12, 16]),
        ({"mask_update": 5}, [5, 10]),
        ({"mask_update": 16}, []),
        ({"mask_update": 3, "mask_update_end": 0.0}, []),
        # 0.29 · 100 steps are 29, though not in binary.
        ({"compress_epochs": 25, "mask_update": 1, "mask_update_end": 0.29}, list(range(1, 30))),
        ({"method": "magnitude"}, [4, 8, 12]),
        ({"method": "magnitude", "mask_update": 16}, [16]),
        ({"method": "magnitude_uniform"}, [4, 8, 12]),
        ({"method": "random"}, []),
        ({"method": "random", "density_schedule": "cubic"}, [4, 8, 12]),
        ({"density_schedule": "cubic", "mask_update": 16}, [16]),
    ],
)
def test_masks_are_due_at_every_interval_until_the_last_update(settings, steps):
    config = config_of(**settings)
    pruner = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH)
    total = config.compress_epochs * STEPS_PER_EPOCH
    assert [step for step in range(total + 1) if pruner.schedule.due(step)] == steps


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_interval_longer_than_the_stage_is_refused(structure):
    with pytest.raises(UsageError, match=r"^--mask_update=17: must be at most the stage's 16 steps$"):
        pruners.make_pruner(plain(), config_of(structure=structure, mask_update=17), STEPS_PER_EPOCH)


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.001},
        {"density": 1e-17},
        {"density": 0.04, "min_layer_density": 0.05},
        {"density": 0.001, "method": "magnitude_uniform"},
        {"density": 0.001, "budget": "macs"},
        {"density": 0.001, "structure": "channel"},
    ],
)
def test_impossible_density_is_refused_with_the_smallest_possible(settings):
    with pytest.raises(UsageError, match=r"^--density=[\d.e-]+: must be at least [\d.]+, .*$") as error:
        pruners.make_pruner(plain(), config_of(**settings), STEPS_PER_EPOCH)
    least = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    settings = settings | {"density": least}
    assert pruners.make_pruner(plain(), config_of(**settings), STEPS_PER_EPOCH).config.density == least


@pytest.mark.parametrize("structure", ["irregular", "channel"])
@pytest.mark.parametrize("settings", [{"mask_update_end": 0.0}, {"compress_epochs": 1}])
def test_guided_masks_stay_where_no_update_fits(structure, settings):
    config = config_of(structure=structure, **settings)
    pruner = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH)
    assert not any(pruner.schedule.due(step) for step in range(10 * STEPS_PER_EPOCH))


@pytest.mark.parametrize("settings", [{"mask_update_end": 0.0}, {"compress_epochs": 1}])
def test_magnitude_reaches_its_density_where_no_update_fits(settings):
    pruner = pruners.make_pruner(plain(), config_of(method="magnitude", **settings), STEPS_PER_EPOCH)
    due = [step for step in range(10 * STEPS_PER_EPOCH) if pruner.schedule.due(step)]
    assert due == [STEPS_PER_EPOCH]
    assert pruner.schedule.density(due[0]) == pruner.config.density


@pytest.mark.parametrize("settings", [{"compress_epochs": 1}, {"mask_update": EPOCHS * STEPS_PER_EPOCH}])
@pytest.mark.parametrize("falls", [True, False])
def test_density_that_ends_with_the_training_is_known(settings, falls):
    schedule = "cubic" if falls else "constant"
    made = [
        pruners.make_pruner(plain(), config_of(density_schedule=schedule, **chosen), STEPS_PER_EPOCH)
        for chosen in (settings, {})
    ]
    for pruner, ends in zip(made, (falls, False), strict=True):
        found = [line for line in pruner.schedule.misfits() if "nothing is trained at it" in line]
        assert len(found) == ends


def test_density_that_ends_with_the_training_because_updates_do_is_said_with_the_flag():
    config = config_of(density_schedule="cubic", mask_update=1, mask_update_end=1.0)
    (line,) = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH).schedule.misfits()
    assert line.startswith("the density reaches 0.3 after the last step") and "--mask_update_end" in line


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"compress_epochs": 1}, True),
        ({"mask_update_end": 0.0}, True),
        ({"mask_update_end": 0.0, "method": "random"}, False),
    ],
)
def test_guided_masks_that_no_update_changes_are_warned_of(settings, warned):
    config = config_of(density_schedule="constant", **settings)
    lines = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH).schedule.misfits()
    assert ["masks stay random" in line for line in lines] == [True] * warned


@pytest.mark.parametrize(
    ("density", "updates", "kept"),
    [(0.029, 1, 0.03), (0.029, 2, 0.15), (0.029, 3, 0.21), (0.029, 4, None), (0.5, 1, None)],
)
def test_density_that_falls_too_steeply_is_said(density, updates, kept):
    settings = {"density": density, "mask_update_end": 0.5, "compress_epochs": 2 * updates}
    for schedule, said in (("cubic", kept), ("constant", None)):
        config = config_of(density_schedule=schedule, **settings)
        lines = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH).schedule.misfits()
        expected = [f"one mask update keeps {said:.2f} of the active weights"] if said else []
        assert [line.partition(",")[0] for line in lines] == expected


def test_density_that_falls_never_falls_below_its_end():
    config = config_of(method="random", density=0.039, density_schedule="cubic", mask_update=1)
    config = dataclasses.replace(config, compress_epochs=250)
    pruner = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH)
    densities = [pruner.schedule.density(step) for step in range(1, pruner.schedule.last_update + 1)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == min(densities) == 0.039


@pytest.mark.parametrize(
    ("structure", "kind"), [("irregular", pruners.IrregularPruner), ("channel", pruners.ChannelPruner)]
)
def test_make_pruner_follows_the_structure_and_copies_the_network(structure, kind):
    model = plain()
    pruner = pruners.make_pruner(model, config_of(structure=structure), STEPS_PER_EPOCH)
    assert type(pruner) is kind
    assert pruning.wrappers(model) == {} and same(kernels(pruner.model), kernels(model))


@pytest.mark.parametrize(
    ("method", "scored"), [("attention", LAYERS), ("magnitude", ()), ("random", ())]
)
def test_only_attention_keeps_scores(method, scored):
    pruner = pruners.make_pruner(plain(), config_of(method=method), STEPS_PER_EPOCH)
    assert tuple(pruner.scores) == scored


def test_scores_are_the_moving_average_of_raw_gradients():
    pruner = student(config_of(score_decay=0.75))
    rng = np.random.default_rng(0)
    expected = dict.fromkeys(LAYERS, 0.0)
    for _ in range(3):
        gradients = {
            n: rng.standard_normal(k.shape).astype("f4") for n, k in kernels(pruner.model).items()
        }
        pruner.observe({name: tf.constant(gradient) for name, gradient in gradients.items()})
        expected = {name: 0.75 * expected[name] + 0.25 * gradients[name] for name in LAYERS}
    for name in LAYERS:
        np.testing.assert_allclose(pruner.scores[name], expected[name], rtol=1e-5, atol=1e-6)


# --- irregular structure


@pytest.mark.parametrize("density", [0.1, 0.301])
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_irregular_count_is_exact_after_every_update(density, optimizer):
    pruner = student(config_of(density=density, min_layer_density=0.05))
    target = round(Fraction(str(density)) * sum(SIZES.values()))
    assert sum(active(pruner).values()) == target
    seen = {}
    for step, churn in updates(pruner, optimizer()):
        seen[step] = churn
        assert sum(active(pruner).values()) == target
        assert all(count >= math.ceil(0.05 * SIZES[name]) for name, count in active(pruner).items())
    assert list(seen) == [4, 8, 12]
    assert seen[4].keys() == SIZES.keys() and max(seen[4].values()) > 0.2


def test_irregular_macs_leave_less_than_the_cheapest_weight():
    pruner = student(config_of(budget="macs"))

    def check():
        target = math.floor(Fraction("0.3") * sum(SIZES[n] * POSITIONS[n] for n in LAYERS))
        counts = active(pruner)
        gap = target - sum(counts[name] * POSITIONS[name] for name in LAYERS)
        inactive = [POSITIONS[name] for name in LAYERS if counts[name] < SIZES[name]]
        assert 0 <= gap < min(inactive)

    check()
    before = pruning.masks(pruner.model)
    for _ in updates(pruner, sgd()):
        check()
    assert not same(pruning.masks(pruner.model), before)


def test_irregular_start_is_random_in_every_layer_and_a_function_of_the_seed():
    first, again, other = (student(config_of(), seed) for seed in (3, 3, 4))
    masks = pruning.masks(first.model)
    assert same(masks, pruning.masks(again.model))
    others = pruning.masks(other.model)
    for name, mask in masks.items():
        assert abs(mask.mean() - 0.3) < 0.02
        assert 0.3 < np.mean(mask != others[name]) < 0.6


def test_irregular_start_tells_each_layers_density():
    pruner = pruners.make_pruner(
        plain(), config_of(density=0.1, min_layer_density=0.08), STEPS_PER_EPOCH
    )
    densities = pruner.start(0)
    assert densities == {name: count / SIZES[name] for name, count in active(pruner).items()}
    assert sum(densities[name] * SIZES[name] for name in LAYERS) == pytest.approx(358)


def test_irregular_update_reports_the_share_of_newly_active_weights():
    pruner, optimizer = student(config_of()), sgd()
    train_until(pruner, optimizer, 4)
    old = pruning.masks(pruner.model)
    churn = pruner.update(4, optimizer)
    new = pruning.masks(pruner.model)
    for name in LAYERS:
        assert churn[name] == np.count_nonzero(new[name] > old[name]) / np.count_nonzero(new[name])
    assert max(churn.values()) > 0.2


def test_irregular_update_drops_the_smallest_and_grows_the_highest_scored():
    pruner, optimizer = student(config_of()), sgd()
    train_until(pruner, optimizer, 4)
    old, weights = pruning.masks(pruner.model), kernels(pruner.model)
    scores = {name: np.abs(score.numpy()) for name, score in pruner.scores.items()}
    pruner.update(4, optimizer)
    for name, mask in pruning.masks(pruner.model).items():
        dropped, grown, kept = old[name] & ~mask, mask & ~old[name], old[name] & mask
        if name != "logits":
            assert np.abs(weights[name][dropped]).max(initial=0) <= np.abs(weights[name][kept]).min()
        assert scores[name][grown].min() >= scores[name][~old[name] & ~mask].max(initial=0)
        assert not kernels(pruner.model)[name][grown].any()
        np.testing.assert_array_equal(kernels(pruner.model)[name][kept], weights[name][kept])


def test_irregular_scores_are_not_blind_where_nothing_is_active():
    pruner, optimizer = student(config_of(density=0.1)), sgd()
    train_until(pruner, optimizer, 3)
    for name, mask in pruning.masks(pruner.model).items():
        assert np.mean(pruner.scores[name].numpy()[~mask] != 0) > 0.1


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_irregular_regrown_weights_live_ten_steps_later(optimizer):
    pruner, optimizer = student(config_of(**REGROWING)), optimizer()
    train_until(pruner, optimizer, 11)
    old = pruning.masks(pruner.model)
    pruner.update(11, optimizer)
    grown = {name: mask & ~old[name] for name, mask in pruning.masks(pruner.model).items()}
    assert sum(map(np.count_nonzero, grown.values())) > 100
    for score in pruner.scores.values():
        score.assign(tf.zeros_like(score))
    train_until(pruner, optimizer, 21, first=12)
    alive = {name: kernel[grown[name]] != 0 for name, kernel in kernels(pruner.model).items()}
    # Where a neuron before or behind is silent, every gradient is 0 and the weight cannot move.
    moved = {name: score.numpy()[grown[name]] != 0 for name, score in pruner.scores.items()}
    assert same(alive, moved)
    assert np.mean(np.concatenate(list(alive.values()))) > 0.7


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_update_clears_slots_of_what_changed_and_keeps_the_others(structure, optimizer):
    pruner, optimizer = student(config_of(structure=structure)), optimizer()
    train_until(pruner, optimizer, 4)
    gates = {name: pruner.gate(name).numpy() > 0 for name in LAYERS}
    # Slots are 0 where nothing is active; here they are not, so that clearing shows everywhere.
    for wrapper in pruner.wrappers.values():
        for slot in optimizer.get_slot_names():
            optimizer.get_slot(wrapper.layer.kernel, slot).assign_add(
                tf.ones(wrapper.layer.kernel.shape)
            )
    before = slots_of(pruner, optimizer)
    pruner.update(4, optimizer)
    kept = {name: gates[name] & (pruner.gate(name).numpy() > 0) for name in LAYERS}
    assert any((gates[name] & ~kept[name]).any() for name in LAYERS)
    assert len(before) == len(LAYERS) * len(optimizer.get_slot_names()) > 0
    for (name, slot), values in slots_of(pruner, optimizer).items():
        assert not values[~kept[name]].any()
        np.testing.assert_array_equal(values[kept[name]], before[name, slot][kept[name]])


def test_irregular_gate_is_the_mask():
    pruner = student(config_of())
    for name, mask in pruning.masks(pruner.model).items():
        np.testing.assert_array_equal(pruner.gate(name), mask)
    assert pruner.active_channels("conv1_neuron") is None


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_random_masks_never_move(structure):
    pruner = student(config_of(method="random", structure=structure))
    before, weights = pruning.masks(pruner.model), kernels(pruner.model)
    assert list(updates(pruner, sgd(), last=5)) == []
    assert not all(mask.all() for mask in before.values())
    assert same(pruning.masks(pruner.model), before)
    assert not same(kernels(pruner.model), weights)


@pytest.fixture(scope="module")
def trained_without_masks():
    """Kernels after four training steps of a plain network."""
    network, optimizer = pruning.unwrap(plain()), adam()
    initialise(network, 3)
    for number in range(4):
        with dropout_seed(tf.constant([0, number])), tf.GradientTape() as tape:
            loss = cross_entropy(network(IMAGES, training=True), tf.constant(LABELS), 0.0)
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply_gradients(zip(gradients, network.trainable_variables, strict=True))
    return kernels(network)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "attention"},
        {"method": "attention", "budget": "macs"},
        {"method": "magnitude"},
        {"method": "magnitude_uniform"},
        {"method": "attention", "structure": "channel"},
        {"method": "magnitude", "structure": "channel"},
        {"method": "random", "structure": "channel"},
    ],
)
def test_density_1_changes_nothing(settings, trained_without_masks):
    pruner = student(config_of(density=1.0, mask_update=1, **settings))
    churns = [churn for _, churn in updates(pruner, adam(), last=4)]
    assert len(churns) == (0 if settings["method"] == "random" else 4)
    assert all(set(churn.values()) == {0.0} for churn in churns)
    assert all(mask.all() for mask in pruning.masks(pruner.model).values())
    assert same(kernels(pruner.model), trained_without_masks)


# --- magnitude


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_magnitude_density_falls_as_tfmots_polynomial(structure):
    pruner = student(config_of(method="magnitude", density=0.1, structure=structure, mask_update=2))
    last = pruner.schedule.last_update
    assert last == 12
    for step in range(17):
        left = 1 - min(step / last, 1.0)
        assert pruner.schedule.density(step) == pytest.approx(0.1 + 0.9 * left**3, abs=1e-6)
    assert pruner.schedule.density(last) == 0.1
    assert student(config_of(density=0.1)).schedule.density(1) == 0.1


def test_magnitude_starts_dense_and_cuts_all_layers_at_one_magnitude():
    pruner, optimizer = student(config_of(method="magnitude", density=0.1)), sgd()
    assert active(pruner) == SIZES
    step = 0
    for now in (4, 8, 12):
        train_until(pruner, optimizer, now, first=step + 1)
        weights = {name: np.abs(kernel) for name, kernel in kernels(pruner.model).items()}
        pruner.update(now, optimizer)
        count = round((0.1 + 0.9 * (1 - now / 12) ** 3) * sum(SIZES.values()))
        assert abs(sum(active(pruner).values()) - count) <= (now < 12)
        masks = pruning.masks(pruner.model)
        # What classes need is kept whatever its size.
        masks["logits"][weights["logits"].argmax(axis=0), range(CLASSES)] = False
        kept = min(weights[name][mask].min(initial=np.inf) for name, mask in masks.items())
        new = pruning.masks(pruner.model)
        assert kept >= max(weights[name][~mask].max(initial=0) for name, mask in new.items())
        step = now
    densities = [count / SIZES[name] for name, count in active(pruner).items()]
    assert max(densities) > 3 * min(densities)


def test_magnitude_uniform_is_stock_tfmot():
    config = config_of(method="magnitude_uniform", density=0.1)
    pruner, optimizer = student(config), sgd()
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.9, begin_step=0, end_step=12, frequency=4)
    step = 0
    for now in (4, 8, 12):
        train_until(pruner, optimizer, now, first=step + 1)
        weights = kernels(pruner.model)
        pruner.update(now, optimizer)
        ours = pruning.masks(pruner.model)
        for name, kernel in weights.items():
            np.testing.assert_array_equal(ours[name], stock_mask(kernel, schedule, now))
        left = 0.1 + 0.9 * (1 - now / 12) ** 3
        assert active(pruner) == {name: round(left * size) for name, size in SIZES.items()}
        step = now


def stock_mask(kernel, schedule, step):
    """The mask that tfmot's own wrapper makes of a kernel, whose shape matters to no one there."""
    flat = kernel.reshape(-1, kernel.shape[-1])
    dense = keras.layers.Dense(flat.shape[1], use_bias=False)
    wrapper = tfmot.sparsity.keras.prune_low_magnitude(dense, schedule)
    wrapper.build((None, flat.shape[0]))
    dense.kernel.assign(flat)
    wrapper.pruning_step.assign(step)
    wrapper.pruning_obj.conditional_mask_update()
    ((_, mask, _),) = wrapper.pruning_vars
    return mask.numpy().reshape(kernel.shape)


# --- channel structure


def channel_cost(counts, unit_costs):
    a, b, c = (counts[f"conv{number}"] for number in (1, 2, 3))
    layers = {"conv1": 9 * a, "conv2": 9 * a * b, "conv3": 9 * b * c, "logits": 3 * c}
    return sum(unit_costs[name] * size for name, size in layers.items())


def channel_counts(pruner):
    return {group: int(flags.sum()) for group, flags in pruner.channels().items()}


@pytest.mark.parametrize("method", ["attention", "magnitude"])
@pytest.mark.parametrize(
    ("budget", "unit_costs"), [("weights", dict.fromkeys(LAYERS, 1)), ("macs", POSITIONS)]
)
def test_channel_cost_is_below_its_target_by_less_than_a_channel(method, budget, unit_costs):
    pruner = student(config_of(structure="channel", method=method, budget=budget))
    sizes = {"conv1": 8, "conv2": 16, "conv3": 16}
    target = Fraction("0.3") * channel_cost(sizes, unit_costs)

    def check():
        counts = channel_counts(pruner)
        cost = channel_cost(counts, unit_costs)
        more = [counts | {group: counts[group] + 1} for group in sizes if counts[group] < sizes[group]]
        assert min(counts.values()) >= 1
        assert cost <= round(target) < min(channel_cost(counts, unit_costs) for counts in more)

    steps = []
    if method == "attention":
        check()
    for step, _ in updates(pruner, sgd()):
        steps.append(step)
        if method == "attention" or step == 12:
            check()
    assert steps == [4, 8, 12]
    small = surgery.remove_channels(pruning.unwrap(pruner.model), pruner.channels())
    left = costs.ann_costs(evaluation.synapses(small))["macs"] if budget == "macs" else weights_of(small)
    assert left == channel_cost(channel_counts(pruner), unit_costs)


def test_channel_masks_are_the_input_slices_of_dormant_channels():
    pruner = student(config_of(structure="channel"))

    def check():
        channels = pruner.channels()
        readers = {"conv2": "conv1", "conv3": "conv2", "logits": "conv3"}
        masks = pruning.masks(pruner.model)
        assert masks["conv1"].all()
        for name, group in readers.items():
            slices = masks[name].reshape(-1, len(channels[group]), masks[name].shape[-1])
            np.testing.assert_array_equal(slices.all(axis=(0, 2)), channels[group])
            np.testing.assert_array_equal(slices.any(axis=(0, 2)), channels[group])
        return channels

    before = check()
    for _ in updates(pruner, adam()):
        after = check()
    assert not same(before, after)


def test_channel_gate_freezes_the_producers_of_dormant_channels():
    pruner, optimizer = student(config_of(structure="channel")), sgd()
    before = kernels(pruner.model)
    train_until(pruner, optimizer, 3)
    after, channels = kernels(pruner.model), pruner.channels()
    for name, flags in channels.items():
        assert not flags.all()
        np.testing.assert_array_equal(after[name][..., ~flags], before[name][..., ~flags])
        moved = (after[name] != before[name]).reshape(-1, len(flags)).any(axis=0)
        assert moved[flags].mean() > 0.5
        assert before[name][..., ~flags].any()


def test_channel_scores_are_not_blind_at_dormant_slices():
    pruner, optimizer = student(config_of(structure="channel")), sgd()
    train_until(pruner, optimizer, 3)
    for name, mask in pruning.masks(pruner.model).items():
        if name != "conv1":
            assert np.mean(pruner.scores[name].numpy()[~mask] != 0) > 0.2


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_channel_regrown_channels_learn(optimizer):
    pruner, optimizer = student(config_of(structure="channel", **REGROWING)), optimizer()
    train_until(pruner, optimizer, 11)
    old, before = pruner.channels(), kernels(pruner.model)
    churn = pruner.update(11, optimizer)
    assert max(churn.values()) > 0
    grown = {group: flags & ~old[group] for group, flags in pruner.channels().items()}
    assert any(map(np.any, grown.values()))
    train_until(pruner, optimizer, 21, first=12)
    after = kernels(pruner.model)
    for group, reader in (("conv1", "conv2"), ("conv2", "conv3"), ("conv3", "logits")):
        kept = pruner.channels()
        out = kept.get(reader, np.ones(CLASSES, bool))
        for channel in np.flatnonzero(grown[group]):
            assert np.mean(after[reader][..., channel, out] != 0) > 0.5
            inputs = kept.get({"conv2": "conv1", "conv3": "conv2"}.get(group), slice(None))
            assert (after[group][..., inputs, channel] != before[group][..., inputs, channel]).any()


def test_channel_network_cut_equals_the_masked_one():
    pruner = student(config_of(structure="channel"))
    for _ in updates(pruner, adam()):
        pass
    small = surgery.remove_channels(pruning.unwrap(pruner.model), pruner.channels())
    logits = pruner.model(IMAGES).numpy()
    assert np.ptp(logits) > 0.1
    np.testing.assert_allclose(small(IMAGES), logits, rtol=1e-4, atol=1e-5)


def test_channel_start_tells_the_share_of_inputs_that_are_active():
    pruner = pruners.make_pruner(plain(), config_of(structure="channel"), STEPS_PER_EPOCH)
    densities = pruner.start(0)
    channels = pruner.channels()
    assert densities == {
        "conv1": 1.0,
        "conv2": channels["conv1"].mean(),
        "conv3": channels["conv2"].mean(),
        "logits": channels["conv3"].mean(),
    }
    assert max(densities["conv2"], densities["conv3"]) < 0.8


def test_channel_pruner_knows_the_active_channels_of_neurons_behind_additions():
    config = config_of(network="resnet12", structure="channel", density=0.2)
    pruner = student(config)
    tied = pruner.active_channels("stem3_neuron").numpy()
    np.testing.assert_array_equal(pruner.active_channels("stage1_block1_conv2_neuron"), tied)
    np.testing.assert_array_equal(tied > 0, pruner.channels()["stem3"])
    assert not tied.all()
    for name in ("stem3", "stage1_block1_conv2"):
        frozen = pruner.gate(name).numpy().reshape(-1, len(tied)).any(axis=0)
        np.testing.assert_array_equal(frozen, tied)
    optimizer = sgd()
    train_until(pruner, optimizer, 4)
    assert max(pruner.update(4, optimizer).values()) > 0
    small = surgery.remove_channels(pruning.unwrap(pruner.model), pruner.channels())
    assert weights_of(small) <= 0.2 * weights_of(pruner.model)
    np.testing.assert_allclose(small(IMAGES), pruner.model(IMAGES), rtol=1e-4, atol=1e-5)


def test_channel_drop_looks_at_slices_towards_active_channels_only():
    pruner = student(config_of(structure="channel", drop_fraction=0.5))
    channels, kernel = pruner.channels(), kernels(pruner.model)["conv3"]
    dormant = ~channels["conv3"]
    weakest = np.flatnonzero(channels["conv2"])[0]
    kernel[:, :, weakest, :] = 1e-6
    kernel[:, :, weakest, dormant] = 1000.0
    assert dormant.any()
    pruner.wrappers["conv3"].layer.kernel.assign(kernel)
    pruner.revise(4)
    assert pruner.channels()["conv2"].any() and not pruner.channels()["conv2"][weakest]


def root_mean_square(arrays, active):
    """[C] by group: of the weights that read each channel for the active channels of the reader."""
    readers = {"conv1": "conv2", "conv2": "conv3", "conv3": "logits"}
    found = {}
    for group, reader in readers.items():
        kept = arrays[reader][..., active.get(reader, np.ones(CLASSES, bool))]
        axes = tuple(axis for axis in range(kept.ndim) if axis != kept.ndim - 2)
        found[group] = np.sqrt(np.mean(np.square(kept), axis=axes))
    return found


def test_channel_update_weighs_scores_by_their_root_mean_square(monkeypatch):
    pruner, handed = student(config_of(structure="channel")), []
    rng = np.random.default_rng(1)
    for score in pruner.scores.values():
        score.assign(rng.standard_normal(score.shape))
    active = pruner.channels()

    def update(norms, values, scores, channels, budget, p):
        handed.extend([norms, scores, channels, p])
        return channels

    monkeypatch.setattr(pruners.channels, "update_channels", update)
    pruner.revise(4)
    norms, scores, channels, p = handed
    assert same(channels, active)
    assert p == pytest.approx(0.005 + 0.495 * (1 + math.cos(math.pi / 3)) / 2)
    per_weight = root_mean_square(kernels(pruner.model), active)
    for group, counts in {
        "conv1": 9 * active["conv2"].sum(),
        "conv2": 9 * active["conv3"].sum(),
    }.items():
        np.testing.assert_allclose(norms[group], per_weight[group] * math.sqrt(counts), rtol=1e-5)
    values = {name: score.numpy() for name, score in pruner.scores.items()}
    for group, expected in root_mean_square(values, active).items():
        np.testing.assert_allclose(scores[group], expected, rtol=1e-5)


def test_channel_magnitude_weighs_weights_by_their_root_mean_square(monkeypatch):
    pruner, handed = student(config_of(structure="channel", method="magnitude")), {}

    def ranked(values, budget):
        handed.update(values)
        return pruner.channels()

    monkeypatch.setattr(pruners.channels, "ranked_channels", ranked)
    pruner.revise(4)
    for group, expected in root_mean_square(kernels(pruner.model), pruner.channels()).items():
        np.testing.assert_allclose(handed[group], expected, rtol=1e-5)


# --- density schedule, saliency, dense ends


FALLING = [
    {"method": "attention"},
    {"method": "attention", "saliency": "magnitude"},
    {"method": "attention", "saliency": "weight_gradient"},
    {"method": "attention", "saliency": "fisher"},
    {"method": "random"},
    {"method": "magnitude", "saliency": "fisher"},
]


@pytest.mark.parametrize("settings", FALLING, ids=lambda settings: "-".join(settings.values()))
def test_cubic_count_is_exact_after_every_update(settings):
    pruner = student(config_of(density=0.1, density_schedule="cubic", mask_update=2, **settings))
    assert active(pruner) == SIZES
    before, grown = active(pruner), 0.0
    for step, churn in updates(pruner, adam()):
        wanted = (0.1 + 0.9 * (1 - step / 12) ** 3) * sum(SIZES.values())
        # tfmot's schedule is float32.
        assert sum(active(pruner).values()) == pytest.approx(wanted, abs=0.51)
        assert sum(active(pruner).values()) < sum(before.values())
        before, grown = active(pruner), grown + sum(churn.values())
    assert sum(before.values()) == round(0.1 * sum(SIZES.values()))
    assert (grown > 0) == (settings["method"] == "attention")


@pytest.mark.parametrize("settings", FALLING, ids=lambda settings: "-".join(settings.values()))
@pytest.mark.parametrize("budget", ["weights", "macs"])
def test_cubic_channels_follow_the_schedule(settings, budget):
    config = config_of(structure="channel", density_schedule="cubic", budget=budget, **settings)
    pruner = student(config)
    costs_of = dict.fromkeys(LAYERS, 1) if budget == "weights" else POSITIONS
    sizes = {"conv1": 8, "conv2": 16, "conv3": 16}
    assert channel_counts(pruner) == sizes
    full = channel_cost(sizes, costs_of)
    for step, _ in updates(pruner, sgd()):
        target = (0.3 + 0.7 * (1 - step / 12) ** 3) * full + 0.51
        counts = channel_counts(pruner)
        more = [counts | {group: counts[group] + 1} for group in sizes if counts[group] < sizes[group]]
        assert channel_cost(counts, costs_of) <= target
        # What random drops never comes back, so that less may be left than would fit.
        assert config.method == "random" or target < 1 + min(channel_cost(m, costs_of) for m in more)


def test_cubic_macs_leave_less_than_the_cheapest_weight_at_the_end():
    pruner = student(config_of(budget="macs", density_schedule="cubic", saliency="fisher"))
    for _ in updates(pruner, adam()):
        pass
    counts = active(pruner)
    full = sum(SIZES[name] * POSITIONS[name] for name in LAYERS)
    gap = math.floor(Fraction("0.3") * full) - sum(counts[name] * POSITIONS[name] for name in LAYERS)
    assert 0 <= gap < min(POSITIONS[name] for name in LAYERS if counts[name] < SIZES[name])


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_cubic_start_is_dense_and_initialised_as_such(structure):
    config = config_of(density_schedule="cubic", structure=structure)
    pruner = pruners.make_pruner(plain(), config, STEPS_PER_EPOCH)
    assert set(pruner.start(0).values()) == {1.0}
    assert active(pruner) == SIZES


@pytest.mark.parametrize("method", ["attention", "magnitude", "magnitude_uniform", "random"])
def test_density_falls_from_one_unless_a_setting_says_otherwise(method):
    pruner = student(Config(**NETWORK, method=method, density=0.3, compress_epochs=EPOCHS))
    counts = [sum(active(pruner).values())]
    for _ in updates(pruner, sgd()):
        counts.append(sum(active(pruner).values()))
    assert counts[0] == sum(SIZES.values()) > counts[1] > counts[2] > counts[3]
    # Stock tfmot rounds layer by layer.
    assert counts[3] == pytest.approx(0.3 * sum(SIZES.values()), abs=2)


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_random_masks_that_fall_are_nested_and_repeat(structure):
    config = config_of(method="random", density_schedule="cubic", structure=structure)
    found = []
    for _ in range(2):
        pruner, seen = student(config), []
        for _ in updates(pruner, sgd()):
            seen.append(pruning.masks(pruner.model))
        found.append(seen)
        for wide, narrow in itertools.pairwise(seen):
            assert not any((narrow[name] & ~wide[name]).any() for name in narrow)
        assert not same(seen[0], seen[-1])
    assert all(map(same, *found))


@pytest.mark.parametrize("network", ["vgg5", "resnet12"])
def test_random_channels_that_fall_keep_a_like_share_of_every_group(network):
    """As channels drawn at the density do, in groups of 128 to 2048 channels whose slices differ."""
    config = Config(
        network=network, width=0.5, method="random", structure="channel", density=0.1, compress_epochs=20
    )
    model = initialised(network=network, width=0.5, image_shape=(8, 8, 1))
    pruner = pruners.make_pruner(model, config, 10)
    pruner.start(0)
    for step in range(10, pruner.schedule.last_update + 1, 10):
        pruner.revise(step)
    drawn = channels.initial_channels(pruner.budget(0.1), np.random.default_rng(0))
    for group, active in pruner.channels().items():
        if active.size >= 128:
            assert active.mean() == pytest.approx(drawn[group].mean(), abs=0.1)


def test_constant_magnitude_has_its_density_from_the_first_update():
    pruner = student(config_of(method="magnitude", density_schedule="constant"))
    assert active(pruner) == SIZES
    for _ in updates(pruner, sgd()):
        assert sum(active(pruner).values()) == round(0.3 * sum(SIZES.values()))


def test_constant_magnitude_uniform_is_stock_tfmot():
    config = config_of(method="magnitude_uniform", density_schedule="constant")
    pruner, optimizer = student(config), sgd()
    train_until(pruner, optimizer, 4)
    weights = kernels(pruner.model)
    pruner.update(4, optimizer)
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.7, begin_step=4, frequency=4)
    for name, mask in pruning.masks(pruner.model).items():
        np.testing.assert_array_equal(mask, stock_mask(weights[name], schedule, 4))


def test_squares_are_the_moving_average_of_squared_raw_gradients():
    pruner = student(config_of(score_decay=0.75, saliency="fisher"))
    rng = np.random.default_rng(0)
    expected = dict.fromkeys(LAYERS, 0.0)
    for _ in range(3):
        gradients = {
            n: rng.standard_normal(k.shape).astype("f4") for n, k in kernels(pruner.model).items()
        }
        pruner.observe({name: tf.constant(gradient) for name, gradient in gradients.items()})
        expected = {name: 0.75 * expected[name] + 0.25 * gradients[name] ** 2 for name in LAYERS}
    for name, value in pruner.saliencies().items():
        wanted = np.abs(kernels(pruner.model)[name]) * np.sqrt(expected[name])
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert student(config_of()).squares == {}


def test_saliencies_are_what_their_names_say():
    for saliency in ("layer_magnitude", "magnitude", "weight_gradient"):
        pruner = student(config_of(saliency=saliency))
        train_until(pruner, sgd(), 3)
        for name, value in pruner.saliencies().items():
            factor = pruner.scores[name].numpy() if saliency == "weight_gradient" else 1.0
            np.testing.assert_allclose(value, np.abs(kernels(pruner.model)[name] * factor), rtol=1e-6)


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_macs_exponent_divides_by_the_multiply_accumulates_of_a_weight(structure):
    pruner = student(config_of(structure=structure, macs_exponent=0.5))
    train_until(pruner, sgd(), 3)
    worth = {name: np.abs(kernel) for name, kernel in kernels(pruner.model).items()}
    scores = {name: score.numpy() for name, score in pruner.scores.items()}
    for found, whole in ((pruner.saliencies(), worth), (pruner.regrowth_scores(), scores)):
        for name, value in found.items():
            macs_per_weight = np.prod(pruner.wrappers[name].output_shape[1:-1])
            np.testing.assert_allclose(value, whole[name] / np.sqrt(macs_per_weight), rtol=1e-6)


@pytest.mark.parametrize(
    "settings, middle",
    [
        ({"method": "magnitude"}, 0.25),
        ({"density_schedule": "cubic"}, 0.25),
        ({"density_schedule": "constant"}, 0.5),
        ({"saliency": "fisher", "density_schedule": "cubic"}, 0.25),
    ],
)
def test_macs_exponent_moves_weights_to_where_they_cost_less(settings, middle):
    def macs(exponent):
        pruner = student(config_of(macs_exponent=exponent, mask_update_end=0.25, **settings))
        train_until(pruner, sgd(), 8)
        kept = pruning.masks(pruner.model)
        assert sum(mask.sum() for mask in kept.values()) == pruner.budget(pruner.config.density).target
        return sum(
            mask.sum() * np.prod(pruner.wrappers[name].output_shape[1:-1]) for name, mask in kept.items()
        )

    assert macs(1.0) < macs(middle) < macs(0.0)


def test_macs_exponent_regrows_channels_where_they_cost_less():
    """conv3's channels are read by the logits alone, whose weights work once an image."""

    def channels_of_conv3(exponent):
        pruner = student(config_of(structure="channel", macs_exponent=exponent, mask_update_end=0.75))
        train_until(pruner, sgd(), 8)
        return pruner.channels()["conv3"].sum()

    assert channels_of_conv3(1.0) > channels_of_conv3(0.0)


def test_cubic_cut_keeps_what_is_most_salient_over_all_layers():
    """From dense nothing can grow yet, so the first update is the cut alone."""
    for saliency in ("layer_magnitude", "magnitude", "weight_gradient", "fisher"):
        config = config_of(density_schedule="cubic", saliency=saliency, mask_update_end=0.25)
        pruner, optimizer = student(config), adam()
        train_until(pruner, optimizer, 4)
        values = pruner.saliencies()
        pruner.update(4, optimizer)
        masks = pruning.masks(pruner.model)
        masks["logits"][values["logits"].argmax(axis=0), range(CLASSES)] = False
        kept = min(values[name][mask].min(initial=np.inf) for name, mask in masks.items())
        new = pruning.masks(pruner.model)
        assert kept >= max(values[name][~mask].max(initial=0) for name, mask in new.items())
        assert sum(active(pruner).values()) == round(0.3 * sum(SIZES.values()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"density_schedule": "cubic", "saliency": "fisher"},
        {"method": "magnitude"},
        {"method": "random"},
        {"budget": "macs"},
    ],
)
def test_dense_ends_stay_dense_and_count(settings):
    pruner = student(config_of(dense_ends=True, **settings))
    for _ in updates(pruner, sgd()):
        assert active(pruner)["conv1"] == SIZES["conv1"]
        assert active(pruner)["logits"] == SIZES["logits"]
    if settings.get("budget") != "macs":
        assert sum(active(pruner).values()) == round(0.3 * sum(SIZES.values()))
    assert all(active(pruner)[name] < SIZES[name] for name in ("conv2", "conv3"))


def test_dense_ends_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"^--density=0.03: must be at least .* stay dense need$"):
        pruners.make_pruner(plain(), config_of(density=0.03, dense_ends=True), STEPS_PER_EPOCH)


def test_schedule_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"^kind is 'auto'; allowed are constant, cubic$"):
        pruning.sparsity_schedule("auto", 0.05, 1, 10)
