"""The SavedModel: equal to its model wherever it is loaded, and with nothing in it but the network."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from tensorflow.core.protobuf import saved_model_pb2

from snn_tf import copies, evaluation, export, pruning
from snn_tf.config import Config
from snn_tf.data import Split
from snn_tf.errors import UserError
from snn_tf.initialisation import initialise
from snn_tf.layers import LIF, Dropout, ReadOut

SHAPE, T = (6, 6, 1), 4
CLASSES = ("wild\ncat", "Ähre", "0")
KERNELS = [(3, 3, 1, 4), (3, 3, 4, 4), (36, 3)]


def ann(seed=0):
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    x = keras.layers.Normalization(mean=[64.0], variance=[4096.0])(image)
    for name, filters in (("conv1", 4), ("conv2", 4)):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=name)(x)
        x = Dropout(0.2, name=f"{name}_dropout")(keras.layers.ReLU(name=f"{name}_neuron")(x))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(2)(x))
    logits = keras.layers.Dense(3, use_bias=False, name="logits")(x)
    model = keras.Model(image, ReadOut(name="read_out")(logits))
    initialise(model, seed)
    return model


def snn(seed=0):
    """Wrapped, half of its weights masked."""
    model = copies.spiking(ann(seed), Config(timesteps=T))
    for layer in model.layers:
        if isinstance(layer, LIF):
            layer.cell.v_th.assign(0.7)
            layer.cell.leak.assign(0.9)
    rng = np.random.default_rng(1)
    masks = {name: rng.random(mask.shape) < 0.5 for name, mask in pruning.masks(model).items()}
    return pruning.wrap(model, masks)


def images(count=9):
    return np.random.default_rng(2).integers(0, 256, (count, *SHAPE)).astype(np.uint8)


class Saved:
    """One export, shared by the tests that only read it."""

    def __init__(self, folder):
        self.folder = folder
        self.model = snn()
        self.exported = export.save(self.model, folder, CLASSES)
        self.serve = tf.saved_model.load(str(folder)).signatures["serving_default"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("export") / "saved_model")


# --- what it computes


@pytest.mark.parametrize("count", [1, 4, 9])
def test_reloaded_model_equals_its_source_for_any_batch_size(saved, count):
    outputs = saved.serve(images=tf.constant(images(count)))
    assert set(outputs) == {"logits", "probabilities", "spikes"}
    logits = saved.model(images(count)).numpy()
    np.testing.assert_allclose(outputs["logits"], logits, rtol=1e-5, atol=1e-5)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(outputs["probabilities"].numpy().sum(axis=1), 1.0, rtol=1e-6)
    assert outputs["spikes"].shape == (count,) and np.unique(logits, axis=0).shape == logits.shape


def test_signature_takes_uint8_images_by_name(saved):
    _, inputs = saved.serve.structured_input_signature
    assert inputs == {"images": tf.TensorSpec((None, *SHAPE), tf.uint8, name="images")}
    types = {name: spec.dtype for name, spec in saved.serve.structured_outputs.items()}
    assert types == dict.fromkeys(("logits", "probabilities", "spikes"), tf.float32)


def test_spike_counts_are_those_of_each_image_and_of_the_evaluation(saved):
    counts = saved.serve(images=tf.constant(images()))["spikes"].numpy()
    alone = [float(saved.serve(images=tf.constant(image[None]))["spikes"][0]) for image in images()]
    np.testing.assert_array_equal(counts, alone)
    assert len(set(alone)) > 1
    split = Split(images(), np.zeros(len(images()), np.int32))
    result = evaluation.Evaluator(saved.model, 4).evaluate(split)
    assert counts.mean() == pytest.approx(sum(result.spikes.values()), rel=1e-6)


def test_names_of_classes_go_along_wherever_the_folder_goes(saved, tmp_path):
    moved = shutil.copytree(saved.folder, tmp_path / "moved")
    network = tf.saved_model.load(str(moved))
    path = pathlib.Path(network.classes.asset_path.numpy().decode())
    assert path == moved / "assets" / "classes.json"
    assert tuple(json.loads(path.read_text())) == CLASSES


def test_snn_of_one_step_reports_its_spikes_and_an_ann_none(tmp_path):
    one_step = copies.spiking(ann(), Config(timesteps=1))
    for name, model, some in (("snn", one_step, True), ("ann", ann(), False)):
        exported = export.save(model, tmp_path / name, CLASSES)
        outputs = exported.serve(tf.constant(images(3)))
        assert outputs["spikes"].shape == (3,)
        assert bool((outputs["spikes"].numpy() > 0).all()) == some
        np.testing.assert_allclose(outputs["logits"], model(images(3)), rtol=1e-5)


# --- what it holds


def test_variables_are_kernels_thresholds_and_leaks_alone(saved):
    variables = tf.train.list_variables(str(saved.folder / "variables" / "variables"))
    kept = {name: shape for name, shape in variables if "OBJECT_GRAPH" not in name}
    shapes = sorted(tuple(shape) for name, shape in kept.items() if "save_counter" not in name)
    assert shapes == sorted([(), (), (), (), *KERNELS])
    kernels = [tf.train.load_variable(str(saved.folder / "variables" / "variables"), n) for n in kept]
    assert 0.4 < np.mean(np.concatenate([k.ravel() for k in kernels if k.ndim > 1]) == 0) < 0.6


def test_nothing_of_keras_or_of_the_masks_is_written(saved):
    assert {path.name for path in saved.folder.iterdir()} <= {
        "assets",
        "fingerprint.pb",
        "saved_model.pb",
        "variables",
    }
    written = saved_model_pb2.SavedModel.FromString((saved.folder / "saved_model.pb").read_bytes())
    nodes = written.meta_graphs[0].object_graph_def.nodes
    objects = {node.user_object.identifier for node in nodes if node.WhichOneof("kind") == "user_object"}
    assert objects <= {"_generic_user_object", "trackable_list_wrapper", "signature_map"}
    names = {node.variable.name for node in nodes if node.WhichOneof("kind") == "variable"}
    assert len(names) >= 3
    assert not [name for name in names if "mask" in name or "threshold" in name or "step" in name]


def test_keras_3_loads_it_as_a_layer(saved):
    keras_3 = pytest.importorskip("keras", minversion="3")
    layer = keras_3.layers.TFSMLayer(str(saved.folder), call_endpoint="serving_default")
    outputs = layer(tf.constant(images(5)))
    np.testing.assert_allclose(outputs["logits"], saved.model(images(5)), rtol=1e-5, atol=1e-5)


# --- the check in a fresh process


def test_check_reloads_it_elsewhere_and_finds_it_equal(saved, monkeypatch):
    """From a relative path, such as --run_dir's default."""
    monkeypatch.chdir(saved.folder.parent)
    found = export.check(saved.exported, saved.folder.relative_to(saved.folder.parent), images())
    assert found["export_max_difference"] < 1e-5 and found["export_agreement"] == 1.0


def on_gpu(monkeypatch) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["gpu"])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("change", ["other weights", "not a number"])
def test_check_refuses_a_saved_model_whose_logits_differ(saved, tmp_path, monkeypatch, change, gpu):
    other = snn(seed=9)
    if change == "not a number":
        kernel = pruning.wrappers(other)["logits"].layer.kernel
        kernel.assign(kernel * np.nan)
    export.save(other, tmp_path / "other", CLASSES)
    if gpu:
        on_gpu(monkeypatch)
    with pytest.raises(UserError, match="reloaded, gives logits that differ by"):
        export.check(saved.exported, tmp_path / "other", images())


def test_check_forgives_other_rounding_on_a_gpu_alone(saved, tmp_path, monkeypatch):
    other = snn()
    kernel = pruning.wrappers(other)["logits"].layer.kernel
    kernel.assign(1.01 * kernel)
    export.save(other, tmp_path / "other", CLASSES)
    with pytest.raises(UserError, match="reloaded, gives logits that differ by"):
        export.check(saved.exported, tmp_path / "other", images())
    on_gpu(monkeypatch)
    found = export.check(saved.exported, tmp_path / "other", images())
    assert found["export_agreement"] == 1.0 and found["export_max_difference"] > 0


def test_check_refuses_a_saved_model_without_its_variables(saved, tmp_path):
    folder = tmp_path / "half"
    export.save(saved.model, folder, CLASSES)
    for path in (folder / "variables").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="could not be reloaded") as caught:
        export.check(saved.exported, folder, images())
    assert "\n" not in str(caught.value)


def test_folder_that_cannot_be_written_is_an_error_of_the_disk_or_of_tensorflow(tmp_path):
    """What the stage turns into one line that names the export."""
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, tf.errors.OpError)):
        export.save(ann(), tmp_path / "file" / "saved_model", CLASSES)
