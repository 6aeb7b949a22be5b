"""Rows of records as Markdown tables: accuracies, differences, costs."""

import functools
import statistics
from collections.abc import Callable, Sequence

from snn_tf.config import PUBLISHED_SCHEDULES, Config
from snn_tf.costs import ENERGY
from snn_tf.errors import UserError
from snn_tf.results import (
    COMPRESSED,
    DENSE,
    FEW,
    SNN,
    Difference,
    Group,
    dense_counterpart,
    difference,
    same_but_for_masks,
)

ENERGY_MODEL = "fp32_45nm"
# The variant that charges an SNN as `zeros_skipped` charges an ANN.
_NEUROBENCH = "image_every_step_pooled_as_macs"


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
        "epochs": _epochs,
        "density": lambda group: _shown(group.values(SNN, "density"), "{:.4f}"),
        "compression": lambda group: _shown(group.values(SNN, "compression"), "{:.1f}×"),
        "T": lambda group: str(group.config["timesteps"]),
        "seeds": lambda group: str(len(group.rows)),
        "dense ANN": lambda group: _percent(group, DENSE),
        "compressed ANN": lambda group: _percent(group, COMPRESSED),
        "SNN": lambda group: _percent(group, SNN),
        "SNN − compressed ANN": lambda group: _points(difference(group, SNN, group, COMPRESSED)),
        "SNN − dense ANN": lambda group: _points(difference(group, SNN, group, DENSE)),
        "SNN − dense SNN": lambda group: _points(_against_dense_snn(group, groups)),
        "MACs kept": lambda group: _shown(group.values(COMPRESSED, "mac_density"), "{:.3f}"),
        "spikes/neuron": lambda group: _shown(group.values(SNN, "spikes_per_neuron"), "{:.3f}"),
        "energy ratio, ANN": lambda group: _times_less(group, _energies(group, COMPRESSED)),
        "energy (µJ)": lambda group: _shown(microjoules(group), "{:.2f}"),
        "energy ratio": lambda group: _times_less(group, _energies(group, SNN)),
        "device": devices,
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
        shares = group.values(COMPRESSED, "mac_density"), reference.values(COMPRESSED, "mac_density")
        return f"{statistics.mean(shares[0]) - statistics.mean(shares[1]):+.3f}"

    columns = {
        "row": lambda group: f"`{group.name}`",
        "masks": masks_of,
        "compressed ANN": lambda g: _points(difference(g, COMPRESSED, reference, COMPRESSED)),
        "SNN": lambda g: _points(difference(g, SNN, reference, SNN)),
        "MACs kept": kept,
    }
    return f"## Against `{reference.name}` ({masks_of(reference)})\n\n" + _markdown(columns, others)


def energies(groups: Sequence[Group]) -> str:
    """The dense ANN's energy over the SNN's in every convention, variant and energy model.

    The last column adds a multiply-accumulate for every neuron's update to the first one's energy.
    """
    conventions = groups[0].values(SNN, "conventions")[0]
    columns: dict[str, Callable[[Group], str]] = {"row": lambda group: f"`{group.name}`"}
    for convention, facts in conventions.items():
        for variant, counts in facts["variants"].items():
            for model in counts["energy_pj"]:
                key = (convention, variant, model)
                columns[", ".join(key)] = functools.partial(_ratio_shown, key)
    updated = f"padded, default, {ENERGY_MODEL}, with neuron updates"
    columns[updated] = lambda group: _times_less(group, _updated_energies(group))
    return "## Energy of the dense ANN over that of the SNN\n\n" + _markdown(columns, groups)


def zeros_skipped(groups: Sequence[Group]) -> str:
    """Energy where the zeros of an ANN's activations cost nothing either, as an SNN's silence does not.

    Groups whose records do not count them are left out; without any, the result is empty.
    """
    counted = [group for group in groups if _counts_zeros(group)]
    if not counted:
        return ""

    def share(which: str, group: Group) -> str:
        whole = _energies(group, which)
        parts = zip(_skipping(group, which), whole, strict=True)
        return _shown([part / all_of_it for part, all_of_it in parts], "{:.2f}")

    columns: dict[str, Callable[[Group], str]] = {
        "row": lambda group: f"`{group.name}`",
        "share left, dense ANN": functools.partial(share, DENSE),
        "share left, compressed ANN": functools.partial(share, COMPRESSED),
        "dense ANN over SNN": lambda g: _quotients(_skipping(g, DENSE), _energies(g, SNN)),
        "compressed ANN over SNN": lambda g: _quotients(_skipping(g, COMPRESSED), _energies(g, SNN)),
        "compressed ANN over SNN, NeuroBench's count": lambda g: _quotients(
            _skipping(g, COMPRESSED), _variant_energies(g, SNN, "padded", _NEUROBENCH, ENERGY_MODEL)
        ),
        "compressed ANN over SNN, no zeros skipped": lambda g: _quotients(
            _energies(g, COMPRESSED), _energies(g, SNN)
        ),
    }
    return "## Energy where the zeros of an ANN cost nothing either\n\n" + _markdown(columns, counted)


def masks_of(group: Group) -> str:
    """Where a group's masks come from, and what its student trained with, in words."""
    config = group.config
    if config["method"] == "dense":
        return "dense"
    words = [config["method"]]
    words += [] if config["attention"] == Config.attention else [f"β = {config['attention']:g}"]
    if config["method"] == "attention":
        saliency = config["saliency"]
        words += [] if saliency == Config.saliency else [saliency]
    words += ["from the meta-model"] if config["student_start"] == "meta_model" else []
    schedule = config["density_schedule"]
    words += [] if schedule in ("auto", PUBLISHED_SCHEDULES[config["method"]]) else [schedule]
    words += ["channels"] if config["structure"] == "channel" else []
    words += ["by MACs"] if config["budget"] == "macs" else []
    words += [f"MACs^{config['macs_exponent']:g}"] if config["macs_exponent"] else []
    words += ["dense ends"] if config["dense_ends"] else []
    levels = config["activation_levels"]
    words += [f"{levels} levels"] if levels else []
    return ", ".join(words)


def _epochs(group: Group) -> str:
    """How long a group's dense ANN, compression (0 where there is none) and SNN train."""
    config = group.config
    compression = 0 if config["method"] == "dense" else config["compress_epochs"]
    further = "+" if group.rows[0].continues else ""
    return f"{config['ann_epochs']}, {compression}, {further}{config['snn_epochs']}"


def _markdown(columns: dict[str, Callable[[Group], str]], groups: Sequence[Group]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[cell(group) for cell in columns.values()] for group in groups]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _shown(values: Sequence[float], form: str) -> str:
    """The mean, with the standard deviation over three seeds or more if it shows."""
    shown = form.format(statistics.mean(values))
    if len(values) > FEW and (deviation := form.format(statistics.stdev(values))) != form.format(0):
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
    return None if dense is None or dense is group else difference(group, SNN, dense, SNN)


def microjoules(group: Group) -> list[float]:
    """The SNN's energy per image in µJ under `ENERGY_MODEL`, for every seed.

    Raises:
      UserError: a record does not have it.
    """
    return [energy / 1e6 for energy in _energies(group, SNN)]


def devices(group: Group) -> str:
    """What evaluated a group's SNNs, and mostly trained them."""
    return "; ".join(sorted(set(group.values(SNN, "device"))))


def _energies(group: Group, which: str) -> list[float]:
    return group.values(which, "energy_pj", ENERGY_MODEL)


def _updated_energies(group: Group) -> list[float]:
    """Those of the SNN with a multiply-accumulate for every update of a neuron."""
    counts = group.values(SNN, "neuron_updates")
    updates = [ENERGY[ENERGY_MODEL].mac_pj * count for count in counts]
    return [one + two for one, two in zip(_energies(group, SNN), updates, strict=True)]


def _times_less(group: Group, energies: Sequence[float]) -> str:
    """The dense ANN's energy over these."""
    return _quotients(_energies(group, DENSE), energies)


def _ratio_shown(key: tuple[str, str, str], group: Group) -> str:
    """The same over the SNN's, in a convention, a variant of it and an energy model."""
    convention, variant, model = key
    return _quotients(
        _variant_energies(group, DENSE, convention, "default", model),
        _variant_energies(group, SNN, convention, variant, model),
    )


def _variant_energies(
    group: Group, which: str, convention: str, variant: str, model: str
) -> list[float]:
    return group.values(which, "conventions", convention, "variants", variant, "energy_pj", model)


def _skipping(group: Group, which: str) -> list[float]:
    """Energies of an ANN whose zeros cost nothing."""
    return _variant_energies(group, which, "padded", "zeros_skipped", ENERGY_MODEL)


def _counts_zeros(group: Group) -> bool:
    """Whether the records are of a version that counts the zeros of an ANN's activations."""
    try:
        return all(_skipping(group, which) for which in (DENSE, COMPRESSED))
    except UserError:
        return False


def _quotients(ones: Sequence[float], others: Sequence[float]) -> str:
    return _shown([one / other for one, other in zip(ones, others, strict=True)], "{:.1f}×")
