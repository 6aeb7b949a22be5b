"""This project: built by `models.build`, stepped by the function that `train.py` uses, in its wrappers.

A variant is settings of `Config` joined by "+", such as "lif=fused+precision=float32"; what is not among
them is chosen as `auto` does, and "auto" alone sets nothing.
"""

import tensorflow as tf

import project
from libraries import Entrant
from snn_tf import evaluation, runs
from workloads import Workload


def entrant(workload: Workload, variant: str) -> Entrant:
    """See `libraries`."""
    chosen = dict(word.split("=") for word in variant.split("+") if word != "auto")
    config = project.settings(timesteps=workload.timesteps, batch_size=workload.batch, **chosen)
    model = project.network(workload, config)
    images, labels = project.examples(workload)
    update = project.update(config, model)
    predict = evaluation.predictor(model)
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    return Entrant(
        project.step(update, images, labels),
        lambda: predict(images).numpy(),
        runs.device() if on_gpu else "",
        lambda: tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20 if on_gpu else 0.0,
    )
