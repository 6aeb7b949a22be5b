"""Tables and plots of many experiments, from their records: nothing in them is typed by hand."""

import functools
import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, rcsetup, ticker

from snn_tf import files
from snn_tf.config import PUBLISHED_SCHEDULES, Config
from snn_tf.costs import ENERGY
from snn_tf.errors import UserError, first_line
from snn_tf.results import (
    Difference,
    Group,
    dense_counterpart,
    difference,
    read,
    same_but_for_masks,
    seconds,
)

ENERGY_MODEL = "fp32_45nm"
_SNN, _DENSE, _COMPRESSED = "trained_snn", "dense_ann", "compressed_ann"
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
# Ten colours of a marker, then those of the next: rows that share one differ in the other.
_MARKS = rcsetup.cycler(marker=list("os^Dv*")) * matplotlib.rcParamsDefault["axes.prop_cycle"]
_NOTES = """
Written by `python -m snn_tf.report`; each row is a folder here with the records of its stages, and is
made by the flagfile of its name. Accuracies are on the whole test split, read once, in %. Over three
seeds or more: mean ± standard deviation. With fewer, a difference has the 95 % interval of the paired
difference over the same test images. Differences are in points. Spikes per neuron are per image, over
all time steps. Energy is per image (`fp32_45nm`), without memory and the neurons' own updates; its ratio
is that of the dense ANN to the SNN, or, where it says so, to the compressed ANN. A seed's dense network
is another one on another device, so differences between rows of different devices include that.
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
    parts = ["# Results", _NOTES.strip(), rows, comparisons(groups), energies(groups), pictures]
    files.write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    paths = [results / f"accuracy_{name}.png" for name in plots]
    plot(groups, paths[0], "compression", lambda group: group.values(_SNN, "compression"))
    plot(groups, paths[1], "energy per image (µJ)", _microjoules)
    return [page, *paths]


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
    return f"{minutes:.0f} min on {group.values(_SNN, 'device')[0]}"


def _accuracies(group: Group) -> str:
    ann, snn = (100 * statistics.mean(group.values(w, "test_accuracy")) for w in (_COMPRESSED, _SNN))
    seeds = f"mean of {len(group.rows)} seeds" if len(group.rows) > 1 else f"seed {group.rows[0].seed}"
    kind = "dense" if group.config["method"] == "dense" else "compressed"
    return f"test accuracy {ann:.1f} % {kind}, {snn:.1f} % SNN ({seeds})"


def table(groups: Sequence[Group], names: Sequence[str] | None = None) -> str:
    """One line for each group: accuracies, what they lose, and what they cost.

    Args:
      groups: the lines.
      names: the columns; all if None.
    """
    columns = _columns(groups)
    return _markdown({name: columns[name] for name in names or columns}, groups)


def _columns(groups: Sequence[Group]) -> dict[str, Callable[[Group], str]]:
    return {
        "row": lambda group: f"`{group.name}`",
        "masks": masks_of,
        "density": lambda group: _shown(group.values(_SNN, "density"), "{:.4f}"),
        "compression": lambda group: _shown(group.values(_SNN, "compression"), "{:.1f}×"),
        "T": lambda group: str(group.config["timesteps"]),
        "seeds": lambda group: str(len(group.rows)),
        "dense ANN": lambda group: _percent(group, _DENSE),
        "compressed ANN": lambda group: _percent(group, _COMPRESSED),
        "SNN": lambda group: _percent(group, _SNN),
        "SNN − compressed ANN": lambda group: _points(difference(group, _SNN, group, _COMPRESSED)),
        "SNN − dense ANN": lambda group: _points(difference(group, _SNN, group, _DENSE)),
        "SNN − dense SNN": lambda group: _points(_against_dense_snn(group, groups)),
        "MACs kept": lambda group: _shown(group.values(_COMPRESSED, "mac_density"), "{:.3f}"),
        "spikes/neuron": lambda group: _shown(group.values(_SNN, "spikes_per_neuron"), "{:.3f}"),
        "energy ratio, ANN": lambda group: _times_less(group, _energies(group, _COMPRESSED)),
        "energy (µJ)": lambda group: _shown(_microjoules(group), "{:.2f}"),
        "energy ratio": lambda group: _times_less(group, _energies(group, _SNN)),
        "device": lambda group: "; ".join(sorted(set(group.values(_SNN, "device")))),
    }


def comparisons(groups: Sequence[Group]) -> str:
    """Each group against global magnitude with the same network, data, lengths and density."""
    sections = []
    for reference in groups:
        if reference.config["method"] != "magnitude":
            continue
        shared = same_but_for_masks(reference)
        others = [
            group
            for group in groups
            if same_but_for_masks(group) == shared and group.config["method"] != "dense"
        ]
        if len(others) > 1:
            sections.append(_comparison(reference, [g for g in others if g is not reference]))
    return "\n\n".join(sections)


def _comparison(reference: Group, others: Sequence[Group]) -> str:
    def kept(group: Group) -> str:
        shares = group.values(_COMPRESSED, "mac_density"), reference.values(_COMPRESSED, "mac_density")
        return f"{statistics.mean(shares[0]) - statistics.mean(shares[1]):+.3f}"

    columns = {
        "row": lambda group: f"`{group.name}`",
        "masks": masks_of,
        "compressed ANN": lambda g: _points(difference(g, _COMPRESSED, reference, _COMPRESSED)),
        "SNN": lambda g: _points(difference(g, _SNN, reference, _SNN)),
        "MACs kept": kept,
    }
    return f"## Against `{reference.name}` ({masks_of(reference)})\n\n" + _markdown(columns, others)


def energies(groups: Sequence[Group]) -> str:
    """The dense ANN's energy over the SNN's in every convention, variant and energy model.

    The last column adds a multiply-accumulate for every neuron's update to the first one's energy.
    """
    conventions = groups[0].values(_SNN, "conventions")[0]
    columns: dict[str, Callable[[Group], str]] = {"row": lambda group: f"`{group.name}`"}
    for convention, facts in conventions.items():
        for variant, counts in facts["variants"].items():
            for model in counts["energy_pj"]:
                key = (convention, variant, model)
                columns[", ".join(key)] = functools.partial(_ratio_shown, key)
    updated = f"padded, default, {ENERGY_MODEL}, with neuron updates"
    columns[updated] = lambda group: _times_less(group, _updated_energies(group))
    return "## Energy of the dense ANN over that of the SNN\n\n" + _markdown(columns, groups)


def masks_of(group: Group) -> str:
    """Where a group's masks come from, and what its student trained with, in words."""
    config = group.config
    if config["method"] == "dense":
        return "dense"
    words = [config["method"]]
    words += [] if config["attention"] == Config.attention else [f"β = {config['attention']:g}"]
    if config["method"] == "attention":
        saliency = config.get("saliency", "layer_magnitude")
        words += [] if saliency == "layer_magnitude" else [saliency]
    words += ["from the meta-model"] if config.get("student_start") == "meta_model" else []
    schedule = config.get("density_schedule", "auto")
    words += [] if schedule in ("auto", PUBLISHED_SCHEDULES[config["method"]]) else [schedule]
    words += ["channels"] if config["structure"] == "channel" else []
    words += ["by MACs"] if config["budget"] == "macs" else []
    words += [f"MACs^{config['macs_exponent']:g}"] if config.get("macs_exponent") else []
    words += ["dense ends"] if config.get("dense_ends") else []
    levels = config.get("activation_levels")
    words += [f"{levels} levels"] if levels else []
    return ", ".join(words)


def plot(
    groups: Sequence[Group], path: pathlib.Path, label: str, values: Callable[[Group], list[float]]
) -> None:
    """Test accuracy of the SNNs against a cost, as a PNG; bars are standard deviations over seeds."""
    drawing, axes = pyplot.subplots(figsize=(10.0, 5.5), layout="constrained")
    for group, mark in zip(groups, itertools.cycle(_MARKS), strict=False):
        accuracies = [100 * value for value in group.values(_SNN, "test_accuracy")]
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        axes.errorbar(
            statistics.mean(values(group)),
            statistics.mean(accuracies),
            spread,
            linestyle="none",
            label=group.name,
            **mark,
        )
    axes.set(xscale="log", xlabel=label, ylabel="test accuracy of the SNN (%)")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    drawing.legend(loc="outside right upper", fontsize="x-small")
    with files.replacing(path) as beside:
        drawing.savefig(beside, dpi=120, format="png")
    pyplot.close(drawing)


def _markdown(columns: dict[str, Callable[[Group], str]], groups: Sequence[Group]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(group) for cell in columns.values()] for group in groups]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _shown(values: Sequence[float], form: str) -> str:
    """The mean, with the standard deviation over three seeds or more if it shows."""
    shown = form.format(statistics.mean(values))
    if len(values) > 2 and (deviation := form.format(statistics.stdev(values))) != form.format(0):
        return f"{shown} ± {deviation}"
    return shown


def _percent(group: Group, which: str) -> str:
    return _shown([100 * value for value in group.values(which, "test_accuracy")], "{:.2f}")


def _points(found: Difference | None) -> str:
    if found is None:
        return ""
    mean = f"{100 * found.mean:+.2f}"
    if found.interval:
        low, high = (100 * bound for bound in found.interval)
        return f"{mean} [{low:+.2f}, {high:+.2f}]"
    return f"{mean} ± {100 * (found.deviation or 0.0):.2f}"


def _against_dense_snn(group: Group, groups: Sequence[Group]) -> Difference | None:
    dense = dense_counterpart(group, groups)
    return None if dense is None or dense is group else difference(group, _SNN, dense, _SNN)


def _microjoules(group: Group) -> list[float]:
    return [energy / 1e6 for energy in _energies(group, _SNN)]


def _energies(group: Group, which: str) -> list[float]:
    return group.values(which, "energy_pj", ENERGY_MODEL)


def _updated_energies(group: Group) -> list[float]:
    """Those of the SNN with a multiply-accumulate for every update of a neuron."""
    counts = group.values(_SNN, "neuron_updates")
    updates = [ENERGY[ENERGY_MODEL].mac_pj * count for count in counts]
    return [one + two for one, two in zip(_energies(group, _SNN), updates, strict=True)]


def _times_less(group: Group, energies: Sequence[float]) -> str:
    """The dense ANN's energy over these."""
    return _quotients(_energies(group, _DENSE), energies)


def _ratio_shown(key: tuple[str, str, str], group: Group) -> str:
    """The same over the SNN's, in a convention, a variant of it and an energy model."""
    convention, variant, model = key
    dense, spiking = (
        group.values(which, "conventions", convention, "variants", variant_of, "energy_pj", model)
        for which, variant_of in ((_DENSE, "default"), (_SNN, variant))
    )
    return _quotients(dense, spiking)


def _quotients(ones: Sequence[float], others: Sequence[float]) -> str:
    return _shown([one / other for one, other in zip(ones, others, strict=True)], "{:.1f}×")
