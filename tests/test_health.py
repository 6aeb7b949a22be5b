"""Warnings of a training: each once, with what helps."""

import pytest

from snn_tf import health
from snn_tf.config import COMPRESS, TRAIN_ANN, TRAIN_SNN


def test_layers_that_never_or_always_fire_are_named_with_what_to_turn():
    found = health.firing({"silent": 0.0, "quiet": 1e-6, "busy": 0.999, "all": 1.0})
    assert found == {
        "silent": "layer silent never fires; lower --v_th_scale or raise --timesteps",
        "all": "layer all fires at every step; raise --v_th_scale",
    }


def ended(watch, losses, rates=None):
    for loss in losses:
        watch.saw(loss)
    return watch.end_epoch(rates or {})


@pytest.mark.parametrize(
    ("stage", "remedy"),
    [(TRAIN_ANN, "--ann_learning_rate"), (COMPRESS, "--density"), (TRAIN_SNN, "--surrogate_scale")],
)
def test_loss_that_does_not_move_is_said_once_after_two_epochs(stage, remedy):
    watch = health.Watch(stage)
    assert ended(watch, [2.303, 2.31]) == []
    (line,) = ended(watch, [2.30, 2.19])
    assert line.startswith(f"{stage}: warning: the loss does not move; ") and remedy in line
    assert ended(watch, [2.303]) == []


def test_loss_that_fell_once_is_not_complained_of():
    watch = health.Watch(TRAIN_SNN)
    assert ended(watch, [2.0, 1.89]) == []
    assert ended(watch, [2.1]) == [] and ended(watch, [2.2]) == []


def test_layer_is_complained_of_once_until_it_changes_its_habit():
    watch = health.Watch(TRAIN_SNN)
    assert len(ended(watch, [2.0], {"a": 0.0, "b": 0.3})) == 1
    assert ended(watch, [1.0], {"a": 0.0, "b": 0.2}) == []
    (line,) = ended(watch, [1.0], {"a": 1.0, "b": 0.2})
    assert line == "train_snn: warning: layer a fires at every step; raise --v_th_scale"
