"""From ANN to SNN: balanced scales and calibrated firing thresholds.

Scales are cumulative. With s(image) = 1, one spike of a layer stands for s = s_in · v_th of its ANN
activation, where s_in is the scale of its input current: the current of a kernel that reads spikes of
scale s_in is the ANN's pre-activation divided by s_in. In a chain the thresholds absorb this. Where
branches meet in an addition it must be made equal: the kernels that feed a branch of scale s are
multiplied by s / s_target. Batch normalisation is folded first. The biases b of the synapses before a
layer of neurons become its bias current Σ b / s_in.

v_th is a percentile of the whole input current of a layer's neurons, layer by layer from the first,
with the layers before it already spiking (DIET-SNN, Rathi & Roy 2020), times κ. Where the ANN's
activations have a trained clip λ, nothing is calibrated: v_th = λ / s_in, and so s = λ (Bu et al. 2022).

A layer of neurons fires the same spikes when its weights, bias current and v_th are all multiplied by
one c > 0. An optimizer such as Adam moves every weight by about the learning rate, whatever its size,
and folded weights differ in size from layer to layer. So c can make them alike (`--weight_rms`).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import copies
from snn_tf.config import Config
from snn_tf.errors import UserError
from snn_tf.folding import fold
from snn_tf.graph import Graph, inner, is_image, is_neuron, is_source, is_synapse
from snn_tf.layers import QuantisedReLU, unfold_time


@dataclasses.dataclass(frozen=True)
class Converted:
    """An SNN and its scales.

    Attributes:
      model: the SNN over `config.timesteps` steps, plain, calibrated thresholds multiplied by κ.
      scales: s by layer name, at thresholds before κ, and before `weight_rms` multiplies some layers'
        weights, bias currents and thresholds alike, which leaves spikes as they are.
    """

    model: keras.Model
    scales: dict[str, float]


def convert(ann: keras.Model, config: Config, batches: Sequence[np.ndarray]) -> Converted:
    """Makes the SNN of an ANN.

    Args:
      ann: plain functional model, with batch normalisation or without, in which neurons follow every
        addition; zeros of its kernels stay zeros.
      config: calibration settings, κ = v_th_scale, the neuron's and timesteps.
      batches: uint8 images [B, H, W, C], training images without augmentation.

    Raises:
      UserError: a layer's percentile of the input current is not positive, or a batch normalisation
        cannot be folded.
    """
    ann = fold(ann)
    calibration = _Calibration(ann, config, batches)
    scales = calibration.run()
    snn = copies.spiking(ann, config)
    copies.copy_weights(calibration.snn, snn)
    if not calibration.clips:
        for layer in Graph.of(snn).select(is_neuron).values():
            layer.cell.v_th.assign(config.v_th_scale * layer.cell.v_th)
    if config.weight_rms:
        _equalise(Graph.of(snn), config.weight_rms)
    return Converted(snn, scales)


def _equalise(snn: Graph, rms: float) -> None:
    """Brings the weights before each layer of neurons to about `rms`, and leaves all spikes as they are.

    The factors are powers of two, so that no rounding changes. Layers that spikes reach without weights,
    and those without a weight other than 0, stay as they are.
    """
    for name, layer in snn.select(is_neuron).items():
        drivers = copies.drivers(snn, name)
        if not all(map(is_synapse, drivers)):
            continue
        kernels = [driver.kernel for driver in drivers]
        values = np.concatenate([kernel.numpy().ravel() for kernel in kernels])
        kept = values[values != 0]
        if not kept.size:
            continue
        factor = 2.0 ** np.round(np.log2(rms / np.sqrt(np.mean(np.square(kept)))))
        biases = [layer.bias_current] if layer.use_bias else []
        for variable in (*kernels, *biases, layer.cell.v_th):
            variable.assign(variable * factor)


class _Calibration:
    """Walks the SNN once, in topological order, keeping the spike trains that are still needed."""

    def __init__(self, ann: keras.Model, config: Config, batches: Sequence[np.ndarray]):
        self.config = config
        self.ann = Graph.of(ann)
        self.snn = copies.spiking(ann, config, timesteps=config.calibration_timesteps)
        self.graph = Graph.of(self.snn)
        self.inputs = {name: layer.input for name, layer in self.graph.select(is_neuron).items()}
        self.outputs = {name: layer.output for name, layer in self.graph.select(is_source).items()}
        (image,) = self.graph.select(is_image)
        self.clips = {
            name: float(layer.clip)
            for name, layer in self.ann.select(is_neuron).items()
            if isinstance(layer, QuantisedReLU)
        }
        self.trains: dict[str, list[np.ndarray]] = {image: list(batches)}
        self.scales: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Sets kernels and thresholds of `snn`; returns the scales by layer name."""
        for name, layer in self.graph.layers.items():
            sources = self.graph.inputs[name]
            if is_image(layer):
                self.scales[name] = 1.0
            elif is_neuron(layer):
                scale = self.scales[sources[0]]
                self._set_bias_current(name, scale)
                self.scales[name] = scale * self._set_v_th(name, scale)
            elif isinstance(layer, keras.layers.Add):
                self.scales[name] = self._balance(sources)
            else:
                self.scales[name] = self.scales[sources[0]]
        return self.scales

    def _balance(self, branches: Sequence[str]) -> float:
        """Rescales the kernels of an addition's branches to one scale, and returns it."""
        fixed = {self.scales[branch] for branch in branches if not self._kernels(branch)}
        if len(fixed) > 1:
            raise UserError(f"layers {', '.join(branches)}: added without weights at different scales")
        target = fixed.pop() if fixed else self.scales[branches[-1]]
        for branch in branches:
            for name in self._kernels(branch):
                kernel = inner(self.graph.layers[name]).kernel
                kernel.assign(kernel * (self.scales[branch] / target))
        return target

    def _kernels(self, branch: str) -> list[str]:
        """The synapse layers whose outputs make up a branch; empty for an identity."""
        if is_synapse(self.graph.layers[branch]):
            return [branch]
        if is_neuron(self.graph.layers[branch]):
            return []
        met = self.graph.nearest(branch, lambda layer: is_synapse(layer) or is_neuron(layer))
        return [name for name in met if is_synapse(self.graph.layers[name])]

    def _set_bias_current(self, name: str, scale: float) -> None:
        """Σ b / s_in over the ANN's synapses before a layer of neurons, where they have biases."""
        biases = [s.bias for s in copies.driving_synapses(self.ann, name) if s.use_bias]
        if biases:
            self.graph.layers[name].bias_current.assign(tf.add_n(biases) / scale)

    def _set_v_th(self, name: str, scale: float) -> float:
        """Sets and returns v_th of one layer of neurons, whose currents are of scale s_in = `scale`."""
        if name not in self.clips:
            return self._fire(name)
        v_th = self.clips[name] / scale
        self.graph.layers[name].cell.v_th.assign(v_th)
        return v_th

    def _fire(self, name: str) -> float:
        """Calibrates one layer of neurons, keeps their spike trains, and returns v_th."""
        layer = self.graph.layers[name]
        sources = self.graph.nearest(name, is_source)
        segment = keras.Model([self.outputs[source] for source in sources], self.inputs[name])
        steps = 1 if layer.constant_input else self.config.calibration_timesteps
        currents = (layer.biased(segment(feed)) for feed in self._feeds(sources))
        v_th = max(self._percentile(current, steps) for current in currents)
        if not v_th > 0.0:
            raise UserError(
                f"layer {name}: the {self.config.calibration_percentile:g}th percentile of its input "
                f"current is {v_th:g}, and a threshold must be more than 0; train longer, or raise "
                "--calibration_percentile, --density or --calibration_timesteps"
            )
        layer.cell.v_th.assign(v_th)
        fired = [layer(segment(feed)).numpy().astype(bool) for feed in self._feeds(sources)]
        self._forget(name, sources)
        self.trains[name] = fired
        return v_th

    def _feeds(self, sources: Sequence[str]) -> Iterator[list[tf.Tensor]]:
        """The tensors of `sources`, batch by batch."""
        for trains in zip(*(self.trains[source] for source in sources), strict=True):
            dtypes = [self.outputs[source].dtype for source in sources]
            yield [tf.cast(train, dtype) for train, dtype in zip(trains, dtypes, strict=True)]

    def _percentile(self, current: tf.Tensor, steps: int) -> float:
        """The largest over time of the percentile over batch and neurons."""
        by_step = unfold_time(tf.cast(current, tf.float32), steps).numpy().reshape(steps, -1)
        return float(np.percentile(by_step, self.config.calibration_percentile, axis=1).max())

    def _forget(self, name: str, sources: Sequence[str]) -> None:
        """Drops the spike trains that no later neuron reads."""
        order = list(self.graph.select(is_neuron))
        later = order[order.index(name) + 1 :]
        needed = {source for neuron in later for source in self.graph.nearest(neuron, is_source)}
        for source in sources:
            if source not in needed:
                self.trains.pop(source, None)
