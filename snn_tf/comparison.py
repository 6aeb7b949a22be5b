"""Pages and plots of many experiments, from their records: nothing in them is typed by hand."""

import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, rcsetup, ticker

from snn_tf import files
from snn_tf.errors import UserError, first_line
from snn_tf.results import COMPRESSED, FEW, SNN, Group, read, seconds
from snn_tf.tables import (
    comparisons,
    devices,
    energies,
    microjoules,
    table,
    zeros_skipped,
)

_BRIEF = (
    "row",
    "compression",
    "T",
    "seeds",
    "dense ANN",
    "compressed ANN",
    "SNN",
    "SNN − dense SNN",
    "spikes/neuron",
    "energy ratio",
)
_OF_ALL = ("dataset", "network", "width", "head", "batch_norm", "batch_size")
# Ten colours of a marker, then those of the next: rows that share one differ in the other.
_MARKS = rcsetup.cycler(marker=list("os^Dv*")) * matplotlib.rcParamsDefault["axes.prop_cycle"]
_WIDE = 5.0  # a logarithmic axis of less may have no tick to read it by
_NOTES = """
Written by `python -m snn_tf.report`; each row is a folder here with the records of its stages, and is
made by the flagfile of its name. Accuracies are on the whole test split, in %. Over three
seeds or more: mean ± standard deviation. With fewer, a difference has the 95 % interval of the paired
difference over the same test images. Differences are in points. Spikes per neuron are per image, over
all time steps. Energy is per image (`fp32_45nm`), without memory and the neurons' own updates; its ratio
is that of the dense ANN to the SNN, or, where it says so, to the compressed ANN. Of the same seed, one
dense network is another's only where their accuracies are equal: on another processor training gives
another network, and differences between such rows include that. What stands under *masks* are values of
`--method`, `--saliency`, `--density_schedule`, `--structure`, `--macs_exponent` and `--student_start`; β
is `--attention`. Epochs are those of the dense ANN, the compression and the SNN; after a +, beyond those
of the SNN that the row began with (`--snn_start`). The columns of the energy table are explained in
`snn_tf/costs.py`. An ANN is charged for every tap, the zeros of its activations included, but in the
table that says otherwise.
"""


def write(results: pathlib.Path) -> list[pathlib.Path]:
    """Writes README.md and the plots into a folder of rows; returns what was written.

    Raises:
      UserError: there is no row, a record cannot be read, or a file cannot be written.
    """
    groups = read(results)
    page, plots = results / "README.md", ("compression", "energy")
    pictures = "\n\n".join(f"![Accuracy against {name}](accuracy_{name}.png)" for name in plots)
    rows = "## All rows\n\n" + table(groups)
    title = f"# Results: {results.resolve().name}"
    notes = "\n\n".join(note.strip() for note in (_shared(groups), _NOTES) if note)
    costs = (energies(groups), zeros_skipped(groups))
    parts = [title, notes, rows, comparisons(groups), *costs, pictures]
    files.write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    paths = [results / f"accuracy_{name}.png" for name in plots]
    plot(groups, paths[0], "compression", lambda group: group.values(SNN, "compression"))
    plot(groups, paths[1], "energy per image (µJ)", microjoules)
    return [page, *paths]


def _shared(groups: Sequence[Group]) -> str:
    """What all rows were trained on, as flags; empty if they share nothing of it."""
    first = groups[0].config
    same = [name for name in _OF_ALL if len({group.config[name] for group in groups}) == 1]
    flags = " ".join(f"--{name}={first[name]}" for name in same)
    return f"All rows: `{flags}`." if same else ""


def put_table(page: pathlib.Path, results: pathlib.Path) -> None:
    """Replaces what stands between `<!-- rows: NAME -->` and `<!-- end of rows -->` by a short table.

    Args:
      page: a text file, such as the project's README.md.
      results: a folder of rows; NAME is its own.

    Raises:
      UserError: there is no row, a record or `page` cannot be read, `page` lacks the two lines or cannot
        be written.
    """
    begin, end = f"<!-- rows: {results.resolve().name} -->\n", "<!-- end of rows -->"
    groups = read(results)
    before, found, rest = _text(page, f"--into={page}").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"--into={page}: has no lines {begin.strip()} and {end} to write between")
    files.write_text(page, "".join((before, begin, "\n", table(groups, _BRIEF), "\n\n", end, after)))


def put_headers(flags: pathlib.Path, results: pathlib.Path) -> list[pathlib.Path]:
    """Writes each row's time and accuracies into the header of the flagfile of its name.

    Nothing is written if one of the flagfiles has no place for them.

    Args:
      flags: a folder of flagfiles with lines `# Expected time: ...` and `# Expected numbers: ...`.
      results: a folder of rows.

    Returns:
      The flagfiles of the rows.

    Raises:
      UserError: there is no row, a record or a flagfile cannot be read, a flagfile lacks one of the
        lines or cannot be written.
    """
    written = {}
    for group in read(results):
        path = flags / f"{group.name}.flags"
        text = _text(path, f"--headers={flags}: {path}")
        for key, value in (("time", _time(group, results)), ("numbers", _accuracies(group))):
            start = f"# Expected {key}: "
            places = [line for line in text.splitlines() if line.startswith(start)]
            if len(places) != 1:
                raise UserError(f"--headers={flags}: {path} must have one line {start}...")
            text = text.replace(places[0], start + value)
        written[path] = text
    for path, text in written.items():
        files.write_text(path, text)
    return list(written)


def _text(path: pathlib.Path, named: str) -> str:
    """A text file; an error begins with `named`."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{named}: could not be read: {first_line(error)}") from error


def _time(group: Group, results: pathlib.Path) -> str:
    minutes = statistics.mean(seconds(results, row) for row in group.rows) / 60
    return f"{minutes:.0f} min on {devices(group)}"


def _accuracies(group: Group) -> str:
    ann, snn = (100 * statistics.mean(group.values(w, "test_accuracy")) for w in (COMPRESSED, SNN))
    seeds = f"mean of {len(group.rows)} seeds" if len(group.rows) > 1 else f"seed {group.rows[0].seed}"
    kind = "dense" if group.config["method"] == "dense" else "compressed"
    return f"test accuracy {ann:.1f} % {kind}, {snn:.1f} % SNN ({seeds})"


def plot(
    groups: Sequence[Group], path: pathlib.Path, label: str, values: Callable[[Group], list[float]]
) -> None:
    """Test accuracy of the SNNs against a cost, as a PNG.

    Bars are standard deviations over three seeds or more.
    """
    drawing, axes = pyplot.subplots(figsize=(10.0, 5.5), layout="constrained")
    costs = [statistics.mean(values(group)) for group in groups]
    for group, cost, mark in zip(groups, costs, itertools.cycle(_MARKS), strict=False):
        accuracies = [100 * value for value in group.values(SNN, "test_accuracy")]
        spread = statistics.stdev(accuracies) if len(accuracies) > FEW else None
        axes.errorbar(
            cost,
            statistics.mean(accuracies),
            spread,
            linestyle="none",
            label=group.name,
            **mark,
        )
    axes.set(xlabel=label, ylabel="test accuracy of the SNN (%)")
    if max(costs) > _WIDE * min(costs):
        axes.set(xscale="log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    for text in drawing.legend(loc="outside right upper", fontsize="x-small").get_texts():
        text.set_parse_math(False)
    with files.replacing(path) as beside:
        drawing.savefig(beside, dpi=120, format="png")
    pyplot.close(drawing)
