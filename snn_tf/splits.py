"""Labelled images and what is known of them, in memory or as files that are decoded when needed.

Images are uint8 [N, H, W, C] throughout, labels int32 [N].
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf

from snn_tf.errors import UserError, first_line

_CHUNK = 1024
# A PNG's first bytes: signature, length and name of its header, width, height, bits, kind of colour.
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_HEADER = 26
_PNG_WITH_ALPHA = (4, 6)


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
        """Like `decode`, for a file that is yet to be checked.

        Raises:
          UserError: it is unreadable, of another size, of 16 bits a channel or transparent in places.
        """
        with _naming(path), tf.device("CPU"):
            _check_png(path)
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

    def chunks(self) -> Iterator[np.ndarray]:
        """All images in order, uint8 [n, H, W, C] at a time; files are decoded by several threads.

        Raises:
          UserError: a file is unreadable or of another size.
        """
        parts = (self.images[start : start + _CHUNK] for start in range(0, len(self), _CHUNK))
        with ThreadPoolExecutor() as pool:
            for part in parts:
                if isinstance(part, ImageFiles):
                    part = np.stack(list(pool.map(part.read, part.paths)))
                yield part

    def check(self) -> None:
        """Reads every image, only to see that it can be. Raises `UserError` as `chunks` does."""
        collections.deque(self.chunks(), maxlen=0)

    def in_memory(self) -> "Split":
        """The same examples with their images in an array. Raises `UserError` as `chunks` does."""
        images = np.empty((len(self), *self.image_shape), np.uint8)
        for start, chunk in zip(range(0, len(self), _CHUNK), self.chunks(), strict=True):
            images[start : start + _CHUNK] = chunk
        return Split(images, self.labels)


def hold_out(named: str, split: Split, held: int) -> tuple[Split, Split]:
    """Parts `held` examples from `split`, chosen by a permutation that never changes.

    Args:
      named: flags and values that asked for it, with which the error begins.
      split: N examples.
      held: how many to part, less than N.

    Returns:
      The N - held examples left, and the held ones, each in the order of `split`.

    Raises:
      UserError: none would be left.
    """
    if held >= len(split):
        raise UserError(f"{named}: {len(split)} examples are too few to hold out {held}")
    # RandomState's stream is frozen across versions of NumPy; a Generator's is not.
    order = np.random.RandomState(0).permutation(len(split))
    return split.take(np.sort(order[held:])), split.take(np.sort(order[:held]))


def shape_of(path: Path) -> tuple[int, int, int]:
    """Height, width, channels of the image in one file. Raises `UserError` if it is unreadable."""
    with _naming(path):
        height, width, channels = _decode(str(path), channels=0).shape
    return height, width, channels


def _decode(path: str | tf.Tensor, channels: int) -> tf.Tensor:
    """The file's pixels; 0 channels: as many as it has. Of an animation, the first picture."""
    image = tf.io.decode_image(tf.io.read_file(path), channels, expand_animations=False)
    return tf.ensure_shape(image, (None, None, channels or None))


def _check_png(path: str) -> None:
    """Refuses what decoding to opaque uint8 would lose without a word."""
    content = tf.io.read_file(path)
    header = content.numpy()[:_PNG_HEADER]
    if not header.startswith(_PNG) or len(header) < _PNG_HEADER:
        return
    depth, colour = header[24], header[25]
    if depth == 16:
        raise UserError(f"{path}: has 16 bits a channel; images must have 8")
    if colour in _PNG_WITH_ALPHA or b"tRNS" in content.numpy():
        alpha = tf.io.decode_png(content, channels=4)[..., 3]
        if int(tf.reduce_min(alpha)) < 255:
            raise UserError(
                f"{path}: is transparent in places; images must be opaque, as mogrify -background white "
                "-alpha remove -alpha off makes them"
            )


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from error
