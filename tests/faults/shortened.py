"""A quickstart of seconds, run in processes that may be ended at any moment, and the state it leaves.

TensorFlow is loaded once, by a server from which every process is forked: each starts at `cli.run`.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import tensorflow as tf

from snn_tf import cli
from snn_tf.config import STAGES

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "dataset": "digits",
    "network": "vgg5",
    "width": 0.125,
    "dropout": 0.1,
    "head_dropout": 0.1,
    "batch_size": 128,
    "ann_epochs": 3,
    "compress_epochs": 3,
    "snn_epochs": 2,
    "ann_optimizer": "adam",
    "ann_learning_rate": 0.01,
    "snn_learning_rate": 0.005,
    "warmup_epochs": 0.5,
    "clip_norm": 5,
    "timesteps": 2,
    "calibration_timesteps": 8,
    "calibration_batches": 2,
    "density": 0.2,
    "mask_update": 4,
    "checkpoint_every": 3,
}
# TensorFlow numbers a SavedModel's functions through a process, and longer numbers take more bytes.
_SIZES = ("bytes", "bytes_gzipped", "dense_ann")
TRAINING = ("train_ann", "compress", "train_snn")


def settings_of(seed: int) -> dict:
    """Settings of a run; odd seeds remove channels."""
    return SETTINGS | {"seed": seed, "structure": "channel" if seed % 2 else "irregular"}


def _context():
    # Read by the server when it starts; the command line sets the second before TensorFlow is loaded.
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["snn_tf.stages"])
    return context


CONTEXT = _context()


def _train(argv: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    sys.argv = argv
    cli.run()


class Run:
    """One run folder, and the process that works in it."""

    def __init__(self, run_dir: Path, settings: dict):
        self.run_dir, self.settings = run_dir, settings
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        self.process = None

    def start(self) -> None:
        """Starts `train.py`."""
        flags = [f"--{name}={value}" for name, value in self.settings.items()]
        argv = ["train.py", f"--run_dir={self.run_dir}", *flags]
        self.process = CONTEXT.Process(target=_train, args=(argv, str(self.log)))
        self.process.start()

    def finish(self, timeout: float = 900.0) -> int:
        """Waits for the process's end and returns its exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"{self.run_dir}: still running"
        return self.process.exitcode

    def whole(self) -> "Run":
        """Runs, or goes on, to the end."""
        self.start()
        assert self.finish() == 0, self.said()[-2000:]
        return self

    def said(self) -> str:
        """All that its processes have printed."""
        return self.log.read_text()

    def begun(self) -> str:
        """The stage that is under way; empty before the first and after the last."""
        for stage in reversed(STAGES):
            if (self.run_dir / stage / "stage.json").exists():
                return "" if (self.run_dir / stage / "record.json").exists() else stage
        return ""

    def end_in(self, stage: str, after: float, number: signal.Signals) -> str:
        """Sends a signal `after` seconds in a stage, or its going on, and waits for the end.

        Returns:
          The stage that was hit; empty if the process had come to its end by itself.
        """
        while self.process.is_alive() and not (self.run_dir / stage / "stage.json").exists():
            time.sleep(0.01)
        self.process.join(after)
        if not self.process.is_alive():
            return ""
        hit = self.begun() or "between stages"
        os.kill(self.process.pid, number)
        return hit


def durations(run: Run) -> dict[str, float]:
    """Seconds of each stage of a finished run."""
    return {
        stage: json.loads((run.run_dir / stage / "record.json").read_text())["seconds"]
        for stage in STAGES
    }


def state_of(run_dir: Path) -> dict[str, object]:
    """Everything that two equal runs must have in common, by name: figures as text, arrays as bytes."""
    found: dict[str, object] = {}
    for stage in STAGES:
        record = json.loads((run_dir / stage / "record.json").read_text())
        for name in ("seconds", "date", *(_SIZES if stage == "export" else ())):
            del record[name]
        del record["config"]["run_dir"]
        found |= {f"{stage}/record/{name}": json.dumps(value) for name, value in record.items()}
        found |= _checkpoint(run_dir / stage / "checkpoints")
        if (run_dir / stage / "model.keras").exists():
            found |= _model(run_dir / stage / "model.keras")
    found |= _tensors("saved_model", run_dir / "export" / "saved_model" / "variables" / "variables")
    skipped = {"tensorboard", "lock"}
    for path in run_dir.rglob("*"):
        name = path.relative_to(run_dir)
        if path.is_file() and name.parts[0] not in skipped:
            found[f"file {name}"] = True
    return found


def _model(path: Path) -> dict[str, bytes]:
    found = {}
    with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file:
        with h5py.File(file) as weights:
            weights.visititems(
                lambda name, item: found.update(
                    {f"{path.parent.name}/{name}": np.asarray(item).tobytes()}
                    if isinstance(item, h5py.Dataset)
                    else {}
                )
            )
        # Layers that share a policy have the address of its object in common.
        graph = re.sub(rb'"shared_object_id": [0-9]+', b"", archive.read("config.json"))
        found[f"{path.parent.name}/graph"] = graph
    return found


def _checkpoint(folder: Path) -> dict[str, object]:
    paths = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not paths:
        return {}
    return {f"{folder.parent.name}/newest": paths[-1].name} | _tensors(
        folder.parent.name, paths[-1] / "state"
    )


def _tensors(name: str, prefix: Path) -> dict[str, bytes]:
    reader = tf.train.load_checkpoint(str(prefix))
    return {
        f"{name}/{key}": reader.get_tensor(key).tobytes()
        for key in reader.get_variable_to_shape_map()
        if not key.startswith(("seconds/", "_CHECKPOINTABLE"))
    }


def differences(one: Path, two: Path) -> list[str]:
    """Names of all in which the states of two finished runs differ."""
    first, second = state_of(one), state_of(two)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
