"""The batches that are drawn from a split: shuffled and augmented for training, in order for evaluation.

What training step k sees is a function of (seed, k) alone, so a run that resumes at k goes on as if
it had never stopped.
"""

import tensorflow as tf

from snn_tf.errors import UserError
from snn_tf.splits import DataSpec, ImageFiles, Split

_PADDING = 4


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
    split: Split,
    spec: DataSpec,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    cutout: int = 0,
) -> tf.data.Dataset:
    """What training steps `start_step` to `stop_step - 1` see, one element a step.

    An epoch is a permutation of the split, keyed by (seed, epoch); no batch straddles two. Each
    image has its own crop, flip and cutout, keyed by (seed, step). Step k is thus the same wherever
    one starts.

    Args:
      split: the training split.
      spec: its spec, of which `augment` is used, and `mean` where something is cut out.
      batch_size: B.
      seed: key of order and augmentation, at least 0.
      start_step, stop_step: half-open range of steps, from 0.
      cutout: side of the square that is blanked in each image, in pixels; 0 for none. Its centre is
        anywhere in the image, so part of it may be outside (DeVries & Taylor 2017).

    Returns:
      A data set of images uint8 [B, H, W, C] and labels int32 [B].

    Raises:
      UserError: the split is smaller than a batch.
    """
    per_epoch = steps_per_epoch(split, batch_size)
    with tf.device("CPU"):
        order_key, crop_key, flip_key, cutout_key = tf.unstack(tf.random.split((seed, 0), 4))

    def indices_of(epoch: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(split)), tf.random.fold_in(order_key, epoch)
        )
        return tf.data.Dataset.from_tensor_slices(
            tf.reshape(order[: per_epoch * batch_size], (per_epoch, batch_size))
        )

    def augmented(step: tf.Tensor, examples: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        images, labels = examples
        if spec.augment != "none":
            flip = tf.random.fold_in(flip_key, step) if spec.augment == "crop_flip" else None
            images = _cropped(images, tf.random.fold_in(crop_key, step), flip)
        if cutout:
            images = _cut_out(images, tf.random.fold_in(cutout_key, step), cutout, spec.mean)
        return images, labels

    first, last = start_step // per_epoch, -(-stop_step // per_epoch)
    indices = (
        tf.data.Dataset.range(first, last).flat_map(indices_of).skip(start_step - first * per_epoch)
    )
    batches = _examples_at(indices.take(stop_step - start_step), split)
    if spec.augment != "none" or cutout:
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


def _cut_out(images: tf.Tensor, key: tf.Tensor, side: int, mean: tuple[float, ...]) -> tf.Tensor:
    """Each image with a square of its own, centred anywhere in it, in the mean colour."""
    batch, height, width, _ = images.shape
    centre = tf.random.stateless_uniform((batch, 1), key, 0, height * width, tf.int32)
    rows = tf.range(height) - centre // width + side // 2
    columns = tf.range(width) - centre % width + side // 2
    in_rows, in_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    inside = in_rows[:, :, tf.newaxis] & in_columns[:, tf.newaxis]
    return tf.where(inside[..., tf.newaxis], tf.cast(tf.round(mean), tf.uint8), images)
