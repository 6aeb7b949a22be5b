"""Records of many runs: rows, seeds, paired differences; the page and the plots made of them."""

import copy
import dataclasses
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy import stats

from snn_tf import comparison, report, results, tables
from snn_tf.config import Config
from snn_tf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 400


def answers(right: int, shift: int = 0) -> np.ndarray:
    """So many right answers in a row, from `shift` on."""
    return np.roll(np.arange(IMAGES) < right, shift)


def facts(correct: np.ndarray, energy: float, density: float = 1.0, **rest) -> dict:
    models = {"fp32_45nm": energy, "int32_45nm": energy / 4}
    dearer = {name: 2 * value for name, value in models.items()}
    variants = {"default": {"energy_pj": models}, "image_every_step": {"energy_pj": dearer}}
    return {
        "num_examples": IMAGES,
        "test_accuracy": float(correct.mean()),
        "correct": np.packbits(correct).tobytes().hex(),
        "density": density,
        "compression": 1 / density,
        "mac_density": 2 * density if density < 1 else 1.0,
        "energy_pj": models,
        "conventions": {"padded": {"variants": variants}},
        **rest,
    }


def record(snn: np.ndarray, dense: np.ndarray, seed=0, **settings) -> dict:
    config = dataclasses.asdict(Config(seed=seed, run_dir=f"runs/{seed}", **settings))
    density = 1.0 if settings.get("method") == "dense" else 0.05
    return facts(snn, 1e6, density, spikes_per_neuron=0.5) | {
        "config": config,
        "device": "a device",
        "timesteps": 5,
        "neuron_updates": 100_000,
        "dense_ann": facts(dense, 8e6),
        "compressed_ann": facts(answers(300), 2e6, density),
        "converted_snn": facts(answers(50), 1e6, density, spikes_per_neuron=0.9),
    }


def with_zeros_counted(made: dict, dense: float, compressed: float) -> dict:
    """The record with the shares of their energy that ANNs need where zeros cost nothing."""
    for which, share in (("dense_ann", dense), ("compressed_ann", compressed)):
        variants = made[which]["conventions"]["padded"]["variants"]
        energies = variants["default"]["energy_pj"].items()
        variants["zeros_skipped"] = {"energy_pj": {model: share * pj for model, pj in energies}}
    spiking = made["conventions"]["padded"]["variants"]
    spiking["image_every_step_pooled_as_macs"] = {"energy_pj": {"fp32_45nm": 3e6}}
    return made


def put(folder: Path, name: str, made: dict) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "record.json").write_text(json.dumps(made))


@pytest.fixture
def rows(tmp_path) -> Path:
    """A dense row, magnitude with three seeds, attention with one."""
    put(tmp_path, "small_dense", record(answers(330), answers(340), method="dense"))
    for seed, right in enumerate((300, 304, 310)):
        put(
            tmp_path,
            f"small_magnitude_seed{seed}",
            record(answers(right), answers(340), seed, method="magnitude"),
        )
    put(
        tmp_path,
        "small_attention",
        record(answers(308, 4), answers(340), saliency="fisher", density_schedule="cubic"),
    )
    return tmp_path


def groups_of(folder: Path) -> dict[str, results.Group]:
    return {group.name: group for group in results.read(folder)}


def test_rows_that_differ_in_their_seed_alone_are_one_group(rows):
    found = groups_of(rows)
    assert {name: [row.seed for row in group.rows] for name, group in found.items()} == {
        "small_attention": [0],
        "small_dense": [0],
        "small_magnitude": [0, 1, 2],
    }


def test_execution_and_folders_part_no_group_but_settings_do(tmp_path):
    put(tmp_path, "a_seed0", record(answers(300), answers(340), 0, lif="native", log_every=7))
    put(tmp_path, "a_seed1", record(answers(300), answers(340), 1, lif="fused", meta_model="runs/x"))
    put(tmp_path, "b", record(answers(300), answers(340), 1, score_decay=0.8))
    assert [len(group.rows) for group in results.read(tmp_path)] == [2, 1]


@pytest.mark.parametrize("count", [1, 7, 8, 400])
def test_correct_answers_come_back_as_they_were_packed(count):
    right = np.random.default_rng(count).random(count) < 0.5
    packed = {"correct": np.packbits(right).tobytes().hex(), "num_examples": count}
    assert np.array_equal(results.correct(packed), right)


def test_paired_interval_is_students_of_the_differences_by_image():
    rng = np.random.default_rng(0)
    first, second = rng.random(900) < 0.9, rng.random(900) < 0.8
    differences = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(900)
    # The 97.5th percentile of Student's t with 899 degrees of freedom.
    expected = mean - 1.962606 * error, mean + 1.962606 * error
    assert results.paired_interval(first, second) == pytest.approx(expected, rel=1e-5)


def test_paired_interval_is_narrower_where_the_same_images_are_right():
    alike, apart = (np.ptp(results.paired_interval(answers(300), answers(280, s))) for s in (0, 100))
    assert alike < apart / 2
    assert results.paired_interval(answers(9), answers(9)) == (0.0, 0.0)


def test_difference_of_one_seed_has_an_interval_and_of_three_a_deviation(rows):
    found = groups_of(rows)
    magnitude, dense = found["small_magnitude"], found["small_dense"]
    one = results.difference(found["small_attention"], "trained_snn", magnitude, "trained_snn")
    assert one.mean == pytest.approx(8 / IMAGES) and one.seeds == 1 and one.deviation is None
    # 12 images that one alone gets right, 4 that the other alone does.
    assert one.interval == results.paired_interval(answers(308, 4), answers(300))
    three = results.difference(magnitude, "trained_snn", magnitude, "dense_ann")
    losses = [-40 / IMAGES, -36 / IMAGES, -30 / IMAGES]
    assert three == results.Difference(
        pytest.approx(statistics.mean(losses)), 3, pytest.approx(statistics.stdev(losses)), None
    )
    other = copy.deepcopy(dense.rows[0].record)
    other["config"]["seed"] = 9
    assert (
        results.difference(dense, "trained_snn", results.Group([results.Row("x", other)]), "trained_snn")
        is None
    )


def test_difference_of_two_seeds_has_the_interval_of_both_ones_images(tmp_path):
    for seed in (0, 1):
        put(tmp_path, f"one_seed{seed}", record(answers(300 + seed, seed), answers(340), seed))
        put(
            tmp_path,
            f"two_seed{seed}",
            record(answers(280, 9 * seed), answers(340), seed, density=0.5),
        )
    one, two = (groups_of(tmp_path)[name] for name in ("one", "two"))
    found = results.difference(one, "trained_snn", two, "trained_snn")
    first = np.concatenate([answers(300, 0), answers(301, 1)]).astype(float)
    second = np.concatenate([answers(280, 0), answers(280, 9)]).astype(float)
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.seeds, found.deviation) == (2, None)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert found.interval == pytest.approx((interval.low, interval.high))


def test_row_whose_snn_continues_another_is_an_experiment_of_its_own(rows):
    put(rows, "on", record(answers(320), answers(340), method="magnitude", snn_start="runs/first"))
    found = groups_of(rows)
    assert len(found["small_magnitude"].rows) == 3 and len(found["on"].rows) == 1
    assert results.dense_counterpart(found["on"], list(found.values())) is None
    wanted = results.same_but_for_masks(found["small_magnitude"])
    assert results.same_but_for_masks(found["on"]) != wanted


def test_dense_counterpart_has_the_same_network_data_and_length(rows):
    put(rows, "wide", record(answers(300), answers(340), width=2.0))
    put(rows, "long", record(answers(300), answers(340), snn_epochs=99))
    found = groups_of(rows)
    everything = list(found.values())
    for name, group in found.items():
        counterpart = results.dense_counterpart(group, everything)
        assert (counterpart is found["small_dense"]) == (name not in ("wide", "long"))
        assert counterpart is None or name not in ("wide", "long")


def lines_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without the rule."""
    part = text.split(f"## {heading}")[1].split("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table if "---" not in line
    ]


def test_page_holds_every_row_with_what_it_loses(rows):
    assert report.main([str(rows)]) == 0
    page = (rows / "README.md").read_text()
    assert page.startswith(f"# Results: {rows.name}\n\nAll rows: `--dataset=cifar10 --network=vgg16 ")
    heading, *table = lines_of(page, "All rows")
    cells = {line[0]: dict(zip(heading, line, strict=True)) for line in table}
    assert list(cells) == ["`small_attention`", "`small_dense`", "`small_magnitude`"]
    one, three = cells["`small_attention`"], cells["`small_magnitude`"]
    assert one["masks"] == "attention, fisher, cubic" and three["masks"] == "magnitude"
    assert one["SNN"] == "77.00" and one["dense ANN"] == "85.00" and one["compression"] == "20.0×"
    low, high = (100 * x for x in results.paired_interval(answers(308, 4), answers(330)))
    assert one["SNN − dense SNN"] == f"-5.50 [{low:+.2f}, {high:+.2f}]"
    assert (
        three["SNN"]
        == f"{100 * 914 / 1200:.2f} ± {100 * statistics.stdev((300, 304, 310)) / IMAGES:.2f}"
    )
    assert three["seeds"] == "3" and one["energy ratio"] == "8.0×" and one["MACs kept"] == "0.100"
    assert one["energy ratio, ANN"] == "4.0×" and one["device"] == "a device"
    assert cells["`small_dense`"]["SNN − dense SNN"] == ""


@pytest.mark.parametrize(
    ("method", "schedule", "words"),
    [
        ("attention", "cubic", "attention, cubic"),
        ("attention", "constant", "attention"),
        ("attention", "auto", "attention"),
        ("magnitude", "cubic", "magnitude"),
        ("magnitude", "constant", "magnitude, constant"),
        ("random", "auto", "random"),
        ("random", "cubic", "random, cubic"),
    ],
)
def test_density_schedule_is_named_where_it_is_not_the_published_one(tmp_path, method, schedule, words):
    settings = {"method": method, "density_schedule": schedule}
    put(tmp_path, "row", record(answers(300), answers(340), **settings))
    assert tables.masks_of(groups_of(tmp_path)["row"]) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "attention", "attention": 0.0}, "attention, β = 0, cubic"),
        ({"method": "magnitude", "attention": 0.0}, "magnitude, β = 0"),
        ({"method": "attention", "attention": 1000.0}, "attention, β = 1000, cubic"),
        ({"method": "attention", "activation_levels": 5}, "attention, cubic, 5 levels"),
        ({"method": "dense", "attention": 0.0}, "dense"),
    ],
)
def test_loss_and_activations_of_the_student_are_named_where_they_are_not_the_usual(
    tmp_path, settings, words
):
    put(tmp_path, "row", record(answers(300), answers(340), **settings))
    assert tables.masks_of(groups_of(tmp_path)["row"]) == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "attention"}, "7, 5, 3"),
        ({"method": "attention", "snn_start": "runs/t5"}, "7, 5, +3"),
        ({"method": "dense"}, "7, 0, 3"),
    ],
)
def test_page_says_how_long_each_part_of_a_row_trained(tmp_path, settings, words):
    lengths = {"ann_epochs": 7, "compress_epochs": 5, "snn_epochs": 3}
    put(tmp_path, "row", record(answers(300), answers(340), **lengths, **settings))
    assert report.main([str(tmp_path)]) == 0
    heading, line = lines_of((tmp_path / "README.md").read_text(), "All rows")
    assert dict(zip(heading, line, strict=True))["epochs"] == words


def test_short_table_takes_its_place_in_a_page(rows):
    page = rows / "page.md"
    before, after = "# Title\n", "\nafter <!-- end of rows --> too\n"
    marks = f"<!-- rows: {rows.name} -->\n", "<!-- end of rows -->"
    page.write_text(f"{before}{marks[0]}old{marks[1]}{after}")
    for _ in range(2):
        assert report.main([str(rows), "--into", str(page)]) == 0
        text = page.read_text()
        assert text.startswith(before + marks[0]) and text.endswith(marks[1] + after)
        heading, *lines = lines_of(text.replace(marks[0], "## Short"), "Short")
        cells = dict(zip(heading, lines[0], strict=True))
        assert len(lines) == 3 and "old" not in text
        assert cells["row"] == "`small_attention`" and cells["SNN"] == "77.00"
        assert cells["compression"] == "20.0×" and cells["energy ratio"] == "8.0×"


@pytest.mark.parametrize("text", ["", "<!-- rows: NAME -->\n", "<!-- end of rows -->", None])
def test_page_without_a_place_for_the_table_is_named_and_left_alone(rows, capsys, text):
    page = rows / "page.md"
    if text is not None:
        page.write_text(text.replace("NAME", rows.name))
        before = page.read_text()
    assert report.main([str(rows), "--into", str(page)]) == UserError.exit_code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--into={page}" in line
    assert page.read_text() == before if text is not None else not page.exists()


HEADER = "# What it is.\n# Expected time: unknown\n# Expected numbers: unknown\n\n--seed=0\n"


@pytest.fixture
def timed(rows) -> Path:
    """The magnitude rows alone, with the records of two stages: 190, 250 and 310 s in all."""
    for name in ("small_dense", "small_attention"):
        shutil.rmtree(rows / name)
    for seed in range(3):
        folder = rows / f"small_magnitude_seed{seed}"
        made = json.loads((folder / "record.json").read_text())
        device = r"a \1 device" if seed else "another"
        (folder / "record.json").write_text(json.dumps(made | {"seconds": 10, "device": device}))
        (folder / "compress.json").write_text(json.dumps({"seconds": 180 + 60 * seed}))
    return rows


def test_headers_take_time_and_accuracies_of_the_rows(timed, tmp_path):
    flagfile = tmp_path / "small_magnitude.flags"
    flagfile.write_text(HEADER)
    for _ in range(2):
        assert report.main([str(timed), "--headers", str(tmp_path)]) == 0
        # 300, 304 and 310 of 400 images; the compressed ANN has 300 each time.
        assert flagfile.read_text().splitlines() == [
            "# What it is.",
            r"# Expected time: 4 min on a \1 device; another",
            "# Expected numbers: test accuracy 75.0 % compressed, 76.2 % SNN (mean of 3 seeds)",
            "",
            "--seed=0",
        ]


@pytest.mark.parametrize("text", [None, "--seed=0\n", HEADER + HEADER])
def test_flagfile_without_a_place_for_the_figures_is_named_and_left_alone(timed, tmp_path, capsys, text):
    put(timed, "first", record(answers(300), answers(340)) | {"seconds": 10, "device": "a device"})
    (tmp_path / "first.flags").write_text(HEADER)
    flagfile = tmp_path / "small_magnitude.flags"
    if text is not None:
        flagfile.write_text(text)
    assert report.main([str(timed), "--headers", str(tmp_path)]) == UserError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--headers={tmp_path}" in line and str(flagfile) in line
    assert text is None or flagfile.read_text() == text
    assert (tmp_path / "first.flags").read_text() == HEADER


@pytest.mark.parametrize("record", ["{}", "[]", '{"seconds": "long"}'])
def test_row_whose_time_is_unknown_is_named(timed, tmp_path, capsys, record):
    (tmp_path / "small_magnitude.flags").write_text(HEADER)
    (timed / "small_magnitude_seed1" / "compress.json").write_text(record)
    assert report.main([str(timed), "--headers", str(tmp_path)]) == UserError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert "small_magnitude_seed1" in line and "seconds" in line


@pytest.mark.parametrize("missing", ["device", "conventions", "spikes_per_neuron", "compressed_ann"])
def test_record_without_a_fact_is_named(timed, tmp_path, capsys, missing):
    (tmp_path / "small_magnitude.flags").write_text(HEADER)
    path = timed / "small_magnitude_seed0" / "record.json"
    made = json.loads(path.read_text())
    del made[missing]
    path.write_text(json.dumps(made))
    assert report.main([str(timed), "--headers", str(tmp_path)]) == UserError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert "row small_magnitude_seed0" in line and missing in line


def test_page_compares_masks_with_magnitude_all_else_equal(rows):
    put(rows, "wide", record(answers(300), answers(340), width=2.0))
    comparison.write(rows)
    page = (rows / "README.md").read_text()
    heading, *table = lines_of(page, "Against `small_magnitude` (magnitude)")
    assert [line[0] for line in table] == ["`small_attention`"]
    cells = dict(zip(heading, table[0], strict=True))
    assert cells["SNN"].startswith("+2.00 [") and cells["MACs kept"] == "+0.000"


def test_page_gives_energy_in_every_convention_and_model(rows):
    comparison.write(rows)
    heading, first, *_ = lines_of((rows / "README.md").read_text(), "Energy")
    *counted, updated = heading[1:]
    assert counted == [
        f"padded, {variant}, {model}"
        for variant in ("default", "image_every_step")
        for model in ("fp32_45nm", "int32_45nm")
    ]
    assert updated == "padded, default, fp32_45nm, with neuron updates"
    # The last: 8 µJ over 1 µJ and 100,000 updates of 4.6 pJ.
    assert first[1:] == ["8.0×", "8.0×", "4.0×", "4.0×", "5.5×"]


def test_page_says_what_is_left_of_an_advantage_where_zeros_of_anns_cost_nothing(tmp_path):
    for counts, name in ((False, "a"), (True, "counted")):
        made = with_zeros_counted(
            record(answers(300), answers(340), score_decay=0.5 + counts / 4), 0.5, 0.25
        )
        if not counts:
            del made["dense_ann"]["conventions"]["padded"]["variants"]["zeros_skipped"]
        put(tmp_path, name, made)
    comparison.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    _, *table = lines_of(page, "Energy where the zeros of an ANN cost nothing either")
    # Shares; 4 and 0.5 µJ over the SNN's 1; 0.5 over its 3; 2, with zeros, over 1.
    assert table == [["`counted`", "0.50", "0.25", "4.0×", "0.5×", "0.2×", "2.0×"]]


def test_plots_are_pictures(rows):
    comparison.write(rows)
    for name in ("compression", "energy"):
        picture = matplotlib.image.imread(rows / f"accuracy_{name}.png")
        assert min(picture.shape[:2]) > 400 and picture[..., :3].std() > 0.02
    assert "](accuracy_energy.png)" in (rows / "README.md").read_text()


def plotted(groups, rows, monkeypatch, costs=(7.0,)):
    """The figure that `plot` writes and closes; the groups' costs are taken in turn."""
    costs = itertools.cycle(costs)
    kept = []
    with monkeypatch.context() as patched:
        patched.setattr(comparison.pyplot, "close", kept.append)
        comparison.plot(groups, rows / "x.png", "label", lambda group: [next(costs)])
    comparison.pyplot.close(kept[0])
    return kept[0]


def test_plot_shows_mean_and_spread_by_group(rows, monkeypatch):
    (axes,) = plotted(results.read(rows), rows, monkeypatch).axes
    points = {c.get_label(): c[0].get_xydata()[0].tolist() for c in axes.containers}
    assert points["small_attention"] == [7.0, pytest.approx(77.0)]
    assert points["small_magnitude"] == [7.0, pytest.approx(100 * 914 / 1200)]
    assert axes.get_xlabel() == "label"


def test_plot_of_two_seeds_has_no_bars(tmp_path, monkeypatch):
    for seed in (0, 1):
        put(tmp_path, f"a_seed{seed}", record(answers(300 + 9 * seed), answers(340), seed))
    (axes,) = plotted(results.read(tmp_path), tmp_path, monkeypatch).axes
    assert not axes.containers[0].has_yerr


def test_row_older_than_a_setting_has_its_default(tmp_path):
    made = record(answers(300), answers(340), method="attention")
    for name in ("method", "density_schedule", "saliency", "activation_levels"):
        made["config"].pop(name, None)
    put(tmp_path, "old", made)
    (group,) = results.read(tmp_path)
    assert tables.masks_of(group) == "attention, cubic"
    assert group.config["method"] == Config.method


def test_rows_of_a_plot_look_different_and_its_legend_hides_none(rows, monkeypatch):
    row = results.read(rows)[0].rows[0]
    many = [results.Group([dataclasses.replace(row, name=f"row {n}")]) for n in range(25)]
    figure = plotted(many, rows, monkeypatch)
    (axes,), (legend,) = figure.axes, figure.legends
    looks = {(c[0].get_marker(), c[0].get_color()) for c in axes.containers}
    assert len(looks) == len(legend.get_texts()) == 25
    figure.canvas.draw()
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_row_with_dollars_in_its_name_is_plotted(rows, monkeypatch):
    row = dataclasses.replace(results.read(rows)[0].rows[0], name="$a_b_c$")
    figure = plotted([results.Group([row])], rows, monkeypatch)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$a_b_c$"]


@pytest.mark.parametrize("costs", [(0.55, 8.5), (33.0, 36.0), (7.0,), (120.0, 170.0)])
def test_plots_label_their_costs_with_plain_numbers_however_near_they_lie(rows, monkeypatch, costs):
    figure = plotted(results.read(rows), rows, monkeypatch, costs)
    (axes,) = figure.axes
    figure.canvas.draw()
    low, high = axes.get_xlim()
    labels = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    assert len([label for label in labels if low <= float(label.replace("−", "-")) <= high]) >= 3
    assert axes.get_xscale() == ("log" if costs == (0.55, 8.5) else "linear")


def test_plots_label_an_axis_of_less_than_a_decade_with_plain_numbers(rows, monkeypatch):
    (axes,) = plotted(results.read(rows), rows, monkeypatch, (0.55, 8.5)).axes
    axes.set_xlim(0.55, 8.5)
    axes.figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    assert [label for label in labels if 0.55 <= float(label) <= 8.5] == ["1", "2", "3", "5"]


def test_add_takes_the_records_of_an_evaluated_run(tmp_path, capsys):
    run_dir, folder = tmp_path / "runs" / "small_dense", tmp_path / "results"
    for stage in ("compress", "evaluate"):
        (run_dir / stage).mkdir(parents=True)
    text = json.dumps(record(answers(3), answers(4), data_dir="images", manual_dir="zips"))
    evaluated = json.loads(text)
    (run_dir / "evaluate" / "record.json").write_text(text)
    (run_dir / "compress" / "record.json").write_text("{}")
    assert report.main([str(folder), "--add", str(run_dir)]) == 0
    assert sorted(path.name for path in (folder / "small_dense").iterdir()) == [
        "compress.json",
        "record.json",
    ]
    taken = json.loads((folder / "small_dense" / "record.json").read_text())
    kept = {n: v for n, v in evaluated["config"].items() if n not in ("data_dir", "manual_dir")}
    assert taken == evaluated | {"config": kept}
    assert str(folder / "README.md") in capsys.readouterr().out


def test_add_of_a_damaged_record_is_refused_and_leaves_no_half_of_a_row(tmp_path, capsys):
    run_dir, folder = tmp_path / "runs" / "small_dense", tmp_path / "results"
    for stage in ("compress", "train_snn", "evaluate"):
        (run_dir / stage).mkdir(parents=True)
        (run_dir / stage / "record.json").write_text(json.dumps(record(answers(3), answers(4))))
    damaged = run_dir / "train_snn" / "record.json"
    for text in ("[]", '{"config": 3}'):
        damaged.write_text(text)
        assert report.main([str(folder), "--add", str(run_dir)]) == 1
        assert f"{damaged}: is not the record of a stage" in capsys.readouterr().err
        assert not (folder / "small_dense").exists()


@pytest.mark.parametrize("change", [{"density": 0.25}, {"seed": 1}])
def test_add_replaces_no_row_of_other_settings(tmp_path, change):
    run_dir, folder = tmp_path / "runs" / "dense", tmp_path / "results"
    put(run_dir, "evaluate", record(answers(3), answers(4), **change))
    put(folder, "dense", record(answers(3), answers(4)))
    before = (folder / "dense" / "record.json").read_bytes()
    (name,) = change
    with pytest.raises(UserError, match=f"the row dense has --{name}="):
        results.add(folder, [run_dir])
    assert (folder / "dense" / "record.json").read_bytes() == before
    put(tmp_path, "again", record(answers(5), answers(4), lif="native"))
    (tmp_path / "again" / "record.json").rename(run_dir / "evaluate" / "record.json")
    results.add(folder, [run_dir])
    assert (folder / "dense" / "record.json").read_bytes() != before


@pytest.mark.parametrize("fault", ["same name", "not evaluated"])
def test_add_of_several_runs_takes_all_or_none(tmp_path, capsys, fault):
    folder, runs = tmp_path / "results", [tmp_path / "a" / "seed0", tmp_path / "b" / "seed1"]
    put(runs[0], "evaluate", record(answers(3), answers(4)))
    put(runs[1], "evaluate", record(answers(3), answers(4), seed=1))
    words = [str(folder), "--add", *map(str, runs)]
    if fault == "same name":
        runs[1].rename(tmp_path / "b" / "seed0")
        words[-1] = str(tmp_path / "b" / "seed0")
        said = f"{runs[0]} and {words[-1]} would both be the row seed0"
    else:
        (runs[1] / "evaluate" / "record.json").unlink()
        said = f"{runs[1]}: has no evaluate/record.json"
    assert report.main(words) == 1
    assert said in capsys.readouterr().err
    assert not folder.exists()


def test_add_takes_no_evaluation_of_an_older_training(tmp_path):
    run_dir, folder = tmp_path / "runs" / "row", tmp_path / "results"
    made = record(answers(3), answers(4))
    put(run_dir, "evaluate", made)
    put(run_dir, "train_snn", made | {"fingerprint": "new"})
    built_on = run_dir / "evaluate" / "stage.json"
    built_on.write_text(json.dumps({"upstream": "old"}))
    with pytest.raises(UserError, match=r"train_snn was run again after evaluate; run --stage=evaluate"):
        results.add(folder, [run_dir])
    assert not folder.exists()
    built_on.write_text(json.dumps({"upstream": "new"}))
    assert results.add(folder, [run_dir]) == [folder / "row"]


def test_add_leaves_nothing_of_stages_that_the_run_no_longer_has(tmp_path):
    run_dir, folder = tmp_path / "runs" / "row", tmp_path / "results"
    made = record(answers(3), answers(4))
    for stage in ("train_ann", "evaluate"):
        put(run_dir, stage, made | {"seconds": 7})
    results.add(folder, [run_dir])
    shutil.rmtree(run_dir / "train_ann")
    results.add(folder, [run_dir])
    assert [path.name for path in (folder / "row").iterdir()] == ["record.json"]


@pytest.mark.parametrize("seeds", [(0, 0), (1, 2, 1)])
def test_seed_counts_once(tmp_path, seeds):
    for number, seed in enumerate(seeds):
        put(
            tmp_path,
            f"row{number}",
            record(answers(300), answers(340), seed, meta_model=f"dense/{number}"),
        )
    said = f"row0 and row{len(seeds) - 1} have the same settings and seed"
    with pytest.raises(UserError, match=said):
        results.read(tmp_path)


@pytest.mark.parametrize("change", [{"correct": "zz"}, {"correct": None}, {"num_examples": 8}])
def test_answers_that_cannot_be_compared_are_one_line(rows, capsys, change):
    path = rows / "small_attention" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert report.main([str(rows)]) == UserError.exit_code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "images" in line


@pytest.mark.parametrize("case", ["empty", "damaged", "no record", "not evaluated", "not to be written"])
def test_what_cannot_be_reported_is_one_line(tmp_path, case):
    words = [str(tmp_path)]
    if case == "damaged":
        put(tmp_path, "row", {})
        (tmp_path / "row" / "record.json").write_text("{")
    if case == "no record":
        put(tmp_path, "row", {"config": {}})
    if case == "not to be written":
        put(tmp_path, "row", record(answers(3), answers(4)))
        (tmp_path / "README.md").mkdir()
    if case == "not evaluated":
        words += ["--add", str(tmp_path / "run")]
    command = [sys.executable, "-m", "snn_tf.report", *words]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == UserError.exit_code
    (line,) = said.stderr.strip().splitlines()
    assert line.startswith(f"snn_tf.report: {tmp_path}")
