"""Files that are whole or not there, and manifests that say what they were when they were written.

A file or folder is written beside its place under a name of its own, brought to the disk, and renamed.
What a process that was killed left half-written is removed by `sweep`. A manifest holds size and SHA-256
of a folder's files; `check` compares.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from snn_tf.errors import UserError, first_line

MANIFEST = "manifest.json"
_FORMAT = 1
_BESIDE = ".writing-"


class Damaged(UserError):
    """Files are not what their manifest says; the line names the first such file."""


@contextlib.contextmanager
def replacing(path: pathlib.Path, *failures: type[Exception]) -> Iterator[pathlib.Path]:
    """Gives a path beside `path` to write to; renames it onto `path` if the block ends well.

    Args:
      path: what is written or replaced.
      failures: what the block raises, besides `OSError`, if it cannot write.

    Raises:
      UserError: the disk is full, or the folder may not be written.
    """
    beside = _beside(path)
    unwritable: tuple[type[Exception], ...] = (OSError, *failures)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _bring_to_disk(beside)
        os.replace(beside, path)
        _bring_to_disk(path.parent, whole=False)
    except Exception as error:
        _remove(beside)
        if isinstance(error, unwritable):
            raise UserError(f"{path}: could not be written: {first_line(error)}") from error
        raise


@contextlib.contextmanager
def replacing_folder(path: pathlib.Path, *failures: type[Exception]) -> Iterator[pathlib.Path]:
    """As `replacing`, for a folder; what stood at `path` is removed at the end."""
    with replacing(path, *failures) as beside:
        _remove(beside)
        yield beside
        _bring_to_disk(beside)
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: pathlib.Path) -> None:
    """Removes a folder so that no half of it is ever seen under its name."""
    beside = _beside(path)
    _remove(beside)
    with contextlib.suppress(FileNotFoundError):
        path.rename(beside)
    _remove(beside)


def sweep(folder: pathlib.Path) -> None:
    """Removes what a process that is no more left half-written in `folder`."""
    for leftover in folder.glob(f"{_BESIDE}*"):
        _remove(leftover)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically. Raises `UserError` as `replacing` does."""
    with replacing(path) as beside:
        beside.write_text(text)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes plain types as indented JSON, atomically. Raises `UserError` as `replacing` does."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Plain types as they are written to a file. Raises `ValueError` for a number that is not finite."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file of a run. Raises `UserError` if it is not there or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: could not be read: {first_line(error)}") from error


def write_manifest(
    folder: pathlib.Path, owner: str, others: dict[str, str] | None = None, without: str = ""
) -> None:
    """Writes `manifest.json` of all files in `folder` and below but hidden ones, which others put there.

    Args:
      folder: where.
      owner: fingerprint of the stage whose files these are.
      others: texts by name of files that are yet to be written.
      without: name of a subfolder that is left out.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    entries = {
        name: {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for name, path in names.items()
        if name != MANIFEST and name.partition("/")[0] != without and not path.name.startswith(".")
    }
    for name, text in (others or {}).items():
        content = text.encode()
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / MANIFEST, {"format": _FORMAT, "owner": owner, "files": entries})


def check(folder: pathlib.Path, owner: str = "") -> None:
    """Compares the files in `folder` with its manifest; files that it does not name are free.

    Args:
      folder: where.
      owner: fingerprint that the manifest must hold; empty: any.

    Raises:
      Damaged: one is missing, truncated or changed, the manifest cannot be read or is of a newer
        version, or the files belong to another stage or other settings.
    """
    manifest = _manifest(folder / MANIFEST)
    if owner and manifest["owner"] != owner:
        raise Damaged(f"{folder}: belongs to another stage or to other settings")
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise Damaged(f"{path}: is missing")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise Damaged(f"{path}: has {size} bytes, must have {entry['bytes']}")
            same = _hash(path) == entry["sha256"]
        except OSError as error:
            raise Damaged(f"{path}: could not be read: {first_line(error)}") from error
        if not same:
            raise Damaged(f"{path}: its content has changed (SHA-256)")


def _manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        manifest = json.loads(text)
        made = manifest["format"], manifest["owner"], manifest["files"]
        whole = text == json_text(manifest) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in made[2].values()
        )
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path}: could not be read: {first_line(error)}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path}: is not a manifest") from error
    if isinstance(made[0], int) and made[0] > _FORMAT:
        raise Damaged(f"{path}: format {made[0]} is of a newer version; this one reads {_FORMAT}")
    if made[0] != _FORMAT or not whole:
        raise Damaged(f"{path}: is not as it was written")
    return manifest


def _hash(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{_BESIDE}{path.name}")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _bring_to_disk(path: pathlib.Path, whole: bool = True) -> None:
    """Survives power loss from here on: a file, or a folder with, if `whole`, everything in it."""
    below = list(path.rglob("*")) if whole and path.is_dir() else []
    for each in (*below, path):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
