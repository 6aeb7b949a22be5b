"""A run of seconds, what the tests of runs read from its folder, and how it ends or is refused."""

import json
from pathlib import Path

import tf_keras as keras

from snn_tf.config import Config
from snn_tf.runs import StageFolder

SETTINGS = {
    "dataset": "digits",
    "network": "vgg5",
    "width": 0.125,
    "head": "linear",
    "batch_size": 128,
    "ann_epochs": 1,
    "compress_epochs": 1,
    "snn_epochs": 1,
    "ann_optimizer": "adam",
    "ann_learning_rate": 0.01,
    "timesteps": 2,
    "calibration_timesteps": 4,
    "calibration_batches": 1,
    "density": 0.3,
    "mask_update": 3,
}


class Killed(BaseException):
    """Stands for the end of the process."""


def config_of(run_dir: Path, *stage: str, **settings) -> Config:
    """Some stages of the run, or all; settings over those of `SETTINGS`."""
    return Config(run_dir=str(run_dir), stage=stage or ("all",), **SETTINGS | settings)


def record(run_dir: Path, stage: str) -> dict:
    """A finished stage's record."""
    return json.loads((run_dir / stage / "record.json").read_text())


def model_of(run_dir: Path, stage: str) -> keras.Model:
    """The network that a stage left."""
    return StageFolder(run_dir, stage).load_model()


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(caught) -> str:
    """The message of a caught error, which is a single line."""
    message = str(caught.value)
    assert message and "\n" not in message
    return message
