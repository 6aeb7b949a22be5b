"""Run folders: what is skipped, resumed, refused or moved aside; files that are whole or not there."""

import dataclasses
import datetime
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras
from command_line import parsed
from run_folders import contents, one_line

from snn_tf import config as configs
from snn_tf import copies, files, machine, provenance, pruning, runs
from snn_tf.config import Config
from snn_tf.errors import UsageError, UserError
from snn_tf.initialisation import initialise
from snn_tf.layers import ReadOut
from snn_tf.runs import StageFolder


def opened(run_dir, stage=configs.TRAIN_ANN, upstream=None, **settings):
    folder = StageFolder(run_dir, stage)
    folder.open(Config(**settings), [upstream] if upstream else [])
    return folder


def begun(run_dir, **settings):
    """A stage that was interrupted after its first checkpoint."""
    folder = opened(run_dir, **settings)
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    (folder.path / "checkpoints" / "step-1").write_bytes(b"state")
    return folder


def finished(run_dir, stage=configs.TRAIN_ANN, upstream=None, **settings):
    folder = opened(run_dir, stage, upstream, **settings)
    if not folder.done:
        folder.finish(Config(**settings), "abc-dirty", 1.5, {"accuracy": 0.5})
    return folder


# --- new, finished, resumed


def test_new_folder_is_not_done_and_holds_its_settings(tmp_path):
    folder = opened(tmp_path / "deep" / "run", width=0.5)
    assert set(contents(folder.path)) == {"stage.json", "config.flags"}
    identity = files.read_json(folder.path / "stage.json")
    assert identity["settings"] == Config(width=0.5).concerning("train_ann")
    assert (identity["stage"], identity["upstream"]) == ("train_ann", None)
    assert not folder.done
    with pytest.raises(UserError) as caught:
        folder.record()
    remedy = f"run --stage=train_ann of --run_dir={folder.run_dir} first"
    assert str(caught.value).endswith(f"stage train_ann has not finished; {remedy}")


def test_finished_folder_is_done_and_its_record_says_how_it_was_made(tmp_path):
    folder = opened(tmp_path, seed=7)
    folder.finish(Config(seed=7), "abc-dirty", 12.34567, {"accuracy": 0.75})
    record = folder.record()
    assert folder.done
    assert (record["stage"], record["accuracy"], record["seconds"]) == ("train_ann", 0.75, 12.346)
    assert record["fingerprint"] == folder.fingerprint()
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(Config(seed=7))))
    assert record["versions"]["tensorflow"] == tf.__version__
    assert record["versions"]["numpy"] == np.__version__ and "python" in record["versions"]
    made = datetime.datetime.fromisoformat(record["date"])
    assert abs(datetime.datetime.now(datetime.UTC) - made) < datetime.timedelta(minutes=5)
    assert record["commit"] == "abc-dirty" and record["device"]


@pytest.mark.parametrize("make", [begun, finished])
def test_same_settings_leave_everything_as_it_is(tmp_path, make):
    folder = make(tmp_path)
    (folder.path / "checkpoints").mkdir(exist_ok=True)
    (folder.path / "checkpoints" / "state").write_bytes(b"half way")
    before = contents(tmp_path)
    assert make(tmp_path, overwrite=True).done == (make is finished)
    assert contents(tmp_path) == before


def test_settings_that_do_not_concern_the_stage_are_free(tmp_path):
    """Execution, where the run lies, and what later stages do."""
    free = {
        "density": 0.5,
        "timesteps": 9,
        "log_every": 3,
        "cache_gib": 1.0,
        "checkpoint_every": "7",
    }
    folder = finished(tmp_path)
    assert opened(tmp_path, **free).done
    assert opened(tmp_path / "other", **free).fingerprint() == folder.fingerprint()


# --- changed settings


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"width": 0.25}, "(--width=0.25, was 1.0)"),
        ({"dataset": "digits"}, "(--dataset=digits, was cifar10)"),
        ({"seed": 3, "ann_epochs": 4}, "(--seed=3, was 0; --ann_epochs=4, was 100)"),
    ],
)
@pytest.mark.parametrize("make", [begun, finished])
def test_changed_settings_are_refused_and_nothing_is_touched(tmp_path, make, settings, said):
    make(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught:
        opened(tmp_path, **settings)
    assert said in one_line(caught) and "--overwrite" in str(caught.value)
    assert caught.value.exit_code == 2
    assert contents(tmp_path) == before


def test_stage_that_never_began_takes_new_settings(tmp_path):
    opened(tmp_path, width=0.25)
    folder = opened(tmp_path, width=0.5)
    assert files.read_json(folder.path / "stage.json")["settings"]["width"] == 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["train_ann"]


def test_finished_stage_without_its_settings_is_damaged(tmp_path):
    folder = finished(tmp_path)
    (folder.path / "stage.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"stage\.json: is missing; run --stage=train_ann again with"):
        opened(tmp_path, ann_epochs=1)
    assert contents(tmp_path) == before
    assert not opened(tmp_path, ann_epochs=1, overwrite=True).done
    assert contents(tmp_path / "train_ann.old-1").keys() == {
        "config.flags",
        "manifest.json",
        "record.json",
    }


def test_overwrite_moves_what_was_there_aside_under_the_next_number(tmp_path):
    for number, width in enumerate((1.0, 0.5, 0.25)):
        folder = finished(tmp_path, width=width, overwrite=number > 0)
        folder.tensorboard.mkdir(parents=True)
        (folder.tensorboard / "events").write_text(str(width))
        assert files.read_json(folder.path / "stage.json")["settings"]["width"] == width
    for aside, width in (("train_ann.old-1", 1.0), ("train_ann.old-2", 0.5)):
        assert files.read_json(tmp_path / aside / "record.json")["config"]["width"] == width
        assert (tmp_path / "tensorboard" / aside / "events").read_text() == str(width)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tensorboard",
        "train_ann",
        "train_ann.old-1",
        "train_ann.old-2",
    }


def test_overwritten_stage_starts_unfinished(tmp_path):
    finished(tmp_path)
    assert not opened(tmp_path, width=0.5, overwrite=True).done


def test_folder_that_cannot_be_moved_aside_is_an_error(tmp_path, monkeypatch):
    finished(tmp_path)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "rename", refused)
    with pytest.raises(UserError, match=r"train_ann: could not be moved aside: .*Permission denied"):
        opened(tmp_path, width=0.5, overwrite=True)


# --- upstream


def test_every_upstream_is_an_earlier_stage():
    order = {stage: index for index, stage in enumerate(configs.STAGES)}
    assert set(runs.UPSTREAM) == set(order)
    assert runs.UPSTREAM["train_ann"] is None
    for stage, upstream in runs.UPSTREAM.items():
        assert upstream is None or order[upstream] < order[stage]


def test_missing_upstream_is_named_and_nothing_is_made(tmp_path):
    unfinished = opened(tmp_path)
    with pytest.raises(UserError, match="run --stage=train_ann of --run_dir=") as caught:
        opened(tmp_path, "compress", unfinished)
    assert one_line(caught) and caught.value.exit_code == 1
    assert not (tmp_path / "compress").exists()


def test_stage_whose_upstream_changed_is_refused(tmp_path):
    finished(tmp_path, "compress", finished(tmp_path))
    # ann_weight_decay concerns both; ann_epochs the first alone.
    upstream = finished(tmp_path, ann_epochs=3, overwrite=True)
    with pytest.raises(UsageError, match=r"\(the stage before it was run again with other settings\)"):
        opened(tmp_path, "compress", upstream, ann_epochs=3)
    moved = opened(tmp_path, "compress", upstream, ann_epochs=3, overwrite=True)
    assert not moved.done and (tmp_path / "compress.old-1" / "record.json").exists()


def test_stage_is_refused_on_top_of_other_settings_in_the_same_run(tmp_path):
    upstream = finished(tmp_path, ann_epochs=3)
    with pytest.raises(UsageError, match=r"train_ann was made .*--ann_epochs=4, was 3"):
        opened(tmp_path, "compress", upstream, ann_epochs=4)
    assert not (tmp_path / "compress").exists()


def test_stage_that_is_older_than_a_setting_was_made_with_its_default(tmp_path):
    path = begun(tmp_path).path / "stage.json"
    identity = files.read_json(path)
    del identity["settings"]["label_smoothing"]
    path.write_text(json.dumps(identity))
    assert (opened(tmp_path).path / "checkpoints" / "step-1").exists()
    with pytest.raises(UsageError, match=r"\(--label_smoothing=0\.1, was 0\.0\)"):
        opened(tmp_path, label_smoothing=0.1)


def test_meta_model_of_another_run_may_have_other_settings(tmp_path):
    upstream = finished(tmp_path / "teacher", ann_epochs=3)
    assert not opened(tmp_path / "student", "compress", upstream, ann_epochs=4).done


def test_upstream_run_again_with_the_same_settings_changes_nothing(tmp_path):
    finished(tmp_path, "compress", finished(tmp_path))
    again = finished(tmp_path / "copy")
    assert opened(tmp_path, "compress", again).done


def test_fingerprint_follows_a_setting_of_the_first_stage_to_the_last(tmp_path):
    def last(name, **settings):
        folder = None
        for stage in ("train_ann", "compress", "convert", "train_snn", "export"):
            folder = finished(tmp_path / name, stage, folder, **settings)
        return folder.fingerprint()

    assert last("one") == last("two") != last("three", ann_epochs=3)


def test_fingerprints_of_two_stages_with_the_same_settings_differ(tmp_path):
    same = {"evaluate", "export"}
    upstream = finished(tmp_path, "train_snn", finished(tmp_path, "convert"))
    assert len({finished(tmp_path, stage, upstream).fingerprint() for stage in same}) == 2


# --- folders that cannot be written


def test_run_dir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="could not be written") as caught:
        opened(tmp_path / "run")
    assert str(tmp_path / "run") in one_line(caught)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="could not be written") as caught:
        opened(tmp_path / "run")
    assert one_line(caught)


# --- files that are broken


@pytest.mark.parametrize("broken", [b"", b"{", b"\xff\xfe\x00", b'{"stage": "train_ann"'])
@pytest.mark.parametrize("name", ["record.json", "stage.json"])
def test_broken_json_is_one_line_with_its_path(tmp_path, name, broken):
    folder = finished(tmp_path)
    (folder.path / name).write_bytes(broken)
    with pytest.raises(UserError, match=r"could not be read|has \d+ bytes, must have \d+") as caught:
        opened(tmp_path, "compress", folder)
    assert str(folder.path / name) in one_line(caught)


def network():
    image = keras.Input((4, 4, 1), dtype="uint8", name="image")
    x = keras.layers.Normalization(mean=[3.0], variance=[4.0])(image)
    x = keras.layers.Conv2D(2, 3, padding="same", use_bias=False, name="conv")(x)
    x = keras.layers.Flatten()(keras.layers.ReLU(name="neuron")(x))
    ann = keras.Model(image, ReadOut()(keras.layers.Dense(3, use_bias=False, name="logits")(x)))
    initialise(ann, 0)
    snn = copies.spiking(ann, Config(timesteps=3, bias_current=True, surrogate="arctan"))
    snn.get_layer("neuron").cell.v_th.assign(0.25)
    snn.get_layer("neuron").cell.leak.assign(0.75)
    snn.get_layer("neuron").bias_current.assign([0.5, -0.5])
    rng = np.random.default_rng(1)
    return pruning.wrap(snn, {name: rng.random(m.shape) < 0.5 for name, m in pruning.masks(snn).items()})


def test_model_comes_back_with_weights_masks_and_neurons(tmp_path):
    folder, model = opened(tmp_path), network()
    folder.save_model(model)
    loaded = folder.load_model()
    assert set(contents(folder.path)) == {"stage.json", "config.flags", "model.keras"}
    for one, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    for name, mask in pruning.masks(model).items():
        np.testing.assert_array_equal(pruning.masks(loaded)[name], mask)
        assert 0 < mask.mean() < 1
    assert loaded.get_layer("neuron").get_config() == model.get_layer("neuron").get_config()
    images = np.random.default_rng(2).integers(0, 9, (5, 4, 4, 1)).astype(np.uint8)
    logits = model(images).numpy()
    np.testing.assert_array_equal(loaded(images), logits)
    assert logits.any()


def test_model_that_the_disk_has_no_room_for_leaves_the_old_one(tmp_path, monkeypatch):
    folder, model = opened(tmp_path), network()
    folder.save_model(model)
    before = contents(folder.path)

    def full(path):
        pathlib.Path(path).write_bytes(b"half")
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(model, "save", full)
    with pytest.raises(UserError, match=r"model\.keras: could not be written: No space left on device$"):
        folder.save_model(model)
    files.sweep(folder.path)
    assert contents(folder.path) == before


def damaged(whole: bytes) -> dict[str, bytes | None]:
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    return {"missing": None, "empty": b"", "cut": whole[:middle], "flipped": flipped, "text": b"model"}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "text"])
def test_broken_model_is_one_line_with_its_path(tmp_path, damage):
    folder = opened(tmp_path)
    folder.save_model(network())
    path = folder.path / "model.keras"
    remains = damaged(path.read_bytes())[damage]
    path.unlink() if remains is None else path.write_bytes(remains)
    with pytest.raises(UserError, match=r"model\.keras: could not be read: .") as caught:
        folder.load_model()
    assert str(path) in one_line(caught)


# --- config.flags


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "stage": ("compress", "convert"),
            "dataset": "folder:/my images/cats",
            "snn_learning_rate": 1e-7,
            "density": 0.1 + 0.2,
            "bias_current": True,
            "train_leak": False,
            "profile_steps": (3, 9),
            "seed": 2**31 - 1,
        },
    ],
    ids=["defaults", "others"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_config_flags_is_a_flagfile_that_gives_the_same_config(tmp_path, settings, overwrite):
    """But it overwrites nothing."""
    folder = StageFolder(tmp_path, configs.TRAIN_ANN)
    folder.open(Config(**settings, overwrite=overwrite), [])
    assert parsed(f"--flagfile={folder.path / 'config.flags'}") == Config(**settings)


def test_record_of_a_number_that_is_not_finite_is_one_line(tmp_path):
    folder = opened(tmp_path)
    with pytest.raises(UserError, match="would hold a number that is not finite"):
        folder.finish(Config(), "abc", 1.0, {"v_th": float("inf")})
    assert not folder.done


def test_commit_is_that_of_this_package_alone(tmp_path, monkeypatch):
    """Not of a repository in whose environment it is installed."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "theirs").write_text("theirs")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["add", "theirs"], ["commit", "-qm", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "theirs"))
    assert len(provenance.commit()) == 40
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "installed"))
    assert provenance.commit() == ""


# --- the data that a run began with

DIGITS = {"classes": 10, "train": [1000, 7]}


def test_data_of_a_run_stay_what_they_were(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"), dataset="folder:/images")
    for _ in range(2):
        runs.check_data(config, DIGITS)
    other = {"classes": 11, "train": [1000, 7]}
    with pytest.raises(UserError) as caught:
        runs.check_data(config, other)
    assert one_line(caught).startswith("--dataset=folder:/images: is not what it was when ")
    runs.check_data(dataclasses.replace(config, dataset="folder:/others"), other)


def test_data_are_those_of_the_meta_models_run(tmp_path):
    runs.check_data(Config(run_dir=str(tmp_path / "dense")), DIGITS)
    config = Config(run_dir=str(tmp_path / "run"), meta_model=str(tmp_path / "dense"))
    with pytest.raises(UserError, match=f"when {tmp_path / 'dense'} began"):
        runs.check_data(config, {"classes": 10, "train": [1000, 8]})
    runs.check_data(config, DIGITS)


@pytest.mark.parametrize("broken", ["[]", "{}", "{"])
def test_broken_note_of_the_data_is_one_line(tmp_path, broken):
    (tmp_path / "data.json").write_text(broken)
    with pytest.raises(UserError, match=r"data\.json: ") as caught:
        runs.check_data(Config(run_dir=str(tmp_path)), DIGITS)
    one_line(caught)


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\nstepping\t: 8\n"
            "processor\t: 1\ncpu family\t: 6\nmodel\t\t: 999\nmodel name\t: Other\nstepping\t: 9\n",
            "Xeon (6-143-8)",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_device_names_the_processor_as_exactly_as_it_is_known(tmp_path, monkeypatch, lines, name):
    if lines:
        (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(machine, "_CPUS", tmp_path / "cpuinfo")
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    assert provenance.device() == f"{name}, {os.cpu_count()} cores"
