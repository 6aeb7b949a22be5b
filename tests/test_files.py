"""Files that are whole or not there, at whichever moment a process ends, and manifests of them."""

import json
import os
import pathlib
import shutil

import pytest
import tensorflow as tf
from run_folders import Killed, contents, one_line

from snn_tf import files
from snn_tf.checkpoints import Checkpoints
from snn_tf.errors import UserError

# --- whole files or none


def test_replacing_shows_the_old_file_until_the_block_ends(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, 1)
    with files.replacing(path) as beside:
        beside.write_text("2")
        assert files.read_json(path) == 1
    assert files.read_json(path) == 2 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "raised, expected",
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "interrupted"],
)
def test_failing_write_leaves_the_old_file(tmp_path, raised, expected):
    path = tmp_path / "value.json"
    files.write_json(path, {"old": True})
    with pytest.raises(expected), files.replacing(path) as beside:
        beside.write_text('{"new": ')
        raise raised
    assert files.read_json(path) == {"old": True}


def test_disk_error_is_one_line_with_the_path(tmp_path):
    path = tmp_path / "value.json"
    for replacing in (files.replacing, files.replacing_folder):
        with pytest.raises(UserError) as caught, replacing(path, tf.errors.OpError) as beside:
            beside.touch()
            raise tf.errors.ResourceExhaustedError(None, None, "No space left\nmore")
        assert one_line(caught) == f"{path}: could not be written: No space left"
        assert not list(tmp_path.iterdir())


def test_json_that_is_not_finite_is_refused_before_it_is_written(tmp_path):
    files.write_json(tmp_path / "value.json", 1)
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "value.json", {"loss": float("nan")})
    assert files.read_json(tmp_path / "value.json") == 1


def test_replacing_folder_replaces_all_of_it_or_nothing(tmp_path):
    path = tmp_path / "saved_model"
    for name in ("first", "second"):
        with files.replacing_folder(path) as beside:
            beside.mkdir()
            (beside / name).write_text("")
    assert set(contents(path)) == {"second"}
    for _ in range(2):
        with (
            pytest.raises(UserError, match=r"^the check failed$"),
            files.replacing_folder(path) as beside,
        ):
            beside.mkdir()
            (beside / "third").write_text("")
            raise UserError("the check failed")
        assert set(contents(path)) == {"second"}


def test_failed_write_leaves_nothing_beside(tmp_path):
    with pytest.raises(UserError), files.replacing(tmp_path / "model") as beside:
        beside.write_text("half")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_what_is_half_written_and_nothing_else(tmp_path):
    (tmp_path / ".writing-model").write_text("half")
    (tmp_path / ".writing-folder" / "deep").mkdir(parents=True)
    (tmp_path / ".mine").write_text("")
    (tmp_path / "model").write_text("whole")
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mine", "model"}


# --- ended at every moment


def ends_at(monkeypatch, moment: int) -> None:
    """Ends the process before the `moment`-th call, from 0, of what changes the disk."""
    calls = iter(range(moment + 1))

    def ending(function):
        def wrapped(*args, **kwargs):
            if next(calls, None) == moment:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    for module, name in (
        (os, "fsync"),
        (os, "replace"),
        (shutil, "rmtree"),
        (pathlib.Path, "rename"),
        (pathlib.Path, "mkdir"),
        (pathlib.Path, "write_text"),
        (tf.train.Checkpoint, "write"),
    ):
        monkeypatch.setattr(module, name, ending(getattr(module, name)))


def test_checkpoints_survive_an_end_at_every_moment_of_a_save(tmp_path, monkeypatch):
    """Whatever the moment, the newest whole one is restored, and no half of another is left."""
    value = tf.Variable(0)
    moments = []
    for moment in range(100):
        folder = tmp_path / str(moment)
        checkpoints = Checkpoints(folder, "owner", 2, value=value)
        for step in (1, 2):
            value.assign(step)
            checkpoints.save(step)
        value.assign(3)
        with monkeypatch.context() as patch:
            ends_at(patch, moment)
            try:
                checkpoints.save(3)
                break
            except Killed:
                moments.append(moment)
        restored = Checkpoints(folder, "owner", 2, value=value).restore()
        assert restored in (2, 3) and int(value) == restored
        assert not list(folder.glob(".writing-*")) and not list(folder.glob("refused-*"))
        value.assign(3)
        checkpoints.save(3)
        assert checkpoints.restore() == 3
    assert len(moments) > 10


def test_folder_is_the_old_or_the_new_or_missing_at_every_moment(tmp_path, monkeypatch):
    found = set()
    for moment in range(100):
        path = tmp_path / str(moment) / "model"
        path.mkdir(parents=True)
        (path / "old").write_text("old")
        with monkeypatch.context() as patch:
            ends_at(patch, moment)
            try:
                with files.replacing_folder(path) as beside:
                    beside.mkdir()
                    (beside / "new").write_text("new")
                break
            except Killed:
                found.add(tuple(contents(path).items()))
    assert found <= {(("old", b"old"),), (("new", b"new"),), ()} and (("old", b"old"),) in found


# --- manifests


@pytest.fixture
def sealed(tmp_path) -> pathlib.Path:
    folder = tmp_path / "stage"
    (folder / "deep").mkdir(parents=True)
    (folder / "model").write_bytes(bytes(range(256)))
    (folder / "deep" / "part").write_text("text")
    (folder / ".config.flags.swp").write_text("an editor's")
    files.write_manifest(folder, "mine", {"record.json": "later"}, without="checkpoints")
    (folder / "record.json").write_text("later")
    return folder


def test_manifest_names_every_file_with_size_and_hash(sealed):
    manifest = json.loads((sealed / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model", "deep/part", "record.json"}
    # The hash is that of `printf text | sha256sum`.
    digest = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert manifest["files"]["deep/part"] == {"bytes": 4, "sha256": digest}
    files.check(sealed, "mine")


def test_files_that_a_manifest_does_not_name_are_free(sealed):
    (sealed / "notes.txt").write_text("mine")
    (sealed / ".config.flags.swp").unlink()
    files.check(sealed, "mine")


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("model", lambda b: b[:-1], "stage/model: has 255 bytes, must have 256"),
        ("model", lambda b: b[:7] + b"x" + b[8:], "stage/model: its content has changed"),
        ("deep/part", None, "stage/deep/part: is missing"),
        ("record.json", lambda b: b"", "stage/record.json: has 0 bytes, must have 5"),
        ("manifest.json", lambda b: b[: len(b) // 2], "manifest.json: could not be read"),
        ("manifest.json", lambda b: b"\xff" + b, "manifest.json: could not be read"),
        ("manifest.json", lambda b: b"[]", "manifest.json: is not a manifest"),
        ("manifest.json", lambda b: b"[" * 100_000, "manifest.json: could not be read"),
        ("manifest.json", lambda b: b.replace(b'"format": 1', b'"format": 2'), "newer version"),
        ("manifest.json", lambda b: b.replace(b'"format": 1', b'"format": 0'), "not as it was"),
        ("manifest.json", lambda b: b.replace(b"\n", b" "), "not as it was written"),
        ("manifest.json", lambda b: b.replace(b'"bytes": 4', b'"bytes": "4"'), "not as it was"),
        ("manifest.json", lambda b: b.replace(b"mine", b"your"), "belongs to another stage"),
        ("manifest.json", lambda b: b.replace(b"model", b"m" * 5000), "mmm: could not be read"),
    ],
)
def test_damage_is_named_in_one_line(sealed, name, change, said):
    path = sealed / name
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    with pytest.raises(files.Damaged) as caught:
        files.check(sealed, "mine")
    assert said in one_line(caught)
