"""Settings: defaults, ranges, contradictions, the stages they concern, and flags there and back."""

import dataclasses
import math
from pathlib import Path

import pytest
from command_line import parsed
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_tf.config import STAGES, Config
from snn_tf.errors import UsageError
from snn_tf.settings import Setting, setting_of, shown

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
SETTINGS: dict[str, Setting] = {name: setting_of(field) for name, field in FIELDS.items()}
NUMBERS = [name for name, field in FIELDS.items() if type(field.default) in (int, float)]
FLOATS = [name for name in NUMBERS if type(FIELDS[name].default) is float]
WORDS = [name for name, setting in SETTINGS.items() if setting.choices]
# Where a run lies, how it is watched and how fast it goes: no result depends on these.
WITHOUT_RESULT = {
    "run_dir",
    "stage",
    "meta_model",
    "snn_start",
    "overwrite",
    "data_dir",
    "manual_dir",
    "cache_gib",
    "lif",
    "jit_compile",
    "steps_per_call",
    "checkpoint_every",
    "keep_checkpoints",
    "on_nonfinite",
    "on_degenerate",
    "deterministic",
    "log_every",
    "validate_every",
    "profile_steps",
}


def values(name: str) -> st.SearchStrategy:
    """Allowed values of a setting, its bounds among them."""
    setting, default = SETTINGS[name], FIELDS[name].default
    if name == "stage":
        return st.lists(st.sampled_from(setting.choices), min_size=1, unique=True).map(tuple)
    if name == "profile_steps":
        pair = st.tuples(st.integers(0, 1000), st.integers(1, 1000)).map(lambda ab: (ab[0], sum(ab)))
        return st.just(()) | pair
    if name == "checkpoint_every":
        return st.from_regex(r"\A[0-9]{1,9}m?\Z")
    if setting.choices:
        return st.sampled_from(setting.choices)
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(int(setting.low), int(min(setting.high, 2**31 - 1)))
    if isinstance(default, float):
        high = None if setting.high == math.inf else setting.high
        return st.floats(
            setting.low,
            high,
            allow_nan=False,
            allow_infinity=False,
            exclude_min=setting.low_open,
            exclude_max=setting.high_open,
        )
    # Refused in some folders; what flags read as a home.
    special = "[\\~" if name in ("run_dir", "data_dir", "meta_model", "snn_start") else ""
    characters = st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters=special)
    return st.text(characters, min_size=name in ("run_dir", "dataset")).filter(lambda t: t == t.strip())


def without_contradictions(chosen: dict) -> Config:
    """A `Config` of independently drawn values, made to agree where settings depend on each other."""
    end, start = sorted((chosen["drop_fraction"], chosen["drop_fraction_end"]))
    agreeing = {"drop_fraction": start, "drop_fraction_end": end}
    if chosen["method"] == "magnitude_uniform":
        agreeing |= {
            "structure": "irregular",
            "budget": "weights",
            "dense_ends": False,
            "macs_exponent": 0.0,
        }
    elif chosen["structure"] == "channel":
        agreeing |= {"dense_ends": False}
    if chosen["method"] == "dense":
        agreeing |= {"activation_levels": 0}
    if chosen["lif"] == "native" and chosen["jit_compile"] == "true":
        agreeing |= {"jit_compile": "auto"}
    for other in ("meta_model", "snn_start"):
        if Path(chosen[other]) == Path(chosen["run_dir"]):
            agreeing |= {other: ""}
    return Config(**(chosen | agreeing))


CONFIGS = st.fixed_dictionaries({name: values(name) for name in FIELDS}).map(without_contradictions)


def fields_of(stage: str) -> set[str]:
    return set(Config().concerning(stage))


@settings(deadline=None)
@given(CONFIGS)
def test_config_survives_the_way_through_flags(config):
    words = [f"--{name}={shown(getattr(config, name))}" for name in FIELDS]
    assert parsed(*words) == config


@settings(deadline=None)
@given(CONFIGS)
def test_config_survives_the_way_through_a_flagfile(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "config.flags"
    lines = (f"--{name}={shown(getattr(config, name))}\n" for name in FIELDS)
    path.write_text("".join(lines), encoding="utf-8")
    assert parsed(f"--flagfile={path}") == config


@pytest.mark.parametrize("text", ["a\nb", "a\0b", " a", "a\t", "\udcff", "a\u2028b", "\x1b[2J"])
@pytest.mark.parametrize("name", ["run_dir", "meta_model", "dataset", "data_dir", "manual_dir"])
def test_config_text_that_is_not_one_line_is_refused(name, text):
    with pytest.raises(UsageError) as caught:
        Config(**{name: text})
    assert str(caught.value) == (
        f"--{name}={text!a}: must be one line of Unicode text, without space at its ends"
    )


@pytest.mark.parametrize("name", [n for n in NUMBERS if type(FIELDS[n].default) is int])
def test_config_whole_number_that_tensorflow_cannot_hold_is_refused(name):
    with pytest.raises(UsageError, match=rf"^--{name}=9+: must be "):
        Config(**{name: 99999999999})


def test_config_without_flags_is_the_default():
    assert parsed() == Config()


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().density = 0.1


@pytest.mark.parametrize(
    ("flag", "value", "line"),
    [
        ("density", 0.0, "--density=0.0: must be in (0, 1]"),
        ("density", 1.5, "--density=1.5: must be in (0, 1]"),
        ("dropout", 1.0, "--dropout=1.0: must be in [0, 1)"),
        ("validation_fraction", 1.0, "--validation_fraction=1.0: must be in (0, 1)"),
        ("distillation", -0.1, "--distillation=-0.1: must be in [0, 1]"),
        ("calibration_percentile", 100.1, "--calibration_percentile=100.1: must be in (0, 100]"),
        ("timesteps", 0, "--timesteps=0: must be at least 1"),
        ("batch_size", -3, "--batch_size=-3: must be at least 1"),
        ("v_th_scale", 0.0, "--v_th_scale=0.0: must be above 0"),
        ("seed", 2**31, "--seed=2147483648: must be in [0, 2147483647]"),
        ("attention", math.nan, "--attention=nan: must be at least 0"),
        ("width", math.inf, "--width=inf: must be in (0, 64]"),
        ("structure", "channels", "--structure=channels: must be one of irregular, channel"),
        ("budget", "", "--budget=: must be one of weights, macs"),
        (
            "stage",
            ("convert", "train"),
            "--stage=convert,train: must be one of all, " + ", ".join(STAGES),
        ),
        ("profile_steps", (10,), "--profile_steps=10: must be two rising steps, such as 10,20"),
        ("profile_steps", (20, 10), "--profile_steps=20,10: must be two rising steps, such as 10,20"),
        ("profile_steps", (-1, 10), "--profile_steps=-1,10: must be at least 0"),
    ],
)
def test_config_error_names_flag_value_and_what_is_allowed(flag, value, line):
    with pytest.raises(UsageError) as caught:
        Config(**{flag: value})
    assert str(caught.value) == line


@pytest.mark.parametrize("name", NUMBERS)
def test_config_number_outside_its_bounds_is_refused(name):
    setting, whole = SETTINGS[name], isinstance(FIELDS[name].default, int)
    outside = [setting.low if setting.low_open else setting.low - 1]
    if setting.high < math.inf:
        outside.append(setting.high if setting.high_open else setting.high + 1)
    for value in outside:
        with pytest.raises(UsageError, match=rf"^--{name}="):
            Config(**{name: int(value) if whole else value})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_config_number_that_is_not_finite_is_refused(name, value):
    with pytest.raises(UsageError, match=rf"^--{name}={value}: must be "):
        Config(**{name: value})


@pytest.mark.parametrize("name", WORDS)
def test_config_unknown_choice_is_refused_with_all_choices(name):
    value = ("other",) if isinstance(FIELDS[name].default, tuple) else "other"
    with pytest.raises(UsageError) as caught:
        Config(**{name: value})
    assert str(caught.value) == f"--{name}=other: must be one of {', '.join(SETTINGS[name].choices)}"


def test_config_drop_fraction_that_would_rise_is_refused():
    with pytest.raises(UsageError) as caught:
        Config(drop_fraction=0.1, drop_fraction_end=0.2)
    assert str(caught.value) == "--drop_fraction_end=0.2: must be at most --drop_fraction=0.1"


def test_config_levels_of_a_student_that_is_not_trained_are_refused():
    with pytest.raises(UsageError) as caught:
        Config(method="dense", activation_levels=5)
    assert str(caught.value) == (
        "--activation_levels=5: must be 0 with --method=dense, which trains no student; "
        "--density=1 --student_start=meta_model trains a dense one"
    )


@pytest.mark.parametrize(
    ("flag", "value", "needed"),
    [
        ("structure", "channel", "irregular"),
        ("budget", "macs", "weights"),
        ("dense_ends", True, False),
        ("macs_exponent", 0.5, 0.0),
    ],
)
def test_config_stock_pruning_with_what_it_cannot_do_is_refused(flag, value, needed):
    with pytest.raises(UsageError) as caught:
        Config(method="magnitude_uniform", **{flag: value})
    assert str(caught.value) == f"--{flag}={value}: must be {needed} with --method=magnitude_uniform"


def test_config_dense_ends_of_channels_are_refused():
    with pytest.raises(UsageError, match=r"^--dense_ends=True: must be False with --structure=channel$"):
        Config(dense_ends=True, structure="channel")


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        (Setting("", ""), ""),
        (Setting("", "", low=2), "at least 2"),
        (Setting("", "", low=2, low_open=True), "above 2"),
        (Setting("", "", low=0, high=1), "in [0, 1]"),
        (Setting("", "", low=0, high=1, low_open=True, high_open=True), "in (0, 1)"),
        (Setting("", "", choices=("a", "b")), "one of a, b"),
    ],
)
def test_setting_says_what_is_allowed(setting, allowed):
    assert setting.allowed() == allowed


@pytest.mark.parametrize("name", FIELDS)
def test_setting_has_help_group_and_known_stages(name):
    setting = SETTINGS[name]
    assert setting.help.endswith(".") and setting.group
    assert set(setting.stages) <= set(STAGES)
    assert len(set(setting.stages)) == len(setting.stages)


def test_setting_groups_are_not_interrupted():
    groups = [setting.group for setting in SETTINGS.values()]
    changes = [group for before, group in zip(["", *groups], groups, strict=False) if group != before]
    assert len(changes) == len(set(changes))


def test_settings_without_a_stage_are_those_no_result_depends_on():
    assert {name for name, setting in SETTINGS.items() if not setting.stages} == WITHOUT_RESULT


@pytest.mark.parametrize(
    ("stage", "inside", "outside"),
    [
        (
            "train_ann",
            {"ann_epochs", "augment", "momentum", "seed"},
            {"density", "snn_epochs", "timesteps"},
        ),
        (
            "compress",
            {"density", "method", "attention", "ann_learning_rate"},
            {"ann_epochs", "timesteps"},
        ),
        (
            "convert",
            {"v_th_scale", "timesteps", "calibration_batches", "seed"},
            {"density", "batch_size"},
        ),
        (
            "train_snn",
            {"snn_learning_rate", "train_leak", "surrogate", "seed"},
            {"ann_epochs", "density"},
        ),
        ("evaluate", {"dataset", "network", "precision"}, {"batch_size", "snn_epochs", "density"}),
        ("export", {"dataset", "network", "width"}, {"batch_size", "snn_epochs", "density"}),
    ],
)
def test_config_concerning_holds_what_a_stage_depends_on(stage, inside, outside):
    assert inside <= fields_of(stage)
    assert not outside & fields_of(stage)


def test_config_concerning_carries_the_values():
    assert Config(density=0.1).concerning("compress")["density"] == 0.1


def test_config_stages_follow_the_pipeline():
    assert Config().stages() == STAGES
    assert Config(stage=("evaluate", "train_ann")).stages() == ("train_ann", "evaluate")
    assert Config(stage=("convert", "all")).stages() == STAGES


def test_config_stage_seeds_are_distinct_and_within_range():
    seeds = [Config(seed=seed).stage_seed(stage) for seed in (0, 1) for stage in STAGES]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    # Those of the runs whose records are published.
    assert (seeds[0], seeds[len(STAGES) + STAGES.index("train_snn")]) == (297190115, 1335519805)
    assert Config(seed=1).stage_seed("compress") == Config(seed=1, density=0.1).stage_seed("compress")


@pytest.mark.parametrize(("flag", "empty"), [("stage", ()), ("run_dir", ""), ("dataset", "")])
def test_empty_setting_is_refused_with_an_example(flag, empty):
    with pytest.raises(UsageError, match=f"--{flag}=: must not be empty; an example is --{flag}=."):
        Config(**{flag: empty})


@pytest.mark.parametrize(
    "given, steps, seconds", [("0", 0, 0.0), ("200", 200, 0.0), ("10m", 0, 600.0), ("0m", 0, 0.0)]
)
def test_checkpoint_interval_is_in_steps_or_minutes(given, steps, seconds):
    assert Config(checkpoint_every=given).checkpoint_interval() == (steps, seconds)


@pytest.mark.parametrize(
    "given", ["", "-1", "10 m", "1.5m", "m", "10s", "ten", "1e3", "9" * 10, "\u0661"]
)
def test_checkpoint_interval_that_is_neither_is_refused(given):
    with pytest.raises(UsageError, match=f"--checkpoint_every={given}: must be a number of steps"):
        Config(checkpoint_every=given)


@pytest.mark.parametrize("flag", ["meta_model", "snn_start"])
@pytest.mark.parametrize("path", ["runs/a", "runs/b/../a", "./runs/a", str(Path("runs/a").resolve())])
def test_run_builds_on_another_folder_than_its_own(flag, path):
    with pytest.raises(UsageError, match=f"^--{flag}=.*: must be another folder than --run_dir$"):
        Config(run_dir="runs/a", **{flag: path})


@pytest.mark.parametrize("flag", ["run_dir", "data_dir"])
@pytest.mark.parametrize("folder", ["runs/a[0.05]", "runs\\a"])
def test_folder_that_tensorflow_takes_for_a_pattern_is_refused(flag, folder):
    with pytest.raises(UsageError) as caught:
        Config(**{flag: folder})
    (strange,) = set("[\\") & set(folder)
    assert str(caught.value) == (
        f"--{flag}={folder}: must lead to a path without {strange}, which TensorFlow takes for a pattern"
    )


def test_working_folder_that_tensorflow_takes_for_a_pattern_is_refused(tmp_path, monkeypatch):
    (tmp_path / "c[0]").mkdir()
    monkeypatch.chdir(tmp_path / "c[0]")
    with pytest.raises(UsageError, match="--run_dir=runs/default: must lead to a path without"):
        Config()
    Config(run_dir=str(tmp_path))


def test_link_that_leads_to_itself_is_no_run_of_its_own(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert Config(run_dir=str(tmp_path), meta_model=str(tmp_path / "loop")).meta_model
