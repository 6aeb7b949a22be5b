"""The command line as its user meets it: help, mistakes in one line, TensorFlow only when needed."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import parsed

from snn_tf import cli
from snn_tf.config import Config
from snn_tf.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
MISTAKES = {
    "nothing": ([], "no flags; --flagfile=FILE says what to run"),
    "unknown flag": (["--bogus=1"], "--bogus: is no flag; --help shows all"),
    "typo": (["--tempreature=2"], "--tempreature: is no flag; near are --temperature"),
    "typo of the flagfile": (["--flagfil=a"], "--flagfil: is no flag; near are --flagfile"),
    "very long name": ([f"--{'x' * 5000}=1"], "xxx...: there is no flag with so long a name"),
    "not a number": (["--density=half"], "--density=half: must be a number"),
    "value of two lines": (["--density=0.1\n0.2"], "--density=0.1 0.2: must be a number"),
    "not a whole number": (["--timesteps=1.5"], "--timesteps=1.5: must be a whole number"),
    "not a boolean": (["--overwrite=maybe"], "--overwrite=maybe: must be true or false"),
    "not steps": (["--profile_steps=a,b"], "--profile_steps=a,b: must be whole numbers, such as 10,20"),
    "value after no": (["--nobatch_norm=true"], "--nobatch_norm=true does not take an argument"),
    "value that begins with help": (["--density", "help1"], "--density=help1: must be a number"),
    "missing value": (["--density"], "--density: must have a value, as in --density=VALUE"),
    "value with a colon": (["--density=a: b"], "--density=a: b: must be a number"),
    "not a number of absl's": (["--verbosity=high"], "--verbosity=high: must be a whole number"),
    "out of range": (["--density=2"], "--density=2.0: must be in (0, 1]"),
    "not finite": (["--attention=nan"], "--attention=nan: must be at least 0"),
    "unknown choice": (["--structure=blocks"], "--structure=blocks: must be one of irregular, channel"),
    "unknown stage": (["--stage=train"], "--stage=train: must be one of all, train_ann, "),
    "contradiction": (
        ["--method=magnitude_uniform", "--structure=channel"],
        "--structure=channel: must be irregular with --method=magnitude_uniform",
    ),
    "last value wins": (["--density=0.1", "--density=3"], "--density=3.0"),
    "stray argument": (["quickstart"], "quickstart: flags start with --"),
    "missing flagfile": (["--flagfile=flags/missing.flags"], "flags/missing.flags"),
    "flagfile without a name": (["--flagfile="], "--flagfile=: must name a file"),
    "no time step": (["--timesteps=0"], "--timesteps=0: must be at least 1"),
    "nothing kept": (["--density=0"], "--density=0.0: must be in (0, 1]"),
    "beyond all numbers": (
        ["--ann_epochs=99999999999"],
        "--ann_epochs=99999999999: must be at most 2147",
    ),
    "name of two lines": (["--run_dir=a\nb"], "must be one line"),
}


def train(*words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs `python train.py WORDS` in the repository's root; `options` go to the interpreter."""
    command = [sys.executable, *options, "train.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def loaded_modules(*words: str) -> set[str]:
    """Top-level modules that `train.py` loads before it exits."""
    lines = train(*words, options=("-X", "importtime")).stderr.splitlines()
    return {
        line.split("|")[-1].strip().split(".")[0] for line in lines if line.startswith("import time:")
    }


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_exits_0_and_shows_every_setting(flag):
    result = train("--density=0.1", flag)
    assert (result.returncode, result.stderr) == (0, "")
    for field in dataclasses.fields(Config):
        assert f"  --{field.name}  (" in result.stdout


@pytest.mark.parametrize(
    ("line", "group", "following"),
    [
        ("  --density  (default 0.05; in (0, 1])", "Compression", "SNN"),
        ("  --timesteps  (default 5; steps; at least 1)", "SNN", "Execution"),
        ("  --structure  (default irregular; one of irregular, channel)", "Compression", "Conversion"),
        ("  --meta_model  (default empty)", "Run", "Data"),
        ("  --profile_steps  (default none; steps; at least 0)", "Execution", None),
    ],
)
def test_help_text_gives_default_unit_and_range_under_its_group(line, group, following):
    lines = cli.help_text().splitlines()
    assert lines.index(group) < lines.index(line)
    assert following is None or lines.index(line) < lines.index(following)


def test_help_text_fits_a_terminal():
    assert max(map(len, cli.help_text().splitlines())) <= 105


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_exits_2_with_one_line(words, said):
    result = train(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("train.py: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_mistake_in_a_flagfile_exits_2_with_one_line(tmp_path):
    (tmp_path / "inner.flags").write_text("# a comment\n\n--density=7\n")
    (tmp_path / "outer.flags").write_text(f"--flagfile={tmp_path}/inner.flags\n--seed=1\n")
    result = train(f"--flagfile={tmp_path}/outer.flags")
    assert result.returncode == 2
    assert result.stderr == "train.py: --density=7.0: must be in (0, 1]\n"


def test_flagfile_that_includes_itself_exits_2_with_one_line(tmp_path):
    (tmp_path / "self.flags").write_text(f"--flagfile={tmp_path}/self.flags\n")
    result = train(f"--flagfile={tmp_path}/self.flags")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"--flagfile={tmp_path}/self.flags: must not include itself" in result.stderr


def test_name_longer_than_the_file_system_allows_exits_1_with_one_line():
    result = train(f"--run_dir={'x' * 300}")
    lines = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode == 1 and len(lines) == 1 and "File name too long" in lines[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "word", ["stray\r\nword", "--density=0.1\n0.2", "--" + "x\n" * 2000], ids=["stray", "value", "name"]
)
def test_refusal_is_one_line_whatever_the_word(word):
    with pytest.raises(UsageError) as caught:
        parsed(word)
    assert len(str(caught.value).splitlines()) == 1


def test_flag_after_a_flagfile_overrides_it(tmp_path):
    (tmp_path / "wide.flags").write_text("--density=7\n")
    result = train(f"--flagfile={tmp_path}/wide.flags", "--density=8")
    assert result.stderr == "train.py: --density=8.0: must be in (0, 1]\n"


def test_reader_of_the_output_that_goes_away_gets_no_traceback():
    """As in `train.py --help | head -1`."""
    command = f"{sys.executable} train.py --help | true"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""


@pytest.mark.parametrize(
    "words", [["--help"], ["--bogus=1"], ["--density=2"]], ids=["help", "flag", "value"]
)
def test_answer_comes_without_tensorflow(words):
    loaded = loaded_modules(*words)
    assert {"snn_tf", "absl"} <= loaded
    assert not loaded & {"tensorflow", "tf_keras", "keras", "tensorflow_model_optimization"}


def test_output_without_room_is_one_line():
    command = f"{sys.executable} train.py --help > /dev/full"
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert result.stderr == "train.py: output: No space left on device\n"


def test_line_without_room_leaves_the_exit_code():
    command = f"{sys.executable} train.py --bogus=1 2> /dev/full"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=60)
    assert result.returncode == UsageError.exit_code


def test_home_is_known_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("run_dir", "meta_model", "snn_start", "data_dir", "manual_dir")
    config = parsed(*(f"--{name}=~/{name}" for name in names))
    assert [getattr(config, name) for name in names] == [f"{tmp_path}/{name}" for name in names]


@pytest.mark.parametrize("spelling", ["~/a", "~/a/", "~/b/../a", "~//a/."])
def test_folder_of_images_is_one_setting_however_it_is_spelled(tmp_path, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parsed(f"--dataset=folder:{spelling}").dataset == f"folder:{tmp_path}/a"


@pytest.mark.parametrize("quiet", [True, False])
def test_warnings_of_tensorflow_are_shown_only_if_asked_for(quiet):
    code = (
        "from snn_tf import cli\n"
        f"with cli._quiet_import({quiet}):\n"
        "    import tensorflow as tf\n"
        "tf.get_logger().warning('traced again')\n"
        "tf.get_logger().error('broken')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("traced again" in result.stderr, "broken" in result.stderr) == (not quiet, True)
