"""Checkpoints: which are kept, which are refused, and which is restored."""

import json
import re
import shutil

import pytest
import tensorflow as tf

from snn_tf.checkpoints import Checkpoints
from snn_tf.errors import UserError


def saved(folder, steps=(1, 2, 10), keep=3, owner="mine") -> tuple[Checkpoints, tf.Variable]:
    """Checkpoints whose variable holds ten times the step."""
    value = tf.Variable(0)
    checkpoints = Checkpoints(folder, owner, keep, value=value)
    for step in steps:
        value.assign(10 * step)
        checkpoints.save(step)
    return checkpoints, value


def rewrite_manifest(folder, **changes) -> None:
    path = folder / "manifest.json"
    text = json.dumps(json.loads(path.read_text()) | changes, indent=1) + "\n"
    path.write_text(text)


def test_newest_is_restored_by_number(tmp_path):
    checkpoints, value = saved(tmp_path)
    value.assign(0)
    assert checkpoints.restore() == 10 and int(value) == 100


def test_nothing_is_restored_from_nothing(tmp_path):
    checkpoints, value = saved(tmp_path / "none", steps=())
    assert checkpoints.restore() == 0 and int(value) == 0 and checkpoints.newest is None


def test_oldest_beyond_those_kept_are_removed(tmp_path):
    saved(tmp_path, steps=(1, 5, 10, 100), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]


def test_step_is_written_once(tmp_path):
    checkpoints, value = saved(tmp_path)
    value.assign(7)
    checkpoints.save(10)
    assert checkpoints.restore() == 10 and int(value) == 100


def test_failed_save_leaves_those_before(tmp_path, monkeypatch):
    checkpoints, value = saved(tmp_path)

    def full(*args):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.train.Checkpoint, "write", full)
    with pytest.raises(UserError, match=r"step-11: could not be written: No space left on device$"):
        checkpoints.save(11)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-10", "step-2"]
    assert checkpoints.restore() == 10 and int(value) == 100


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": 2}, "format 2 is of a newer version; this one reads 1"),
        ({"owner": "other"}, "belongs to another stage or to other settings"),
    ],
    ids=["newer", "foreign"],
)
def test_newer_and_foreign_checkpoints_are_set_aside_and_the_one_before_used(
    tmp_path, capsys, changes, said
):
    checkpoints, value = saved(tmp_path)
    rewrite_manifest(tmp_path / "step-10", **changes)
    assert checkpoints.restore() == 2 and int(value) == 20
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("checkpoint not used, now refused-step-10: ") and said in first
    assert last == f"continues from {tmp_path}/step-2"
    value.assign(100)
    checkpoints.save(10)
    assert checkpoints.restore() == 10 and (tmp_path / "refused-step-10").is_dir()


def test_checkpoint_that_does_not_fit_is_an_error(tmp_path):
    saved(tmp_path)
    other = Checkpoints(tmp_path, "mine", 3, value=tf.Variable([0, 0]))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/step-10: checkpoint could not be read")):
        other.restore()


def test_no_good_one_left_is_an_error_that_says_what_to_do(tmp_path):
    checkpoints, _ = saved(tmp_path, steps=(1, 2))
    for step in (1, 2):
        (tmp_path / f"step-{step}" / "state.index").unlink()
    with pytest.raises(UserError, match=r"state.index: is missing; no good checkpoint is left; delete"):
        checkpoints.restore()
    again = (
        rf"refused-step-2: was set aside; no good checkpoint is left; delete {re.escape(str(tmp_path))} "
    )
    with pytest.raises(UserError, match=again):
        checkpoints.restore()


def test_other_folders_and_files_are_not_checkpoints(tmp_path):
    checkpoints, _ = saved(tmp_path, steps=(1,))
    (tmp_path / "step-99").write_text("")
    (tmp_path / "step-new").mkdir()
    shutil.copytree(tmp_path / "step-1", tmp_path / "copy-of-step-1")
    assert checkpoints.restore() == 1
