"""The six stages: each reads its upstream folder and writes its own.

What a stage adds to its `record.json`, beside settings, date, commit, versions, device and seconds:

    validation_accuracy       in [0, 1], like all accuracies; a later stage repeats its SNN's
    steps, skipped_steps      of a training; those that were not finite and changed nothing
    weights ... layers        of a network: its costs, see `snn_tf.costs`
    scales                    convert: the factor by which an SNN's values are smaller, by layer; of
                              synapse layers before --weight_rms
    spikes_per_neuron         of an SNN: per image, over all T steps
    neurons                   [{name, neurons, spikes_per_neuron, spike_rate (per step), v_th, leak}]
    test_accuracy, num_examples, timesteps       evaluate: of the trained SNN, as what follows
    confusion                 images of class i (row) that are taken for class j (column)
    correct                   hexadecimal: one bit an image of the test split in order, highest first
    dense_ann, compressed_ann, converted_snn     evaluate: the same of the other networks
    export_max_difference     of the logits, between the export reloaded and the network
    export_agreement          share of images for which both give the same class
    bytes, bytes_gzipped      of the SavedModel; dense_ann has the dense ANN's
"""

import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from snn_tf import config as configs
from snn_tf import (
    conversion,
    copies,
    data,
    evaluation,
    execution,
    export,
    health,
    interruption,
    measurements,
    models,
    pruners,
    pruning,
    report,
    surgery,
    training,
)
from snn_tf.config import Config
from snn_tf.errors import UserError
from snn_tf.files import replacing, replacing_folder
from snn_tf.graph import neuron_parameters
from snn_tf.initialisation import fit_clips, initialise
from snn_tf.layers import LEAST, use_implementation
from snn_tf.objectives import AttentionGuided, CrossEntropy, SpikeTraining
from snn_tf.provenance import commit
from snn_tf.runs import StageFolder, check_data
from snn_tf.update import Recipe
from snn_tf.upstream import (
    check_up_to_date,
    meta_model,
    model_of,
    stage_folder,
    taken_from,
    untrained_snn,
    up_to_date,
    upstream_of,
)

Facts = dict[str, Any]


def run(config: Config) -> None:
    """Runs `config.stages()` in order; finished ones are skipped, unfinished ones resumed.

    Raises:
      UsageError: settings contradict each other or what the run folder holds.
      UserError: data, files or a training are not as they must be.
      Interrupted: a signal came, and `snn_tf.interruption` handles them.
    """
    made_by = commit()
    config = execution.resolve(config)
    _warn_of_rounding(config)
    source = functools.cache(lambda: _loaded(config))
    for stage in config.stages():
        interruption.check()
        if other := taken_from(config, stage):
            stage_folder(config, stage).check()
            print(f"{stage}: taken from {other}")
            continue
        check_up_to_date(config, stage)
        folder = stage_folder(config, stage)
        folder.open(config, upstream_of(config, stage))
        if folder.done:
            print(f"{stage}: done before, skipped ({folder.path})")
            continue
        started = time.perf_counter()
        with execution.released(), source().readable():
            facts = _STAGES[stage](config, source(), folder)
        seconds = facts.pop("seconds", time.perf_counter() - started)
        folder.finish(config, made_by, seconds, facts)
        print(
            f"{stage}: validation accuracy {100 * facts['validation_accuracy']:.2f} % ({seconds:.0f} s)"
        )
    _say_results(config)


def _warn_of_rounding(config: Config) -> None:
    """Says before the first stage that neurons will not round as activations do."""
    if configs.CONVERT in config.stages() and config.activation_levels and not config.initial_membrane:
        print(
            f"{configs.CONVERT}: warning: --activation_levels={config.activation_levels} round to the "
            "nearest, neurons down; --initial_membrane=0.5 lets them round alike"
        )


def _loaded(config: Config) -> data.Data:
    """The data, which are those that the run began with."""
    source = data.load(config)
    check_data(config, source.identity())
    print(f"data: {source.description()}")
    return source


def train_ann(config: Config, source: data.Data, folder: StageFolder) -> Facts:
    """The dense meta-model. What speaks against its compression is said before the training."""
    model = models.build(config, "relu", source.spec)
    if configs.COMPRESS in config.stages() and config.method != "dense":
        _pruner(model, config, source)
    initialise(model, config.stage_seed(folder.stage))
    recipe = Recipe.of(config, folder.stage)
    trainer = training.Trainer(config, recipe, model, CrossEntropy(model, config), source, folder)
    result = trainer.run()
    folder.save_model(model)
    return _trained(trainer, result) | measurements.of_weights(model)


def compress(config: Config, source: data.Data, folder: StageFolder) -> Facts:
    """The sparse student, guided by the meta-model."""
    teacher = meta_model(config, source.spec)
    if config.method == "dense":
        folder.save_model(pruning.wrap(teacher))
        result = evaluation.Evaluator(teacher, config.batch_size).evaluate(source.validation)
        return {"validation_accuracy": result.accuracy} | measurements.of_weights(teacher)
    teacher.trainable = False
    neuron = "quantised_relu" if config.activation_levels else "relu"
    student = models.build(config, neuron, source.spec)
    pruner = _pruner(student, config, source)
    seed = config.stage_seed(folder.stage)
    densities = pruner.start(seed)
    if config.student_start == "meta_model":
        copies.copy_weights(teacher, pruner.model)
        fit_clips(pruner.model)
    else:
        initialise(pruner.model, seed, densities)
    pruning.project(pruner.model)
    recipe = Recipe.of(config, folder.stage)
    objective = AttentionGuided(pruner, teacher, config)
    trainer = training.Trainer(config, recipe, pruner.model, objective, source, folder, pruner)
    result = trainer.run()
    _check_masks(pruner.model, folder)
    model = pruner.model
    if isinstance(pruner, pruners.ChannelPruner):
        model = pruning.wrap(surgery.remove_channels(pruning.unwrap(model), pruner.channels()))
    folder.save_model(model)
    return _trained(trainer, result) | measurements.of_weights(model, teacher)


def _pruner(model: keras.Model, config: Config, source: data.Data) -> pruners.Pruner:
    """The masks of a student, with warnings of what its stage is too short for."""
    per_epoch = data.steps_per_epoch(source.train, config.batch_size)
    pruner = pruners.make_pruner(model, config, per_epoch)
    for warning in pruner.schedule.misfits():
        print(f"{configs.COMPRESS}: warning: {warning}")
    return pruner


def convert(config: Config, source: data.Data, folder: StageFolder) -> Facts:
    """The compressed ANN as an SNN, thresholds calibrated."""
    compressed = model_of(config, configs.COMPRESS)
    batches = _calibration_batches(config, source)
    converted = conversion.convert(pruning.unwrap(compressed), config, batches)
    model = pruning.wrap(converted.model, pruning.masks(compressed))
    use_implementation(model, config.lif)
    result = evaluation.Evaluator(model, config.batch_size).evaluate(source.validation)
    low = health.below_bound(neuron_parameters(model)["v_th"], LEAST) if config.train_v_th else []
    for warning in (*health.firing(result.spike_rates()).values(), *low):
        print(f"{folder.stage}: warning: {warning}")
    folder.save_model(model)
    facts = {"validation_accuracy": result.accuracy, "scales": converted.scales}
    return facts | measurements.of_neurons(model, result)


def train_snn(config: Config, source: data.Data, folder: StageFolder) -> Facts:
    """The SNN, trained: weights, thresholds and leaks together; masks stay."""
    model = untrained_snn(config, source.spec)
    teacher = model_of(config, configs.COMPRESS) if config.snn_distill else None
    before = pruning.masks(model)
    recipe = Recipe.of(config, folder.stage)
    objective = SpikeTraining(model, teacher, config)
    trainer = training.Trainer(config, recipe, model, objective, source, folder)
    result = trainer.run()
    _check_masks(model, folder)
    if any((before[name] != mask).any() for name, mask in pruning.masks(model).items()):
        raise UserError(f"{folder.stage}: masks changed in training")
    folder.save_model(model)
    return _trained(trainer, result) | measurements.of_neurons(model, result)


def evaluate(config: Config, source: data.Data, folder: StageFolder) -> Facts:
    """Every network of the run on the test split, with its costs."""
    dense = meta_model(config, source.spec)
    original = evaluation.synapses(dense)

    def measured(stage: str) -> Facts:
        return measurements.of_test(model_of(config, stage), source, config.batch_size, original)

    snn = measured(configs.TRAIN_SNN)
    facts = snn | {
        "validation_accuracy": stage_folder(config, configs.TRAIN_SNN).record()["validation_accuracy"],
        "dense_ann": measured(configs.TRAIN_ANN),
        "compressed_ann": measured(configs.COMPRESS),
        "converted_snn": measured(configs.CONVERT),
    }
    shown = facts | {"config": {"network": config.network, "dataset": config.dataset}}
    with replacing(folder.path / "layers.png") as beside:
        report.figure(shown, beside)
    return facts


def export_snn(config: Config, source: data.Data, folder: StageFolder) -> Facts:
    """The SNN as a SavedModel, reloaded and compared; in `--export_precision`."""
    model = pruning.unwrap(model_of(config, configs.TRAIN_SNN))
    if config.export_precision == "float32":
        model = copies.in_float32(model)
    target = folder.path / "saved_model"
    with replacing_folder(target, tf.errors.OpError) as beside:
        exported = export.save(model, beside, source.class_names)
        images = next(iter(data.evaluation_batches(source.test, 64)))[0].numpy()
        agreement = export.check(exported, beside, images)
    with tempfile.TemporaryDirectory() as scratch:
        dense = pathlib.Path(scratch) / "saved_model"
        with replacing_folder(dense, tf.errors.OpError) as beside:
            export.save(model_of(config, configs.TRAIN_ANN), beside, source.class_names)
        dense_sizes = export.sizes(dense)
    accuracy = stage_folder(config, configs.TRAIN_SNN).record()["validation_accuracy"]
    return {
        "validation_accuracy": accuracy,
        **agreement,
        **export.sizes(target),
        "dense_ann": dense_sizes,
    }


def _calibration_batches(config: Config, source: data.Data) -> list[np.ndarray]:
    """Training images in an order of the stage's own, without augmentation."""
    size = min(config.calibration_batch_size, len(source.train))
    per_epoch = data.steps_per_epoch(source.train, size)
    plain = dataclasses.replace(source.spec, augment="none")
    batches = data.training_batches(
        source.train,
        plain,
        size,
        config.stage_seed(configs.CONVERT),
        0,
        min(config.calibration_batches, per_epoch),
    )
    return [images.numpy() for images, _ in batches]


def _trained(trainer: training.Trainer, result: evaluation.Evaluation) -> Facts:
    return {
        "validation_accuracy": result.accuracy,
        "steps": trainer.total_steps,
        "skipped_steps": int(trainer.update.skipped),
        "seconds": float(trainer.seconds),
    }


def _check_masks(model: keras.Model, folder: StageFolder) -> None:
    if stray := pruning.stray_weights(model):
        raise UserError(f"{folder.stage}: weights outside their mask are not zero: {stray}")


def _say_results(config: Config) -> None:
    """Prints where everything is, and the table if the run has been evaluated as it is now."""
    evaluated, exported = (stage_folder(config, stage) for stage in (configs.EVALUATE, configs.EXPORT))
    if up_to_date(config, configs.EVALUATE):
        print(f"\n{report.summary(evaluated.record())}\n")
        print(f"records      {config.run_dir}/*/record.json")
        print(f"figure       {evaluated.path / 'layers.png'}")
    if up_to_date(config, configs.EXPORT):
        facts = exported.record()
        size, dense = facts["bytes_gzipped"] / 2**20, facts["dense_ann"]["bytes_gzipped"] / 2**20
        print(
            f"SavedModel   {exported.path / 'saved_model'}  "
            f"({size:.2f} MiB gzipped; the dense ANN's: {dense:.2f} MiB)"
        )
    print(f"TensorBoard  tensorboard --logdir {config.run_dir}/tensorboard")


_STAGES: dict[str, Callable[[Config, data.Data, StageFolder], Facts]] = {
    configs.TRAIN_ANN: train_ann,
    configs.COMPRESS: compress,
    configs.CONVERT: convert,
    configs.TRAIN_SNN: train_snn,
    configs.EVALUATE: evaluate,
    configs.EXPORT: export_snn,
}
