"""Records as tables and figures. Loads no TensorFlow.

`python -m snn_tf.report results/mine` writes the table and the plots of all rows in a folder; with
`--add RUN_DIR` it first takes the records of evaluated runs into it, as rows of their folders' names;
what differs in the seed alone is one row of the table, named without `_seed0`. `--into README.md` writes
a short table between that page's lines `<!-- rows: mine -->` and `<!-- end of rows -->`. `--headers
flags` writes each row's time and accuracies into the flagfile of its name, which has comments that begin
with `# Expected time: ` and `# Expected numbers: `.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from snn_tf import comparison, results, tables
from snn_tf.errors import UserError

_COLUMNS = (
    "network",
    "test accuracy",
    "density",
    "compression",
    "spikes/neuron",
    "MACs",
    "ACs",
    "energy",
    "ratio",
)


def summary(record: Mapping[str, Any]) -> str:
    """The table of an evaluation's record: one row per network, from the dense ANN to the SNN.

    Energy is per image under `fp32_45nm`; ratio is the dense ANN's energy over the row's.
    """
    rows = [_COLUMNS]
    reference = record["dense_ann"]["energy_pj"][tables.ENERGY_MODEL]
    for label, facts in networks(record):
        energy = facts["energy_pj"][tables.ENERGY_MODEL]
        spikes = facts.get("spikes_per_neuron")
        rows.append(
            (
                label,
                f"{100 * facts['test_accuracy']:.2f} %",
                f"{facts['density']:.4f}",
                f"{facts['compression']:.1f}×",
                "" if spikes is None else f"{spikes:.3f}",
                _count(facts["macs"]),
                _count(facts["acs"]),
                f"{energy / 1e6:.3f} µJ",
                f"{reference / energy:.1f}×",
            )
        )
    return _aligned(rows)


def networks(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The networks of an evaluation's record with their labels, in the pipeline's order."""
    converted = record["converted_snn"]
    return [
        ("train_ann: dense ANN", record["dense_ann"]),
        ("compress: ANN", record["compressed_ann"]),
        (f"convert: SNN, T = {converted['timesteps']}", converted),
        (f"train_snn: SNN, T = {record['timesteps']}", record),
    ]


def _count(number: float) -> str:
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.2f}{suffix}"
    return f"{number:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if index == 0 else cell.rjust(w)
            for index, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def figure(record: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws density, spike rate and energy per layer, beside the dense ANN's, as a PNG."""
    layers = record["layers"]
    names = [layer["name"] for layer in layers]
    places = range(len(names))
    drawing, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(max(6.0, 0.55 * len(names) + 2.0), 7.5), sharex=True, layout="constrained"
    )
    top.bar(places, [layer["density"] for layer in layers], color="tab:blue")
    top.set(yscale="log", ylabel="density (kept weights)")
    rates = {
        neuron["name"].removesuffix("_neuron"): neuron["spike_rate"] for neuron in record["neurons"]
    }
    middle.bar(places, [rates.get(name, 0.0) for name in names], color="tab:green")
    middle.set(ylabel="spike rate per step")
    _energy_bars(bottom, record)
    bottom.set_xticks(places, names, rotation=60, ha="right")
    snn, dense = 100 * record["test_accuracy"], 100 * record["dense_ann"]["test_accuracy"]
    title = (
        f"{record['config']['network']} on {record['config']['dataset']}: "
        f"{record['compression']:.1f}× compression, T = {record['timesteps']}\n"
        f"SNN {snn:.2f} %, dense ANN {dense:.2f} %"
    )
    drawing.suptitle(title, parse_math=False)
    drawing.savefig(path, dpi=120, format="png")
    pyplot.close(drawing)


def _energy_bars(axes: Any, record: Mapping[str, Any]) -> None:
    pairs = (("dense ANN", record["dense_ann"], -0.2, "0.7"), ("SNN", record, 0.2, "tab:red"))
    for label, facts, shift, colour in pairs:
        energies = [layer["energy_pj"][tables.ENERGY_MODEL] / 1e6 for layer in facts["layers"]]
        axes.bar(
            [place + shift for place in range(len(energies))], energies, 0.4, label=label, color=colour
        )
    axes.set(yscale="log", ylabel=f"energy per image (µJ)\n{tables.ENERGY_MODEL}")
    # Above the bars, none of which it then covers.
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(pairs), frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `python -m snn_tf.report`; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m snn_tf.report", description=__doc__)
    parser.add_argument("results", type=pathlib.Path, help="folder of rows, such as results/mine")
    parser.add_argument(
        "--add", type=pathlib.Path, nargs="+", default=[], metavar="RUN_DIR", help="evaluated runs"
    )
    parser.add_argument(
        "--into", type=pathlib.Path, metavar="FILE", help="a page that holds a short table of the rows"
    )
    parser.add_argument(
        "--headers", type=pathlib.Path, metavar="FOLDER", help="flagfiles named after the rows"
    )
    given = parser.parse_args(argv)
    try:
        for row in results.add(given.results, given.add):
            print(row)
        for path in comparison.write(given.results):
            print(path)
        if given.into:
            comparison.put_table(given.into, given.results)
            print(given.into)
        if given.headers:
            for path in comparison.put_headers(given.headers, given.results):
                print(path)
    except UserError as error:
        print(f"snn_tf.report: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
