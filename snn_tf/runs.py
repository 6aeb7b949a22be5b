"""Run folders: what a stage depends on, whether it is done, and the record it leaves.

    <run_dir>/<stage>/stage.json       settings that concern the stage, and its upstream's fingerprint
    <run_dir>/<stage>/config.flags     all settings but --overwrite, as a flagfile
    <run_dir>/<stage>/checkpoints/     states of an unfinished training
    <run_dir>/<stage>/model.keras      the result, where the stage makes a network
    <run_dir>/<stage>/manifest.json    sizes and SHA-256 of the stage's files, record.json included
    <run_dir>/<stage>/record.json      written last: the stage is done
    <run_dir>/tensorboard/<stage>/     TensorBoard's events
    <run_dir>/data.json                what tells the data from others

How files are written, so that one that exists is whole, is in `snn_tf.files`.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras as keras

from snn_tf import config as configs
from snn_tf import files, model_files
from snn_tf.config import Config
from snn_tf.errors import UsageError, UserError, first_line
from snn_tf.files import json_text, read_json, replacing, write_json, write_text
from snn_tf.provenance import device, versions
from snn_tf.settings import shown

UPSTREAM = {
    configs.TRAIN_ANN: None,
    configs.COMPRESS: configs.TRAIN_ANN,
    configs.CONVERT: configs.COMPRESS,
    configs.TRAIN_SNN: configs.CONVERT,
    configs.EVALUATE: configs.TRAIN_SNN,
    configs.EXPORT: configs.TRAIN_SNN,
}
CHOOSES_DATA = ("dataset", "image_size", "validation_fraction")
"""Settings that say which examples there are, and which are held out."""
_CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's folder in a run."""

    run_dir: pathlib.Path
    stage: str

    @property
    def path(self) -> pathlib.Path:
        return self.run_dir / self.stage

    @property
    def tensorboard(self) -> pathlib.Path:
        return self.run_dir / "tensorboard" / self.stage

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / _CHECKPOINTS

    @property
    def done(self) -> bool:
        return (self.path / "record.json").exists()

    def record(self) -> dict[str, Any]:
        """The stage's record. Raises `UserError` if the stage has not finished."""
        if not self.done:
            if (self.run_dir / "stage.json").exists():
                raise UserError(
                    f"{self.run_dir}: is a stage's folder; give the run's, {self.run_dir.parent}"
                )
            lacking = f"{self.path}: stage {self.stage} has not finished"
            if not self.run_dir.is_dir():
                lacking = f"{self.run_dir}: there is no such run folder"
            raise UserError(f"{lacking}; run --stage={self.stage} of --run_dir={self.run_dir} first")
        found = read_json(self.path / "record.json")
        if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
            raise UserError(f"{self.path / 'record.json'}: is not the record of a stage")
        return found

    def fingerprint(self) -> str:
        """Identifies the stage's settings and everything upstream."""
        return self._identity()["fingerprint"]

    def follows(self, upstream: "StageFolder") -> bool:
        """Whether the stage is done, and the one before it was not run again with other settings."""
        return self.done and upstream.done and self._identity()["upstream"] == upstream.fingerprint()

    def _identity(self) -> dict[str, Any]:
        path = self.path / "stage.json"
        kept = read_json(path)
        known = {"stage", "settings", "upstream", "fingerprint"}
        if (
            not isinstance(kept, dict)
            or not kept.keys() >= known
            or not isinstance(kept["settings"], dict)
        ):
            raise UserError(f"{path}: does not describe a stage")
        return kept

    def open(self, config: Config, upstream: "Sequence[StageFolder]") -> None:
        """Makes the folder ready for its stage, new or unfinished or done, with the same settings.

        What a process that was killed left half-written is removed. Files of this stage, if it is done,
        and of those upstream are compared with their manifests.

        Args:
          config: the settings.
          upstream: folders of all stages that this one builds on, nearest first.

        Raises:
          UsageError: the folder holds the stage with other settings, and `--overwrite` is not given; or
            a stage upstream in the same run has other settings.
          UserError: a stage upstream has not finished, a file is damaged (this stage's own only without
            `--overwrite`), or the folder cannot be written.
        """
        for folder in upstream:
            folder.check()
            if folder.run_dir == self.run_dir:
                folder.require(config)
        files.sweep(self.run_dir)
        files.sweep(self.path)
        wanted = _identity(self.stage, config, upstream[0] if upstream else None)
        if self.done or (self.path / "stage.json").exists():
            changes = self._damage(config) or _changes(self._identity(), wanted)
            if not changes:
                return
            if not config.overwrite and self._holds_work():
                raise UsageError(
                    f"{self.path} was made with other settings ({changes}); "
                    "give --overwrite to move it aside, or another --run_dir"
                )
            if self._holds_work():
                self._move_aside()
        settings = dataclasses.asdict(dataclasses.replace(config, overwrite=False))
        lines = (f"--{name}={shown(value)}\n" for name, value in settings.items())
        write_text(self.path / "config.flags", "".join(lines))
        write_json(self.path / "stage.json", wanted)

    def check(self) -> None:
        """Raises `UserError` if the stage has not finished, or a file is not what its manifest says."""
        self.record()
        if not (self.path / files.MANIFEST).exists():
            print(f"{self.path}: has no {files.MANIFEST}, so its files are used without a check")
            return
        try:
            files.check(self.path)
        except files.Damaged as error:
            raise UserError(
                f"{error}; run --stage={self.stage} again with --overwrite, which moves {self.path} "
                "aside, or delete its record.json to make it again from the last checkpoint"
            ) from error

    def _damage(self, config: Config) -> str:
        """What `--overwrite` lets be damaged in a finished stage; empty if nothing is."""
        try:
            if self.done:
                self.check()
        except UserError as error:
            if not config.overwrite:
                raise
            return str(error)
        return ""

    def _holds_work(self) -> bool:
        """Whether there is anything to lose: a finished stage, or checkpoints of an unfinished one."""
        return self.done or any(self.checkpoints.glob("*"))

    def require(self, config: Config) -> None:
        """Raises `UsageError` if the stage was made with other settings than these."""
        made = self._identity()
        if changes := _changes(made, {**made, "settings": _settings(self.stage, config)}):
            raise UsageError(
                f"{self.path} was made with other settings ({changes}); run --stage={self.stage} again, "
                f"or give those of {self.path / 'config.flags'}"
            )

    def _move_aside(self) -> None:
        for folder in (self.path, self.tensorboard):
            if folder.exists():
                number = 1
                while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
                    number += 1
                try:
                    folder.rename(aside)
                except OSError as error:
                    line = f"{folder}: could not be moved aside: {first_line(error)}"
                    raise UserError(line) from error

    def finish(self, config: Config, made_by: str, seconds: float, facts: Mapping[str, Any]) -> None:
        """Writes the manifest and the record: the stage is done.

        `made_by` is the `commit` at the process's start: the checkout may have moved on since.
        """
        provenance = {
            "stage": self.stage,
            "config": dataclasses.asdict(config),
            "fingerprint": self.fingerprint(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": made_by,
            "versions": versions(),
            "device": device(),
            "seconds": round(seconds, 3),
        }
        try:
            text = json_text({**provenance, **facts})
        except ValueError as error:
            raise UserError(
                f"{self.path}: its record would hold a number that is not finite; a setting is too large"
            ) from error
        files.write_manifest(self.path, self.fingerprint(), {"record.json": text}, without=_CHECKPOINTS)
        write_text(self.path / "record.json", text)

    def save_model(self, model: keras.Model) -> None:
        """Writes `model.keras`: graph, weights and masks."""
        with replacing(self.path / "model.keras", tf.errors.OpError) as beside:
            # Keras tells the format by the ending.
            whole = beside.with_suffix(".part.keras")
            model.save(whole)
            whole.rename(beside)

    def load_model(self) -> keras.Model:
        """Reads `model.keras`, as data only. Raises `UserError` as `model_files.load` does."""
        return model_files.load(self.path / "model.keras")


def check_data(config: Config, identity: Mapping[str, Any]) -> None:
    """Compares the data with those that this run began with, and the runs that it builds on.

    Args:
      config: of which the data's settings are kept as well: other settings may give other data.
      identity: see `Data.identity`.

    Raises:
      UserError: they differ, or what is kept cannot be read or written.
    """
    settings = {name: getattr(config, name) for name in CHOOSES_DATA}
    now = {"settings": settings, "data": dict(identity)}
    for run_dir in filter(None, (config.run_dir, config.meta_model, config.snn_start)):
        path = pathlib.Path(run_dir) / "data.json"
        if not path.exists():
            continue
        kept = read_json(path)
        if not isinstance(kept, dict) or not kept.keys() >= now.keys():
            raise UserError(f"{path}: does not say what a run's data are")
        if kept["settings"] == settings and kept["data"] != now["data"]:
            raise UserError(
                f"--dataset={config.dataset}: is not what it was when {run_dir} began "
                f"({now['data']}, was {kept['data']}); bring it back, or give another --run_dir"
            )
    path = pathlib.Path(config.run_dir) / "data.json"
    if not path.exists() or read_json(path) != now:
        write_json(path, now)


def _identity(stage: str, config: Config, upstream: StageFolder | None) -> dict[str, Any]:
    settings = _settings(stage, config)
    above = upstream.fingerprint() if upstream else None
    text = json.dumps([stage, settings, above], sort_keys=True)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"stage": stage, "settings": settings, "upstream": above, "fingerprint": fingerprint}


def _settings(stage: str, config: Config) -> dict[str, Any]:
    """The settings that concern a stage, as JSON gives them back."""
    return json.loads(json.dumps(config.concerning(stage)))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two identities, in words; empty if nothing does.

    A setting that the older one does not know had its default, which changes nothing.
    """
    after = new["settings"]
    before = {name: getattr(Config, name) for name in after} | old["settings"]
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    changes = [f"--{name}={after.get(name)}, was {before.get(name)}" for name in names]
    if old["upstream"] != new["upstream"]:
        changes.append("the stage before it was run again with other settings")
    return "; ".join(changes)
