"""Warnings of a training: each once, with what helps."""

import numpy as np
import pytest

from snn_tf import health
from snn_tf.config import COMPRESS, TRAIN_ANN, TRAIN_SNN


def test_layers_that_never_or_always_fire_are_named_with_what_to_turn():
    found = health.firing({"silent": 0.0, "quiet": 1e-6, "busy": 0.999, "all": 1.0})
    assert found == {
        "silent": "layer silent never fires; lower --v_th_scale (calibrated v_th), "
        "raise --initial_membrane (--activation_levels) or --timesteps",
        "all": "layer all fires at every step; raise --v_th_scale (calibrated v_th)",
    }


def ended(watch, losses, rates=None, accuracy=0.1, step=health.ENOUGH_STEPS):
    for loss in losses:
        watch.saw(loss, accuracy)
    return watch.end_epoch(rates or {}, step)


@pytest.mark.parametrize(
    ("stage", "remedy"),
    [(TRAIN_ANN, "--ann_learning_rate"), (COMPRESS, "--density"), (TRAIN_SNN, "--surrogate_scale")],
)
def test_loss_that_does_not_move_is_said_once_after_two_epochs(stage, remedy):
    watch = health.Watch(stage, 10)
    assert ended(watch, [2.303, 2.31]) == []
    (line,) = ended(watch, [2.30, 2.19])
    assert line.startswith(f"{stage}: warning: the loss does not move; ") and remedy in line
    assert ended(watch, [2.303]) == []


def test_loss_may_rest_for_the_steps_of_two_short_epochs():
    watch = health.Watch(TRAIN_ANN, 10)
    assert ended(watch, [2.30], step=1) == ended(watch, [2.30], step=2) == []
    assert ended(watch, [2.30], step=health.ENOUGH_STEPS - 1) == []
    assert len(ended(watch, [2.30], step=health.ENOUGH_STEPS)) == 1


def test_loss_that_fell_once_is_not_complained_of():
    watch = health.Watch(TRAIN_SNN, 10)
    assert ended(watch, [2.0, 1.89]) == []
    assert ended(watch, [2.1]) == [] and ended(watch, [2.2]) == []


@pytest.mark.parametrize(
    ("classes", "accuracy", "warnings"), [(10, 0.54, 1), (10, 0.56, 0), (2, 0.74, 1), (2, 0.76, 0)]
)
def test_network_that_had_learnt_before_may_rest(classes, accuracy, warnings):
    watch = health.Watch(COMPRESS, classes)
    assert ended(watch, [0.3, 0.31], accuracy=accuracy) == []
    assert len(ended(watch, [0.9, 0.7], accuracy=accuracy)) == warnings


def test_one_lucky_batch_is_not_a_network_that_had_learnt():
    watch = health.Watch(TRAIN_SNN, 2)
    ended(watch, [0.7], accuracy=1.0)
    assert len(ended(watch, [0.7] * 3, accuracy=0.5)) == 1


def test_epochs_without_a_logged_loss_end_without_a_complaint():
    watch = health.Watch(TRAIN_ANN, 10)
    assert [ended(watch, []) for _ in range(3)] == [[], [], []]


def test_layer_is_complained_of_once_until_it_changes_its_habit():
    watch = health.Watch(TRAIN_SNN, 10)
    assert len(ended(watch, [2.0], {"a": 0.0, "b": 0.3})) == 1
    assert ended(watch, [1.0], {"a": 0.0, "b": 0.2}) == []
    (line,) = ended(watch, [1.0], {"a": 1.0, "b": 0.2})
    said = "layer a fires at every step; raise --v_th_scale (calibrated v_th)"
    assert line == f"train_snn: warning: {said}"


# --- silence and bounds


@pytest.mark.parametrize(
    ("rates", "first"), [({"a": 0.0, "b": 0.0}, "a"), ({"a": 0.2, "b": 0.0, "c": 0.0}, "b")]
)
def test_layer_at_which_spikes_end_is_named(rates, first):
    (line,) = health.silenced(rates)
    assert line.startswith(f"no spike reaches the output layer; the first silent layer is {first};")


@pytest.mark.parametrize("rates", [{}, {"a": 0.1, "b": 1e-9}, {"beside a shortcut": 0.0, "b": 0.1}])
def test_spikes_that_reach_the_output_are_no_silence(rates):
    assert health.silenced(rates) == []


def test_parameters_at_their_lower_bound_are_named():
    least = np.float32(1e-3)  # 0.0010000000475
    found = health.at_bounds(
        {
            "v_th": {"a": least, "b": 2 * least},
            "leak": {"a": 1.0, "b": least},
            "clip": {"a": least},
        },
        1e-3,
    )
    v_th, leak, clip = found
    assert v_th.startswith("v_th of a is at its lower bound, 0.001; ") and "--train_v_th" in v_th
    assert leak.startswith("leak of b is at its lower bound, 0.001; ") and "--train_leak" in leak
    assert clip.startswith("clip of a is at its lower bound, 0.001; ") and "--ann_learning_rate" in clip
    assert health.at_bounds({"v_th": {"a": 1.1e-3}, "leak": {"a": 1.0}, "clip": {}}, 1e-3) == []


def test_thresholds_that_training_would_raise_are_named():
    least = np.float32(1e-3)
    (line,) = health.below_bound({"a": least, "b": np.float32(9e-4), "c": 1.0}, 1e-3)
    assert line.startswith("v_th of b is below 0.001, ") and "--weight_rms" in line
    assert health.below_bound({"a": least}, 1e-3) == health.below_bound({}, 1e-3) == []


def test_warning_with_a_step_is_said_once():
    watch = health.Watch(TRAIN_SNN, 10)
    assert watch.once(7, ["odd"]) == ["train_snn: warning: step 7: odd"]
    assert watch.once(8, ["odd", "new"]) == ["train_snn: warning: step 8: new"]
