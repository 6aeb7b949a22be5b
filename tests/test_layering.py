"""The package's layers: who may import whom, and who may load TensorFlow, tfmot or absl's flags."""

import ast
from pathlib import Path

import pytest

PACKAGE = "snn_tf"
ROOT = Path(__file__).resolve().parents[1]
LEVELS = {
    name: level
    for level, names in enumerate(
        (
            ("errors", "machine"),
            ("settings",),
            ("contradictions",),
            (
                "config",
                "ambient",
                "budget",
                "flagfiles",
                "files",
                "interruption",
                "lock",
                "operations",
                "provenance",
            ),
            (
                "convolution",
                "health",
                "native",
                "surrogate",
                "attention",
                "sparsity",
                "channels",
                "costs",
            ),
            ("neuron", "splits", "tiny_imagenet", "results"),
            ("layers", "checkpoints", "tables", "image_folder", "tfds_source", "batches"),
            ("execution", "graph", "data", "comparison"),
            ("copies", "folding", "initialisation", "surgery"),
            ("models",),
            ("pruning",),
            ("mask_schedule", "model_files"),
            ("pruners", "runs"),
            ("evaluation", "conversion", "objectives", "upstream"),
            ("summaries", "update", "measurements"),
            ("training", "export", "report"),
            ("stages",),
            ("cli",),
        )
    )
    for name in names
}
WITHOUT_TENSORFLOW = (
    *(
        "budget",
        "channels",
        "comparison",
        "config",
        "contradictions",
        "costs",
        "errors",
        "files",
        "flagfiles",
        "health",
    ),
    *("interruption", "lock", "operations", "report", "results", "settings", "sparsity", "tables"),
)
TENSORFLOW = ("tensorflow", "tf_keras", "keras", "tensorflow_model_optimization", "tensorflow_datasets")


def imported_names(source: str) -> set[str]:
    """Dotted names that `source` imports anywhere, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE if node.level else "", node.module or ""]
            names.update(".".join(filter(None, [*parts, alias.name])) for alias in node.names)
    return names


def siblings(names: set[str]) -> set[str]:
    """Modules of the package among dotted names; its own attributes, `__version__`, are none."""
    tails = [name.split(".")[1:] for name in names if name.split(".")[0] == PACKAGE]
    return {tail[0] for tail in tails if tail and not tail[0].startswith("__")}


def loads(names: set[str], packages: tuple[str, ...]) -> set[str]:
    """Those of the dotted names that are one of `packages` or lie in it."""
    return {name for name in names if any(f"{name}.".startswith(f"{package}.") for package in packages)}


def modules() -> dict[str, list[Path]]:
    """Files of each module; a subpackage's files count as one module."""
    files: dict[str, list[Path]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        files.setdefault(path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return files


def imports_of(module: str) -> set[str]:
    return set().union(*(imported_names(path.read_text()) for path in modules()[module]))


def reached_from(module: str) -> set[str]:
    """`module` and all that it imports from the package, directly or not."""
    reached: set[str] = set()
    waiting = {module}
    while waiting:
        current = waiting.pop()
        reached.add(current)
        waiting |= siblings(imports_of(current)) & set(modules()) - reached
    return reached


NAMED = sorted(set(modules()) - {"__init__"})


def test_package_is_found():
    assert {"__init__", "config", "errors", "cli"} <= set(modules())


def test_imported_names_sees_every_form_of_import():
    source = (
        "import os.path as p\nfrom snn_tf import costs as c, graph\n"
        "from .runs import Run\nfrom . import data\ndef f():\n    from snn_tf.neuron import scan\n"
    )
    assert imported_names(source) == {
        "os.path",
        "snn_tf.costs",
        "snn_tf.graph",
        "snn_tf.runs.Run",
        "snn_tf.data",
        "snn_tf.neuron.scan",
    }


def test_loads_tells_a_package_from_a_longer_name():
    names = {"tensorflow.python.x", "tensorflow_probability", "tf_keras"}
    assert loads(names, TENSORFLOW) == {"tensorflow.python.x", "tf_keras"}


def test_reached_from_follows_imports_of_imports():
    assert {"cli", "config", "errors"} <= reached_from("cli")


@pytest.mark.parametrize("module", NAMED)
def test_module_has_a_level(module):
    assert module in LEVELS


@pytest.mark.parametrize("module", [module for module in NAMED if module in LEVELS])
def test_module_imports_only_from_lower_levels(module):
    lower = {name for name, level in LEVELS.items() if level < LEVELS[module]}
    assert siblings(imports_of(module)) - {module} <= lower


def test_package_itself_imports_nothing():
    assert not imports_of("__init__")


@pytest.mark.parametrize("module", sorted(set(WITHOUT_TENSORFLOW) & set(NAMED)))
def test_plain_module_reaches_no_tensorflow(module):
    for reached in reached_from(module):
        assert not loads(imports_of(reached), TENSORFLOW), reached


@pytest.mark.parametrize("module", sorted(set(NAMED) - {"pruning"}))
def test_model_optimization_is_imported_by_pruning_only(module):
    assert not loads(imports_of(module), ("tensorflow_model_optimization",))


@pytest.mark.parametrize("module", sorted(set(NAMED) - {"cli"}))
def test_absl_flags_are_read_by_cli_only(module):
    assert not loads(imports_of(module), ("absl.flags", "absl.app"))


def test_train_script_imports_the_command_line_only():
    assert imported_names((ROOT / "train.py").read_text()) == {"snn_tf.cli"}
