"""Data sets that are a folder of image files: `--dataset=folder:/path`.

The folder holds a folder per class, or `train`, `test` and perhaps `validation` that each hold those.
Labels number the training split's classes, sorted by name, from 0. Images have one channel if all files
are grey, else three. TensorFlow decodes them; what it passes over in a file, Pillow reads beforehand.
"""

import collections
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from snn_tf.config import FOLDER, Config
from snn_tf.errors import UserError
from snn_tf.splits import ImageFiles, Split, hold_out, shape_of

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_SPLITS = ("train", "validation", "test")
_TEST_FRACTION = 0.2
# Kinds of pixels and formats, in Pillow's names; TensorFlow decodes no other format to one channel.
_GREY = {"1", "L", "LA"}
_WITH_GREY = {"PNG", "JPEG"}
_UPRIGHT = 1


def load(config: Config) -> tuple[dict[str, Split], list[str]]:
    """Lists the images of the folder that `config.dataset` names; none but the first is decoded yet.

    Says which files it passes over, and how many have a rotation beside their pixels.

    Returns:
      Splits train, test (a fifth of train where the folder has none) and, if the folder has it,
      validation; and the names of the classes, by label.

    Raises:
      UserError: the folder is not there, is not laid out so, its first image is unreadable, or one is a
        kind of BMP that TensorFlow takes for another.
    """
    parts = _parts(config)
    listed = {split: _class_files(part) for split, part in parts.items()}
    classes = sorted(listed["train"])
    if len(classes) < 2:
        raise UserError(
            f"{parts['train']}: must hold a folder per class, at least 2; found {len(classes)}"
        )
    image_shape = _common_shape(listed, classes[0], config.image_size)
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
        splits["train"], splits["test"] = hold_out(f"--dataset={config.dataset}", train, held)
    return splits, classes


def _parts(config: Config) -> dict[str, Path]:
    """The folder of each split, or that of all images as train."""
    folder = Path(config.dataset.removeprefix(FOLDER))
    if not folder.is_dir() or config.dataset == FOLDER:
        raise UserError(f"--dataset={config.dataset}: there is no such folder")
    if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
        return {"train": folder}
    named = {part.name: folder / part.name for part in _listed(folder) if part.is_dir()}
    if others := sorted(named.keys() - set(_SPLITS)):
        raise UserError(f"{folder / others[0]}: is no split; allowed are {', '.join(_SPLITS)}")
    return {split: named[split] for split in _SPLITS if split in named}


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
    passed_over = []
    for part in _listed(folder):
        if not part.is_dir():
            passed_over.append(part)
            continue
        images: list[os.DirEntry[str]] = []
        for entry in _listed(part):
            (images if entry.name.lower().endswith(_SUFFIXES) else passed_over).append(entry)
        for entry in images:
            if not entry.is_file():
                raise UserError(f"{entry.path}: is not a file, or leads to none")
        files[part.name] = [Path(entry.path) for entry in images]
        if not images:
            raise UserError(
                f"{part.path}: holds no images ({', '.join(_SUFFIXES)}); "
                "in a folder of splits, train and test must be there"
            )
    _say_passed_over(folder, passed_over)
    return files


def _say_passed_over(folder: Path, entries: Iterable[os.DirEntry[str]]) -> None:
    """Says what of a folder of classes is not read, by the ends of the names."""
    kinds = collections.Counter(
        "folders" if entry.is_dir() else Path(entry.name).suffix.lower() or "no suffix"
        for entry in entries
    )
    if kinds:
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        print(f"data: warning: {folder}: not read are {kinds.total()} entries ({counts})")


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


def _common_shape(
    listed: dict[str, dict[str, list[Path]]], first: str, image_size: int
) -> tuple[int, int, int]:
    """Height, width and channels of all images: the first one's size, a channel if every file is grey.

    Says how many are to be rotated.
    """
    paths = [path for files in listed.values() for part in files.values() for path in part]
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(_header, paths))
    turned = sum(orientation != _UPRIGHT for _, orientation in headers)
    if turned:
        print(
            f"data: warning: {turned} of {len(paths)} images have a rotation in their EXIF data, which "
            "is not applied; turn their pixels, such as by mogrify -auto-orient"
        )
    height, width, _ = shape_of(listed["train"][first][0])
    if image_size:
        height = width = image_size
    return height, width, 1 if all(grey for grey, _ in headers) else 3


def _header(path: Path) -> tuple[bool, int]:
    """Whether a file is grey, and its EXIF orientation; of one that is unreadable, what asks nothing."""
    try:
        with Image.open(path) as image:
            kind, pixels = image.format, image.mode
            exif = image.getexif() if "exif" in image.info else {}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False, _UPRIGHT
    if (kind, pixels) == ("BMP", "P"):
        raise UserError(f"{path}: is a BMP with a palette; BMPs must be grey or of 24 bits")
    return kind in _WITH_GREY and pixels in _GREY, exif.get(ExifTags.Base.Orientation, _UPRIGHT)
