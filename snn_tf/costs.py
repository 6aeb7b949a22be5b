"""Weights, multiply-accumulates (MACs), accumulates (ACs) and energy of an ANN or an SNN, per image.

Takes the masked layers of synapses and the mean activity of their inputs; gives plain dictionaries
that go into record.json unchanged. Measuring activity belongs to the evaluation, what one layer does and
the two conventions of counting it to `snn_tf.operations`.

What an SNN layer's input carries decides what it costs:

    image    analog values, the same at every step: MACs, once
    spikes   0 or 1: one AC per spike and tap
    pooled   means of spikes: rate x MACs counted as ACs (DIET-SNN, Rathi & Roy 2020)

This is the variant `default`. `image_every_step` charges the image's MACs T times, `pooled_as_macs`
charges one MAC per non-zero pooled input and tap, and `image_every_step_pooled_as_macs` does both
(NeuroBench). An ANN's `default` charges every tap, the zeros of its activations included;
`zeros_skipped` charges those of the image and of non-zero activations (NeuroBench's count of an ANN).
Additions outside synapses are in no count: those of biases, and those of a ResNet's shortcuts without a
convolution, which are one AC for each spike that takes one.

The record of `ann_costs` and `snn_costs`, with counts per image (means where they depend on activity):

    weights, active_weights     prunable weights of the uncut network; those that remain
    density, compression        active_weights / weights; its inverse (null if nothing is active)
    mac_density                 one_pass_macs / dense_macs, padded
    macs, acs, energy_pj        padded, default; energy_pj = {model: picojoule}
    conventions                 {"padded" | "exact": {
        one_pass_macs               MACs of one pass through the masked network, whatever the activity
        dense_macs                  the same of the uncut network with all weights active
        mac_density                 their ratio
        variants                    {variant: {macs, acs, energy_pj}}}}
    layers                      [{name, source, and all of the above}], in the order given
    neuron_updates              SNN only: neurons x T, each a leak multiply and an add; in no energy
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from snn_tf.operations import CONVENTIONS, Activity, Convention, Synapses, acs, macs, nonzero_macs


@dataclasses.dataclass(frozen=True)
class EnergyModel:
    """Energy of one multiply-accumulate and of one accumulate, in picojoules."""

    mac_pj: float
    ac_pj: float


# M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, 45 nm:
# 32-bit float multiply 3.7 pJ and add 0.9 pJ; 32-bit integer multiply 3.1 pJ and add 0.1 pJ.
ENERGY: Mapping[str, EnergyModel] = {
    "fp32_45nm": EnergyModel(mac_pj=4.6, ac_pj=0.9),
    "int32_45nm": EnergyModel(mac_pj=3.2, ac_pj=0.1),
}


class Variant(NamedTuple):
    """Choices in which published SNN counts differ, besides the convention."""

    image_every_step: bool = False
    pooled_as_macs: bool = False


VARIANTS: Mapping[str, Variant] = {
    "default": Variant(),
    "image_every_step": Variant(image_every_step=True),
    "pooled_as_macs": Variant(pooled_as_macs=True),
    "image_every_step_pooled_as_macs": Variant(image_every_step=True, pooled_as_macs=True),
}


_Count = Callable[[Synapses, Convention], tuple[float, float]]  # (macs, acs) of one layer


def ann_costs(
    layers: Sequence[Synapses],
    dense: Sequence[Synapses] | None = None,
    activities: Mapping[str, Activity] | None = None,
) -> dict[str, Any]:
    """Costs of one pass of an ANN: the record described in the module's docstring.

    Args:
      layers: the network's synapses, at least one.
      dense: the same layers before channels were cut out; their sizes alone matter, they are the
        denominators. None: `layers` themselves, with every weight active.
      activities: by layer name; layers that read the image need none. None: no `zeros_skipped`.

    Raises:
      ValueError: an activity is missing or not of its layer's input_shape, or `dense` does not name
        the same layers in the same order.
    """
    counts: dict[str, _Count] = {"default": lambda s, convention: (macs(s, convention), 0.0)}
    if activities is not None:
        _check_complete(layers, activities)
        counts["zeros_skipped"] = functools.partial(_nonzero_operations, activities)
    return _network_record(layers, dense, counts)


def snn_costs(
    layers: Sequence[Synapses],
    activities: Mapping[str, Activity],
    timesteps: int,
    neurons: int,
    dense: Sequence[Synapses] | None = None,
) -> dict[str, Any]:
    """Costs of an SNN for one image of T steps: the record described in the module's docstring.

    Args:
      layers, dense: as in `ann_costs`.
      activities: by layer name; layers that read the image need none.
      timesteps: T.
      neurons: number of all spiking neurons of the network.

    Raises:
      ValueError: an activity is missing or not of its layer's input_shape, or `dense` does not name
        the same layers in the same order.
    """
    _check_complete(layers, activities)
    counts = {
        name: functools.partial(_spiking_operations, activities, int(timesteps), variant)
        for name, variant in VARIANTS.items()
    }
    return _network_record(layers, dense, counts) | {"neuron_updates": int(neurons) * int(timesteps)}


def _check_complete(layers: Sequence[Synapses], activities: Mapping[str, Activity]) -> None:
    missing = [s.name for s in layers if s.source != "image" and s.name not in activities]
    if missing:
        raise ValueError(f"activities: missing for {', '.join(missing)}")


def _nonzero_operations(
    activities: Mapping[str, Activity], synapses: Synapses, convention: Convention
) -> tuple[float, float]:
    if synapses.source == "image":
        return macs(synapses, convention), 0.0
    return nonzero_macs(synapses, activities[synapses.name], convention), 0.0


def _spiking_operations(
    activities: Mapping[str, Activity],
    timesteps: int,
    variant: Variant,
    synapses: Synapses,
    convention: Convention,
) -> tuple[float, float]:
    if synapses.source == "image":
        return macs(synapses, convention) * (timesteps if variant.image_every_step else 1), 0.0
    activity = activities[synapses.name]
    if synapses.source == "pooled" and variant.pooled_as_macs:
        return nonzero_macs(synapses, activity, convention), 0.0
    return 0, acs(synapses, activity, convention)


def _network_record(
    layers: Sequence[Synapses], dense: Sequence[Synapses] | None, counts: Mapping[str, _Count]
) -> dict[str, Any]:
    uncut = layers if dense is None else dense
    if [s.name for s in layers] != [s.name for s in uncut]:
        raise ValueError("dense: must name the same layers as the network, in the same order")
    full = [dataclasses.replace(s, mask=np.broadcast_to(np.True_, s.mask.shape)) for s in uncut]
    rows = [
        {"name": s.name, "source": s.source} | _record([s], [f], counts)
        for s, f in zip(layers, full, strict=True)
    ]
    return _record(layers, full, counts) | {"layers": rows}


def _record(
    layers: Sequence[Synapses], full: Sequence[Synapses], counts: Mapping[str, _Count]
) -> dict[str, Any]:
    """The record of these layers together: of one for its row, of all for the network."""
    weights = sum(s.weights for s in full)
    active = sum(s.active_weights for s in layers)
    conventions = {c: _convention_record(layers, full, counts, c) for c in CONVENTIONS}
    return {
        "weights": weights,
        "active_weights": active,
        "density": active / weights,
        "compression": weights / active if active else None,
        "mac_density": conventions["padded"]["mac_density"],
        **conventions["padded"]["variants"]["default"],
        "conventions": conventions,
    }


def _convention_record(
    layers: Sequence[Synapses],
    full: Sequence[Synapses],
    counts: Mapping[str, _Count],
    convention: Convention,
) -> dict[str, Any]:
    one_pass = sum(macs(s, convention) for s in layers)
    dense = sum(macs(s, convention) for s in full)
    variants = {}
    for variant, count in counts.items():
        total_macs, total_acs = map(sum, zip(*(count(s, convention) for s in layers), strict=True))
        energy = {name: total_macs * e.mac_pj + total_acs * e.ac_pj for name, e in ENERGY.items()}
        variants[variant] = {"macs": total_macs, "acs": total_acs, "energy_pj": energy}
    return {
        "one_pass_macs": one_pass,
        "dense_macs": dense,
        "mac_density": one_pass / dense,
        "variants": variants,
    }
