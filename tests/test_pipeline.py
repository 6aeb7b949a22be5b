"""The whole pipeline on scikit-learn's digits, once for each structure, and the records it leaves."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from run_folders import Killed, model_of, record
from small_networks import kernels

from snn_tf import config as configs
from snn_tf import data, models, provenance, pruning, results, stages
from snn_tf.config import STAGES, Config
from snn_tf.errors import UsageError
from snn_tf.graph import Graph, is_neuron
from snn_tf.runs import StageFolder
from snn_tf.training import Trainer

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "dataset": "digits",
    "network": "vgg5",
    "width": 0.125,
    "dropout": 0.0,
    "head_dropout": 0.1,
    "batch_size": 64,
    "ann_epochs": 2,
    "compress_epochs": 3,
    "snn_epochs": 1,
    "ann_optimizer": "adam",
    "ann_learning_rate": 0.003,
    "snn_learning_rate": 0.002,
    "timesteps": 2,
    "calibration_timesteps": 8,
    "calibration_batches": 2,
    "density": 0.2,
    "precision": "float32",
    "seed": 3,
}
STEPS_PER_EPOCH = 1078 // 64
# Weights of the dense network: 3x3 convolutions, then products behind a flatten of 2x2 positions.
SIZES = {
    "conv1": 9 * 1 * 8,
    "conv2": 9 * 8 * 16,
    "conv3": 9 * 16 * 16,
    "dense4": 2 * 2 * 16 * 512,
    "dense5": 512 * 512,
    "logits": 512 * 10,
}
NETWORKS = ("dense_ann", "compressed_ann", "converted_snn")


def config_of(run_dir: Path, **settings) -> Config:
    return Config(run_dir=str(run_dir), **SETTINGS | settings)


def train(run_dir: Path, **settings) -> subprocess.CompletedProcess:
    """`python train.py` with these settings, as a user runs it."""
    given = SETTINGS | settings | {"run_dir": run_dir}
    flags = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "train.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def irregular(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run through the command line, and what it said."""
    run_dir = tmp_path_factory.mktemp("irregular")
    return run_dir, train(run_dir)


@pytest.fixture(scope="module", params=["irregular", "channel"])
def run_dir(request, tmp_path_factory) -> Path:
    """A finished run of each structure."""
    if request.param == "irregular":
        return request.getfixturevalue("irregular")[0]
    folder = tmp_path_factory.mktemp("channel")
    stages.run(config_of(folder, structure="channel"))
    return folder


def files_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


# --- what is said and left


def test_command_line_runs_everything_and_says_where_it_is(irregular):
    run_dir, said = irregular
    assert said.returncode == 0, said.stderr
    for words in ("train_ann: dense ANN", "compress: ANN", "train_snn: SNN, T = 2", "layers.png"):
        assert words in said.stdout
    assert f"tensorboard --logdir {run_dir}/tensorboard" in said.stdout
    assert "Traceback" not in said.stderr


def test_every_stage_leaves_a_record(run_dir):
    for stage in STAGES:
        found = record(run_dir, stage)
        assert found["stage"] == stage
        settings = {name: found["config"][name] for name in SETTINGS}
        assert settings == SETTINGS and found["config"]["run_dir"] == str(run_dir)
        assert set(found["config"]) == {field for field in Config.__dataclass_fields__}
        assert found["versions"]["tensorflow"] == tf.__version__
        assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert found["versions"].keys() >= {
            "tf_keras",
            "tensorflow-model-optimization",
            "numpy",
            "snn_tf",
        }
        assert "commit" in found and found["device"] == provenance.device()
        assert 0 < found["seconds"] < 600
        assert 0 <= found["validation_accuracy"] <= 1


def test_every_accuracy_is_that_of_the_model_left(run_dir):
    source = data.load(config_of(run_dir))
    images, labels = source.validation.images, source.validation.labels
    for stage in configs.STAGES[:4]:
        guesses = model_of(run_dir, stage)(images, training=False).numpy().argmax(axis=1)
        accuracy = np.mean(guesses == labels)
        assert record(run_dir, stage)["validation_accuracy"] == pytest.approx(accuracy, abs=1.5 / 120)
    for stage in (configs.EVALUATE, configs.EXPORT):
        trained = record(run_dir, configs.TRAIN_SNN)["validation_accuracy"]
        assert record(run_dir, stage)["validation_accuracy"] == trained


def test_training_is_better_than_guessing(run_dir):
    for stage in (configs.TRAIN_ANN, configs.COMPRESS, configs.TRAIN_SNN):
        assert record(run_dir, stage)["validation_accuracy"] > 0.35


def test_steps_are_those_of_the_epochs(run_dir):
    for stage, epochs in ((configs.TRAIN_ANN, 2), (configs.COMPRESS, 3), (configs.TRAIN_SNN, 1)):
        assert record(run_dir, stage)["steps"] == epochs * STEPS_PER_EPOCH


# --- density, masks


def test_density_is_met_and_counts_against_the_dense_network(run_dir):
    total, target = sum(SIZES.values()), round(0.2 * sum(SIZES.values()))
    facts, masks = record(run_dir, configs.EVALUATE), pruning.masks(model_of(run_dir, configs.TRAIN_SNN))
    active = sum(int(mask.sum()) for mask in masks.values())
    channel = record(run_dir, configs.COMPRESS)["config"]["structure"] == "channel"
    assert (active <= target and active > 0.95 * target) if channel else active == target
    assert facts["density"] == pytest.approx(active / total)
    assert facts["compression"] == pytest.approx(total / active)
    assert facts["dense_ann"]["density"] == facts["dense_ann"]["compression"] == 1.0
    for layer in facts["layers"]:
        assert layer["density"] == pytest.approx(masks[layer["name"]].sum() / SIZES[layer["name"]])
    assert [layer["name"] for layer in facts["layers"]] == list(SIZES)
    cut = sum(mask.size for mask in masks.values())
    assert cut == active if channel else cut == total


def test_masks_and_zeros_stay_from_compress_to_train_snn(run_dir):
    networks = [model_of(run_dir, stage) for stage in STAGES[1:4]]
    compressed, converted, trained = (pruning.masks(model) for model in networks)
    zeros = [{name: kernel != 0 for name, kernel in kernels(model).items()} for model in networks]
    for name, mask in compressed.items():
        assert np.array_equal(mask, converted[name]) and np.array_equal(mask, trained[name])
        for nonzero in zeros:
            assert not nonzero[name][~mask].any()
        assert np.array_equal(zeros[0][name], zeros[1][name])
        # A weight regrown last may still be zero, and a lone one may become so by chance.
        assert (zeros[2][name] & mask).sum() >= 0.98 * (zeros[0][name] & mask).sum() > 0


def test_train_snn_moves_weights_thresholds_and_leaks(run_dir):
    before, after = (model_of(run_dir, stage) for stage in (configs.CONVERT, configs.TRAIN_SNN))
    for name, kernel in kernels(after).items():
        assert not np.array_equal(kernel, kernels(before)[name]), name
    for neuron in record(run_dir, configs.TRAIN_SNN)["neurons"]:
        cell = before.get_layer(neuron["name"]).cell
        assert float(cell.leak) == 1.0
        assert 0 < neuron["leak"] <= 1 and neuron["v_th"] > 0
        assert neuron["v_th"] != float(cell.v_th)
    assert any(neuron["leak"] < 1 for neuron in record(run_dir, configs.TRAIN_SNN)["neurons"])


# --- evaluate and export


def test_evaluate_counts_every_test_example_once(run_dir):
    facts = record(run_dir, configs.EVALUATE)
    source = data.load(config_of(run_dir))
    for network in (facts, *(facts[name] for name in NETWORKS)):
        confusion = np.array(network["confusion"])
        assert network["num_examples"] == confusion.sum() == 599
        assert confusion.sum(axis=1).tolist() == np.bincount(source.test.labels).tolist()
        assert network["test_accuracy"] == pytest.approx(np.trace(confusion) / 599)
        assert results.correct(network).sum() == np.trace(confusion)
    logits = model_of(run_dir, configs.TRAIN_ANN)(source.test.images, training=False).numpy()
    accuracy = np.mean(logits.argmax(1) == source.test.labels)
    assert facts["dense_ann"]["test_accuracy"] == pytest.approx(accuracy, abs=1.5 / 599)
    agreeing = results.correct(facts["dense_ann"]) == (logits.argmax(1) == source.test.labels)
    assert np.count_nonzero(~agreeing) <= 1


def test_evaluate_puts_every_cost_beside_the_dense_networks(run_dir):
    facts = record(run_dir, configs.EVALUATE)
    dense = facts["dense_ann"]
    positions = {"conv1": 64, "conv2": 16, "conv3": 16}
    assert dense["macs"] == sum(size * positions.get(name, 1) for name, size in SIZES.items())
    assert dense["acs"] == 0 and "spikes_per_neuron" not in dense
    assert facts["timesteps"] == facts["converted_snn"]["timesteps"] == 2
    assert 0 < facts["macs"] < dense["macs"] and 0 < facts["acs"] <= 2 * dense["macs"]
    for network in (facts, *(facts[name] for name in NETWORKS)):
        for counted in (network, *network["layers"]):
            energy = counted["energy_pj"]
            assert energy["fp32_45nm"] == pytest.approx(4.6 * counted["macs"] + 0.9 * counted["acs"])
            assert energy["int32_45nm"] == pytest.approx(3.2 * counted["macs"] + 0.1 * counted["acs"])
        for key in ("macs", "acs", "weights", "active_weights"):
            assert network[key] == pytest.approx(sum(layer[key] for layer in network["layers"]))
        assert [layer["name"] for layer in network["layers"]] == list(SIZES)
        assert network["weights"] == sum(SIZES.values())


def test_evaluate_reports_activity_by_layer(run_dir):
    facts = record(run_dir, configs.EVALUATE)
    model = model_of(run_dir, configs.TRAIN_SNN)
    neurons = Graph.of(model).select(is_neuron)
    spikes = keras.Model(model.input, {name: layer.output for name, layer in neurons.items()})
    trains = spikes(data.load(config_of(run_dir)).test.images, training=False)
    total = 0.0
    for layer in facts["neurons"]:
        counted = float(tf.reduce_sum(trains[layer["name"]])) / 599
        total += counted
        assert layer["neurons"] == math.prod(neurons[layer["name"]].output_shape[1:])
        assert layer["spikes_per_neuron"] == pytest.approx(counted / layer["neurons"], rel=1e-3)
        assert layer["spike_rate"] == pytest.approx(layer["spikes_per_neuron"] / 2)
    count = sum(layer["neurons"] for layer in facts["neurons"])
    assert facts["spikes_per_neuron"] == pytest.approx(total / count, rel=1e-3)
    assert 0 < facts["spikes_per_neuron"] < 2 and facts["neuron_updates"] == 2 * count


def test_figure_and_export_are_there(run_dir):
    assert (run_dir / "evaluate" / "layers.png").read_bytes().startswith(b"\x89PNG")
    facts = record(run_dir, configs.EXPORT)
    assert facts["export_agreement"] == 1.0 and facts["export_max_difference"] < 1e-3
    assert 0 < facts["bytes_gzipped"] < facts["dense_ann"]["bytes_gzipped"]
    source = data.load(config_of(run_dir))
    images, labels = source.test.images, source.test.labels
    serve = tf.saved_model.load(str(run_dir / "export" / "saved_model")).signatures["serving_default"]
    guesses = serve(images=tf.constant(images))["logits"].numpy().argmax(axis=1)
    accuracy = record(run_dir, configs.EVALUATE)["test_accuracy"]
    assert np.mean(guesses == labels) == pytest.approx(accuracy, abs=1.5 / 599)


def test_events_of_every_training_stage_are_in_one_place(run_dir):
    folders = {path.parent.name for path in (run_dir / "tensorboard").glob("*/events*")}
    assert folders == {configs.TRAIN_ANN, configs.COMPRESS, configs.TRAIN_SNN}


# --- again


def test_second_run_skips_everything_and_changes_nothing(irregular, capsys):
    run_dir, said = irregular
    before = files_in(run_dir)
    stages.run(config_of(run_dir))
    again = capsys.readouterr().out
    for stage in STAGES:
        assert f"{stage}: done before, skipped" in again
    assert files_in(run_dir) == before
    table = said.stdout[said.stdout.index("network  ") :]
    assert table in again


def test_changed_settings_are_named_and_exit_with_2(irregular):
    run_dir, _ = irregular
    said = train(run_dir, timesteps=3, snn_learning_rate=0.5)
    assert said.returncode == 2
    (line,) = said.stderr.strip().splitlines()
    assert line.startswith(f"train.py: {run_dir}/convert was made with other settings")
    assert "--timesteps=3, was 2" in line and "--overwrite" in line and "--ann_epochs" not in line


def test_settings_of_no_stage_may_change(irregular, capsys):
    run_dir, _ = irregular
    stages.run(config_of(run_dir, log_every=7, lif="rnn", jit_compile="true"))
    assert capsys.readouterr().out.count("done before, skipped") == len(STAGES)


def killed_in(monkeypatch, stage: str, step: int) -> None:
    """Ends the process in one step of a stage, after it has been computed; for calls of one step."""
    real = Trainer._attend

    def attend(self, number, *rest):
        real(self, number, *rest)
        if (self.folder.stage, number) == (stage, step):
            raise Killed

    monkeypatch.setattr(Trainer, "_attend", attend)


def figures(found: dict) -> dict:
    """A record without what differs between equal runs."""
    return {
        key: value for key, value in found.items() if key not in ("seconds", "date", "commit", "config")
    }


def test_killed_and_resumed_run_ends_with_the_same_figures(tmp_path, irregular, monkeypatch):
    """Killed in each of the three trainings; so one seed also gives one result."""
    config = config_of(tmp_path, stage=STAGES[:5], checkpoint_every="3", steps_per_call=1)
    for stage, step in ((configs.TRAIN_ANN, 20), (configs.COMPRESS, 26), (configs.TRAIN_SNN, 5)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_in(patch, stage, step)
            stages.run(config)
        assert not StageFolder(tmp_path, stage).done
        assert list(StageFolder(tmp_path, stage).checkpoints.glob("step-*"))
    stages.run(config)
    run_dir, _ = irregular
    for stage in STAGES[:5]:
        assert figures(record(tmp_path, stage)) == figures(record(run_dir, stage)), stage
    for stage in STAGES[:4]:
        pairs = zip(model_of(tmp_path, stage).weights, model_of(run_dir, stage).weights, strict=True)
        assert all(np.array_equal(one.numpy(), two.numpy()) for one, two in pairs), stage


def test_another_seed_gives_another_result(tmp_path, irregular):
    stages.run(config_of(tmp_path, seed=4, stage=(configs.TRAIN_ANN, configs.COMPRESS)))
    run_dir, _ = irregular
    for stage in (configs.TRAIN_ANN, configs.COMPRESS):
        ours, theirs = kernels(model_of(tmp_path, stage)), kernels(model_of(run_dir, stage))
        for name, kernel in ours.items():
            assert not np.array_equal(kernel, theirs[name])
            assert np.mean((kernel != 0) == (theirs[name] != 0)) < 1 or stage == configs.TRAIN_ANN


def test_overwrite_moves_a_changed_stage_aside_and_those_after_it(tmp_path, irregular):
    run_dir, _ = irregular
    for stage in STAGES[:4]:
        (tmp_path / stage).symlink_to(run_dir / stage)
    changed = {"calibration_percentile": 99.0, "overwrite": True}
    stages.run(config_of(tmp_path, stage=STAGES[:4], **changed))
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept >= {"convert", "convert.old-1", "train_snn", "train_snn.old-1"}
    assert not kept & {"train_ann.old-1", "compress.old-1"}
    assert record(tmp_path, "convert.old-1") == record(run_dir, configs.CONVERT)
    v_th = [neuron["v_th"] for neuron in record(tmp_path, configs.CONVERT)["neurons"]]
    before = [neuron["v_th"] for neuron in record(run_dir, configs.CONVERT)["neurons"]]
    assert v_th[0] < before[0]
    with pytest.raises(UsageError, match=r"--calibration_percentile=99\.7, was 99\.0"):
        stages.run(config_of(tmp_path, stage=(configs.CONVERT,)))


def test_attended_maps_are_where_the_design_says(run_dir):
    """Before each pool and before the head: two for a VGG5 on 8x8 images."""
    assert models.attended(model_of(run_dir, configs.COMPRESS)) == ["conv1_neuron", "conv3_neuron"]
