"""What the records say of a network: its costs, its accuracy on the test split, its neurons."""

from typing import Any

import numpy as np
import tf_keras as keras

from snn_tf import costs, data, evaluation
from snn_tf.graph import Graph, is_neuron
from snn_tf.operations import Synapses


def of_weights(model: keras.Model, original: keras.Model | None = None) -> dict[str, Any]:
    """Weights, MACs and densities of an ANN, in all and per layer, against the uncut network."""
    dense = evaluation.synapses(original) if original else None
    return costs.ann_costs(evaluation.synapses(model), dense=dense)


def of_test(
    model: keras.Model, source: data.Data, batch_size: int, original: list[Synapses]
) -> dict[str, Any]:
    """Accuracy on the test split, activity and costs of one network; `original` is the uncut one."""
    result = evaluation.Evaluator(model, batch_size, activities=True).evaluate(source.test)
    layers = evaluation.synapses(model)
    facts = {
        "test_accuracy": result.accuracy,
        "num_examples": result.num_examples,
        "confusion": result.confusion.tolist(),
        "correct": np.packbits(result.correct).tobytes().hex(),
    }
    if not evaluation.is_spiking(model):
        return facts | costs.ann_costs(layers, dense=original, activities=result.activities)
    neurons = sum(result.neurons.values())
    counted = costs.snn_costs(layers, result.activities, result.timesteps, neurons, dense=original)
    return facts | {"timesteps": result.timesteps} | counted | of_neurons(model, result)


def of_neurons(model: keras.Model, result: evaluation.Evaluation) -> dict[str, Any]:
    """Activity and parameters of an SNN's neurons, in all and per layer."""
    rates = result.spike_rates()
    return {
        "spikes_per_neuron": result.spikes_per_neuron(),
        "neurons": [
            {
                "name": name,
                "neurons": result.neurons[name],
                "spikes_per_neuron": result.spikes[name] / result.neurons[name],
                "spike_rate": rates[name],
                "v_th": float(layer.cell.v_th),
                "leak": float(layer.cell.leak),
            }
            for name, layer in Graph.of(model).select(is_neuron).items()
        ],
    }
