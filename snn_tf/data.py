"""Data sets, and the batches that are drawn from them.

`load` turns `--dataset` into three splits and their `DataSpec`. Images are uint8 [N, H, W, C]
throughout: standardising them is the model's first layer, from the statistics in the spec. What
training step k sees is a function of (seed, k) alone, so a run that resumes at k goes on as if it
had never stopped. How Tiny-ImageNet's archive is read is in `tiny_imagenet`.
"""

import collections
import contextlib
import dataclasses
import io
import logging
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits
from tensorflow_datasets.core import constants
from tensorflow_datasets.core.download import downloader

from snn_tf import tiny_imagenet
from snn_tf.config import Config
from snn_tf.errors import UsageError, UserError

_FOLDER = "folder:"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
# A mirrored digit or letter is another one, or none.
_CHARACTERS = (
    "binary_alpha_digits",
    "cmaterdb",
    "emnist",
    "kmnist",
    "mnist",
    "mnist_corrupted",
    "omniglot",
    "svhn_cropped",
)
_DIGITS_TEST = 599
_PADDING = 4
_SMALLEST_STD = 1.0  # one grey level
_CHUNK = 1024
_DOWNLOAD_RETRIES = 3


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a model must know of a data set.

    Attributes:
      name: the value of `--dataset`.
      image_shape: height, width, channels.
      num_classes: number of classes; labels are 0 to num_classes - 1.
      augment: none, crop or crop_flip.
      mean, std: of the training split, one per channel, in grey levels (0 to 255).
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    augment: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that stay on disk and are decoded when a batch needs them.

    Attributes:
      paths: path of each, [N].
      image_shape: height, width, channels once decoded.
      resize: whether files are resized to that height and width, or must have them.
    """

    paths: np.ndarray
    image_shape: tuple[int, int, int]
    resize: bool

    def __getitem__(self, indices: np.ndarray | slice) -> "ImageFiles":
        return dataclasses.replace(self, paths=self.paths[indices])

    def decode(self, path: str | tf.Tensor) -> tf.Tensor:
        """The image in one file, uint8 [H, W, C]; also as part of a graph."""
        *size, channels = self.image_shape
        image = _decode(path, channels)
        if self.resize:
            image = tf.image.resize(image, size, antialias=True)
            image = tf.saturate_cast(tf.round(image), tf.uint8)
        return image

    def read(self, path: str) -> np.ndarray:
        """Like `decode`; raises `UserError` naming the file if it is unreadable or of another size."""
        with _naming(path), tf.device("CPU"):
            image = self.decode(path).numpy()
        if image.shape != self.image_shape:
            height, width, _ = image.shape
            raise UserError(
                f"{path}: is {height}x{width} pixels where the first image is {self.image_shape[0]}x"
                f"{self.image_shape[1]}; --image_size=PIXELS resizes all"
            )
        return image


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Labelled images: `labels` int32 [N], `images` uint8 [N, H, W, C] or the files of them."""

    images: np.ndarray | ImageFiles
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        if isinstance(self.images, ImageFiles):
            return self.images.image_shape
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at `indices`, as a split."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A data set: its spec and its splits."""

    spec: DataSpec
    train: Split
    validation: Split
    test: Split


def load(config: Config) -> Data:
    """Reads the data set that `config.dataset` names, preparing it first where TFDS must.

    Which examples are held out, for validation and, where the source has no test split, for
    testing, depends on their number only: it is the same for every seed.

    Raises:
      UserError: it cannot be found, downloaded or read, or is not an image classification.
      UsageError: `--image_size` together with a data set whose images have a size.
    """
    from_folder = config.dataset.startswith(_FOLDER)
    if config.image_size and not from_folder:
        raise UsageError(f"--image_size={config.image_size}: must be 0 unless --dataset={_FOLDER}/path")
    if from_folder:
        splits, num_classes = _from_folder(config)
    elif config.dataset == "digits":
        splits, num_classes = _digits()
    else:
        splits, num_classes = _from_tfds(config)
    _check_labels(config.dataset, splits, num_classes)
    if "test" not in splits:
        splits["test"] = splits.pop("validation")
    if "validation" not in splits:
        train = splits["train"]
        held = max(1, round(config.validation_fraction * len(train)))
        splits["train"], splits["validation"] = _hold_out(config.dataset, train, held)
    if from_folder:
        splits = _read_files(splits, config.cache_gib)
    mean, std = _statistics(_chunks(splits["train"]))
    shape = splits["train"].image_shape
    augment = _augment(config.dataset) if config.augment == "auto" else config.augment
    return Data(DataSpec(config.dataset, shape, num_classes, augment, mean, std), **splits)


def _check_labels(name: str, splits: dict[str, Split], num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"--dataset={name}: has {num_classes} class; at least 2 are needed")
    for split, examples in splits.items():
        wrong = examples.labels[(examples.labels < 0) | (examples.labels >= num_classes)]
        if len(wrong):
            raise UserError(
                f"--dataset={name}: split {split} has label {wrong[0]}; must be 0 to {num_classes - 1}"
            )


def _hold_out(name: str, split: Split, held: int) -> tuple[Split, Split]:
    """Parts `held` examples from `split`, chosen by a permutation that never changes."""
    if held >= len(split):
        raise UserError(f"--dataset={name}: {len(split)} examples are too few to hold out {held}")
    # RandomState's stream is frozen across versions of NumPy; a Generator's is not.
    order = np.random.RandomState(0).permutation(len(split))
    return split.take(np.sort(order[held:])), split.take(np.sort(order[:held]))


def _augment(name: str) -> str:
    if name == "digits":
        return "none"
    family = name.partition(":")[0].partition("/")[0]
    return "crop" if family in _CHARACTERS else "crop_flip"


def _statistics(chunks: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, from exact integer sums over [n, H, W, C] chunks."""
    count, totals, squares = 0, [], []
    for chunk in chunks:
        count += math.prod(chunk.shape[:-1])
        totals.append(_channel_sums(chunk))
        squares.append(_channel_sums(np.square(chunk, dtype=np.uint16)))
    mean = np.sum(totals, axis=0) / count
    variance = np.sum(squares, axis=0) / count - mean**2
    std = np.sqrt(np.maximum(variance, _SMALLEST_STD**2))
    return tuple(mean.tolist()), tuple(std.tolist())


def _channel_sums(values: np.ndarray) -> np.ndarray:
    over_images = values.sum(axis=0, dtype=np.int64)  # first the axis along which memory is contiguous
    return over_images.sum(axis=(0, 1))


def _digits() -> tuple[dict[str, Split], int]:
    """Scikit-learn's 1,797 digits of 8x8 pixels, their 17 grey levels spread over 0 to 255."""
    source = load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = Split(images, source.target.astype(np.int32))
    train, test = _hold_out("digits", everything, _DIGITS_TEST)
    return {"train": train, "test": test}, len(source.target_names)


def _from_tfds(config: Config) -> tuple[dict[str, Split], int]:
    name = config.dataset
    with _quiet():
        builder = _prepared(config)
        image, label = _image_and_label(name, builder)
        with _reported(
            f"--dataset={name}: cannot be read from {builder.data_dir}",
            "move that folder away to have it prepared again",
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
    return splits, label.num_classes


def _prepared(config: Config) -> tfds.core.DatasetBuilder:
    """The builder of the data set, prepared now if it was not."""
    name, tiny = config.dataset, config.dataset == "tiny_imagenet"
    where = config.data_dir or constants.DATA_DIR
    remedy = (
        "--manual_dir=FOLDER with tiny-imagenet-200.zip" if tiny else "--data_dir=FOLDER that holds it"
    )
    with _reported(
        f"--dataset={name}: not prepared in {where} and could not be downloaded or prepared",
        f"give {remedy}, or run where the network is reachable",
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
            f"--dataset={_FOLDER}/path with --image_size resizes"
        )
    return found[0], found[1]


def _read_split(builder: tfds.core.DatasetBuilder, split: str, shape: tuple[int, ...]) -> Split:
    count = builder.info.splits[split].num_examples
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    batches = builder.as_dataset(
        split=split,
        batch_size=_CHUNK,
        as_supervised=True,
        read_config=tfds.ReadConfig(try_autocache=False),
    ).as_numpy_iterator()
    for start, batch in zip(range(0, count, _CHUNK), batches, strict=True):
        images[start : start + _CHUNK], labels[start : start + _CHUNK] = batch
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
def _reported(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever TFDS raises, whose exceptions are of every kind, into one line."""
    try:
        yield
    except UserError as error:
        raise type(error)(_first_line(error)) from error
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {_first_line(error)}); {remedy}") from error


def _first_line(error: Exception) -> str:
    """What an exception says, without what follows it and TensorFlow's names of nodes."""
    line = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error).strip().partition("\n")[0])
    return textwrap.shorten(line, 300)


def _from_folder(config: Config) -> tuple[dict[str, Split], int]:
    folder = Path(config.dataset.removeprefix(_FOLDER)).expanduser()
    if not folder.is_dir() or config.dataset == _FOLDER:
        raise UserError(f"--dataset={config.dataset}: there is no such folder")
    parts = {"train": folder}
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        parts = {split: folder / split for split in ("train", "validation", "test")}
    listed = {split: _class_files(part) for split, part in parts.items() if part.is_dir()}
    classes = sorted(listed["train"])
    if len(classes) < 2:
        raise UserError(
            f"{parts['train']}: must hold a folder per class, at least 2; found {len(classes)}"
        )
    image_shape = _first_shape(listed["train"][classes[0]][0], config.image_size)
    splits = {}
    for split, files in listed.items():
        if unknown := sorted(set(files) - set(classes)):
            raise UserError(f"{parts[split] / unknown[0]}: {parts['train']} has no such class")
        if not files:
            raise UserError(f"{parts[split]}: must hold a folder per class; found none")
        paths = np.array([str(path) for name in files for path in files[name]], object)
        counts = [len(files.get(name, ())) for name in classes]
        images = ImageFiles(paths, image_shape, resize=config.image_size > 0)
        splits[split] = Split(images, np.repeat(np.arange(len(classes), dtype=np.int32), counts))
    if "test" not in splits:
        train = splits["train"]
        splits["train"], splits["test"] = _hold_out(config.dataset, train, max(1, round(len(train) / 5)))
    return splits, len(classes)


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, everything sorted by name, hidden ones left out."""
    files = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        images = (path for path in part.iterdir() if path.suffix.lower() in _SUFFIXES)
        files[part.name] = sorted(path for path in images if path.name[0] != ".")
        if not files[part.name]:
            raise UserError(f"{part}: holds no images ({', '.join(_SUFFIXES)})")
    return files


def _first_shape(path: Path, image_size: int) -> tuple[int, int, int]:
    """Shape of all images, from the first: one channel if it has one, else three."""
    with _naming(path):
        height, width, channels = _decode(str(path), channels=0).shape
    if image_size:
        height = width = image_size
    return height, width, 1 if channels < 3 else 3


def _decode(path: str | tf.Tensor, channels: int) -> tf.Tensor:
    """The file's pixels; 0 channels: as many as it has. Of an animation, the first picture."""
    image = tf.io.decode_image(tf.io.read_file(path), channels, expand_animations=False)
    return tf.ensure_shape(image, (None, None, channels or None))


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        raise UserError(f"{path}: cannot be read as an image ({_first_line(error)})") from error


def _read_files(splits: dict[str, Split], cache_gib: float) -> dict[str, Split]:
    """Decodes every file once: into memory if all fit, else only to see that it can be.

    In the second case the training split's are left to `_statistics`, which reads them too.
    """
    size = sum(len(split) * math.prod(split.image_shape) for split in splits.values())
    if size <= cache_gib * 2**30:
        return {name: _in_memory(split) for name, split in splits.items()}
    for name in ("validation", "test"):
        collections.deque(_chunks(splits[name]), maxlen=0)
    return splits


def _in_memory(split: Split) -> Split:
    images = np.empty((len(split), *split.image_shape), np.uint8)
    for start, chunk in zip(range(0, len(split), _CHUNK), _chunks(split), strict=True):
        images[start : start + _CHUNK] = chunk
    return Split(images, split.labels)


def _chunks(split: Split) -> Iterator[np.ndarray]:
    """All images in order, `_CHUNK` at a time."""
    parts = (split.images[start : start + _CHUNK] for start in range(0, len(split), _CHUNK))
    with ThreadPoolExecutor() as pool:
        for part in parts:
            if isinstance(part, ImageFiles):
                part = np.stack(list(pool.map(part.read, part.paths)))
            yield part


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in a split; the remainder of an epoch is dropped.

    Raises:
      UserError: there is not one.
    """
    if len(split) < batch_size:
        raise UserError(
            f"--batch_size={batch_size}: must be at most {len(split)}, the number of training images"
        )
    return len(split) // batch_size


def training_batches(
    split: Split, spec: DataSpec, batch_size: int, seed: int, start_step: int, stop_step: int
) -> tf.data.Dataset:
    """What training steps `start_step` to `stop_step - 1` see, one element a step.

    An epoch is a permutation of the split, keyed by (seed, epoch); no batch straddles two. Each
    image has its own crop and flip, keyed by (seed, step). Step k is thus the same wherever one
    starts.

    Args:
      split: the training split.
      spec: its spec, of which `augment` is used.
      batch_size: B.
      seed: key of order and augmentation, at least 0.
      start_step, stop_step: half-open range of steps, from 0.

    Returns:
      A data set of images uint8 [B, H, W, C] and labels int32 [B].

    Raises:
      UserError: the split is smaller than a batch.
    """
    per_epoch = steps_per_epoch(split, batch_size)
    with tf.device("CPU"):
        order_key, crop_key, flip_key = tf.unstack(tf.random.split((seed, 0), 3))

    def indices_of(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(split)), tf.random.fold_in(order_key, epoch)
        )
        return tf.data.Dataset.from_tensor_slices(
            tf.reshape(order[: per_epoch * batch_size], (per_epoch, batch_size))
        )

    def augmented(step: tf.Tensor, examples: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = examples
        flip = tf.random.fold_in(flip_key, step) if spec.augment == "crop_flip" else None
        return _cropped(images, tf.random.fold_in(crop_key, step), flip), labels

    first, last = start_step // per_epoch, -(-stop_step // per_epoch)
    indices = (
        tf.data.Dataset.range(first, last).flat_map(indices_of).skip(start_step - first * per_epoch)
    )
    batches = _examples_at(indices.take(stop_step - start_step), split)
    if spec.augment != "none":
        steps = tf.data.Dataset.range(start_step, stop_step)
        batches = tf.data.Dataset.zip(steps, batches).map(
            augmented, tf.data.AUTOTUNE, deterministic=True
        )
    return batches.prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split: Split, batch_size: int) -> tf.data.Dataset:
    """Every example once, in order: images uint8 [b, H, W, C], labels int32 [b].

    b is `batch_size`, and what is left in the last batch.
    """
    indices = tf.data.Dataset.range(len(split)).batch(batch_size)
    return _examples_at(indices, split).prefetch(tf.data.AUTOTUNE)


def _examples_at(indices: tf.data.Dataset, split: Split) -> tf.data.Dataset:
    """Images and labels at each element of `indices`, [b] integers."""
    files = split.images if isinstance(split.images, ImageFiles) else None
    with tf.device("CPU"):
        labels = tf.constant(split.labels)
        images = tf.constant(files.paths if files else split.images)

    def gathered(at: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        batch = tf.gather(images, at)
        if files:
            element = tf.TensorSpec(files.image_shape, tf.uint8)
            batch = tf.map_fn(files.decode, batch, fn_output_signature=element)
        return batch, tf.gather(labels, at)

    return indices.map(gathered, tf.data.AUTOTUNE, deterministic=True)


def _cropped(images: tf.Tensor, crop_key: tf.Tensor, flip_key: tf.Tensor | None) -> tf.Tensor:
    """A crop of each image's own, after padding by zeros; with a `flip_key`, half of them mirrored."""
    batch, height, width, _ = images.shape
    offsets = tf.random.stateless_uniform((batch, 2), crop_key, 0, 2 * _PADDING + 1, tf.int32)
    rows, columns = tf.range(height), tf.range(width)
    if flip_key is not None:
        mirrored = tf.random.stateless_uniform((batch, 1), flip_key, 0, 2, tf.int32) > 0
        columns = tf.where(mirrored, columns[::-1], columns)
    sides = (_PADDING, _PADDING)
    padded = tf.pad(images, ((0, 0), sides, sides, (0, 0)))
    padded = tf.gather(padded, offsets[:, :1] + rows, axis=1, batch_dims=1)
    return tf.gather(padded, offsets[:, 1:] + columns, axis=2, batch_dims=1)
