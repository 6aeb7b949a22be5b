"""Model files: those of this package are read, others refused before Keras makes anything of them."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from small_networks import build, initialised

from snn_tf import copies, model_files, pruning
from snn_tf.config import Config
from snn_tf.errors import UserError
from snn_tf.initialisation import initialise

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Path of a good file."""
    path = tmp_path_factory.mktemp("model") / "model.keras"
    pruning.wrap(initialised("vgg5", width=0.125, head="linear")).save(path)
    return path


def refusal(path) -> str:
    """The single line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        model_files.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    return str(caught.value)


def members_of(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def with_config(whole, path, change):
    """A copy of `whole` whose configuration is changed in place."""
    members = members_of(whole)
    config = json.loads(members["config.json"])
    change(config)
    return packed(path, members | {"config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(
    "network, batch_norm, neuron",
    [
        ("vgg5", True, "relu"),
        ("vgg5", True, "quantised_relu"),
        ("vgg5", False, "lif"),
        ("resnet12", False, "relu"),
    ],
)
def test_every_kind_of_network_is_read(tmp_path, network, batch_norm, neuron):
    settings = {"width": 0.125, "batch_norm": batch_norm, "head": "linear", "activation_levels": 3}
    model = build(network, "relu" if neuron == "lif" else neuron, **settings)
    initialise(model, 1)
    if neuron == "lif":
        model = copies.spiking(model, Config(timesteps=2, bias_current=True))
    made = pruning.wrap(model)
    made.save(tmp_path / "model.keras")
    loaded = model_files.load(tmp_path / "model.keras")
    for one, other in zip(made.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_network_is_read_where_nothing_else_of_the_package_was_imported(tmp_path):
    path = tmp_path / "model.keras"
    pruning.wrap(copies.spiking(initialised("vgg5", width=0.1), Config())).save(path)
    program = "import pathlib, sys; from snn_tf.model_files import load; load(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, path], check=True, cwd=ROOT)


def test_saved_model_in_its_place_is_said(tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "model.keras"))
    assert "it is a folder (a SavedModel?)" in refusal(tmp_path / "model.keras")


def test_legacy_file_under_its_name_is_refused(tmp_path):
    initialised("vgg5", width=0.125, head="linear").save_weights(tmp_path / "model.h5")
    (tmp_path / "model.h5").rename(tmp_path / "model.keras")
    assert "File is not a zip file" in refusal(tmp_path / "model.keras")


def test_lambda_is_refused(tmp_path):
    image = keras.Input((4,))
    keras.Model(image, keras.layers.Lambda(lambda x: 2 * x)(image)).save(tmp_path / "model.keras")
    assert "holds keras.layers.Lambda, of which no network" in refusal(tmp_path / "model.keras")


@pytest.mark.parametrize(
    "stranger, said",
    [
        ({"module": "os", "class_name": "system", "config": {}}, "os.system"),
        ({"module": "builtins", "class_name": "function", "config": "eval"}, "builtins.function"),
        ({"class_name": "__lambda__", "config": {"value": "x"}}, "__lambda__"),
        ({"module": "snn_tf.layers", "class_name": "Lambda", "config": {}}, "snn_tf.layers.Lambda"),
        ({"module": ["os"], "class_name": "Dense", "config": {}}, "['os'].Dense"),
        ({"module": "keras.layers", "class_name": ["Dense"], "config": {}}, "keras.layers.['Dense']"),
    ],
)
def test_class_from_elsewhere_is_refused_and_not_imported(tmp_path, whole, monkeypatch, stranger, said):
    def change(config):
        config["config"]["layers"][-1]["config"]["activation"] = [stranger | {"registered_name": None}]

    monkeypatch.setattr(keras.models, "load_model", lambda *_, **__: pytest.fail("Keras was asked"))
    path = with_config(whole, tmp_path / "model.keras", change)
    assert f"holds {said}, of which no network of this package is made" in refusal(path)


@pytest.mark.parametrize("config", [b"[]", b"{}", b"3", b"null", b"{", b"\xff", b"[" * 100_000])
def test_configuration_that_is_none_is_refused(tmp_path, whole, config):
    path = packed(tmp_path / "model.keras", members_of(whole) | {"config.json": config})
    assert "could not be read: " in refusal(path) or "must be a network" in refusal(path)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "metadata.json"])
def test_missing_member_is_named(tmp_path, whole, name):
    members = {key: value for key, value in members_of(whole).items() if key != name}
    assert f"; {name} is the difference" in refusal(packed(tmp_path / "model.keras", members))


@pytest.mark.parametrize("name", ["../../outside.txt", "/outside.txt", "assets/x.bin"])
def test_member_that_is_no_part_of_a_model_is_refused(tmp_path, whole, name):
    path = packed(tmp_path / "model.keras", members_of(whole) | {name: b"x"})
    assert f"; {name} is the difference" in refusal(path)
    assert [file.name for file in tmp_path.rglob("*")] == ["model.keras"]


def test_configuration_that_unpacks_without_end_is_refused(tmp_path, whole):
    path = packed(tmp_path / "model.keras", members_of(whole) | {"config.json": b" " * (2**26 + 1)})
    assert "config.json must be at most 67108864 bytes" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite_is_named_with_its_layer(tmp_path, value):
    model = initialised("vgg5", width=0.125, head="linear")
    kernel = model.get_layer("conv2").kernel
    spoilt = kernel.numpy()
    spoilt[1, 1, 3, 5] = value
    kernel.assign(spoilt)
    model.save(tmp_path / "model.keras")
    assert "layer conv2: " in refusal(tmp_path / "model.keras")
