"""Checkpoints of a training: whole, verified before use, the newest good one restored.

<folder>/step-<n>/state.*         TensorFlow's checkpoint after n optimizer steps
<folder>/step-<n>/manifest.json   sizes and SHA-256
<folder>/refused-step-<n>/        one that was not what its manifest says
"""

import pathlib

import tensorflow as tf

from snn_tf import files
from snn_tf.errors import UserError, first_line

_STEP, _REFUSED = "step-", "refused-"


class Checkpoints:
    """The checkpoints of one stage.

    Args:
      folder: where they are.
      owner: the stage's fingerprint: those of another are refused.
      keep: how many are kept.
      objects: what is saved, by name.
    """

    def __init__(self, folder: pathlib.Path, owner: str, keep: int, **objects):
        self.folder, self.owner, self.keep = folder, owner, keep
        self.checkpoint = tf.train.Checkpoint(**objects)

    @property
    def newest(self) -> pathlib.Path | None:
        """The newest checkpoint, good or not."""
        return next(iter(self._all()), None)

    def _all(self) -> list[pathlib.Path]:
        """All checkpoints, newest first."""
        paths = (p for p in self.folder.glob(f"{_STEP}*") if _number(p).isdecimal() and p.is_dir())
        return sorted(paths, key=lambda path: int(_number(path)), reverse=True)

    def save(self, step: int) -> None:
        """Writes the state after `step` steps, once, and removes the oldest beyond those kept.

        Raises:
          UserError: it could not be written; those before it are as they were.
        """
        path = self.folder / f"{_STEP}{step}"
        if path.exists():
            return
        with files.replacing_folder(path, tf.errors.OpError) as beside:
            beside.mkdir()
            self.checkpoint.write(str(beside / "state"))
            files.write_manifest(beside, self.owner)
        for old in self._all()[self.keep :]:
            files.remove_folder(old)

    def restore(self) -> int:
        """Restores the newest good checkpoint and returns its number of steps, 0 if there is none.

        One that is damaged, or of another stage or version, is said and set aside.

        Raises:
          UserError: there are checkpoints, or were, but no good one.
        """
        files.sweep(self.folder)
        refused = []
        for path in self._all():
            try:
                files.check(path, self.owner)
            except files.Damaged as error:
                aside = self._set_aside(path)
                print(f"checkpoint not used, now {aside.name}: {error}")
                refused.append(error)
                continue
            self._read(path)
            if refused:
                print(f"continues from {path}")
            return int(_number(path))
        if others := sorted(self.folder.glob(f"{_REFUSED}*")):
            reason = refused[-1] if refused else f"{others[-1]}: was set aside"
            raise UserError(f"{reason}; no good checkpoint is left; delete {self.folder} to start again")
        return 0

    def _set_aside(self, path: pathlib.Path) -> pathlib.Path:
        aside = path.with_name(f"{_REFUSED}{path.name}")
        try:
            files.remove_folder(aside)
            return path.rename(aside)
        except OSError as error:
            raise UserError(f"{path}: could not be moved aside: {first_line(error)}") from error

    def _read(self, path: pathlib.Path) -> None:
        try:
            self.checkpoint.read(str(path / "state")).assert_existing_objects_matched()
        except (OSError, ValueError, IndexError, AssertionError, tf.errors.OpError) as error:
            raise UserError(f"{path}: checkpoint could not be read: {first_line(error)}") from error


def _number(path: pathlib.Path) -> str:
    return path.name.removeprefix(_STEP)
