"""The flagfiles: each parses, is named after what it sets, and says nothing twice."""

import dataclasses
import re
import statistics
from pathlib import Path

import pytest
from command_line import parsed

from snn_tf.config import Config
from snn_tf.errors import UsageError
from snn_tf.results import Row, read

ROOT = Path(__file__).resolve().parents[1]
BASE, SMALL = "--flagfile=flags/base.flags", "--flagfile=flags/small.flags"
SHARED = ("base", "small", "ablation/shared", "headline/shared", "others/shared")
NAMES = sorted(
    path.relative_to(ROOT / "flags").with_suffix("").as_posix()
    for path in (ROOT / "flags").rglob("*.flags")
)
RUNS = [name for name in NAMES if name not in SHARED]
STUDIES = [name for name in RUNS if "/" in name]
RECORDED = {
    f"{study}/{group.name}": group
    for study in sorted(path.parent.name for path in (ROOT / "results").glob("*/README.md"))
    for group in read(ROOT / "results" / study)
}
EXPERIMENTS = [name for name in RUNS if name != "quickstart" and name not in STUDIES]
PATTERN = re.compile(
    r"(?P<dataset>cifar10|cifar100|tiny_imagenet)_(?P<network>(?:vgg|resnet)\d+)_"
    r"(?:(?P<dense>dense)|(?P<structure>irregular|channel)_(?P<density>0\.\d+))_t(?P<timesteps>\d+)"
    r"(?P<small>_small)?"
)
# Data sets and networks of the paper.
PAPER = {
    ("cifar10", "vgg16"),
    ("cifar10", "resnet12"),
    ("cifar100", "vgg11"),
    ("cifar100", "vgg16"),
    ("cifar100", "resnet12"),
    ("tiny_imagenet", "vgg16"),
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def text(name: str) -> str:
    return (ROOT / "flags" / f"{name}.flags").read_text()


def settings(name: str) -> list[str]:
    """A flagfile's own lines, without comments and blank lines."""
    return [line for line in text(name).splitlines() if line and not line.startswith("#")]


def header(name: str) -> dict[str, str]:
    """The header's entries, `# Key: value`."""
    return dict(re.findall(r"^# ([A-Z][a-z ]+): (.+)$", text(name), re.MULTILINE))


def match(name: str) -> re.Match:
    found = PATTERN.fullmatch(name)
    assert found, f"{name} is not dataset_model_structure_density_timesteps"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_flagfile_is_parsed(name):
    assert isinstance(parsed(f"--flagfile=flags/{name}.flags"), Config)


@pytest.mark.parametrize("name", NAMES)
def test_flagfile_has_no_idle_line(name):
    lines = settings(name)
    # What a study shares is read after base.flags, of which it may take something back.
    before = [BASE] if name in SHARED and "/" in name else []
    whole = parsed(*before, *lines)

    def idle(place: int) -> bool:
        try:
            return parsed(*before, *lines[:place], *lines[place + 1 :]) == whole
        except UsageError:
            return False

    assert not [line for place, line in enumerate(lines) if idle(place)]


@pytest.mark.parametrize("name", NAMES)
def test_flagfile_sets_no_flag_twice(name):
    flags_set = [line.split("=")[0] for line in settings(name) if not line.startswith("--flagfile=")]
    assert len(flags_set) == len(set(flags_set))


@pytest.mark.parametrize("name", SHARED)
def test_shared_flagfile_includes_no_other(name):
    assert not [line for line in settings(name) if line.startswith("--flagfile")]


@pytest.mark.parametrize("name", RUNS)
def test_flagfile_starts_with_base(name):
    expected = [BASE, SMALL] if name.endswith("_small") else [BASE]
    if name in STUDIES:
        expected.append(f"--flagfile=flags/{name.split('/')[0]}/shared.flags")
    assert [line for line in settings(name) if line.startswith("--flagfile")] == expected
    assert settings(name)[: len(expected)] == expected


@pytest.mark.parametrize("name", RUNS)
def test_flagfile_header_is_complete(name):
    entries = header(name)
    assert {"Paper", "Command", "Expected time", "Expected numbers"} <= set(entries)
    command = f"python train.py --flagfile=flags/{name}.flags"
    assert entries["Command"].removesuffix(" --manual_dir=FOLDER") == command


@pytest.mark.parametrize("name", RUNS)
def test_flagfile_run_dir_is_named_after_the_file(name):
    assert parsed(*settings(name)).run_dir == f"runs/{name}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_flagfile_name_agrees_with_settings(name):
    fields, config = match(name), parsed(*settings(name))
    assert config.dataset == fields["dataset"]
    assert config.network == fields["network"]
    assert config.timesteps == int(fields["timesteps"])
    assert (config.method == "dense") == bool(fields["dense"])
    if not fields["dense"]:
        assert config.structure == fields["structure"]
        assert config.density == float(fields["density"])
    assert (config.width < 1) == bool(fields["small"])


@pytest.mark.parametrize("name", STUDIES)
def test_study_is_named_after_its_density_and_steps(name):
    config, words = parsed(*settings(name)), name.split("/")[1].split("_")
    densities = [float(word) for word in words if re.fullmatch(r"\d\.\d+", word)]
    assert densities == ([] if config.method == "dense" else [config.density])
    steps = [int(word[1:]) for word in words if re.fullmatch(r"t\d+", word)]
    assert config.timesteps == (steps[0] if steps else 5)
    for method in ("magnitude", "random", "dense"):
        assert (words[0] == method) <= config.method.startswith(method)


@pytest.mark.parametrize("name", [*EXPERIMENTS, *STUDIES])
def test_flagfile_meta_model_is_trained_by_its_dense_sibling(name):
    config = parsed(*settings(name))
    if config.snn_start:
        start = config.snn_start.removeprefix("runs/")
        longer = parsed(*settings(start))
        assert header(name)["Needs"] == f"train_snn of flags/{start}.flags."
        assert longer.concerning("compress") == config.concerning("compress")
        return
    if not config.meta_model:
        assert config.method == "dense"
        assert "Needs" not in header(name)
        return
    sibling = config.meta_model.removeprefix("runs/")
    teacher = parsed(*settings(sibling))
    assert teacher.method == "dense" and not teacher.meta_model
    assert teacher.concerning("train_ann") == config.concerning("train_ann")
    assert header(name)["Needs"] == f"train_ann of flags/{sibling}.flags."


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.endswith("_small")])
def test_small_flagfile_differs_from_the_full_one_only_by_what_is_small(name):
    full = dataclasses.asdict(parsed(*settings(name.removesuffix("_small"))))
    small = dataclasses.asdict(parsed(*settings(name)))
    shared = {line.split("=")[0].removeprefix("--") for line in settings("small")}
    assert {key for key in full if full[key] != small[key]} <= shared | {"run_dir", "meta_model"}


def test_flagfiles_differ_in_more_than_their_folder():
    configs = [dataclasses.replace(parsed(*settings(name)), run_dir="any") for name in RUNS]
    assert len(set(configs)) == len(configs)


def test_experiments_cover_every_network_and_structure_of_the_paper():
    found = {(m["dataset"], m["network"], m["dense"] or m["structure"]) for m in map(match, EXPERIMENTS)}
    assert {(*pair, form) for pair in PAPER for form in ("dense", "irregular", "channel")} <= found
    assert "0.0299" in {m["density"] for m in map(match, EXPERIMENTS)}


def test_quickstart_needs_no_download_and_no_other_run():
    config = parsed(*settings("quickstart"))
    assert config.dataset == "digits"
    assert config.meta_model == ""
    assert config.stages()[0] == "train_ann" and config.stages()[-1] == "export"


@pytest.mark.parametrize("name", RECORDED)
def test_records_were_made_by_the_flagfile_of_their_name(name):
    made = Row(name, {"config": dataclasses.asdict(parsed(*settings(name)))}).settings()
    for row in RECORDED[name].rows:
        assert row.settings() == made


@pytest.mark.parametrize("name", RECORDED)
def test_header_gives_the_accuracies_of_the_record(name):
    group = RECORDED[name]
    ann, snn = (
        100 * statistics.mean(group.values(which, "test_accuracy"))
        for which in ("compressed_ann", "trained_snn")
    )
    kind = "dense" if group.config["method"] == "dense" else "compressed"
    assert header(name)["Expected numbers"].startswith(
        f"test accuracy {ann:.1f} % {kind}, {snn:.1f} % SNN ("
    )
