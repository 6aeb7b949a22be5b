"""Broken input in quantity: no traceback, no hang, and a refusal is one line.

The fast tests take a sample; `make fuzz` takes the whole and prints what became of it. Seeds are fixed.
"""

import collections
import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import parsed
from fuzzing import RunFolder, fate, flagfile, image_folder, results_row
from test_results import record

from snn_tf import data
from snn_tf.config import STAGES

ROOT = Path(__file__).resolve().parents[1]
RECORD = record(np.arange(20) < 17, np.arange(20) < 19)
SAMPLE = {"flagfiles": 150, "run folders": 150, "results": 100, "image folders": 15}
WHOLE = {"flagfiles": 4000, "run folders": 3500, "results": 2000, "image folders": 600}
KINDS = tuple(SAMPLE)
CLI_RUNS = 50
CLI_SECONDS = 300

Attempt = Callable[[], object]


def stream(kind: str, folder: Path) -> Callable[[random.Random], Attempt]:
    """Makes the next input of a kind in `folder`, and gives what reads it."""
    if kind == "flagfiles":
        return lambda rng: functools.partial(parsed, *flagfile(rng, folder))
    if kind == "run folders":
        return RunFolder(folder, RECORD).broken
    if kind == "results":
        return lambda rng: results_row(rng, folder, json.dumps(RECORD).encode())
    return lambda rng: functools.partial(data.load, image_folder(rng, folder))


def fates(kind: str, folder: Path, count: int, seed: int) -> collections.Counter:
    """What became of `count` inputs; the first that fails is told by its number."""
    following, rng = stream(kind, folder), random.Random(f"{seed}/{kind}")
    found: collections.Counter = collections.Counter()
    for number in range(count):
        attempt = following(rng)
        try:
            found[fate(attempt)] += 1
        except Exception as error:
            pytest.fail(f"{kind}, seed {seed}, input {number}: {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sample_of_broken_input_ends_in_a_result_or_one_line(tmp_path, kind):
    found = fates(kind, tmp_path, SAMPLE[kind], seed=0)
    assert found["accepted"] and found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_broken_input_ends_in_a_result_or_one_line(tmp_path, kind, capsys):
    found = fates(kind, tmp_path, WHOLE[kind], seed=1)
    with capsys.disabled():
        print(f"\n{kind}: {WHOLE[kind]} inputs, {dict(found)}, no traceback, no hang")


def command_lines(folder: Path) -> list[Callable[[random.Random], list[str]]]:
    """Makers of flags that lead to broken input; none of them gets as far as a training."""
    runs = RunFolder(folder, RECORD)
    nowhere = [f"--run_dir={folder}/new", "--dataset=folder:/no/such/folder", "--meta_model="]

    def broken_run(rng: random.Random) -> list[str]:
        runs.broken(rng)
        return [f"--run_dir={folder}/run", "--dataset=digits", f"--stage={rng.choice(STAGES[2:])}"]

    def broken_images(rng: random.Random) -> list[str]:
        config = image_folder(rng, folder)
        return [f"--run_dir={folder}/images_run", f"--dataset={config.dataset}", "--network=vgg16"]

    return [lambda rng: [*flagfile(rng, folder), *nowhere], broken_run, broken_images]


@pytest.mark.slow
def test_broken_input_on_the_command_line_ends_in_one_line(tmp_path, capsys):
    makers, rng = command_lines(tmp_path), random.Random("command line")
    codes: collections.Counter = collections.Counter()
    for number in range(CLI_RUNS):
        words = makers[number % len(makers)](rng)
        command = [sys.executable, "train.py", *words]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=CLI_SECONDS)
        said = result.stderr.decode(errors="backslashreplace")
        assert result.returncode in (1, 2), f"input {number}, {words}: {result.returncode}, {said}"
        assert "Traceback" not in said, f"input {number}, {words}: {said}"
        assert sum(line.startswith("train.py: ") for line in said.splitlines()) == 1, said
        codes[result.returncode] += 1
    with capsys.disabled():
        print(f"\ncommand line: {CLI_RUNS} inputs, exit codes {dict(codes)}, no traceback, no hang")
