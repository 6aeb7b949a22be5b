"""What the tests of whole runs read from a run folder."""

import json
from pathlib import Path

import tf_keras as keras

from snn_tf.runs import StageFolder


def record(run_dir: Path, stage: str) -> dict:
    """A finished stage's record."""
    return json.loads((run_dir / stage / "record.json").read_text())


def model_of(run_dir: Path, stage: str) -> keras.Model:
    """The network that a stage left."""
    return StageFolder(run_dir, stage).load_model()
