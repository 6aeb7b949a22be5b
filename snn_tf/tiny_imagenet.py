"""Tiny-ImageNet as a TFDS data set, read member by member from the archive it is published in.

The archive's layout: `tiny-imagenet-200/` with `wnids.txt` (one class a line; a label is the line's
number from 0), `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG` and `val/val_annotations.txt`
(file name, tab, class, tab, box). The images of its `test/` have no labels and are left out.
"""

import dataclasses
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds

from snn_tf.errors import UserError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
NUM_CLASSES = 200
IMAGE_SHAPE = (64, 64, 3)

_ROOT = "tiny-imagenet-200/"
_TRAIN_IMAGE = re.compile(_ROOT + r"train/([^/]+)/images/[^/]+\.JPEG")
_LARGEST_IMAGE = 2**20  # bytes; 64 x 64 pixels take some thousand
_LARGEST_LIST = 2**24
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


@dataclasses.dataclass(eq=False)
class ArchiveConfig(tfds.core.BuilderConfig):
    """Which archive is prepared.

    Attributes:
      num_classes: lines of its `wnids.txt`.
      archive: path of the zip file; empty: it is downloaded from `URL`.
    """

    num_classes: int = NUM_CLASSES
    archive: str = ""


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Splits `train` (the official one) and `validation` (the official `val`), 64x64 RGB images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=IMAGE_SHAPE),
            "label": tfds.features.ClassLabel(num_classes=self.builder_config.num_classes),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="ImageNet's images at 64x64 pixels, 500 per class for training, 50 for testing.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=URL,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        archive = self.builder_config.archive or str(dl_manager.download(URL))
        with _opened(archive) as opened:
            self.info.features["label"].names = _wnids(opened)
        return {
            split: self._generate_examples(archive, listing)
            for split, listing in (("train", _train_members), ("validation", _val_members))
        }

    def _generate_examples(self, archive: str, listing) -> Iterator[tuple[str, dict[str, Any]]]:
        with _opened(archive) as opened:
            labels = {wnid: label for label, wnid in enumerate(_wnids(opened))}
            for member, wnid in listing(opened, labels):
                if wnid not in labels:
                    raise UserError(f"{archive}: {member} is of class {wnid}, which wnids.txt lacks")
                image = _checked_jpeg(opened, member)
                yield Path(member).name, {"image": io.BytesIO(image), "label": labels[wnid]}


def builder(data_dir: str, manual_dir: str) -> TinyImagenet:
    """The TFDS builder, prepared or not.

    Args:
      data_dir: folder of prepared TFDS data sets; empty: TFDS's default.
      manual_dir: folder with `tiny-imagenet-200.zip`, or with one other `tiny-imagenet-*.zip` of the
        same layout, such as a sample of fewer classes; empty: the official archive, downloaded when
        the data set is prepared.

    Returns:
      A builder whose config is named after the number of classes and, but for the official 200, the
      archive's checksums, so that the prepared copies of archives that differ lie side by side.

    Raises:
      UserError: `manual_dir` holds no such archive, or the archive cannot be read.
    """
    archive = _find_archive(manual_dir) if manual_dir else ""
    num_classes, name = NUM_CLASSES, f"{NUM_CLASSES}_classes"
    if archive:
        with _opened(archive) as opened:
            num_classes = len(_wnids(opened))
            if num_classes != NUM_CLASSES:
                name = f"{num_classes}_classes_{_checksum(opened):08x}"
    config = ArchiveConfig(name=name, num_classes=num_classes, archive=archive)
    return TinyImagenet(data_dir=data_dir or None, config=config)


def _find_archive(manual_dir: str) -> str:
    folder = Path(manual_dir)
    official = folder / "tiny-imagenet-200.zip"
    found = [official] if official.is_file() else sorted(folder.glob("tiny-imagenet-*.zip"))
    if len(found) != 1:
        held = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"--manual_dir={manual_dir}: must hold {official.name} or a single other "
            f"tiny-imagenet-*.zip; found {held}"
        )
    return str(found[0])


def _checksum(archive: zipfile.ZipFile) -> int:
    """CRC-32 of the names and CRC-32s of all members."""
    members = sorted((member.filename, member.CRC) for member in archive.infolist())
    return zlib.crc32(repr(members).encode())


def _opened(archive: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except _UNREADABLE as error:
        raise UserError(f"{archive}: cannot be read as a zip archive ({error})") from error


def _read(archive: zipfile.ZipFile, member: str, largest: int) -> bytes:
    """A member's content, which is never written to disk under its name; `largest` in bytes."""
    try:
        size = archive.getinfo(member).file_size
        if size > largest:
            raise UserError(f"{archive.filename}: {member} is {size} bytes; must be at most {largest}")
        return archive.read(member)
    except KeyError:
        raise UserError(f"{archive.filename}: {member} is missing") from None
    except _UNREADABLE as error:
        raise UserError(f"{archive.filename}: {member} cannot be read ({error})") from error


def _lines(archive: zipfile.ZipFile, member: str) -> list[str]:
    try:
        return _read(archive, member, _LARGEST_LIST).decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{archive.filename}: {member} must be text in UTF-8") from None


def _wnids(archive: zipfile.ZipFile) -> list[str]:
    member = _ROOT + "wnids.txt"
    found = [wnid for line in _lines(archive, member) for wnid in line.split()]
    if not found or len(set(found)) < len(found):
        raise UserError(
            f"{archive.filename}: {member} must name each class once; it has {len(found)} names"
        )
    return found


def _train_members(archive: zipfile.ZipFile, labels: dict[str, int]) -> list[tuple[str, str]]:
    """Member and class of every training image; each class must have some."""
    matches = map(_TRAIN_IMAGE.fullmatch, sorted(archive.namelist()))
    members = [(match[0], match[1]) for match in matches if match]
    if empty := sorted(set(labels) - {wnid for _, wnid in members}):
        raise UserError(f"{archive.filename}: {_ROOT}train/{empty[0]}/images/*.JPEG is missing")
    return members


def _val_members(archive: zipfile.ZipFile, labels: dict[str, int]) -> list[tuple[str, str]]:
    """Member and class of every validation image, as annotated."""
    del labels
    member = _ROOT + "val/val_annotations.txt"
    members = []
    for number, line in enumerate(_lines(archive, member), 1):
        name, wnid, *_ = (*line.split(), "", "")
        if not wnid:
            raise UserError(f"{archive.filename}: {member}, line {number}: must be a file and its class")
        members.append((f"{_ROOT}val/images/{name}", wnid))
    if not members:
        raise UserError(f"{archive.filename}: {member} must list the validation images; it is empty")
    return members


def _checked_jpeg(archive: zipfile.ZipFile, member: str) -> bytes:
    """The JPEG as it is stored, once it has decoded to the right size."""
    content = _read(archive, member, _LARGEST_IMAGE)
    try:
        shape = tuple(tf.io.decode_jpeg(content, channels=3).shape)
    except tf.errors.InvalidArgumentError as error:
        raise UserError(f"{archive.filename}: {member} is not a readable JPEG") from error
    if shape != IMAGE_SHAPE:
        raise UserError(f"{archive.filename}: {member} is of shape {shape}, not {IMAGE_SHAPE}")
    return content
