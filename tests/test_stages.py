"""The stages: methods, budgets and networks that `compress` knows, shared teachers, and refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from run_folders import SETTINGS, config_of, contents, model_of, record
from small_networks import clips_of, kernels, spec_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from snn_tf import config as configs
from snn_tf import copies, data, models, provenance, pruners, pruning, stages, training
from snn_tf.config import STAGES, Config
from snn_tf.errors import UsageError, UserError
from snn_tf.graph import Graph, is_neuron, is_norm
from snn_tf.layers import FIRST_CLIP
from snn_tf.runs import StageFolder

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"conv1": 9 * 8, "conv2": 9 * 8 * 16, "conv3": 9 * 16 * 16, "logits": 16 * 10}
POSITIONS = {"conv1": 64, "conv2": 16, "conv3": 16, "logits": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The run folder of a trained meta-model."""
    run_dir = tmp_path_factory.mktemp("teacher")
    stages.run(config_of(run_dir, configs.TRAIN_ANN))
    return run_dir


@pytest.fixture
def student(tmp_path, teacher):
    """Compresses with the shared teacher and some settings; gives the record and the model."""

    def make(*later: str, **settings):
        stages.run(config_of(tmp_path, configs.COMPRESS, *later, meta_model=str(teacher), **settings))
        return record(tmp_path, configs.COMPRESS), model_of(tmp_path, configs.COMPRESS)

    return make


def refusal(kind: type[UserError], config: Config) -> str:
    """The single line with which a run is refused."""
    with pytest.raises(UserError) as caught:
        stages.run(config)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


# --- what every stage has


def test_every_stage_sees_training_images_as_its_own_settings_say(tmp_path, monkeypatch):
    seen, training_batches = {}, data.training_batches

    def watched(split, spec, batch_size, seed, start_step, stop_step, cutout=0):
        seen[seed] = (split, spec.augment, batch_size, stop_step, cutout)
        return training_batches(split, spec, batch_size, seed, start_step, stop_step, cutout)

    monkeypatch.setattr(data, "training_batches", watched)
    own = {"ann_cutout": 2, "snn_cutout": 3, "augment": "crop"}
    calibration = {"calibration_batches": 3, "calibration_batch_size": 20}
    config = config_of(tmp_path, *configs.STAGES[:4], **own, **calibration)
    stages.run(config)
    # Digits have 1,078 training images; thresholds are calibrated on some of them as they are.
    trained = ("crop", 128, 8)
    expected = {
        configs.TRAIN_ANN: (*trained, 2),
        configs.COMPRESS: (*trained, 2),
        configs.CONVERT: ("none", 20, 3, 0),
        configs.TRAIN_SNN: (*trained, 3),
    }
    found = {seed: rest for seed, (_, *rest) in seen.items()}
    assert found == {config.stage_seed(stage): [*wanted] for stage, wanted in expected.items()}
    training = data.load(config).train
    for split, *_ in seen.values():
        np.testing.assert_array_equal(split.images, training.images)


def test_every_record_of_a_process_has_the_commit_of_its_start(tmp_path, monkeypatch):
    """The checkout may move on while a training runs."""
    commits = iter(["loaded", "pulled later", "pulled last"])
    monkeypatch.setattr(stages, "commit", lambda: next(commits))
    monkeypatch.setattr(provenance, "commit", lambda: next(commits))
    stages.run(config_of(tmp_path, configs.TRAIN_ANN, configs.COMPRESS, method="dense"))
    for stage in (configs.TRAIN_ANN, configs.COMPRESS):
        assert record(tmp_path, stage)["commit"] == "loaded"


# --- methods, budgets, networks


def test_dense_passes_the_teacher_on_and_train_snn_trains_its_weights(tmp_path, teacher, student):
    found, model = student(configs.CONVERT, configs.TRAIN_SNN, method="dense")
    trained = kernels(model_of(teacher, configs.TRAIN_ANN))
    for name, kernel in kernels(model).items():
        assert np.array_equal(kernel, trained[name])
    assert found["density"] == 1.0
    assert found["validation_accuracy"] == record(teacher, configs.TRAIN_ANN)["validation_accuracy"]
    before, after = (
        kernels(model_of(tmp_path, stage)) for stage in (configs.CONVERT, configs.TRAIN_SNN)
    )
    for name, kernel in after.items():
        assert not np.array_equal(kernel, before[name]), name


def test_random_keeps_its_first_masks(student):
    found, model = student(method="random", density_schedule="constant")
    config = Config(**found["config"] | {"stage": ("all",), "profile_steps": ()})
    plain = models.build(config, "relu", data.load(config).spec)
    pruner = pruners.make_pruner(plain, config, 8)
    pruner.start(config.stage_seed(configs.COMPRESS))
    first = pruning.masks(pruner.model)
    for name, mask in pruning.masks(model).items():
        assert np.array_equal(mask, first[name])
    assert found["active_weights"] == round(0.3 * sum(SIZES.values()))


def test_magnitude_keeps_the_same_number_wherever_they_are(student):
    found, model = student(method="magnitude")
    assert found["active_weights"] == round(0.3 * sum(SIZES.values()))
    densities = {layer["name"]: layer["density"] for layer in found["layers"]}
    assert max(densities.values()) - min(densities.values()) > 0.05
    kept = {name: np.count_nonzero(kernel) for name, kernel in kernels(model).items()}
    assert kept == {name: np.count_nonzero(mask) for name, mask in pruning.masks(model).items()}


def test_magnitude_uniform_gives_every_layer_one_density(student):
    found, model = student(method="magnitude_uniform")
    for layer in found["layers"]:
        assert layer["active_weights"] == pytest.approx(0.3 * SIZES[layer["name"]], abs=1)
    for name, mask in pruning.masks(model).items():
        assert not kernels(model)[name][~mask].any()


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_channel_structure_knows_the_baselines(student, method):
    found, model = student(method=method, structure="channel")
    target = round(0.3 * sum(SIZES.values()))
    assert found["weights"] == sum(SIZES.values())
    assert 0.8 * target < found["active_weights"] <= target
    assert sum(kernel.size for kernel in kernels(model).values()) == found["active_weights"]


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_budget_of_macs_is_held_in_macs(student, structure):
    found, model = student(budget="macs", structure=structure)
    dense = sum(SIZES[name] * POSITIONS[name] for name in SIZES)
    counted = sum(int(mask.sum()) * POSITIONS[name] for name, mask in pruning.masks(model).items())
    assert found["macs"] == counted
    assert (0.8 if structure == "channel" else 0.99) * 0.3 * dense < counted <= 0.3 * dense
    assert found["mac_density"] == pytest.approx(counted / dense)
    active = sum(int(mask.sum()) for mask in pruning.masks(model).values())
    assert found["density"] == pytest.approx(active / sum(SIZES.values()))
    assert found["density"] != pytest.approx(found["mac_density"], rel=1e-3)


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_student_can_start_from_the_meta_model(teacher, student, structure):
    settings = {"density_schedule": "cubic", "ann_learning_rate": 1e-9, "structure": structure}
    _, model = student(student_start="meta_model", method="magnitude", **settings)
    trained = kernels(model_of(teacher, configs.TRAIN_ANN))["conv1"]
    found = kernels(model)["conv1"]
    if structure == "irregular":
        np.testing.assert_allclose(found, trained * pruning.masks(model)["conv1"], atol=1e-5)
    else:
        apart = np.abs(found[..., None, :] - trained[..., None]).max(axis=(0, 1, 2))
        assert apart.min(axis=0).max() < 1e-5


def test_clips_of_a_student_from_the_meta_model_fit_its_normalisations(tmp_path):
    settings = {
        "batch_norm": True,
        "width": 0.5,
        "ann_learning_rate": 1e-9,
        "student_start": "meta_model",
    }
    settings |= {"activation_levels": 3, "initial_membrane": 0.5}
    stages.run(config_of(tmp_path, configs.TRAIN_ANN, configs.COMPRESS, **settings))
    norms = Graph.of(model_of(tmp_path, configs.TRAIN_ANN)).select(is_norm)
    gammas = {name.removesuffix("_norm"): layer.gamma.numpy() for name, layer in norms.items()}
    found = clips_of(model_of(tmp_path, configs.COMPRESS))
    expected = {f"{name}_neuron": FIRST_CLIP * gamma[0] for name, gamma in gammas.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(found.values()) < 0.8 * FIRST_CLIP


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_trained_clips_of_the_student_become_thresholds(tmp_path, student, structure):
    settings = {"activation_levels": 3, "initial_membrane": 0.5, "batch_norm": False}
    _, model = student(configs.CONVERT, configs.TRAIN_SNN, structure=structure, **settings)
    clips = clips_of(model)
    assert all(0.0 < clip != FIRST_CLIP for clip in clips.values())
    converted, scale = model_of(tmp_path, configs.CONVERT), 1.0
    for name, layer in Graph.of(converted).select(is_neuron).items():
        assert layer.cell.initial_membrane == 0.5
        assert float(layer.cell.v_th) == pytest.approx(clips[name] / scale, rel=1e-5)
        scale = clips[name]


def test_convert_warns_of_thresholds_that_training_would_raise(student, capsys):
    student(configs.CONVERT, method="dense", v_th_scale=1e-6)
    names = "conv1_neuron, conv2_neuron, conv3_neuron"
    line = f"convert: warning: v_th of {names} is below 0.001, to which training raises it; "
    assert line in capsys.readouterr().out


def test_convert_says_nothing_of_thresholds_that_are_not_trained(student, capsys):
    student(configs.CONVERT, method="dense", v_th_scale=1e-6, train_v_th=False)
    assert "is below 0.001" not in capsys.readouterr().out


@pytest.mark.parametrize(("membrane", "warned"), [(0.0, True), (0.5, False)])
def test_convert_warns_of_levels_that_neurons_do_not_round_to(student, capsys, membrane, warned):
    student(configs.CONVERT, activation_levels=3, initial_membrane=membrane)
    line = "convert: warning: --activation_levels=3 round to the nearest, neurons down"
    assert (line in capsys.readouterr().out) == warned


def test_density_that_nothing_is_trained_at_is_warned_of(student, capsys):
    student(density_schedule="cubic", mask_update=0)
    assert "compress: warning: the density reaches 0.3 after the last step" in capsys.readouterr().out


def test_one_time_step_runs_through(tmp_path, student):
    student(configs.CONVERT, configs.TRAIN_SNN, method="random", timesteps=1)
    for stage in (configs.CONVERT, configs.TRAIN_SNN):
        found = record(tmp_path, stage)
        assert 0 < found["spikes_per_neuron"] < 1
        for neuron in found["neurons"]:
            assert neuron["spikes_per_neuron"] == neuron["spike_rate"]


@pytest.mark.parametrize("structure", ["channel", "irregular"])
def test_batch_norm_runs_through_and_is_folded(tmp_path, structure):
    stages.run(config_of(tmp_path, batch_norm=True, structure=structure))
    ann, snn = (model_of(tmp_path, stage) for stage in (configs.COMPRESS, configs.TRAIN_SNN))
    assert any(is_norm(layer) for layer in ann.layers) and not any(map(is_norm, snn.layers))
    masks = pruning.masks(ann)
    assert all(np.array_equal(mask, masks[name]) for name, mask in pruning.masks(snn).items())
    facts, exported = (record(tmp_path, stage) for stage in (configs.EVALUATE, configs.EXPORT))
    assert facts["active_weights"] == facts["compressed_ann"]["active_weights"]
    assert facts["compressed_ann"]["macs"] == record(tmp_path, configs.COMPRESS)["macs"]
    assert exported["export_agreement"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "batch_norm"), [("channel", False), ("irregular", True)])
def test_resnet12_runs_through_at_one_time_step(tmp_path, structure, batch_norm):
    settings = {"network": "resnet12", "structure": structure, "batch_norm": batch_norm}
    stages.run(config_of(tmp_path, **settings, timesteps=1, density=0.5))
    facts = record(tmp_path, configs.EVALUATE)
    assert facts["timesteps"] == 1 and facts["num_examples"] == 599
    assert 0 < facts["spikes_per_neuron"] < 1 and facts["density"] <= 0.5
    assert facts["acs"] <= facts["dense_ann"]["macs"] and facts["macs"] < facts["dense_ann"]["macs"]
    assert record(tmp_path, configs.EXPORT)["export_agreement"] == 1.0


def computes_in_bfloat16(saved_model: Path) -> bool:
    """Whether any operation of an export has that type."""
    (meta,) = SavedModel.FromString((saved_model / "saved_model.pb").read_bytes()).meta_graphs
    functions = meta.graph_def.library.function
    nodes = [*meta.graph_def.node, *(node for function in functions for node in function.node_def)]
    types = {attribute.type for node in nodes for attribute in node.attr.values()}
    return tf.bfloat16.as_datatype_enum in types


def test_export_is_in_float32_if_asked_whatever_the_training_was_in(tmp_path):
    settings = {"precision": "mixed_bfloat16"}
    stages.run(config_of(tmp_path, **settings))
    folder = tmp_path / configs.EXPORT / "saved_model"
    assert computes_in_bfloat16(folder)
    settings |= {"export_precision": "float32", "overwrite": True}
    config = config_of(tmp_path, configs.EXPORT, **settings)
    stages.run(config)
    assert not computes_in_bfloat16(folder)
    images = data.load(config).test.images[:64]
    network = tf.saved_model.load(str(folder)).signatures["serving_default"]
    trained = pruning.unwrap(model_of(tmp_path, configs.TRAIN_SNN))
    model = copies.in_float32(trained)
    for weights, same in zip(trained.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(same, weights)
    np.testing.assert_allclose(network(images=tf.constant(images))["logits"], model(images), atol=1e-4)


def test_export_that_cannot_be_written_or_reloaded_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    stages.run(config_of(tmp_path, *STAGES[:4], method="dense"))
    config = config_of(tmp_path, configs.EXPORT, method="dense")
    failures = {
        "save": OSError("No space left on device"),
        "check": UserError("export: the SavedModel could not be reloaded: it is half"),
    }
    for name, error in failures.items():
        with monkeypatch.context() as patched:
            patched.setattr(stages.export, name, lambda *rest, error=error: (_ for _ in ()).throw(error))
            line = refusal(UserError, config)
        folder = tmp_path / configs.EXPORT
        written = f"{folder / 'saved_model'}: could not be written: No space left on device"
        assert line == (written if name == "save" else str(error))
        assert not list(folder.rglob("*saved_model*"))


def test_train_snn_follows_the_compressed_ann_and_saves_spikes(tmp_path, student):
    student(configs.CONVERT, configs.TRAIN_SNN, snn_distill=0.7, spike_penalty=1.0, snn_epochs=2)
    found = record(tmp_path, configs.TRAIN_SNN)
    assert (found["config"]["snn_distill"], found["config"]["spike_penalty"]) == (0.7, 1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard" / configs.TRAIN_SNN)).Reload()
    assert {"loss/cross_entropy", "loss/distillation", "loss/spikes"} <= set(events.Tags()["tensors"])
    assert found["spikes_per_neuron"] < record(tmp_path, configs.CONVERT)["spikes_per_neuron"]


# --- teachers, subsets of stages


def test_teacher_is_shared_and_not_trained_again(tmp_path, teacher, capsys):
    before = record(teacher, configs.TRAIN_ANN)
    subset = (configs.COMPRESS, configs.TRAIN_ANN)
    stages.run(config_of(tmp_path, *subset, method="dense", meta_model=str(teacher)))
    assert f"train_ann: taken from {teacher}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {configs.COMPRESS}
    assert record(teacher, configs.TRAIN_ANN) == before
    identity = json.loads((tmp_path / configs.COMPRESS / "stage.json").read_text())
    assert identity["upstream"] == before["fingerprint"]


def test_copy_of_a_compressed_network_serves_another_run(tmp_path, teacher, student):
    """How the README tries several SNNs on one compressed network."""
    student()
    other = tmp_path / "other"
    shutil.copytree(tmp_path / configs.COMPRESS, other / configs.COMPRESS)
    before = contents(other / configs.COMPRESS)
    shared = {"meta_model": str(teacher)}
    stages.run(config_of(other, configs.COMPRESS, configs.CONVERT, timesteps=3, **shared))
    assert contents(other / configs.COMPRESS) == before
    assert record(other, configs.CONVERT)["config"]["timesteps"] == 3
    line = refusal(UsageError, config_of(other, configs.COMPRESS, density=0.4, **shared))
    assert "--density=0.4, was 0.3" in line


def test_folder_of_a_stage_is_not_taken_for_that_of_a_run(tmp_path, teacher):
    stage = teacher / configs.TRAIN_ANN
    line = refusal(UserError, config_of(tmp_path, configs.TRAIN_ANN, meta_model=str(stage)))
    assert line == f"{stage}: is a stage's folder; give the run's, {teacher}"


def test_teacher_that_is_not_there_is_named_by_the_stage_it_stands_for(tmp_path):
    config = config_of(tmp_path, configs.TRAIN_ANN, meta_model=str(tmp_path / "missing"))
    folder, remedy = tmp_path / "missing", "; run --stage=train_ann of --run_dir="
    line = refusal(UserError, config)
    assert line.startswith(f"{folder}: there is no such run folder{remedy}{folder}")
    folder.mkdir()
    line = refusal(UserError, config)
    assert line.startswith(f"{folder / configs.TRAIN_ANN}: stage train_ann has not finished{remedy}")


def test_stage_is_refused_where_one_before_it_was_left_behind(tmp_path):
    stages.run(config_of(tmp_path, *configs.STAGES[:4], method="random", density=0.3))
    stages.run(config_of(tmp_path, configs.COMPRESS, method="random", density=0.2, overwrite=True))
    before = contents(tmp_path)
    for stage in (configs.TRAIN_SNN, configs.EVALUATE):
        config = config_of(tmp_path, stage, method="random", density=0.2, overwrite=True)
        assert refusal(UsageError, config) == (
            f"{tmp_path / 'convert'} was made before {tmp_path / 'compress'} was run again with other "
            "settings; run --stage=convert again with --overwrite"
        )
    assert contents(tmp_path) == before
    again = (configs.CONVERT, configs.TRAIN_SNN, configs.EVALUATE)
    stages.run(config_of(tmp_path, *again, method="random", density=0.2, overwrite=True))
    assert record(tmp_path, configs.EVALUATE)["density"] == pytest.approx(0.2, abs=1e-3)


def test_stage_before_that_is_running_again_is_said_to_be_unfinished(tmp_path):
    stages.run(config_of(tmp_path, *configs.STAGES[:4], method="random"))
    (tmp_path / configs.COMPRESS / "record.json").unlink()
    line = refusal(UserError, config_of(tmp_path, configs.EVALUATE, method="random"))
    assert line.startswith(
        f"{tmp_path / configs.COMPRESS}: stage compress has not finished; run --stage"
    )


def test_stage_is_refused_where_the_teacher_was_trained_again(tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    stages.run(config_of(teacher, configs.TRAIN_ANN))
    settings = {"method": "random", "meta_model": str(teacher)}
    stages.run(config_of(student, *configs.STAGES[1:4], **settings))
    stages.run(config_of(teacher, configs.TRAIN_ANN, ann_epochs=2, overwrite=True))
    line = refusal(UsageError, config_of(student, configs.EVALUATE, ann_epochs=2, **settings))
    assert line.startswith(
        f"{student / 'compress'} was made before {teacher / 'train_ann'} was run again"
    )


def test_table_is_shown_while_it_is_of_the_run_as_it_is(tmp_path, capsys):
    stages.run(config_of(tmp_path, method="dense"))
    assert "train_snn: SNN, T = 2" in capsys.readouterr().out
    again = {"method": "dense", "snn_epochs": 2, "overwrite": True}
    stages.run(config_of(tmp_path, configs.TRAIN_SNN, **again))
    said = capsys.readouterr().out
    assert "train_snn: SNN, T = 2" not in said and "SavedModel" not in said
    stages.run(config_of(tmp_path, configs.EVALUATE, **again))
    assert "train_snn: SNN, T = 2" in capsys.readouterr().out


def image_folder(folder: Path) -> dict[str, Any]:
    """Makes a folder of small images; the settings that train on it."""
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            keras.utils.save_img(folder / name / f"{number}.png", np.full((8, 8, 1), 9 * number))
    return {"dataset": f"folder:{folder}", "batch_size": 4, "calibration_batch_size": 4}


def test_images_added_under_a_run_are_refused(tmp_path):
    folder = tmp_path / "images"
    settings = image_folder(folder)
    stages.run(config_of(tmp_path / "run", configs.TRAIN_ANN, **settings))
    shutil.copytree(folder / "dogs", folder / "birds")
    line = refusal(UserError, config_of(tmp_path / "run", configs.COMPRESS, **settings))
    assert line.startswith(
        f"--dataset=folder:{folder}: is not what it was when {tmp_path / 'run'} began"
    )


def test_images_that_changed_under_a_run_are_refused_by_its_own_folder(tmp_path):
    folder = tmp_path / "images"
    settings = image_folder(folder)
    stages.run(config_of(tmp_path / "run", configs.TRAIN_ANN, **settings))
    for path in folder.rglob("*.png"):
        keras.utils.save_img(path, np.full((8, 8, 1), 200), scale=False)
    line = refusal(UsageError, config_of(tmp_path / "run", configs.COMPRESS, **settings))
    assert line.startswith(f"{tmp_path / 'run' / configs.TRAIN_ANN}: standardises images by other")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no image")])
def test_image_that_is_damaged_while_training_is_named(tmp_path, monkeypatch, damage):
    def damaged(config):
        source = load(config)
        damage(Path(source.train.images.paths[0]))
        return source

    load = data.load
    monkeypatch.setattr(data, "load", damaged)
    settings = image_folder(tmp_path / "images") | {"cache_gib": 0.0}
    line = refusal(UserError, config_of(tmp_path / "run", configs.TRAIN_ANN, **settings))
    assert re.fullmatch(rf"{tmp_path}/images/\w+/\d+\.png: cannot be read as an image \(.+\)", line)


@pytest.mark.parametrize(
    "flag, other", [("dataset", "cifar10"), ("validation_fraction", 0.2), ("image_size", 16)]
)
def test_teacher_of_other_data_is_refused(tmp_path, teacher, flag, other):
    folder = tmp_path / "other" / configs.TRAIN_ANN
    shutil.copytree(teacher / configs.TRAIN_ANN, folder)
    made = record(tmp_path / "other", configs.TRAIN_ANN)
    made["config"][flag] = other
    (folder / "record.json").write_text(json.dumps(made))
    (folder / "manifest.json").unlink()
    config = config_of(tmp_path / "run", configs.COMPRESS, meta_model=str(folder.parent))
    line = refusal(UsageError, config)
    assert line.startswith(f"--meta_model={folder.parent}: trained with --{flag}={other}, not --{flag}=")


@pytest.mark.parametrize(
    ("flag", "other", "settings"),
    [
        ("network", "vgg9", {}),
        ("width", 0.5, {}),
        ("head", "mlp", {}),
        ("batch_norm", True, {"student_start": "meta_model"}),
        ("batch_norm", True, {"method": "dense"}),
        ("dropout", 0.25, {"method": "dense"}),
        ("precision", "the other", {"method": "dense"}),
    ],
)
def test_teacher_of_another_network_is_refused_before_training(tmp_path, teacher, flag, other, settings):
    made_with = record(teacher, configs.TRAIN_ANN)["config"]
    if flag == "precision":
        other = "float32" if made_with[flag] == "mixed_bfloat16" else "mixed_bfloat16"
    given = {**settings, flag: other}
    config = config_of(tmp_path, configs.COMPRESS, meta_model=str(teacher), **given)
    line = refusal(UsageError, config)
    assert line == (
        f"--meta_model={teacher}: trained with --{flag}={made_with[flag]}, not --{flag}={other}"
    )


def test_teacher_that_differs_in_several_settings_is_told_them_all(tmp_path, teacher):
    given = {"network": "vgg9", "width": 0.5}
    config = config_of(tmp_path, configs.COMPRESS, meta_model=str(teacher), **given)
    made = record(teacher, configs.TRAIN_ANN)["config"]
    theirs = f"--network={made['network']} --width={made['width']}"
    line = refusal(UsageError, config)
    assert line == f"--meta_model={teacher}: trained with {theirs}, not --network=vgg9 --width=0.5"


def with_model(tmp_path, teacher, model) -> Path:
    """A copy of the teacher's run folder that holds another model."""
    folder = tmp_path / "other" / configs.TRAIN_ANN
    shutil.copytree(teacher / configs.TRAIN_ANN, folder)
    StageFolder(folder.parent, configs.TRAIN_ANN).save_model(model)
    (folder / "manifest.json").unlink()
    return folder.parent


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"mean": 100.0}, "standardises images by other statistics ((100.0,), "),
        ({"std": 1.0}, "standardises images by other statistics (("),
        (
            {"classes": 9},
            "for images and classes ((8, 8, 1), 9), but --dataset=digits has ((8, 8, 1), 10)",
        ),
        (
            {"image_shape": (16, 16, 1)},
            "for images and classes ((16, 16, 1), 10), but --dataset=digits has",
        ),
    ],
    ids=["mean", "std", "classes", "image"],
)
def test_teacher_made_for_other_images_is_refused(tmp_path, teacher, changed, said):
    own = data.load(config_of(tmp_path)).spec
    facts = {"image_shape": own.image_shape, "mean": own.mean[0], "std": own.std[0]} | changed
    model = models.build(config_of(tmp_path), "relu", spec_of(**facts))
    other = with_model(tmp_path, teacher, model)
    line = refusal(UsageError, config_of(tmp_path / "run", configs.COMPRESS, meta_model=str(other)))
    assert line.startswith(f"--meta_model={other}: ") and said in line


def test_teacher_that_this_package_did_not_make_is_refused(tmp_path, teacher):
    image = keras.Input((8, 8, 1), dtype="uint8")
    model = keras.Model(image, keras.layers.Dense(10)(keras.layers.Flatten()(image)))
    other = with_model(tmp_path, teacher, model)
    config = config_of(tmp_path / "run", configs.COMPRESS, meta_model=str(other))
    assert "has no layer standardise" in refusal(UserError, config)


def test_teacher_with_other_maps_is_refused(tmp_path, teacher):
    config = config_of(tmp_path, configs.COMPRESS, meta_model=str(teacher), network="resnet12")
    line = refusal(UsageError, config)
    assert line.startswith(f"--meta_model={teacher}: ") and "--network=resnet12" in line


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stage_before_its_upstream_names_what_to_run_first(tmp_path, stage):
    upstream = {"evaluate": "train_snn", "export": "train_snn"}.get(stage)
    upstream = upstream or STAGES[STAGES.index(stage) - 1]
    line = refusal(UserError, config_of(tmp_path, stage))
    remedy = f"run --stage={upstream} of --run_dir={tmp_path} first"
    assert line.endswith(f"stage {upstream} has not finished; {remedy}")
    assert not (tmp_path / stage).exists()


def test_stages_run_in_the_pipelines_order_whatever_the_flags(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    stages.run(config_of(tmp_path, configs.CONVERT, configs.COMPRESS, method="dense"))
    assert record(tmp_path, configs.CONVERT)["validation_accuracy"] >= 0
    assert not (tmp_path / configs.TRAIN_SNN).exists()


# --- what is said


@pytest.mark.parametrize(
    "settings, kind, words",
    [
        ({"dataset": "no_such_data"}, UserError, "--dataset=no_such_data"),
        ({"dataset": "folder:/no/such/folder"}, UserError, "--dataset=folder:/no/such/folder"),
        ({"network": "vgg16"}, UsageError, "--network=vgg16: its pool4 does not fit images of 8×8"),
        ({"batch_size": 2000}, UserError, "--batch_size=2000: must be at most 1078"),
        ({"image_size": 16}, UsageError, "--image_size=16"),
    ],
)
def test_train_ann_refuses_what_cannot_be(tmp_path, settings, kind, words):
    line = refusal(kind, config_of(tmp_path, configs.TRAIN_ANN, **settings))
    assert words in line
    assert not StageFolder(tmp_path, configs.TRAIN_ANN).done


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"density": 1e-4}, "--density=0.0001: must be at least 0.0"),
        ({"density": 1e-4, "structure": "channel"}, "--density=0.0001: must be at least 0.0"),
        ({"density": 1e-4, "budget": "macs"}, "--density=0.0001: must be at least 0.0"),
        ({"min_layer_density": 0.5}, "--density=0.3: must be at least 0.5"),
        ({"mask_update": 9}, "--mask_update=9: must be at most the stage's 8 steps"),
    ],
)
def test_compress_refuses_what_cannot_be(tmp_path, teacher, settings, words):
    config = config_of(tmp_path, configs.COMPRESS, meta_model=str(teacher), **settings)
    assert words in refusal(UsageError, config)
    assert not StageFolder(tmp_path, configs.COMPRESS).done


@pytest.mark.parametrize("stage", [("all",), (configs.TRAIN_ANN, configs.COMPRESS)])
def test_impossible_compression_is_said_before_the_meta_model_is_trained(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(training.Trainer, "run", lambda trainer: pytest.fail("training began"))
    config = config_of(tmp_path, *stage, density=1e-4)
    assert "--density=0.0001: must be at least 0.0" in refusal(UsageError, config)


def test_what_settings_alone_make_unwise_is_said_before_the_meta_model_is_trained(
    tmp_path, monkeypatch, capsys
):
    def begin(trainer):
        raise UserError("training began")

    monkeypatch.setattr(training.Trainer, "run", begin)
    settings = {"activation_levels": 3, "density_schedule": "cubic", "mask_update": 0}
    line = refusal(UserError, config_of(tmp_path, *configs.STAGES, **settings))
    assert line == "training began"
    said = capsys.readouterr().out
    assert "compress: warning: the density reaches 0.3 after the last step" in said
    assert "convert: warning: --activation_levels=3 round to the nearest" in said


def test_convert_warns_of_thresholds_that_no_current_reaches(student, capsys):
    student(configs.CONVERT, method="dense", v_th_scale=1e6)
    said = capsys.readouterr().out
    for name in ("conv1_neuron", "conv2_neuron", "conv3_neuron"):
        assert (
            f"convert: warning: layer {name} never fires; lower --v_th_scale (calibrated v_th), "
            "raise --initial_membrane (--activation_levels) or --timesteps" in said
        )


def test_run_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(UserError, config_of(tmp_path / "file", configs.TRAIN_ANN))
    assert str(tmp_path / "file") in line and "could not be written" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_dir_that_may_not_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    line = refusal(UserError, config_of(tmp_path / "run", configs.TRAIN_ANN))
    assert str(tmp_path / "run") in line and "Permission denied" in line


def test_damaged_model_is_one_line_and_exit_1(tmp_path, teacher):
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    model = tmp_path / configs.TRAIN_ANN / "model.keras"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 255
    model.write_bytes(content)
    given = SETTINGS | {"run_dir": tmp_path, "stage": configs.COMPRESS}
    command = [sys.executable, "train.py", *(f"--{name}={value}" for name, value in given.items())]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 1, said.stderr
    (line,) = said.stderr.strip().splitlines()
    assert line.startswith(f"train.py: {model}: its content has changed (SHA-256); ")
