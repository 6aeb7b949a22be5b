"""Tests of `snn_tf.execution`: what `auto` becomes, and that a run keeps to it."""

import gc
import json
import weakref

import pytest
import tensorflow as tf

from snn_tf import execution, native
from snn_tf.config import Config
from snn_tf.errors import UsageError, UserError


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine look like another."""

    def like(gpu=(), compiler=True, features=("avx512f",)):
        def operations():
            if not compiler:
                raise native.Unavailable("no C++ compiler")

        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["gpu"] if gpu else [])
        details = {"compute_capability": gpu}
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: details)
        monkeypatch.setattr(native, "operations", operations)
        monkeypatch.setattr("snn_tf.machine.cpuinfo", lambda: f"flags : {' '.join(features)}")

    return like


def resolved(run_dir, **settings):
    config = execution.resolve(Config(run_dir=str(run_dir), **settings))
    return config.lif, config.jit_compile, config.precision


def test_cpu_gets_the_native_neuron(machine, tmp_path):
    machine()
    assert resolved(tmp_path) == ("native", "false", "float32")


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16"])
def test_cpu_that_multiplies_bfloat16_gets_it(machine, tmp_path, feature):
    machine(features=["avx512f", feature])
    assert resolved(tmp_path) == ("native", "false", "mixed_bfloat16")


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 5), "float32"), ((8, 0), "mixed_bfloat16"), ((9, 0), "mixed_bfloat16")],
)
def test_gpu_compiles_the_whole_step(machine, tmp_path, capability, precision):
    machine(gpu=capability)
    assert resolved(tmp_path) == ("fused", "true", precision)


def test_without_a_compiler_fused_is_used_and_said(machine, tmp_path, capsys):
    machine(compiler=False)
    assert resolved(tmp_path) == ("fused", "false", "float32")
    assert "--lif=native: using fused instead, no C++ compiler" in capsys.readouterr().out


def test_run_that_began_without_a_compiler_goes_on_with_fused(machine, tmp_path, capsys):
    machine(compiler=False)
    resolved(tmp_path)
    assert "execution: --lif=fused" in capsys.readouterr().out
    machine()
    assert resolved(tmp_path)[0] == "fused"


def test_run_that_began_with_native_keeps_it_for_where_it_can_be_had(machine, tmp_path):
    machine()
    resolved(tmp_path)
    machine(compiler=False)
    assert resolved(tmp_path)[0] == "fused"
    machine()
    assert resolved(tmp_path)[0] == "native"


def test_explicit_settings_stay(machine, tmp_path):
    machine(features=["avx512_bf16"])
    given = {"lif": "rnn", "jit_compile": "true", "precision": "float32"}
    assert resolved(tmp_path, **given) == ("rnn", "true", "float32")


def test_compiled_step_on_a_cpu_takes_fused(machine, tmp_path):
    machine()
    assert resolved(tmp_path, jit_compile="true")[:2] == ("fused", "true")


def test_native_with_a_compiled_step_names_both():
    with pytest.raises(UsageError, match=r"--jit_compile=true: .* --lif=native"):
        Config(lif="native", jit_compile="true")


def test_run_keeps_what_it_began_with(machine, tmp_path, capsys):
    machine(features=["avx512_bf16"])
    first = resolved(tmp_path)
    assert json.loads((tmp_path / "execution.json").read_text()) == {
        "lif": "native",
        "jit_compile": "false",
        "precision": "mixed_bfloat16",
    }
    capsys.readouterr()
    machine()
    assert resolved(tmp_path) == first
    assert capsys.readouterr().out == ""


def test_flag_given_later_holds_for_its_command_alone(machine, tmp_path):
    """Otherwise one that is refused would change the run."""
    machine()
    first = resolved(tmp_path)
    assert resolved(tmp_path, lif="rnn", precision="mixed_bfloat16") == (
        "rnn",
        "false",
        "mixed_bfloat16",
    )
    assert resolved(tmp_path) == first
    resolved(tmp_path, precision="mixed_bfloat16", overwrite=True)
    assert resolved(tmp_path) == ("native", "false", "mixed_bfloat16")


def test_flag_given_first_is_kept(machine, tmp_path):
    machine()
    first = resolved(tmp_path, lif="rnn")
    assert first[0] == "rnn" and resolved(tmp_path) == first


def test_choice_is_shown_once(machine, tmp_path, capsys):
    machine()
    resolved(tmp_path)
    assert "execution: --lif=native, --jit_compile=false, --precision=float32" in capsys.readouterr().out


def test_choice_shown_is_what_is_used(machine, tmp_path, capsys):
    machine(compiler=False)
    resolved(tmp_path)
    assert "execution: --lif=fused, " in capsys.readouterr().out


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_tensorflows(machine, tmp_path, monkeypatch, deterministic):
    machine()
    asked = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: asked.append(True))
    execution.resolve(Config(run_dir=str(tmp_path), deterministic=deterministic))
    assert bool(asked) == deterministic


@pytest.mark.parametrize(
    "kept", ["[]", "3", '"native"', "null", "{", '{"lif": ["native"]}', '{"lif": 3}']
)
def test_broken_choice_is_one_line_with_its_path(machine, tmp_path, kept):
    machine()
    (tmp_path / "execution.json").write_text(kept)
    with pytest.raises(UserError) as caught:
        execution.resolve(Config(run_dir=str(tmp_path)))
    assert "\n" not in str(caught.value)


def traced_graph() -> weakref.ref:
    """The graph of a function with a gradient of its own, after nobody else holds it."""

    @tf.custom_gradient
    def doubled(x):
        return 2 * x, lambda upstream: 2 * upstream

    graph = tf.function(doubled).get_concrete_function(tf.constant(1.0)).graph
    return weakref.ref(graph)


def test_graphs_traced_within_are_let_go_and_those_before_stay():
    before = traced_graph()
    with execution.released():
        within = traced_graph()
    gc.collect()
    assert within() is None and before() is not None


def test_gradients_registered_before_are_still_found():
    @tf.function
    @tf.custom_gradient
    def tripled(x):
        return 3 * x, lambda upstream: 5 * upstream

    x = tf.constant(1.0)
    tripled.get_concrete_function(x)
    with execution.released():
        tf.function(tf.custom_gradient(lambda y: (y, lambda upstream: upstream)))(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tripled(x)
    assert float(tape.gradient(y, x)) == 5.0


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), tf.errors.ResourceExhaustedError(None, None, "OOM for [9]\nmore")]
)
def test_lack_of_memory_is_one_line_with_what_helps(error):
    said = r"^not enough memory: .+; lower --batch_size"
    with pytest.raises(UserError, match=said) as caught, execution.reported():
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", [tf.errors.NotFoundError, tf.errors.PermissionDeniedError, tf.errors.DataLossError]
)
def test_file_that_has_gone_is_one_line(kind):
    said = "^a file could no longer be read: cat.png is not there$"
    with pytest.raises(UserError, match=said), execution.reported():
        raise kind(None, None, "cat.png is not there\n\t [[node]]")


def test_line_from_within_a_graph_says_what_failed(tmp_path):
    read = tf.function(lambda path: tf.strings.length(tf.io.read_file(path)))
    said = f"^a file could no longer be read: .*{tmp_path}/cat.png; No such file"
    with pytest.raises(UserError, match=said), execution.reported():
        read(tf.constant(f"{tmp_path}/cat.png"))


def test_lack_of_memory_within_a_graph_says_for_what():
    fill = tf.function(lambda count: tf.reduce_sum(tf.random.uniform([count])))
    # More than any address space holds, which no machine promises.
    said = rf"^not enough memory: OOM when allocating tensor with shape\[{2**56}\]"
    with pytest.raises(UserError, match=said), execution.reported():
        fill(tf.constant(2**56, tf.int64))
