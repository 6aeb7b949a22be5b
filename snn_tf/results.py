"""Records of experiments: rows, rows of several seeds, and differences between them.

results/<row>/record.json     what `evaluate` left; the row is named after the flagfile
results/<row>/<stage>.json    what the other stages left
"""

import dataclasses
import functools
import json
import operator
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from snn_tf import files
from snn_tf.config import EVALUATE, STAGES, TRAIN_SNN, Config
from snn_tf.errors import UserError
from snn_tf.settings import setting_of

DENSE, COMPRESSED, SNN = "dense_ann", "compressed_ann", "trained_snn"
"""Networks of a run; in its record, the last one's facts stand at the top."""

CONFIDENCE = 0.95
FEW = 2
"""Up to so many seeds a spread over them says little, and the images give the interval."""

_OF_THE_MACHINE = ("data_dir", "manual_dir")
"""Settings that say where a machine keeps its data, and nothing of the result."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluated run: its name, and the record of `evaluate`."""

    name: str
    record: Mapping[str, Any]

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings; one that is younger than the record has its default."""
        return vars(Config()) | self.record["config"]

    @property
    def seed(self) -> int:
        return self.record["config"]["seed"]

    @property
    def continues(self) -> bool:
        """Whether its SNN training began with another run's SNN (`--snn_start`)."""
        return bool(self.config["snn_start"])

    def network(self, which: str) -> Mapping[str, Any]:
        """Facts of a network, such as `DENSE`."""
        return self.record if which == SNN else self.record[which]

    def settings(self, groups: Iterable[str] | None = None) -> dict[str, Any]:
        """What decides the result besides the seed; of some headings of `--help` only, if given."""
        found = {}
        for field in dataclasses.fields(Config):
            setting = setting_of(field)
            if setting.stages and field.name != "seed" and (groups is None or setting.group in groups):
                found[field.name] = self.config[field.name]
        return found | {"snn_start": self.continues}

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, and the seed."""
        return self.settings() | {"seed": self.seed}


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that differ in their seed alone, in the order of their names."""

    rows: Sequence[Row]

    @property
    def name(self) -> str:
        return re.sub(r"_seed\d+$", "", self.rows[0].name)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.rows[0].config

    def values(self, which: str, *keys: str) -> list[Any]:
        """A fact of a network, such as `DENSE`, by its keys in the record, for every row.

        Raises:
          UserError: a record does not have it.
        """
        found = []
        for row in self.rows:
            try:
                found.append(functools.reduce(operator.getitem, keys, row.network(which)))
            except (LookupError, TypeError) as error:
                wanted = ", ".join((which, *keys))
                raise UserError(f"row {row.name}: its record does not have {wanted}") from error
        return found


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of test accuracies, first less second.

    Attributes:
      mean: in [-1, 1].
      seeds: pairs of rows of the same seed behind it.
      deviation: standard deviation over three seeds or more, else None.
      interval: 95 % interval of the paired difference over the same images, for fewer seeds, else None.
    """

    mean: float
    seeds: int
    deviation: float | None
    interval: tuple[float, float] | None


def add(results: pathlib.Path, run_dirs: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Takes the records of evaluated runs into `results`, each as the row of its folder's name.

    Where a run's machine keeps data is left out.

    Returns:
      The rows' folders.

    Raises:
      UserError: two runs have one name, or one has not been evaluated, has a damaged record or would
        take the place of another row, and nothing is written; or it cannot be written.
    """
    named: dict[str, pathlib.Path] = {}
    for run_dir in run_dirs:
        name = run_dir.resolve().name
        if named.setdefault(name, run_dir) != run_dir:
            raise UserError(
                f"--add: {named[name]} and {run_dir} would both be the row {name}, after their folders' "
                f"name; rename one, such as to NETWORK_{name}"
            )
    rows = {results / name: _records_of(results / name, run_dir) for name, run_dir in named.items()}
    for row, records in rows.items():
        for stage in set(STAGES) - records.keys():
            (row / f"{stage}.json").unlink(missing_ok=True)
        for stage, record in records.items():
            path = row / ("record.json" if stage == EVALUATE else f"{stage}.json")
            files.write_json(path, record)
    return list(rows)


def _records_of(row: pathlib.Path, run_dir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The records of a run that may become `row`, by stage. Raises `UserError` as `add` does."""
    source = run_dir / EVALUATE / "record.json"
    if not source.exists():
        raise UserError(f"{run_dir}: has no {EVALUATE}/record.json; run --stage={EVALUATE} first")
    if (row / "record.json").exists():
        _check_same(_read_row(row / "record.json"), _read_row(source))
    _check_evaluated_last(run_dir)
    made = {stage: run_dir / stage / "record.json" for stage in STAGES}
    return {stage: _published(path) for stage, path in made.items() if path.exists()}


def _check_evaluated_last(run_dir: pathlib.Path) -> None:
    """Raises `UserError` if the SNN was trained again after it had been evaluated."""
    built_on, trained = run_dir / EVALUATE / "stage.json", run_dir / TRAIN_SNN / "record.json"
    if not (built_on.exists() and trained.exists()):
        return
    facts = files.read_json(built_on), files.read_json(trained)
    if not all(isinstance(each, dict) for each in facts):
        raise UserError(f"{run_dir}: {built_on} or {trained} is not of a stage")
    if facts[0].get("upstream") != facts[1].get("fingerprint"):
        raise UserError(
            f"{run_dir}: {TRAIN_SNN} was run again after {EVALUATE}; "
            f"run --stage={EVALUATE} --overwrite first"
        )


def _published(path: pathlib.Path) -> dict[str, Any]:
    """A stage's record without where data lies on its machine."""
    record = files.read_json(path)
    settings = record.get("config", {}) if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not the record of a stage")
    kept = {name: value for name, value in settings.items() if name not in _OF_THE_MACHINE}
    return {**record, "config": kept}


def _read_row(path: pathlib.Path) -> Row:
    """A row from its record, which has settings and a seed."""
    row = Row(path.parent.name, files.read_json(path))
    try:
        row.identity()
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is no record of {EVALUATE}: {error!r}") from error
    return row


def _check_same(there: Row, new: Row) -> None:
    """A row may be replaced by a run of the same settings and seed only."""
    ours, theirs = there.identity(), new.identity()
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"--add: the row {there.name} has --{name}={value}, the run --{name}={theirs[name]}; "
                "rename the run's folder, or take another folder of rows"
            )


def read(results: pathlib.Path) -> list[Group]:
    """All rows of a folder, those of several seeds together, in the order of their names.

    Raises:
      UserError: there is none, or a record cannot be read.
    """
    together: dict[str, list[Row]] = {}
    for path in sorted(results.glob("*/record.json")):
        row = _read_row(path)
        together.setdefault(json.dumps(row.settings(), sort_keys=True), []).append(row)
    if not together:
        raise UserError(f"{results}: holds no row; a row is a folder with the record.json of evaluate")
    for rows in together.values():
        _check_seeds(results, rows)
    return [Group(rows) for rows in together.values()]


def _check_seeds(results: pathlib.Path, rows: Sequence[Row]) -> None:
    """Raises `UserError` if a seed counts twice: in rows that differ in folders or in execution."""
    names: dict[int, str] = {}
    for row in rows:
        if (twin := names.setdefault(row.seed, row.name)) != row.name:
            raise UserError(f"{results}: {twin} and {row.name} have the same settings and seed")


def seconds(results: pathlib.Path, row: Row) -> float:
    """Wall time of the stages whose records a row in `results` has: those that its run made itself.

    Raises:
      UserError: a record cannot be read, or gives no time.
    """
    paths = sorted((results / row.name).glob("*.json"))
    try:
        return sum(float(files.read_json(path)["seconds"]) for path in paths)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{results / row.name}: a record has no seconds: {error!r}") from error


def correct(facts: Mapping[str, Any]) -> np.ndarray:
    """[num_examples] booleans: which test images a network got right, in the split's order.

    Raises:
      UserError: the record does not say.
    """
    try:
        packed = np.frombuffer(bytes.fromhex(facts["correct"]), np.uint8)
        return np.unpackbits(packed, count=facts["num_examples"]).astype(bool)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"a record does not say which images were right: {error!r}") from error


def difference(first: Group, which: str, second: Group, other: str) -> Difference | None:
    """Accuracy of a network in one group less that of a network in another, seed by seed.

    Args:
      first, second: groups; may be the same.
      which, other: the network of each, such as `DENSE`.

    Returns:
      None if no seed is in both.

    Raises:
      UserError: they were tested on other images, or a record does not say which were right.
    """
    theirs = {row.seed: row.network(other) for row in second.rows}
    pairs = [(row.network(which), theirs[row.seed]) for row in first.rows if row.seed in theirs]
    if not pairs:
        return None
    by_seed = [one["test_accuracy"] - two["test_accuracy"] for one, two in pairs]
    mean = statistics.mean(by_seed)
    if len(pairs) > FEW:
        return Difference(mean, len(pairs), statistics.stdev(by_seed), None)
    images = [np.concatenate([correct(pair[side]) for pair in pairs]) for side in (0, 1)]
    if len(images[0]) != len(images[1]):
        counts = f"{len(images[0])} and {len(images[1])}"
        raise UserError(f"rows {first.name} and {second.name}: of {counts} test images; not comparable")
    return Difference(mean, len(pairs), None, paired_interval(*images))


def paired_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same images: Student's paired interval.

    Args:
      first, second: [N] booleans, right or wrong.
    """
    if np.array_equal(first, second):
        return 0.0, 0.0
    found = stats.ttest_rel(first.astype(float), second.astype(float)).confidence_interval(CONFIDENCE)
    return float(found.low), float(found.high)


def dense_counterpart(group: Group, groups: Sequence[Group]) -> Group | None:
    """The dense group of the same data, network, time steps and training length; None if absent."""
    wanted = _counterpart_settings(group)
    for other in groups:
        if other.config["method"] == "dense" and _counterpart_settings(other) == wanted:
            return other
    return None


def _counterpart_settings(group: Group) -> dict[str, Any]:
    settings = group.rows[0].settings(("Data", "Network"))
    return settings | {name: group.config[name] for name in ("timesteps", "ann_epochs", "snn_epochs")}


def same_but_for_masks(group: Group) -> str:
    """What groups must share to be compared by where their masks come from."""
    settings = group.rows[0].settings(("Data", "Network", "Training", "Conversion", "SNN"))
    chosen = {name: group.config[name] for name in ("structure", "density", "budget")}
    return json.dumps(settings | chosen, sort_keys=True)
