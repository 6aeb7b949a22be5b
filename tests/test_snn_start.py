"""SNN training that starts from another run's SNN: at another T, in a run folder of its own."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import run_folders
from run_folders import contents, model_of, one_line, record

from snn_tf import config as configs
from snn_tf import copies, data, execution, pruning, stages, upstream
from snn_tf.config import Config
from snn_tf.errors import UsageError, UserError
from snn_tf.evaluation import Evaluator
from snn_tf.graph import Graph, is_neuron

SNN_SETTINGS = {"batch_norm": True, "snn_learning_rate": 0.01, "lif": "fused"}
BEFORE = (configs.TRAIN_ANN, configs.COMPRESS, configs.CONVERT)


def config_of(run_dir: Path, *stage: str, **settings) -> Config:
    return run_folders.config_of(run_dir, *stage, **SNN_SETTINGS | settings)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The run folder of an SNN trained at T = 2."""
    run_dir = tmp_path_factory.mktemp("first")
    stages.run(config_of(run_dir, *BEFORE, configs.TRAIN_SNN))
    return run_dir


def neurons(model) -> dict:
    return Graph.of(pruning.unwrap(model)).select(is_neuron)


def test_respiking_at_the_same_t_is_the_same_network(first):
    trained = pruning.unwrap(model_of(first, configs.TRAIN_SNN))
    images = data.load(config_of(first)).validation.images[:16]
    again = copies.respiking(trained, config_of(first))
    np.testing.assert_array_equal(again(images), trained(images))


def test_respiking_changes_t_and_the_surrogate_and_no_number(first):
    trained = pruning.unwrap(model_of(first, configs.TRAIN_SNN))
    settings = {"timesteps": 7, "surrogate": "arctan", "surrogate_scale": 0.7, "initial_membrane": 0.5}
    longer = copies.respiking(trained, config_of(first, **settings))
    assert {layer.timesteps for layer in longer.layers if hasattr(layer, "timesteps")} == {7}
    for layer in neurons(longer).values():
        made = layer.get_config()
        assert (made["surrogate"], made["surrogate_scale"]) == ("arctan", 0.7)
        assert made["initial_membrane"] == 0.5
    for old, new in zip(trained.get_weights(), longer.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_longer_t_counts_the_spikes_of_the_shorter_one_and_more(first):
    trained = pruning.unwrap(model_of(first, configs.TRAIN_SNN))
    split = data.load(config_of(first)).validation
    counted = [
        Evaluator(copies.respiking(trained, config_of(first, timesteps=steps)), 128).evaluate(split)
        for steps in (2, 5)
    ]
    for name, spikes in counted[0].spikes.items():
        assert counted[1].spikes[name] >= spikes
    assert counted[1].spikes_per_neuron() > counted[0].spikes_per_neuron() > 0


def test_run_starts_from_another_runs_snn_and_leaves_it_alone(first, tmp_path, capsys):
    before = contents(first)
    stages.run(config_of(tmp_path, timesteps=5, snn_start=str(first)))
    said = capsys.readouterr().out
    for stage in BEFORE:
        assert f"{stage}: taken from {first}" in said and not (tmp_path / stage).exists()
    assert contents(first) == before
    old, new = (model_of(run, configs.TRAIN_SNN) for run in (first, tmp_path))
    for name, mask in pruning.masks(old).items():
        np.testing.assert_array_equal(pruning.masks(new)[name], mask)
    assert {layer.timesteps for layer in neurons(new).values()} == {5}
    assert any((a != b).any() for a, b in zip(old.get_weights(), new.get_weights(), strict=True))
    facts = record(tmp_path, configs.EVALUATE)
    assert (facts["timesteps"], facts["converted_snn"]["timesteps"]) == (5, 2)
    assert record(tmp_path, configs.EXPORT)["export_agreement"] == 1.0


def test_what_trains_an_snn_may_change_with_its_t(first, tmp_path):
    settings = {"batch_size": 64, "surrogate": "arctan", "snn_learning_rate": 0.002, "snn_distill": 0.5}
    stages.run(config_of(tmp_path, configs.TRAIN_SNN, snn_start=str(first), timesteps=3, **settings))
    assert record(tmp_path, configs.TRAIN_SNN)["config"]["batch_size"] == 64


def test_training_starts_from_the_trained_weights_v_th_and_leaks(first, tmp_path):
    config = execution.resolve(config_of(tmp_path, configs.TRAIN_SNN, timesteps=3, snn_start=str(first)))
    start = upstream.untrained_snn(config, data.load(config).spec)
    trained = model_of(first, configs.TRAIN_SNN)
    for old, new in zip(trained.weights, start.weights, strict=True):
        np.testing.assert_array_equal(new.numpy(), old.numpy(), err_msg=old.name)


def test_other_run_is_part_of_what_the_stage_was_made_with(first, tmp_path):
    stages.run(config_of(tmp_path, configs.TRAIN_SNN, snn_start=str(first)))
    second = tmp_path / "second"
    stages.run(config_of(second, configs.TRAIN_SNN, snn_start=str(tmp_path)))
    assert (
        record(second, configs.TRAIN_SNN)["fingerprint"]
        != record(tmp_path, configs.TRAIN_SNN)["fingerprint"]
    )


def test_run_whose_compression_was_made_again_is_no_start(first, tmp_path):
    start, again = tmp_path / "start", tmp_path / "again"
    shutil.copytree(first, start)
    stages.run(config_of(again, configs.TRAIN_SNN, snn_start=str(start)))
    stages.run(config_of(start, configs.COMPRESS, configs.CONVERT, density=0.4, overwrite=True))
    line = f"{start}/train_snn was made before {start}/convert was run again"
    for run_dir in (again, tmp_path / "new"):
        with pytest.raises(UsageError, match=re.escape(line)):
            stages.run(config_of(run_dir, configs.TRAIN_SNN, configs.EVALUATE, snn_start=str(start)))


def test_stages_before_are_found_through_a_chain_of_runs(first, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    stages.run(config_of(one, configs.TRAIN_SNN, snn_start=str(first)))
    stages.run(config_of(two, configs.TRAIN_SNN, configs.EVALUATE, snn_start=str(one)))
    assert 0 < record(two, configs.EVALUATE)["converted_snn"]["test_accuracy"] <= 1
    with pytest.raises(UsageError, match="began with the SNN of --run_dir"):
        stages.run(config_of(one, snn_start=str(two), overwrite=True))


@pytest.mark.parametrize(
    ("settings", "kind", "line"),
    [
        (
            {"snn_start": "{first}", "run_dir": "{first}"},
            UsageError,
            "--snn_start={first}: must be another folder",
        ),
        (
            {"snn_start": "{new}/nowhere"},
            UserError,
            "nowhere: there is no such run folder; run --stage=train_snn of --run_dir={new}/nowhere",
        ),
        (
            {"snn_start": "{first}", "validation_fraction": 0.2},
            UsageError,
            "--snn_start={first}: trained with --valid",
        ),
    ],
    ids=["itself", "nowhere", "other data"],
)
def test_run_that_cannot_be_the_start_is_refused(first, tmp_path, settings, kind, line):
    places = {"first": first, "new": tmp_path}
    given = {
        name: value.format(**places) if isinstance(value, str) else value
        for name, value in ({"run_dir": "{new}"} | settings).items()
    }
    with pytest.raises(kind) as caught:
        stages.run(config_of(given.pop("run_dir"), configs.TRAIN_SNN, **given))
    assert line.format(**places) in one_line(caught)


@pytest.mark.parametrize(
    ("name", "made", "other"),
    [("initial_membrane", 0.0, 0.5), ("density", 0.3, 0.25), ("v_th_scale", 0.3, 0.5), ("seed", 0, 1)],
)
def test_run_of_other_settings_cannot_be_the_start(first, tmp_path, name, made, other):
    with pytest.raises(UsageError) as caught:
        stages.run(config_of(tmp_path, configs.TRAIN_SNN, snn_start=str(first), **{name: other}))
    line = f"--snn_start={first}: trained with --{name}={made}, not --{name}={other}"
    assert one_line(caught) == line
