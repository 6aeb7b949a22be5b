"""The table and the figure that are made of a record."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from snn_tf import costs, operations, report

T = 4


def facts(accuracy, density, macs, acs, energy, **rest):
    return {
        "test_accuracy": accuracy,
        "density": density,
        "compression": 1 / density,
        "macs": macs,
        "acs": acs,
        "energy_pj": {"fp32_45nm": energy, "int32_45nm": -1.0},
        **rest,
    }


def record():
    """Hand-made: each column of each row has a value of its own."""
    snn = facts(0.87654, 0.04, 1_250, 2_345_678.9, 250_000.0, spikes_per_neuron=1.23456)
    return snn | {
        "timesteps": T,
        "dense_ann": facts(0.91, 1.0, 3.384e8, 0, 5_000_000.0),
        "compressed_ann": facts(0.9, 0.05, 12_340_000, 0, 1_000_000.0),
        "converted_snn": facts(0.5, 0.05, 999, 2.5e9, 500_000.0, spikes_per_neuron=0.5, timesteps=2),
    }


EXPECTED = [
    ["train_ann: dense ANN", "91.00 %", "1.0000", "1.0×", "338.40 M", "0", "5.000 µJ", "1.0×"],
    ["compress: ANN", "90.00 %", "0.0500", "20.0×", "12.34 M", "0", "1.000 µJ", "5.0×"],
    [
        "convert: SNN, T = 2",
        *("50.00 %", "0.0500", "20.0×", "0.500", "999", "2.50 G", "0.500 µJ", "10.0×"),
    ],
    [
        f"train_snn: SNN, T = {T}",
        *("87.65 %", "0.0400", "25.0×", "1.235", "1.25 k", "2.35 M", "0.250 µJ", "20.0×"),
    ],
]


def cells(line):
    return [cell for cell in line.split("  ") if cell]


def test_summary_gives_the_records_values_row_by_row():
    heading, rule, *rows = report.summary(record()).splitlines()
    assert [[cell.strip() for cell in cells(row)] for row in rows] == EXPECTED
    columns = "network, test accuracy, density, compression, spikes/neuron, MACs, ACs, energy, ratio"
    assert [cell.strip() for cell in cells(heading)] == columns.split(", ")
    assert set(rule) == {"─"}


def test_summary_lines_up_under_its_heading():
    lines = report.summary(record()).splitlines()
    assert len(set(map(len, lines))) == 1
    for column in ("density", "MACs", "ratio"):
        end = lines[0].index(column) + len(column)
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for line in lines[2:])


def test_networks_come_in_the_pipelines_order():
    made = record()
    found = report.networks(made)
    assert [label.split(":")[0] for label, _ in found] == [
        "train_ann",
        "compress",
        "convert",
        "train_snn",
    ]
    assert found[0][1] is made["dense_ann"] and found[3][1] is made


# --- figure


def measured(density, spiking, rate=0.25):
    """What `evaluate` writes of a network: its costs, and accuracy."""
    rng = np.random.default_rng(0)
    layers = [
        operations.Synapses(
            "conv1", rng.random((3, 3, 3, 8)) < density, (8, 8, 3), (8, 8, 8), source="image"
        ),
        operations.Synapses(
            "conv2", rng.random((3, 3, 8, 8)) < density, (4, 4, 8), (4, 4, 8), source="pooled"
        ),
        operations.Synapses("logits", rng.random((128, 10)) < density, (128,), (10,)),
    ]
    if not spiking:
        return costs.ann_costs(layers) | {"test_accuracy": 0.9}
    activities = {
        s.name: operations.Activity(np.full(s.input_shape, T * rate), np.full(s.input_shape, T * rate))
        for s in layers[1:]
    }
    return costs.snn_costs(layers, activities, T, 640) | {"test_accuracy": 0.8}


def evaluated(rate=0.25):
    neurons = [("conv1_neuron", rate), ("conv2_neuron", rate / 2)]
    return measured(0.3, True, rate) | {
        "timesteps": T,
        "config": {"network": "vgg5", "dataset": "digits"},
        "neurons": [{"name": name, "spike_rate": value} for name, value in neurons],
        "dense_ann": measured(2.0, False),
    }


def drawn(made, path, monkeypatch):
    """The figure as an object, after it was written."""
    kept = []
    with monkeypatch.context() as patched:
        patched.setattr(report.pyplot, "close", kept.append)
        report.figure(made, path)
    (figure,) = kept
    report.pyplot.close(figure)
    return figure


def heights(axes, label=None):
    containers = [c for c in axes.containers if label is None or c.get_label() == label]
    (container,) = containers
    return [bar.get_height() for bar in container]


def test_figure_is_a_png_of_some_size(tmp_path):
    report.figure(evaluated(), tmp_path / ".writing-layers.png")
    written = (tmp_path / ".writing-layers.png").read_bytes()
    assert written.startswith(b"\x89PNG\r\n\x1a\n") and len(written) > 10_000
    picture = matplotlib.image.imread(tmp_path / ".writing-layers.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.05
    assert not report.pyplot.get_fignums()


def test_figure_shows_density_spike_rate_and_energy_by_layer(tmp_path, monkeypatch):
    made = evaluated()
    figure = drawn(made, tmp_path / "layers.png", monkeypatch)
    density, rate, energy = figure.axes
    assert [axes.get_ylabel().split(" ")[0] for axes in figure.axes] == ["density", "spike", "energy"]
    assert heights(density) == [layer["density"] for layer in made["layers"]]
    assert heights(rate) == [0.25, 0.125, 0.0]
    for label, rows in (("SNN", made["layers"]), ("dense ANN", made["dense_ann"]["layers"])):
        expected = [row["energy_pj"]["fp32_45nm"] / 1e6 for row in rows]
        assert heights(energy, label) == pytest.approx(expected, rel=1e-12)
    assert [tick.get_text() for tick in energy.get_xticklabels()] == ["conv1", "conv2", "logits"]
    assert (density.get_yscale(), rate.get_yscale(), energy.get_yscale()) == ("log", "linear", "log")


def test_figure_says_network_compression_and_accuracies(tmp_path, monkeypatch):
    made = evaluated()
    title = drawn(made, tmp_path / "layers.png", monkeypatch).get_suptitle()
    for part in ("vgg5 on digits", f"{made['compression']:.1f}× compression", f"T = {T}"):
        assert part in title
    assert "SNN 80.00 %, dense ANN 90.00 %" in title


def test_legend_of_the_figure_covers_no_bar(tmp_path, monkeypatch):
    figure = drawn(evaluated(), tmp_path / "layers.png", monkeypatch)
    figure.canvas.draw()
    energy = figure.axes[2]
    legend = energy.get_legend().get_window_extent()
    assert not any(bar.get_window_extent().overlaps(legend) for bar in energy.patches)
    assert not any(axes.get_window_extent().overlaps(legend) for axes in figure.axes[:2])


def test_figure_of_data_with_dollars_in_their_name_is_drawn(tmp_path):
    made = evaluated() | {"config": {"network": "vgg5", "dataset": "folder:/d/$a_b_c$"}}
    report.figure(made, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
def test_figure_of_a_network_that_never_fires_is_drawn(tmp_path):
    report.figure(evaluated(rate=0.0), tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_report_loads_no_tensorflow():
    code = "import sys, snn_tf.report; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "matplotlib" in loaded
    assert not loaded & {"tensorflow", "tf_keras", "keras", "tensorflow_model_optimization"}
