"""Data sets that are a folder of image files: `--dataset=folder:/path`.

The folder holds a folder per class, or `train`, `test` and perhaps `validation` that each hold those.
Labels number the training split's classes, sorted by name, from 0.
"""

import math
import os
from pathlib import Path

import numpy as np

from snn_tf.config import Config
from snn_tf.errors import UserError
from snn_tf.splits import ImageFiles, Split, hold_out, shape_of

PREFIX = "folder:"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_SPLITS = ("train", "validation", "test")
_TEST_FRACTION = 0.2


def load(config: Config) -> tuple[dict[str, Split], list[str]]:
    """Lists the images of the folder that `config.dataset` names; none but the first is read yet.

    Returns:
      Splits train, test (a fifth of train where the folder has none) and, if the folder has it,
      validation; and the names of the classes, by label.

    Raises:
      UserError: the folder is not there, is not laid out so, or its first image is unreadable.
    """
    folder = Path(os.path.expanduser(config.dataset.removeprefix(PREFIX)))
    if not folder.is_dir() or config.dataset == PREFIX:
        raise UserError(f"--dataset={config.dataset}: there is no such folder")
    parts = {"train": folder}
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        parts = {split: folder / split for split in _SPLITS}
        if others := [part.name for part in _listed(folder) if part.is_dir() and part.name not in parts]:
            raise UserError(f"{folder / others[0]}: is no split; allowed are {', '.join(_SPLITS)}")
    listed = {split: _class_files(part) for split, part in parts.items() if part.is_dir()}
    classes = sorted(listed["train"])
    if len(classes) < 2:
        raise UserError(
            f"{parts['train']}: must hold a folder per class, at least 2; found {len(classes)}"
        )
    image_shape = _common_shape(listed["train"][classes[0]][0], config.image_size)
    splits = {}
    for split, files in listed.items():
        if unknown := sorted(set(files) - set(classes)):
            raise UserError(f"{parts[split] / unknown[0]}: {parts['train']} has no such class")
        if not files:
            raise UserError(f"{parts[split]}: must hold a folder per class; found none")
        paths = np.array([str(path) for name in files for path in files[name]], object)
        images = ImageFiles(paths, image_shape, resize=config.image_size > 0)
        splits[split] = Split(images, _labels(files, classes))
    if "test" not in splits:
        train = splits["train"]
        held = max(1, round(_TEST_FRACTION * len(train)))
        splits["train"], splits["test"] = hold_out(config.dataset, train, held)
    return splits, classes


def decode(splits: dict[str, Split], cache_gib: float) -> dict[str, Split]:
    """Decodes every file once: into memory if all fit, else only to see that it can be.

    In the second case the training split's are left to the statistics, which need them all too.

    Args:
      splits: train, validation and test, as files.
      cache_gib: GiB that all images together may take.

    Returns:
      The splits, their images arrays if they fit.

    Raises:
      UserError: a file is unreadable or of another size than the first.
    """
    size = sum(len(split) * math.prod(split.image_shape) for split in splits.values())
    if size <= cache_gib * 2**30:
        return {name: split.in_memory() for name, split in splits.items()}
    for name in ("validation", "test"):
        splits[name].check()
    return splits


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, everything sorted by name, hidden ones left out."""
    files = {}
    for part in _listed(folder):
        if not part.is_dir():
            continue
        images = [entry for entry in _listed(part) if entry.name.lower().endswith(_SUFFIXES)]
        for entry in images:
            if not entry.is_file():
                raise UserError(f"{entry.path}: is not a file, or leads to none")
        files[part.name] = [Path(entry.path) for entry in images]
        if not images:
            raise UserError(
                f"{part.path}: holds no images ({', '.join(_SUFFIXES)}); "
                "in a folder of splits, train and test must be there"
            )
    return files


def _listed(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name, without what is hidden."""
    with os.scandir(os.fspath(folder)) as entries:
        found = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda e: e.name)
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{os.fspath(folder)}: holds {entry.name!a}, a name not in UTF-8") from None
    return found


def _labels(files: dict[str, list[Path]], classes: list[str]) -> np.ndarray:
    """Label of each file, int32 [N], the files in the order of their classes."""
    counts = [len(files.get(name, ())) for name in classes]
    return np.repeat(np.arange(len(classes), dtype=np.int32), counts)


def _common_shape(first: Path, image_size: int) -> tuple[int, int, int]:
    """Shape of all images, from the first: one channel if it has one, else three."""
    height, width, channels = shape_of(first)
    if image_size:
        height = width = image_size
    return height, width, 1 if channels < 3 else 3
