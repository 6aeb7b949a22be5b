"""What a stage builds on: folders and networks of this run or of another.

`--meta_model` names another run for its `train_ann`, `--snn_start` one for its trained SNN and the rest.
"""

import dataclasses
import pathlib

import numpy as np
import tf_keras as keras

from snn_tf import config as configs
from snn_tf import copies, models, pruning
from snn_tf.config import Config
from snn_tf.contradictions import same_folder
from snn_tf.data import DataSpec
from snn_tf.errors import UsageError
from snn_tf.layers import use_implementation
from snn_tf.runs import CHOOSES_DATA, UPSTREAM, StageFolder

_BEFORE_SNN = (configs.TRAIN_ANN, configs.COMPRESS, configs.CONVERT)


def stage_folder(config: Config, stage: str) -> StageFolder:
    """A stage's folder, which may be in another run."""
    return StageFolder(pathlib.Path(taken_from(config, stage) or config.run_dir), stage)


def taken_from(config: Config, stage: str) -> str:
    """The other run's folder that has a stage's result; empty if this run makes it.

    Raises:
      UserError: `--snn_start` has no trained SNN.
      UsageError: that SNN began with this run's.
    """
    run, meta_model, start = "", config.meta_model, config.snn_start
    while start and stage in _BEFORE_SNN and not (meta_model and stage == configs.TRAIN_ANN):
        made = StageFolder(pathlib.Path(start), configs.TRAIN_SNN).record()["config"]
        run, meta_model, start = start, made.get("meta_model", ""), made.get("snn_start", "")
        if start and same_folder(start, config.run_dir):
            raise UsageError(f"--snn_start={config.snn_start}: began with the SNN of --run_dir={start}")
    return meta_model if meta_model and stage == configs.TRAIN_ANN else run


def model_of(config: Config, stage: str) -> keras.Model:
    """The network that a stage made, to be computed as `--lif` says."""
    return use_implementation(stage_folder(config, stage).load_model(), config.lif)


def upstream_of(config: Config, stage: str) -> list[StageFolder]:
    """The folders that a stage builds on, nearest first."""
    folders = []
    if stage == configs.TRAIN_SNN and config.snn_start:
        folders.append(_snn_start(config))
    above = UPSTREAM[stage]
    while above:
        folders.append(stage_folder(config, above))
        above = UPSTREAM[above]
    return folders


def up_to_date(config: Config, stage: str) -> bool:
    """Whether a stage is done, and nothing before it has been run again with other settings since."""
    return stage_folder(config, stage).done and not _left_behind(config, stage)


def check_up_to_date(config: Config, stage: str) -> None:
    """Raises `UsageError` if a stage of this run or its start, before `stage`, has been left behind."""
    for folder, above in reversed(_left_behind(config, UPSTREAM[stage])):
        if folder.done and above.done:
            raise UsageError(
                f"{folder.path} was made before {above.path} was run again with other settings; "
                f"run --stage={folder.stage} again with --overwrite"
            )


def _left_behind(config: Config, stage: str | None) -> list[tuple[StageFolder, StageFolder]]:
    """Stages from `stage` up that were made from other than what is above them, and that."""
    pairs = []
    while stage and not taken_from(config, stage):
        folder, above = stage_folder(config, stage), upstream_of(config, stage)[:1]
        pairs += [(folder, other) for other in above if not folder.follows(other)]
        stage = UPSTREAM[stage]
    if stage and config.snn_start:
        pairs += _left_behind(_started_from(config), configs.TRAIN_SNN)
    return pairs


def _started_from(config: Config) -> Config:
    """`config` in the place of the run that `--snn_start` names: it takes from others what that took."""
    made = _snn_start(config).record()["config"]
    others = {name: made.get(name, "") for name in ("meta_model", "snn_start")}
    return dataclasses.replace(config, run_dir=config.snn_start, **others)


def _snn_start(config: Config) -> StageFolder:
    return StageFolder(pathlib.Path(config.snn_start), configs.TRAIN_SNN)


def meta_model(config: Config, spec: DataSpec) -> keras.Model:
    """The teacher. Raises `UsageError` if it is not of this run's data and network."""
    folder = stage_folder(config, configs.TRAIN_ANN)
    given = next((name for name in ("meta_model", "snn_start") if getattr(config, name)), "")
    named = f"--{given}={getattr(config, given)}" if given else str(folder.path)
    _check_settings(named, folder, config, _of_meta_model(config))
    teacher = model_of(config, configs.TRAIN_ANN)
    _check_fits(named, teacher, config, spec)
    return teacher


def untrained_snn(config: Config, spec: DataSpec) -> keras.Model:
    """What SNN training starts from: the converted SNN, or another run's trained one.

    Raises:
      UsageError: the other run's network was made with other settings.
    """
    if not config.snn_start:
        return model_of(config, configs.CONVERT)
    flag, folder = f"--snn_start={config.snn_start}", _snn_start(config)
    _check_settings(flag, folder, config, _of_snn_start(config))
    trained = folder.load_model()
    _check_fits(flag, trained, config, spec)
    model = copies.respiking(pruning.unwrap(trained), config)
    return use_implementation(pruning.wrap(model, pruning.masks(trained)), config.lif)


def _of_meta_model(config: Config) -> list[str]:
    """The settings that a meta-model must share with a run that takes it."""
    names = [*CHOOSES_DATA, "network", "width", "head"]
    if config.method == "dense" or config.student_start == "meta_model":
        names += ["batch_norm"]
    if config.method == "dense":
        names += ["dropout", "head_dropout", "precision"]
    return names


def _of_snn_start(config: Config) -> list[str]:
    """The settings that an SNN must share with a run that trains it on: those that made it what it is.

    What training an SNN takes as well, such as the batch size, may change.
    """
    made = {name for stage in _BEFORE_SNN for name in config.concerning(stage)}
    free = config.concerning(configs.TRAIN_SNN).keys() - config.concerning(configs.EVALUATE).keys()
    return sorted(made - free | {"initial_membrane", "seed"})


def _check_settings(named: str, folder: StageFolder, config: Config, names: list[str]) -> None:
    """Raises `UsageError`, whose line begins with `named`, if a stage was made with other settings."""
    made_with = folder.record()["config"]
    made = {name: made_with.get(name, getattr(Config, name)) for name in names}
    changed = [name for name in names if made[name] != getattr(config, name)]
    if changed:
        theirs = " ".join(f"--{name}={made[name]}" for name in changed)
        ours = " ".join(f"--{name}={getattr(config, name)}" for name in changed)
        raise UsageError(f"{named}: trained with {theirs}, not {ours}")


def _check_fits(named: str, model: keras.Model, config: Config, spec: DataSpec) -> None:
    """Raises `UsageError`, whose line begins with `named`, if a network was made for other images."""
    shapes = tuple(model.input_shape[1:]), model.output_shape[-1]
    wanted = tuple(spec.image_shape), spec.num_classes
    if shapes != wanted:
        raise UsageError(
            f"{named}: for images and classes {shapes}, but --dataset={config.dataset} has {wanted}"
        )
    found = models.standardisation(model)
    if not np.allclose(found, (spec.mean, spec.std), rtol=1e-4, atol=1e-4):
        raise UsageError(
            f"{named}: standardises images by other statistics {found} "
            f"than those of --dataset={config.dataset}, {(spec.mean, spec.std)}"
        )
