"""What the tests of runs read from a run folder, and of an error."""

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


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(caught) -> str:
    """The message of a caught error, which is a single line."""
    message = str(caught.value)
    assert message and "\n" not in message
    return message
