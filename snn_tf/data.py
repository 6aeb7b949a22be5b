"""The data set that `--dataset` names, and, for the rest of the package, the batches drawn from it.

`load` turns `--dataset` into three splits and their `DataSpec`. Images are uint8 [N, H, W, C]
throughout: standardising them is the model's first layer, from the statistics in the spec. The
sources are `tfds_source`, `image_folder` and, here, scikit-learn's digits; batches are in `batches`.
"""

import contextlib
import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from snn_tf import image_folder, tfds_source
from snn_tf.batches import evaluation_batches, steps_per_epoch, training_batches
from snn_tf.config import FOLDER, Config
from snn_tf.errors import UsageError, UserError
from snn_tf.splits import DataSpec, Split, hold_out

__all__ = [
    "Data",
    "DataSpec",
    "Split",
    "evaluation_batches",
    "load",
    "steps_per_epoch",
    "training_batches",
]

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
_SMALLEST_STD = 1.0  # one grey level


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """A data set: its spec, its splits, and what its classes are called, by label."""

    spec: DataSpec
    train: Split
    validation: Split
    test: Split
    class_names: Sequence[str]

    def description(self) -> str:
        """What was read, in one line."""
        size = "x".join(map(str, self.spec.image_shape))
        counts = ", ".join(f"{len(split)} {name}" for name, split in self._splits().items())
        return f"{self.spec.name}, {self.spec.num_classes} classes, images of {size}: {counts}"

    def identity(self) -> dict[str, Any]:
        """What tells these examples from others as far as sizes, shapes and labels do; plain types."""
        splits = self._splits().items()
        return {
            "classes": self.spec.num_classes,
            "image_shape": list(self.spec.image_shape),
            **{name: [len(split), zlib.crc32(split.labels.tobytes())] for name, split in splits},
        }

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """Where the block fails over an image file that is no longer as it was loaded, names it.

        Raises:
          UserError: a file has gone or is damaged; what else the block raises passes.
        """
        try:
            yield
        except (tf.errors.InvalidArgumentError, tf.errors.NotFoundError):
            for split in self._splits().values():
                split.check()
            raise

    def _splits(self) -> dict[str, Split]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load(config: Config) -> Data:
    """Reads the data set that `config.dataset` names, preparing it first where TFDS must.

    Which examples are held out, for validation and, where the source has no test split, for
    testing, depends on their number only: it is the same for every seed.

    Raises:
      UserError: it cannot be found, downloaded or read, or is not an image classification.
      UsageError: `--image_size` together with a data set whose images have a size, or a cutout as large
        as an image.
    """
    from_folder = config.dataset.startswith(FOLDER)
    if config.image_size and not from_folder:
        raise UsageError(f"--image_size={config.image_size}: must be 0 unless --dataset=folder:/path")
    if from_folder:
        splits, names = image_folder.load(config)
    elif config.dataset == "digits":
        splits, names = _digits()
    else:
        splits, names = tfds_source.load(config)
    _check_labels(config.dataset, splits, len(names))
    if "test" not in splits:
        splits["test"] = splits.pop("validation")
    if "validation" not in splits:
        train = splits["train"]
        held = max(1, round(config.validation_fraction * len(train)))
        named = f"--dataset={config.dataset} --validation_fraction={config.validation_fraction:g}"
        splits["train"], splits["validation"] = hold_out(named, train, held)
    if from_folder:
        splits = image_folder.decode(splits, config.cache_gib)
    mean, std = _statistics(splits["train"].chunks())
    shape = splits["train"].image_shape
    _check_cutouts(config, min(shape[:2]))
    augment = _augment(config.dataset) if config.augment == "auto" else config.augment
    spec = DataSpec(config.dataset, shape, len(names), augment, mean, std)
    return Data(spec, **splits, class_names=names)


def _check_cutouts(config: Config, side: int) -> None:
    for flag in ("ann_cutout", "snn_cutout"):
        if getattr(config, flag) >= side:
            raise UsageError(
                f"--{flag}={getattr(config, flag)}: must be less than the images' shorter side, {side}"
            )


def _check_labels(name: str, splits: dict[str, Split], num_classes: int) -> None:
    if num_classes < 2:
        raise UserError(f"--dataset={name}: has {num_classes} class; at least 2 are needed")
    for split, examples in splits.items():
        wrong = examples.labels[(examples.labels < 0) | (examples.labels >= num_classes)]
        if len(wrong):
            raise UserError(
                f"--dataset={name}: split {split} has label {wrong[0]}; must be 0 to {num_classes - 1}"
            )


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


def _digits() -> tuple[dict[str, Split], list[str]]:
    """Scikit-learn's 1,797 digits of 8x8 pixels, their 17 grey levels spread over 0 to 255."""
    source = load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = Split(images, source.target.astype(np.int32))
    train, test = hold_out("--dataset=digits", everything, _DIGITS_TEST)
    return {"train": train, "test": test}, [str(digit) for digit in source.target_names]
