"""Tests of `snn_tf.objectives`: terms against NumPy, what is weighted how, and who gets a gradient."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from snn_tf import copies, models
from snn_tf.ambient import dropout_seed
from snn_tf.config import Config
from snn_tf.data import DataSpec
from snn_tf.errors import UsageError
from snn_tf.initialisation import initialise
from snn_tf.objectives import AttentionGuided, CrossEntropy, SpikeTraining, cross_entropy
from snn_tf.pruners import make_pruner

SPEC = DataSpec("made_up", (8, 8, 3), 5, "none", (120.0,) * 3, (60.0,) * 3)
CONFIG = Config(
    network="vgg5",
    width=0.02,
    dropout=0.0,
    head_dropout=0.0,
    density=0.5,
    density_schedule="constant",
    label_smoothing=0.1,
    distillation=0.75,
    temperature=3.0,
    attention=40.0,
    meta_model="runs/teacher",
)
ATTENDED = ("conv1_neuron", "conv3_neuron")


def changed(**settings):
    return dataclasses.replace(CONFIG, **settings)


def make_teacher(config=CONFIG, spec=SPEC, seed=1):
    model = models.build(config, "relu", spec)
    initialise(model, seed)
    return model


def make_student(config=CONFIG, spec=SPEC):
    """A pruner with its first masks set, around an initialised student."""
    pruner = make_pruner(models.build(config, "relu", spec), config, steps_per_epoch=1)
    initialise(pruner.model, 2, pruner.start(3))
    gates = np.concatenate([pruner.gate(name).numpy().ravel() for name in pruner.wrappers])
    assert 0 < gates.mean() <= 1 and (gates.mean() < 1) == (config.density < 1)
    return pruner


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, *SPEC.image_shape)).astype(np.uint8)
    return tf.constant(images), tf.constant(rng.integers(0, SPEC.num_classes, 6), tf.int32)


@pytest.fixture(scope="module")
def teacher():
    return make_teacher()


@pytest.fixture(scope="module")
def pruner():
    return make_student()


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def cross_entropy_oracle(logits, labels, smoothing):
    log_p = log_softmax(logits)
    classes = log_p.shape[1]
    losses = [
        -sum(((1 - smoothing) * (c == label) + smoothing / classes) * row[c] for c in range(classes))
        for row, label in zip(log_p, np.asarray(labels), strict=True)
    ]
    return np.mean(losses)


def distillation_oracle(student, teacher, temperature):
    log_p, log_q = (log_softmax(np.asarray(z) / temperature) for z in (teacher, student))
    return temperature**2 * np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1))


def map_oracle(activations):
    """[N, H * W]: the mean square over channels at each position, of norm 1 for each image."""
    mean = np.mean(np.square(activations, dtype=np.float64), -1).reshape(len(activations), -1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def attention_oracle(student, teacher):
    """L_AT of activations, layer by layer."""
    pairs = zip(student, teacher, strict=True)
    return sum(np.mean((map_oracle(ours) - map_oracle(theirs)) ** 2) for ours, theirs in pairs)


def observed(model, images, names=ATTENDED):
    """Logits and activations of a model in evaluation, through a model of their own."""
    outputs = [model.output, *(model.get_layer(name).output for name in names)]
    return [value.numpy() for value in keras.Model(model.input, outputs)(images, training=False)]


def test_cross_entropy_of_equal_logits_is_log_classes():
    for smoothing in (0.0, 0.3):
        loss = cross_entropy(tf.zeros([3, 5]), tf.constant([0, 1, 4]), smoothing)
        np.testing.assert_allclose(loss, np.log(5.0), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_cross_entropy_equals_oracle(smoothing):
    logits = 3 * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels = [0, 4, 2, 2, 1, 3]
    ours = cross_entropy(tf.constant(logits), tf.constant(labels), smoothing)
    np.testing.assert_allclose(ours, cross_entropy_oracle(logits, labels, smoothing), rtol=1e-6)


def test_cross_entropy_objective_is_the_models_smoothed_loss(teacher, batch):
    images, labels = batch
    terms, logits = CrossEntropy(teacher, CONFIG)(images, labels)
    np.testing.assert_array_equal(logits, teacher(images, training=False))
    assert set(terms) == {"cross_entropy"}
    expected = cross_entropy_oracle(logits, labels, 0.1)
    np.testing.assert_allclose(terms["cross_entropy"], expected, rtol=1e-5)


def test_cross_entropy_objective_trains_with_dropout(batch):
    config = changed(head_dropout=0.5)
    model = make_teacher(config)
    objective = CrossEntropy(model, config)
    with dropout_seed(tf.constant([1, 2])):
        _, logits = objective(*batch)
        np.testing.assert_array_equal(logits, model(batch[0], training=True))
    assert np.abs(logits - model(batch[0], training=False)).max() > 0.0


@pytest.mark.parametrize("alpha, beta", [(0.75, 40.0), (0.0, 2.0), (1.0, 1000.0)])
def test_guided_terms_equal_oracle(pruner, teacher, batch, alpha, beta):
    images, labels = batch
    objective = AttentionGuided(pruner, teacher, changed(distillation=alpha, attention=beta))
    terms, logits = objective(images, labels)
    student_logits, *ours = observed(pruner.model, images)
    goal, *theirs = observed(teacher, images)
    np.testing.assert_allclose(logits, student_logits, rtol=1e-5, atol=1e-6)
    expected = {
        "cross_entropy": (1 - alpha) * cross_entropy_oracle(logits, labels, 0.1),
        "distillation": alpha * distillation_oracle(logits, goal, 3.0),
        "attention": beta / 2 * attention_oracle(ours, theirs),
    }
    assert set(terms) == set(expected) and expected["attention"] > 1e-3
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4)


def test_guided_without_attention_leaves_the_other_terms_as_they_are(pruner, teacher, batch):
    whole, _ = AttentionGuided(pruner, teacher, CONFIG)(*batch)
    plain, _ = AttentionGuided(pruner, teacher, changed(attention=0.0))(*batch)
    assert set(plain) == {"cross_entropy", "distillation"}
    for name, term in plain.items():
        assert float(term) == float(whole[name])


def test_guided_by_its_own_twin_has_no_distillation_and_no_attention(batch):
    pruner = make_student(changed(density=1.0))
    twin = make_teacher()
    copies.copy_weights(pruner.model, twin)
    terms, _ = AttentionGuided(pruner, twin, CONFIG)(*batch)
    assert float(terms["cross_entropy"]) > 0.0
    for name in ("distillation", "attention"):
        np.testing.assert_allclose(terms[name], 0.0, atol=1e-8)


def test_guided_gradient_goes_to_the_student_and_not_to_the_teacher(pruner, teacher, batch):
    objective = AttentionGuided(pruner, teacher, CONFIG)
    with tf.GradientTape(persistent=True) as tape:
        terms, _ = objective(*batch)
        loss = tf.add_n(list(terms.values()))
    student = pruner.model.trainable_variables
    assert all(np.abs(gradient).max() > 0.0 for gradient in tape.gradient(loss, student))
    assert teacher.trainable_variables
    assert set(tape.gradient(loss, teacher.trainable_variables)) == {None}
    early = pruner.wrappers["conv1"].layer.kernel
    for name in terms:
        assert np.abs(tape.gradient(terms[name], early)).max() > 0.0, name


def test_guided_teacher_is_evaluated_while_the_student_drops_out(batch):
    config = changed(dropout=0.3, head_dropout=0.5)
    pruner, teacher = make_student(config), make_teacher(config)
    objective = AttentionGuided(pruner, teacher, config)
    goal = teacher(batch[0], training=False)
    results = []
    for seed in ([1, 2], [1, 3]):
        with dropout_seed(tf.constant(seed)):
            terms, logits = objective(*batch)
        expected = 0.75 * distillation_oracle(logits, goal, 3.0)
        np.testing.assert_allclose(terms["distillation"], expected, rtol=1e-4)
        results.append(logits)
    assert np.abs(results[0] - results[1]).max() > 0.0


def test_guided_channel_student_is_seen_through_its_active_channels(teacher, batch):
    config = changed(structure="channel")
    pruner = make_student(config)
    terms, _ = AttentionGuided(pruner, teacher, config)(*batch)
    _, *ours = observed(pruner.model, batch[0])
    _, *theirs = observed(teacher, batch[0])
    active = [pruner.active_channels(name).numpy() > 0 for name in ATTENDED]
    assert all(0 < kept.sum() < kept.size for kept in active)
    seen = [a[..., kept] for a, kept in zip(ours, active, strict=True)]
    expected = 20.0 * attention_oracle(seen, theirs)
    np.testing.assert_allclose(terms["attention"], expected, rtol=1e-4)
    assert abs(20.0 * attention_oracle(ours, theirs) / expected - 1.0) > 1e-3


def test_guided_accepts_a_wider_teacher(pruner, batch):
    wide = make_teacher(changed(width=0.25))
    terms, _ = AttentionGuided(pruner, wide, CONFIG)(*batch)
    _, *ours = observed(pruner.model, batch[0])
    _, *theirs = observed(wide, batch[0])
    np.testing.assert_allclose(terms["attention"], 20.0 * attention_oracle(ours, theirs), rtol=1e-4)


@pytest.mark.parametrize(
    "config, spec",
    [
        (CONFIG, dataclasses.replace(SPEC, num_classes=6)),
        (CONFIG, dataclasses.replace(SPEC, image_shape=(12, 12, 3))),
        (changed(network="resnet12"), SPEC),
    ],
    ids=["classes", "sizes", "layers"],
)
def test_guided_refuses_a_teacher_of_other_shapes(pruner, config, spec):
    with pytest.raises(UsageError, match=r"^--meta_model=runs/teacher: .*--network=vgg5 has") as caught:
        AttentionGuided(pruner, make_teacher(config, spec), CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_guided_maps_are_those_of_student_and_teacher(teacher, batch, structure):
    config = changed(structure=structure, dropout=0.5)
    pruner = make_student(config)
    maps = AttentionGuided(pruner, teacher, config).maps(batch[0])
    assert tuple(maps) == ATTENDED
    _, *ours = observed(pruner.model, batch[0])
    _, *theirs = observed(teacher, batch[0])
    for name, side, our, their in zip(ATTENDED, (8, 4), ours, theirs, strict=True):
        if structure == "channel":
            kept = pruner.active_channels(name).numpy() > 0
            assert 0 < kept.sum() < kept.size
            our = our[..., kept]
        for found, wanted in zip(maps[name], (map_oracle(our), map_oracle(their)), strict=True):
            assert found.shape == (6, side, side)
            np.testing.assert_allclose(found, wanted.reshape(6, side, side), atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_guided_compiled_equals_eager(pruner, teacher, batch, jit_compile):
    objective = AttentionGuided(pruner, teacher, CONFIG)
    expected, _ = objective(*batch)
    compiled, _ = tf.function(objective, jit_compile=jit_compile)(*batch)
    for name, term in expected.items():
        np.testing.assert_allclose(compiled[name], term, rtol=1e-4)


# --- the SNN's


SPIKING = changed(timesteps=3, snn_distill=0.6, spike_penalty=0.5, temperature=2.0)


@pytest.fixture(scope="module")
def snn(teacher):
    model = copies.spiking(teacher, SPIKING)
    for layer in model.layers:
        if hasattr(layer, "cell"):
            layer.cell.v_th.assign(0.5)
    return model


def spikes_of(model, images):
    """Spikes per neuron, counted train by train."""
    trains = [layer.output for layer in model.layers if hasattr(layer, "cell")]
    counted = [train.numpy() for train in keras.Model(model.input, trains)(images)]
    neurons = sum(train[0].size for train in counted)
    return sum(train.sum() for train in counted) / (len(images) * neurons)


@pytest.mark.parametrize(("alpha", "penalty"), [(0.6, 0.5), (0.0, 2.0), (1.0, 0.0), (0.0, 0.0)])
def test_spike_training_terms_equal_oracle(snn, teacher, batch, alpha, penalty):
    images, labels = batch
    config = dataclasses.replace(SPIKING, snn_distill=alpha, spike_penalty=penalty)
    terms, logits = SpikeTraining(snn, teacher if alpha else None, config)(images, labels)
    np.testing.assert_allclose(logits, snn(images), rtol=1e-5)
    expected = {"cross_entropy": (1 - alpha) * cross_entropy_oracle(logits, labels, 0.1)}
    if alpha:
        goal = teacher(images, training=False)
        expected["distillation"] = alpha * distillation_oracle(logits, goal, 2.0)
    if penalty:
        expected["spikes"] = penalty * spikes_of(snn, images)
        assert expected["spikes"] > 0.01
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-4, atol=1e-6)


def test_spike_penalty_has_the_gradient_of_spikes_per_neuron(snn, batch):
    images, labels = batch
    variables = snn.trainable_variables
    neurons = [layer for layer in snn.layers if hasattr(layer, "cell")]
    trains = keras.Model(snn.input, [layer.output for layer in neurons])

    def gradient(penalty):
        objective = SpikeTraining(snn, None, changed(timesteps=3, spike_penalty=penalty))
        with tf.GradientTape() as tape:
            total = tf.add_n(list(objective(images, labels)[0].values()))
        return tape.gradient(total, variables)

    with tf.GradientTape() as tape:
        size = sum(np.prod(layer.output_shape[1:]) for layer in neurons)
        spikes = tf.add_n([tf.reduce_sum(train) for train in trains(images)]) / (len(images) * size)
    expected = tape.gradient(spikes, variables)
    for variable, more, less, wanted in zip(
        variables, gradient(0.5), gradient(0.0), expected, strict=True
    ):
        found = 0.0 if more is None else more - less
        wanted = 0.0 if wanted is None else 0.5 * wanted
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6, err_msg=variable.name)
    assert float(expected[[v is neurons[0].cell.v_th for v in variables].index(True)]) < -1e-3


def test_spike_training_teaches_the_snn_alone(snn, teacher, batch):
    objective = SpikeTraining(snn, teacher, SPIKING)
    kernel = snn.get_layer("conv1").kernel
    with tf.GradientTape(persistent=True) as tape:
        terms, _ = objective(*batch)
    for name in ("cross_entropy", "distillation"):
        assert np.abs(tape.gradient(terms[name], kernel)).max() > 0.0, name
    assert set(tape.gradient(terms["distillation"], teacher.trainable_variables)) == {None}
