"""Data sets of TensorFlow Datasets (TFDS), by its names, and Tiny-ImageNet, prepared if they are not.

TFDS raises exceptions of every kind and prints freely; from here come one line and no more.
"""

import contextlib
import difflib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.download import downloader

from snn_tf import tiny_imagenet
from snn_tf.config import Config
from snn_tf.errors import UserError, first_line
from snn_tf.splits import Split

_BATCH = 1024
_DOWNLOAD_RETRIES = 3


def load(config: Config) -> tuple[dict[str, Split], list[str]]:
    """Reads the data set that `config.dataset` names, preparing it first if it is not.

    Returns:
      Its labelled splits, train and at least one of validation and test; and the names of the
      classes, by label.

    Raises:
      UserError: it cannot be found, downloaded or read, lacks those splits, or is not an image
        classification.
    """
    name = config.dataset
    with _quiet():
        builder = _prepared(config)
        image, label = _image_and_label(name, builder)
        with _reported(
            f"--dataset={name}: cannot be read from {builder.data_dir}",
            lambda: "move that folder away to have it prepared again",
        ):
            splits = {
                split: _read_split(builder, split, image.shape)
                for split in ("train", "validation", "test")
                if split in builder.info.splits
            }
    if "test" in splits and np.all(splits["test"].labels < 0):
        del splits["test"]  # of a contest, which keeps the labels to itself
    if "train" not in splits or len(splits) < 2:
        held = ", ".join(builder.info.splits) or "none"
        raise UserError(f"--dataset={name}: needs labelled splits train and test; it has {held}")
    return splits, label.names


def _prepared(config: Config) -> tfds.core.DatasetBuilder:
    """The builder of the data set, prepared now if it was not."""
    name, tiny = config.dataset, config.dataset == "tiny_imagenet"
    where = config.data_dir or constants.DATA_DIR
    with _reported(
        f"--dataset={name}: not prepared in {where} and could not be downloaded or prepared",
        functools.partial(_remedy, name),
    ):
        if tiny:
            builder = tiny_imagenet.builder(config.data_dir, config.manual_dir)
        else:
            # Any version that lies prepared will do, not just the one that the installed TFDS makes.
            version = "" if ":" in name else ":*.*.*"
            builder = tfds.builder(name + version, data_dir=config.data_dir or None)
        _image_and_label(name, builder)
        if not builder.is_prepared():
            print(f"{name}: is being prepared in {where}", file=sys.stderr)
            settings = tfds.download.DownloadConfig(manual_dir=config.manual_dir or None)
            builder.download_and_prepare(download_config=settings)
    return builder


def _remedy(name: str) -> str:
    """What helps if a data set is not there: another name, or where to look for it."""
    known = ["tiny_imagenet", *tfds.list_builders(with_community_datasets=False)]
    family = re.split("[:/]", name)[0]
    if family not in known and os.path.isdir(name):
        return f"if it is a folder of images, give --dataset=folder:{name}"
    if family not in known:
        near = difflib.get_close_matches(family.lower(), known)
        names = f", such as {', '.join(near)}" if near else ""
        return f"give a name that TFDS knows{names}, or --dataset=folder:/path"
    place = "--data_dir=FOLDER that holds it"
    if name == "tiny_imagenet":
        place = "--manual_dir=FOLDER with tiny-imagenet-200.zip"
    return f"give {place}, or run where the network is reachable"


def _image_and_label(
    name: str, builder: tfds.core.DatasetBuilder
) -> tuple[tfds.features.Image, tfds.features.ClassLabel]:
    """The features of a supervised pair of uint8 image and class."""
    keys = builder.info.supervised_keys or ()
    found = [builder.info.features[key] for key in keys if isinstance(key, str)]
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    if len(found) != 2 or not all(map(isinstance, found, kinds)) or found[1].num_classes is None:
        raise UserError(f"--dataset={name}: is not an image-classification data set")
    if None in found[0].shape or found[0].dtype != np.uint8:
        kind = f"{tf.as_dtype(found[0].dtype).name} of shape {found[0].shape}"
        raise UserError(
            f"--dataset={name}: images must be uint8 of one size, not {kind}; "
            "--dataset=folder:/path with --image_size resizes"
        )
    return found[0], found[1]


def _read_split(builder: tfds.core.DatasetBuilder, split: str, shape: tuple[int, ...]) -> Split:
    count = builder.info.splits[split].num_examples
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    batches = builder.as_dataset(
        split=split,
        batch_size=_BATCH,
        as_supervised=True,
        read_config=tfds.ReadConfig(try_autocache=False),
    ).as_numpy_iterator()
    for start, batch in zip(range(0, count, _BATCH), batches, strict=True):
        images[start : start + _BATCH], labels[start : start + _BATCH] = batch
    return Split(images, labels)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's messages and progress bars from the terminal, and its downloads from long waits."""
    tfds.disable_progress_bar()
    downloader.MAX_RETRIES = _DOWNLOAD_RETRIES
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _reported(what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Turns whatever TFDS raises, whose exceptions are of every kind, into one line."""
    try:
        yield
    except UserError as error:
        raise type(error)(first_line(error)) from error
    except (MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)}); {remedy()}") from error
