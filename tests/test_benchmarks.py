"""The programs of benchmarks/: their headers, their help, and that the workloads are what they say."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"


def is_program(path: Path) -> bool:
    """Whether the last statement of a file is `if __name__ == "__main__"`."""
    last = ast.parse(path.read_text()).body[-1]
    return isinstance(last, ast.If) and "__main__" in ast.dump(last.test)


PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py") if is_program(path))


def run(name: str, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(FOLDER / name), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture
def folder_on_path(monkeypatch):
    """Programs of the folder import each other by bare name, as they do when they run."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_programs_are_found():
    assert {"peers.py", "train_step.py", "lif_scan.py", "scaling.py"} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_header_gives_the_command(name):
    assert f"python benchmarks/{name}" in (
        ast.get_docstring(ast.parse((FOLDER / name).read_text())) or ""
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_readme_names_the_program(name):
    assert f"`{name}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [name if name == "worker.py" else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS],
)
def test_program_answers_help(name):
    shown = run(name, "--help")
    assert "flags:" in shown.stdout or "options:" in shown.stdout, shown.stderr
    assert name in shown.stdout


@pytest.mark.parametrize("name", ["W1", pytest.param("W2", marks=pytest.mark.slow)])
def test_first_image_has_the_published_logits(name, folder_on_path):
    import libraries.ours
    from workloads import WORKLOADS

    workload = WORKLOADS[name]
    logits = libraries.ours.entrant(workload, "precision=float32+lif=fused").infer()
    assert logits.shape == (workload.batch, 10)
    np.testing.assert_allclose(logits[0, :2], workload.logits, atol=5e-4)


@pytest.mark.parametrize("structure", ["irregular", "channel"])
def test_snn_to_be_measured_is_as_sparse_as_its_density(structure, folder_on_path):
    import project
    from snn_tf import costs, evaluation

    config = project.settings(
        network="vgg5", width=0.25, head="linear", density=0.25, budget="macs", structure=structure
    )
    dense, sparse = (
        costs.ann_costs(evaluation.synapses(project.snn(each)))["macs"]
        for each in (dataclasses.replace(config, density=1.0), config)
    )
    assert sparse / dense == pytest.approx(0.25, abs=0.02)


def test_channels_last_gives_the_same_products(folder_on_path):
    from workloads import Workload, channels_last

    plan = Workload((4, "P", 6, "P"), head=(5,), gain=1.0, timesteps=1, batch=1, logits=(0.0, 0.0))
    kernels = plan.weights()
    x = np.random.default_rng(2).standard_normal((3, 6, 8, 8))
    rows = x.reshape(3, -1) @ kernels[2].T
    turned = x.transpose(0, 2, 3, 1).reshape(3, -1) @ channels_last(kernels)[2]
    np.testing.assert_allclose(turned, rows, rtol=1e-6, atol=1e-6)


def test_median_takes_each_column_by_itself(folder_on_path):
    from measure import Seconds, median

    rows = [Seconds(1.0, 9.0), Seconds(2.0, 8.0), Seconds(9.0, 1.0)]
    assert median(rows) == Seconds(2.0, 8.0)


def test_take_turns_runs_every_call_in_every_round(folder_on_path):
    from measure import take_turns

    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    take_turns(calls, budget=0.0, least=3, warm_up=1)
    assert order == list("ab" * 4)


def test_peak_memory_begins_anew(folder_on_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    from measure import peak_memory, resident_mib

    np.ones(2**25)  # 256 MiB, gone before the block begins
    with peak_memory() as peak_mib:
        before = resident_mib()
        assert peak_mib() < before + 64
        np.ones(2**25)
        assert peak_mib() > before + 200


def test_program_that_fails_gives_its_last_line(folder_on_path):
    from measure import run_program

    found = run_program("worker.py", 60.0, library="nonesuch", workload="W1")
    assert "nonesuch" in found["error"]
