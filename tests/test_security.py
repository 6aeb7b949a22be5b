"""What is read is data: nothing that a file holds is run, and nothing that is written can be."""

import ast
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from small_networks import initialised
from tensorflow.core.protobuf import saved_model_pb2

from snn_tf import copies, export, pruning
from snn_tf.config import Config

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "train.py", *sorted((ROOT / "snn_tf").rglob("*.py"))]
# Modules that make objects, or code, of what a file holds.
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "system", "popen", "literal_eval"}
UNSAFE = {"shell": True, "allow_pickle": True, "safe_mode": False, "unsafe": True}
# What runs Python, or reads and writes files, from within a graph.
OPERATIONS = re.compile("PyFunc|EagerPy|PythonOp|ReadFile|WriteFile|Save|MatchingFiles")
RESTORES = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename"}


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def hazards(source: str) -> list[str]:
    """Imports, calls and arguments in `source` that would make code of data."""
    tree = ast.parse(source)
    found = sorted(imported(tree) & MODULES)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if name in CALLS and not (name == "compile" and ast.unparse(node.func) == "re.compile"):
            found.append(f"{name}()")
        found += [f"{word}={value}" for word, value in UNSAFE.items() if given.get(word) is value]
        if (
            ast.unparse(node.func) in ("np.load", "numpy.load")
            and given.get("allow_pickle") is not False
        ):
            found.append("np.load without allow_pickle=False")
        if (
            name == "load_model"
            and "keras" in ast.unparse(node.func)
            and given.get("safe_mode") is not True
        ):
            found.append("load_model without safe_mode=True")
        if name in ("extractall", "unpack_archive"):
            found.append(f"{name}()")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_makes_no_code_of_data(path):
    assert not hazards(path.read_text())


@pytest.mark.parametrize(
    "source, hazard",
    [
        ("import pickle", "pickle"),
        ("from yaml import load", "yaml"),
        ("eval(text)", "eval()"),
        ("os.system(text)", "system()"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("keras.models.load_model(path)", "load_model without safe_mode=True"),
        ("zipfile.ZipFile(path).extractall()", "extractall()"),
    ],
)
def test_hazards_are_seen(source, hazard):
    assert hazard in hazards(source)


def test_code_that_runs_in_another_process_makes_no_code_of_data():
    assert not hazards(export._RELOAD)


@pytest.fixture(scope="module")
def network():
    ann = initialised("vgg5", width=0.125, head="linear")
    return pruning.wrap(copies.spiking(ann, Config(timesteps=2, lif="fused")))


def operations(graph) -> set[str]:
    """Operations of a graph and of all functions in it."""
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    return {node.op for node in nodes}


def test_saved_model_holds_no_python_and_touches_no_files(tmp_path, network):
    export.save(network, tmp_path / "saved", "0123456789")
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((tmp_path / "saved" / "saved_model.pb").read_bytes())
    (meta,) = saved.meta_graphs
    found = operations(meta.graph_def)
    assert {"Conv2D"} <= found
    assert not {op for op in found if OPERATIONS.search(op)} - RESTORES
    kinds = {node.WhichOneof("kind") for node in meta.object_graph_def.nodes}
    assert kinds <= {
        "user_object",
        "function",
        "bare_concrete_function",
        "variable",
        "constant",
        "captured_tensor",
        "asset",
    }
    for node in meta.object_graph_def.nodes:
        assert "keras" not in node.user_object.identifier and not node.user_object.metadata
    files = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert files <= {".pb", ".index", ".data-00000-of-00001", ".json"}


def test_operations_sees_what_runs_python():
    function = tf.function(lambda x: tf.numpy_function(np.sin, [x], tf.float32))
    graph = function.get_concrete_function(tf.TensorSpec([], tf.float32)).graph.as_graph_def()
    assert any(OPERATIONS.search(op) for op in operations(graph))


def test_model_file_holds_plain_json_and_arrays(tmp_path, network):
    network.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert set(archive.namelist()) == {"metadata.json", "config.json", "model.weights.h5"}
        config = archive.read("config.json").decode()
    json.loads(config)
    assert not re.search(r"Lambda|__lambda__|\"function\"|py_func", config)
