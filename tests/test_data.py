"""Data sets and batches: what is in them, in which order, and what is said when they are not there."""

import dataclasses
import functools
import io
import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import ExifTags, Image
from sklearn.datasets import load_digits

from snn_tf import data, tfds_source, tiny_imagenet
from snn_tf.config import Config
from snn_tf.errors import UserError
from snn_tf.splits import ImageFiles

ROOT = Path(__file__).resolve().parents[1]
PREPARED = Path(
    os.environ.get("SNN_TF_DATA_DIR", ROOT.parent / "shared" / "data" / "tensorflow_datasets")
)
NOWHERE = "http://127.0.0.1:9/archive.zip"


def refusal(**settings) -> str:
    """The single line with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        data.load(Config(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def numbered(count: int, size: int = 8, channels: int = 1) -> data.Split:
    """Images of noise, each labelled by its position."""
    noise = np.random.RandomState(1).randint(1, 256, (count, size, size, channels))
    return data.Split(noise.astype(np.uint8), np.arange(count, dtype=np.int32))


def spec_of(split: data.Split, augment: str) -> data.DataSpec:
    channels = split.image_shape[2]
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    return data.DataSpec("numbered", split.image_shape, len(split), augment, zeros, ones)


def drawn(split, augment="none", batch_size=4, seed=3, start=0, stop=10, cutout=0):
    spec = spec_of(split, augment)
    batches = data.training_batches(split, spec, batch_size, seed, start, stop, cutout)
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def everything(split: data.Split) -> tuple[np.ndarray, np.ndarray]:
    batches = [(images.numpy(), labels.numpy()) for images, labels in data.evaluation_batches(split, 7)]
    return tuple(map(np.concatenate, zip(*batches, strict=True)))


def contents(*splits: data.Split) -> Counter:
    """How often each labelled image occurs."""
    pairs = (zip(*everything(split), strict=True) for split in splits)
    return Counter((image.tobytes(), int(label)) for split in pairs for image, label in split)


# --- splits, statistics, augmentation


def test_digits_are_scikit_learns_parted_in_three():
    loaded = data.load(Config(dataset="digits"))
    source = load_digits()
    images = np.array([[[round(v * 255 / 16) for v in row] for row in image] for image in source.images])
    expected = Counter(
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(images, source.target, strict=True)
    )
    assert contents(loaded.train, loaded.validation, loaded.test) == expected
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (1078, 120, 599)
    assert loaded.spec.image_shape == (8, 8, 1)
    assert (loaded.spec.num_classes, loaded.spec.augment) == (10, "none")
    assert loaded.class_names == list("0123456789")
    assert loaded.train.labels.dtype == np.int32 and loaded.train.images.dtype == np.uint8


def test_held_out_examples_never_change():
    """Else accuracies of one version could not be compared with those of another."""
    loaded = data.load(Config(dataset="digits"))
    assert {name: facts for name, facts in loaded.identity().items() if name != "image_shape"} == {
        "classes": 10,
        "train": [1078, 2959492724],
        "validation": [120, 2663406966],
        "test": [599, 4067741450],
    }


def test_held_out_examples_are_the_same_for_every_seed():
    one, two = (data.load(Config(dataset="digits", seed=seed)) for seed in (0, 1))
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(one, split).images, getattr(two, split).images)


@pytest.mark.parametrize("fraction, held", [(0.25, 300), (0.5, 599), (1e-9, 1)])
def test_validation_fraction_is_rounded_and_at_least_one_example(fraction, held):
    loaded = data.load(Config(dataset="digits", validation_fraction=fraction))
    assert (len(loaded.validation), len(loaded.train)) == (held, 1198 - held)


def test_validation_that_leaves_nothing_to_train_on_is_refused():
    line = refusal(dataset="digits", validation_fraction=0.9999)
    flags = "--dataset=digits --validation_fraction=0.9999"
    assert line == f"{flags}: 1198 examples are too few to hold out 1198"


def test_statistics_are_those_of_the_training_split_alone():
    loaded = data.load(Config(dataset="digits"))
    values = loaded.train.images.astype(np.float64)
    np.testing.assert_allclose(loaded.spec.mean, [values.mean()], rtol=1e-12)
    np.testing.assert_allclose(loaded.spec.std, [values.std()], rtol=1e-12)


@pytest.mark.parametrize(
    "name, augment",
    [
        ("mnist", "crop"),
        ("emnist/letters", "crop"),
        ("svhn_cropped:3.0.0", "crop"),
        ("fashion_mnist", "crop_flip"),
        ("cifar100", "crop_flip"),
        ("folder:/mnist", "crop_flip"),
        ("digits", "none"),
    ],
)
def test_augment_auto_mirrors_no_characters(name, augment):
    assert data._augment(name) == augment


def test_augment_given_is_kept():
    assert data.load(Config(dataset="digits", augment="crop")).spec.augment == "crop"


def test_image_size_without_a_folder_is_refused():
    assert refusal(dataset="digits", image_size=16).startswith("--image_size=16: must be 0")


# --- batches


def test_evaluation_batches_hold_every_example_once_in_order():
    split = numbered(10)
    batches = list(data.evaluation_batches(split, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), split.labels)
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), split.images)


def test_steps_per_epoch_drops_the_remainder():
    assert data.steps_per_epoch(numbered(11), 4) == 2


def test_batch_larger_than_the_split_is_refused():
    with pytest.raises(UserError, match="--batch_size=12: must be at most 11"):
        data.steps_per_epoch(numbered(11), 12)


def test_training_batches_have_static_shape_and_type():
    split = numbered(10)
    images, labels = data.training_batches(split, spec_of(split, "crop_flip"), 4, 0, 0, 1).element_spec
    assert (images.shape, images.dtype) == ((4, 8, 8, 1), tf.uint8)
    assert (labels.shape, labels.dtype) == ((4,), tf.int32)


def test_training_epoch_holds_no_example_twice_and_images_keep_their_labels():
    split = numbered(11)
    batches = drawn(split, stop=10)
    assert len(batches) == 10
    for images, labels in batches:
        np.testing.assert_array_equal(images, split.images[labels])
    epochs = [np.concatenate([labels for _, labels in batches[k : k + 2]]) for k in range(0, 10, 2)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@functools.cache
def whole_run(augment: str, cutout: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return drawn(numbered(11), augment, cutout=cutout)


@pytest.mark.parametrize("augment, cutout", [("none", 0), ("none", 3), ("crop", 0), ("crop_flip", 3)])
@pytest.mark.parametrize("start, stop", [(1, 2), (2, 7), (5, 10), (4, 4)])
def test_training_batches_started_late_are_those_of_the_whole_run(augment, cutout, start, stop):
    part = drawn(numbered(11), augment, start=start, stop=stop, cutout=cutout)
    assert len(part) == stop - start
    for expected, got in zip(whole_run(augment, cutout)[start:stop], part, strict=True):
        np.testing.assert_array_equal(got[1], expected[1])
        np.testing.assert_array_equal(got[0], expected[0])


def test_training_order_depends_on_the_seed():
    one, two = (np.concatenate([labels for _, labels in drawn(numbered(40), seed=s)]) for s in (0, 1))
    assert not np.array_equal(one, two)


def windows(image: np.ndarray, mirrored: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of a padded image, and where it was cut."""
    height, width, _ = image.shape
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    found = {}
    for row, column in np.ndindex(9, 9):
        window = padded[row : row + height, column : column + width]
        found[window.tobytes()] = (row, column, False)
        if mirrored:
            found[window[:, ::-1].tobytes()] = (row, column, True)
    return found


def square(around: tuple[int, int], side: int, size: int) -> np.ndarray:
    """Where the part of a square that is inside a size x size image lies, bool [size, size]."""
    inside = np.zeros((size, size), bool)
    top, left = (centre - side // 2 for centre in around)
    inside[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = True
    return inside


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_blanks_a_square_of_each_image_centred_anywhere_in_it(side):
    split = numbered(32, size=6, channels=3)
    spec = dataclasses.replace(spec_of(split, "none"), mean=(0.4, 0.6, 0.0))  # noise has no 0 and no 1
    centres = {square(at, side, 6).tobytes(): at for at in np.ndindex(6, 6)}
    found = []
    for images, labels in data.training_batches(split, spec, 32, 3, 0, 32, side):
        blank = (images.numpy() == (0, 1, 0)).all(-1)
        np.testing.assert_array_equal(images[~blank], split.images[labels][~blank])
        found += [centres[image.tobytes()] for image in blank]
    assert set(found) == set(centres.values())


def test_cutout_leaves_crop_and_flip_as_they_are():
    split = numbered(16)
    for (with_cutout, _), (without, _) in zip(
        drawn(split, "crop_flip", cutout=3), drawn(split, "crop_flip"), strict=True
    ):
        changed = with_cutout != without
        assert 0 < changed.sum() <= 4 * 9 and not with_cutout[changed].any()


@pytest.mark.parametrize("flag", ["ann_cutout", "snn_cutout"])
def test_cutout_as_large_as_an_image_is_refused(flag):
    assert refusal(dataset="digits", **{flag: 8}).startswith(f"--{flag}=8: must be less than")
    assert data.load(Config(dataset="digits", **{flag: 7})).spec.image_shape == (8, 8, 1)


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_augmentation_cuts_and_mirrors_each_image_by_itself(augment):
    split = numbered(64, size=6, channels=3)
    known = [windows(image, augment == "crop_flip") for image in split.images]
    cuts = [
        known[label][image.tobytes()]
        for images, labels in drawn(split, augment, batch_size=32, stop=16)
        for image, label in zip(images, labels, strict=True)
    ]
    rows, columns, mirrored = zip(*cuts, strict=True)
    for offsets in (rows, columns):
        counts = np.bincount(offsets, minlength=9)
        assert len(counts) == 9 and counts.min() > 512 / 9 / 2
    assert np.mean(np.not_equal(rows, columns)) > 0.8 and len(set(cuts[:32])) > 16
    assert (0.4 < np.mean(mirrored) < 0.6) if augment == "crop_flip" else not any(mirrored)


# --- folder:/path


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def make_folder(root: Path, per_class: int, classes=("cat", "ant"), shape=(6, 5, 3)) -> Counter:
    """A folder per class; returns its contents."""
    expected = Counter()
    for name in classes:
        for number in range(per_class):
            image = noise(hash_of(name, number), *shape)
            write(root / name / f"{number}.png", image)
            expected[image.tobytes(), sorted(classes).index(name)] += 1
    return expected


def hash_of(name: str, number: int) -> int:
    return 1000 * sum(name.encode()) + number


def test_folder_of_classes_is_parted_in_three(tmp_path):
    expected = make_folder(tmp_path, 10)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    loaded = data.load(Config(dataset=f"folder:{tmp_path}", validation_fraction=0.25))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (12, 4, 4)
    assert contents(loaded.train, loaded.validation, loaded.test) == expected
    assert (loaded.spec.image_shape, loaded.spec.num_classes) == ((6, 5, 3), 2)
    assert loaded.class_names == ["ant", "cat"]


def test_folder_of_splits_is_taken_as_it_is(tmp_path):
    train = make_folder(tmp_path / "train", 3)
    make_folder(tmp_path / "validation", 2)
    make_folder(tmp_path / "test", 4, classes=("cat",))
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    assert contents(loaded.train) == train
    assert len(loaded.validation) == 4
    np.testing.assert_array_equal(loaded.test.labels, [1, 1, 1, 1])


def test_folder_without_validation_holds_out_from_training(tmp_path):
    train = make_folder(tmp_path / "train", 5)
    test = make_folder(tmp_path / "test", 1)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    assert (len(loaded.train), len(loaded.validation)) == (9, 1)
    assert contents(loaded.train, loaded.validation) == train and contents(loaded.test) == test


@pytest.mark.parametrize("image_size, shape", [(0, (6, 5, 3)), (4, (6, 5, 3)), (0, (6, 5))])
def test_folder_decoded_while_training_gives_the_same_as_one_in_memory(tmp_path, image_size, shape):
    make_folder(tmp_path, 10, shape=shape)
    settings = {"dataset": f"folder:{tmp_path}", "image_size": image_size}
    memory, disk = (data.load(Config(**settings, cache_gib=gib)) for gib in (1.0, 0.0))
    assert isinstance(memory.train.images, np.ndarray)
    assert isinstance(disk.train.images, ImageFiles)
    assert memory.spec == disk.spec
    for split in ("train", "validation", "test"):
        for expected, got in zip(
            everything(getattr(memory, split)), everything(getattr(disk, split)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    for expected, got in zip(
        drawn(memory.train, "crop_flip"), drawn(disk.train, "crop_flip"), strict=True
    ):
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])


def test_folder_statistics_are_per_channel_and_never_zero(tmp_path):
    for name in ("a", "b"):
        for number in range(4):
            image = noise(hash_of(name, number), 6, 5, 3)
            image[..., 2] = 7
            write(tmp_path / name / f"{number}.bmp", image)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    values = loaded.train.images.astype(np.float64)
    np.testing.assert_allclose(loaded.spec.mean, values.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(loaded.spec.std[:2], values.std((0, 1, 2))[:2], rtol=1e-12)
    assert loaded.spec.std[2] == 1.0


def test_folder_of_grey_images_has_one_channel(tmp_path):
    make_folder(tmp_path, 5, shape=(6, 5))
    assert data.load(Config(dataset=f"folder:{tmp_path}")).spec.image_shape == (6, 5, 1)


def test_folder_of_coloured_images_turns_grey_ones_to_three_channels(tmp_path):
    make_folder(tmp_path / "train", 2)
    grey = noise(0, 6, 5)
    write(tmp_path / "test" / "cat" / "grey.png", grey)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    np.testing.assert_array_equal(loaded.test.images[0], np.stack([grey] * 3, axis=-1))


def test_folder_whose_first_image_is_grey_keeps_the_colours_of_others(tmp_path):
    coloured = noise(1, 6, 5, 3)
    for name in ("ant", "cat"):
        write(tmp_path / "train" / name / "0.png", noise(0, 6, 5))
        write(tmp_path / "train" / name / "1.png", noise(0, 6, 5))
        write(tmp_path / "test" / name / "0.png", coloured)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    np.testing.assert_array_equal(loaded.test.images, [coloured, coloured])


@pytest.mark.parametrize("suffix", ["bmp", "gif"])
def test_folder_of_grey_images_that_tensorflow_gives_three_channels_is_read(tmp_path, suffix):
    grey = noise(0, 6, 5)
    for name in ("ant", "cat"):
        for number in range(3):
            write(tmp_path / name / f"{number}.{suffix}", grey)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    np.testing.assert_array_equal(loaded.train.images[0], np.stack([grey] * 3, axis=-1))


def test_folder_says_what_it_does_not_read(tmp_path, capsys):
    make_folder(tmp_path, 3)
    data.load(Config(dataset=f"folder:{tmp_path}"))
    assert capsys.readouterr().out == ""
    (tmp_path / "cat" / "deeper").mkdir()
    for path in ("cat/a.webp", "ant/b.WEBP", "labels.csv", "cat/.hidden", "ant/LICENSE"):
        (tmp_path / path).write_bytes(b"")
    data.load(Config(dataset=f"folder:{tmp_path}"))
    assert capsys.readouterr().out == (
        f"data: warning: {tmp_path}: not read are 5 entries (.webp 2, no suffix 1, folders 1, .csv 1)\n"
    )


def test_folder_of_photos_whose_rotation_stands_beside_the_pixels_is_warned_of(tmp_path, capsys):
    make_folder(tmp_path, 3)
    for number, orientation in enumerate((1, 3, 6)):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = tmp_path / "cat" / f"photo{number}.jpg"
        Image.fromarray(noise(number, 6, 5, 3)).save(path, exif=exif)
    data.load(Config(dataset=f"folder:{tmp_path}"))
    assert "data: warning: 2 of 9 images have a rotation in their EXIF data" in capsys.readouterr().out


def test_data_are_described_in_a_line(tmp_path):
    make_folder(tmp_path, 10)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}", validation_fraction=0.25))
    counts = "12 train, 4 validation, 4 test"
    assert loaded.description() == f"folder:{tmp_path}, 2 classes, images of 6x5x3: {counts}"


def test_folder_resizes_with_the_triangle_filter(tmp_path):
    make_folder(tmp_path / "train", 2)
    image = noise(0, 40, 30, 3)
    write(tmp_path / "test" / "cat" / "large.png", image)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}", image_size=12))
    expected = np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR), int)
    assert np.abs(loaded.test.images[0].astype(int) - expected).max() <= 1
    assert loaded.spec.image_shape == (12, 12, 3)


@pytest.mark.parametrize("gib", [1.0, 0.0])
@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_with_a_file_of_another_size_names_it(tmp_path, split, gib):
    for part in ("train", "test"):
        make_folder(tmp_path / part, 4)
    write(tmp_path / split / "cat" / "odd.png", noise(0, 6, 6, 3))
    line = refusal(dataset=f"folder:{tmp_path}", cache_gib=gib)
    assert "odd.png: is 6x6 pixels" in line and "6x5" in line and "--image_size" in line


@pytest.mark.parametrize("gib", [1.0, 0.0])
@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_with_an_unreadable_file_names_it(tmp_path, split, gib):
    for part in ("train", "test"):
        make_folder(tmp_path / part, 4)
    (tmp_path / split / "ant" / "broken.jpg").write_bytes(b"no image")
    assert "ant/broken.jpg: cannot be read as an image" in refusal(
        dataset=f"folder:{tmp_path}", cache_gib=gib
    )


def test_failure_that_no_file_explains_passes(tmp_path):
    make_folder(tmp_path, 10)
    loaded = data.load(Config(dataset=f"folder:{tmp_path}", cache_gib=0.0))
    with pytest.raises(tf.errors.InvalidArgumentError, match="of another cause"), loaded.readable():
        raise tf.errors.InvalidArgumentError(None, None, "of another cause")


def test_folder_whose_test_split_has_a_class_of_its_own_is_refused(tmp_path):
    make_folder(tmp_path / "train", 2)
    make_folder(tmp_path / "test", 2, classes=("bee", "cat"))
    assert f"{tmp_path / 'test' / 'bee'}: " in refusal(dataset=f"folder:{tmp_path}")


def test_folder_of_a_split_by_another_name_is_refused(tmp_path):
    for part in ("train", "val"):
        make_folder(tmp_path / part, 2)
    assert "in a folder of splits, train and test must be there" in refusal(dataset=f"folder:{tmp_path}")
    make_folder(tmp_path / "test", 2)
    line = refusal(dataset=f"folder:{tmp_path}")
    assert line == f"{tmp_path / 'val'}: is no split; allowed are train, validation, test"


def test_folder_of_nobody_is_refused():
    line = refusal(dataset="folder:~nobody-of-this-name/images")
    assert line == "--dataset=folder:~nobody-of-this-name/images: there is no such folder"


@pytest.mark.parametrize("classes, words", [((), "found 0"), (("cat",), "found 1")])
def test_folder_of_fewer_than_two_classes_is_refused(tmp_path, classes, words):
    make_folder(tmp_path, 3, classes=classes)
    line = refusal(dataset=f"folder:{tmp_path}")
    assert line.startswith(str(tmp_path)) and words in line


def test_folder_with_an_empty_class_names_it(tmp_path):
    make_folder(tmp_path, 3)
    (tmp_path / "dog").mkdir()
    assert f"{tmp_path / 'dog'}: holds no images" in refusal(dataset=f"folder:{tmp_path}")


def test_folder_that_is_not_there_is_refused(tmp_path):
    assert refusal(dataset=f"folder:{tmp_path}/none") == (
        f"--dataset=folder:{tmp_path}/none: there is no such folder"
    )
    assert refusal(dataset="folder:").startswith("--dataset=folder:")


def grey16(path: Path) -> None:
    Image.fromarray(np.full((6, 5), 4096, np.uint16)).save(path)


def with_alpha(alpha: int):
    def make(path: Path) -> None:
        image = np.concatenate([noise(0, 6, 5, 3), np.full((6, 5, 1), 255, np.uint8)], axis=2)
        image[2, 3, 3] = alpha
        Image.fromarray(image).save(path)

    return make


def grey_with_alpha(path: Path) -> None:
    Image.fromarray(np.stack([noise(0, 6, 5), noise(1, 6, 5)], axis=2)).save(path)


def transparent_palette(path: Path) -> None:
    Image.fromarray(noise(0, 6, 5, 3)).quantize(8).save(path, transparency=3)


def truncated_jpeg(path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(noise(0, 6, 5, 3)).save(stream, "jpeg")
    path.write_bytes(stream.getvalue()[:-40])


def giant(path: Path) -> None:
    """A PNG of 130 bytes that says it has 3.6 thousand million pixels."""
    stream = io.BytesIO()
    Image.fromarray(noise(0, 6, 5, 3)).save(stream, "png")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    content = bytearray(stream.getvalue())
    content[12 : 12 + len(header)] = header
    content[29:33] = zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(content)


def palette_bmp(path: Path) -> None:
    Image.fromarray(noise(0, 6, 5, 3)).quantize(8).save(path, "bmp")


@pytest.mark.parametrize("gib", [1.0, 0.0])
@pytest.mark.parametrize(
    "make, said",
    [
        (grey16, "has 16 bits a channel; images must have 8"),
        (with_alpha(254), "is transparent in places; images must be opaque"),
        (grey_with_alpha, "is transparent in places; images must be opaque"),
        (transparent_palette, "is transparent in places; images must be opaque"),
        (palette_bmp, "is a BMP with a palette; BMPs must be grey or of 24 bits"),
        (truncated_jpeg, "cannot be read as an image"),
        (giant, "cannot be read as an image"),
        (lambda path: path.write_bytes(b""), "cannot be read as an image"),
        (lambda path: path.mkdir(), "is not a file, or leads to none"),
        (lambda path: os.mkfifo(path), "is not a file, or leads to none"),
        (lambda path: path.symlink_to("nowhere"), "is not a file, or leads to none"),
    ],
    ids=[
        "16 bits",
        "alpha",
        "grey alpha",
        "palette",
        "bmp",
        "cut",
        "giant",
        "empty",
        "folder",
        "pipe",
        "link",
    ],
)
def test_folder_with_an_image_that_is_none_or_would_lose_something_names_it(tmp_path, make, said, gib):
    make_folder(tmp_path, 4)
    make(tmp_path / "cat" / "odd.png")
    line = refusal(dataset=f"folder:{tmp_path}", cache_gib=gib)
    assert line.startswith(f"{tmp_path}/cat/odd.png: {said}")


def test_folder_with_an_alpha_channel_that_is_opaque_is_read(tmp_path):
    make_folder(tmp_path / "train", 2)
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with_alpha(255)(tmp_path / "test" / "cat" / "opaque.png")
    loaded = data.load(Config(dataset=f"folder:{tmp_path}"))
    np.testing.assert_array_equal(loaded.test.images[0], noise(0, 6, 5, 3))


@pytest.mark.parametrize("name", [b"c\xff/0.png", b"cat/\xfe.png"])
def test_folder_with_a_name_not_in_utf8_names_it(tmp_path, name):
    make_folder(tmp_path, 2)
    path = os.fsencode(tmp_path) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"x")
    assert "a name not in UTF-8" in refusal(dataset=f"folder:{tmp_path}")


@pytest.mark.parametrize("image_size, size", [(0, 1), (2, 2)])
def test_folder_of_images_of_one_pixel_is_read(tmp_path, image_size, size):
    make_folder(tmp_path, 4, shape=(1, 1, 3))
    loaded = data.load(Config(dataset=f"folder:{tmp_path}", image_size=image_size))
    assert loaded.spec.image_shape == (size, size, 3)


# --- data sets of TFDS


class SnnToy(tfds.core.GeneratorBasedBuilder):
    """Four-by-four images; what is in it is set by each test."""

    VERSION = tfds.core.Version("1.0.0")
    features: ClassVar[dict] = {}
    examples: ClassVar[dict[str, list[dict]]] = {}
    url = ""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(self.features),
            supervised_keys=tuple(self.features),
        )

    def _split_generators(self, dl_manager):
        if self.url:
            dl_manager.download(self.url)
        return {split: self._generate_examples(found) for split, found in self.examples.items()}

    def _generate_examples(self, found):
        return enumerate(found)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Sets up the toy data set with labels per split; returns settings that load it."""

    def set_up(labels: dict[str, list[int]], image=None, label=None, **attributes) -> dict[str, str]:
        features = {
            "image": image or tfds.features.Image(shape=(4, 4, 3)),
            "label": label or tfds.features.ClassLabel(num_classes=3),
        }
        examples = {
            split: [{"image": noise(k, 4, 4, 3), "label": label} for k, label in enumerate(some)]
            for split, some in labels.items()
        }
        for name, value in {"features": features, "examples": examples, **attributes}.items():
            monkeypatch.setattr(SnnToy, name, value)
        return {"dataset": "snn_toy", "data_dir": str(tmp_path)}

    return set_up


def test_tfds_data_set_is_prepared_and_read(toy, capfd):
    labels = {"train": [0, 1, 2, 1, 0, 2, 2, 1, 0, 0], "test": [2, 1, 0]}
    loaded = data.load(Config(**toy(labels)))
    expected = Counter((noise(k, 4, 4, 3).tobytes(), label) for k, label in enumerate(labels["train"]))
    assert contents(loaded.train, loaded.validation) == expected
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (9, 1, 3)
    assert (loaded.spec.image_shape, loaded.class_names) == ((4, 4, 3), ["0", "1", "2"])
    printed = capfd.readouterr()
    assert not printed.out
    assert len([line for line in printed.err.splitlines() if "snn_toy" in line]) == 1


def test_tfds_data_set_prepared_by_an_older_version_is_found(toy):
    settings = toy({"train": [0, 1, 2], "test": [2]})
    data.load(Config(**settings))
    newer = tfds.core.Version("1.1.0")
    loaded = data.load(Config(**toy({"train": [0], "test": [0]}, VERSION=newer)))
    assert sorted([*loaded.train.labels, *loaded.validation.labels]) == [0, 1, 2]


def test_tfds_validation_split_is_kept_beside_a_test_split(toy):
    loaded = data.load(Config(**toy({"train": [0, 1, 2], "validation": [1, 1], "test": [2]})))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (3, 2, 1)


@pytest.mark.parametrize("test", [{}, {"test": [-1, -1]}])
def test_tfds_validation_split_is_the_test_split_where_none_is_labelled(toy, test):
    loaded = data.load(Config(**toy({"train": [0, 1, 2], "validation": [1, 0, 1, 0]} | test)))
    assert (len(loaded.train), len(loaded.validation)) == (2, 1)
    assert sorted(loaded.test.labels) == [0, 0, 1, 1]


@pytest.mark.parametrize("labels", [{"test": [0, 1]}, {"train": [0, 1]}, {"train": [0], "test": [-1]}])
def test_tfds_data_set_without_the_splits_is_refused(toy, labels):
    assert "needs labelled splits train and test" in refusal(**toy(labels))


def test_tfds_label_out_of_range_is_refused(toy):
    assert "split train has label -1" in refusal(**toy({"train": [0, -1], "test": [0]}))


def test_tfds_data_set_of_one_class_is_refused(toy):
    single = tfds.features.ClassLabel(num_classes=1)
    assert "has 1 class" in refusal(**toy({"train": [0, 0], "test": [0]}, label=single))


@pytest.mark.parametrize(
    "feature, words",
    [
        ({"label": tfds.features.Text()}, "is not an image-classification data set"),
        ({"image": tfds.features.Image(shape=(None, None, 3))}, "of one size, not uint8 of shape"),
        ({"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)}, "not uint16"),
    ],
)
def test_tfds_data_set_of_another_kind_is_refused_before_it_is_prepared(toy, tmp_path, feature, words):
    line = refusal(**toy({"train": [0]}, **feature))
    assert line.startswith("--dataset=snn_toy: ") and words in line
    assert not list(tmp_path.rglob("*.tfrecord*"))


def test_tfds_download_that_fails_says_where_it_looked_and_what_to_do(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_DOWNLOAD_RETRIES", 1)
    line = refusal(**toy({"train": [0]}, url=NOWHERE))
    assert line.startswith(f"--dataset=snn_toy: not prepared in {tmp_path} and could not be downloaded")
    assert "127.0.0.1" in line and "--data_dir=FOLDER" in line


@pytest.mark.parametrize("name", ["snn_no_such_set", "No such name!", "snn_toy/no_such_config"])
def test_tfds_name_that_is_unknown_is_refused(name, tmp_path):
    assert refusal(dataset=name, data_dir=str(tmp_path)).startswith(f"--dataset={name}: not prepared in")


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("CIFAR10", "give a name that TFDS knows, such as cifar10, "),
        ("tiny-imagenet", "give a name that TFDS knows, such as tiny_imagenet, "),
        ("./nowhere", "give a name that TFDS knows, or --dataset=folder:/path"),
        ("{folder}", "if it is a folder of images, give --dataset=folder:{folder}"),
    ],
)
def test_tfds_name_that_is_unknown_gets_near_ones_or_a_folders_spelling(name, remedy, tmp_path):
    name, remedy = (text.format(folder=tmp_path) for text in (name, remedy))
    assert f"; {remedy}" in refusal(dataset=name, data_dir=str(tmp_path))


def test_tfds_folder_that_cannot_be_written_is_refused(toy, tmp_path):
    (tmp_path / "file").touch()
    settings = toy({"train": [0, 1], "test": [0]}) | {"data_dir": str(tmp_path / "file")}
    assert f"not prepared in {tmp_path / 'file'}" in refusal(**settings)


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_tfds_records_that_are_corrupt_are_refused(toy, tmp_path, harm):
    settings = toy({"train": [0, 1, 2], "test": [2]})
    data.load(Config(**settings))
    (records,) = tmp_path.rglob("*-test.tfrecord*")
    if harm == "cut":
        records.write_bytes(records.read_bytes()[:-9])
    else:
        records.unlink()
    assert f"--dataset=snn_toy: cannot be read from {records.parent} (" in refusal(**settings)


# --- Tiny-ImageNet

WNIDS = ("n03", "n01", "n02")
TRAIN, VAL = "tiny-imagenet-200/train", "tiny-imagenet-200/val"


def jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg")
    return stream.getvalue()


def tiny_members(wnids=WNIDS) -> dict[str, bytes]:
    """An archive in the official layout, two training images a class and one validation image."""
    members = {"tiny-imagenet-200/wnids.txt": "\n".join(wnids).encode()}
    boxes = []
    for label, wnid in enumerate(wnids):
        grey, coloured, held = noise(label, 64, 64), noise(label, 64, 64, 3), noise(9 + label, 64, 64, 3)
        members[f"{TRAIN}/{wnid}/images/{wnid}_0.JPEG"] = jpeg(grey)
        members[f"{TRAIN}/{wnid}/images/{wnid}_1.JPEG"] = jpeg(coloured)
        members[f"{TRAIN}/{wnid}/{wnid}_boxes.txt"] = b""
        members[f"{VAL}/images/val_{label}.JPEG"] = jpeg(held)
        boxes.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    members[f"{VAL}/val_annotations.txt"] = "".join(boxes).encode()
    members["tiny-imagenet-200/test/images/test_0.JPEG"] = jpeg(noise(0, 64, 64, 3))
    return members


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tiny_settings(tmp_path: Path) -> dict[str, str]:
    return {
        "dataset": "tiny_imagenet",
        "data_dir": str(tmp_path / "prepared"),
        "manual_dir": str(tmp_path / "manual"),
    }


@pytest.fixture
def tiny(tmp_path):
    """Zips members into the manual folder; returns settings that load them."""

    def set_up(members: dict[str, bytes]) -> dict[str, str]:
        zipped(tmp_path / "manual" / "tiny-imagenet-200.zip", members)
        return tiny_settings(tmp_path)

    return set_up


def test_tiny_imagenet_is_read_from_its_archive(tiny):
    members = tiny_members()
    loaded = data.load(Config(**tiny(members)))

    def decoded(*labelled: tuple[str, int]) -> Counter:
        images = ((tf.io.decode_jpeg(members[name], 3).numpy(), label) for name, label in labelled)
        return Counter((image.tobytes(), label) for image, label in images)

    expected = decoded(
        *((f"{TRAIN}/{w}/images/{w}_{k}.JPEG", y) for y, w in enumerate(WNIDS) for k in range(2))
    )
    assert contents(loaded.train, loaded.validation) == expected
    assert contents(loaded.test) == decoded(*((f"{VAL}/images/val_{y}.JPEG", y) for y in range(3)))
    assert (loaded.spec.image_shape, loaded.spec.num_classes) == ((64, 64, 3), 3)
    assert loaded.spec.augment == "crop_flip"


def test_tiny_imagenet_of_other_classes_is_prepared_beside(tiny):
    for wnids in (WNIDS, WNIDS[:2], WNIDS):
        loaded = data.load(Config(**tiny(tiny_members(wnids))))
        assert (loaded.class_names, len(loaded.test)) == (list(wnids), len(wnids))


def test_tiny_imagenet_of_other_images_is_prepared_beside(tiny):
    members = tiny_members()
    first = data.load(Config(**tiny(members)))
    name = f"{VAL}/images/val_0.JPEG"
    second = data.load(Config(**tiny(members | {name: jpeg(np.full((64, 64, 3), 9, np.uint8))})))
    differ = [(one != two).any() for one, two in zip(first.test.images, second.test.images, strict=True)]
    assert sum(differ) == 1


def test_tiny_imagenet_prefers_the_official_archive_to_samples(tiny, tmp_path):
    settings = tiny(tiny_members())
    zipped(tmp_path / "manual" / "tiny-imagenet-2.zip", tiny_members(WNIDS[:2]))
    assert data.load(Config(**settings)).spec.num_classes == 3


@pytest.mark.parametrize("names, held", [((), "none"), (("2", "3"), "imagenet-2.zip, tiny-imagenet-3")])
def test_tiny_imagenet_without_a_single_archive_is_refused(tmp_path, names, held):
    for name in names:
        zipped(tmp_path / "manual" / f"tiny-imagenet-{name}.zip", tiny_members(WNIDS[: int(name)]))
    line = refusal(**tiny_settings(tmp_path))
    assert line.startswith(f"--manual_dir={tmp_path / 'manual'}: must hold") and held in line


@pytest.mark.parametrize(
    "name, content",
    [
        (f"{VAL}/images/val_1.JPEG", None),
        (f"{VAL}/val_annotations.txt", None),
        ("tiny-imagenet-200/wnids.txt", None),
        (f"{VAL}/images/val_1.JPEG", b"no image"),
        (f"{TRAIN}/n01/images/n01_1.JPEG", jpeg(noise(0, 32, 64, 3))),
        (f"{TRAIN}/n77/images/n77_0.JPEG", jpeg(noise(0, 64, 64, 3))),
    ],
)
def test_tiny_imagenet_with_a_wrong_member_names_it(tiny, name, content):
    members = {key: value for key, value in tiny_members().items() if key != name}
    line = refusal(**tiny(members | ({name: content} if content else {})))
    assert "tiny-imagenet-200.zip: " in line and name in line


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            f"{VAL}/val_annotations.txt",
            b"val_0.JPEG\tn01\nval_1.JPEG\n",
            ", line 2: must be a file and its class",
        ),
        (f"{VAL}/val_annotations.txt", b"\xff\xfe", " must be text in UTF-8"),
        (f"{VAL}/val_annotations.txt", b"", " must list the validation images"),
        (f"{VAL}/val_annotations.txt", b"../../x\tn01\n", f"{VAL}/images/../../x is missing"),
        (f"{VAL}/val_annotations.txt", bytes(2**24 + 1), " is 16777217 bytes; must be at most 16777216"),
        ("tiny-imagenet-200/wnids.txt", b"\xff\xfe", " must be text in UTF-8"),
        ("tiny-imagenet-200/wnids.txt", b"\n", " must name each class once; it has 0 names"),
        (
            "tiny-imagenet-200/wnids.txt",
            b"n01 n02 n03 n01",
            " must name each class once; it has 4 names",
        ),
        (
            f"{TRAIN}/n01/images/n01_9.JPEG",
            bytes(2**20 + 1),
            " is 1048577 bytes; must be at most 1048576",
        ),
    ],
)
def test_tiny_imagenet_with_a_member_that_makes_no_sense_names_it(tiny, tmp_path, name, content, said):
    line = refusal(**tiny(tiny_members() | {name: content}))
    assert line.startswith(str(tmp_path / "manual" / "tiny-imagenet-200.zip: ")) and said in line


def test_tiny_imagenet_archive_that_would_write_outside_writes_nowhere(tmp_path):
    image = jpeg(noise(0, 64, 64, 3))
    outside = (
        "../../outside.txt",
        f"{tmp_path}/outside.txt",
        f"{TRAIN}/n01/images/../../../../outside.JPEG",
    )
    zipped(tmp_path / "manual" / "tiny-imagenet-200.zip", tiny_members() | dict.fromkeys(outside, image))
    loaded = data.load(Config(**tiny_settings(tmp_path)))
    assert len(loaded.train) + len(loaded.validation) == 6
    assert not list(tmp_path.rglob("*outside*"))
    assert not [path for folder in tmp_path.parents for path in folder.glob("outside*")]


def test_tiny_imagenet_with_a_class_without_images_names_it(tiny):
    members = {name: value for name, value in tiny_members().items() if "/n01/" not in name}
    assert f"{TRAIN}/n01/images" in refusal(**tiny(members))


def test_tiny_imagenet_with_a_damaged_member_names_it(tiny, tmp_path):
    members = tiny_members()
    settings = tiny(members)
    archive = tmp_path / "manual" / "tiny-imagenet-200.zip"
    name = f"{TRAIN}/n02/images/n02_1.JPEG"
    damaged = archive.read_bytes().replace(members[name][-80:-20], bytes(60))
    archive.write_bytes(damaged)
    assert f"{name} cannot be read" in refusal(**settings)


def test_tiny_imagenet_with_a_damaged_archive_names_it(tiny, tmp_path):
    settings = tiny(tiny_members())
    archive = tmp_path / "manual" / "tiny-imagenet-200.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    assert refusal(**settings).startswith(f"{archive}: cannot be read as a zip archive")


def test_tiny_imagenet_download_that_fails_asks_for_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_imagenet, "URL", NOWHERE)
    monkeypatch.setattr(tfds_source, "_DOWNLOAD_RETRIES", 1)
    line = refusal(dataset="tiny_imagenet", data_dir=str(tmp_path))
    assert line.startswith("--dataset=tiny_imagenet: not prepared in") and "--manual_dir=FOLDER" in line


# --- the real ones


@pytest.mark.slow
def test_cifar10_is_the_known_data_set():
    if not (PREPARED / "cifar10").is_dir():
        pytest.skip(f"needs CIFAR-10 prepared by TFDS in {PREPARED} (or SNN_TF_DATA_DIR)")
    loaded = data.load(Config(dataset="cifar10", data_dir=str(PREPARED)))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (45_000, 5_000, 10_000)
    labels = np.concatenate([loaded.train.labels, loaded.validation.labels])
    np.testing.assert_array_equal(np.bincount(labels), [5_000] * 10)
    np.testing.assert_array_equal(np.bincount(loaded.test.labels), [1_000] * 10)
    # The published statistics of all 50,000 training images.
    np.testing.assert_allclose(np.divide(loaded.spec.mean, 255), (0.4914, 0.4822, 0.4465), atol=1e-3)
    np.testing.assert_allclose(np.divide(loaded.spec.std, 255), (0.2470, 0.2435, 0.2616), atol=1e-3)


@pytest.mark.slow
def test_tiny_imagenet_sample_is_read_whole(tmp_path):
    if not (PREPARED.parent / "tiny-imagenet-10.zip").is_file():
        pytest.skip(f"needs tiny-imagenet-10.zip in {PREPARED.parent}")
    settings = {"manual_dir": str(PREPARED.parent), "data_dir": str(tmp_path)}
    loaded = data.load(Config(dataset="tiny_imagenet", **settings))
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (4_500, 500, 500)
    np.testing.assert_array_equal(np.bincount(loaded.test.labels), [50] * 10)
